"""What may happen around a run: signals, children, damage, modules and optimizers with ways of
their own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from promise_scene import flip
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ckpt
from ckpt.core.errors import CkptWarning, IntegrityError, StorageError, UsageError
from ckpt.service.rebuild import rebuild_registry
from ckpt.training import writer as writing
from ckpt.training.arena import Arena
from ckpt.training.background import Background, location_of
from ckpt.training.saved import Saved

SECONDS = 30


def run(repo: ckpt.Repository, **options: Any) -> ckpt.Run:
    return ckpt.Run(repo, "gpt", quiet=True, **options)


class Bulk:
    """Two megabytes, all alike."""

    def __init__(self) -> None:
        self.values = torch.zeros(1 << 19)

    def state_dict(self) -> dict[str, Any]:
        return {"values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.values = state["values"]


class Interrupting:
    """A pipe in the middle of whose next frame Ctrl-C arrives."""

    def __init__(self, pipe: Any) -> None:
        self._pipe = pipe

    def write(self, frame: bytes) -> None:
        self._pipe.write(frame[:100])
        self._pipe.flush()
        signal.raise_signal(signal.SIGINT)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipe, name)


def saved(repo: ckpt.Repository) -> list[tuple[int | None, float]]:
    """The steps, oldest first, and what was saved at each; each version is of one value."""
    found = []
    for version in reversed(repo.log("gpt")):
        (value,) = repo.pull(version)["bulk"]["values"].unique().tolist()
        found.append((version.step, value))
    return found


def test_ctrl_c_in_the_middle_of_a_hand_over_saves_nothing_and_the_next_save_works(
    repo: ckpt.Repository,
) -> None:
    bulk = Bulk()
    with run(repo) as job:
        job.track(bulk=bulk).save(0)
        job.wait()
        assert job._held.writer is not None
        job._held.writer._process.stdin = Interrupting(job._held.writer._process.stdin)  # type: ignore[assignment]
        bulk.values.fill_(1)
        with pytest.raises(KeyboardInterrupt):
            job.save(1)
        bulk.values.fill_(2)
        job.save(2).version(SECONDS)
    assert saved(repo) == [(0, 0.0), (2, 2.0)]


def test_after_ctrl_c_behind_a_hand_over_no_other_state_takes_its_place(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = Background._ask

    def interrupted(*given: Any) -> Any:
        ask(*given)
        signal.raise_signal(signal.SIGINT)

    bulk = Bulk()
    with run(repo) as job:
        job.track(bulk=bulk)
        bulk.values.fill_(1)
        monkeypatch.setattr(Background, "_ask", interrupted)
        with pytest.raises(KeyboardInterrupt):
            job.save(1)
        monkeypatch.setattr(Background, "_ask", ask)
        bulk.values.fill_(2)
        job.save(2)
    assert saved(repo) == [(1, 1.0), (2, 2.0)]


def test_a_writer_that_cannot_be_started_fails_as_a_save_does(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    with run(repo, on_error="warn") as job:
        job.track(model=nn.Linear(1, 1)).save(0).version()
        assert job._held.writer is not None
        job._held.writer._process.kill()
        job._held.writer._process.wait()
        with monkeypatch.context() as patch:
            patch.setattr(subprocess, "Popen", refuse)
            with pytest.warns(CkptWarning, match="Resource temporarily unavailable"):
                job.save(1)
            handles = len(os.listdir("/proc/self/fd"))
            with pytest.raises(StorageError) as caught:
                run(repo, name="other")
            assert caught.value.code == "writer-not-started"
            assert len(os.listdir("/proc/self/fd")) == handles
        job.save(2)
    assert [version.step for version in repo.log("gpt")] == [2, 0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_run_ends_although_a_child_holds_its_pipe(repo: ckpt.Repository) -> None:
    with run(repo) as job:
        job.track(model=nn.Linear(1, 1)).save(0)
        loader = DataLoader(
            TensorDataset(torch.arange(2.0)), num_workers=1, persistent_workers=True
        )
        assert len(list(loader)) == 2
    run(repo).close()  # its name is free again, and the worker still lives
    del loader


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_leaves_the_run_alone(repo: ckpt.Repository) -> None:
    with run(repo) as job:
        job.track(model=nn.Linear(1, 1)).save(0)
        child = os.fork()
        if child == 0:
            try:
                job.close()
                job.save(1)
            except UsageError:
                os._exit(0)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        job.save(2)
    assert [version.step for version in repo.log("gpt")] == [2, 0]


def test_a_run_that_is_closed_saves_no_more(repo: ckpt.Repository) -> None:
    job = run(repo).track(model=nn.Linear(1, 1))
    job.close()
    with pytest.raises(UsageError) as caught:
        job.save(0)
    assert caught.value.code == "run-closed"
    run(repo).close()


def test_where_the_others_wait_a_failure_is_raised_after_they_were_met(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the others' random states would be one save behind from then on."""
    met: list[int] = []

    def meet(prepare: Callable[[], Any], act: Callable[[Any, list[Any]], Any]) -> Any:
        (said, state), own = prepare()
        met.append(said["step"])
        return act((said, state), [own])

    with run(repo) as job:
        job.track(model=nn.Linear(1, 1))
        monkeypatch.setattr(job._ranks, "led", meet)
        assert job._held.writer is not None
        job._held.writer._process.kill()
        job._held.writer._process.wait()
        job._held.pending = Saved(
            repo, 0, job._held.writer._ask({"act": "spare", "pushes": []}), 0.0
        )
        with pytest.raises(StorageError, match="has ended"):
            job.save(1)
        job.save(2)
    assert met == [1, 2]


