"""The protocol between coordinators and models: framing, authentication, typed messages and their columns.

Of the project it may import `actors.api`, `actors.config` and `actors.decoding` alone: no torch and no Ray.
"""
