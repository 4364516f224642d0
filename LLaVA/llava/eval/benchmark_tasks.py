"""`llava.benchmark_tasks` under its former name."""

from llava.benchmark_tasks import *  # noqa: F403
