"""Whatever the system refuses, at any call: a typed error, nothing half-done, and it works again."""

from __future__ import annotations

import errno
import itertools
import os
import random
import secrets
import shutil
import sqlite3
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from crash_driver import check_books, file_of
from sqlalchemy.exc import OperationalError
from test_power_loss import hurry, sync_nothing
from trials import Trials

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, NotFoundError, SpaceError
from ckpt.service.rebuild import rebuild_registry

NUMBERS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EMFILE)
EXIT_CODES = {errno.ENOSPC: 8, errno.EDQUOT: 8, errno.EROFS: 7, errno.EACCES: 7}
# What SQLite makes of them; the exit code of a file that it cannot open is that of an access.
SAID = {
    errno.EIO: ("disk I/O error", 6),
    errno.ENOSPC: ("database or disk is full", 8),
    errno.EROFS: ("attempt to write a readonly database", 7),
    errno.EMFILE: ("unable to open database file", 7),
}
# A failure of one of these is never passed over.
GRAVE = ("create", "write", "write_text", "fsync", "fsync_folder", "link", "sql.commit")
TRIALS_PER_REPOSITORY = 40


class Fault:
    """A hook by which one effect fails with an errno, or with what SQLite makes of it."""

    def __init__(self, at: int, number: int) -> None:
        self.kind: str | None = None  # of the effect that failed
        self._left = at
        self._number = number
        self._lock = threading.Lock()

    def __call__(self, kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        with self._lock:
            self._left -= 1
            due = self._left == -1
        if not due:
            return act(*args)
        self.kind = kind
        if kind.startswith("sql"):
            said, _ = SAID.get(self._number, SAID[errno.EIO])
            raise OperationalError(kind, None, sqlite3.OperationalError(said))
        raise OSError(self._number, os.strerror(self._number))

    @property
    def exit_code(self) -> int:
        """The one that the error must have."""
        if self.kind is not None and self.kind.startswith("sql"):
            return SAID.get(self._number, SAID[errno.EIO])[1]
        return EXIT_CODES.get(self._number, 6)


@dataclass(frozen=True)
class World:
    """A repository, and what one trial works on: a model of its own."""

    folder: Path
    trial: str
    files: Path  # what is pushed, and pulled to be looked at

    @property
    def model(self) -> str:
        return f"m-{self.trial}"

    @property
    def pulled(self) -> Path:
        return self.folder / "pulled" / f"{self.trial}.safetensors"

    @property
    def store(self) -> Path:
        return self.folder / ".ckpt" / "store"

    def content(self, label: str) -> bytes:
        return file_of(f"{self.trial}-{label}", "shared", nbytes=600)

    def push(self, repo: ckpt.Repository, label: str = "one") -> ckpt.Version:
        file = self.files / "pushed.safetensors"
        file.write_bytes(self.content(label))
        return repo.push_file(file, self.model, labels={"content": label})

    def push_names(self, repo: ckpt.Repository, *names: str) -> None:
        file = self.files / "pushed.safetensors"
        file.write_bytes(file_of(*names, nbytes=600))
        repo.push_file(file, self.model)

    def holds(self, repo: ckpt.Repository, *labels: str) -> None:
        """These are the versions, oldest first, bit for bit."""
        log = repo.log(self.model)
        assert [version.labels["content"] for version in reversed(log)] == list(labels)
        out = self.files / "out.safetensors"
        for version in log:
            repo.pull_file(version, out, force=True)
            assert out.read_bytes() == self.content(version.labels["content"])

    def leftovers(self) -> list[Path]:
        """Files that are neither in the repository nor whole."""
        return [*self.store.glob(".tmp/*"), *self.folder.rglob("*?.tmp")]


Step = Callable[[World, ckpt.Repository], object]


def push_one(world: World, repo: ckpt.Repository) -> object:
    return world.push(repo)


@dataclass(frozen=True)
class Verb:
    """An act on what ``prepare`` made, and what holds when it has returned."""

    act: Step
    done: Step
    prepare: Step | None = push_one


def both(world: World, repo: ckpt.Repository) -> None:
    world.push(repo, "one")
    world.push(repo, "two")


def removed(world: World, repo: ckpt.Repository) -> None:
    both(world, repo)
    repo.rm(f"{world.model}@1")


def damaged(world: World, repo: ckpt.Repository) -> None:
    """A pack is found damaged, and its content was pushed again."""
    push = world.push(repo).push
    (path,) = world.store.glob(f"packs/*/{push}-0.safetensors")
    body = bytearray(path.read_bytes())
    body[4096] ^= 1
    path.chmod(0o600)
    path.write_bytes(body)
    assert repo.fsck(read_data=1).broken
    repo.push_file(world.files / "pushed.safetensors", f"{world.model}-again")


def is_pulled(world: World, repo: ckpt.Repository) -> None:
    assert world.pulled.read_bytes() == world.content("one")
    assert os.listdir(world.pulled.parent) == [world.pulled.name]
    world.pulled.unlink()


def is_tagged(world: World, repo: ckpt.Repository) -> None:
    assert repo.get(f"{world.model}:best").number == 1


def is_annotated(world: World, repo: ckpt.Repository) -> None:
    assert repo.get(world.model).labels["who"] == "me"


def is_collected(world: World, repo: ckpt.Repository) -> None:
    world.holds(repo, "two")
    assert not repo.gc(grace=0, allow=["much"]).freed


def half_needed(world: World, repo: ckpt.Repository) -> None:
    """Of a pack with five tensors one is needed."""
    names = [f"{world.trial}-{n}" for n in range(5)]
    world.push_names(repo, *names)
    world.push_names(repo, names[0])
    repo.rm(f"{world.model}@1")


def is_repacked(world: World, repo: ckpt.Repository) -> None:
    (version,) = repo.log(world.model)
    out = world.files / "out.safetensors"
    repo.pull_file(version, out, force=True)
    assert out.read_bytes() == file_of(f"{world.trial}-0", nbytes=600)
    assert not repo.gc(grace=0, allow=["much"], repack=True).repacked


def rebuild(world: World, repo: ckpt.Repository) -> None:
    rebuild_registry(repo.location, repo._store)


def repair(world: World, repo: ckpt.Repository) -> None:
    """As the command does: what could not be written is told after the rest of the report."""
    found = repo.fsck(read_data=1, repair=True)
    if found.unmarked is not None:
        raise found.unmarked


def is_repaired(world: World, repo: ckpt.Repository) -> None:
    world.holds(repo, "one")
    assert repo.fsck(read_data=1, repair=True).is_clean


VERBS = {
    "push": Verb(push_one, lambda w, r: w.holds(r, "one"), None),
    "pull": Verb(lambda w, r: r.pull_file(w.model, w.pulled, force=True), is_pulled),
    "tag": Verb(lambda w, r: r.tag(w.model, "best"), is_tagged),
    "label": Verb(lambda w, r: r.annotate(w.model, labels={"who": "me"}), is_annotated),
    "rm": Verb(lambda w, r: r.rm(f"{w.model}@1"), lambda w, r: w.holds(r, "two"), both),
    "prune": Verb(
        lambda w, r: r.prune(w.model, keep=["last:1"]), lambda w, r: w.holds(r, "two"), both
    ),
    "gc": Verb(lambda w, r: r.gc(grace=0, allow=["much"]), is_collected, removed),
    "repack": Verb(
        lambda w, r: r.gc(grace=0, allow=["much"], repack=True), is_repacked, half_needed
    ),
    "rebuild": Verb(rebuild, lambda w, r: w.holds(r, "two"), removed),
    "fsck": Verb(repair, is_repaired, damaged),
}


def struck(name: str, folder: Path, trial: str, at: int, number: int) -> str | None:
    """Let effect ``at`` of a verb fail, opening and closing included, look at everything, and do
    it again. Returns the kind of the effect, or None when the verb has no such."""
    # A pull needs no version of its own.
    world = World(folder, "any" if name == "pull" else trial, folder / "files")
    try:
        return fails_cleanly(VERBS[name], world, Fault(at, number))
    except Exception as wrong:
        wrong.add_note(f"{errno.errorcode[number]} at effect {at} of {name}")
        raise


def begin(folder: Path) -> None:
    """A new repository; the folders of all packs, documents and events are there."""
    shutil.rmtree(folder)
    (folder / "files").mkdir(parents=True)
    world = World(folder, "first", folder / "files")
    with ckpt.open(folder) as repo:
        world.push(repo)
        repo.tag(world.model, "best")


def fails_cleanly(verb: Verb, world: World, fault: Fault) -> str | None:
    world.pulled.parent.mkdir(exist_ok=True, parents=True)
    world.files.mkdir(exist_ok=True)
    if verb.prepare is not None:
        with ckpt.open(world.folder) as repo:
            verb.prepare(world, repo)
    error = None
    try:
        with observed(fault), ckpt.open(world.folder) as repo:
            verb.act(world, repo)
    except CkptError as raised:
        error = raised
    check_error(error, fault, world)
    if fault.kind != "unlink":  # it cannot be removed then; gc does it later
        assert world.leftovers() == []
    if world.pulled.exists():
        assert world.pulled.read_bytes() == world.content("one")
    check_books(world.folder / ".ckpt")
    with ckpt.open(world.folder) as repo:
        with suppress(NotFoundError):  # it was removed already
            verb.act(world, repo)
        verb.done(world, repo)
        if fault.kind == "unlink":
            for path in world.leftovers():
                path.unlink()
    return fault.kind


def check_error(error: CkptError | None, fault: Fault, world: World) -> None:
    """One line that says what, where, and what to do next."""
    assert error is not None or fault.kind not in GRAVE
    if error is None:
        return
    assert fault.kind is not None
    assert error.exit_code == fault.exit_code, error
    assert len(str(error).splitlines()) == 1
    assert error.hint
    assert str(world.folder) in error.message or str(world.files) in error.message, error.message


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)
    sync_nothing(monkeypatch)
    ids = itertools.count(1)  # all keys begin alike, so that every push makes the same calls
    monkeypatch.setattr(secrets, "token_hex", lambda n: f"{next(ids):0{2 * n}x}")


