"""Ranks of a gloo group that save to and load from a repository.

Run as a program it forks the ranks of each order on its standard input, one JSON object in a
line, and answers with one line: of each rank its signal and what it returned or raised. torch is
loaded once.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # FSDP2 and optimizers would load it in every rank anew
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import async_save as dcp_async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import ckpt
import ckpt.core.effects

GROUP_SECONDS = 20  # after which a rank gives up waiting for the others
ORDER_SECONDS = 60  # after which a group is killed


class Ranks:
    """The test's end of the program."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, folder: Path, scene: str, world: int, **order: Any) -> list[dict[str, Any]]:
        """What each rank of one group did with the repository in ``folder``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order |= {"scene": scene, "world": world, "folder": str(folder)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        assert select.select([self._process.stdout], [], [], 2 * ORDER_SECONDS)[0]
        found: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        return found

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(ORDER_SECONDS) == 0
        self._process.stdout.close()


class Net(nn.Module):
    """Sizes that 2, 3 and 4 do not all divide, a tensor of fewer rows than ranks, and a buffer."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(12, 10)
        self.last = nn.Linear(10, 2)
        self.norm = nn.BatchNorm1d(2)


def trained(seed: int, mesh: DeviceMesh) -> tuple[Any, Any]:
    """The state dicts of a sharded module and of its optimizer after one step."""
    net = Net(seed)
    fully_shard(net.first, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    for parameter in net.parameters():
        parameter.grad = parameter.detach() * 0.5
    optimizer.step()
    return get_state_dict(net, optimizer)


def made(seed: int, world: int) -> dict[str, Any]:
    """A training state: FSDP2, tensor parallel in both directions, replicated, and values."""
    mesh = init_device_mesh("cpu", (world,))
    square = init_device_mesh("cpu", (2, 2)) if world == 4 else None
    model, optimizer = trained(seed, mesh)
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator)

    both = random(6, 5)
    return {
        "model": model,
        "optimizer": optimizer,
        "parallel": {
            "column": distribute_tensor(random(5, 9), mesh, [Shard(1)]),
            "row": distribute_tensor(random(7, 3).to(torch.bfloat16), mesh, [Shard(0)]),
            "same": distribute_tensor(random(4), mesh, [Replicate()]),
            "both": distribute_tensor(both, square, [Shard(0), Shard(1)])
            if square is not None
            else distribute_tensor(both, mesh, [Shard(1)]),
        },
        "random": [torch.arange(6) + seed, random()],
        "step": 100 + seed,
        "betas": (0.9, float("inf"), random(2)),
        "names": ["a", {"b": None}],
    }


