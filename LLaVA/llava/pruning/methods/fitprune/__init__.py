"""FitPrune, a method that follows a recipe of how many visual tokens leave in each layer."""
