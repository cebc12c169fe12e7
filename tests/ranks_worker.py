"""A job of two processes, each with data and generators of its own; each prints what came of it.

Run by torchrun with a folder; a line is the rank, and a name for everything that was seen.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import ckpt
from ckpt.core.errors import CkptWarning, StorageError
from ckpt.training.background import Background
from ckpt.training.saved import Saved

SEEN: dict[str, Any] = {}


class Shard(IterableDataset[int]):
    """A stream of numbers that are this rank's."""

    def __init__(self) -> None:
        self.place, self.first = 0, 1000 * dist.get_rank()

    def __iter__(self) -> Iterator[int]:
        while True:
            self.place += 1
            yield self.first + self.place

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place, self.first = state["place"], state["first"]


def run(repo: ckpt.Repository, name: str) -> ckpt.Run:
    return ckpt.Run(repo, name, quiet=True)


def go_on_with_own_data(repo: ckpt.Repository) -> None:
    def parts() -> dict[str, Any]:
        order = torch.Generator().manual_seed(10 + dist.get_rank())
        rows = list(range(100 * dist.get_rank(), 100 * dist.get_rank() + 20))
        return {
            "model": nn.Linear(1, 1),
            "shuffled": StatefulDataLoader(rows, 4, shuffle=True, generator=order),
            "stream": StatefulDataLoader(Shard(), 2),
            "noise": torch.Generator().manual_seed(20 + dist.get_rank()),
        }

    def numbers(tracked: dict[str, Any], shuffled: Any, stream: Any) -> list[Any]:
        drawn = torch.rand(2, generator=tracked["noise"]).tolist()
        return [next(shuffled).tolist(), next(stream).tolist(), drawn]

    tracked = parts()
    batches = iter(tracked["shuffled"]), iter(tracked["stream"])
    numbers(tracked, *batches)
    with run(repo, "data") as job:
        job.track(**tracked).save(0)
    expected = numbers(tracked, *batches)
    tracked = parts()
    with run(repo, "data") as job:
        job.track(**tracked).resume()
    resumed = numbers(tracked, iter(tracked["shuffled"]), iter(tracked["stream"]))
    SEEN["expected"], SEEN["resumed"] = expected, resumed


def shard_the_optimizer(repo: ckpt.Repository) -> None:
    def parts() -> dict[str, Any]:
        torch.manual_seed(0)
        model = DistributedDataParallel(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)))
        kind = torch.optim.AdamW
        optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=kind, lr=0.1)
        return {"model": model, "optimizer": optimizer}

    def train(tracked: dict[str, Any]) -> None:
        tracked["optimizer"].zero_grad()
        tracked["model"](torch.ones(2, 4)).sum().backward()
        tracked["optimizer"].step()

    tracked = parts()
    train(tracked)
    tracked["optimizer"].consolidate_state_dict()
    with run(repo, "zero") as job:
        job.track(**tracked).save(0)
    train(tracked)
    other = parts()
    with run(repo, "zero") as job:
        job.track(**other).resume()
    train(other)
    pairs = zip(tracked["model"].parameters(), other["model"].parameters(), strict=True)
    SEEN["zero"] = all(torch.equal(one, two) for one, two in pairs)


def grow(repo: ckpt.Repository) -> None:
    """Save for one process, and go on from what one process saved."""
    noise = torch.Generator().manual_seed(20 + dist.get_rank())
    model = nn.Linear(1, 1)
    with run(repo, "shrunk") as job:
        job.track(model=model, noise=noise).save(0)
    with warnings.catch_warnings(record=True) as told, run(repo, "grown") as job:
        warnings.simplefilter("always")
        SEEN["grown to"] = job.track(model=model, noise=noise).resume()
    SEEN["grown told"] = [str(one.message) for one in told if one.category is CkptWarning]
    SEEN["grown weight"], SEEN["grown noise"] = model.weight.item(), noise.initial_seed()


