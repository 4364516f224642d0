"""The lmms-eval model `llava`, and pruning in lmms-eval's own wrappers of transformers models."""
