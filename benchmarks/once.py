"""What takes minutes, is always the same and is kept in the user's cache: the trained series, and
what z4ai does with them. Each series has a process and a thread of its own, both at once:
``python -m benchmarks.once gpt``."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec
import torch

from benchmarks.archives import z4ai_delta
from benchmarks.codec_states import series_files, train_series
from benchmarks.components import SERIES
from benchmarks.keeping import WEIGHTS, WHOLE, Kept, keep
from benchmarks.measure import QUICK

Z4AI = "z4ai delta"


def make_once() -> None:
    """Make what is not there."""
    missing = [name for name in SERIES if not _is_made(name)]
    if missing:
        print(f"making {', '.join(missing)}, which takes minutes and is done once", flush=True)
    makers = [subprocess.Popen([sys.executable, "-m", __name__, name]) for name in missing]
    for maker in makers:
        if maker.wait():
            raise RuntimeError("a series could not be made; what is above says why")


def z4ai_of(series: str, kind: str) -> Kept:
    """What z4ai did with a series."""
    return msgspec.json.decode(_record(series, kind).read_bytes(), type=Kept)


def _record(series: str, kind: str) -> Path:
    name = f"{series}-{kind.split()[0]}-z4ai-{version('z4ai')}.json"
    return series_files(series)[0].with_name(name)


def _is_made(series: str) -> bool:
    needed = [series_files(series)[-1]]
    if not QUICK:
        needed += [_record(series, kind) for kind in (WHOLE, WEIGHTS)]
    return all(path.exists() for path in needed)


def main() -> None:
    """Train one series, and have z4ai keep it."""
    series = sys.argv[1]
    torch.set_num_threads(1)
    train_series(series)
    for kind in () if QUICK else (WHOLE, WEIGHTS):
        if not _record(series, kind).exists():
            found = keep(series, kind, {Z4AI: z4ai_delta})
            _record(series, kind).write_bytes(msgspec.json.encode(found.kept[Z4AI]))


if __name__ == "__main__":
    main()
