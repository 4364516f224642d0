"""FitPrune's recipes: fitted to a checkpoint, a budget and a few examples."""
