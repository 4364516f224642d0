"""The command ``python -m llava.eval.flops``, and the names of `llava.flops`, which it prints."""

from llava.flops import *  # noqa: F403
from llava.flops import __all__ as __all__
