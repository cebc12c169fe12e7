"""A process that stands still while others go on does no harm when it goes on as well."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import frozen_worker
import pytest
from combinations import Combination, LockedError, Make
from crash_driver import file_of
from frozen_worker import MODEL
from trials import Trials

import ckpt
from ckpt.core.errors import StorageError

pytest_plugins = ("servers", "postgres_server", "combinations")

SMALL_PACK, LARGE_PACK = 4096, 512 << 20
FREEZES = 3
# Either engine, either kind of store.
TWO = pytest.mark.parametrize("combination", ["sqlite-local", "postgresql-s3"], indirect=True)
PUSHES = "SELECT id, state FROM pushes WHERE kind = 'push'"


class Worker:
    """The test's end of the program: one process at a time, which freezes when it is told to."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, frozen_worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout

    def begin(self, order: dict[str, Any]) -> bool:
        """Let it work; says whether it stands still now, or is done."""
        self._write(json.dumps(order))
        self.said: list[list[str]] = []
        return self._listen()

    def go_on(self) -> None:
        """Let it finish."""
        self._write("go on")
        assert not self._listen()

    def _write(self, line: str) -> None:
        self._orders.write(f"{line}\n")
        self._orders.flush()

    def _listen(self) -> bool:
        while (words := self._answers.readline().split()) not in (["frozen"], ["ended", "0"]):
            assert words[:1] not in ([], ["ended"]), "the process failed"
            self.said.append(words)
        return words == ["frozen"]

    @property
    def outcome(self) -> list[list[str]]:
        """What came of it, without what it counted."""
        return [words for words in self.said if words[0] not in ("effect", "effects")]

    @property
    def effects(self) -> int:
        return next(int(words[1]) for words in self.said if words[0] == "effects")

    def close(self) -> None:
        self._orders.close()
        assert self._process.wait() == 0
        self._answers.close()


