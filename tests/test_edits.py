"""One edit of a repository, anywhere: a pull gives the right bytes or none, and fsck tells."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from chapter_models import MLP
from crash_driver import file_of
from sqlalchemy import Engine, create_engine
from trials import Trials

import ckpt
from ckpt.core.errors import CkptError
from ckpt.registry import sqlite
from ckpt.registry.bodies import decompress

EDITS_PER_SEED = 25
COMPRESSED = {("documents", "body"), ("structures", "body")}
SPACED = {("environments", "body"), ("versions", "facts")}

# The columns that fsck compares with the store: by the copies that are made of them, and by the
# headers of packs. Of the others there is no second word, or none that it reads.
COMPARED = {
    *COMPRESSED,
    *SPACED,
    ("chunks", "base"),
    ("chunks", "codec"),
    ("chunks", "digest"),
    ("chunks", "length"),
    ("chunks", "offset"),
    ("chunks", "pack"),
    ("chunks", "raw_length"),
    ("events", "body"),
    ("meta", "store"),
    ("packs", "header"),
    ("packs", "key"),
    ("packs", "size"),
    ("versions", "counter"),
    ("versions", "epoch"),
    ("versions", "push"),
}


@dataclass
class World:
    """A repository that is edited and put right again, and what each version holds."""

    folder: Path
    states: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    file: tuple[str, bytes] = ("", b"")
    registry: bytes = b""

    @property
    def database(self) -> Path:
        return self.folder / ".ckpt" / "registry.db"

    @property
    def objects(self) -> list[Path]:
        """Packs, documents and events."""
        store = self.folder / ".ckpt" / "store"
        return sorted(
            path for place in ("packs", "documents", "events") for path in files(store / place)
        )

    def fill(self) -> None:
        with ckpt.open(self.folder) as repo:
            self._push(repo, "a", "pq", step=1, metrics={"loss": 0.5}, labels={"who": "me"})
            self._push(repo, "a", "pr", step=2, message="second", alias="best", labels={"old": "z"})
            self._push(repo, "a", "pqs", run="other", metrics={"bad": float("nan")})
            self._push(repo, "b", "qu", alias=["best", "keep"], labels={"k": "v"})
            repo.rm(repo.push({"w": torch.ones(9)}, "b"))
            repo.push(MLP(), "net", inputs=(torch.rand(2, 20),))
            repo.annotate("a@2", metrics={"acc": 1.0}, labels={"x": "y"}, remove=["old"])
            repo.untag("b:keep")
            repo.prune("b", keep=["last:9"], save=True)
            repo.gc(grace=0)
            for reference in ("a@1", "a@2", "a@3", "b@1", "net@1"):
                self.states[reference] = repo.pull(reference, all=True)
        for path in self.objects:
            path.chmod(0o644)
        self.registry = self.database.read_bytes()

    def _push(self, repo: ckpt.Repository, model: str, names: str, **said: Any) -> None:
        file = self.folder / "pushed.safetensors"
        file.write_bytes(file_of(*names, nbytes=1500))
        self.file = (repo.push_file(file, model, **said).reference, file.read_bytes())

    def is_clean(self) -> bool:
        """What fsck says, having read every byte; and every version is as it was pushed, or an
        error says that it is not."""
        try:
            with ckpt.open(self.folder, create=False) as repo:
                self._check_pulls(repo)
                return repo.fsck(read_data=1).is_clean
        except CkptError:
            return False

    def _check_pulls(self, repo: ckpt.Repository) -> None:
        for reference, state in self.states.items():
            with suppress(CkptError):
                found = repo.pull(reference, all=True)
                assert found.keys() == state.keys(), reference
                assert all(torch.equal(found[name], state[name]) for name in state), reference
        reference, body = self.file
        pulled = self.folder / "pulled.safetensors"
        with suppress(CkptError):
            repo.pull_file(reference, pulled, force=True)
            assert pulled.read_bytes() == body, reference

    def put_right(self) -> None:
        self.database.write_bytes(self.registry)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for no disk, and compile each statement once instead of at every opening."""
    first, usual = create_engine("sqlite://"), sqlite._set_pragmas

    def create(url: str, **options: Any) -> Engine:
        engine = create_engine(url, **options)
        engine.dialect, engine._compiled_cache = first.dialect, first._compiled_cache
        return engine

    def set_pragmas(connection: sqlite3.Connection, record: object) -> None:
        usual(connection, record)
        connection.execute("PRAGMA synchronous = off")

    monkeypatch.setattr("ckpt.registry.sqlite.create_engine", create)
    monkeypatch.setattr("ckpt.registry.sqlite._set_pragmas", set_pragmas)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("template"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt.loader.environment.describe_environment", lambda: {"host": "test"})
        world.fill()
    return world


@pytest.fixture
def world(template: World, tmp_path: Path) -> World:
    """A copy of the filled repository."""
    folder = tmp_path / "world"
    shutil.copytree(template.folder, folder)
    return World(folder, template.states, template.file, template.registry)


def flip(body: bytearray, chance: random.Random) -> None:
    body[chance.randrange(len(body))] ^= 1 << chance.randrange(8)


def replace(body: bytearray, chance: random.Random) -> None:
    body[chance.randrange(len(body))] = chance.randrange(256)


def cut(body: bytearray, chance: random.Random) -> None:
    del body[chance.randrange(len(body)) :]


def extend(body: bytearray, chance: random.Random) -> None:
    body += chance.choice([b"\0", b" ", b"\n"]) * chance.randrange(1, 9)


def blank(body: bytearray, chance: random.Random) -> None:
    at, length = chance.randrange(len(body)), chance.choice([1, 16, 512, 4096])
    body[at : at + length] = bytes(len(body[at : at + length]))


EDITS: list[Callable[[bytearray, random.Random], None]] = [flip, replace, cut, extend, blank]


def edit_object(path: Path, others: list[Path], chance: random.Random) -> bytes:
    """Change a file of the store, or put another in its place; returns what it was."""
    before = path.read_bytes()
    after = before
    while after == before:
        if chance.random() < 0.15:
            after = chance.choice(others).read_bytes()
        else:
            body = bytearray(before)
            chance.choice(EDITS)(body, chance)
            after = bytes(body)
    path.write_bytes(after)
    return before


@pytest.mark.torture("T15", unit="edits")
def test_every_edit_of_the_store_is_found_and_never_read(trials: Trials, world: World) -> None:
    objects = world.objects
    for seed in trials.seeds(10):
        chance = random.Random(seed)
        for _ in range(EDITS_PER_SEED):
            path = chance.choice(objects)
            before = edit_object(path, objects, chance)
            assert not world.is_clean(), path
            path.write_bytes(before)
            world.put_right()
            trials.count()
        assert world.is_clean(), "a false alarm"
        world.put_right()


@dataclass(frozen=True)
class Cell:
    """A value in the registry that was edited, and what it was before."""

    table: str
    column: str
    before: Any
    after: Any

    @property
    def must_be_found(self) -> bool:
        """Whether fsck can tell: there is a copy, and it says something else."""
        place = (self.table, self.column)
        if place == ("events", "body") and b'"counter"' not in self.before:
            return False  # a push in the history, whose copy is the document
        return place in COMPARED and self._meaning(self.before) != self._meaning(self.after)

    def _meaning(self, value: Any) -> Any:
        """What a body says: it may be compressed and spaced in more than one way."""
        with suppress(CkptError, ValueError):
            if (self.table, self.column) in COMPRESSED:
                return decompress(value)
            if (self.table, self.column) in SPACED:
                return json.loads(value)
        return value


def edit_cell(database: Path, chance: random.Random) -> Cell:
    """Change one value in one row of any table, in a way that the database accepts."""
    with closing(sqlite3.connect(database)) as connection:
        connection.execute("PRAGMA synchronous = off")
        names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        tables = sorted(name for (name,) in names if name != "alembic_version")
        while True:
            table = chance.choice(tables)
            columns = connection.execute(f'PRAGMA table_info("{table}")').fetchall()
            column = chance.choice(columns)[1]
            rows = connection.execute(f'SELECT rowid, "{column}" FROM "{table}"').fetchall()
            if not rows:
                continue
            row, before = chance.choice(rows)
            after = another(before, [value for _, value in rows if value != before], chance)
            with suppress(sqlite3.IntegrityError):
                change = f'UPDATE "{table}" SET "{column}" = ? WHERE rowid = ?'
                connection.execute(change, (after, row))
                values = connection.execute(f'SELECT "{column}" FROM "{table}"').fetchall()
                if sorted(map(repr, values)) != sorted(repr((value,)) for _, value in rows):
                    connection.commit()
                    return Cell(table, column, before, after)


def another(value: Any, others: list[Any], chance: random.Random) -> Any:
    """Another value of the same type: that of another row, or a small change."""
    if others and (value is None or chance.random() < 0.3):
        return chance.choice(others)
    if isinstance(value, int | float):
        return value + chance.choice([-1, 1, 100])
    if isinstance(value, str | bytes) and value:
        body = bytearray(value.encode() if isinstance(value, str) else value)
        if isinstance(value, str):
            body[chance.randrange(len(body))] = chance.choice(b"0aZ-")
            return body.decode(errors="replace")
        chance.choice(EDITS)(body, chance)
        return bytes(body)
    return value


@pytest.mark.torture("T15", unit="edits")
def test_no_edit_of_a_row_brings_other_bytes_and_what_has_a_copy_is_found(
    trials: Trials, world: World
) -> None:
    for seed in trials.seeds(10):
        chance = random.Random(seed)
        for _ in range(EDITS_PER_SEED):
            cell = edit_cell(world.database, chance)
            try:
                clean = world.is_clean()
            except Exception as error:
                error.add_note(f"after {cell}"[:500])
                raise
            assert not (clean and cell.must_be_found), cell
            world.put_right()
            trials.count()
        assert world.is_clean(), "a false alarm"
        world.put_right()
