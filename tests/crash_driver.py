"""Pushes that are killed, and what must hold of a repository after a crash.

Run as a program it forks a child for each order on its standard input, one JSON object in a line.
The child pushes until the test kills it. It never imports torch. What is written: ``child <pid>``, ``pushing <step> <sha256>``,
``pushed <step> <reference>``, ``ended <signal>``.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import select
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
from safetensors.numpy import save

import ckpt
import ckpt.service.fetch
import ckpt.service.push
import ckpt.storage.packs

MODEL = "m"


def file_of(*names: str, nbytes: int = 5000) -> bytes:
    """A ``.safetensors`` file with a tensor for each name, whose bytes follow from the name."""
    parts = [random.Random(name).randbytes(nbytes) for name in names]
    return save({f"t{n}": numpy.frombuffer(part, numpy.uint8) for n, part in enumerate(parts)})


def check_books(root: Path) -> None:
    """The registry is sound, free for a writer, and the store has all that it refers to."""
    database = root / "registry.db"
    if database.exists():
        with closing(sqlite3.connect(database, timeout=0, isolation_level=None)) as connection:
            check_tables(connection, root / "store")


def check_tables(connection: sqlite3.Connection, store: Path) -> None:
    """The same of a registry that is open."""
    connection.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    if not connection.execute("SELECT 1 FROM sqlite_master").fetchall():
        return
    for pack, key, size in connection.execute(
        "SELECT DISTINCT refs.pack, packs.key, packs.size"
        " FROM refs LEFT JOIN packs ON packs.id = refs.pack"
    ):
        assert key is not None, f"{pack} has a ref and no row"
        assert (store / key).stat().st_size == size
    assert not connection.execute(
        "SELECT * FROM claims LEFT JOIN pushes ON pushes.id = claims.push"
        " WHERE pushes.state IS NOT 'open'"
    ).fetchall()


class Driver:
    """The test's end of the program."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        self._lines: list[bytes] = []

    def kill_one(self, order: dict[str, Any], announced: dict[int, str]) -> dict[int, str]:
        """Let one child push until it is dead; returns the references that it acknowledged."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")
        acknowledged: dict[int, str] = {}
        deadline = None
        child = 0
        while True:
            word, *values = self._next_line(deadline) or [b"late"]
            if word == b"late":
                os.kill(child, signal.SIGKILL)
                deadline = None
            elif word == b"child":
                child = int(values[0])
                deadline = time.monotonic() + order["after_seconds"]
            elif word == b"pushing":
                announced[int(values[0])] = values[1].decode()
            elif word == b"pushed":
                acknowledged[int(values[0])] = values[1].decode()
            else:
                assert [word, *values] == [b"ended", b"%d" % signal.SIGKILL]
                return acknowledged

    def _next_line(self, deadline: float | None) -> list[bytes] | None:
        """The words of the next line, or None when it is too late."""
        assert self.process.stdout is not None
        while not self._lines or not self._lines[0].endswith(b"\n"):
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                return None
            read = os.read(self.process.stdout.fileno(), 65536)
            assert read, "the driver ended"
            self._lines = b"".join([*self._lines, read]).splitlines(keepends=True)
        return self._lines.pop(0).split()

    def close(self) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait() == 0
        self.process.stdout.close()


def say(*words: object) -> None:
    """One line to the test, in one piece."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def content(seed: str) -> bytes:
    """Some tensors that any push has, some of one of four kinds, some new."""
    kind = random.Random(seed).randrange(4)
    return file_of("base", f"kind-{kind}", f"{seed}-0", f"{seed}-1", nbytes=20_000)


def push_until_killed(order: dict[str, Any]) -> None:
    """What a child does."""
    seed = order["seed"]
    ckpt.storage.packs.PACK_BYTES = order["pack_bytes"]
    folder = Path(order["folder"])
    file = folder / "pushed.safetensors"
    with ckpt.open(folder) as repo:
        for number in itertools.count(order["first_step"]):
            data = content(f"{seed}-{number}")
            file.write_bytes(data)
            say("pushing", number, hashlib.sha256(data).hexdigest())
            version = repo.push_file(file, MODEL, step=number)
            say("pushed", number, version.reference)


def main() -> None:
    """Take orders until there are no more."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            say("child", os.getpid())
            try:
                push_until_killed(json.loads(line))
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
        _, status = os.waitpid(child, 0)
        say("ended", os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
    assert "torch" not in sys.modules


if __name__ == "__main__":
    main()
