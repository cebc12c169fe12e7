"""A trainer that dies loses at most its last save, and leaves nothing that runs or takes room."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from sqlalchemy import update
from torch import nn
from trials import Trials

import ckpt
from ckpt.registry.tables import pushes

PROGRAM = Path(__file__).with_name("trainer.py")


class Trainers:
    """The test's end of the program."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout

    def kill_one(self, folder: Path, chance: random.Random) -> dict[str, int]:
        """Let one trainer run for some saves, kill it, and return the last number it said of
        everything."""
        self.input.write(f"{folder}\n")
        self.input.flush()
        said: dict[str, int] = {}
        last = chance.randrange(1, 12)
        while said.get("called", -1) - said.get("resumed", 0) < last:
            self._read(said)
        time.sleep(chance.uniform(0, 0.02))  # somewhere within the save that is under way
        os.kill(said["trainer"], signal.SIGKILL)
        while "ended" not in said:
            self._read(said)
        return said

    def _read(self, said: dict[str, int]) -> None:
        word, number = self.output.readline().split()
        said[word] = int(number)

    def close(self) -> None:
        self.input.close()
        self.process.wait()
        self.output.close()


@pytest.fixture(scope="module")
def trainers() -> Iterator[Trainers]:
    running = Trainers()
    yield running
    running.close()


def ends_within(process: int, seconds: float) -> bool:
    """Whether a process that is not ours ends in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.01)
    return False


@pytest.mark.torture("R1", unit="kills")
def test_a_killed_trainer_loses_at_most_its_last_save(
    trials: Trials, trainers: Trainers, tmp_path: Path
) -> None:
    for seed in trials.seeds(20):
        chance = random.Random(seed)
        folder = tmp_path / str(seed // 10)
        said = trainers.kill_one(folder, chance)
        assert ends_within(said["writer"], 10)
        net = nn.Linear(200, 200)
        with ckpt.open(folder) as repo:
            with ckpt.Run(repo, "gpt", keep=[ckpt.Latest(2)], quiet=True) as run:
                start = run.track(model=net).resume()
            assert said.get("durable", -1) < start <= said["calling"] + 1
            assert said["called"] + 1 - start <= 1
            assert start == 0 or torch.all(net.weight == start - 1)
            assert start == 0 or torch.all(net.bias == start - 1)
            check_nothing_is_left(repo)
        trials.count()


def test_the_writer_ends_with_its_trainer_although_a_child_holds_its_pipe(tmp_path: Path) -> None:
    program = (
        "import os, sys, time, torch, ckpt\n"
        "repo = ckpt.open(sys.argv[1])\n"
        "run = ckpt.Run(repo, 'gpt', quiet=True).track(model=torch.nn.Linear(5, 5))\n"
        "run.save(1).version()\n"
        "child = os.fork()\n"
        "if not child: time.sleep(60); os._exit(0)\n"
        "print(child, run._held.writer._process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        child, writer = map(int, trainer.stdout.readline().split())
        trainer.kill()
        try:
            assert ends_within(writer, 10)
            with ckpt.open(tmp_path) as repo:
                ckpt.Run(repo, "gpt", quiet=True).close()  # the name is free
        finally:
            os.kill(child, signal.SIGKILL)


def check_nothing_is_left(repo: ckpt.Repository) -> None:
    """With the leases of what was killed at their end, gc leaves exactly what versions need."""
    ended = update(pushes).where(pushes.c.state == "open").values(expires_at=0)
    repo._registry._database.write(lambda transaction: transaction.run(ended) and None)
    repo.gc(grace=0)
    plans = [repo._registry.books.read_plan(version.push)[0] for version in repo.log("gpt")]
    packs = {path.stem for path in repo.location.store.glob("packs/*/*")}
    assert packs == {pack for plan in plans for pack in plan}
    assert not list(repo.location.store.glob(".tmp/*"))


@pytest.mark.parametrize("when", ["drains", "closes"])
def test_another_sigterm_does_not_cut_the_drain(tmp_path: Path, when: str) -> None:
    program = (
        "import os, signal, sys, threading, time, torch, ckpt\n"
        "with ckpt.open(sys.argv[1]) as repo, ckpt.Run(repo, 'gpt') as run:\n"
        "    run.track(model=torch.nn.Linear(500, 500)).save(0).version()\n"
        "    writer = run._held.writer._process.pid\n"
        "    def preempt():\n"
        "        time.sleep(1); os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(1); os.kill(writer, signal.SIGCONT)\n"
        "    os.kill(writer, signal.SIGSTOP)\n"
        "    run.save(1)\n"
        "    threading.Thread(target=preempt).start()\n"
        "    if sys.argv[2] == 'drains': os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('not reached')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path, when], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    with ckpt.open(tmp_path) as repo:
        assert repo.get("gpt").step == 1


def test_sigterm_drains_the_save_that_is_under_way(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, torch, ckpt\n"
        "with ckpt.open(sys.argv[1]) as repo, ckpt.Run(repo, 'gpt') as run:\n"
        "    run.track(model=torch.nn.Linear(500, 500))\n"
        "    run.save(1)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('not reached')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert "gpt@1 step 1" in done.stderr
    with ckpt.open(tmp_path) as repo:
        assert repo.get("gpt").step == 1
        ckpt.Run(repo, "gpt", quiet=True).close()  # the name is free again