@pytest.fixture
def worker() -> Iterator[Worker]:
    with closing(Worker()) as running:
        yield running


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever stands still may hold a lock of the database: this process does not wait for it."""
    monkeypatch.setattr("ckpt.registry.sqlite._WAIT_SECONDS", 0.05)
    monkeypatch.setattr("ckpt.registry.postgres._LOCK_SECONDS", 0.05)
    monkeypatch.setattr("ckpt.registry.engine._ATTEMPTS", 1)


@dataclass
class Scene:
    """A repository with a version ``kept@1``, a folder for files, and the other process."""

    place: Combination
    repo: ckpt.Repository
    folder: Path
    worker: Worker

    def push(self, model: str, *names: str) -> ckpt.Version:
        return self.repo.push_file(self.write(*names), model)

    def write(self, *names: str) -> Path:
        file = self.folder / "pushed.safetensors"
        file.write_bytes(file_of(*names))
        return file

    def check_pull(self, version: ckpt.Version | str, *names: str) -> None:
        out = self.folder / "pulled.safetensors"
        self.repo.pull_file(version, out, force=True)
        assert out.read_bytes() == file_of(*names)

    def order(self, act: str, file: Path, pack_bytes: int, **more: Any) -> dict[str, Any]:
        where = {"registry": self.place.registry, "store": self.place.store}
        given = {"act": act, "file": str(file), "pack_bytes": pack_bytes, "freeze_at": None}
        return where | given | more

    def collect(self, *, but_first: ckpt.Version | None = None) -> bool:
        """End all leases, remove a version and collect; says whether nobody held a lock."""
        try:
            self.place.run("UPDATE pushes SET expires_at = 0 WHERE state = 'open'")
            if but_first is not None:
                self.repo.rm(but_first)
            self.repo.gc(grace=0)
        except LockedError:
            return False
        except StorageError as error:
            if error.code != "registry-busy":
                raise
            return False
        return True

    def check_all(self, known: set[tuple[str, ...]]) -> None:
        """Every version that is shown is one of these, complete."""
        files = {file_of(*names) for names in known}
        out = self.folder / "shown.safetensors"
        for version in self.repo.log(MODEL):
            self.repo.pull_file(version, out, force=True)
            assert out.read_bytes() in files

    def clean(self) -> None:
        """Only ``kept`` is left, and exactly its packs are stored."""
        for version in self.repo.log(MODEL):
            self.repo.rm(version)
        self.repo.gc(grace=0)
        self.place.check_nothing_else_is_stored(self.repo)
        self.check_pull("kept", "kept-0", "kept-1")


@pytest.fixture
def scene(make: Make, tmp_path: Path, worker: Worker) -> Iterator[Scene]:
    with make() as place, place.open() as repo:
        scene = Scene(place, repo, tmp_path, worker)
        scene.push("kept", "kept-0", "kept-1")
        yield scene


def count_effects(scene: Scene, act: str, pack_bytes: int) -> int:
    """How many effects an act has that nobody stops."""
    version = scene.push(MODEL, "counted-a", "counted-b", "kept-0")
    file = scene.folder / "counted.safetensors"
    if act == "push":
        file.write_bytes(file_of("counted-a", "counted-1", "counted-b", "counted-2"))
    order = scene.order(act, file, pack_bytes, reference=version.reference)
    assert not scene.worker.begin(order)
    file.unlink()
    scene.clean()
    return scene.worker.effects


def freeze_push(scene: Scene, seed: int, effects: int, pack_bytes: int) -> int:
    """A push stands still beyond the end of its lease; returns 1 if it did."""
    chance = random.Random(f"push-{seed}")
    base = (f"{seed}-a", f"{seed}-b", "kept-0")
    names = (f"{seed}-a", f"{seed}-new-0", f"{seed}-b", f"{seed}-new-1")
    first = scene.push(MODEL, *base)
    before = dict(scene.place.run(PUSHES))
    at = chance.randrange(effects)
    frozen = scene.worker.begin(scene.order("push", scene.write(*names), pack_bytes, freeze_at=at))
    state = None
    if frozen:
        collected = scene.collect(but_first=first if chance.random() < 0.7 else None)
        new = {push: state for push, state in scene.place.run(PUSHES) if push not in before}
        state = next(iter(new.values()), None)
        assert state != "open" or not collected
        scene.check_all({base, names})
        scene.worker.go_on()
    *failures, (done, reference) = scene.worker.outcome
    # Whether it may end as it began is decided by its row, and by nothing else.
    assert failures == ([["failed", "push-expired"]] if state == "aborted" else [])
    assert done == "pushed"
    for _ in range(2):
        scene.check_all({base, names})
        scene.check_pull(reference, *names)
        assert scene.repo.log(MODEL)[0].reference == reference
        assert len(scene.repo.log(MODEL)) <= 2
        scene.repo.gc(grace=0)
    scene.place.check_nothing_else_is_stored(scene.repo)
    scene.clean()
    return int(frozen)


def freeze_pull(scene: Scene, seed: int, effects: int) -> int:
    """A pull stands still while its version and the bytes go; returns 1 if it did."""
    names = (f"{seed}-a", f"{seed}-b", "kept-0")
    version = scene.push(MODEL, *names)
    out = scene.folder / f"{seed}.safetensors"
    at = random.Random(f"pull-{seed}").randrange(effects)
    frozen = scene.worker.begin(
        scene.order("pull", out, LARGE_PACK, freeze_at=at, reference=version.reference)
    )
    if frozen:
        scene.collect(but_first=version)
        scene.worker.go_on()
    if scene.worker.outcome == [["pulled"]]:
        assert out.read_bytes() == file_of(*names)
        out.unlink()
    else:
        assert scene.worker.outcome == [["failed", "version-missing"]]
        assert scene.repo.log(MODEL) == []
    assert not [path for path in scene.folder.iterdir() if path.suffix == ".tmp" or path == out]
    scene.clean()
    return int(frozen)


@TWO
@pytest.mark.torture("T10", unit="freezes")
def test_a_push_that_stood_still_beyond_its_lease_succeeds_or_says_push_expired(
    scene: Scene, trials: Trials
) -> None:
    effects = {size: count_effects(scene, "push", size) for size in (SMALL_PACK, LARGE_PACK)}
    for seed in trials.seeds(FREEZES):
        size = random.Random(f"size-{seed}").choice([*effects])
        trials.count(freeze_push(scene, seed, effects[size], size))


@TWO
@pytest.mark.torture("T10", unit="freezes")
def test_a_pull_that_stood_still_gives_all_bytes_or_says_version_missing(
    scene: Scene, trials: Trials
) -> None:
    effects = count_effects(scene, "pull", LARGE_PACK)
    for seed in trials.seeds(FREEZES):
        trials.count(freeze_pull(scene, seed, effects))
