"""Tests of the vLLM engine. They run in its environment: `make test-long` starts them there."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_HERE = [file.name for file in Path(__file__).parent.glob("test_*.py") if file.name != "test_version.py"]
collect_ignore = [] if importlib.util.find_spec("vllm") else _HERE
