"""Killed at any real system call a repository holds what was acknowledged; and all of the calls
that change it go through the one seam, so that stopping there is stopping everywhere."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from crash_driver import check_books
from stopped_world import ACTS, SMALL_PACK, World
from system_calls import Call, Worker
from test_power_loss import hurry, sync_nothing
from trials import Trials

KILLS_PER_REPOSITORY = 10


def world_in(folder: Path) -> World:
    """A repository in a folder."""
    folder.mkdir(exist_ok=True)
    return World(folder, {"repo": str(folder)}, lambda repo: check_books(repo.location.root))


def check_nothing_is_left(world: World) -> None:
    """A day later, with the leases over, a collection leaves what the versions need alone."""
    root = world.folder / ".ckpt"
    for path in root.glob("store/.tmp/*"):
        os.utime(path, times=(0, 0))
    with closing(sqlite3.connect(root / "registry.db", isolation_level=None)) as books:
        books.execute("UPDATE pushes SET expires_at = 0 WHERE state = 'open'")
    with world.open() as repo:
        repo.gc(grace=0)
        world.check_kept(repo)
        assert repo.fsck(read_data=1).is_clean
        packs = {finished.pack.key for finished in repo._registry.repairs.packs()}
    store = root / "store"
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
        world = world_in(tmp_path_factory.mktemp("calls"))
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
        world = world_in(tmp_path / f"{seed}")
        world.begin()
        chance, killed = random.Random(seed), 0
        for number in range(10 * KILLS_PER_REPOSITORY):
            act = ACTS[(seed + number) % len(ACTS)]
            call = choose(calls[act], chance)
            order = world.prepare(act, f"{seed}-{number}")
            outcome = worker.kill(order, call)
            assert outcome.is_killed or outcome.code == 0
            try:
                world.check(order, outcome.reference)
            except Exception as wrong:
                wrong.add_note(f"{act}, kill {number} of seed {seed} at {call}")
                raise
            killed += outcome.is_killed
            trials.count(outcome.is_killed)
            if killed == KILLS_PER_REPOSITORY:
                break
        assert killed == KILLS_PER_REPOSITORY
        check_nothing_is_left(world)
        shutil.rmtree(world.folder)
