"""Killed at any real system call a repository holds what was acknowledged; and all of the calls
that change it go through the one seam, so that stopping there is stopping everywhere."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from crash_driver import check_books, file_of
from system_calls import Call, Outcome, Worker
from test_power_loss import hurry, sync_nothing
from traced_worker import MODEL
from trials import Trials

import ckpt
from ckpt.core.errors import NotFoundError

KILLS_PER_REPOSITORY = 10
SMALL_PACK, LARGE_PACK = 4096, 512 << 20
ACTS = ("push", "known push", "pull", "rm", "gc", "repack")


@dataclass
class World:
    """A repository, what it holds by reference, and the files to push and to pull to."""

    folder: Path
    kept: dict[str, bytes] = field(default_factory=dict)
    steps: int = 0

    @property
    def root(self) -> Path:
        return self.folder / ".ckpt"

    @property
    def file(self) -> Path:
        """What the worker pushes or pulls to."""
        return self.folder / "file.safetensors"

    @property
    def newest(self) -> str:
        return max(self.kept, key=lambda reference: int(reference.partition("@")[2]))

    def push(self, repo: ckpt.Repository, *names: str) -> str:
        self.steps += 1
        file = self.folder / "own.safetensors"
        file.write_bytes(file_of(*names))
        reference = repo.push_file(file, MODEL, step=self.steps).reference
        self.kept[reference] = file.read_bytes()
        return reference

    def remove(self, repo: ckpt.Repository, reference: str) -> None:
        repo.rm(reference)
        del self.kept[reference]

    def begin(self) -> None:
        with ckpt.open(self.folder) as repo:
            self.push(repo, "a", "b", "c")
            self.push(repo, "a", "d", "e")

    def prepare(self, act: str, seed: str) -> dict[str, Any]:
        """The order for an act; what it works on is made first."""
        chance = random.Random(seed)
        order: dict[str, Any] = {
            "folder": str(self.folder),
            "act": act.split()[-1],
            "file": str(self.file),
        }
        order["pack_bytes"] = chance.choice([SMALL_PACK, LARGE_PACK])
        self.file.unlink(missing_ok=True)
        if act == "push":
            self.file.write_bytes(file_of("a", f"{seed}-0", chance.choice("bcde"), f"{seed}-1"))
        elif act == "known push":
            self.file.write_bytes(self.kept[chance.choice(sorted(self.kept))])
        elif act in ("gc", "repack"):
            with ckpt.open(self.folder) as repo:
                gone = self.push(repo, *[f"{seed}-{n}" for n in range(4)])
                if act == "repack":
                    self.push(repo, f"{seed}-0", "a")
                self.remove(repo, gone)
        self.steps += 1
        return order | {"step": self.steps, "reference": chance.choice(sorted(self.kept))}

    def check(self, order: dict[str, Any], outcome: Outcome) -> None:
        """Open anew: what was acknowledged is there, what was not is whole or absent, and it can
        be done again."""
        check_books(self.root)
        with ckpt.open(self.folder) as repo:
            there = {version.reference for version in repo.log(MODEL, limit=1000)}
            getattr(self, f"_settle_{order['act']}")(there, order, outcome)
            self._check_kept(repo)
            getattr(self, f"_repeat_{order['act']}")(repo, order)
        check_books(self.root)

    def _settle_push(self, there: set[str], order: dict[str, Any], outcome: Outcome) -> None:
        new = there - self.kept.keys()
        assert len(new) <= 1
        assert outcome.reference is None or new == {outcome.reference}
        self.kept |= dict.fromkeys(new, self.file.read_bytes())

    def _repeat_push(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        before = self.newest
        again = repo.push_file(self.file, MODEL, step=order["step"]).reference
        assert again == before or again not in self.kept
        self.kept[again] = self.file.read_bytes()

    def _settle_pull(self, there: set[str], order: dict[str, Any], outcome: Outcome) -> None:
        assert self.file.exists() or outcome.reference is None
        if self.file.exists():
            assert self.file.read_bytes() == self.kept[order["reference"]]

    def _repeat_pull(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        repo.pull_file(order["reference"], self.file, force=True)
        assert self.file.read_bytes() == self.kept[order["reference"]]

    def _settle_rm(self, there: set[str], order: dict[str, Any], outcome: Outcome) -> None:
        assert order["reference"] not in there or outcome.reference is None
        if order["reference"] not in there:
            del self.kept[order["reference"]]

    def _repeat_rm(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        with suppress(NotFoundError):  # it was removed already
            repo.rm(order["reference"])
        self.kept.pop(order["reference"], None)
        self.push(repo, "a", f"instead of {order['reference']}")

    def _settle_gc(self, there: set[str], order: dict[str, Any], outcome: Outcome) -> None:
        """A collection removes no version."""

    def _repeat_gc(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        repo.gc(grace=0, repack=order["act"] == "repack")

    _settle_repack, _repeat_repack = _settle_gc, _repeat_gc

    def _check_kept(self, repo: ckpt.Repository) -> None:
        log = repo.log(MODEL, limit=1000)
        assert sorted(version.reference for version in log) == sorted(self.kept)
        out = self.folder / "out.safetensors"
        for version in log:
            repo.pull_file(version, out, force=True)
            assert out.read_bytes() == self.kept[version.reference], version.reference

    def check_nothing_is_left(self) -> None:
        """A day later, with the leases over, a collection leaves what the versions need alone."""
        for path in self.root.glob("store/.tmp/*"):
            os.utime(path, times=(0, 0))
        with closing(sqlite3.connect(self.root / "registry.db", isolation_level=None)) as books:
            books.execute("UPDATE pushes SET expires_at = 0 WHERE state = 'open'")
        with ckpt.open(self.folder) as repo:
            repo.gc(grace=0)
            self._check_kept(repo)
            assert repo.fsck(read_data=1).is_clean
            packs = {finished.pack.key for finished in repo._registry.repairs.packs()}
        store = self.root / "store"
        assert {str(path.relative_to(store)) for path in store.glob("packs/*/*")} == packs
        assert list(store.glob(".tmp/*")) == []


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process waits for no disk; the one that is killed does."""
    hurry(monkeypatch)
    sync_nothing(monkeypatch)


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with closing(Worker(tmp_path_factory.mktemp("strace"))) as running:
        yield running


