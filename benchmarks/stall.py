"""A training loop that saves in the background: what a save costs it, beside DCP and moonclip."""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import FileStore
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

import ckpt
from benchmarks.codec_states import Gpt
from benchmarks.measure import QUICK, Turns, shown_reason, take_turns
from benchmarks.table import Bar, Table, Target

_OURS, _RAW, _NONE = "ckpt.Run", 'ckpt.Run(compress="none")', "no saving"
_THREAD, _PROCESS = "dcp.async_save, thread", "dcp.async_save, process"
_MOONCLIP = "moonclip"
_COPY = "ceiling: copying the state once"
_STEPS, _SAVES = (6, (1, 3)) if QUICK else (14, (1, 7))
_BATCH, _LENGTH = (1, 16) if QUICK else (4, 128)


class Saver(Protocol):
    """Saves in the background."""

    def save(self, step: int) -> None:
        """Have the state as it is now saved."""

    def wait(self) -> None:
        """Return when all of it is durable."""


class Trainer:
    """The small GPT with AdamW, on noise: what it learns does not matter here."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net: nn.Module = Gpt()
        self.optimizer = torch.optim.AdamW(self.net.parameters(), lr=1e-4)
        self._text = torch.randint(256, (_BATCH, _LENGTH + 1))
        self.step()

    def step(self) -> None:
        """One step, which changes every tensor."""
        self.optimizer.zero_grad()
        logits = self.net(self._text[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), self._text[:, 1:].flatten())
        torch.autograd.backward(loss)
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """What is saved."""
        return {"model": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}

    def tensors(self) -> list[torch.Tensor]:
        """The weights and AdamW's two moments."""
        weights = [one.detach() for one in self.net.parameters()]
        states = self.optimizer.state.values()
        return weights + [one[name] for one in states for name in ("exp_avg", "exp_avg_sq")]

    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(one.nbytes for one in self.tensors())


class _Run:
    def __init__(self, trainer: Trainer, run: ckpt.Run) -> None:
        self._run = run.track(model=trainer.net, optimizer=trainer.optimizer)

    def save(self, step: int) -> None:
        self._run.save(step)

    def wait(self) -> None:
        self._run.wait()


class _Dcp:
    """DCP with its own stager, which is used again, cached plans, two threads and fsync."""

    def __init__(self, trainer: Trainer, folder: Path, kind: AsyncCheckpointerType) -> None:
        shared = kind is AsyncCheckpointerType.PROCESS
        self._stager = DefaultStager(StagingOptions(False, shared, False, False))
        self._trainer, self._folder, self._kind = trainer, folder, kind
        self._under_way: Any = None

    def save(self, step: int) -> None:
        self.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        self._under_way = async_save(
            self._trainer.state(),
            storage_writer=FileSystemWriter(self._folder, thread_count=2, sync_files=True),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )

    def wait(self) -> None:
        if self._under_way is not None:
            getattr(self._under_way, "upload_completion", self._under_way).result()
            self._under_way = None

    def close(self) -> None:
        """Let go of the stager's memory."""
        self.wait()
        self._stager.close()


class _Moonclip:
    def __init__(self, trainer: Trainer, folder: Path) -> None:
        moonclip: Any = importlib.import_module("moonclip")
        folder.mkdir()
        self._trainer = trainer
        self._manager = moonclip.CheckpointManager(str(folder))
        self._count = 0

    def save(self, step: int) -> None:
        self._count += 1
        self._manager.save(self._count, self._trainer.net, self._trainer.optimizer)

    def wait(self) -> None:
        self._manager.flush()


class _Copy:
    """What the machine gives: the state's tensors copied into warm memory, and nothing saved."""

    def __init__(self, trainer: Trainer) -> None:
        self._tensors = trainer.tensors()
        self._room = [one.clone() for one in self._tensors]

    def save(self, step: int) -> None:
        torch._foreach_copy_(self._room, self._tensors)

    def wait(self) -> None:
        pass


