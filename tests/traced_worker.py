"""One act on a repository for each order, in a process that strace can watch, and kill.

Run as a program it forks a child for each order on its standard input, one JSON object in a line.
The child waits for a further line before it begins. What is written: ``child <pid>``,
``did <reference>``, ``ended <exit code>``, which is minus the signal that killed it.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crash_driver import file_of, say

import ckpt
import ckpt.storage.packs
from ckpt.core.effects import observed

MODEL = "m"
MARK = "/effect"  # a path that is nowhere; strace shows the question whether it is there
_PR_SET_PTRACER, _ANYBODY = 0x59616D61, -1


def act(order: dict[str, Any]) -> object:
    """Open the repository and do what the order says."""
    with ckpt.open(**order["where"]) as repo:
        verb = order["act"]
        if verb == "push":
            return repo.push_file(order["file"], MODEL, step=order["step"])
        if verb == "pull":
            repo.pull_file(order["reference"], order["file"], force=True)
        elif verb == "rm":
            repo.rm(order["reference"])
        else:
            repo.gc(grace=0, repack=verb == "repack")
    return "nothing"


def mark(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A hook by which the system calls of an effect lie between two marks."""
    os.access(f"{MARK}/begin/{kind}", os.F_OK)
    try:
        return effect(*args)
    finally:
        os.access(f"{MARK}/end/{kind}", os.F_OK)


def run(order: dict[str, Any]) -> None:
    """What a child does."""
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _ANYBODY, 0, 0, 0)  # strace is no parent of it
    ckpt.storage.packs.PACK_BYTES = order["pack_bytes"]
    say("child", os.getpid())
    os.read(0, 1)
    with observed(mark):
        said = act(order)
    say("did", said)


def import_all() -> None:
    """Do everything once, so that no child has to import anything."""
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "pushed.safetensors"
        file.write_bytes(file_of("a", "b"))
        order = {"where": {"repo": name}, "file": str(file), "step": 0, "reference": f"{MODEL}@1"}
        for verb in ("push", "pull", "rm"):
            act(order | {"act": verb})
        with ckpt.open(name) as repo:
            repo.gc(grace=0, allow=["empty", "much"], repack=True)


def main() -> None:
    """Take orders until there are no more."""
    import_all()
    orders = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115  a child reads it as well
    while line := orders.readline():
        child = os.fork()
        if child == 0:
            try:
                run(json.loads(line))
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        say("ended", os.waitstatus_to_exitcode(status))
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
