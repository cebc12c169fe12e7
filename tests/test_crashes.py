"""No act leaves anything half-done, wherever it stops: at every effect, and by kill -9."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import secrets
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash_driver import MODEL, Driver, check_books, file_of
from sqlalchemy import Engine, Select, TextClause, create_engine
from sqlalchemy.exc import OperationalError

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, NotFoundError

SMALL_PACK = 4096
KILLS, KILLS_PER_REPOSITORY = 20, 10

# By the label that each version carries.
CONTENTS = {
    "one": file_of("a", "b", "c", "d"),
    "two": file_of("a", "b", "x", "d"),
    "new": file_of("e", "f", "g", "h"),
    "mixed": file_of("a", "x", "k", "l"),
    "packs": file_of("p", "q", "a", "r"),
}
TWO = {1: "one", 2: "two"}  # what is there before most operations
SPARSE = {3: "mixed"}  # or what is left of three versions, most of whose bytes nobody needs


class Stopped(BaseException):
    """The process stops here."""


class Fault:
    """A hook that lets one effect fail; after a stop every later effect fails as well."""

    def __init__(self, at: int, moment: str, *, stop: bool) -> None:
        self.kinds: list[str] = []
        self.reads: list[bool] = []
        self.struck = False
        self._at, self._moment, self._stop = at, moment, stop
        self._lock = threading.Lock()

    def __call__(self, kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with self._lock:
            number = len(self.kinds)
            self.kinds.append(kind)
            query = kind == "sql" and isinstance(args[0], Select | TextClause)
            self.reads.append(query or kind in ("stat", "statvfs", "open", "read", "list"))
        if self.struck and self._stop:
            raise Stopped
        if number != self._at:
            return act(*args)
        if self._moment == "after":
            with suppress(Exception):  # such as the stat of a file that is not there
                act(*args)
        elif self._moment == "middle":
            act(*half(kind, args))
        self.struck = True
        if self._stop:
            raise Stopped
        if kind.startswith("sql"):  # this is how SQLite tells of EIO
            raise OperationalError(kind, None, sqlite3.OperationalError("disk I/O error"))
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def half(kind: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a write with the first half of its data."""
    if kind == "write_text":
        return (args[0][: len(args[0]) // 2],)
    handle, data, offset = args
    return handle, data[: len(data) // 2], offset


@dataclass(frozen=True)
class World:
    """A repository in a folder, with the files to push and the place to pull to beside it."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / ".ckpt"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def pulled(self) -> Path:
        return self.folder / "pulled.safetensors"

    def push(self, repo: ckpt.Repository, label: str, step: int) -> ckpt.Version:
        file = self.folder / f"{label}.safetensors"
        file.write_bytes(CONTENTS[label])
        return repo.push_file(file, MODEL, step=step, labels={"content": label})

    def versions(self, repo: ckpt.Repository) -> dict[int, str]:
        """What ``log`` shows, after pulling all of it: the content of each version by number."""
        try:
            log = repo.log(MODEL)
        except NotFoundError:  # the model
            return {}
        for version in log:
            out = self.folder / "check.safetensors"
            repo.pull_file(version, out, force=True)
            assert out.read_bytes() == CONTENTS[version.labels["content"]], version.reference
        assert len(log) == len({version.number for version in log})
        return {version.number: version.labels["content"] for version in log}

    def packs(self) -> dict[str, int]:
        """The pack files by name, with their sizes."""
        return {path.stem: path.stat().st_size for path in self.store.glob("packs/*/*")}

    def fingerprint(self) -> str:
        """A digest of all that is there but times and the store's own id."""
        found = hashlib.sha256()
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            name = str(path.relative_to(self.folder))
            timed = name.startswith((".ckpt/registry.db", ".ckpt/store/FORMAT"))
            timed |= "/documents/" in name or "/events/" in name
            found.update(f"{name} {'' if timed else path.stat().st_size}\n".encode())
            found.update(b"" if timed else path.read_bytes())
        database = self.root / "registry.db"
        if database.exists():
            with closing(sqlite3.connect(database)) as connection:
                for row in sorted(_lasting_rows(connection)):
                    found.update(row.encode())
        return found.hexdigest()


def _lasting_rows(connection: sqlite3.Connection) -> Iterator[str]:
    names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    for (table,) in names:
        columns = [row[1] for row in connection.execute(f'PRAGMA table_info("{table}")')]
        timed = {"created_at", "expires_at", "facts"} | ({"store"} if table == "meta" else set())
        timed |= {"body"} if table == "events" else set()
        kept = ", ".join(f'"{column}"' for column in columns if column not in timed)
        for row in connection.execute(f'SELECT {kept} FROM "{table}"'):
            yield f"{table} {row}\n"


@dataclass(frozen=True)
class Operation:
    """Something that is stopped; ``before`` and ``after`` are the versions on either side."""

    act: Callable[[World, ckpt.Repository], object]
    after: dict[int, str]
    before: dict[int, str] = field(default_factory=lambda: TWO)
    fewest: int = 30

    def check(self, world: World, *, returned: bool) -> None:
        """Open anew: all is there or nothing, what was acknowledged is, and it can be repeated."""
        with ckpt.open(world.folder) as repo:
            found = world.versions(repo)
            assert found in ((self.after,) if returned else (self.before, self.after))
            if returned:
                self.check_done(world, repo)
            try:
                self.act(world, repo)
            except NotFoundError:  # it was removed already
                assert found == self.after != TWO
            newest = max(self.after)  # this repeats it, and completes what a stop left waiting
            assert world.push(repo, self.after[newest], newest).number == newest
            assert world.versions(repo) == self.after
            self.check_done(world, repo)
        check_books(world.root)
        assert len(list(world.store.glob("documents/*/*"))) >= len(self.after)

    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        for version in repo.log(MODEL):
            assert list(world.store.glob(f"documents/1/*-{version.push}.json"))


class Change(Operation):
    """An act that leaves an event."""

    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        assert list(world.store.glob("events/1/*.json"))
        assert self.after != TWO or repo.get(f"{MODEL}:best").number == 1


class Collection(Operation):
    """The removal of a version, and of its bytes; the bytes of the others stay."""

    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        super().check_done(world, repo)
        with closing(sqlite3.connect(world.root / "registry.db", isolation_level=None)) as books:
            books.execute("UPDATE pushes SET expires_at = 0 WHERE state = 'open'")
        repo.gc(grace=0, repack=True)
        plans = [repo._registry.books.read_plan(version.push)[0] for version in repo.log(MODEL)]
        assert set(world.packs()) == {pack for plan in plans for pack in plan}
        assert repo.gc(grace=0, repack=True, dry_run=True).repacked == ()


def remove_and_collect(world: World, repo: ckpt.Repository) -> None:
    """Also when the version is gone already: what was stopped may be the collection."""
    with suppress(NotFoundError):
        repo.rm(f"{MODEL}@1")
    repo.gc(grace=0)


class Pull(Operation):
    def check(self, world: World, *, returned: bool) -> None:
        assert returned <= world.pulled.exists()
        if world.pulled.exists():
            assert world.pulled.read_bytes() == CONTENTS["one"]
            world.pulled.unlink()
        super().check(world, returned=returned)

    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        if world.pulled.exists():
            assert world.pulled.read_bytes() == CONTENTS["one"]


OPERATIONS = {
    "first push": Operation(lambda w, r: w.push(r, "one", 1), {1: "one"}, before={}, fewest=100),
    "push of new content": Operation(lambda w, r: w.push(r, "new", 3), TWO | {3: "new"}),
    "push of known content": Operation(lambda w, r: w.push(r, "one", 3), TWO | {3: "one"}),
    "push of some new content": Operation(lambda w, r: w.push(r, "mixed", 3), TWO | {3: "mixed"}),
    "push of several packs": Operation(lambda w, r: w.push(r, "packs", 3), TWO | {3: "packs"}),
    "push of the same": Operation(lambda w, r: w.push(r, "two", 2), TWO),
    "tag": Change(lambda w, r: r.tag(f"{MODEL}@1", "best"), TWO),
    "rm": Change(lambda w, r: r.rm(f"{MODEL}@1"), {2: "two"}),
    "rm and gc": Collection(remove_and_collect, {2: "two"}, fewest=60),
    "repack": Collection(lambda w, r: r.gc(grace=0, repack=True), SPARSE, before=SPARSE, fewest=60),
    "prune": Change(lambda w, r: r.prune(MODEL, keep=["last:1"]), {2: "two"}),
    "fsck and repair": Operation(lambda w, r: r.fsck(read_data=1, repair=True), TWO),
    "pull to a file": Pull(lambda w, r: r.pull_file(f"{MODEL}@1", w.pulled, force=False), TWO),
}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("template"))
    with ckpt.open(world.folder) as repo:
        world.push(repo, "one", 1)
        world.push(repo, "two", 2)
    return world


@pytest.fixture(scope="module")
def sparse(template: World, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("sparse") / "world")
    shutil.copytree(template.folder, world.folder)
    with ckpt.open(world.folder) as repo:
        world.push(repo, "mixed", 3)
        repo.rm(f"{MODEL}@1")
        repo.rm(f"{MODEL}@2")
    return world


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Describe the machine once, and compile each statement once instead of at every opening."""
    monkeypatch.setattr("ckpt.loader.environment.describe_environment", lambda: {"host": "test"})
    first = create_engine("sqlite://")

    def create(url: str, **options: Any) -> Engine:
        engine = create_engine(url, **options)
        engine.dialect, engine._compiled_cache = first.dialect, first._compiled_cache
        return engine

    monkeypatch.setattr("ckpt.registry.sqlite.create_engine", create)


@pytest.fixture(scope="module")
def driver() -> Iterator[Driver]:
    with closing(Driver()) as running:
        yield running


def check_after_kill(
    world: World, repo: ckpt.Repository, announced: dict[int, str], acknowledged: dict[int, str]
) -> dict[int, str]:
    """Pull all that is there; returns references by step. At most one was not acknowledged."""
    log = repo.log(MODEL, limit=1000) if repo.models() else []
    found = {version.step or 0: version.reference for version in log}
    assert len(found) == len(log) == len(set(found.values()))
    assert acknowledged.items() <= found.items()
    assert len(found) - len(acknowledged) <= 1
    for version in log:
        repo.pull_file(version, world.pulled, force=True)
        pulled = hashlib.sha256(world.pulled.read_bytes()).hexdigest()
        assert pulled == announced[version.step or 0], version.reference
    return found


def run(operation: Operation, world: World, fault: Fault) -> BaseException | None:
    """Open the repository and do it, all under the hook; returns the stop or typed error."""
    repo = None
    try:
        with observed(fault):
            try:
                repo = ckpt.open(world.folder)
                operation.act(world, repo)
            finally:
                if repo is not None:
                    with suppress(Stopped):  # the system closes what a stopped process had open
                        repo.close()
    except (Stopped, CkptError) as error:
        return error
    return None


@pytest.mark.parametrize("stop", [True, False], ids=["stopped", "EIO"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failure_at_any_effect_leaves_all_or_nothing_and_it_can_be_repeated(
    name: str,
    stop: bool,
    template: World,
    sparse: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Outcomes that are equal but for times are pulled and repeated once; each is audited."""
    operation = OPERATIONS[name]
    if name == "push of several packs":
        monkeypatch.setattr("ckpt.storage.packs.PACK_BYTES", SMALL_PACK)
    world = World(tmp_path / "world")

    def begin(at: int, moment: str) -> tuple[Fault, BaseException | None]:
        shutil.rmtree(world.folder, ignore_errors=True)
        if operation.before:
            before = sparse if operation.before == SPARSE else template
            shutil.copytree(before.folder, world.folder)
        else:
            world.folder.mkdir()
        ids = itertools.count(1)
        with monkeypatch.context() as patch:
            patch.setattr(secrets, "token_hex", lambda n: f"{next(ids):0{2 * n}x}")
            fault = Fault(at, moment, stop=stop)
            return fault, run(operation, world, fault)

    complete, error = begin(-1, "before")
    assert error is None
    assert len(complete.kinds) >= operation.fewest
    seen: set[tuple[bool, str]] = set()
    points = 0
    for at, kind in enumerate(complete.kinds):
        moments = ["before", *(["middle"] if kind in ("write", "write_text") else [])]
        # After an effect is before the next one for a process that stops there for good, and a
        # read that fails has done nothing.
        if at == len(complete.kinds) - 1 or not (stop or complete.reads[at]):
            moments.append("after")
        for moment in moments:
            points += 1
            try:
                fault, error = begin(at, moment)
                assert fault.struck
                assert fault.kinds[at] == kind
                if not stop:
                    assert kind == "unlink" or not list(world.store.glob(".tmp/*"))
                    assert kind == "unlink" or not list(world.folder.glob(".ckpt-*.tmp"))
                check_books(world.root)
                outcome = (error is None, world.fingerprint())
                if outcome not in seen:
                    seen.add(outcome)
                    operation.check(world, returned=error is None)
            except Exception as wrong:
                wrong.add_note(f"{moment} {kind}, effect {at} of {name}")
                raise
    record_property("effects, points, outcomes", (len(complete.kinds), points, len(seen)))


@pytest.mark.parametrize("finished", [1, 2])
def test_a_push_that_died_is_continued_from_its_finished_packs(
    finished: int, template: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt.storage.packs.PACK_BYTES", SMALL_PACK)
    world = World(tmp_path / "world")
    shutil.copytree(template.folder, world.folder)
    push = OPERATIONS["push of several packs"]
    counted = Fault(-1, "before", stop=True)
    shutil.copytree(template.folder, tmp_path / "counted")
    assert run(push, World(tmp_path / "counted"), counted) is None
    total = counted.kinds.count("create") - 1  # the last is the document
    creates = [at for at, kind in enumerate(counted.kinds) if kind == "create"]
    assert isinstance(run(push, world, Fault(creates[finished], "before", stop=True)), Stopped)

    before = world.packs()
    with ckpt.open(world.folder) as repo:
        version = world.push(repo, "packs", 3)
        assert world.versions(repo) == push.after
    new = {name: size for name, size in world.packs().items() if name not in before}
    assert all(name.startswith(version.push) for name in new)
    assert len(new) == total - finished
    assert version.new_bytes == sum(new.values())
    check_books(world.root)


@pytest.mark.parametrize("group", range(KILLS // KILLS_PER_REPOSITORY))
def test_nothing_is_lost_or_half_visible_after_kill_9_at_any_moment(
    group: int, driver: Driver, tmp_path: Path
) -> None:
    """By the clock, so also between two calls and in the middle of one; those at each call are in
    ``test_system_calls``. The first kill may hit the making of the repository."""
    world = World(tmp_path)
    announced: dict[int, str] = {}
    known: dict[int, str] = {}
    for kill in range(group * KILLS_PER_REPOSITORY, (group + 1) * KILLS_PER_REPOSITORY):
        chance = random.Random(f"kill-{kill}")
        order = {
            "folder": str(world.folder),
            "seed": f"kill-{kill}",
            "first_step": 1000 * (kill + 1),
            "pack_bytes": chance.choice([SMALL_PACK, 512 << 20]),
            "after_seconds": chance.uniform(0, 0.4),
        }
        known |= driver.kill_one(order, announced)
        with ckpt.open(world.folder) as repo:
            known = check_after_kill(world, repo, announced, known)
            check_books(world.root)
            file = world.folder / "next.safetensors"
            file.write_bytes(file_of("a", f"next-{kill}"))
            announced[kill] = hashlib.sha256(file.read_bytes()).hexdigest()
            known[kill] = repo.push_file(file, MODEL, step=kill).reference
            repo.pull_file(known[kill], world.pulled, force=True)
            assert world.pulled.read_bytes() == file.read_bytes()
        check_books(world.root)
