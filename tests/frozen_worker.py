"""A push or a pull that stops itself, by SIGSTOP, at one of its effects.

Run as a program it forks a child for each order on its standard input, one JSON object in a line.
What is written, a line each: ``effect <kind>`` and ``frozen`` when the child stands still, after
which a line ``go on`` is awaited; ``pushed <reference>``, ``pulled`` or ``failed <code>``, then
``effects <n>`` and ``ended <exit code>``.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

import boto3  # noqa: F401  (imported once, before the forks)
import psycopg  # noqa: F401
from crash_driver import say

import ckpt
import ckpt.service.fetch
import ckpt.service.push
import ckpt.storage.packs
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError

MODEL = "m"


def act(repo: ckpt.Repository, order: dict[str, Any]) -> None:
    """Push a file, or pull a version to it."""
    if order["act"] == "push":
        say("pushed", repo.push_file(order["file"], MODEL))
    else:
        repo.pull_file(order["reference"], order["file"])
        say("pulled")


def run(order: dict[str, Any]) -> None:
    """What a child does; a push that was refused is tried once more."""
    ckpt.storage.packs.PACK_BYTES = order["pack_bytes"]
    numbers = itertools.count()
    lock = threading.Lock()

    def hook(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with lock:
            number = next(numbers)
        if number == order["freeze_at"]:
            say("effect", kind)
            # To this very thread, which so does nothing more before it stands still.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return act(*args)

    with ckpt.open(registry=order["registry"], store=order["store"]) as repo:
        try:
            with observed(hook):
                act(repo, order)
        except CkptError as error:
            say("failed", error.code)
            if order["act"] == "push":
                act(repo, order)
    say("effects", next(numbers))


def main() -> None:
    """Take orders until there are no more."""
    while line := sys.stdin.readline():
        child = os.fork()
        if child == 0:
            try:
                run(json.loads(line))
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            say("frozen")
            assert sys.stdin.readline() == "go on\n"
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
        say("ended", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
