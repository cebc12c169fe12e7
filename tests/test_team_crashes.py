"""On PostgreSQL and S3, too, no act leaves anything half-done wherever it stops."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import traced_worker
from botocore.loaders import Loader
from combinations import Combination, Make
from crash_driver import file_of
from crash_world import Fault, Stopped, add_migration, set_wrong_clocks
from stopped_world import ACTS, World
from test_power_loss import hurry
from traced_worker import MODEL
from trials import Trials

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import NotFoundError
from ckpt.registry.registry import Registry
from ckpt.service.config import Location
from ckpt.service.places import S3Options, open_store
from ckpt.service.rebuild import rebuild_registry
from ckpt.storage.identity import read_identity

pytest_plugins = ("servers", "postgres_server", "combinations")

USUAL, TORTURE = 8, 40  # acts that are stopped, of one repository
LARGE = 6 << 20  # bytes of a tensor; a pack of two is sent in parts, which servers take from 5 MiB
MOST_VERSIONS = 8  # that each check pulls
MOST_EFFECTS = 100  # of an act, about, until it is known
KEPT = 3  # by a prune
LOADER = Loader()


class TeamWorld(World):
    """A repository on two servers."""

    def __init__(self, folder: Path, place: Combination) -> None:
        where = {"registry": place.registry, "store": place.store}
        super().__init__(folder, where, place.check_books)
        self.place = place

    def prepare(self, act: str, seed: str) -> dict[str, Any]:
        if len(self.kept) > MOST_VERSIONS:
            with self.open() as repo:
                for reference in random.Random(seed).sample(sorted(self.kept), len(self.kept) - 3):
                    self.remove(repo, reference)
        order = super().prepare(act, seed)
        if act in ("first push", "large push"):
            nbytes = LARGE if act == "large push" else 5000
            self.file.write_bytes(file_of(f"{seed}-0", f"{seed}-1", nbytes=nbytes))
        elif act == "repair":
            with self.open() as repo:
                names = f"{seed}-0", f"{seed}-1"
                self._damage(repo, self.push(repo, *names))
                self.push(repo, *names, "more")
        return order

    def _damage(self, repo: ckpt.Repository, reference: str) -> None:
        """A pack of it has other bytes, and is known to have."""
        push = repo.get(reference).push
        key, size = next(found for found in self.place.packs(repo) if f"/{push}-" in found[0])
        repo._store.delete(key)
        repo._store.put(key, bytes(size))
        assert repo.fsck(read_data=1).broken

    def act(self, order: dict[str, Any]) -> object:
        """What is stopped; the place is opened and closed by it."""
        verb = order["act"]
        if verb == "rebuild":
            registry, store = self.place.registry, self.place.store
            location = Location(self.folder, registry, store, exists=True)
            return rebuild_registry(location, open_store(store, S3Options()))
        if verb == "migrate":
            identity = read_identity(open_store(self.place.store, S3Options()))
            assert identity is not None
            return Registry.upgrade(self.place.registry, identity)
        if verb not in ("repair", "prune"):
            return traced_worker.act(order)
        with self.open() as repo:
            if verb == "repair":
                return repo.fsck(read_data=1, repair=True)
            return repo.prune(MODEL, keep=[f"last:{KEPT}"])

    def check(self, order: dict[str, Any], acknowledged: str | None) -> None:
        if order["act"] in ("rebuild", "migrate", "repair"):
            self.act(order)  # before anything else may be asked
        super().check(order, acknowledged)
        with self.open() as repo:
            for reference in [one for one, body in self.kept.items() if len(body) > LARGE]:
                self.remove(repo, reference)

    def _settle_prune(
        self, there: set[str], order: dict[str, Any], acknowledged: str | None
    ) -> None:
        newest = sorted(self.kept, key=lambda reference: int(reference.partition("@")[2]))[-KEPT:]
        assert there >= set(newest)
        assert acknowledged is None or there == set(newest)
        self.kept = {reference: self.kept[reference] for reference in there}

    _settle_rebuild = _settle_migrate = _settle_repair = World._settle_gc

    def _repeat_any(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        if order["act"] == "prune":
            self._settle_prune({*self.kept}, order, None)
            repo.prune(MODEL, keep=[f"last:{KEPT}"])
            there = {version.reference for version in repo.log(MODEL)}
            self._settle_prune(there, order, "all of it")
        self.push(repo, "a", f"after {secrets.token_hex(4)}")

    _repeat_prune = _repeat_rebuild = _repeat_migrate = _repeat_repair = _repeat_any

    def settle_first(self, acknowledged: str | None) -> None:
        """Whatever came of the first push, it can be done again."""
        with self.open() as repo:
            found = set()
            with suppress(NotFoundError):  # the model
                found = {version.reference for version in repo.log(MODEL)}
            assert found <= {f"{MODEL}@1"}
            assert acknowledged is None or acknowledged in found
            again = repo.push_file(self.file, MODEL, step=1).reference
            assert not found or found == {again}
            self.kept[again] = self.file.read_bytes()
            self.check_kept(repo)

    def check_nothing_is_left(self) -> None:
        """A day later, with the leases over, a collection leaves what the versions need, and no
        upload: of a push that a rebuild forgot, only the day tells."""
        self.place.run("UPDATE pushes SET expires_at = 0 WHERE state = 'open'")
        with self.open() as repo, pytest.MonkeyPatch.context() as patch:
            patch.setattr("ckpt.storage.store._ABANDONED_SECONDS", -5)
            repo.gc(grace=0)
            self.check_kept(repo)
            assert repo.fsck(read_data=1).is_clean
            self.place.check_nothing_else_is_stored(repo)
            client = repo._store._client  # type: ignore[attr-defined]
            bucket, _, prefix = self.place.store.removeprefix("s3://").partition("/")
            uploads = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
            assert not [one for one in uploads if one["Key"].startswith(prefix)]


class Strikes:
    """Stops acts at effects that are drawn; learns how many effects an act has."""

    def __init__(self, seed: int, count: Callable[[], None]) -> None:
        self.chance = random.Random(seed)
        self.points = 0
        self._count = count
        self._effects: dict[str, int] = {}

    def strike(self, world: TeamWorld, act: str, order: dict[str, Any]) -> str | None:
        """Returns what was acknowledged, if anything was."""
        most = self._effects.get(act, MOST_EFFECTS)
        at, moment = self.chance.randrange(most), self.chance.choice(("before", "after"))
        fault = Fault(at, moment, stop=True)
        acknowledged = None
        with pytest.MonkeyPatch.context() as patch:
            if self.chance.random() < 0.3:
                set_wrong_clocks(patch)
            patch.setattr("ckpt.storage.packs.PACK_BYTES", order["pack_bytes"])
            with suppress(Stopped), observed(fault):
                acknowledged = str(world.act(order))
        if fault.struck:
            self.points += 1
            self._count()
        else:
            self._effects[act] = len(fault.kinds)
        return acknowledged


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an S3 client reads of its own files, most of the time that it takes, is read once."""
    hurry(monkeypatch)
    monkeypatch.setattr("botocore.session.create_loader", lambda path: LOADER)
    monkeypatch.setattr("ckpt.storage.s3_upload.SINGLE_BYTES", LARGE)
    monkeypatch.setattr("ckpt.storage.s3_upload.PART_BYTES", 5 << 20)


