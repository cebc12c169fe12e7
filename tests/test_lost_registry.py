"""A registry that is lost or put back from a backup, at any moment: a rebuild brings back exactly
what was acknowledged, and until then nothing is collected."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash_driver import check_books, file_of
from trials import Trials

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, ConflictError, IntegrityError
from ckpt.registry import sqlite
from ckpt.service.config import locate
from ckpt.service.rebuild import Rebuilt, rebuild_registry
from ckpt.storage.local import LocalStore

MODELS = ("a", "b/c")
PIECES = "pqrstuv"  # tensors that contents are made of, so that versions share packs
ALIASES = ("best", "keep")
LONGEST_ACT = 90  # effects; a stop beyond the end of an act does not happen
LEAST_LOSSES, MOST_ACTS = 2, 8


class Stopped(BaseException):
    """The process stops here."""


class StopAt:
    """A hook that stops before one effect and before every later one."""

    def __init__(self, at: int) -> None:
        self._left = at

    def __call__(self, kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        self._left -= 1
        if self._left < 0:
            raise Stopped
        return act(*args)


@dataclass
class Kept:
    """What one version must say and hold."""

    model: str
    content: tuple[str, ...]
    labels: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass
class State:
    """What a repository shows: versions by their step, which is unique, with the names that they
    were given, and aliases to steps."""

    versions: dict[int, Kept] = field(default_factory=dict)
    aliases: dict[tuple[str, str], int] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Act:
    """Something that a user does, and what the repository shows afterwards."""

    do: Callable[[ckpt.Repository], object]
    then: Callable[[State], object]


class World:
    """A repository with one user, who knows which states it may be in."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.chance = random.Random(seed)
        self.step = 0
        self.shown = State()
        # What a rebuild may bring back: the state of the last act that returned, or one that a
        # stopped act made after it.
        self.possible = [State()]
        self.told: dict[str, int] = {}
        folder.mkdir()
        ckpt.open(folder).close()

    @property
    def database(self) -> Path:
        return self.folder / ".ckpt" / "registry.db"

    @property
    def store(self) -> LocalStore:
        return LocalStore(locate(self.folder).store)

    def copies(self) -> set[str]:
        """The documents and events in the store."""
        return {info.key for place in ("documents/", "events/") for info in self.store.list(place)}

    def look(self) -> State:
        """Read all that there is to be seen, every byte of it."""
        seen, pulled = State(), self.folder / "pulled.safetensors"
        with ckpt.open(self.folder, create=False) as repo:
            for version in [one for model in repo.models() for one in repo.log(model.name)]:
                content, step = tuple(version.message or ""), version.step or 0
                repo.pull_file(version, pulled, force=True)
                assert pulled.read_bytes() == file_of(*content), version.reference
                labels, metrics = dict(version.labels), dict(version.metrics)
                seen.versions[step] = Kept(version.model, content, labels, metrics)
                seen.names[step] = version.reference
                seen.aliases |= {(version.model, alias): step for alias in version.aliases}
        check_books(self.folder / ".ckpt")
        self.shown = seen
        return seen

    def note_told(self) -> None:
        """No name of a version is ever that of another, whether the first is still there."""
        for step, name in self.shown.names.items():
            assert self.told.setdefault(name, step) == step

    def act(self, *, stop: bool, act: Act | None = None) -> None:
        """Do something, and stop in it if wanted."""
        act = act or self._choose()
        stopping = StopAt(self.chance.randrange(LONGEST_ACT))
        returned, after = True, deepcopy(self.shown)
        act.then(after)
        if stop:
            returned = self._do_until(stopping, act)
        else:
            with ckpt.open(self.folder, create=False) as repo:
                act.do(repo)
        self.possible = [after] if returned else [*self.possible, after]
        before = self.shown
        assert self.look() == after or (self.shown == before and not returned)
        if returned:
            self.note_told()

    def _do_until(self, stopping: StopAt, act: Act) -> bool:
        """Do it under the hook; whether it returned before it stopped."""
        repo, returned = None, False
        with observed(stopping):
            try:
                repo = ckpt.open(self.folder, create=False)
                act.do(repo)
                returned = True
            except Stopped:
                pass
            finally:
                if repo is not None:
                    with suppress(Stopped):  # the system closes what a stopped process had open
                        repo.close()
        return returned

    def rebuild(self, *, stop: bool) -> Rebuilt:
        """Make the registry from the store, which may stop and is then run again."""
        location = locate(self.folder)
        if stop:
            stopping = StopAt(self.chance.randrange(3 * LONGEST_ACT))
            with suppress(Stopped), observed(stopping):
                rebuild_registry(location, self.store)
        found = rebuild_registry(location, self.store)
        assert (found.damaged, found.unreadable) == ((), ())
        assert self.look() in self.possible
        assert found.versions == len(self.shown.versions)
        self.possible = [self.shown]
        self.note_told()
        return found

    def _choose(self) -> Act:
        """One of the things that can be done now; mostly pushes."""
        steps = sorted(self.shown.versions)
        named = set(self.shown.aliases.values())
        free = [step for step in steps if step not in named]
        acts: list[tuple[int, Callable[[], Act]]] = [(5, self.push), (2, lambda: COLLECT)]
        if steps:
            acts += [(1, self._repeat), (2, lambda: self._tag(self.chance.choice(steps)))]
            acts += [(2, lambda: self._annotate(self.chance.choice(steps)))]
        if free:
            acts += [(3, lambda: self._remove(self.chance.choice(free)))]
        if named:
            acts += [(1, self._untag)]
        weights = [weight for weight, _ in acts]
        return self.chance.choices([make for _, make in acts], weights)[0]()

    def remove_newest(self) -> None:
        """Remove a version whose number then is the highest that was ever given."""
        named = set(self.shown.aliases.values())
        if self.shown.versions and (newest := max(self.shown.versions)) not in named:
            self.act(stop=False, act=self._remove(newest))

    def push(self, model: str | None = None) -> Act:
        self.step += 1
        step, model = self.step, model or self.chance.choice(MODELS)
        content = tuple(self.chance.sample(PIECES, self.chance.randrange(1, 4)))
        kept = Kept(model, content, {"who": f"{step}"}, {"loss": self.chance.random()})
        alias = [name for name in ALIASES if self.chance.random() < 0.2]

        def then(state: State) -> None:
            state.versions[step] = deepcopy(kept)
            state.aliases |= {(model, name): step for name in alias}

        return Act(lambda repo: self._push_file(repo, step, kept, alias), then)

    def _repeat(self) -> Act:
        """The newest version once more: it is answered, which acknowledges it."""
        step = max(self.shown.versions)
        kept = self.shown.versions[step]
        return Act(lambda repo: self._push_file(repo, step, kept, ()), lambda state: None)

    def _push_file(self, repo: ckpt.Repository, step: int, kept: Kept, alias: Any) -> None:
        file = self.folder / "pushed.safetensors"
        file.write_bytes(file_of(*kept.content))
        said = {"labels": kept.labels, "metrics": kept.metrics, "message": "".join(kept.content)}
        repo.push_file(file, kept.model, step=step, alias=alias, **said)  # type: ignore[arg-type]

    def _tag(self, step: int) -> Act:
        alias = self.chance.choice(ALIASES)
        name, place = self.shown.names[step], (self.shown.versions[step].model, alias)
        return Act(
            lambda repo: repo.tag(name, alias),
            lambda state: state.aliases.__setitem__(place, step),
        )

    def _untag(self) -> Act:
        model, alias = place = self.chance.choice(sorted(self.shown.aliases))
        return Act(
            lambda repo: repo.untag(f"{model}:{alias}"), lambda state: state.aliases.pop(place)
        )

    def _annotate(self, step: int) -> Act:
        loss, remove = self.chance.random(), self.chance.random() < 0.5
        remove &= "who" in self.shown.versions[step].labels
        name = self.shown.names[step]

        def then(state: State) -> None:
            kept = state.versions[step]
            if remove:
                kept.labels.pop("who", None)
            kept.labels["note"] = f"{loss}"
            kept.metrics["loss"] = loss

        return Act(
            lambda repo: repo.annotate(
                name,
                metrics={"loss": loss},
                labels={"note": f"{loss}"},
                remove=["who"] if remove else [],
            ),
            then,
        )

    def _remove(self, step: int) -> Act:
        name = self.shown.names[step]
        return Act(lambda repo: repo.rm(name), lambda state: state.versions.pop(step))


