"""What takes minutes, is always the same and is kept in the user's cache: the trained series, and
what z4ai and restic do with them. Each series has a process and a thread of its own, both at once:
``python -m benchmarks.once gpt``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import torch

from benchmarks.archives import Restic, restic_version, z4ai_delta
from benchmarks.codec_states import series_files, train_series
from benchmarks.components import SERIES
from benchmarks.keeping import WEIGHTS, WHOLE, Kept, Makers, keep
from benchmarks.measure import QUICK

Z4AI, RESTIC = "z4ai delta", "restic"


def make_once() -> None:
    """Make what is not there."""
    missing = [name for name in SERIES if not _is_made(name)]
    if missing:
        print(f"making all that is kept of {', '.join(missing)}", flush=True)
    makers = [subprocess.Popen([sys.executable, "-m", __name__, name]) for name in missing]
    ends = [maker.wait() for maker in makers]
    if any(ends):
        raise RuntimeError("a series could not be made; what is above says why")


def kept_once(series: str, kind: str) -> Mapping[str, Kept]:
    """What these peers did with a series."""
    return {
        name: msgspec.json.decode(record.read_bytes(), type=Kept)
        for name, record in _records(series, kind).items()
    }


def _records(series: str, kind: str) -> dict[str, Path]:
    """The file of each peer that can be measured here."""
    found = {Z4AI: version("z4ai"), RESTIC: restic_version() if kind == WHOLE else None}
    folder, what = series_files(series)[0].parent, kind.split()[0]
    return {
        name: folder / f"{series}-{what}-{name.split()[0]}-{release}.json"
        for name, release in found.items()
        if release is not None and not QUICK
    }


def _is_made(series: str) -> bool:
    records = [path for kind in (WHOLE, WEIGHTS) for path in _records(series, kind).values()]
    return all(path.exists() for path in (series_files(series)[-1], *records))


def main() -> None:
    """Train one series, and have the peers keep it."""
    series = sys.argv[1]
    torch.set_num_threads(1)
    train_series(series)
    for kind in (WHOLE, WEIGHTS):
        records = _records(series, kind)
        with TemporaryDirectory(dir=series_files(series)[0].parent) as folder:
            makers: Makers = {Z4AI: z4ai_delta, RESTIC: partial(Restic, Path(folder))}
            wanted = {name: makers[name] for name, path in records.items() if not path.exists()}
            for name, kept in keep(series, kind, wanted).kept.items():
                records[name].write_bytes(msgspec.json.encode(kept))


if __name__ == "__main__":
    main()
