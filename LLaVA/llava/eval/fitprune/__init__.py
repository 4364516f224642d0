"""FitPrune's recipes: fitted to a checkpoint, a budget and a few examples. ``python -m llava.eval.fitprune --help``."""
