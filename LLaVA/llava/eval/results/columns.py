"""The columns of the tables."""

from llava.benchmarks import BENCHMARKS as COLUMNS
from llava.benchmarks import Benchmark as Column

__all__ = ["COLUMNS", "Column"]
