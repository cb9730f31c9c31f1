"""The deadline of every wait in a test that only a fault of the product can make long."""

from __future__ import annotations

HANG_S = 240.0  # far more than a busy machine needs, less than the time limit of a test
