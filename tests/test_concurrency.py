"""Many at once, and whatever happens to a push between its look-up and its commit."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
from crash_driver import MODEL, check_books, file_of
from sqlalchemy.exc import OperationalError

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, ConflictError, IntegrityError, NotFoundError, StorageError

PROCESSES, PUSHES = 8, 25
BASE = ("a", "b", "c")
MIXED = ("a", "b", "new")
LOST = "the connection was lost"


class Worker:
    """Another process that pushes what it is told to; this file run as a program."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def order(self, folder: Path, *names: str, step: int | None = None) -> None:
        """Have it push the file of these tensors."""
        self._orders.write(json.dumps([str(folder), names, step]) + "\n")
        self._orders.flush()

    def answer(self) -> str:
        """Its next line: ``ready``, then a reference for each order, or the error."""
        return self._answers.readline().strip()

    def close(self) -> None:
        self._orders.close()
        assert self._process.wait() == 0
        self._answers.close()


def work() -> None:
    """What the other process does."""
    with ExitStack() as stack:
        repo = None
        say("ready")
        for line in sys.stdin:
            folder, names, step = json.loads(line)
            try:
                repo = repo or stack.enter_context(ckpt.open(folder))
                say(push(repo, Path(folder) / f"{os.getpid()}.safetensors", *names, step=step))
            except CkptError as error:
                say(f"{error.code}: {error}")


def say(answer: object) -> None:
    print(answer, flush=True)


@pytest.fixture
def workers() -> Iterator[Callable[[int], list[Worker]]]:
    """A number of processes, all ready to start."""
    with ExitStack() as stack:

        def start(count: int) -> list[Worker]:
            started = [stack.enter_context(closing(Worker())) for _ in range(count)]
            assert [worker.answer() for worker in started] == ["ready"] * count
            return started

        yield start


@pytest.fixture
def books(tmp_path: Path, repo: ckpt.Repository) -> Iterator[sqlite3.Connection]:
    """The registry's own file, to do by hand what others might; ``BASE`` was pushed."""
    push(repo, tmp_path / "base.safetensors", *BASE, step=1)
    database = sqlite3.connect(
        repo.location.registry, isolation_level=None, check_same_thread=False
    )
    with closing(database) as connection:
        yield connection


