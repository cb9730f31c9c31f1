"""Commands for a person or a cluster: checks of a configuration, start-up, draining, generated files, demo and jobs.

It may import everything of `actors` and `router`; neither of them may import it.
"""
