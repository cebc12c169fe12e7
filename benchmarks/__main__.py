"""Runs all measurements, prints their tables and writes ``docs/benchmarks.md``."""

from __future__ import annotations

import os
import platform
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks import modules, push, start
from benchmarks.measure import ROUNDS, Timing

PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
_GIB = push.TENSORS * push.TENSOR_BYTES / 2**30


def main() -> None:
    """Measure, print and write."""
    parts = [_head()]
    with tempfile.TemporaryDirectory(prefix="ckpt-bench-", dir=Path.cwd()) as folder:
        parts.append(_push_table(Path(folder)))
        parts.append(_modules_table(Path(folder)))
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


def _modules_table(folder: Path) -> str:
    rows, ratios = [], []
    for cold in (False, True):
        timings = modules.compare_loads(folder, cold=cold)
        peer = timings["load_file + load_state_dict"].median
        ratios.append(timings["repo.load"].median / peer)
        where = "disk" if cold else "page cache"
        rows += [
            f"| {name} | {where} | {timing.median:.2f} | {timing.median / peer:.2f} |"
            for name, timing in timings.items()
        ]
    pushes = modules.compare_pushes(folder)
    module, state = (timing.median for timing in pushes.values())
    return (
        "## A module of 1 GiB in 64 layers\n\n"
        "`repo.load` allocates, reads, hashes every byte, rebuilds and proves the structure; its peer fills a module that is ready.\n\n"
        "| load | from | s | over the peer |\n|---|---|---|---|\n" + "\n".join(rows) + "\n\n"
        f"From the disk the load takes {ratios[1]:.2f} times its peer's time, from the page cache {ratios[0]:.2f} times (promised: at most 1.3 times). "
        "In memory the peer is one copy; hashing alone takes longer than that copy on two cores.\n\n"
        f"Pushing a module of a known structure took {module:.2f} s, pushing its state_dict {state:.2f} s: {module / state - 1:+.1%} (promised: at most +5 %).\n"
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