class Meanwhile:
    """A hook that does something once, just before the ``nth`` effect of a kind."""

    def __init__(self, kind: str, act: Callable[[], object], nth: int = 0) -> None:
        self.seen = 0
        self._kind, self._act, self._nth = kind, act, nth
        self._lock = threading.Lock()

    def __call__(self, kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with self._lock:
            due = kind == self._kind and self.seen == self._nth
            self.seen += kind == self._kind
        if due:
            self._act()
        return act(*args)


class LostAnswer:
    """A hook: the ``nth`` commit happens, its answer is lost, and, when ``lasting``, all later."""

    def __init__(self, nth: int, *, lasting: bool) -> None:
        self.lost = False
        self._left = nth
        self._lasting = lasting

    def __call__(self, kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self.lost and self._lasting and kind.startswith("sql"):
            raise OperationalError(kind, None, sqlite3.OperationalError(LOST))
        result = act(*args)
        if kind == "sql.commit":
            self._left -= 1
            if self._left < 0 and not self.lost:
                self.lost = True
                raise OperationalError(kind, None, sqlite3.OperationalError(LOST))
        return result


def push(repo: ckpt.Repository, file: Path, *names: str, step: int | None = None) -> ckpt.Version:
    """Push a file with these tensors by way of ``file``."""
    file.write_bytes(file_of(*names))
    return repo.push_file(file, MODEL, step=step)


def pulled(repo: ckpt.Repository, version: str | ckpt.Version, folder: Path) -> bytes:
    """The bytes of a version, pulled into ``folder`` as a file."""
    file = folder / f"pulled-{threading.get_ident()}.safetensors"
    repo.pull_file(version, file, force=True)
    return file.read_bytes()


def test_processes_that_push_at_once_from_nothing_get_a_number_each(
    workers: Callable[[int], list[Worker]], tmp_path: Path
) -> None:
    folder = tmp_path / "new"
    folder.mkdir()
    started = workers(PROCESSES)
    for step in range(PUSHES):
        for place, worker in enumerate(started):
            worker.order(folder, "shared", f"{place}-{step}", step=step)
    made = {
        worker.answer(): (place, step)
        for place, worker in enumerate(started)
        for step in range(PUSHES)
    }
    assert set(made) == {f"{MODEL}@{n}" for n in range(1, PROCESSES * PUSHES + 1)}
    with ckpt.open(folder) as repo:
        assert len(repo.log(MODEL, limit=1000)) == len(made)
        for reference, (place, step) in made.items():
            assert pulled(repo, reference, folder) == file_of("shared", f"{place}-{step}")
    check_books(repo.location.root)


def test_two_processes_that_push_the_same_content_at_once_both_succeed(
    workers: Callable[[int], list[Worker]], tmp_path: Path
) -> None:
    started = workers(2)
    for turn in range(15):
        for worker in started:
            worker.order(tmp_path, "a", f"{turn}")
        answers = [worker.answer() for worker in started]
        with ckpt.open(tmp_path) as repo:
            for reference in answers:
                assert pulled(repo, reference, tmp_path) == file_of("a", f"{turn}")
            assert repo.get(MODEL).reference in answers
    check_books(repo.location.root)


def test_threads_may_push_and_pull_with_one_repository(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    def many(thread: int) -> list[int]:
        numbers = []
        for turn in range(6):
            names = ("shared", f"{thread}-{turn}")
            version = push(repo, tmp_path / f"{thread}.safetensors", *names, step=turn)
            assert pulled(repo, version, tmp_path) == file_of(*names)
            numbers.append(version.number)
        return numbers

    with ThreadPoolExecutor(8) as pool:
        numbers = [number for made in pool.map(many, range(8)) for number in made]
    assert sorted(numbers) == list(range(1, 49))
    check_books(repo.location.root)


@pytest.mark.parametrize("collected", [False, True])
def test_a_pull_of_a_version_that_is_removed_meanwhile_is_complete_or_says_so(
    collected: bool, repo: ckpt.Repository, books: sqlite3.Connection, tmp_path: Path
) -> None:
    """Removed before each act of the pull, and, when ``collected``, its bytes as well."""
    removed = complete = 0
    for kind in ("sql.begin", "statvfs", "create", "open", "read", "write", "fsync", "link"):
        for nth in range(100):
            version = push(repo, tmp_path / "one.safetensors", f"{kind}-{nth}", "x", step=nth)
            (pack,) = books.execute("SELECT pack FROM refs ORDER BY version DESC").fetchone()

            def remove(version: ckpt.Version = version, pack: str = pack) -> None:
                repo.rm(version)
                if collected:
                    (key,) = books.execute("SELECT key FROM packs WHERE id = ?", [pack]).fetchone()
                    (repo.location.store / key).unlink()
                    for table, column in (("refs", "pack"), ("chunks", "pack"), ("packs", "id")):
                        books.execute(f"DELETE FROM {table} WHERE {column} = ?", [pack])

            hook = Meanwhile(kind, remove, nth)
            destination = tmp_path / f"{kind}-{nth}.out"
            try:
                with observed(hook):
                    repo.pull_file(version, destination)
                assert destination.read_bytes() == file_of(f"{kind}-{nth}", "x")
                complete += 1
            except NotFoundError as error:
                if error.code != "version-missing":
                    raise
                assert not destination.exists()
                removed += 1
            if hook.seen <= nth:
                break  # the pull has no more of this kind
    assert removed
    assert complete
    check_books(repo.location.root)


def test_a_number_never_comes_back(repo: ckpt.Repository, tmp_path: Path) -> None:
    file = tmp_path / "file.safetensors"
    for number in range(1, 6):
        version = push(repo, file, "a")  # the same content, again and again
        assert version.number == number
        repo.rm(version)
    with ckpt.open(tmp_path) as again:
        assert push(again, file, "a").number == 6


@pytest.mark.parametrize(
    ("statements", "expected", "code"),
    [
        (
            (
                "DELETE FROM refs",
                "DELETE FROM claims",
                "DELETE FROM chunks",
                "DELETE FROM packs",
            ),
            ConflictError,
            "pack-gone",
        ),
        (("UPDATE packs SET state = 'condemned'",), ConflictError, "pack-gone"),
        (
            ("UPDATE pushes SET state = 'aborted' WHERE state = 'open'", "DELETE FROM claims"),
            ConflictError,
            "push-expired",
        ),
        (("DELETE FROM chunks",), IntegrityError, "undecodable"),
    ],
)
def test_a_commit_refuses_what_it_can_not_rely_on(
    statements: tuple[str, ...],
    expected: type[CkptError],
    code: str,
    repo: ckpt.Repository,
    books: sqlite3.Connection,
    tmp_path: Path,
) -> None:
    """Done by hand after the claim, while the new pack is synced: no act of ours does this."""

    def spoil() -> None:
        for statement in statements:
            books.execute(statement)

    with observed(Meanwhile("fsync", spoil)), pytest.raises(expected) as refused:
        push(repo, tmp_path / "mixed.safetensors", *MIXED, step=2)
    assert refused.value.code == code
    assert [version.number for version in repo.log(MODEL)] == [1]
    assert not list((repo.location.store / ".tmp").iterdir())
    assert books.execute("SELECT count(*) FROM claims").fetchone() == (0,)
    version = push(repo, tmp_path / "mixed.safetensors", *MIXED, step=2)
    assert (version.number, pulled(repo, version, tmp_path)) == (2, file_of(*MIXED))


def test_a_condemned_pack_is_rescued_by_a_claim(
    repo: ckpt.Repository, books: sqlite3.Connection, tmp_path: Path
) -> None:
    repo.rm(f"{MODEL}@1")
    books.execute("UPDATE packs SET state = 'condemned'")
    version = push(repo, tmp_path / "base.safetensors", *BASE, step=2)
    assert version.new_bytes == 0
    assert books.execute("SELECT state FROM packs").fetchall() == [("live",)]
    assert pulled(repo, version, tmp_path) == file_of(*BASE)


@pytest.mark.parametrize("step", [1, 2], ids=["as the newest version", "as another version"])
def test_a_broken_pack_is_not_used_and_its_content_is_written_again(
    step: int, repo: ckpt.Repository, books: sqlite3.Connection, tmp_path: Path
) -> None:
    books.execute("UPDATE packs SET state = 'broken'")
    version = push(repo, tmp_path / "base.safetensors", *BASE, step=step)
    used = books.execute("SELECT pack FROM refs WHERE version = 2").fetchall()
    assert used == [(f"{version.push}-0",)]
    assert version.new_bytes > len(file_of(*BASE))
    assert pulled(repo, version, tmp_path) == file_of(*BASE)


def test_a_pack_that_breaks_during_a_push_is_refused_only_after_it_was_claimed(
    repo: ckpt.Repository, books: sqlite3.Connection, tmp_path: Path
) -> None:
    refused = 0
    for nth in range(100):
        books.execute("UPDATE packs SET state = 'live'")
        kept = push(repo, tmp_path / "kept.safetensors", *BASE, step=1000 + nth)
        hook = Meanwhile("sql.begin", lambda: books.execute("UPDATE packs SET state='broken'"), nth)
        try:
            with observed(hook):
                version = push(repo, tmp_path / "mixed.safetensors", *MIXED, step=nth)
            assert pulled(repo, version, tmp_path) == file_of(*MIXED)
        except ConflictError as error:
            if error.code != "pack-gone":
                raise
            assert repo.get(MODEL) == kept
            refused += 1
        if hook.seen <= nth:
            break
    assert refused == 1  # between claim and commit there is one moment
    check_books(repo.location.root)


@pytest.mark.parametrize("step", [1, 2], ids=["as the newest version", "as another version"])
def test_a_pack_that_the_store_lost_is_written_again_and_noted_as_an_alarm(
    step: int, repo: ckpt.Repository, books: sqlite3.Connection, tmp_path: Path
) -> None:
    ((pack, key, size),) = books.execute("SELECT id, key, size FROM packs").fetchall()
    (repo.location.store / key).unlink()
    version = push(repo, tmp_path / "base.safetensors", *BASE, step=step)
    assert pulled(repo, version, tmp_path) == file_of(*BASE)
    ((body,),) = books.execute("SELECT body FROM events WHERE kind = 'alarm'").fetchall()
    assert json.loads(body) == {"pack": pack, "expected": size, "found": None}


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "and nothing answers any more"])
def test_a_commit_whose_outcome_is_unknown_never_makes_two_versions(
    lasting: bool, repo: ckpt.Repository, tmp_path: Path
) -> None:
    file = tmp_path / "file.safetensors"
    acknowledged = 0
    for nth in range(100):
        hook = LostAnswer(nth, lasting=lasting)
        answered = None
        try:
            with observed(hook):
                answered = push(repo, file, "a", f"{nth}", step=nth)
        except StorageError as error:
            if LOST not in str(error):
                raise
        if answered is not None:
            acknowledged += 1
            assert not (lasting and hook.lost)
            assert repo.get(answered) == answered
        again = push(repo, file, "a", f"{nth}", step=nth)
        assert answered is None or again == answered
        assert [version.step for version in repo.log(MODEL)] == list(range(nth, -1, -1))
        assert pulled(repo, again, tmp_path) == file_of("a", f"{nth}")
        if not hook.lost:
            break
    assert acknowledged >= (1 if lasting else 2)
    check_books(repo.location.root)


if __name__ == "__main__":
    work()
