"""Benchmarks of the service: each module with a command in its docstring prints a table and, last, one JSON line.

They may import everything of the product and the harness in `tests.support`; no product module imports them.
"""
