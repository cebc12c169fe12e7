"""Whatever a disk drops of what was not synced: what was acknowledged is there, bit for bit."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from crash_driver import MODEL, check_books, file_of
from power_loss import Change, Disk, Mark, Name, Recorder, Resize, Tree, Write, is_sqlite
from sqlalchemy import Engine, create_engine
from trials import Trials

import ckpt
from ckpt.core.errors import CkptError, IntegrityError, NotFoundError
from ckpt.registry.sqlite import _set_pragmas as set_pragmas

SMALL_PACK = 4096
REGISTRY = "registry.db"
MANY = 5  # up to so many acts, every subset of them is tried

NAMES = {
    "one": ("a", "b", "c"),
    "two": ("a", "x", "c"),
    "new": ("e", "f", "g"),
    "mixed": ("a", "k", "x"),
    "packs": ("p", "q", "a"),
}


def crash_states(recorder: Recorder, chance: random.Random) -> Iterator[tuple[int, Tree]]:
    """``(steps that had returned, what the disk holds)`` for each moment and each choice of what
    is there of the acts that no sync covers."""
    durable = recorder.base.copy()
    pending: list[Change] = []
    steps = 0
    for act in [*recorder.acts, Mark()]:
        if isinstance(act, Name | Write | Resize):
            pending.append(act)
            yield steps, with_changes(durable, pending)
            continue
        for chosen in choices(pending, chance):
            yield steps, with_changes(durable, chosen)
        if isinstance(act, Mark):
            steps += 1
        else:
            durable.apply(change for change in pending if change.thing == act.thing)
            pending = [change for change in pending if change.thing != act.thing]


def with_changes(durable: Disk, changes: Sequence[Change]) -> Tree:
    disk = durable.copy()
    disk.apply(changes)
    return disk.tree()


def choices(pending: Sequence[Change], chance: random.Random) -> Iterator[Sequence[Change]]:
    """All and none; each one missing, alone, torn; pairs missing; some subsets, or every one."""
    if len(pending) <= MANY:
        for chosen in itertools.product((False, True), repeat=len(pending)):
            yield list(itertools.compress(pending, chosen))
    yield pending
    yield []
    for at, change in enumerate(pending):
        before, after = pending[:at], pending[at + 1 :]
        yield [*before, *after]
        yield [change]
        for part in torn(change, chance):
            yield [*before, part, *after]
    pairs = list(itertools.combinations(range(len(pending)), 2))
    for pair in chance.sample(pairs, min(len(pairs), 40)):
        yield [change for at, change in enumerate(pending) if at not in pair]
    for _ in range(30 if len(pending) > MANY else 0):
        share = chance.random()
        subset = [change for change in pending if chance.random() < share]
        yield [
            chance.choice([change, *torn(change, chance)]) if chance.random() < 0.3 else change
            for change in subset
        ]


def torn(change: Change, chance: random.Random) -> list[Change]:
    """A write that ended, and one that began, inside its page, at a sector of 512 bytes."""
    if not isinstance(change, Write) or len(change.data) <= 512:
        return []
    cut = 512 * chance.randrange(1, -(-len(change.data) // 512))
    return [
        Write(change.thing, change.offset, change.data[:cut]),
        Write(change.thing, change.offset + cut, change.data[cut:]),
    ]


def materialise(tree: Tree, folder: Path) -> None:
    """Write a state into an empty folder."""
    for path, body in sorted(tree.items()):
        if body is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(body)


@dataclass(frozen=True)
class World:
    """A disk with a repository on it, and, not on this disk, the files to push."""

    disk: Path
    files: Path
    seed: int

    @property
    def root(self) -> Path:
        return self.disk / ".ckpt"

    @property
    def store(self) -> Path:
        return self.root / "store"

    @property
    def pulled(self) -> Path:
        return self.disk / "pulled.safetensors"

    def content(self, label: str) -> bytes:
        return file_of(*(f"{self.seed}-{name}" for name in NAMES[label]), nbytes=5000)

    def push(self, repo: ckpt.Repository, label: str, step: int) -> ckpt.Version:
        file = self.files / f"{label}.safetensors"
        file.write_bytes(self.content(label))
        return repo.push_file(file, MODEL, step=step, labels={"content": label})

    def versions(self, repo: ckpt.Repository, *, damaged: bool = False) -> dict[int, str]:
        """The content of each version by its number, after pulling all of them; ``damaged`` says
        that some may be refused."""
        try:
            log = repo.log(MODEL)
        except NotFoundError:  # the model
            return {}
        out = self.files / "out.safetensors"
        for version in log:
            try:
                repo.pull_file(version, out, force=True)
            except IntegrityError:
                if not damaged:
                    raise
                continue
            assert out.read_bytes() == self.content(version.labels["content"]), version
        return {version.number: version.labels["content"] for version in log}


Step = Callable[[World, ckpt.Repository], object]
Versions = dict[int, str]
TWO = {1: "one", 2: "two"}


@dataclass(frozen=True)
class Operation:
    """Steps, each with the versions that there are when it has returned.

    ``prepare`` is done after the push of ``TWO``, and makes of it what is there ``before``.
    """

    steps: Sequence[tuple[Step, Versions]]
    before: Versions = field(default_factory=lambda: TWO)
    prepare: Step = lambda world, repo: None

    def begin(self, world: World) -> None:
        """What is on the disk, and durable, before the operation."""
        if self.before:
            with ckpt.open(world.disk) as repo:
                for number, label in TWO.items():
                    assert world.push(repo, label, number).number == number
                self.prepare(world, repo)

    def run(self, world: World, recorder: Recorder) -> None:
        """All steps, recorded; the last ends with the repository closed."""
        repo = None

        def act(step: Step) -> None:
            nonlocal repo
            repo = repo or ckpt.open(world.disk)
            step(world, repo)

        acts = [partial(act, step) for step, _ in self.steps]
        try:
            recorder.record(acts)
        finally:
            if repo is not None:
                repo.close()

    def allowed(self, returned: int) -> list[Versions]:
        """What there may be when so many steps have returned, and the next may be at work."""
        stages = [self.before, *(after for _, after in self.steps)]
        return stages[returned : returned + 2]

    def check(self, world: World, returned: int) -> None:
        """After the power came back: all is there or nothing, and it can be repeated."""
        with ckpt.open(world.disk) as repo:
            found = self.found(world, repo, returned)
            assert found in self.allowed(returned)
            self.check_copies(world, repo, found)
            if returned == len(self.steps):
                self.check_done(world, repo)
            for step, _ in self.steps:
                with suppress(NotFoundError):  # it was removed already
                    step(world, repo)
            after = self.steps[-1][1]
            newest = max(after)
            assert world.push(repo, after[newest], newest).number == newest
            assert world.versions(repo) == after
            self.check_done(world, repo)
            self.check_copies(world, repo, after)
            assert repo.fsck(read_data=1, repair=True).is_clean
        check_books(world.root)

    def found(self, world: World, repo: ckpt.Repository, returned: int) -> Versions:
        return world.versions(repo)

    def check_copies(self, world: World, repo: ckpt.Repository, found: Versions) -> None:
        """The documents of acknowledged versions are in the store, with the bytes they must have."""
        copies = {copy.id: copy for copy in repo._registry.copies.all()}
        for number in self.before.keys() & found.keys():
            copy = copies[repo.get(f"{MODEL}@{number}").push]
            assert (world.store / copy.key).read_bytes() == copy.body, copy.key

    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        """Everything that the registry says is in the store, whole."""
        for copy in repo._registry.copies.all():
            assert (world.store / copy.key).read_bytes() == copy.body, copy.key


class Tag(Operation):
    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        super().check_done(world, repo)
        assert repo.get(f"{MODEL}:best").number == 1


class Repair(Operation):
    """What is damaged may stay so until the repair has returned, and is never made worse."""

    def found(self, world: World, repo: ckpt.Repository, returned: int) -> Versions:
        return world.versions(repo, damaged=returned < len(self.steps))


class Pull(Operation):
    def check(self, world: World, returned: int) -> None:
        there = world.pulled.exists()
        assert there or not returned
        if there:
            assert world.pulled.read_bytes() in (world.content("one"), b"before"[returned * 6 :])
        super().check(world, returned)


class PullOfFolder(Operation):
    """It has files only far below, and appears when it is whole."""

    def check(self, world: World, returned: int) -> None:
        there = world.pulled.exists()
        assert there or not returned
        if there:
            assert (world.pulled / "a" / "b" / "m.safetensors").read_bytes() == world.content("one")
            shutil.rmtree(world.pulled)
        super().check(world, returned)

    def check_done(self, world: World, repo: ckpt.Repository) -> None:
        super().check_done(world, repo)
        shutil.rmtree(world.pulled, ignore_errors=True)


def push_folder(world: World, repo: ckpt.Repository) -> None:
    folder = world.files / "folder" / "a" / "b"
    folder.mkdir(parents=True)
    (folder / "m.safetensors").write_bytes(world.content("one"))
    repo.push_file(world.files / "folder", "folder")


def pushing(label: str, number: int = 3, before: Versions = TWO) -> Operation:
    after = before | {number: label}
    return Operation([(lambda w, r: w.push(r, label, number), after)], before)


def damage(world: World, repo: ckpt.Repository) -> None:
    """A pack is found damaged, and its content was pushed again."""
    (path,) = world.store.glob(f"packs/*/{repo.get(f'{MODEL}@1').push}-0.safetensors")
    body = bytearray(path.read_bytes())
    body[5000] ^= 1
    path.chmod(0o600)
    path.write_bytes(body)
    assert len(repo.fsck(read_data=1).broken) == 1
    world.push(repo, "one", 3)


OPERATIONS = {
    "first push": pushing("one", 1, {}),
    "push of new content": pushing("new"),
    "push of some new content": pushing("mixed"),
    "push of several packs": pushing("packs"),
    "tag": Tag([(lambda w, r: r.tag(f"{MODEL}@1", "best"), TWO)]),
    "rm and gc": Operation(
        [
            (lambda w, r: r.rm(f"{MODEL}@1"), {2: "two"}),
            (lambda w, r: r.gc(grace=0, allow=["much"]), {2: "two"}),
        ]
    ),
    "prune": Operation([(lambda w, r: r.prune(MODEL, keep=["last:1"]), {2: "two"})]),
    "repair": Repair(
        [(lambda w, r: r.fsck(read_data=1, repair=True), TWO | {3: "one"})],
        TWO | {3: "one"},
        damage,
    ),
    "pull": Pull(
        [(lambda w, r: r.pull_file(f"{MODEL}@1", w.pulled, force=True), TWO)],
        prepare=lambda w, r: w.pulled.write_bytes(b"before"),
    ),
    "pull of a folder": PullOfFolder(
        [(lambda w, r: r.pull_file("folder", w.pulled), TWO)], prepare=push_folder
    ),
}


class Audit:
    """Checks each state: at once when it would show what another one showed, else in full."""

    def __init__(self, operation: Operation, world: World) -> None:
        self.states: set[object] = set()
        self.outcomes: set[object] = set()
        self._operation = operation
        self._world = world
        self._databases: dict[object, object] = {}

    def look_at(self, states: Iterable[tuple[int, Tree]]) -> None:
        """Raise unless every state is sound."""
        for number, (returned, tree) in enumerate(states):
            try:
                self._look(returned, tree)
            except Exception as wrong:
                wrong.add_note(f"state {number}, {returned} steps had returned")
                raise

    def _look(self, returned: int, tree: Tree) -> None:
        database = tuple((path, hash(tree[path])) for path in sorted(tree) if is_sqlite_file(path))
        # Nobody reads a file without its name: it is removed, or never looked at.
        rest = frozenset(
            (path, None if ".tmp" in path else hash(body))
            for path, body in tree.items()
            if not is_sqlite_file(path)
        )
        state = (returned, database, rest)
        if state in self.states:
            return
        self.states.add(state)
        if database not in self._databases:
            self._databases[database] = self._recovered(tree)
        outcome = (returned, self._databases[database], rest)
        if outcome not in self.outcomes:
            self.outcomes.add(outcome)
            self._clear()
            materialise(tree, self._world.disk)
            with pytest.MonkeyPatch.context() as patch:
                sync_nothing(patch)
                self._operation.check(self._world, returned)

    def _recovered(self, tree: Tree) -> object:
        """What SQLite makes of its files: the bytes of the database after a roll-back."""
        self._clear()
        files = {Path(path).name: body for path, body in tree.items() if is_sqlite_file(path)}
        if REGISTRY not in files:
            return tuple(sorted(files))
        materialise(files, self._world.disk)
        with closing(sqlite3.connect(self._world.disk / REGISTRY, isolation_level=None)) as found:
            found.execute("BEGIN IMMEDIATE").execute("ROLLBACK")
            found.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return hash((self._world.disk / REGISTRY).read_bytes())

    def _clear(self) -> None:
        shutil.rmtree(self._world.disk)
        self._world.disk.mkdir()


def is_sqlite_file(path: str) -> bool:
    return is_sqlite(path.rpartition("/")[2])


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Describe the machine once, and compile each statement once instead of at every opening."""
    monkeypatch.setattr("ckpt.loader.environment.describe_environment", lambda: {"host": "test"})
    first = create_engine("sqlite://")

    def create(url: str, **options: Any) -> Engine:
        engine = create_engine(url, **options)
        engine.dialect, engine._compiled_cache = first.dialect, first._compiled_cache
        return engine

    monkeypatch.setattr("ckpt.registry.sqlite.create_engine", create)


