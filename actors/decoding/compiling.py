"""Compiles the kernels of `actors.decoding.kernels` with numba, for one level of processors, with a cache of its own.

The instruction set is fixed to x86-64-v3 (AVX2 and FMA; Intel since 2013, AMD since 2015), and vector mathematics by
SVML is off. So one installation computes equal bits on every processor of that level. The level is not lower because
the C library chooses other variants of exp and log on processors without FMA.

Ray unpacks the code under a new path for every version of it, so numba's own cache, which is keyed by path, would miss.
Here the key is the source itself and the versions of what compiles it. The folder is `$NUMBA_CACHE_DIR`, or
`$XDG_CACHE_HOME/thinklogit/kernels` (`~/.cache`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

_X86 = platform.machine() in ("x86_64", "AMD64")
if _X86:
    os.environ["NUMBA_CPU_NAME"] = "x86-64-v3"
    os.environ["NUMBA_CPU_FEATURES"] = ""  # those of the level, and no others
os.environ["NUMBA_DISABLE_INTEL_SVML"] = "1"
os.environ["NUMBA_CACHE_LOCATOR_CLASSES"] = f"{__name__}.SourceKeyedLocator"

import llvmlite  # noqa: E402
import numba  # noqa: E402
import numpy as np  # noqa: E402
from llvmlite import binding  # noqa: E402
from numba.core import config  # noqa: E402
from numba.core.caching import _CacheLocator  # noqa: E402

config.reload_config()  # numba may have been imported before

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])
_kernels: list[Any] = []
_NEEDED = ("avx2", "bmi2", "fma")


class UnsupportedProcessor(RuntimeError):
    """The processor is below the level that the kernels are compiled for."""


class SourceKeyedLocator(_CacheLocator):  # type: ignore[misc]  # numba has no types
    """Finds the cache folder of a kernel by the contents of its module, wherever the module lies.

    The contents of `kernels.py` always count: a kernel of another module has those that it calls compiled into it.
    """

    def __init__(self, source: bytes, line: int) -> None:
        versions = sys.version, numba.__version__, llvmlite.__version__, np.__version__
        called = Path(__file__).with_name("kernels.py").read_bytes()
        self._stamp = hashlib.sha256(source + called + repr(versions).encode()).hexdigest()
        self._line = line

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> SourceKeyedLocator:
        """The locator of a kernel. A folder that cannot be written is replaced by a temporary one of this process."""
        locator = cls(Path(py_file).read_bytes(), py_func.__code__.co_firstlineno)
        locator.ensure_cache_path()
        return locator

    def ensure_cache_path(self) -> None:
        try:
            super().ensure_cache_path()
        except OSError as error:
            log.warning("every process compiles the kernels anew: %s cannot be written (%s)", cache_folder(), error)
            os.environ["NUMBA_CACHE_DIR"] = tempfile.mkdtemp(prefix="thinklogit-kernels-")

    def get_cache_path(self) -> str:
        return str(cache_folder() / self._stamp[:16])

    def get_source_stamp(self) -> str:
        return self._stamp

    def get_disambiguator(self) -> str:
        return str(self._line)


def cache_folder() -> Path:
    """The folder of compiled kernels."""
    if named := os.environ.get("NUMBA_CACHE_DIR"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "thinklogit" / "kernels"


def kernel(function: F) -> F:
    """Compile a function at its first call with each combination of types. It does not hold the interpreter's lock."""
    compiled = numba.njit(cache=True, nogil=True, error_model="numpy", boundscheck=False)(function)
    _kernels.append(compiled)
    return cast(F, compiled)


def check_processor() -> None:
    """Raise UnsupportedProcessor if this processor cannot run the kernels."""
    if _X86:
        features = binding.get_host_cpu_features()
        if missing := [name for name in _NEEDED if not features.get(name)]:
            raise UnsupportedProcessor(
                f"this processor lacks {', '.join(missing)}: the decoding kernels need x86-64-v3 (Intel from 2013, AMD "
                "from 2015). In a virtual machine, choose a CPU model of that level, or pass the host's through"
            )


def cache_misses() -> int:
    """Number of compilations in this process that found no cached result."""
    return sum(sum(each.stats.cache_misses.values()) for each in _kernels)
