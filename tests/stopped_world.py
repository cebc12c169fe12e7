"""A repository whose acts are stopped again and again, and what it must hold each time."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crash_driver import file_of
from traced_worker import MODEL

import ckpt
from ckpt.core.errors import NotFoundError

SMALL_PACK, LARGE_PACK = 4096, 512 << 20
ACTS = ("push", "known push", "pull", "rm", "gc", "repack")


@dataclass
class World:
    """A repository by what opens it, what it holds by reference, and the files to push and to
    pull to; ``check_books`` looks at it behind its back."""

    folder: Path
    where: dict[str, Any]
    check_books: Callable[[ckpt.Repository], None]
    kept: dict[str, bytes] = field(default_factory=dict)
    steps: int = 0

    def open(self) -> ckpt.Repository:
        return ckpt.open(**self.where)

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
        with self.open() as repo:
            self.push(repo, "a", "b", "c")
            self.push(repo, "a", "d", "e")

    def prepare(self, act: str, seed: str) -> dict[str, Any]:
        """The order for an act; what it works on is made first."""
        chance = random.Random(seed)
        order: dict[str, Any] = {
            "where": self.where,
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
            with self.open() as repo:
                gone = self.push(repo, *[f"{seed}-{n}" for n in range(4)])
                if act == "repack":
                    self.push(repo, f"{seed}-0", "a")
                self.remove(repo, gone)
        self.steps += 1
        return order | {"step": self.steps, "reference": chance.choice(sorted(self.kept))}

    def check(self, order: dict[str, Any], acknowledged: str | None) -> None:
        """Open anew: what was acknowledged is there, what was not is whole or absent, and it can
        be done again."""
        with self.open() as repo:
            self.check_books(repo)
            there = {version.reference for version in repo.log(MODEL, limit=1000)}
            getattr(self, f"_settle_{order['act']}")(there, order, acknowledged)
            self.check_kept(repo)
            getattr(self, f"_repeat_{order['act']}")(repo, order)
            self.check_books(repo)

    def _settle_push(
        self, there: set[str], order: dict[str, Any], acknowledged: str | None
    ) -> None:
        new = there - self.kept.keys()
        assert len(new) <= 1
        assert acknowledged is None or new == {acknowledged}
        self.kept |= dict.fromkeys(new, self.file.read_bytes())

    def _repeat_push(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        before = self.newest
        again = repo.push_file(self.file, MODEL, step=order["step"]).reference
        assert again == before or again not in self.kept
        self.kept[again] = self.file.read_bytes()

    def _settle_pull(
        self, there: set[str], order: dict[str, Any], acknowledged: str | None
    ) -> None:
        assert self.file.exists() or acknowledged is None
        if self.file.exists():
            assert self.file.read_bytes() == self.kept[order["reference"]]

    def _repeat_pull(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        repo.pull_file(order["reference"], self.file, force=True)
        assert self.file.read_bytes() == self.kept[order["reference"]]

    def _settle_rm(self, there: set[str], order: dict[str, Any], acknowledged: str | None) -> None:
        assert order["reference"] not in there or acknowledged is None
        if order["reference"] not in there:
            del self.kept[order["reference"]]

    def _repeat_rm(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        with suppress(NotFoundError):  # it was removed already
            repo.rm(order["reference"])
        self.kept.pop(order["reference"], None)
        self.push(repo, "a", f"instead of {order['reference']}")

    def _settle_gc(self, there: set[str], order: dict[str, Any], acknowledged: str | None) -> None:
        """A collection removes no version."""

    def _repeat_gc(self, repo: ckpt.Repository, order: dict[str, Any]) -> None:
        repo.gc(grace=0, repack=order["act"] == "repack")

    _settle_repack, _repeat_repack = _settle_gc, _repeat_gc

    def check_kept(self, repo: ckpt.Repository) -> None:
        """Exactly these versions are there, bit for bit."""
        log = repo.log(MODEL, limit=1000)
        assert sorted(version.reference for version in log) == sorted(self.kept)
        out = self.folder / "out.safetensors"
        for version in log:
            repo.pull_file(version, out, force=True)
            assert out.read_bytes() == self.kept[version.reference], version.reference
