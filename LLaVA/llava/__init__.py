"""LLaVA with visual token pruning."""
