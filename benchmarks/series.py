"""Ten AdamW checkpoints of real trainings: bytes, and the speed of saves and loads."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

from benchmarks.archives import (
    Archive,
    Ckpt,
    Moonclip,
    Restic,
    xor_zstd,
    z4ai_delta,
    zipnn,
)
from benchmarks.codec_states import train_series
from benchmarks.components import SERIES
from benchmarks.measure import QUICK, shown_reason
from benchmarks.states import State
from benchmarks.table import Bar, Table, Target

_OURS, _Z4AI = "ckpt max", "z4ai delta"
_NAMES = {"gpt": "GPT", "minilm": "MiniLM"}
_CHECKPOINTS = 3 if QUICK else 10

Makers = Mapping[str, Callable[[], Archive]]


@dataclass(slots=True)
class Kept:
    """What one archive did with a series."""

    saves: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """All archives of a series, and why some peers have none."""

    raw: int
    kept: dict[str, Kept]
    absent: Mapping[str, str]

    def bytes_over_best(self, peers: Sequence[str]) -> float:
        """ckpt's bytes over those of the smallest of these."""
        others = [self.kept[peer].nbytes for peer in peers if peer in self.kept]
        return self.kept[_OURS].nbytes / min(others)


def measure(folder: Path) -> Table:
    """Both series as they are, and their weights in bfloat16."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    targets: list[Target] = []
    absent: dict[str, str] = {}
    for series in SERIES:
        for kind in ("checkpoints", "bf16 weights"):
            name = f"{_NAMES[series]}, {kind}"
            place = folder / series / kind.split()[0]
            place.mkdir(parents=True)
            is_whole = kind == "checkpoints"
            found = _keep(series, _whole(place) if is_whole else _weights(place), _READ[kind])
            if not QUICK:
                found.kept[_Z4AI] = keep_z4ai(series, kind)
            peers = _WHOLE_PEERS if is_whole else _WEIGHT_PEERS
            bound = 0.93 if is_whole else 0.85
            rows += _rows(name, found)
            bars += _bars(name, found, peers, bound)
            targets.append(
                Target(
                    f"{name}, bytes over the best peer's", found.bytes_over_best(peers), bound, True
                )
            )
            if is_whole:
                targets += _speed_targets(name, found)
            absent |= found.absent
    return Table(
        title="Ten checkpoints",
        compared="A small GPT trained from scratch (10.9 M parameters) and a fine-tuned MiniLM (22.7 M), ten checkpoints each, ten steps apart: weights, `exp_avg` and `exp_avg_sq` in fp32; then the weights alone in bfloat16. ckpt and moonclip save durably to the disk; z4ai, ZipNN and XOR + zstd work in memory and write nothing. z4ai and XOR take the checkpoint before as base, so that reading the tenth needs the nine before it; a base of ckpt is never itself a difference, and two reads are the most. Bytes are of everything in the store. Speeds are medians of ten; the archives take turns at each checkpoint, but z4ai, which takes ten minutes, was measured once.",
        columns=(
            "",
            "bytes of ckpt over this one's",
            "series",
            "bytes over raw",
            "save, MB/s",
            "load, MB/s",
        ),
        rows=tuple(rows),
        axis="bytes of ckpt over this one's",
        bars=tuple(bars),
        targets=tuple(targets),
        absent=absent,
        packages=("moonclip", "z4ai", "zipnn", "zstandard", "pcodec"),
    )


_WHOLE_PEERS = ("moonclip", _Z4AI, "ZipNN", "restic")
_WEIGHT_PEERS = ("XOR + zstd", "XOR + zstd, to the first", _Z4AI)


def _whole(place: Path) -> Makers:
    return {
        _OURS: lambda: Ckpt(place / "max", "max"),
        "ckpt auto": lambda: Ckpt(place / "auto", "auto"),
        "moonclip": lambda: Moonclip(place / "moonclip"),
        "ZipNN": zipnn,
        "restic": lambda: Restic(place / "restic"),
    }


def _weights(place: Path) -> Makers:
    return {
        _OURS: lambda: Ckpt(place / "max", "max"),
        "XOR + zstd": lambda: xor_zstd(chained=True),
        "XOR + zstd, to the first": lambda: xor_zstd(chained=False),
    }


def _bf16(path: Path) -> State:
    return {
        name.removeprefix("weights/"): tensor.to(torch.bfloat16)
        for name, tensor in load_file(path).items()
        if name.startswith("weights/")
    }


def _fp32(path: Path) -> State:
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


_READ: Mapping[str, Callable[[Path], State]] = {"checkpoints": _fp32, "bf16 weights": _bf16}


def _keep(series: str, makers: Makers, read: Callable[[Path], State]) -> Outcome:
    """Have every archive save and load every checkpoint, in turns."""
    archives: dict[str, Archive] = {}
    kept: dict[str, Kept] = {}
    absent: dict[str, str] = {}
    for name, make in makers.items():
        try:
            archives[name] = make()
        except (ImportError, OSError) as error:
            absent[name] = shown_reason(error)
    raw = 0
    for path in train_series(series)[:_CHECKPOINTS]:
        state = read(path)
        raw += sum(tensor.nbytes for tensor in state.values())
        for name, archive in archives.items():
            _turn(archive, state, kept.setdefault(name, Kept()), check=name == _OURS)
    for name, archive in archives.items():
        kept[name].nbytes = archive.nbytes()
    return Outcome(raw, kept, absent)


def keep_z4ai(series: str, kind: str) -> Kept:
    """What z4ai does with a series. It takes ten minutes, and its bytes are always the same: it is
    measured once, and kept with the trained series."""
    paths = train_series(series)
    name = f"{series}-{kind.split()[0]}-z4ai-{version('z4ai')}.json"
    record = paths[0].with_name(name)
    if not record.exists():
        print(f"measuring z4ai on {series}, {kind}, which is done once", flush=True)
        found = _keep(series, {_Z4AI: z4ai_delta}, _READ[kind])
        record.write_bytes(msgspec.json.encode(found.kept[_Z4AI]))
    return msgspec.json.decode(record.read_bytes(), type=Kept)


def _turn(archive: Archive, state: State, kept: Kept, *, check: bool) -> None:
    start = time.perf_counter()
    archive.save(state)
    saved = time.perf_counter()
    loaded: Mapping[str, Any] = archive.load()
    kept.saves.append(saved - start)
    kept.loads.append(time.perf_counter() - saved)
    if check and not all(torch.equal(loaded[name], state[name]) for name in state):
        raise AssertionError("a checkpoint did not come back")


def _rows(name: str, found: Outcome) -> list[tuple[str, ...]]:
    ours = found.kept[_OURS].nbytes
    each = found.raw / _CHECKPOINTS / 1e6
    return [
        (
            archive,
            f"{ours / kept.nbytes:.3f}",
            name,
            f"{kept.nbytes / found.raw:.4f}",
            f"{each / median(kept.saves):.0f}",
            f"{each / median(kept.loads):.0f}",
        )
        for archive, kept in found.kept.items()
    ]


def _bars(name: str, found: Outcome, peers: Sequence[str], bound: float) -> list[Bar]:
    ours = found.kept[_OURS].nbytes
    return [
        Bar(f"{name}: {archive}", ours / kept.nbytes, bound if archive in peers else None, True)
        for archive, kept in found.kept.items()
        if archive != _OURS
    ]


def _speed_targets(name: str, found: Outcome) -> list[Target]:
    if "moonclip" not in found.kept:
        return []
    ours, peer = found.kept[_OURS], found.kept["moonclip"]
    save = median(peer.saves) / median(ours.saves)
    load = median(peer.loads) / median(ours.loads)
    return [
        Target(f"{name}, save speed over moonclip's", save, 2.0),
        Target(f"{name}, load speed over moonclip's", load, 4.0),
    ]
