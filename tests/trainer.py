"""A training job that is killed: run as a program it forks a trainer for each folder it is told.

The trainer counts steps in its weights and saves each one. What is written: ``trainer <pid>``,
``writer <pid>``, ``resumed <step>``, ``calling <step>``, ``called <step>``, ``durable <step>``,
``ended <status>``.
"""

from __future__ import annotations

import os
import sys

import torch
from torch import nn

import ckpt
import ckpt.training.run


def train(folder: str) -> None:
    """Save without end; every weight is the step, so that what is torn would show."""
    net = nn.Linear(200, 200)
    with ckpt.open(folder) as repo, ckpt.Run(repo, "gpt", keep=[ckpt.Latest(2)], quiet=True) as run:
        assert run._held.writer is not None
        say("writer", run._held.writer._process.pid)
        start = run.track(model=net).resume()
        say("resumed", start)
        before = None
        for step in range(start, start + 100_000):
            with torch.no_grad():
                net.weight.fill_(step)
                net.bias.fill_(step)
            say("calling", step)
            saved = run.save(step)
            if before is not None and before.version() is not None:
                say("durable", before.step)
            say("called", step)
            before = saved


def say(*words: object) -> None:
    """One line, at once."""
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


def main() -> None:
    """Serve folders until the input ends."""
    torch.set_num_threads(1)  # a thread pool would not survive the fork
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                train(line.strip())
            finally:
                os._exit(1)
        say("trainer", child)
        _, status = os.waitpid(child, 0)
        say("ended", status)


if __name__ == "__main__":
    main()
