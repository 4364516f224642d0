"""Finished runs read back: rows of scores, their published counterparts, and what differences are worth."""
