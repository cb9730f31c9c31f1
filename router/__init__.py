"""The HTTP side: OpenAI's API, access control, the request log, the playground, and failover between coordinators.

It may import `actors`, but never `cluster`; Ray only in `app`, which binds the Ray Serve application.
"""
