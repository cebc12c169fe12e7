"""Whatever is done to a repository in any order, it holds exactly what the model of it says."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule, run_state_machine_as_test
from shelf import Kept, Shelf
from shelved_place import Place
from sqlalchemy import Engine, create_engine
from trials import Trials
from version_acts import Stopped, VersionsMachine, actors, dying, models, picks, refused

import ckpt
from ckpt.core.errors import ConflictError, IntegrityError

EXAMPLES, STEPS = 300, 30
TORTURE_EXAMPLES, TORTURE_STEPS = 50, 50  # of a seed; there are many
WEEK = 7 * 86400


class Machine(VersionsMachine):
    """All that is done to versions, and what an operator does, and what a disk does."""

    @rule(who=actors, grace=st.sampled_from([0, 0, WEEK]))
    def gc(self, who: int, grace: int) -> None:
        place, actor = self.at(who)
        repo, shelf = place.actor(actor), place.shelf
        before = place.pack_files()
        if before and not shelf.versions and not shelf.removed:
            with refused("gc-refused"):
                repo.gc(grace=grace)
            return
        broken = place.broken_keys()
        dead = place.dead_keys()  # a collection that died leaves the rest to the next
        foreseen = repo.gc(grace=grace, dry_run=True)
        collected = repo.gc(grace=grace)
        freed = {pack.key for pack in collected.freed}
        assert foreseen.orphans == collected.orphans
        assert foreseen.orphan_bytes == collected.orphan_bytes
        assert foreseen.finished == collected.finished
        assert {pack.key for pack in foreseen.freed} <= freed
        assert grace or foreseen.freed_bytes == collected.freed_bytes
        after = place.pack_files()
        assert before.keys() - after.keys() == before.keys() & (freed | dead | {*collected.orphans})
        assert place.unfinished_pushes() <= place.open_pushes()
        assert collected.unknown == ()
        if grace:
            assert freed <= broken
            assert repo.du().reclaimable == collected.waiting_bytes
        else:
            assert after.keys() == before.keys() & place.expected_keys()

    @precondition(VersionsMachine.has_versions)
    @rule(who=actors)
    def gc_that_repacks(self, who: int) -> None:
        place, actor, _ = self.choose(who, 0)
        place.end_leases()  # a claim would keep the pack that was written again
        before = place.pack_files()
        assert place.actor(actor).gc(grace=0, repack=True).warnings == ()
        after = place.pack_files()
        assert after.keys() <= place.expected_keys()
        assert sum(after.values()) <= sum(before.values())
        place.check_all_pulls()

    @rule(who=actors, at=st.integers(0, 80), repack=st.booleans())
    def gc_and_die(self, who: int, at: int, repack: bool) -> None:
        place, actor = self.at(who)
        with suppress(Stopped, ConflictError), dying(at):
            place.actor(actor).gc(grace=0, repack=repack)
        place.reopen(actor, Stopped)

    @rule(who=actors)
    def leases_end(self, who: int) -> None:
        self.at(who)[0].end_leases()

    @precondition(VersionsMachine.has_versions)
    @rule(who=actors, pick=picks)
    def du_tells_what_a_removal_frees(self, who: int, pick: int) -> None:
        place, actor, kept = self.choose(who, pick)
        repo = place.actor(actor)
        place.end_leases()
        repo.gc(grace=0)
        before = repo.du()
        assert (before.stored, before.reclaimable) == (sum(place.pack_files().values()), 0)
        usage = {one.reference: (one.unique, one.shared) for one in before.versions}
        for one in place.shelf.versions:
            sizes = [place.pack_files()[key] for key in place.keys_of(one)]
            assert sum(usage.get(one.reference, (0, 0))) == sum(sizes)
        unique, _ = usage.get(kept.reference, (0, 0))
        self.remove_named(place, repo, kept)
        assert repo.du().reclaimable == unique
        assert repo.gc(grace=0).freed_bytes == unique
        assert repo.du().stored == before.stored - unique == sum(place.pack_files().values())

    def remove_named(self, place: Place, repo: ckpt.Repository, kept: Kept) -> None:
        """Remove a version that aliases may keep."""
        line = place.shelf.lines[kept.model]
        for alias in line.aliases_of(kept.number):
            repo.untag(f"{kept.model}:{alias}")
            del line.aliases[alias]
        self.end(place, kept, repo.rm(kept.reference))

    @precondition(lambda self: self.has_room() and self.has_versions())
    @rule(who=actors, pick=picks)
    def copy(self, who: int, pick: int) -> None:
        place, actor, kept = self.choose(who, pick)
        if len(self.places) == 1:
            self.places.append(Place(self.template / "archive", self.folder / "archive"))
        other = self.places[place is self.place]
        version = other.actor(0).copy(place.actor(actor), kept.reference)
        other.check_record(version, other.shelf.copy(kept.model, kept.facts))
        other.check_pull(0, version, kept.content)

    @rule(who=actors, repair=st.booleans())
    def fsck(self, who: int, repair: bool) -> None:
        place, actor = self.at(who)
        broken = place.broken_keys()
        found = place.actor(actor).fsck(read_data=1, repair=repair)
        assert (found.damaged, found.copies, found.healed, found.repaired) == ([], [], [], [])
        assert len(found.broken) == len(broken)
        assert place.broken_keys() == broken

    # With room only: it pushes every version that is hurt once more.
    @precondition(lambda self: self.has_room() and self.has_versions())
    @rule(who=actors, pick=picks, how=st.sampled_from(["lost", "short", "flipped"]))
    def a_damaged_pack_is_healed_by_pushes(self, who: int, pick: int, how: str) -> None:
        place, actor, kept = self.choose(who, pick)
        repo = place.actor(actor)
        keys = sorted(place.keys_of(kept))
        if not keys:
            return  # it has no bytes
        key = keys[pick % len(keys)]
        hurt = [one for one in place.shelf.versions if key in place.keys_of(one)]
        damage(place.root / "store" / key, how)
        for one in hurt:
            with suppress(IntegrityError):
                place.check_pull(actor, one.reference, one.content)
        if how == "flipped":  # of the right size: only reading tells
            assert {one.reference for one in hurt} == {*repo.fsck(read_data=1).damaged}
        damaged = {id(one) for one in hurt}
        for one in hurt:
            self.push_at(place, actor, one.model, one.facts, damaged)
        found = repo.fsck(read_data=1, repair=True)
        assert {*found.repaired} == {one.reference for one in hurt}
        assert found.is_clean
        place.check_all_pulls()

    @precondition(VersionsMachine.has_versions)
    @rule(who=actors, pick=picks)
    def every_name_finds_its_version(self, who: int, pick: int) -> None:
        place, actor, kept = self.choose(who, pick)
        repo, shelf = place.actor(actor), place.shelf
        line = shelf.lines[kept.model]
        log = repo.log(kept.model, limit=1000)  # more than a page by then
        assert [one.number for one in log] == sorted(line.versions, reverse=True)
        for one in log:
            place.check_record(one, line.versions[one.number])
        version = next(one for one in log if one.number == kept.number)
        twins = [one.number for one in log if one.digest == version.digest]
        assert repo.get(f"{kept.model}@b3:{version.digest[:12]}").number == max(twins)
        for newest in (kept.model, f"{kept.model}:latest"):
            assert repo.get(newest).push == log[0].push
        for alias, number in line.aliases.items():
            assert repo.get(f"{kept.model}:{alias}").number == number
        place.check_pull(actor, kept.reference, kept.content)
        self.check_parent(repo, kept, shelf)

    def check_parent(self, repo: ckpt.Repository, kept: Kept, shelf: Shelf) -> None:
        there = {one.reference for one in shelf.versions}
        if kept.parent in there:
            assert repo.get(f"{kept.reference}~1").reference == kept.parent
        else:
            with refused("version-missing"):
                repo.get(f"{kept.reference}~1")

    @rule(who=actors, model=models)
    def models_are_listed(self, who: int, model: str) -> None:
        place, actor = self.at(who)
        repo, lines = place.actor(actor), place.shelf.lines
        found = {
            one.name: (one.versions, one.newest and one.newest.number) for one in repo.models()
        }
        assert found == {
            name: (len(line.versions), line.newest and line.newest.number)
            for name, line in lines.items()
        }
        if model not in lines:
            with refused("model-missing"):
                repo.log(model)


def damage(path: Path, how: str) -> None:
    """What a disk may do to a pack."""
    if how == "lost":
        path.unlink()
        return
    path.chmod(0o644)
    body = bytearray(path.read_bytes())
    body[-1] ^= 1
    path.write_bytes(body if how == "flipped" else body[:-1])


@pytest.fixture
def template() -> Iterator[Path]:
    """Two empty repositories, in memory where the system has such a folder."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        template = Path(folder) / "template"
        for name in ("mine", "archive"):
            (template / name).mkdir(parents=True)
            ckpt.open(template / name).close()
        yield template


