"""The data of requests and answers: generation messages, sampling parameters and guidance, validated.

It may import nothing of the project, so that router, coordinator and replica can all import it.
"""
