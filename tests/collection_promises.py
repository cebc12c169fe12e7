"""What removals, collections and rebuilds promise, each as a check that fails without its step."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from crash_driver import MODEL
from promise_scene import (
    BASE,
    MIXED,
    PUSH,
    StoppedError,
    assert_pulls,
    by_hand,
    pack_of,
    path_of,
    push,
    rebuilt,
    repository,
    statements,
    text_of,
)

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import ConflictError
from ckpt.registry.fence import fence
from ckpt.service.gc import _delete


def a_removal_looks_again_under_the_lock(folder: Path) -> None:
    """(e): the exclusive lock, then, in a later statement, no reference and no claim."""
    with repository(folder) as repo:
        pack, database = pack_of(repo), repo._registry._database
        with by_hand(repo) as connection:
            connection.execute("UPDATE packs SET state = 'condemned', condemned_at = 0")
        remove = repo._registry.collector._remove
        gone: list[Any] = []

        def act() -> None:
            gone.extend(database.write(lambda transaction: remove([pack], "", transaction)))

        texts = [text_of(statement) for statement in statements(act)]
        assert gone == []
        (lock,) = [at for at, text in enumerate(texts) if "FOR UPDATE SKIP LOCKED" in text]
        later = texts[lock + 1]
        assert "FROM refs WHERE refs.pack = packs.id" in later
        assert "FROM claims WHERE claims.pack = packs.id" in later


def a_needed_pack_is_not_condemned(folder: Path) -> None:
    with repository(folder) as repo:
        packs = [finished.pack for finished in repo._registry.repairs.packs()]
        repo._registry.collector.condemn(packs)
        assert {one.pack.state for one in repo._registry.repairs.packs()} == {"live"}


def a_sweep_leaves_packs_with_rows(folder: Path) -> None:
    with repository(folder) as repo:
        assert repo.gc(grace=0).orphans == ()
        assert_pulls(repo, MODEL, *BASE)


def a_sweep_leaves_packs_of_open_pushes(folder: Path) -> None:
    with repository(folder) as repo:
        repo._registry.books.open_push(PUSH, "push")
        key = f"packs/cc/{PUSH}-0.safetensors"
        repo._store.put(key, b"bytes")
        assert repo.gc(grace=0).orphans == ()
        assert repo._store.size(key) == 5


def a_sweep_looks_at_pushes_and_then_at_rows(folder: Path) -> None:
    """(f): the other way round it misses a row that was inserted between."""
    with repository(folder) as repo:
        keys = [finished.pack.key for finished in repo._registry.repairs.packs()]
        asked = statements(lambda: repo._registry.collector.sweep(keys, ""))
        texts = [text_of(statement) for statement in asked]
        states = next(at for at, text in enumerate(texts) if "FROM pushes" in text)
        rows = next(at for at, text in enumerate(texts) if text.startswith("SELECT packs.key"))
        assert states < rows
        assert texts[states].endswith("FOR SHARE")


def no_key_dies_without_its_event(folder: Path) -> None:
    with repository(folder) as repo:
        key = f"packs/cc/{PUSH}-0.safetensors"
        repo._registry.books.open_push(PUSH, "push")
        repo._store.put(key, b"bytes")
        repo._registry.books.abort(PUSH)
        gone = {key, f"packs/{pack_of(repo)[:2]}/{pack_of(repo)}.safetensors"}
        repo.rm(f"{MODEL}@1")
        repo.gc(grace=0)
        events = [json.loads(path.read_bytes()) for path in repo.location.store.glob("events/1/*")]
        assert {event["key"] for event in events if event["kind"] == "dead"} == gone
        assert not [key for key in gone if repo._store.size(key) is not None]


def dead_key(repo: ckpt.Repository) -> str:
    """A key that is dead, and whose event is not in the store yet."""
    pack = pack_of(repo)
    repo.rm(f"{MODEL}@1")
    repo._registry.collector.condemn(one.pack for one in repo._registry.collector.unneeded())
    (gone,) = repo._registry.collector.remove(0, "")
    assert gone.id == pack
    return gone.key


def no_delete_before_the_dead_event_is_in_the_store(folder: Path) -> None:
    with repository(folder) as repo:
        key = dead_key(repo)
        _delete(repo._store, repo._registry)
        assert repo._store.size(key) is not None


def no_delete_from_a_lost_registry(folder: Path) -> None:
    """It was rebuilt after the collector had read which keys are dead."""
    with repository(folder) as repo:
        key = dead_key(repo)
        database, copies = repo._registry._database, repo._registry.copies

        def copied(event: str) -> bool:
            fence(database)
            return True

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(copies, "is_copied", copied)
            _delete(repo._store, repo._registry)
        assert repo._store.size(key) is not None


def gc_refuses_when_the_store_knows_more(folder: Path) -> None:
    with repository(folder) as repo:
        repo._store.put(f"documents/1/000000000099-{'f' * 32}.json", b"{}")
        with pytest.raises(ConflictError, match="--allow unknown"):
            repo.gc(grace=0)


def stop(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """A hook: everything stops before a pack is deleted."""
    if kind == "unlink" and "/packs/" in str(args):
        raise StoppedError
    return effect(*args)


def a_rebuild_never_uses_a_dead_key(folder: Path) -> None:
    """Its DELETE may be on its way."""
    with repository(folder) as repo:
        pack = pack_of(repo)
        repo.rm(f"{MODEL}@1")
        with suppress(StoppedError), observed(stop):
            repo.gc(grace=0)
        assert path_of(repo, pack).exists()
    rebuilt(folder)
    with ckpt.open(folder) as repo:
        assert pack not in {finished.pack.id for finished in repo._registry.repairs.packs()}
        assert [dead.key for dead in repo._registry.collector.dead()] == [
            f"packs/{pack[:2]}/{pack}.safetensors"
        ]


def a_rebuild_brings_nothing_back(folder: Path) -> None:
    with repository(folder) as repo:
        push(repo, *MIXED, step=2)
        repo.rm(f"{MODEL}@1")
    rebuilt(folder)
    with ckpt.open(folder) as repo:
        assert [version.number for version in repo.log(MODEL)] == [2]


def a_rebuild_counts_nothing_that_lands_late(folder: Path) -> None:
    with repository(folder) as repo:
        (late,) = repo.location.store.glob(f"documents/1/*-{repo.get(f'{MODEL}@1').push}.json")
        aside = folder / late.name
    late.rename(aside)
    rebuilt(folder)
    aside.rename(late)
    rebuilt(folder)
    with ckpt.open(folder) as repo:
        assert [model.name for model in repo.models()] == ["kept"]


def a_rebuild_gives_no_number_again(folder: Path) -> None:
    with repository(folder) as repo:
        repo.rm(push(repo, *MIXED, step=2))
        repo.gc(grace=0)
    rebuilt(folder)
    with ckpt.open(folder) as repo:
        assert push(repo, "d", step=3).number == 3


def prune_keeps_what_an_alias_names(folder: Path) -> None:
    with repository(folder) as repo:
        push(repo, *MIXED, step=2)
        repo.tag(f"{MODEL}@1", "best")
        assert repo.prune(MODEL, keep=["last:1"], dry_run=True).victims == ()


def rm_refuses_what_an_alias_names(folder: Path) -> None:
    with repository(folder) as repo:
        repo.tag(f"{MODEL}@1", "best")
        with pytest.raises(ConflictError, match="kept by the alias"):
            repo.rm(f"{MODEL}@1")