def measure(folder: Path) -> Table:
    """Call time and added time of each way to save."""
    trainer = Trainer()
    calls: dict[str, list[float]] = {}
    with ExitStack() as stack:
        stack.enter_context(_one_rank(folder))
        savers, absent = _savers(trainer, folder, stack)
        loops: dict[str, Callable[[], object]] = {_NONE: lambda: _train(trainer, None, [])}
        for name, saver in savers.items():
            loops[name] = _looping(trainer, saver, calls.setdefault(name, []))
        turns = take_turns(loops)
    absent |= turns.absent
    names = [name for name in savers if name in turns.timings]
    names.sort(key=lambda name: name == _COPY)
    call = {name: median(calls[name][len(_SAVES) :]) for name in names}
    added = {name: (turns[name] - turns[_NONE]) / len(_SAVES) for name in names}
    return Table(
        title="Stall of background saving",
        compared=f"A GPT of 10.9 M parameters with AdamW, {trainer.nbytes() / 1e6:.0f} MB of state, {_STEPS} steps on two threads, {len(_SAVES)} saves, durable. *Call* is how long a save keeps the loop; *added* is how much longer the loop takes than without saving, with the wait for the last save, per save. DCP has a stager that is used again (with shared memory for the process), cached plans, two threads and fsync; moonclip its own settings.",
        columns=("", "call, over ckpt's", "added, over ckpt's", "call, ms", "added, ms", "loop, s"),
        rows=tuple(_rows(turns, names, call, added)),
        axis="over the peer's (call: dcp.async_save; added: the best)",
        bars=tuple(_bars(call, added)),
        targets=tuple(_targets(call, added)),
        absent=absent,
        packages=("torch", "moonclip"),
        remark=f"A step takes {turns[_NONE] / _STEPS * 1e3:.0f} ms. Whatever saves in the background shares the two cores with the training, so that added time is not less than the processor time that the save takes.",
    )


def _savers(
    trainer: Trainer, folder: Path, stack: ExitStack
) -> tuple[dict[str, Saver], dict[str, str]]:
    repo = stack.enter_context(ckpt.open(folder / "repository"))
    found: dict[str, Saver] = {_COPY: _Copy(trainer)}
    for name, model, compress in ((_OURS, "gpt", "auto"), (_RAW, "raw", "none")):
        run = ckpt.Run(repo, model, compress=compress, quiet=True)
        found[name] = _Run(trainer, stack.enter_context(run))
    for name, kind in (
        (_THREAD, AsyncCheckpointerType.THREAD),
        (_PROCESS, AsyncCheckpointerType.PROCESS),
    ):
        saver = _Dcp(trainer, folder / name.split()[-1], kind)
        stack.callback(saver.close)
        found[name] = saver
    try:
        found[_MOONCLIP] = _Moonclip(trainer, folder / "moonclip")
    except ImportError as error:
        return found, {_MOONCLIP: shown_reason(error)}
    return found, {}


def _looping(trainer: Trainer, saver: Saver, calls: list[float]) -> Callable[[], object]:
    return lambda: _train(trainer, saver, calls)


def _train(trainer: Trainer, saver: Saver | None, calls: list[float]) -> None:
    for step in range(_STEPS):
        trainer.step()
        if saver is not None and step in _SAVES:
            start = time.perf_counter()
            saver.save(step)
            calls.append(time.perf_counter() - start)
    if saver is not None:
        saver.wait()


@contextmanager
def _one_rank(folder: Path) -> Iterator[None]:
    """A process group of this process alone: DCP saves by another process only in one."""
    store = FileStore(str(folder / "ranks"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _rows(
    turns: Turns, names: list[str], call: dict[str, float], added: dict[str, float]
) -> Iterator[tuple[str, ...]]:
    for name in names:
        yield (
            name,
            f"{call[name] / call[_OURS]:.2f}",
            f"{added[name] / added[_OURS]:.2f}",
            f"{call[name] * 1e3:.0f}",
            f"{added[name] * 1e3:.0f}",
            f"{turns[name]:.2f}",
        )
    yield _NONE, "", "", "", "", f"{turns[_NONE]:.2f}"


def _best(values: dict[str, float], *names: str) -> float:
    return min(values[name] for name in names if name in values)


def _targets(call: dict[str, float], added: dict[str, float]) -> Iterator[Target]:
    best_call = _best(call, _THREAD, _PROCESS)
    yield Target("call over dcp.async_save's", call[_OURS] / best_call, 0.25, True)
    best_added = _best(added, _THREAD, _PROCESS, _MOONCLIP)
    yield Target("added time over the best peer's", added[_OURS] / best_added, 0.5, True)


def _bars(call: dict[str, float], added: dict[str, float]) -> Iterator[Bar]:
    for ours in (_OURS, _RAW):
        for peer in (_THREAD, _PROCESS):
            if peer in call:
                yield Bar(f"call, {ours} over {peer}", call[ours] / call[peer], 0.25, True)
        for peer in (_THREAD, _PROCESS, _MOONCLIP):
            if peer in added:
                yield Bar(f"added, {ours} over {peer}", added[ours] / added[peer], 0.5, True)
