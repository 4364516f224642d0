"""A scorer's training: what a model attends to in images, and a small network that predicts it from their tokens."""