def test_a_failure_is_not_lost_behind_a_wrong_argument(repo: ckpt.Repository) -> None:
    with run(repo) as job:
        job.track(model=nn.Linear(1, 1)).save(0)
        job.wait()
        assert job._held.writer is not None
        job._held.writer._process.kill()
        job._held.writer._process.wait()
        job._held.pending = Saved(
            repo, 0, job._held.writer._ask({"act": "spare", "pushes": []}), 0.0
        )
        with pytest.raises(UsageError, match="not a number"):
            job.save(1, {"loss": "low"})
        with pytest.raises(StorageError, match="has ended"):
            job.save(1)


def test_a_save_in_inference_mode_does_not_spoil_the_next(repo: ckpt.Repository) -> None:
    with run(repo) as job:
        job.track(model=nn.Linear(1, 1))
        with torch.inference_mode():
            job.save(0)
        job.save(1)
    assert len(repo.log("gpt")) == 2


def test_a_run_is_kept_while_a_save_takes_longer_than_its_lease(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "LEASE_SECONDS", 0.03)
    arena = Arena()
    setup = {"location": location_of(repo.location), "arena": arena.handle, "compress": "auto"}
    named = {"model": "m", "run": "main", "holder": "h", "keep": [], "spared": []}
    writer = writing.Writer({**setup, **named})
    held = threading.Event()
    monkeypatch.setattr(writer, "_hold", held.set)
    keeper = threading.Thread(target=writing._hold_on, args=(writer,))
    keeper.start()
    assert held.wait(SECONDS)  # this thread could as well be in a save
    writer.close()
    keeper.join(SECONDS)
    assert not keeper.is_alive()
    arena.close()


def test_what_a_run_resumed_from_is_spared_again_after_a_registry_rebuild(
    repo: ckpt.Repository,
) -> None:
    pushes = [repo.push({"w": torch.tensor(step)}, "m", step=step).push for step in range(2)]
    arena = Arena()
    setup = {"location": location_of(repo.location), "arena": arena.handle, "compress": "auto"}
    named = {"model": "m", "run": "main", "holder": "h", "keep": [], "spared": pushes[:1]}
    writer = writing.Writer({**setup, **named})
    rebuild_registry(repo.location, repo._store)
    writer.keep()
    assert repo.prune("m", keep=["last:1"]).victims == ()
    writer.close()
    assert [version.number for version in repo.prune("m", keep=["last:1"]).victims] == [1]
    arena.close()


