"""fsck finds every edit, raises no false alarm, and what can be repaired is."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from promise_scene import flip
from sqlalchemy import delete, update

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import AccessError, CkptError, IntegrityError
from ckpt.core.records import StoreCopy
from ckpt.registry.tables import chunks, refs
from ckpt.service.rebuild import rebuild_registry


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{n}": torch.rand(40, 30, generator=generator) for n in range(3)}


def pack_of(repo: ckpt.Repository, reference: str) -> Path:
    push = repo.get(reference).push
    (path,) = repo.location.store.glob(f"packs/*/{push}-0.safetensors")
    path.chmod(0o644)
    return path


@pytest.fixture
def filled(repo: ckpt.Repository) -> ckpt.Repository:
    """Two models, one sharing with the other."""
    repo.push(state(1), "a")
    repo.push({**state(1), "more": torch.ones(7)}, "a")
    repo.push(state(2), "b", alias="best")
    repo.tag("a@1", "first")
    return repo


def flip_header(path: Path) -> None:
    body = path.read_bytes()
    path.write_bytes(body.replace(b'"dtype":', b'"dtypE":', 1))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def extend(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "flipped": flip,
    "cut": cut,
    "extended": extend,
    "header": flip_header,
}


def test_a_whole_repository_is_clean(filled: ckpt.Repository) -> None:
    for share in (0.0, 0.5, 1.0):
        found = filled.fsck(read_data=share)
        assert found.is_clean
        assert found.packs == 3
    assert found.chunks == 7


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_the_versions_named(filled: ckpt.Repository, name: str) -> None:
    DAMAGE[name](pack_of(filled, "a@1"))
    found = filled.fsck(read_data=1)
    assert not found.is_clean
    assert found.damaged == ["a@1", "a@2"]
    assert torch.equal(filled.pull("b")["w0"], state(2)["w0"])


@pytest.mark.parametrize("name", DAMAGE)
def test_the_next_push_of_the_content_heals_it(filled: ckpt.Repository, name: str) -> None:
    DAMAGE[name](pack_of(filled, "a@1"))
    filled.fsck(read_data=1)
    again = filled.push(state(1), "copy")
    assert again.new_bytes > 3 * 40 * 30 * 4
    found = filled.fsck(read_data=1, repair=True)
    assert sorted(found.repaired) == ["a@1", "a@2"]
    assert found.is_clean
    assert filled.fsck(read_data=1, repair=True).is_clean
    for reference in ("a@1", "a@2", "copy"):
        assert torch.equal(filled.pull(reference)["w2"], state(1)["w2"])
    assert len(filled.gc(grace=0).freed) == 1
    assert filled.fsck(read_data=1).is_clean


def test_a_broken_pack_that_no_version_needs_is_no_damage(filled: ckpt.Repository) -> None:
    flip(pack_of(filled, "b"))
    filled.fsck(read_data=1)
    filled.push(state(2), "copy")
    assert filled.fsck(repair=True).repaired == ["b@1"]
    for _ in range(2):
        found = filled.fsck()
        assert found.is_clean
        (reason,) = found.broken.values()
        assert reason.endswith("; no version needs it, gc removes it")
    filled.gc()
    assert not filled.fsck().broken


def test_a_repository_that_cannot_be_written_is_reported_whole(
    filled: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(pack_of(filled, "a@1"))
    flip(pack_of(filled, "b"))

    def refuse(*_: object) -> None:
        raise AccessError("permission", "not permitted to write the registry")

    with monkeypatch.context() as patch:
        patch.setattr(filled._registry._database, "write", refuse)
        found = filled.fsck(read_data=1)
        assert (len(found.broken), sorted(found.damaged)) == (2, ["a@1", "a@2", "b@1"])
        assert found.unmarked is not None
        assert found.unmarked.code == "permission"
        assert not found.is_clean
    assert filled.fsck(read_data=1).unmarked is None
    assert len(filled.fsck().broken) == 2


def test_a_row_that_says_another_place_is_found_and_a_rebuild_puts_it_right(
    filled: ckpt.Repository,
) -> None:
    moved = update(chunks).values(offset=chunks.c.offset + 64)
    filled._registry._database.write(lambda transaction: transaction.run(moved))
    assert sorted(filled.fsck().damaged) == ["a@1", "a@2", "b@1"]
    filled.close()
    rebuild_registry(filled.location, filled._store)
    with ckpt.open(filled.location.root) as again:
        assert again.fsck(read_data=1).is_clean
        assert torch.equal(again.pull("b")["w0"], state(2)["w0"])


def test_a_version_that_refers_to_too_few_packs_is_found_and_repaired(
    filled: ckpt.Repository,
) -> None:
    registry = filled._registry._database
    registry.write(lambda transaction: transaction.run(delete(refs)) and None)
    assert filled.fsck().damaged == ["a@1", "a@2", "b@1"]
    found = filled.fsck(repair=True)
    assert found.repaired == ["a@1", "a@2", "b@1"]
    assert found.is_clean
    filled.gc(grace=0)
    assert filled.fsck(read_data=1).is_clean
    assert torch.equal(filled.pull("a@2")["w1"], state(1)["w1"])


def test_what_nobody_has_any_more_stays_damaged_and_is_told(filled: ckpt.Repository) -> None:
    pack_of(filled, "b").unlink()
    for _ in range(2):
        assert filled.fsck(repair=True).damaged == ["b@1"]
    with pytest.raises(IntegrityError):
        filled.pull("b")


def test_a_pack_that_comes_back_is_whole_again(filled: ckpt.Repository) -> None:
    path = pack_of(filled, "b")
    body = path.read_bytes()
    path.unlink()
    assert filled.fsck().broken
    path.write_bytes(body)
    assert not filled.fsck().is_clean  # it was wrong once: only its bytes can tell
    found = filled.fsck(read_data=1)
    assert len(found.healed) == 1
    assert found.is_clean
    assert torch.equal(filled.pull("b")["w0"], state(2)["w0"])


@pytest.mark.parametrize("place", ["documents", "events"])
def test_copies_that_are_missing_or_wrong_are_written_again(
    filled: ckpt.Repository, place: str
) -> None:
    first, *_ = sorted(filled.location.store.glob(f"{place}/1/*"))
    body = first.read_bytes()
    for damage in (Path.unlink, lambda path: path.write_bytes(b"{}")):
        first.chmod(0o644)
        damage(first)
        key = str(first.relative_to(filled.location.store))
        assert filled.fsck().copies == [key]
        found = filled.fsck(repair=True)
        assert (found.copies, found.rewritten) == ([], [key])
        assert found.is_clean
        assert first.read_bytes() == body
    assert filled.fsck(repair=True).rewritten == []


def test_500_edits_are_all_found_and_nothing_else(filled: ckpt.Repository) -> None:
    chance = random.Random(7)
    paths = sorted(filled.location.store.glob("packs/*/*"))
    for path in paths:
        path.chmod(0o644)
    for number in range(500):
        path = chance.choice(paths)
        body = path.read_bytes()
        edited = bytearray(body)
        kind = number % 4
        at = chance.randrange(len(body))
        if kind == 0:
            edited[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            edited[at] = (edited[at] + 1 + chance.randrange(255)) % 256
        elif kind == 2:
            del edited[at:]
        else:
            edited += bytes(1 + chance.randrange(9))
        path.write_bytes(edited)
        found = filled.fsck(read_data=1)
        padding = bytes(edited) != body and found.is_clean
        assert not padding, (path.name, kind, at)
        path.write_bytes(body)
        assert filled.fsck(read_data=1).is_clean, "a false alarm"


def test_the_command_line_tells_and_ends_with_4(filled: ckpt.Repository) -> None:
    program = str(Path(sys.executable).with_name("ckpt"))

    def run(*arguments: str, status: int = 0) -> str:
        command = [program, "-r", str(filled.location.root), "fsck", *arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == status, found.stderr
        return found.stdout + found.stderr

    assert run("--read-data") == "looked at 3 packs, read 7 chunks, found nothing wrong\n"
    assert "looked at 3 packs" in run("--read-data=50%")
    flip(pack_of(filled, "b"))
    assert "read 0 chunks" in run()
    said = run("--read-data", status=4)
    assert "holds other bytes" in said
    assert "nothing wrong" not in said
    assert "error[damaged]: damaged: b@1" in said
    event, *_ = filled.location.store.glob("events/1/*")
    event.unlink()
    assert f"error[damaged]: damaged: b@1, events/1/{event.name}; push" in run(status=4)
    assert f"written again: events/1/{event.name}\n" in run("--repair", status=4)
    assert json.loads(run("--json", status=4).partition("\nerror")[0])["damaged"] == ["b@1"]
    assert "share-invalid" in run("--read-data=all", status=2)
    with pytest.raises(CkptError):
        filled.pull("b")


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize("when", ["before it is looked at", "while it is read"])
def test_a_document_that_a_collection_took_meanwhile_is_no_damage(
    filled: ckpt.Repository, monkeypatch: pytest.MonkeyPatch, when: str, repair: bool
) -> None:
    copies, store = filled._registry.copies, filled._store
    everything, get, taken = copies.all, store.get, filled.get("a@2").push
    left = [True]

    def take() -> None:
        if left:
            left.pop()
            with ckpt.open(filled.location.root) as other:
                other.rm("a@2")
                other.gc(grace=0)

    def all_and_take() -> list[StoreCopy]:
        found = everything()
        take()
        return found

    def take_and_get(key: str) -> bytes:
        if taken in key:
            take()
        return get(key)

    if when == "while it is read":
        monkeypatch.setattr(store, "get", take_and_get)
    else:
        monkeypatch.setattr(copies, "all", all_and_take)
    found = filled.fsck(repair=repair)
    assert not left
    assert found.is_clean
    assert found.rewritten == []
    assert not list(filled.location.store.glob(f"documents/*/*{taken}.json"))


def test_a_document_that_is_on_its_way_is_no_damage(
    filled: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies, everything = filled._registry.copies, filled._registry.copies.all

    def stop(*_: object) -> None:
        raise AccessError("permission", "stopped")

    def commit_and_list() -> list[StoreCopy]:
        with monkeypatch.context() as patch, ckpt.open(filled.location.root) as other:
            patch.setattr("ckpt.service.acknowledge.copy_pending", stop)
            with pytest.raises(AccessError):
                other.push(state(5), "a")
        return everything()

    monkeypatch.setattr(copies, "all", commit_and_list)
    assert filled.fsck().is_clean
    monkeypatch.setattr(copies, "all", everything)
    assert filled.fsck().is_clean
    next(filled.location.store.glob(f"documents/1/*-{filled.get('a').push}.json")).unlink()
    assert len(filled.fsck().copies) == 1


def test_a_store_that_lost_most_is_looked_at_with_few_questions(repo: ckpt.Repository) -> None:
    def asked(versions: int) -> int:
        for step in range(versions):
            repo.push({"w": torch.rand(8)}, "a", step=step)
        for place in ("packs", "documents"):
            for path in (repo.location.root / "store" / place).rglob("*.*"):
                path.unlink()
        seen: list[str] = []

        def hook(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            seen.append(kind)
            return act(*args)

        with observed(hook):
            found = repo.fsck()
        assert len(found.damaged) == len(found.broken) == len(found.copies) == len(repo.log("a"))
        return seen.count("sql")

    few = asked(2)
    for pack in repo._registry.repairs.packs():
        repo._registry.repairs.mark([pack.pack.id], broken=False)
    assert asked(10) == few
