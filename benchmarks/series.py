"""Ten AdamW checkpoints of real trainings: bytes, and the speed of saves and loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.archives import Ckpt, Moonclip, Raw, restic_version, xor_zstd, zipnn
from benchmarks.components import SERIES
from benchmarks.keeping import CHECKPOINTS, OURS, WEIGHTS, WHOLE, Makers, Outcome, keep
from benchmarks.once import RESTIC, Z4AI, kept_once, make_once
from benchmarks.table import Bar, Table, Target

_RAW = "ceiling: save_file + fsync; load_file and BLAKE3"
_NAMES = {"gpt": "GPT", "minilm": "MiniLM"}


def measure(folder: Path) -> Table:
    """Both series as they are, and their weights in bfloat16."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    targets: list[Target] = []
    absent: dict[str, str] = {}
    make_once()
    for series in SERIES:
        for kind in (WHOLE, WEIGHTS):
            name = f"{_NAMES[series]}, {kind}"
            place = folder / series / kind.split()[0]
            place.mkdir(parents=True)
            is_whole = kind == WHOLE
            found = keep(series, kind, _whole(place) if is_whole else _weights(place))
            found.kept.update(kept_once(series, kind))
            peers = _WHOLE_PEERS if is_whole else _WEIGHT_PEERS
            bound = 0.93 if is_whole else 0.85
            rows += _rows(name, found)
            bars += _bars(name, found, peers, bound)
            targets.append(
                Target(f"{name}, bytes over the best peer's", _over_best(found, peers), bound, True)
            )
            if is_whole:
                targets += _speed_targets(name, found)
            absent |= found.absent
    release = restic_version()
    if release is None:
        absent[RESTIC] = "the program restic is not installed"
    return Table(
        title="Ten checkpoints",
        compared="A small GPT trained from scratch (10.9 M parameters) and a fine-tuned MiniLM (22.7 M), ten checkpoints each, ten steps apart: weights, `exp_avg` and `exp_avg_sq` in fp32; then the weights alone in bfloat16. ckpt, moonclip and restic save to the disk, the first two durably; z4ai, ZipNN and XOR + zstd work in memory and write nothing. z4ai and XOR take the checkpoint before as base, so that reading the tenth needs the nine before it; a base of ckpt is never itself a difference, and two reads are the most. Bytes are of everything in the store. Speeds are medians of ten; the archives take turns at each checkpoint, but z4ai and restic, which take minutes, were measured once, on both models at the same time with a core for each.",
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
        remark="" if release is None else f"restic {release}.",
    )


_WHOLE_PEERS = ("moonclip", Z4AI, "ZipNN", RESTIC)
_WEIGHT_PEERS = ("XOR + zstd", "XOR + zstd, to the first", Z4AI)


def _whole(place: Path) -> Makers:
    return {
        OURS: lambda: Ckpt(place / "max", "max"),
        "ckpt auto": lambda: Ckpt(place / "auto", "auto"),
        "moonclip": lambda: Moonclip(place / "moonclip"),
        "ZipNN": zipnn,
        _RAW: lambda: Raw(place / "raw"),
    }


def _weights(place: Path) -> Makers:
    return {
        OURS: lambda: Ckpt(place / "max", "max"),
        "XOR + zstd": lambda: xor_zstd(chained=True),
        "XOR + zstd, to the first": lambda: xor_zstd(chained=False),
    }


def _over_best(found: Outcome, peers: Sequence[str]) -> float:
    """ckpt's bytes over those of the smallest of these."""
    others = [found.kept[peer].nbytes for peer in peers if peer in found.kept]
    return found.kept[OURS].nbytes / min(others)


def _rows(name: str, found: Outcome) -> list[tuple[str, ...]]:
    ours = found.kept[OURS].nbytes
    each = found.raw / CHECKPOINTS / 1e6
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
    ours = found.kept[OURS].nbytes
    return [
        Bar(f"{name}: {archive}", ours / kept.nbytes, bound if archive in peers else None, True)
        for archive, kept in found.kept.items()
        if archive != OURS
    ]


def _speed_targets(name: str, found: Outcome) -> list[Target]:
    if "moonclip" not in found.kept:
        return []
    ours, peer = found.kept[OURS], found.kept["moonclip"]
    save = median(peer.saves) / median(ours.saves)
    load = median(peer.loads) / median(ours.loads)
    return [
        Target(f"{name}, save speed over moonclip's", save, 2.0),
        Target(f"{name}, load speed over moonclip's", load, 4.0),
    ]