def collect(repo: ckpt.Repository) -> None:
    """Free all that nobody needs. Without versions, what crashed pushes left looks like a store
    whose registry was lost, which gc would refuse."""
    repo.gc(grace=0, allow=() if any(model.versions for model in repo.models()) else ("empty",))


COLLECT = Act(collect, lambda state: None)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Describe the machine once, and let SQLite wait for no disk: no power is lost here."""
    usual = sqlite._set_pragmas

    def set_pragmas(connection: sqlite3.Connection, record: object) -> None:
        usual(connection, record)
        connection.execute("PRAGMA synchronous = off")

    monkeypatch.setattr("ckpt.registry.sqlite._set_pragmas", set_pragmas)
    monkeypatch.setattr("ckpt.loader.environment.describe_environment", lambda: {"host": "test"})


@pytest.fixture
def worlds(tmp_path: Path) -> Callable[[int], World]:
    """Makes a world for a seed, in place of the one before."""

    def make(seed: int) -> World:
        shutil.rmtree(tmp_path / "world", ignore_errors=True)
        return World(tmp_path / "world", seed)

    return make


@pytest.mark.torture("T16", unit="losses")
def test_a_lost_registry_comes_back_as_it_was_acknowledged(
    trials: Trials, worlds: Callable[[int], World]
) -> None:
    for seed in trials.seeds(5):
        world = worlds(seed)
        for _ in range(LEAST_LOSSES):
            for _ in range(world.chance.randrange(1, MOST_ACTS)):
                world.act(stop=world.chance.random() < 0.3)
            world.remove_newest()
            world.database.unlink()
            with pytest.raises(CkptError, match="registry"):
                ckpt.open(world.folder, create=False)
            world.rebuild(stop=world.chance.random() < 0.3)
            trials.count()
        for model in MODELS:
            world.act(stop=False, act=world.push(model))
        with ckpt.open(world.folder) as repo:
            collect(repo)
            assert repo.fsck(read_data=1).is_clean


@pytest.mark.torture("T17", unit="losses")
def test_an_old_registry_that_is_put_back_frees_nothing_until_it_is_rebuilt(
    trials: Trials, worlds: Callable[[int], World]
) -> None:
    for seed in trials.seeds(5):
        world = worlds(seed)
        for _ in range(LEAST_LOSSES):
            for _ in range(world.chance.randrange(1, MOST_ACTS)):
                world.act(stop=world.chance.random() < 0.2)
            backup = world.folder / "backup.db"
            with (
                closing(sqlite3.connect(world.database)) as source,
                closing(sqlite3.connect(backup)) as target,
            ):
                source.backup(target)
            copied = world.copies()
            for _ in range(world.chance.randrange(1, MOST_ACTS)):
                world.act(stop=world.chance.random() < 0.2)
            for end in ("", "-journal", "-wal", "-shm"):
                world.database.with_name(f"registry.db{end}").unlink(missing_ok=True)
            shutil.copyfile(backup, world.database)
            check_refusal(world, changed=bool(world.copies() - copied))
            world.rebuild(stop=world.chance.random() < 0.3)
            trials.count()
        for model in MODELS:
            world.act(stop=False, act=world.push(model))
        with ckpt.open(world.folder) as repo:
            collect(repo)
            assert repo.fsck(read_data=1).is_clean


def check_refusal(world: World, *, changed: bool) -> None:
    """gc refuses, and frees nothing, when something was acknowledged since the backup."""
    packs = [info.key for info in world.store.list("packs/")]
    with ckpt.open(world.folder, create=False) as repo:
        if not changed:
            return
        with pytest.raises(ConflictError) as caught:
            repo.gc(grace=0)
        assert caught.value.code == "gc-refused"
        check_damage(world, repo)
    assert [info.key for info in world.store.list("packs/")] == packs


def check_damage(world: World, repo: ckpt.Repository) -> None:
    """fsck names exactly the versions that cannot be read, and reading gives no other bytes."""
    lost = []
    for version in [one for model in repo.models() for one in repo.log(model.name)]:
        pulled = world.folder / "pulled.safetensors"
        try:
            repo.pull_file(version, pulled, force=True)
        except IntegrityError:
            lost.append(version.reference)
        else:
            assert pulled.read_bytes() == file_of(*(version.message or ""))
    assert sorted(repo.fsck().damaged) == sorted(lost)


def test_a_journal_of_the_lost_registry_does_not_reach_the_new_one(
    worlds: Callable[[int], World],
) -> None:
    """What a killed process leaves beside a file belongs to that file, and to no other."""
    world = worlds(0)
    for _ in range(10):
        world.act(stop=False)
    child = os.fork()
    if child == 0:
        connection = sqlite3.connect(world.database, isolation_level=None)
        connection.execute("PRAGMA journal_mode = delete")
        connection.execute("BEGIN IMMEDIATE")
        connection.execute("UPDATE meta SET epoch = epoch")
        connection.execute("UPDATE chunks SET digest = digest || 'killed'")
        connection.execute("PRAGMA cache_size = 1")  # so that changed pages go to the disk
        connection.execute("CREATE TABLE filler AS SELECT randomblob(1000000)")
        os._exit(0)
    os.waitpid(child, 0)
    journal = world.database.with_name("registry.db-journal").read_bytes()
    assert int.from_bytes(journal[8:12], "big") > 1  # pages that SQLite would put back
    world.database.unlink()
    epoch = world.rebuild(stop=False).epoch
    with closing(sqlite3.connect(world.database)) as connection:
        assert connection.execute("SELECT epoch FROM meta").fetchall() == [(epoch,)]
