"""Plans and runs the table: models x pruning configurations x benchmarks, a worker group a model and configuration.

``python -m lmms_eval_otprune.runner --help`` says what can be chosen.
"""
