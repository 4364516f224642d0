"""OC-VTP's training: features of a vision tower, the pruner trained on them, and what it costs."""