@pytest.fixture(scope="module")
def calls(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Call]]:
    """The calls of each act that change the repository, or the file that is pulled."""
    found = {}
    for act in ACTS:
        world = World(tmp_path_factory.mktemp("calls"))
        world.begin()
        order = world.prepare(act, act) | {"pack_bytes": SMALL_PACK}
        seen, outcome = worker.watch(order)
        assert outcome.code == 0
        inside = str(world.folder)
        found[act] = [call for call in seen if any(path.startswith(inside) for path in call.paths)]
    return found


def test_every_call_that_changes_a_repository_belongs_to_an_effect(
    calls: dict[str, list[Call]],
) -> None:
    """But for SQLite's own, of which the statements and the commit are effects."""
    for act, seen in calls.items():
        outside = [
            call
            for call in seen
            if call.effect is None and not any("/registry.db" in path for path in call.paths)
        ]
        assert outside == [], act
    kinds = Counter((call.effect, call.name.removesuffix("at")) for call in calls["push"])
    assert kinds["write", "pwrite64"] >= 4
    assert kinds["fsync", "fsync"] == kinds["link", "link"] == kinds["unlink", "unlink"] >= 3
    assert kinds["fsync_folder", "fsync"] >= 4
    assert kinds["sql.commit", "fdatasync"] >= 2
    assert {call.effect for call in calls["pull"]} >= {"create", "write", "fsync", "rename"}


def choose(calls: list[Call], chance: random.Random) -> Call:
    """Any call, or any of a name that is drawn: most are SQLite's writes."""
    if chance.random() < 0.5:
        return chance.choice(calls)
    name = chance.choice(sorted({call.name for call in calls}))
    return chance.choice([call for call in calls if call.name == name])


@pytest.mark.torture("T2", unit="kills")
def test_what_was_acknowledged_is_there_after_kill_9_at_any_system_call(
    trials: Trials, worker: Worker, calls: dict[str, list[Call]], tmp_path: Path
) -> None:
    for seed in trials.seeds(100 // KILLS_PER_REPOSITORY):
        world = World(tmp_path / f"{seed}")
        world.folder.mkdir()
        world.begin()
        chance, killed = random.Random(seed), 0
        for number in range(10 * KILLS_PER_REPOSITORY):
            act = ACTS[(seed + number) % len(ACTS)]
            call = choose(calls[act], chance)
            order = world.prepare(act, f"{seed}-{number}")
            outcome = worker.kill(order, call)
            assert outcome.is_killed or outcome.code == 0
            try:
                world.check(order, outcome)
            except Exception as wrong:
                wrong.add_note(f"{act}, kill {number} of seed {seed} at {call}")
                raise
            killed += outcome.is_killed
            trials.count(outcome.is_killed)
            if killed == KILLS_PER_REPOSITORY:
                break
        assert killed == KILLS_PER_REPOSITORY
        world.check_nothing_is_left()
        shutil.rmtree(world.folder)
