"""What is learnt before a run: recipes of FitPrune, pruners of OC-VTP. Methods reach it by name, when they fit."""
