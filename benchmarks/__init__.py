"""Measurements against peers in the same run; ``python -m benchmarks`` writes the page."""

QUICK_VARIABLE = "CKPT_BENCH_QUICK"
