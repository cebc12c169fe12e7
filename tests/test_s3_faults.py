"""A store whose server and network fail again and again: what was acknowledged is there."""

from __future__ import annotations

import math
import random
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
from crash_driver import file_of
from fault_proxy import FaultProxy, faulty
from servers import BUCKET, Server, Watch
from trials import Trials

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, StorageError
from ckpt.storage.identity import ensure_identity
from ckpt.storage.memory import MemoryStore

pytest_plugins = ("servers",)

T = TypeVar("T")

LEAST_SUCCESS = {0.1: 0.999, 0.2: 0.995, 0.3: 0.98}
CYCLES_PER_REPOSITORY = 5
PIECES = "abcdefghijklmnop"
SMALL, LARGE = 3000, 6 << 20  # bytes of a tensor; a pack of large ones is sent in parts
PART_BYTES = 5 << 20  # the least that servers take
READ_SECONDS = 0.5  # that a client waits for the rest of a body


@pytest.fixture(scope="module")
def proxy(seaweedfs: Server) -> Iterator[FaultProxy]:
    with faulty(seaweedfs.endpoint) as found:
        yield found


@pytest.fixture(autouse=True)
def _small_and_fast(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Parts of small objects, no waits between tries, and no long ones for a stalled body."""
    monkeypatch.setattr("ckpt.storage.s3_upload.SINGLE_BYTES", LARGE)
    monkeypatch.setattr("ckpt.storage.s3_upload.PART_BYTES", PART_BYTES)
    monkeypatch.setattr("ckpt.storage.s3._READ_SECONDS", READ_SECONDS)
    monkeypatch.setattr("ckpt.storage.store._ABANDONED_SECONDS", -5)  # a clock of whole seconds
    monkeypatch.setattr("ckpt.loader.environment.describe_environment", lambda: {"host": "test"})
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with observed(Watch()):
        yield


class Team:
    """A repository reached through the proxy and directly, and what was acknowledged in it."""

    def __init__(self, folder: Path, server: Server, proxy: FaultProxy) -> None:
        self.folder, self.server, self.proxy = folder, server, proxy
        self.prefix = f"faults/{secrets.token_hex(8)}"
        self.pushed: dict[str, bytes] = {}
        self.removed: set[str] = set()
        self.tried: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self._steps = 0

    def open(self, endpoint: str) -> ckpt.Repository:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
            return ckpt.open(
                registry=str(self.folder / "registry.db"), store=f"s3://{BUCKET}/{self.prefix}"
            )

    def join(self) -> ckpt.Repository:
        """Open it through the proxy, however often that takes."""
        while True:
            with suppress(CkptError):
                return self.open(self.proxy.endpoint)

    def tries(self, verb: str, act: Callable[[], T]) -> T | None:
        """Do something that may fail, in a typed way."""
        self.tried[verb] += 1
        try:
            return act()
        except CkptError as error:
            self.failed[verb] += 1
            print(f"{verb}: {error}")  # what a failure of the test shows
            return None

    def push(self, repo: ckpt.Repository, chance: random.Random) -> None:
        self._steps += 1
        large = chance.random() < 0.05
        names = chance.sample(PIECES, 2 if large else chance.randrange(1, 4))
        file = self.folder / "pushed.safetensors"
        file.write_bytes(file_of(*names, nbytes=LARGE if large else SMALL))
        model, step = chance.choice(("a", "b")), self._steps
        version = self.tries("push", lambda: repo.push_file(file, model, step=step))
        if version is not None:
            self.pushed[version.reference] = file.read_bytes()

    def pull(self, repo: ckpt.Repository, reference: str) -> None:
        pulled = self.folder / "pulled.safetensors"
        if self.tries("pull", lambda: repo.pull_file(reference, pulled, force=True)) is not None:
            assert pulled.read_bytes() == self.pushed[reference], reference

    def remove(self, repo: ckpt.Repository, reference: str) -> None:
        del self.pushed[reference]  # also when it fails: it may have been removed
        if self.tries("rm", lambda: repo.rm(reference)) is not None:
            self.removed.add(reference)

    def cycle(self, repo: ckpt.Repository, chance: random.Random) -> None:
        """Push some, pull them back, remove one, collect."""
        for _ in range(2):
            self.push(repo, chance)
        for reference in sorted(self.pushed)[-2:]:
            self.pull(repo, reference)
        if len(self.pushed) > 2:
            self.remove(repo, chance.choice(sorted(self.pushed)))
        self.tries("gc", lambda: repo.gc(grace=0))

    def check(self) -> None:
        """Everything is there, directly seen, and nothing else is left in the store."""
        self.proxy.settle()
        with self.open(self.server.endpoint) as repo:
            for _ in range(2):  # what arrives after a collection is found by the next one
                repo.gc(grace=0)
                self.proxy.deliver(everything=True)
            repo.gc(grace=0)
            there = {one.reference for model in repo.models() for one in repo.log(model.name)}
            assert not there & self.removed
            pulled = self.folder / "pulled.safetensors"
            for reference, body in self.pushed.items():
                repo.pull_file(reference, pulled, force=True)
                assert pulled.read_bytes() == body, reference
            assert repo.fsck(read_data=1).is_clean
            self._check_store(repo)

    def _check_store(self, repo: ckpt.Repository) -> None:
        registry, client = repo._registry, self.server.client
        wanted = {pack.pack.key for pack in registry.repairs.packs()} | {"FORMAT"}
        wanted |= {copy.key for copy in registry.copies.all()}
        pages = client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{self.prefix}/"
        )
        found = {entry["Key"] for page in pages for entry in page.get("Contents", ())}
        assert found == {f"{self.prefix}/{key}" for key in wanted}
        uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        assert not [one for one in uploads if one["Key"].startswith(self.prefix)]


@pytest.mark.torture("T12", unit="cycles")
@pytest.mark.parametrize("share", LEAST_SUCCESS, ids=lambda share: f"{share:.0%}")
def test_what_was_acknowledged_is_there_however_often_the_server_fails(
    share: float, trials: Trials, seaweedfs: Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    asked, wrong = proxy.requests, proxy.counts.total()
    for seed in trials.seeds(10 // CYCLES_PER_REPOSITORY):
        folder = tmp_path / f"{seed}"
        folder.mkdir()
        team, chance = Team(folder, seaweedfs, proxy), random.Random(seed)
        team.open(seaweedfs.endpoint).close()
        proxy.begin(seed, share)
        with team.join() as repo:
            for _ in range(CYCLES_PER_REPOSITORY):
                team.cycle(repo, chance)
                trials.count()
        proxy.begin(seed, 0)
        team.check()
        tried, failed = tried + team.tried, failed + team.failed
    assert proxy.counts.total() - wrong > share / 2 * (proxy.requests - asked)
    for verb, number in tried.items():
        assert failed[verb] <= math.ceil((1 - LEAST_SUCCESS[share]) * number), (verb, tried, failed)


def test_a_store_that_does_not_show_what_was_written_is_refused() -> None:
    class Behind(MemoryStore):
        """A server that finds nothing yet of what it was given."""

        def size(self, key: str) -> int | None:
            return None

    with pytest.raises(StorageError):
        ensure_identity(Behind())
