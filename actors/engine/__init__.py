"""One model in one process: weights, KV cache, attention, one ragged forward for many sessions, and held logits rows.

It may import `actors.decoding.hashing` alone of the project, and no Ray: `interface` and `errors` load no torch.
"""
