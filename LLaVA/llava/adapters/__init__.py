"""The pruners of `llava.pruning` on models that are not this package's own."""
