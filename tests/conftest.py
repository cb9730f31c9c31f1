"""What many tests share: the embedded trio, loaded once."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from actors.forward import Engine
from actors.requests import Role
from benchmarks.local import load_engines, trio_config


@pytest.fixture(scope="session")
def trio_engines() -> Mapping[Role, Engine]:
    """The trio's engines in exact mode. They keep no session once a service has released it."""
    return load_engines(trio_config())
