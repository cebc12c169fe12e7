"""The leases of runs, over both databases: one job at a time, and what it goes on from stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from postgres_server import repository_over

import ckpt
from ckpt.core.errors import ConflictError
from ckpt.core.records import Version

pytest_plugins = ("postgres_server",)


@pytest.fixture
def repo(where: Path | str, tmp_path: Path) -> Iterator[ckpt.Repository]:
    with repository_over(where, tmp_path) as repository:
        yield repository


def test_a_run_is_free_when_its_lease_has_ended(repo: ckpt.Repository) -> None:
    held = repo._registry.runs
    held.hold("net", "main", "a", 60)
    with pytest.raises(ConflictError) as caught:
        held.hold("net", "main", "b", 60)
    assert caught.value.code == "run-live"
    held.hold("net", "main", "a", -1)
    held.hold("net", "main", "b", 60)


def test_only_its_holder_gives_a_run_up(repo: ckpt.Repository) -> None:
    held = repo._registry.runs
    held.hold("net", "main", "a", 60)
    held.release("net", "main", "b")
    with pytest.raises(ConflictError):
        held.hold("net", "main", "b", 60)
    held.release("net", "main", "a")
    held.hold("net", "main", "b", 60)


@pytest.fixture
def first(repo: ckpt.Repository) -> Version:
    """A version that no rule keeps: two newer ones are of the same run."""
    versions = [repo.push({"w": torch.tensor(step)}, "net", step=step) for step in range(3)]
    return versions[0]


@pytest.mark.parametrize("model", ["net", "other"])
def test_what_a_live_run_resumed_from_is_pruned_by_nobody(
    repo: ckpt.Repository, first: Version, model: str
) -> None:
    repo._registry.runs.hold(model, "main", "a", 60, [first.push])
    foreseen = repo.prune("net", keep=["last:1"], dry_run=True)
    assert [version.number for version in foreseen.victims] == [2]
    assert {version.number: why for version, why in foreseen.kept}[1] == ("resumed from",)
    assert repo.prune("net", keep=["last:1"]).victims == foreseen.victims
    repo.rm(first)  # whoever names it may


@pytest.mark.parametrize("end", ["released", "ended", "of another job"])
def test_what_a_run_resumed_from_is_free_when_it_is_live_no_more(
    repo: ckpt.Repository, first: Version, end: str
) -> None:
    held = repo._registry.runs
    held.hold("net", "main", "a", -1 if end == "ended" else 60, [first.push])
    if end != "ended":
        held.release("net", "main", "a")
    if end == "of another job":
        held.hold("net", "main", "b", 60)
    pruned = repo.prune("net", keep=["last:1"])
    assert [version.number for version in pruned.victims] == [1, 2]


def test_what_is_resumed_from_while_a_prune_is_under_way_stays(
    repo: ckpt.Repository, first: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    freed = repo._registry.usages.freed_by

    def freed_by(pushes: set[str]) -> int:
        repo._registry.runs.hold("net", "main", "a", 60, [first.push])
        return freed(pushes)

    monkeypatch.setattr(repo._registry.usages, "freed_by", freed_by)
    pruned = repo.prune("net", keep=["last:1"])
    assert [version.number for version in pruned.victims] == [2]
    assert repo.get("net@1") == first
