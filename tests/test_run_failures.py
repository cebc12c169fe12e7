"""What a run does after a save that failed, and when nobody closes it."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import ckpt
from ckpt.core.errors import CkptError, CkptWarning, ConflictError


def run(repo: ckpt.Repository, **options: object) -> ckpt.Run:
    return ckpt.Run(repo, "gpt", quiet=True, **options)  # type: ignore[arg-type]


def filled(value: float) -> nn.Linear:
    """A module that is told from others by its value."""
    net = nn.Linear(30, 30)
    for one in net.parameters():
        nn.init.constant_(one, value)
    return net


def fill(net: nn.Linear, value: float) -> nn.Linear:
    net.load_state_dict(filled(value).state_dict())
    return net


@pytest.fixture
def away(repo: ckpt.Repository) -> Callable[[], AbstractContextManager[None]]:
    """While it is entered, the store is away."""
    packs: Path = repo.location.store / "packs"

    @contextmanager
    def without_packs() -> Iterator[None]:
        packs.rename(packs.with_name("away"))
        packs.write_text("in the way")
        yield
        packs.unlink()
        packs.with_name("away").rename(packs)

    return without_packs


def steps(repo: ckpt.Repository) -> list[int | None]:
    return [version.step for version in reversed(repo.log("gpt"))]


def test_resume_goes_back_to_the_save_that_is_under_way(repo: ckpt.Repository) -> None:
    net = filled(0)
    big = nn.Linear(1000, 1000)  # which takes the writer some time
    with run(repo) as job:
        job.track(net=net, big=big).save(5)
        assert job.resume() == 6
        for step in (100, 200):
            job.save(step)
            fill(net, step)
        job.save(300)
        fill(net, float("nan"))
        assert job.resume() == 301
    assert torch.all(net.weight == 200)


def test_resume_raises_what_failed_in_the_background(
    repo: ckpt.Repository, away: Callable[[], AbstractContextManager[None]]
) -> None:
    net = filled(0)
    with run(repo) as job:
        job.track(net=net).save(0).version()
        with away():
            job.track(net=fill(net, 1)).save(1)
            with pytest.raises(CkptError):
                job.resume()
        assert job.resume() == 1


def test_a_save_that_failed_costs_no_other(
    repo: ckpt.Repository, away: Callable[[], AbstractContextManager[None]]
) -> None:
    net = filled(0)
    with run(repo) as job:
        job.track(net=net).save(0).version()
        with away():
            handle = job.track(net=fill(net, 1)).save(100)
            assert not wait([handle.answer], 60).not_done
        fill(net, 2)
        with pytest.raises(CkptError):
            job.save(200)
        fill(net, 3)
        job.wait()
    assert steps(repo) == [0, 200]
    assert torch.all(repo.pull("gpt")["net"]["weight"] == 2)


def test_a_failure_that_was_read_from_its_handle_is_not_raised_again(
    repo: ckpt.Repository,
    away: Callable[[], AbstractContextManager[None]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    net = filled(0)
    with ckpt.Run(repo, "gpt") as job:
        job.track(net=net).save(0).version()
        with away(), pytest.raises(CkptError):
            job.track(net=fill(net, 1)).save(1).version()
        job.save(2)
    assert steps(repo) == [0, 2]
    assert "step 1 was not saved" in capfd.readouterr().err


def test_a_run_that_nobody_closed_is_drained_when_it_is_let_go_of(
    repo: ckpt.Repository, away: Callable[[], AbstractContextManager[None]]
) -> None:
    job = run(repo).track(net=filled(0), big=nn.Linear(1000, 1000))
    job.save(0)
    with pytest.raises(ConflictError, match="live in this process"):
        run(repo)
    del job
    gc.collect()
    assert steps(repo) == [0]
    run(repo).close()


@pytest.mark.parametrize("how", ["closed", "let go of"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_run_frees_its_name_although_the_saving_process_was_killed_or_stands_still(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch, how: str, number: signal.Signals
) -> None:
    monkeypatch.setattr("ckpt.training.background._END_SECONDS", 0.2)
    job = run(repo).track(net=filled(0))
    job.save(0)
    job.wait()
    assert job._held.writer is not None
    job._held.writer._process.send_signal(number)
    if how == "closed":
        job.close()
    else:
        del job
        gc.collect()
    run(repo).close()


def test_a_run_is_resumed_although_the_saving_process_was_killed(repo: ckpt.Repository) -> None:
    net = filled(5)
    with run(repo, keep=[ckpt.Latest(1)]) as job:
        job.track(net=net).save(5)
        job.wait()
        assert job._held.writer is not None
        job._held.writer._process.kill()
        job._held.writer._process.wait()
        fill(net, 0)
        assert job.resume() == 6
        job.save(6)
    assert torch.all(net.weight == 5)
    assert steps(repo) == [5, 6]  # the new process knows what it was resumed from


NOT_CLOSED = """
import sys, torch, ckpt
from pathlib import Path
repo = ckpt.open(sys.argv[1])
run = ckpt.Run(repo, "gpt", quiet=sys.argv[2] == "quiet")
run.track(net=torch.nn.Linear(1000, 1000)).save(0)
if sys.argv[3] == "fails":
    run.wait()
    packs = Path(repo.location.store) / "packs"
    packs.rename(packs.with_name("away"))
    packs.write_text("in the way")
    run.track(net=torch.nn.Linear(1000, 1000)).save(1)
"""


@pytest.mark.parametrize("quiet", ["quiet", "loud"])
@pytest.mark.parametrize(("how", "told"), [("fails", "ckpt: step 1 was not saved"), ("works", "")])
def test_a_script_that_closes_no_run_drains_it_and_tells_a_failure(
    tmp_path: Path, how: str, quiet: str, told: str
) -> None:
    command = [sys.executable, "-c", NOT_CLOSED, str(tmp_path), quiet, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert told in done.stderr
    assert ("gpt@1 step 0" in done.stderr) == (quiet == "loud")
    with ckpt.open(tmp_path) as repo:
        assert steps(repo) == [0]
        run(repo).close()  # the name is free


def test_a_training_that_begins_anew_is_warned_and_does_not_remove_the_newest_before(
    repo: ckpt.Repository,
) -> None:
    net = filled(0)
    rules = [ckpt.Latest(1)]
    with run(repo, keep=rules) as job:
        for step in (999, 1000):
            job.track(net=fill(net, step)).save(step)
    with run(repo, keep=rules) as job:
        with pytest.warns(CkptWarning, match=r"gpt@2 is the newest .* resume\(\)"):
            job.track(net=fill(net, 0)).save(0)
        job.track(net=fill(net, 1)).save(1)  # warned once
    assert steps(repo) == [1000, 1]
    with run(repo, keep=rules) as job:
        assert job.track(net=net).resume() == 2
        job.save(2)
