"""A model replica: it batches the extends of all coordinators into forwards, and answers lookups of logits rows.

It may import all of `actors` but `coordinator` and `serve`, no Ray, and torch only where `build` loads a model.
"""
