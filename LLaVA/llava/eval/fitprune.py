"""The former name of ``python -m llava.fitting.fitprune``, kept for scripts that call it."""

import runpy

if __name__ == "__main__":
    runpy.run_module("llava.fitting.fitprune", run_name="__main__", alter_sys=True)
