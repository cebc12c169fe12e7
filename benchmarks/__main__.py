"""Runs all measurements, prints their tables and writes ``docs/benchmarks.md``."""

from __future__ import annotations

import os
import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks import push, start
from benchmarks.measure import ROUNDS, Timing

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_GIB = push.TENSORS * push.TENSOR_BYTES / 2**30


def main() -> None:
    """Measure, print and write."""
    parts = [_head()]
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=Path.cwd()) as folder:
        parts.append(_push_table(Path(folder)))
        parts.append(_start_table(Path(folder) / "start"))
    text = "\n".join(parts)
    PAGE.write_text(text, encoding="utf-8")
    print(text)


def _head() -> str:
    packages = ("torch", "safetensors", "blake3", "SQLAlchemy", "click")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        "# Benchmarks\n\n"
        "<!-- Written by `make bench`; do not edit. -->\n\n"
        "Contestants take turns in one run, after one round to warm up; medians count. Timings on shared machines are noisy: read the ratios.\n\n"
        f"{date.today()}, {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, {versions}.\n"
    )


def _push_table(folder: Path) -> str:
    timings = push.compare(folder)
    peak = push.peak_memory(folder)
    ours = timings["ckpt push"].median
    rows = [
        f"| {name} | {timing.median:.2f} | {_GIB / timing.median:.2f} | {timing.median / ours:.2f} |"
        for name, timing in timings.items()
    ]
    ratio = timings["safetensors.save_file + fsync"].median / ours
    return (
        "## Durable local push, 1 GiB fp32 in 64 tensors\n\n"
        f"Median of {ROUNDS}. ckpt hashes every byte, looks it up, writes it, and commits; everything is on the disk when it returns.\n\n"
        "| | s | GiB/s | speed of ckpt push over this |\n|---|---|---|---|\n"
        + "\n".join(rows)
        + f"\n\nckpt push is {ratio:.2f} times as fast as `save_file` + fsync (promised: at least 0.8 times). "
        f"Its peak memory beside the state was {peak / 2**20:.0f} MiB (promised: at most 128 MiB).\n"
    )


def _start_table(folder: Path) -> str:
    timings = start.compare(folder)
    bounds = {"ckpt --help": "0.15", "ckpt ls": "0.5"}
    rows = [_start_row(name, timing, bounds.get(name, "")) for name, timing in timings.items()]
    return (
        "## Start of the command line\n\n"
        f"A fresh process each time, median of {start.ROUNDS}.\n\n"
        "| | s | promised, at most |\n|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _start_row(name: str, timing: Timing, bound: str) -> str:
    return f"| `{name}` | {timing.median:.3f} | {bound} |"


if __name__ == "__main__":
    main()