class Odd:
    """Has a state that cannot be stored, on rank 0."""

    def state_dict(self) -> dict[str, Any]:
        return {"it": object() if dist.get_rank() == 0 else 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("not on this rank")


def raised(act: Callable[[], Any]) -> str:
    try:
        act()
    except ckpt.CkptError as error:
        return error.code
    except RuntimeError:
        return "RuntimeError"
    return ""


def fail_on_one_rank(repo: ckpt.Repository) -> None:
    alone = dist.get_rank() == 0
    with run(repo, "fails") as job:
        job.track(model=nn.Linear(1, 1))
        SEEN["run-live"] = raised(lambda: run(repo, "fails"))
        SEEN["bad metric"] = raised(lambda: job.save(0, {"loss": "low" if alone else 1.0}))
        job.track(odd=Odd())
        SEEN["not stored"] = raised(lambda: job.save(0))
        job.track(odd=nn.Linear(1, 1)).save(1)
        away = StorageError("registry-busy", "the registry is busy")
        with mock.patch.object(Background, "spare", side_effect=away):
            SEEN["not spared"] = raised(job.resume)
        job.track(odd=Odd())
        SEEN["not restored"] = raised(job.resume)
        SEEN["steps"] = [version.step for version in repo.log("fails")] if alone else [1]


@contextmanager
def away(repo: ckpt.Repository) -> Iterator[None]:
    """While it is entered, the store is away from every rank."""
    packs = repo.location.store / "packs"
    if dist.get_rank() == 0:
        packs.rename(packs.with_name("away"))
        packs.write_text("in the way")
    dist.barrier()
    yield
    dist.barrier()
    if dist.get_rank() == 0:
        packs.unlink()
        packs.with_name("away").rename(packs)


def fail_in_the_background(repo: ckpt.Repository) -> None:
    def save(job: ckpt.Run, step: int) -> None:
        job.track(model=nn.Linear(1, 1)).save(step)

    job = run(repo, "lost")
    with away(repo):
        save(job, 0)
        SEEN["not durable"] = raised(job.wait)
        SEEN["told once"] = raised(job.wait)
        save(job, 1)
        SEEN["not durable at the end"] = raised(job.close)

    def leave() -> None:
        with run(repo, "lost") as job:
            save(job, 2)

    with away(repo):
        SEEN["not durable at the end of a block"] = raised(leave)


def wait_too_shortly(repo: ckpt.Repository) -> None:
    with run(repo, "slow") as job:
        job.track(model=nn.Linear(1, 1)).save(0)
        job.wait()
        if dist.get_rank() == 0:
            pending = Saved(repo, 0, Future(), 0.0)
            job._held.pending = pending
        try:
            job.wait(0.01)
        except TimeoutError:
            SEEN["not yet durable"] = "TimeoutError"
        job._held.pending = None


def fail_alone(repo: ckpt.Repository) -> None:
    """Leave a run in which the others still are, then in which nobody is any more."""
    job = run(repo, "alone")
    job.track(model=nn.Linear(1, 1)).save(0)
    if dist.get_rank() == 1:
        with suppress(ZeroDivisionError), job:
            _ = 1 / 0
    numbers = torch.ones(1)
    dist.all_reduce(numbers)
    if dist.get_rank() == 0:
        with suppress(ZeroDivisionError):
            try:
                _ = 1 / 0
            finally:
                job.close()
    SEEN["together afterwards"] = int(numbers)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    with ckpt.open(sys.argv[1]) as opened:
        go_on_with_own_data(opened)
        shard_the_optimizer(opened)
        fail_on_one_rank(opened)
        fail_in_the_background(opened)
        wait_too_shortly(opened)
        fail_alone(opened)
        grow(opened)
        late, rank = run(opened, "late"), dist.get_rank()
        dist.destroy_process_group()
        late.close()
    sys.stdout.write(f"{rank} {json.dumps(SEEN)}\n")  # at once: both come here at the same time