def test_what_is_trained_again_after_damage_is_stored_anew(repo: ckpt.Repository) -> None:
    def train() -> None:
        torch.manual_seed(0)
        net = nn.Linear(64, 64)
        with run(repo, compress="none") as job:
            for step in range(job.track(model=net).resume(), 3):
                with torch.no_grad():
                    net.weight.mul_(0.5)
                job.save(step)

    train()
    push = repo.get("gpt@3").push
    (pack,) = repo.location.store.glob(f"packs/*/{push}*")
    flip(pack)
    with pytest.warns(CkptWarning, match="gpt@3 is not whole"):
        train()
    assert repo.get("gpt").number == 4
    assert set(repo.pull("gpt")) >= {"model", "step"}


def test_numpy_goes_on_with_the_generator_that_somebody_chose(repo: ckpt.Repository) -> None:
    generators: Any = numpy.random  # whose types leave these two out
    usual = generators.get_bit_generator()
    try:
        generators.set_bit_generator(numpy.random.PCG64(1))
        with run(repo) as job:
            job.track(model=nn.Linear(1, 1)).save(0)
            job.wait()
            expected = numpy.random.rand(3).tolist()
            job.resume()
        assert numpy.random.rand(3).tolist() == expected
    finally:
        generators.set_bit_generator(usual)


class Own(nn.Module):
    """Gives and takes a state that is not its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.average = torch.zeros(2)

    def state_dict(self, *given: Any, **named: Any) -> Any:
        return {"average": self.average.clone()}

    def load_state_dict(self, state_dict: Any, *given: Any, **named: Any) -> Any:
        self.average = state_dict["average"].clone()


def test_a_module_with_a_way_of_its_own_is_restored_by_it(repo: ckpt.Repository) -> None:
    net = Own()
    net.average.fill_(7)
    with run(repo) as job:
        job.track(net=net).save(0)
    other = Own()
    with run(repo) as job:
        job.track(net=other).resume()
    assert other.average.tolist() == [7.0, 7.0]


class Master(torch.optim.Optimizer):
    """Keeps weights in full precision beside those of a lower one."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for one in group["params"]:
                master = self.state[one].setdefault("master", one.float())
                master -= group["lr"] * one.grad.float()
                one.copy_(master)


def job_in_bfloat16() -> tuple[nn.Linear, Master]:
    torch.manual_seed(0)
    net = nn.Linear(4, 4).bfloat16()
    return net, Master(net.parameters())


def test_what_an_optimizer_keeps_in_another_dtype_comes_back_in_it(repo: ckpt.Repository) -> None:
    net, optimizer = job_in_bfloat16()
    net(torch.randn(2, 4).bfloat16()).sum().backward()
    optimizer.step()
    with run(repo) as job:
        job.track(net=net, optimizer=optimizer).save(0)
    other, resumed = job_in_bfloat16()
    with run(repo) as job:
        job.track(net=other, optimizer=resumed).resume()
    before, after = (
        one.state[weight]["master"]
        for one, weight in ((optimizer, net.weight), (resumed, other.weight))
    )
    assert after.dtype == torch.float32
    assert torch.equal(before, after)


def test_a_resume_that_is_refused_changes_nothing(repo: ckpt.Repository, tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    with run(repo) as job:
        job.track(net=net, optimizer=torch.optim.SGD(net.parameters())).save(0)
    other = nn.Linear(2, 2)
    before = other.weight.clone()
    groups = [{"params": [one]} for one in other.parameters()]
    for optimizer in (torch.optim.Adam(other.parameters()), torch.optim.SGD(groups)):
        with run(repo) as job, pytest.raises(IntegrityError):
            job.track(net=other, optimizer=optimizer).resume()
    assert torch.equal(other.weight, before)
