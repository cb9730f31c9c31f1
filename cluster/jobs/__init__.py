"""Jobs that use a service: evaluations with reports, a choice of alpha, replays, and preference training of the guider.

It may import `actors`, `router`, the other modules of `cluster` and the task of `cluster.demo`.
"""
