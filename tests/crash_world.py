"""Operations that are stopped at each of their effects, and what must hold of a repository then."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from crash_driver import MODEL, check_books, file_of
from sqlalchemy import Connection, Select, TextClause, event
from sqlalchemy.exc import OperationalError

import ckpt
import ckpt.migrations
import ckpt.registry.sqlite
from ckpt.core.errors import NotFoundError, StorageError
from ckpt.registry.schema import SCHEMA
from ckpt.service.config import locate
from ckpt.service.opening import upgrade_registry
from ckpt.service.rebuild import rebuild_registry
from ckpt.storage.local import LocalStore

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
            act_by_half(kind, act, args)
        self.struck = True
        if self._stop:
            raise Stopped
        if kind.startswith("sql"):  # this is how SQLite tells of EIO
            said = sqlite3.OperationalError("disk I/O error")
            raise said if kind == "sql.backup" else OperationalError(kind, None, said)
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def act_by_half(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Write the first half of the data, or let a migration end after its first change."""
    if kind == "write_text":
        act(args[0][: len(args[0]) // 2])
    elif kind == "write":
        handle, data, offset = args
        act(handle, data[: len(data) // 2], offset)
    else:
        (connection,) = args
        changes = 0

        def stop(*given: Any) -> None:
            nonlocal changes
            changes += given[2].lstrip().startswith(("CREATE", "ALTER", "INSERT"))
            if changes > 1:
                raise Stopped

        with suppress(Stopped), listening(connection, "before_cursor_execute", stop):
            act(connection)


@contextmanager
def listening(target: Any, name: str, act: Callable[..., None]) -> Iterator[None]:
    """SQLAlchemy tells ``act`` of an event meanwhile."""
    event.listen(target, name, act)
    try:
        yield
    finally:
        event.remove(target, name, act)


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

    act: Callable[[World, Any], object]
    after: dict[int, str]
    before: dict[int, str] = field(default_factory=lambda: TWO)
    fewest: int = 30

    def run(self, world: World) -> None:
        """Open the repository, do it, and close it."""
        repo = ckpt.open(world.folder)
        try:
            self.act(world, repo)
        finally:
            with suppress(Stopped):  # the system closes what a stopped process had open
                repo.close()

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


class Upkeep(Operation):
    """Something that is done to a repository that nobody has open; every version stays."""

    def run(self, world: World) -> None:
        self.act(world, None)

    def check(self, world: World, *, returned: bool) -> None:
        """Stopped, it may have to be done again before anything else."""
        if not returned:
            self.act(world, None)
        super().check(world, returned=True)


class Rebuild(Upkeep):
    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        super().check_done(world, repo)
        assert list(world.store.glob("epochs/*.json"))
        assert repo._registry.copies.position()[0] > 1


class Migration(Upkeep):
    """To the schema of ``LATER``, which tests put in the place of the newest one."""

    def check(self, world: World, *, returned: bool) -> None:
        if not returned:
            with closing(sqlite3.connect(world.root / "registry.db")) as connection:
                ((number,),) = connection.execute("SELECT version_num FROM alembic_version")
            if number != LATER:
                with pytest.raises(StorageError, match="ckpt db upgrade"):
                    ckpt.open(world.folder)
        super().check(world, returned=returned)

    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        super().check_done(world, repo)
        with closing(sqlite3.connect(world.root / "registry.db")) as connection:
            assert connection.execute("SELECT number FROM later").fetchall() == [(1,), (2,)]
            assert connection.execute("SELECT DISTINCT later FROM versions").fetchall() == [(7,)]


def rebuild(world: World, _: object) -> None:
    location = locate(world.folder)
    rebuild_registry(location, LocalStore(location.store))


LATER = "0003"
YEAR = 365 * 86400
_LATER_MIGRATION = f"""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "{LATER}", "{SCHEMA}", None, None


def upgrade():
    op.add_column("versions", sa.Column("later", sa.Integer(), server_default="7"))
    op.create_table("later", sa.Column("number", sa.Integer()))
    op.execute("INSERT INTO later SELECT number FROM versions ORDER BY number")
"""


def add_migration(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This ckpt has one more migration than the registries of ``template``."""
    (folder / f"{LATER}_later.py").write_text(_LATER_MIGRATION)
    usual = Path(ckpt.migrations.__path__[0]) / "versions"

    def upgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", "ckpt:migrations")
        config.set_main_option("path_separator", "os")
        config.set_main_option("version_locations", f"{usual}{os.pathsep}{folder}")
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    monkeypatch.setattr("ckpt.registry.schema.SCHEMA", LATER)
    monkeypatch.setattr("ckpt.registry.schema._upgrade", upgrade)


def set_wrong_clocks(patch: pytest.MonkeyPatch) -> None:
    """This machine's and the database's jump by ten years, back and forth, at every question."""
    jumps = itertools.cycle([0, 10, -10, 10, 0, -10])
    seconds, prepare = time.time, ckpt.registry.sqlite._set_pragmas

    def wrong() -> float:
        return seconds() + next(jumps) * YEAR

    def prepare_then(connection: sqlite3.Connection, record: object) -> None:
        prepare(connection, record)
        connection.create_function("julianday", 1, lambda _: 2440587.5 + wrong() / 86400)

    patch.setattr("time.time", wrong)
    patch.setattr(ckpt.registry.sqlite, "_set_pragmas", prepare_then)


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
    "registry rebuild": Rebuild(rebuild, TWO),
    "migrate": Migration(lambda w, _: upgrade_registry(w.folder), TWO, fewest=5),
    "pull to a file": Pull(lambda w, r: r.pull_file(f"{MODEL}@1", w.pulled, force=False), TWO),
}
