"""What GPUs are still copying when ``save`` returns: handed over when it is there, never before.

A machine without a GPU has copies here that end when they are told to; one with a GPU runs the
real ones as well.
"""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

import ckpt
from ckpt.core.errors import StorageError
from ckpt.loader.sources import MemoryTensor
from ckpt.training.arena import Arena
from ckpt.training.gpu_copies import GpuCopies, Wait
from ckpt.training.staging import Stage

SECONDS = 30

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


class LateCopies(GpuCopies):
    """Takes tensors of any device; what it copies arrives when ``ended`` is set."""

    ended = threading.Event()
    failing = False

    def takes(self, tensor: torch.Tensor) -> bool:
        return True

    def pin(self, room: torch.Tensor, device: torch.device) -> None:
        pass

    def begin(self, targets: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]) -> Wait:
        values = [tensor.clone() for tensor in tensors]

        def wait() -> None:
            assert self.ended.wait(SECONDS)
            if self.failing:
                raise RuntimeError("CUDA error: an illegal\nmemory access")
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

        return wait


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> type[LateCopies]:
    monkeypatch.setattr("ckpt.training.staging.GpuCopies", LateCopies)
    monkeypatch.setattr(LateCopies, "ended", threading.Event())
    monkeypatch.setattr(LateCopies, "failing", False)
    return LateCopies


class Weights:
    def __init__(self, device: str = "cpu", size: int = 1000) -> None:
        self.values = torch.zeros(size, device=device)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values.copy_(state["values"])


def value_of(repo: ckpt.Repository, version: ckpt.Version | None) -> float:
    """The one value that a version's weights have."""
    assert version is not None
    (value,) = repo.pull(version, device="cpu")["weights"]["values"].unique().tolist()
    return float(value)


def test_save_returns_before_the_copies_end_and_stores_what_they_bring(
    repo: ckpt.Repository, late: type[LateCopies]
) -> None:
    weights = Weights()
    with ckpt.Run(repo, "gpt", quiet=True).track(weights=weights) as job:
        saved = job.save(0)
        weights.values.fill_(1)
        with pytest.raises(TimeoutError):
            saved.version(timeout=0.2)
        late.ended.set()
        assert value_of(repo, saved.version(SECONDS)) == 0
        assert value_of(repo, job.save(1).version(SECONDS)) == 1


def test_closing_waits_for_the_copies(repo: ckpt.Repository, late: type[LateCopies]) -> None:
    with ckpt.Run(repo, "gpt", quiet=True).track(weights=Weights()) as job:
        job.save(0)
        threading.Timer(0.2, late.ended.set).start()
    assert value_of(repo, repo.get("gpt")) == 0


