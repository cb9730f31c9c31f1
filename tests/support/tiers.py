"""Parameters of the second tier: `make test` leaves them out, `make test-all` runs them."""

from __future__ import annotations

from functools import partial

import pytest

slow = partial(pytest.param, marks=pytest.mark.slow)