def whole(value: Any) -> Any:
    """The state with whole tensors; every rank takes part."""
    if isinstance(value, DTensor):
        return value.full_tensor()
    if isinstance(value, dict):
        return {key: whole(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(whole(item) for item in value)
    return value.detach().clone() if isinstance(value, torch.Tensor) else value


def equal(one: Any, other: Any) -> bool:
    """Whether two states are the same: types, order of keys, and bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        same = list(one) == list(other)
        return same and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def expected(folder: Path | str) -> Any:
    """The state that the last save had, as rank 0 wrote it down."""
    return torch.load(Path(folder) / "expected.pt", weights_only=True)


def save(repo: ckpt.Repository, order: dict[str, Any]) -> dict[str, Any]:
    state = made(order["seed"], order["world"])
    if (odd := order.get("odd")) is not None and dist.get_rank() == odd:
        state["odd"] = {"code": print}
    kept = whole(state)
    if dist.get_rank() == 0:
        torch.save(kept, Path(order["folder"]) / "expected.pt")
    writer = ckpt.dcp_writer(repo, "gpt", step=order["seed"], metrics={"loss": 0.5}, alias="best")
    dist.barrier()
    began = time.monotonic()
    with killed(order):
        if order.get("background"):
            future: Any = dcp_async_save(state, storage_writer=writer)
            future.result()
        else:
            dcp_save(state, storage_writer=writer)
    return {"version": writer.version and str(writer.version), "seconds": time.monotonic() - began}


def load(repo: ckpt.Repository, order: dict[str, Any]) -> dict[str, Any]:
    state = made(order["seed"] + 1000, order["world"])
    dcp_load(state, storage_reader=ckpt.dcp_reader(repo, order["ref"]))
    kept = expected(order["folder"])
    if order.get("resave"):
        dcp_save(state, storage_writer=ckpt.dcp_writer(repo, "gpt", step=order["seed"]))
    return {"equal": equal(whole(state), kept)}


def big() -> torch.Tensor:
    """A tensor of three chunks."""
    return torch.arange(48 << 20).to(torch.uint8)


def load_big(repo: ckpt.Repository, order: dict[str, Any]) -> dict[str, Any]:
    """How much of the store a rank reads for its shard."""
    mesh = init_device_mesh("cpu", (order["world"],))
    kept: Any = distribute_tensor(big(), mesh, [Shard(0)])
    state = {"big": torch.zeros_like(kept)}
    counted = []

    def hook(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        found = act(*args)
        if kind == "read":
            counted.append(found)
        return found

    with ckpt.core.effects.observed(hook):
        dcp_load(state, storage_reader=ckpt.dcp_reader(repo, "big"))
    mine: Any = state["big"]
    return {"read": sum(counted), "equal": torch.equal(mine.to_local(), kept.to_local())}


def killed(order: dict[str, Any]) -> Any:
    """A hook by which the rank that the order names dies before its n-th act of this kind."""
    rank, kind, number = order.get("kill") or (None, "", 0)
    lock, seen = threading.Lock(), 0

    def hook(found: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        nonlocal seen
        with lock:
            seen += rank == dist.get_rank() and found.startswith(kind)
            if seen > number:
                os.kill(os.getpid(), signal.SIGKILL)
        return act(*args)

    return ckpt.core.effects.observed(hook)


def play(rank: int, order: dict[str, Any], rendezvous: Path) -> dict[str, Any]:
    """What one rank does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=order["world"],
        timeout=timedelta(seconds=GROUP_SECONDS),
    )
    scenes = {scene.__name__: scene for scene in (save, load, load_big)}
    with ckpt.open(Path(order["folder"]) / "repo") as repo:
        return scenes[order["scene"]](repo, order)


def answer(rank: int, order: dict[str, Any], rendezvous: Path) -> None:
    """Play, and write down what came of it."""
    began = time.monotonic()
    try:
        found = play(rank, order, rendezvous)
    except BaseException as error:  # noqa: BLE001  whatever it was, the test looks at it
        found = {"error": type(error).__name__, "text": traceback.format_exc()}
    found["lasted"] = time.monotonic() - began
    rendezvous.with_suffix(f".{rank}").write_text(json.dumps(found))


def end_all(children: list[int]) -> None:
    for child in children:
        os.kill(child, signal.SIGKILL)


def run_group(order: dict[str, Any], rendezvous: Path) -> list[dict[str, Any]]:
    """Fork the ranks, wait for all of them, and bring what they wrote down."""
    children = []
    for rank in range(order["world"]):
        child = os.fork()
        if child == 0:
            try:
                answer(rank, order, rendezvous)
            finally:
                os._exit(0)
        children.append(child)
    timer = threading.Timer(ORDER_SECONDS, end_all, [children])
    timer.start()
    found = []
    for rank, child in enumerate(children):
        _, status = os.waitpid(child, 0)
        file = rendezvous.with_suffix(f".{rank}")
        said = json.loads(file.read_text()) if file.exists() else {}
        found.append({"signal": os.WTERMSIG(status), **said})
        file.unlink(missing_ok=True)
    timer.cancel()
    rendezvous.unlink(missing_ok=True)
    return found


def main() -> None:
    """Take orders until there are no more."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for number, line in enumerate(sys.stdin):
        order = json.loads(line)
        found = run_group(order, Path(order["folder"]) / f"rendezvous-{number}")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
