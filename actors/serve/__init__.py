"""The deployments of Ray Serve: thin classes that place, start and stop the directory, the models and the coordinators.

It may import all of `actors`, and Ray; torch only in the processes of the models.
"""
