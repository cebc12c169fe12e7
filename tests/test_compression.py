"""Versions that are stored as differences come back bit for bit, and nothing of them is lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqlalchemy import select

import ckpt
from ckpt.core.digests import digest_of
from ckpt.core.documents import FORMAT, Document, encode_document
from ckpt.core.errors import IntegrityError, NotFoundError, UsageError
from ckpt.loader.snapshot import capture_state
from ckpt.loader.sources import MemoryTensor
from ckpt.registry.tables import chunks
from ckpt.service.bases import keep_bases
from ckpt.service.rebuild import rebuild_registry
from ckpt.storage.local import LocalStore
from ckpt.training.arena import Arena
from ckpt.training.background import location_of
from ckpt.training.staging import Stage
from ckpt.training.writer import Writer

State = dict[str, torch.Tensor]


def state(step: int, size: int = 300_000) -> State:
    """Weights that move a little with each step, and a counter."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(size, generator=generator)
    for number in range(step):
        generator = torch.Generator().manual_seed(100 + number)
        weights = weights + 1e-4 * torch.randn(size, generator=generator)
    return {
        "w": weights,
        "half": weights[:50_000].to(torch.bfloat16),
        "bias": torch.full((10,), float(step)),
        "step": torch.tensor(step),
    }


def equal(one: Any, other: Any) -> bool:
    same = one.keys() == other.keys()
    return same and all(torch.equal(one[name], other[name]) for name in one)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def rows(repo: ckpt.Repository) -> dict[str, list[Any]]:
    """The stored chunks by the push that wrote them."""
    found: dict[str, list[Any]] = {}
    with repo._registry._database.read() as transaction:
        for row in transaction.rows(select(chunks)):
            found.setdefault(row.pack.partition("-")[0], []).append(row)
    return found


def packs(repo: ckpt.Repository) -> list[Path]:
    return sorted(repo.location.store.glob("packs/*/*"))


def test_a_successor_is_stored_as_differences(repo: ckpt.Repository) -> None:
    first, second = (repo.push(state(n), "m", step=n, compress="auto") for n in (0, 1))
    assert second.new_bytes < 0.75 * first.new_bytes
    stored = rows(repo)
    assert all(row.codec is None for row in stored[first.push])
    assert any(row.base for row in stored[second.push])
    assert equal(repo.pull(first), state(0))
    assert equal(repo.pull(second), state(1))
    assert repo.fsck(read_data=1).is_clean


def test_the_first_version_opens_in_any_reader(repo: ckpt.Repository) -> None:
    repo.push(state(0), "m", compress="auto")
    (pack,) = packs(repo)
    assert equal(load_file(pack), state(0))


def test_no_base_is_ever_a_difference(repo: ckpt.Repository) -> None:
    pushed = [repo.push(state(step), "m", step=step) for step in range(5)]
    every = [row for found in rows(repo).values() for row in found]
    differences = [row for row in every if row.base]
    alone = {row.digest for row in every if row.base is None}
    assert len(differences) >= 4
    assert {row.base for row in differences} <= alone
    for version in pushed:
        assert equal(repo.pull(version), state(version.step or 0))


def test_max_makes_first_versions_smaller_too(repo: ckpt.Repository) -> None:
    plain = repo.push(state(0), "plain", compress="none")
    small = repo.push(state(7), "small", compress="max")
    assert small.new_bytes < 0.95 * plain.new_bytes
    assert equal(repo.pull(small), state(7))
    assert repo.push(state(7), "small", compress="max").push == small.push


def test_none_stores_everything_as_it_is(repo: ckpt.Repository) -> None:
    for step in (0, 1):
        repo.push(state(step), "m", compress="none")
    assert all(row.codec is None for found in rows(repo).values() for row in found)


def test_another_way_is_refused(repo: ckpt.Repository) -> None:
    with pytest.raises(UsageError, match="auto, max, none"):
        repo.push(state(0), "m", compress="zip")


def test_the_base_outlives_its_version(repo: ckpt.Repository) -> None:
    """A version refers to the packs of its bases; gc frees them when the last of these goes."""
    first, second = (repo.push(state(step), "m", step=step) for step in (0, 1))
    repo.rm(first)
    repo.gc(grace=0, allow=["much"])
    assert equal(repo.pull(second), state(1))
    third = repo.push(state(2), "m", step=2)
    assert equal(repo.pull(third), state(2))
    repo.gc(grace=0, repack=True)
    assert equal(repo.pull(second), state(1))
    assert equal(repo.pull(third), state(2))
    repo.rm(second)
    repo.rm(third)
    repo.gc(grace=0)
    assert packs(repo) == []


def test_a_hit_on_a_difference_needs_its_base_too(repo: ckpt.Repository) -> None:
    """Another model that shares a chunk which is stored as a difference."""
    for step in (0, 1):
        repo.push(state(step), "m", step=step)
    other = repo.push(state(1), "other")
    assert other.new_bytes < 10_000
    repo.rm("m@1")
    repo.rm("m@2")
    repo.gc(grace=0)
    assert equal(repo.pull(other), state(1))
    assert repo.fsck(read_data=1).is_clean


def test_a_repack_keeps_the_bases_that_are_needed(repo: ckpt.Repository) -> None:
    large = {f"x{n}": torch.randn(200_000) for n in range(6)}
    first = repo.push({**state(0), **large}, "m")
    second = repo.push(state(1), "m")
    repo.rm(first)
    assert len(repo.gc(grace=0, repack=True).repacked) == 1
    assert equal(repo.pull(second), state(1))
    assert repo.fsck(read_data=1).is_clean
    assert sum(path.stat().st_size for path in packs(repo)) < 4_000_000


