"""Tests of the vLLM engine. They run in its environment: `make test-long` starts them there."""

from __future__ import annotations

import importlib.util

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_contract.py", "test_engine.py", "test_parallel.py"]
