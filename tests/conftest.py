"""What many tests share: the embedded trio, loaded once, and a browser."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from actors.api.generation import Role
from actors.replica.engine_thread import Engine
from tests.support.local_service import load_engines, trio_config


@pytest.fixture(scope="session", autouse=True)
def tables_are_made_anew(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads tables of vocabularies that another version of the code has left on this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def trio_engines() -> Mapping[Role, Engine]:
    """The trio's engines in exact mode. They keep no session once a service has released it."""
    return load_engines(trio_config())


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, headless."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium here: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(autouse=True)
def garbage_is_looked_for_as_before() -> Iterator[None]:
    """What a service sets for its own processes ends with the test that ran it in this one."""
    before = gc.get_threshold()
    yield
    if gc.get_threshold() != before:
        gc.set_threshold(*before)
        gc.unfreeze()
