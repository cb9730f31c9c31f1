"""Text and token ids: tokenizers, chat templates, and the maps between the vocabularies of models.

It may import `actors.api` and `actors.decoding`, and neither torch nor transformers.
"""
