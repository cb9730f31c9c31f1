"""The service behind the HTTP server: each folder holds one process or one layer, and the top what several share.

It may import neither `router` nor `cluster`; only the deployments in `actors.serve` may import Ray.
"""
