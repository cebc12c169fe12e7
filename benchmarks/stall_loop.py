"""The ways to save in the background, each in a training loop in a process of its own.

``python -m benchmarks.stall_loop NAME FOLDER`` trains once for each line that it reads, saving if
the line is ``save``, and answers with a line of JSON: for how many seconds each save kept the loop.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
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
from benchmarks.measure import QUICK

SAVE = "save"
OURS, RAW, NONE = "ckpt.Run", 'ckpt.Run(compress="none")', "no saving"
THREAD, PROCESS = "dcp.async_save, thread", "dcp.async_save, process"
MOONCLIP = "moonclip"
COPY = "ceiling: copying the state once"
STEPS, SAVES = (6, (1, 3)) if QUICK else (8, (1, 5))
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


class _Run:
    def __init__(self, trainer: Trainer, folder: Path, stack: ExitStack, compress: str) -> None:
        repo = stack.enter_context(ckpt.open(folder))
        run = ckpt.Run(repo, "gpt", compress=compress, quiet=True)
        self._run = stack.enter_context(run).track(model=trainer.net, optimizer=trainer.optimizer)

    def save(self, step: int) -> None:
        self._run.save(step)

    def wait(self) -> None:
        self._run.wait()


class _Dcp:
    """DCP with its own stager, which is used again, cached plans, two threads and fsync; each
    save into a folder of its own, as its documentation has it."""

    def __init__(
        self, trainer: Trainer, folder: Path, stack: ExitStack, kind: AsyncCheckpointerType
    ) -> None:
        shared = kind is AsyncCheckpointerType.PROCESS
        stack.enter_context(_one_rank(folder))
        self._stager = DefaultStager(StagingOptions(False, shared, False, False))
        stack.callback(self._stager.close)
        self._trainer, self._folder, self._kind = trainer, folder, kind
        self._count = 0
        self._under_way: Any = None

    def save(self, step: int) -> None:
        self.wait()
        self._count += 1
        folder = self._folder / f"save-{self._count}"
        self._under_way = async_save(
            self._trainer.state(),
            storage_writer=FileSystemWriter(folder, thread_count=2, sync_files=True),
            planner=DefaultSavePlanner(enable_plan_caching=True),
            async_checkpointer_type=self._kind,
            async_stager=self._stager,
        )

    def wait(self) -> None:
        if self._under_way is not None:
            getattr(self._under_way, "upload_completion", self._under_way).result()
            self._under_way = None


@contextmanager
def _one_rank(folder: Path) -> Iterator[None]:
    """A process group of this process alone: DCP saves by another process only in one."""
    folder.mkdir()
    store = FileStore(str(folder / "ranks"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


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


_SAVERS: dict[str, Callable[[Trainer, Path, ExitStack], Saver | None]] = {
    NONE: lambda trainer, folder, stack: None,
    OURS: partial(_Run, compress="auto"),
    RAW: partial(_Run, compress="none"),
    THREAD: partial(_Dcp, kind=AsyncCheckpointerType.THREAD),
    PROCESS: partial(_Dcp, kind=AsyncCheckpointerType.PROCESS),
    MOONCLIP: lambda trainer, folder, stack: _Moonclip(trainer, folder),
    COPY: lambda trainer, folder, stack: _Copy(trainer),
}
NAMES = tuple(_SAVERS)


def train(trainer: Trainer, saver: Saver | None) -> list[float]:
    """One loop, until all that it saved is durable; the seconds that each save kept it."""
    calls = []
    for step in range(STEPS):
        trainer.step()
        if saver is not None and step in SAVES:
            start = time.perf_counter()
            saver.save(step)
            calls.append(time.perf_counter() - start)
    if saver is not None:
        saver.wait()
    return calls


def main() -> None:
    """Answer until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a peer prints is no answer
    trainer = Trainer()
    with ExitStack() as stack:
        saver: Saver | None = None
        for line in sys.stdin:
            if line.strip() == SAVE and saver is None:  # until then none of its threads is there
                saver = _SAVERS[sys.argv[1]](trainer, Path(sys.argv[2]), stack)
            answers.write(json.dumps(train(trainer, saver)) + "\n")


if __name__ == "__main__":
    main()
