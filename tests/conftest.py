"""Fixtures that many modules share, and how the suite is spread over processes.

Nothing heavy is imported here: pytest-xdist's controller reads this file too, and runs no test.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from actors.api.generation import Role
    from actors.replica.engine_thread import Engine
    from tests.support.local_ray import SharedRay
    from tests.support.local_service import LoadEngine

RAY = "ray"
SHARED_RAY: pytest.StashKey[SharedRay] = pytest.StashKey()
RAY_MARKS = (
    # Ray leaves sockets and child processes to its own exit handlers.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:ray"),
)


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that open a browser or run Ray; those of Ray come first, since they take longest."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
        if item.get_closest_marker(RAY):
            for mark in RAY_MARKS:
                item.add_marker(mark)
    items.sort(key=lambda item: item.get_closest_marker(RAY) is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, a module stays in one process, and all modules that run Ray stay in one process."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    @cache
    def scope(module: str) -> str:
        return RAY if f"pytest.mark.{RAY}" in (config.rootpath / module).read_text(encoding="utf-8") else module

    scheduler: Any = LoadFileScheduling(config, log)
    scheduler._split_scope = lambda nodeid: scope(nodeid.split("::", 1)[0])
    return scheduler


@pytest.fixture(scope="session", autouse=True)
def fresh_table_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads vocabulary tables that another version of the code left on this machine."""
    from actors.decoding.compiling import cache_folder

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NUMBA_CACHE_DIR", str(cache_folder()))  # of compiled kernels, which the source names
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def load_engine() -> LoadEngine:
    """Loads the engine of a role; `tests/vllm` has another, so that claims are tested on both engines."""
    from actors.replica.build import load_role

    return load_role


@pytest.fixture(scope="session")
def trio_engines(load_engine: LoadEngine) -> Mapping[Role, Engine]:
    """The trio's batch-invariant engines. They keep no session once a service has released it."""
    from tests.support.local_service import load_engines, trio_config

    return load_engines(trio_config(), load_engine)


@pytest.fixture(scope="session")
def _shared_ray(pytestconfig: pytest.Config) -> Iterator[SharedRay]:
    from tests.support.local_ray import SharedRay

    shared = pytestconfig.stash[SHARED_RAY] = SharedRay()
    yield shared
    shared.close()


@pytest.hookimpl(trylast=True)  # after the fixtures of the last Ray module
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """End the shared cluster after the last test of Ray: other tests need the cores, and no driver in their process."""
    shared = item.config.stash.get(SHARED_RAY, None)
    if shared is not None and (nextitem is None or not nextitem.get_closest_marker(RAY)):
        shared.close()


@pytest.fixture(scope="module")
def shared_ray(_shared_ray: SharedRay) -> SharedRay:
    """The cluster of all tests that kill no node, controller, proxy or head; started at its first use."""
    _shared_ray.open()
    return _shared_ray


@pytest.fixture(scope="module")
def no_shared_ray(_shared_ray: SharedRay) -> None:
    """The shared cluster has ended: a module with a cluster of its own needs the driver and the cores."""
    _shared_ray.close()


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
def unchanged_garbage_collection() -> Iterator[None]:
    """Settings that a service makes for its own process end with the test that ran it in this one."""
    before = gc.get_threshold()
    yield
    if gc.get_threshold() != before:
        gc.set_threshold(*before)
        gc.unfreeze()