@pytest.mark.torture("T4", unit="faults")
@pytest.mark.parametrize("name", ["push", "pull"])
def test_an_error_at_any_call_of_push_and_pull_is_typed_clean_and_over(
    name: str, trials: Trials, tmp_path: Path
) -> None:
    """Every number at every call; but what SQLite makes of them is told apart in one place, so
    that in an ordinary run each of its calls fails with one."""
    for seed in trials.seeds(1):
        every = trials.seconds is not None
        begin(tmp_path)
        for at in itertools.count():
            first = list(SAID)[(at + seed) % len(SAID)]
            kind = struck(name, tmp_path, f"{at}-{first}", at, first)
            if kind is None:
                break
            trials.count()
            others = [number for number in NUMBERS if number != first]
            if kind.startswith("sql"):
                others = [number for number in others if every and number in SAID]
            for number in others:
                assert struck(name, tmp_path, f"{at}-{number}", at, number) == kind
                trials.count()
        assert at > 25


@pytest.mark.torture("T4", unit="faults")
@pytest.mark.parametrize("name", VERBS)
def test_an_error_at_a_call_of_any_verb_is_typed_clean_and_over(
    name: str, trials: Trials, tmp_path: Path
) -> None:
    """Any call and any number, by chance."""
    most = 40
    for count, seed in enumerate(trials.seeds(3)):
        if count % TRIALS_PER_REPOSITORY == 0:
            begin(tmp_path)
        chance = random.Random(seed)
        number, at = chance.choice(NUMBERS), chance.randrange(most)
        kind = struck(name, tmp_path, f"{seed}", at, number)
        most = max(10, at) if kind is None else most + 10  # as many as the verb has, about
        trials.count(kind is not None)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real disk of 1 MiB; only root can make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=True)
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root; the tests above need no disk")
@pytest.mark.torture("T4", unit="faults")
def test_a_disk_that_is_full_after_any_page_stops_cleanly_and_works_again(
    small_disk: Path, trials: Trials, tmp_path: Path
) -> None:
    """Packs, documents and the registry with its journal are all on it."""
    filler = small_disk / "filler"
    refused: list[str] = []
    for seed in trials.seeds(1):
        pages = random.Random(seed).sample(range(60), 20) if seed else range(0, 60, 3)
        for left in pages:
            world = World(small_disk, f"{seed}-{left}", tmp_path)
            with ckpt.open(small_disk) as repo:
                filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - left * 4096))
                try:
                    world.push(repo)
                except SpaceError as error:
                    refused.append(str(error))
                filler.unlink()
                assert world.leftovers() == []
                check_books(small_disk / ".ckpt")
                world.push(repo)
                world.holds(repo, "one")
                repo.rm(world.model)
                repo.gc(grace=0, allow=["empty", "much"])
            trials.count()
        shutil.rmtree(small_disk / ".ckpt")
    assert refused
    assert all(len(message.splitlines()) == 1 for message in refused)
