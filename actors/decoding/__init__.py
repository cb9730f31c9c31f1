"""The decoding method: the guidance formula, sampling, speculation and the state of a session, in compiled kernels.

Of the project it may import `actors.api` alone: no torch, no Ray, no network.
"""
