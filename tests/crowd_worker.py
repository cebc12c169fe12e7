"""A crowd at one repository: pushers, pullers and a collector, each a process.

Run as a program it takes an order, one JSON object, on its standard input, forks all of them,
and writes their exit codes to its standard output. In ``folder`` each process leaves
``<name>.log``, a JSON array in a line for everything that it did, and ``<name>.err``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import boto3  # noqa: F401  (imported once, before the forks)
import psycopg  # noqa: F401
from crash_driver import file_of

import ckpt
import ckpt.service.fetch
import ckpt.service.push
from ckpt.core.errors import NotFoundError

MODEL = "m"
SHARED, OWN, POOLS = 8, 2, 3
COLLECTOR = "collector"


class Member:
    """One process of the crowd."""

    def __init__(self, name: str, order: dict[str, Any], log: TextIO) -> None:
        self.name = name
        self.order = order
        self.folder = Path(order["folder"])
        self.chance = random.Random(f"{order['seed']}-{name}")
        self.repo = ckpt.open(registry=order["registry"], store=order["store"])
        self._log = log

    def say(self, *words: object) -> None:
        print(json.dumps(words), file=self._log, flush=True)

    def is_over(self) -> bool:
        """Whether all pushers are done."""
        return (self.folder / "over").exists()

    def push(self) -> None:
        """Push, look at it, and remove about half of it again."""
        mine: list[ckpt.Version] = []
        for step in range(self.order["pushes"]):
            names = self.draw_names(step)
            file = self.folder / f"{self.name}.safetensors"
            file.write_bytes(file_of(*names))
            version = self.repo.push_file(file, MODEL, step=step, labels={"names": " ".join(names)})
            self.say("pushed", version.reference, names)
            self.check(version)
            mine.append(version)
            if self.chance.random() < 0.5:
                gone = mine.pop(self.chance.randrange(len(mine)))
                self.say("removing", gone.reference)
                self.repo.rm(gone)

    def draw_names(self, step: int) -> list[str]:
        """Tensors of one of the pools that all share, and some of its own."""
        seed, pool = self.order["seed"], self.chance.randrange(POOLS)
        own = [f"{seed}-{self.name}-{step}-{place}" for place in range(OWN)]
        return [f"{seed}-pool-{pool}-{place}" for place in range(SHARED)] + own

    def pull(self) -> None:
        """Pull one of the newest versions, again and again; some are removed meanwhile."""
        while not self.is_over():
            try:
                version = self.chance.choice(self.repo.log(MODEL, limit=20))
                self.check(version)
                self.say("pulled", version.reference)
            except (IndexError, NotFoundError) as error:
                if not isinstance(error, NotFoundError) or error.code == "model-missing":
                    continue  # there is nothing now
                self.say(error.code, version.reference)

    def check(self, version: ckpt.Version) -> None:
        """It comes back bit for bit."""
        out = self.folder / f"{self.name}.pulled"
        self.repo.pull_file(version, out, force=True)
        if out.read_bytes() != file_of(*version.labels["names"].split()):
            raise AssertionError(f"{version} has other bytes")

    def collect(self) -> None:
        """Free what nobody needs, again and again."""
        over = False
        while not over:
            over = self.is_over()  # once more after that
            self.say("freed", len(self.repo.gc(grace=0).freed))


def start(name: str, order: dict[str, Any], act: Callable[[Member], None]) -> int:
    """Fork a process that does one thing; returns its id."""
    process = os.fork()
    if process:
        return process
    folder = Path(order["folder"])
    try:
        with (
            (folder / f"{name}.err").open("w") as errors,
            (folder / f"{name}.log").open("w") as log,
        ):
            os.dup2(errors.fileno(), 2)
            member = Member(name, order, log)
            act(member)
            member.repo.close()
            os._exit(0)
    finally:
        os.write(2, traceback.format_exc().encode())
        os._exit(1)


def main() -> None:
    """Do what the order says."""
    order = json.loads(sys.stdin.readline())
    pushers = {f"pusher-{n}": Member.push for n in range(order["pushers"])}
    others = {f"puller-{n}": Member.pull for n in range(order["pullers"])}
    others[COLLECTOR] = Member.collect
    running = {name: start(name, order, act) for name, act in (pushers | others).items()}
    codes = {name: wait(running[name]) for name in pushers}
    (Path(order["folder"]) / "over").touch()
    codes |= {name: wait(running[name]) for name in others}
    print(json.dumps(codes))


def wait(process: int) -> int:
    """The exit code of a child."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    main()
