"""The embedded trio: its task, its tokenizers and its training, with the weights, and demos of the service with it.

The demos (`__main__`, `dpo`) may import all of `cluster`; the other modules import only this package.
"""
