"""What is learnt before a run: FitPrune's recipes, OC-VTP's pruners, scorers. Methods reach it by name, when they fit.

Each is gathered from a model and then fitted; both steps continue where they were stopped.

    data.py       images, with a question each where one is needed
    prompts.py    a model asked these questions, and its attention in each layer
    options.py    what the three commands share
    fitprune/     sums of attention, a search over budgets, a recipe
    ocvtp/        features of the vision tower, training, a pruner
    scorer/       features and attention, training, a scorer
"""
