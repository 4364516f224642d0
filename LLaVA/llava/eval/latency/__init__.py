"""What selecting, prefilling and generating cost, measured: ``python -m llava.eval.latency --help``."""