def sync_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The power does not fail any more; a real disk would take most of the time."""

    def set_them(connection: sqlite3.Connection, record: object) -> None:
        set_pragmas(connection, record)
        connection.execute("PRAGMA synchronous=off")

    monkeypatch.setattr("ckpt.registry.sqlite._set_pragmas", set_them)
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def recorded(name: str, world: World, dropped: str = "") -> Recorder:
    """An operation on a fresh disk."""
    for folder in (world.disk, world.files):
        folder.mkdir(parents=True, exist_ok=True)
    operation = OPERATIONS[name]
    operation.begin(world)
    recorder = Recorder(world.disk, dropped)
    operation.run(world, recorder)
    return recorder


@pytest.mark.torture("T3", unit="states")
@pytest.mark.parametrize("name", OPERATIONS)
def test_nothing_acknowledged_is_lost_when_the_power_fails(
    name: str, trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "push of several packs":
        monkeypatch.setattr("ckpt.storage.packs.PACK_BYTES", SMALL_PACK)
    for seed in trials.seeds(1):
        world = World(tmp_path / f"{seed}" / "disk", tmp_path / f"{seed}" / "files", seed)
        states = crash_states(recorded(name, world), random.Random(seed))
        audit = Audit(OPERATIONS[name], world)
        audit.look_at(states)
        trials.count(len(audit.states))
        shutil.rmtree(tmp_path / f"{seed}")


def assert_something_is_lost(name: str, world: World, dropped: str = "") -> None:
    states = list(crash_states(recorded(name, world, dropped), random.Random(0)))
    audit = Audit(OPERATIONS[name], world)
    with pytest.raises((AssertionError, CkptError, FileNotFoundError)):
        audit.look_at(reversed(states))  # what was acknowledged is lost most often


@pytest.mark.parametrize(
    ("name", "dropped"),
    [
        ("push of new content", r".ckpt/store/.tmp/\w+-0\.safetensors.*"),
        ("push of new content", r".ckpt/store/packs/\w\w"),
        ("push of new content", r".ckpt/store/packs"),
        ("push of new content", r".ckpt/store/.tmp/\d+-\w+\.json.*"),
        ("push of new content", r".ckpt/store/documents/1"),
        ("tag", r".ckpt/store/.tmp/.*"),
        ("tag", r".ckpt/store/events/1"),
        ("tag", r".ckpt/store/events"),
        ("tag", r".ckpt/store"),
        ("pull", r".ckpt-\w+\.tmp"),
        ("pull", r"\."),
    ],
)
def test_no_sync_can_be_left_out(name: str, dropped: str, tmp_path: Path) -> None:
    """The disk that is imagined here has teeth."""
    assert_something_is_lost(name, World(tmp_path / "disk", tmp_path / "files", 0), dropped)


@pytest.mark.parametrize("weaker", ["normal", "off"])
def test_a_registry_that_syncs_less_loses_what_was_acknowledged(
    weaker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def weaken(connection: sqlite3.Connection, record: object) -> None:
        set_pragmas(connection, record)
        connection.execute(f"PRAGMA synchronous={weaker}")

    monkeypatch.setattr("ckpt.registry.sqlite._set_pragmas", weaken)
    assert_something_is_lost("push of new content", World(tmp_path / "disk", tmp_path / "files", 0))
