"""``python -m mini_training`` from the folder ``LLaVA``, or ``python LLaVA/mini_training`` from anywhere."""

import sys
from pathlib import Path

if not __package__:  # started as a folder: its parent holds both packages
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from mini_training.train import main

if __name__ == "__main__":
    sys.exit(main())
