"""Guidance by small models whose vocabulary differs from the target's: retokenization and event probabilities.

It may import `actors.api` and `actors.decoding`, and no tokenizer library: tokenizers come as `TokenizerAdapter`.
"""