def acts(chance: random.Random, count: int) -> Iterator[str]:
    """Those of a repository that is there, and last a migration."""
    for _ in range(count):
        yield chance.choice((*ACTS, "large push", "prune", "repair", "rebuild"))
    yield "migrate"


@pytest.mark.parametrize("combination", ["postgresql-s3"], indirect=True)
@pytest.mark.torture("T1", unit="points")
def test_an_act_that_stops_anywhere_leaves_all_or_nothing_and_can_be_repeated(
    make: Make, trials: Trials, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = USUAL if trials.seconds is None else TORTURE
    for seed in trials.seeds(1):
        strikes = Strikes(seed, trials.count)
        with make() as place, monkeypatch.context() as patch:
            world = TeamWorld(tmp_path, place)
            first = {"where": world.where, "act": "push", "file": str(world.file), "step": 1}
            world.file.write_bytes(file_of("first", "push"))
            order = first | {"pack_bytes": 512 << 20}
            world.settle_first(strikes.strike(world, "first push", order))
            world.begin()
            for number, act in enumerate(acts(strikes.chance, count)):
                order = world.prepare(act, f"{seed}-{number}")
                if act == "migrate":
                    add_migration(tmp_path, patch)
                acknowledged = strikes.strike(world, act, order)
                try:
                    world.check(order, acknowledged)
                except Exception as wrong:
                    wrong.add_note(f"act {number}, {act}, of seed {seed}")
                    raise
            world.check_nothing_is_left()
        assert strikes.points > count / 3
