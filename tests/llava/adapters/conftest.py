"""Pruning a model of transformers takes encoded images apart from pixels: transformers 5.18 and later."""

from __future__ import annotations

import inspect

import transformers

forward = inspect.signature(transformers.LlavaForConditionalGeneration.forward)
collect_ignore_glob = [] if "mm_encoder_outputs" in forward.parameters else ["test_*.py"]
