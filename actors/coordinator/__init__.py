"""The coordinator: admission, exchange of logits with model replicas, verification of rows, recovery from faults.

It imports actors.api, actors.decoding, actors.text and actors.wire, the configuration, the directory and the metrics.
"""