def test_a_rebuild_finds_the_bases(repo: ckpt.Repository, tmp_path: Path) -> None:
    for step in range(3):
        repo.push(state(step), "m", step=step)
    repo.rm("m@1")
    repo.close()
    (repo.location.root / "registry.db").unlink()
    found = rebuild_registry(repo.location, LocalStore(repo.location.store))
    assert (found.versions, found.damaged) == (2, ())
    with ckpt.open(tmp_path) as again:
        again.gc(grace=0)
        for version in again.log("m"):
            assert equal(again.pull(version), state(version.step or 0))


def test_a_damaged_base_is_told_and_healed_by_a_push(repo: ckpt.Repository) -> None:
    first, second = (repo.push(state(step), "m", step=step) for step in (0, 1))
    (pack,) = [path for path in packs(repo) if first.push in path.name]
    body = bytearray(pack.read_bytes())
    for at in range(8192, len(body), 4096):
        body[at] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(body)
    with pytest.raises(IntegrityError, match="m@2"):
        repo.pull(second)
    assert set(repo.fsck(read_data=1).broken) == {pack.stem}
    third = repo.push(state(2), "m", step=2)
    assert equal(repo.pull(third), state(2))
    healed = repo.push(state(0), "again")
    assert equal(repo.pull(healed), state(0))
    assert set(repo.fsck(read_data=1, repair=True).repaired) == {"m@1", "m@2"}
    assert equal(repo.pull(second), state(1))


def test_a_copy_is_equal(repo: ckpt.Repository, tmp_path: Path) -> None:
    for step in (0, 1):
        repo.push(state(step), "m", step=step)
    with ckpt.open(tmp_path / "other") as other:
        other.copy(repo, "m@2")
        assert equal(other.pull("m"), state(1))


def test_a_pushed_file_comes_back_byte_for_byte(repo: ckpt.Repository, tmp_path: Path) -> None:
    for step in (0, 1):
        source, target = tmp_path / f"{step}.safetensors", tmp_path / f"{step}.back"
        save_file(state(step), source)
        version = repo.push_file(source, "m", compress="max")
        repo.pull_file(version, target)
        assert target.read_bytes() == source.read_bytes()
    assert any(row.base for row in rows(repo)[version.push])


@pytest.mark.parametrize("compress", ["auto", "max"])
def test_every_dtype_and_shape_comes_back(repo: ckpt.Repository, compress: str) -> None:
    generator = torch.Generator().manual_seed(5)

    def of(kind: torch.dtype, shift: int) -> torch.Tensor:
        whole = torch.randint(0, 120, (3, 5000), generator=generator)
        return (whole + shift).to(kind)

    kinds = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16]
    kinds += [torch.int32, torch.int64, torch.complex64, torch.complex128, torch.float8_e4m3fn]
    for shift in (0, 1, 1):
        pushed: State = {f"{kind}": of(kind, shift) for kind in kinds}
        pushed["bool"] = of(torch.int64, shift) > 60
        pushed["view"] = pushed["torch.float64"].T
        pushed["large"] = torch.arange(5_000_000, dtype=torch.float32) + shift
        version = repo.push(pushed, "m", compress=compress)
        pulled = repo.pull(version)
        for name, tensor in pushed.items():
            assert torch.equal(bits(pulled[name]), bits(tensor)), name


def test_of_what_successors_need_one_state_is_kept_in_memory(repo: ckpt.Repository) -> None:
    kept: dict[str, memoryview] = {}

    def keep(pushed: State) -> set[str]:
        version = repo.push(pushed, "m", step=len(kept))
        entries = repo.document(version).tensors
        sources = [MemoryTensor(one.name, one.dtype, pushed[one.name]) for one in entries]
        keep_bases(repo._registry, version, sources, kept)
        for digest, chunk in kept.items():
            assert digest_of(chunk) == digest
        assert sum(map(len, kept.values())) <= sum(one.nbytes for one in pushed.values())
        return {digest for one in entries for digest in one.chunks}

    first = keep(state(0))
    assert kept.keys() == first
    second = keep(state(1))
    assert any(len(kept[digest]) > 1_000_000 for digest in kept.keys() & first)  # still its base
    assert kept.keys() != second
    other = {name: torch.randn(one.shape).to(one.dtype) for name, one in state(0).items()}
    assert keep(other) == kept.keys()


def test_a_save_is_done_although_nothing_could_be_kept_for_the_next(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise NotFoundError("version-missing", "a rule removed it")

    monkeypatch.setattr(LocalStore, "is_near", False)
    monkeypatch.setattr("ckpt.training.writer.keep_bases", fail)
    arena = Arena()
    setup = {"location": location_of(repo.location), "arena": arena.handle, "compress": "auto"}
    named = {"model": "m", "run": "main", "holder": "h", "keep": [], "spared": []}
    writer = Writer(setup | named)
    captured = capture_state(state(0))
    sources = [source for source in captured.sources if source is not None]
    starts, _ = Stage(arena).copy(sources)
    places = [(start, one.nbytes) for one, start in zip(sources, starts, strict=True)]
    document = Document(
        format=FORMAT,
        state="values",
        root=captured.root,
        tensors=captured.tensors,
        environment="",
        order=captured.order,
    )
    said = {"step": 1, "metrics": {}, "labels": {}, "aliases": [], "environment": {}}
    head = {"act": "save", "places": places, **said}
    answer = writer.answer((head, encode_document(document)))
    assert answer["reference"] == "m@1"
    assert equal(repo.pull("m"), state(0))
    writer.close()
    arena.close()
