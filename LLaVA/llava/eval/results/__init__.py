"""Finished runs: rows of scores, published rows beside them, intervals and tests."""