def test_what_a_gpu_could_not_copy_is_not_saved_and_told_at_the_next_call(
    repo: ckpt.Repository, late: type[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    late.ended.set()
    with ckpt.Run(repo, "gpt", quiet=True).track(weights=Weights()) as job:
        with monkeypatch.context() as patch:
            patch.setattr(late, "failing", True)
            job.save(0)
            with pytest.raises(StorageError, match="an illegal memory access") as caught:
                job.wait()
        assert caught.value.code == "copy-failed"
        assert job.save(1).version(SECONDS) is not None
    assert [version.step for version in repo.log("gpt")] == [1]


def no_room(nbytes: int) -> memoryview:
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_a_state_that_there_is_no_room_to_copy_costs_its_step_and_not_the_training(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ckpt.Run(repo, "gpt", quiet=True, on_error="warn").track(weights=Weights()) as job:
        assert job._held.writer is not None
        with monkeypatch.context() as patch:
            patch.setattr(job._held.writer._arena, "room", no_room)
            job.save(0)
        with pytest.warns(ckpt.CkptWarning, match="step 0 .*Cannot allocate memory"):
            job.save(1)
    assert [version.step for version in repo.log("gpt")] == [1]


def test_a_writer_that_is_killed_before_the_copies_end_is_told_and_replaced(
    repo: ckpt.Repository, late: type[LateCopies]
) -> None:
    with ckpt.Run(repo, "gpt", quiet=True).track(weights=Weights()) as job:
        saved = job.save(0)
        assert job._held.writer is not None
        os.kill(job._held.writer._process.pid, signal.SIGKILL)
        with pytest.raises(StorageError, match="has ended"):
            saved.version(SECONDS)
        late.ended.set()
        assert job.save(1).version(SECONDS) is not None


def test_a_gpu_that_hangs_costs_no_more_than_the_time_to_drain(
    repo: ckpt.Repository, late: type[LateCopies]
) -> None:
    def train() -> None:
        with ckpt.Run(repo, "gpt", quiet=True, drain_seconds=0.1).track(weights=Weights()) as job:
            job.save(0)
            raise SystemExit

    with pytest.raises(SystemExit):
        train()
    late.ended.set()
    assert repo.log("gpt") == []
    with ckpt.Run(repo, "gpt", quiet=True).track(weights=Weights()) as job:
        assert job.save(1).version(SECONDS) is not None


def test_a_machine_without_more_threads_has_the_loop_wait(
    repo: ckpt.Repository, late: type[LateCopies], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    late.ended.set()
    with ckpt.Run(repo, "gpt", quiet=True).track(weights=Weights()) as job:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", start)
            saved = job.save(0)
        assert saved.version(SECONDS) is not None


@needs_gpu
def test_the_values_at_the_call_are_saved_although_the_gpu_goes_on_at_once(
    repo: ckpt.Repository,
) -> None:
    weights = Weights("cuda", size=64 << 20)
    with ckpt.Run(repo, "gpt", quiet=True, compress="none").track(weights=weights) as job:
        for step in range(6):
            for _ in range(50):  # what the save has to wait for
                weights.values.add_(1)
            saved = job.save(step)
            weights.values.add_(1).sub_(1).mul_(-1).mul_(-1)
            torch.cuda.synchronize()
            assert value_of(repo, saved.version(SECONDS)) == 50 * (step + 1)


@needs_gpu
def test_what_is_pulled_to_a_gpu_is_what_was_pushed_from_it(repo: ckpt.Repository) -> None:
    state = {
        "large": torch.arange(20 << 20, device="cuda"),
        "turned": torch.randn(30, 40, device="cuda").t(),
        "half": torch.randn(3, 5, device="cuda").half(),
        "none": torch.empty(0, device="cuda"),
        "scalar": torch.tensor(2.5, device="cuda"),
    }
    repo.push(state, "m")
    pulled = repo.pull("m")
    for name, tensor in state.items():
        assert pulled[name].device == tensor.device
        assert torch.equal(pulled[name], tensor)


@needs_gpu
def test_a_module_that_is_loaded_to_a_gpu_is_proven_there(repo: ckpt.Repository) -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.GELU()).eval().cuda()
    repo.push(net, "net", inputs=(torch.randn(4, 8, device="cuda"),))
    loaded = repo.load("net", require="outputs-exact")
    assert {tensor.device.type for tensor in loaded.state_dict().values()} == {"cuda"}
    assert repo.verify("net", device="cpu").verdict == "outputs-close"


@needs_gpu
def test_gpus_write_into_the_arena_whatever_its_size() -> None:
    arena = Arena()
    stage = Stage(arena)
    for size in (1000, 5 << 20, 10, 0, 7 << 20):
        values = torch.arange(2 * size, device="cuda", dtype=torch.float32).view(2, -1)
        sources = [MemoryTensor("w", "", values), MemoryTensor("turned", "", values.t())]
        places, wait = stage.copy(sources)
        if wait is not None:
            wait()
        for source, place in zip(sources, places, strict=True):
            room = arena.room(place + source.nbytes)[place:]
            assert room == source.values.cpu().contiguous().numpy().tobytes()
    assert stage._gpus._pinned is not None
    stage.close()
    arena.close()
