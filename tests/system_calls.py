"""What strace shows of one act on a repository, and kills by it at a system call of choice."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import traced_worker
from traced_worker import MARK

# All by which a process changes files; with the question mark, what some machines do not have.
CALLS = (
    *("?open", "openat", "?creat", "write", "writev", "pwrite64", "pwritev", "pwritev2"),
    *("fsync", "fdatasync", "sync_file_range", "ftruncate", "?truncate", "fallocate"),
    *("?link", "linkat", "?rename", "?renameat", "renameat2", "?unlink", "unlinkat", "?symlink"),
    *("symlinkat", "?mkdir", "mkdirat", "?rmdir", "?chmod", "fchmod", "fchmodat", "?chown"),
    *("fchown", "fchownat", "utimensat", "copy_file_range", "sendfile", "splice", "mmap"),
    *("setxattr", "fsetxattr", "?mknod", "mknodat"),
)
_MARKS = ("?access", "faccessat", "?faccessat2")
_LINE = re.compile(r"(\w+)\((.*)\)\s+= (.*)")
_PATH = re.compile(r'[<"](/[^">]*)[">]')
_HERE = re.compile(r"AT_FDCWD<[^>]*>")
_OPENS = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC)")
_START_SECONDS = 60


@dataclass(frozen=True)
class Call:
    """A system call: of which thread, in their order, the how-manieth of its name in it, the
    effect of the seam that it belongs to, and the paths that it names."""

    thread: int
    name: str
    number: int
    effect: str | None
    paths: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """The exit code, minus the signal of a process that was killed, and the reference that it
    acknowledged."""

    code: int
    reference: str | None

    @property
    def is_killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Worker:
    """The test's end of ``traced_worker``."""

    def __init__(self, folder: Path) -> None:
        strace = shutil.which("strace")
        assert strace, "strace is missing: run `apt-get install strace`"
        self._strace, self._folder = strace, folder
        self._process = subprocess.Popen(
            [sys.executable, traced_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )

    def kill(self, order: dict[str, Any], call: Call) -> Outcome:
        """Do it, and kill the process when a thread of it enters that call."""
        inject = f"inject={call.name}:signal=KILL:when={call.number}"
        trace = f"trace={call.name}"
        return self._watched(order, "-o", "/dev/null", "-e", trace, "-e", inject)

    def watch(self, order: dict[str, Any]) -> tuple[list[Call], Outcome]:
        """Do it, and tell all calls by which files may be changed."""
        for path in self._folder.glob("trace.*"):
            path.unlink()
        trace = f"trace={','.join((*CALLS, *_MARKS))}"
        shown = str(self._folder / "trace")
        outcome = self._watched(order, "-ff", "-y", "-s", "0", "-o", shown, "-e", trace)
        files = sorted(self._folder.glob("trace.*"), key=lambda path: int(path.suffix[1:]))
        return [call for n, path in enumerate(files) for call in _calls(n, path)], outcome

    def _watched(self, order: dict[str, Any], *options: str) -> Outcome:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        child = self._listen()[1]
        strace = subprocess.Popen(
            [self._strace, "-f", *options, "-p", child], stderr=subprocess.PIPE, text=True
        )
        assert strace.stderr is not None
        said = strace.stderr.readline()
        self._process.stdin.write(b"\n")
        reference = None
        while (words := self._listen())[0] != "ended":
            assert words[0] == "did", words
            reference = words[1]
        _, rest = strace.communicate(timeout=_START_SECONDS)
        assert "attached" in said, f"strace cannot watch a process here: {said}{rest}"
        return Outcome(int(words[1]), reference)

    def _listen(self) -> list[str]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the worker ended"
        return line.decode().split()

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait() == 0
        self._process.stdout.close()


def _calls(thread: int, trace: Path) -> list[Call]:
    """What one thread did."""
    effects: list[str] = []
    counts: dict[str, int] = {}
    found = []
    for line in trace.read_text().splitlines():
        matched = _LINE.match(line)
        if matched is None:  # a signal, or the end
            continue
        name, arguments, result = matched.groups()
        paths = tuple(_PATH.findall(_HERE.sub("", arguments)))
        if paths and paths[0].startswith(MARK):
            _, _, moment, kind = paths[0].split("/")
            if moment == "begin":
                effects.append(kind)
            else:
                assert effects.pop() == kind
            continue
        counts[name] = counts.get(name, 0) + 1
        if _changes(name, arguments, result):
            effect = effects[-1] if effects else None
            found.append(Call(thread, name, counts[name], effect, paths))
    assert not effects
    return found


def _changes(name: str, arguments: str, result: str) -> bool:
    if result.startswith("-1"):
        return False
    if name in ("open", "openat"):
        return bool(_OPENS.search(arguments))
    return name != "mmap" or ("PROT_WRITE" in arguments and "MAP_SHARED" in arguments)
