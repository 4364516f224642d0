"""Tests that need vLLM (test_vllm_*.py) are collected where it is installed: ``bash tests/serve/run.sh``."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_vllm_*.py"]