@pytest.fixture
def _fast(template: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No power is lost here, so nothing is synced; the machine is described once, and each
    statement compiled once. Packs are small, so that a version needs several."""
    from ckpt.registry import sqlite

    first, set_pragmas = create_engine("sqlite://"), sqlite._set_pragmas

    def create(url: str, **options: Any) -> Engine:
        engine = create_engine(url, **options)
        engine.dialect, engine._compiled_cache = first.dialect, first._compiled_cache
        return engine

    def set_fast(connection: Any, record: object) -> None:
        set_pragmas(connection, record)
        connection.execute("PRAGMA synchronous=off")

    monkeypatch.setattr(sqlite, "create_engine", create)
    monkeypatch.setattr(sqlite, "_set_pragmas", set_fast)
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr("ckpt.loader.environment.describe_environment", lambda: {"host": "test"})
    monkeypatch.setattr("ckpt.storage.packs.PACK_BYTES", 100)


@pytest.mark.usefixtures("_fast")
@pytest.mark.torture("T5", unit="examples")
def test_a_repository_holds_what_its_model_says_whatever_is_done(
    trials: Trials, template: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def token(nbytes: int) -> str:
        return f"{Machine.ids.getrandbits(8 * nbytes):0{2 * nbytes}x}"

    monkeypatch.setattr(secrets, "token_hex", token)
    Machine.template = template
    usual = trials.seconds is None
    examples, steps = (EXAMPLES, STEPS) if usual else (TORTURE_EXAMPLES, TORTURE_STEPS)
    for seed in trials.seeds(1):
        before = VersionsMachine.examples
        run_state_machine_as_test(
            hypothesis.seed(seed)(type("Machine", (Machine,), {})),
            settings=settings(
                max_examples=examples,
                stateful_step_count=steps,
                database=None,
                deadline=None,
                phases=[Phase.generate],  # to shrink what fails would take minutes
                suppress_health_check=list(HealthCheck),
            ),
        )
        trials.count(VersionsMachine.examples - before)
        assert trials.counted >= examples
