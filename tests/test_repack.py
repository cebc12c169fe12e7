"""repack frees the dead bytes of mostly dead packs, and loses none of the others (rule (h))."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import select

import ckpt
from ckpt.core.errors import ConflictError, IntegrityError
from ckpt.registry.tables import claims, packs, pushes, refs
from ckpt.service.rebuild import rebuild_registry
from ckpt.storage.chunks import Places
from ckpt.storage.local import LocalStore
from ckpt.storage.repack import write_again


def state(*seeds: int, size: int = 4096) -> dict[str, torch.Tensor]:
    """A tensor for each seed, which is also its name."""
    tensors = {}
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        tensors[f"w{seed}"] = torch.rand(size, generator=generator)
    return tensors


def equal(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def sizes(repo: ckpt.Repository) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in repo.location.store.glob("packs/*/*")}


def sparse_repository(repo: ckpt.Repository) -> tuple[ckpt.Version, ckpt.Version, ckpt.Version]:
    """Three versions; the first is gone, and the others share one tensor each of its ten."""
    first = repo.push(state(*range(10)), "a", compress="auto")
    second = repo.push(state(3, 20), "a")
    third = repo.push(state(4, 30), "b")
    repo.rm(first)
    return first, second, third


def test_the_dead_bytes_of_a_shared_pack_are_freed(repo: ckpt.Repository) -> None:
    first, second, third = sparse_repository(repo)
    before = sum(sizes(repo).values())
    assert repo.gc(grace=0).freed_bytes == 0
    collected = repo.gc(grace=0, repack=True)
    old = f"{first.push}-0"
    assert (
        [pack.id for pack in collected.repacked] == [pack.id for pack in collected.freed] == [old]
    )
    assert old not in sizes(repo)
    assert before - sum(sizes(repo).values()) >= 8 * 4096 * 4 - 8192
    assert equal(repo.pull(second), state(3, 20))
    assert equal(repo.pull(third), state(4, 30))
    assert repo.fsck(read_data=1).is_clean
    assert repo.gc(grace=0, repack=True).repacked == ()


def test_what_a_dry_run_names_is_what_is_repacked(repo: ckpt.Repository) -> None:
    sparse_repository(repo)
    before = sizes(repo)
    foreseen = repo.gc(grace=0, dry_run=True, repack=True)
    assert sizes(repo) == before
    assert repo.gc(grace=0, repack=True).repacked == foreseen.repacked != ()


def test_a_pack_that_is_mostly_needed_stays_as_it_is(repo: ckpt.Repository) -> None:
    first = repo.push(state(*range(10)), "a")
    repo.push(state(*range(8), 20), "a")
    repo.rm(first)
    before = sizes(repo)
    assert repo.gc(grace=0, repack=True).repacked == ()
    assert sizes(repo) == before


def test_a_repacked_store_is_rebuilt_and_shared_like_any_other(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    _, second, third = sparse_repository(repo)
    repo.gc(grace=0, repack=True)
    fourth = repo.push(state(3, 4, 40), "c")
    assert fourth.new_bytes < 2 * 4096 * 4 + 8192
    repo.close()
    rebuilt = rebuild_registry(repo.location, LocalStore(repo.location.store))
    assert (rebuilt.versions, rebuilt.damaged, rebuilt.unreadable) == (3, (), ())
    with ckpt.open(tmp_path) as again:
        assert equal(again.pull(second.reference), state(3, 20))
        assert equal(again.pull(third.reference), state(4, 30))
        assert equal(again.pull(fourth.reference), state(3, 4, 40))
        again.gc(grace=0)
        assert again.fsck(read_data=1).is_clean


def test_chunks_of_a_tensor_are_kept_one_by_one(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = torch.arange(3 * (16 << 20) // 4, dtype=torch.int32)
    changed = large.clone()
    changed[: (32 << 20) // 4] += 1  # the last chunk stays
    first = repo.push({"w": large, **state(*range(3))}, "a")
    repo.push({"w": changed}, "a", compress="none")
    repo.rm(first)
    assert len(repo.gc(grace=0, repack=True).repacked) == 1
    assert torch.equal(repo.pull("a")["w"], changed)
    assert sum(sizes(repo).values()) < 3 * (16 << 20) + (1 << 16)
    assert repo.fsck(read_data=1).is_clean


def test_a_damaged_pack_is_named_and_left_alone(repo: ckpt.Repository) -> None:
    first, second, _ = sparse_repository(repo)
    (path,) = repo.location.store.glob(f"packs/*/{first.push}*")
    body = bytearray(path.read_bytes())
    for at in range(4096, len(body), 4096):
        body[at] ^= 1
    path.chmod(0o600)
    path.write_bytes(body)
    collected = repo.gc(grace=0, repack=True)
    assert collected.repacked == collected.freed == ()
    assert "fsck" in collected.warnings[0]
    assert path.exists()
    with repo._registry._database.read() as transaction:
        assert transaction.rows(select(claims)) == []
    with pytest.raises(IntegrityError, match="other bytes"):
        repo.pull(second)


def places(repo: ckpt.Repository) -> Places:
    return Places.of(repo._registry.repairs.packs())


def begun(repo: ckpt.Repository) -> tuple[str, Any, set[str]]:
    """A repack that has chosen and claimed its pack."""
    ((pack, needed),) = repo._registry.repacks.sparse(0.5)
    push = secrets.token_hex(16)
    repo._registry.books.open_push(push, "repack", {pack.id})
    return push, pack, needed


def test_a_push_that_shares_more_of_the_pack_meanwhile_keeps_it(repo: ckpt.Repository) -> None:
    """The live set is computed anew under the lock: who needs what was not copied stays."""
    first, second, third = sparse_repository(repo)
    push, pack, needed = begun(repo)
    late = repo.push(state(7, 50), "late")
    finished = write_again(repo._store, pack, needed, push, places(repo))
    assert repo._registry.repacks.switch(push, finished, pack.id) == 2
    repo.gc(grace=0)
    assert f"{first.push}-0" in sizes(repo)
    assert equal(repo.pull(late), state(7, 50))
    assert equal(repo.pull(second), state(3, 20))
    repo.rm(late)
    repo.gc(grace=0)
    assert f"{first.push}-0" not in sizes(repo)
    assert equal(repo.pull(third), state(4, 30))


def test_a_repack_whose_lease_ended_changes_nothing(repo: ckpt.Repository) -> None:
    _, second, _ = sparse_repository(repo)
    push, pack, needed = begun(repo)
    finished = write_again(repo._store, pack, needed, push, places(repo))
    repo._registry.books.abort(push)
    with pytest.raises(ConflictError, match="not open"):
        repo._registry.repacks.switch(push, finished, pack.id)
    repo.gc(grace=0)
    assert finished.pack.id not in sizes(repo)
    assert equal(repo.pull(second), state(3, 20))


def test_two_repacks_of_one_pack_leave_one(repo: ckpt.Repository) -> None:
    _, second, third = sparse_repository(repo)
    one, two = begun(repo), begun(repo)
    written = [
        write_again(repo._store, pack, needed, push, places(repo))
        for push, pack, needed in (one, two)
    ]
    moved = [
        repo._registry.repacks.switch(push, finished, pack.id)
        for (push, pack, _), finished in zip((one, two), written, strict=True)
    ]
    assert moved == [2, 0]
    repo.gc(grace=0)
    assert written[1].pack.id not in sizes(repo)
    assert equal(repo.pull(second), state(3, 20))
    assert equal(repo.pull(third), state(4, 30))
    with repo._registry._database.read() as transaction:
        left = {row.id for row in transaction.rows(select(packs.c.id))}
        assert {row.pack for row in transaction.rows(select(refs.c.pack))} == left
        open_ones = select(pushes.c.id).where(pushes.c.state == "open")
        assert transaction.rows(open_ones) == []


def test_a_reader_of_the_old_plan_reads_on(repo: ckpt.Repository) -> None:
    _, second, _ = sparse_repository(repo)
    plan = repo._registry.books.read_plan
    before = [plan(second.push)]
    repo.gc(grace=0, repack=True)
    repo._registry.books.read_plan = lambda push: before.pop() if before else plan(push)  # type: ignore[method-assign]
    assert equal(repo.pull(second), state(3, 20))
