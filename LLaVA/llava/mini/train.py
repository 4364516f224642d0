"""``python -m llava.mini.train`` hands over to `mini_training`, which stands beside `llava` in the repository."""

import runpy
import sys
from pathlib import Path

folder = Path(__file__).resolve().parents[2] / "mini_training"
if not folder.is_dir():
    sys.exit(f"llava-mini is trained from the repository, with python LLaVA/mini_training; {folder} is not there")
runpy.run_path(str(folder), run_name="__main__")
