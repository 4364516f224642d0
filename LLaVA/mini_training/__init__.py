"""Trains llava-mini, the model that ships in `llava.mini`. Part of the repository, not of the installed package."""
