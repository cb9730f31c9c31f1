"""Tests of the vLLM engine. They run in its environment: `make test-long` starts them there."""

from __future__ import annotations

import importlib.util

TESTS = ("contract", "engine", "graphs", "parallel")
collect_ignore = [] if importlib.util.find_spec("vllm") else [f"test_{name}.py" for name in TESTS]
