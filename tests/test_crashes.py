"""No act leaves anything half-done, wherever it stops: at every effect, and by kill -9."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crash_driver import MODEL, Driver, check_books, file_of
from crash_world import (
    OPERATIONS,
    SPARSE,
    TWO,
    Fault,
    Operation,
    Stopped,
    World,
    add_migration,
    set_wrong_clocks,
)
from sqlalchemy import Engine, create_engine
from trials import Trials

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError

SMALL_PACK = 4096
KILLS, KILLS_PER_REPOSITORY = 20, 10


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
    """Do it all under the hook; returns the stop or typed error."""
    try:
        with observed(fault):
            operation.run(world)
    except (Stopped, CkptError) as error:
        return error
    return None


@dataclass(frozen=True)
class Audit:
    """An operation that is struck at each effect; outcomes that are equal but for times are looked
    at once."""

    name: str
    stop: bool
    before: World | None
    world: World
    during: Callable[[pytest.MonkeyPatch], None] = lambda patch: None

    @property
    def operation(self) -> Operation:
        return OPERATIONS[self.name]

    def begin(self, at: int, moment: str) -> tuple[Fault, BaseException | None]:
        """Do it once, and let one effect fail."""
        shutil.rmtree(self.world.folder, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before.folder, self.world.folder)
        else:
            self.world.folder.mkdir()
        ids = itertools.count(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(secrets, "token_hex", lambda n: f"{next(ids):0{2 * n}x}")
            self.during(patch)
            fault = Fault(at, moment, stop=self.stop)
            return fault, run(self.operation, self.world, fault)

    def points(self, complete: Fault) -> Iterator[tuple[int, str, str]]:
        """Where it may be struck: the effect, its kind, and the moment."""
        for at, kind in enumerate(complete.kinds):
            yield at, kind, "before"
            if kind in ("write", "write_text", "sql.migrate"):
                yield at, kind, "middle"
            # After an effect is before the next one for a process that stops there for good, and
            # a read that fails has done nothing.
            if at == len(complete.kinds) - 1 or not (self.stop or complete.reads[at]):
                yield at, kind, "after"

    def strike_everywhere(self, chance: random.Random | None = None) -> tuple[int, int, int]:
        """At all points, or at a third by chance; returns how many effects, points and outcomes
        there are."""
        complete, error = self.begin(-1, "before")
        assert error is None
        assert len(complete.kinds) >= self.operation.fewest
        seen: set[tuple[bool, str]] = set()
        points = [*self.points(complete)]
        if chance is not None:
            points = chance.sample(points, math.ceil(len(points) / 3))
        for at, kind, moment in points:
            try:
                self.strike(at, kind, moment, seen)
            except Exception as wrong:
                wrong.add_note(f"{moment} {kind}, effect {at} of {self.name}")
                raise
        return len(complete.kinds), len(points), len(seen)

    def strike(self, at: int, kind: str, moment: str, seen: set[tuple[bool, str]]) -> None:
        fault, error = self.begin(at, moment)
        assert fault.struck
        assert fault.kinds[at] == kind
        if not self.stop:
            assert kind == "unlink" or not list(self.world.store.glob(".tmp/*"))
            assert kind == "unlink" or not list(self.world.folder.glob(".ckpt-*.tmp"))
        check_books(self.world.root)
        outcome = (error is None, self.world.fingerprint())
        if outcome not in seen:
            seen.add(outcome)
            self.operation.check(self.world, returned=error is None)


@pytest.fixture
def audit(
    name: str, template: World, sparse: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bool], Audit]:
    """Makes the audit of an operation: it stops for good, or it fails with EIO."""
    if name == "push of several packs":
        monkeypatch.setattr("ckpt.storage.packs.PACK_BYTES", SMALL_PACK)
    elif name == "migrate":
        add_migration(tmp_path, monkeypatch)
    before = {id(TWO): template, id(SPARSE): sparse}.get(id(OPERATIONS[name].before))
    return lambda stop: Audit(name, stop, before, World(tmp_path / "world"))


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_stop_at_any_effect_leaves_all_or_nothing_and_it_can_be_repeated(
    audit: Callable[[bool], Audit], record_property: Callable[[str, object], None]
) -> None:
    record_property("effects, points, outcomes", audit(True).strike_everywhere())


@pytest.mark.torture("T4", unit="faults")
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_failure_at_any_effect_leaves_all_or_nothing_and_it_can_be_repeated(
    audit: Callable[[bool], Audit], trials: Trials
) -> None:
    """Each seed has a third of them; push and pull fail at every call in ``test_errnos``."""
    for seed in trials.seeds(1):
        _, points, _ = audit(False).strike_everywhere(random.Random(seed))
        trials.count(points)


@pytest.mark.parametrize("name", ["push of some new content", "repack"])
def test_clocks_that_jump_by_ten_years_change_nothing_of_it(
    name: str, template: World, sparse: World, tmp_path: Path
) -> None:
    before = sparse if name == "repack" else template
    audit = Audit(name, True, before, World(tmp_path / "world"), set_wrong_clocks)
    audit.strike_everywhere()


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
