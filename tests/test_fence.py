"""A registry that is being rebuilt, or is an old copy, acknowledges, gives and deletes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ckpt
from ckpt.core.errors import ConflictError
from ckpt.service import gc, rebuild
from ckpt.service.acknowledge import copy_pending
from ckpt.service.config import locate
from ckpt.storage.local import LocalStore


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((64, 64), value)}


def rebuilt(folder: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    """A rebuild; ``meanwhile`` runs when the store was listed and nothing is replaced yet."""
    location = locate(folder)
    write = rebuild._write_epoch

    def write_and(*given: Any) -> None:
        write(*given)
        meanwhile()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuild, "_write_epoch", write_and)
        rebuild.rebuild_registry(location, LocalStore(location.store))


def references(folder: Path) -> list[str]:
    with ckpt.open(folder) as repo:
        for version in repo.log("a"):
            assert torch.equal(repo.pull(version)["w"], state(version.step or 0)["w"])
        return [version.reference for version in repo.log("a")]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    with ckpt.open(tmp_path) as repo:
        for step in (1, 2):
            repo.push(state(step), "a", step=step)
    return tmp_path


@pytest.mark.parametrize("act", ["push", "rm", "tag", "annotate", "prune", "gc"])
def test_nothing_is_done_in_a_registry_that_is_being_rebuilt(two: Path, act: str) -> None:
    acts: dict[str, Callable[[ckpt.Repository], object]] = {
        "push": lambda repo: repo.push(state(3), "a", step=3),
        "rm": lambda repo: repo.rm("a@1"),
        "tag": lambda repo: repo.tag("a@1", "best"),
        "annotate": lambda repo: repo.annotate("a@1", labels={"x": "y"}),
        "prune": lambda repo: repo.prune("a", keep=["last:1"]),
        "gc": lambda repo: repo.gc(grace=0, allow=["unknown"]) and repo.rm("a@1"),
    }

    def meanwhile() -> None:
        with ckpt.open(two) as repo, pytest.raises(ConflictError, match="being rebuilt"):
            acts[act](repo)

    rebuilt(two, meanwhile)
    assert references(two) == ["a@2", "a@1"]
    with ckpt.open(two) as repo:
        acts[act](repo)


@pytest.fixture
def collector(two: Path) -> ckpt.Repository:
    """One that has removed a version, and has not told anybody."""
    repo = ckpt.open(two)
    repo._registry.changes.remove(repo.get("a@1").push, "me")
    return repo


def test_a_collector_from_before_deletes_no_pack(two: Path, collector: ckpt.Repository) -> None:
    books = collector._registry.collector
    books.condemn(one.pack for one in books.unneeded())
    assert books.remove(0, "me") != []

    def meanwhile() -> None:
        copy_pending(collector._store, collector._registry)
        gc._delete(collector._store, collector._registry)

    rebuilt(two, meanwhile)
    gc._delete(collector._store, collector._registry)
    collector.close()
    assert references(two) == ["a@2", "a@1"]


def test_a_collector_from_before_deletes_no_document(two: Path, collector: ckpt.Repository) -> None:
    epoch, _ = collector._registry.copies.position()
    listed = gc._Listed(collector._store)
    ended = gc._check(collector._registry, listed, ())

    def meanwhile() -> None:
        gc._delete_documents(collector._store, collector._registry, listed, ended, epoch)

    rebuilt(two, meanwhile)
    meanwhile()
    collector.close()
    rebuilt(two)
    assert references(two) == ["a@2", "a@1"]


@pytest.mark.parametrize("how", ["documents", "events", "epochs"])
def test_nothing_is_written_through_an_old_copy(two: Path, how: str) -> None:
    database = two / ".ckpt" / "registry.db"
    shutil.copy(database, two / "copy.db")
    if how == "epochs":
        rebuilt(two)
    else:
        with ckpt.open(two) as repo:
            repo.push(state(3), "a", step=3) if how == "documents" else repo.tag("a@1", "best")
    expected = references(two)
    shutil.copy(two / "copy.db", database)
    with ckpt.open(two) as repo:
        for act in (
            lambda: repo.push(state(9), "a", step=9),
            lambda: repo.rm("a@2"),
            lambda: repo.tag("a@2", "x"),
            lambda: repo.prune("a", keep=["last:1"]),
        ):
            with pytest.raises(ConflictError, match="older copy"):
                act()
    rebuilt(two)
    assert references(two) == expected


def test_a_rebuild_that_was_stopped_is_run_again(two: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop() -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        rebuilt(two, stop)
    with ckpt.open(two) as repo:
        assert torch.equal(repo.pull("a@1")["w"], state(1)["w"])
        with pytest.raises(ConflictError, match="registry rebuild"):
            repo.push(state(3), "a", step=3)
    rebuilt(two)
    with ckpt.open(two) as repo:
        assert repo.push(state(3), "a", step=3).number == 3
