"""What a push promises, each as a check that fails when the step that keeps it is left out."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from crash_driver import MODEL, check_books
from promise_scene import (
    BASE,
    MIXED,
    PUSH,
    assert_pulls,
    before_next,
    by_hand,
    flip,
    pack_of,
    path_of,
    push,
    repository,
    small_packs,
    statements,
    text_of,
)
from test_power_loss import OPERATIONS, Audit, World, crash_states, recorded

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, ConflictError, IntegrityError
from ckpt.registry.fence import fence


def refused_after(repo: ckpt.Repository, *spoiled: str) -> str:
    """The code of the error of a push that shares a pack, and loses this between claim and
    commit."""

    def spoil() -> None:
        with by_hand(repo) as connection:
            for statement in spoiled:
                connection.execute(statement)

    with before_next("fsync", spoil), pytest.raises(CkptError) as refused:
        push(repo, *MIXED, step=2)
    assert [version.number for version in repo.log(MODEL)] == [1]
    return refused.value.code


def a_commit_refuses_a_pack_that_is_gone(folder: Path) -> None:
    with repository(folder) as repo:
        gone = [f"DELETE FROM {table}" for table in ("refs", "claims", "chunks", "packs")]
        assert refused_after(repo, *gone) == "pack-gone"


def a_commit_refuses_a_condemned_pack(folder: Path) -> None:
    with repository(folder) as repo:
        assert refused_after(repo, "UPDATE packs SET state = 'condemned'") == "pack-gone"


def a_commit_refuses_a_push_that_is_not_open(folder: Path) -> None:
    with repository(folder) as repo:
        ended = "UPDATE pushes SET state = 'aborted' WHERE state = 'open'"
        assert refused_after(repo, ended, "DELETE FROM claims") == "push-expired"


def a_commit_refuses_what_can_not_be_read(folder: Path) -> None:
    with repository(folder) as repo:
        assert refused_after(repo, "DELETE FROM chunks") == "undecodable"


def a_push_that_ended_has_no_claims(folder: Path) -> None:
    with repository(folder) as repo:
        push(repo, *MIXED, step=2)
        repo._registry.books.open_push(PUSH, "push", {pack_of(repo)})
        repo._registry.books.abort(PUSH)
    check_books(folder / ".ckpt")


def a_version_keeps_the_packs_that_it_shares(folder: Path) -> None:
    with repository(folder) as repo:
        push(repo, *MIXED, step=2)
        repo.rm(f"{MODEL}@1")
        repo.gc(grace=0, allow=["much"])
        assert_pulls(repo, MODEL, *MIXED)


def a_number_never_comes_back(folder: Path) -> None:
    with repository(folder) as repo:
        repo.rm(f"{MODEL}@1")
        assert push(repo, *BASE).number == 2


def only_an_open_push_can_claim(folder: Path) -> None:
    with repository(folder) as repo:
        repo._registry.books.open_push(PUSH, "push")
        repo._registry.books.abort(PUSH)
        with pytest.raises(ConflictError, match="not open"):
            repo._registry.books.claim(PUSH, {pack_of(repo)})


def only_an_open_push_can_register_a_pack(folder: Path) -> None:
    with repository(folder) as repo:
        small_packs_of_a_push(repo, ends_at=1)
        with by_hand(repo) as connection:
            rows = connection.execute(
                "SELECT count(*) FROM packs JOIN pushes ON pushes.id = packs.push"
                " WHERE pushes.state = 'aborted'"
            ).fetchone()
        assert rows == (0,)


def small_packs_of_a_push(repo: ckpt.Repository, ends_at: int) -> None:
    """A push of several packs, one by one, that somebody ends at a ``link``."""
    links = itertools.count()

    def hook(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if kind == "link" and next(links) == ends_at - 1:
            with by_hand(repo) as connection:
                connection.execute("UPDATE pushes SET state = 'aborted' WHERE state = 'open'")
                connection.execute("DELETE FROM claims")
        return effect(*args)

    with small_packs(), observed(hook), pytest.raises(ConflictError, match="not open"):
        push(repo, "p", "q", "r", step=2)


def failing_at(kind: str, number: int) -> Callable[..., Any]:
    """A hook: the effect of this kind and number fails."""
    seen = itertools.count()

    def hook(found: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if found == kind and next(seen) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return effect(*args)

    return hook


def a_registered_pack_is_claimed(folder: Path) -> None:
    """A collection beside a push of several packs leaves those that are finished."""
    with repository(folder) as repo:
        creates = itertools.count()

        def hook(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            if kind == "create" and next(creates) == 1:
                with ckpt.open(folder) as other:
                    assert other.gc(grace=0, allow=["much"]).freed == ()
            return effect(*args)

        with small_packs(), observed(hook):
            push(repo, "p", "q", "r", step=2)
        assert_pulls(repo, MODEL, "p", "q", "r")


def an_abort_leaves_finished_packs(folder: Path) -> None:
    """They are what the next push of the same content shares."""
    with repository(folder) as repo, small_packs():
        with observed(failing_at("create", 1)), pytest.raises(CkptError):
            push(repo, "p", "q", "r", step=2)
        again = push(repo, "p", "q", "r", step=2)
        packs = repo._registry.books.read_plan(again.push)[0]
        assert sum(not pack.startswith(again.push) for pack in packs) == 1


def a_claimed_pack_survives_a_collection(folder: Path) -> None:
    with repository(folder) as repo:
        pack = pack_of(repo)
        repo._registry.books.open_push(PUSH, "push", {pack})
        repo.rm(f"{MODEL}@1")
        assert repo.gc(grace=0).freed == ()
        assert path_of(repo, pack).exists()


def a_condemned_pack_is_rescued(folder: Path) -> None:
    with repository(folder) as repo:
        repo.rm(f"{MODEL}@1")
        repo.gc()
        assert push(repo, *BASE, step=2).new_bytes == 0
        repo.gc(grace=0)
        assert_pulls(repo, MODEL, *BASE)


def a_rescue_holds_the_exclusive_lock(folder: Path) -> None:
    with repository(folder) as repo:
        pack = pack_of(repo)
        repo.rm(f"{MODEL}@1")
        repo.gc()
        asked = statements(lambda: repo._registry.books.open_push(PUSH, "push", {pack}))
        texts = [text_of(statement) for statement in asked]
        (rescue,) = [at for at, text in enumerate(texts) if text.startswith("UPDATE packs")]
        locks = [text for text in texts[:rescue] if text.startswith("SELECT packs.id")]
        assert locks[-1].endswith("FOR UPDATE")


def a_broken_pack_is_not_claimed(folder: Path) -> None:
    with repository(folder) as repo:
        pack = pack_of(repo)
        repo._registry.repairs.mark([pack], broken=True)
        assert repo._registry.books.open_push(PUSH, "push", {pack}) == []


def a_damaged_pack_is_not_shared(folder: Path) -> None:
    with repository(folder) as repo:
        path = path_of(repo, pack_of(repo))
        path.write_bytes(path.read_bytes()[:4200])
        version = push(repo, *MIXED, step=2)
        assert_pulls(repo, version, *MIXED)


def a_push_is_acknowledged_with_its_document(folder: Path) -> None:
    with repository(folder) as repo:
        version = push(repo, *MIXED, step=2)
        assert list(repo.location.store.glob(f"documents/1/*-{version.push}.json"))


def a_tag_is_acknowledged_with_its_event(folder: Path) -> None:
    with repository(folder) as repo:
        repo.tag(f"{MODEL}@1", "best")
        (event,) = repo.location.store.glob("events/1/*.json")
        assert json.loads(event.read_bytes())["alias"] == "best"


def a_push_into_a_lost_registry_is_not_acknowledged(folder: Path) -> None:
    """It is rebuilt while the document is on its way into the store."""
    with repository(folder) as repo:
        database = repo._registry._database
        links = itertools.count()

        def hook(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            if kind == "link" and next(links) == 1:
                fence(database)
            return effect(*args)

        with observed(hook), pytest.raises(ConflictError) as refused:
            push(repo, *MIXED, step=2)
        assert refused.value.code == "registry-changed"


def a_tag_in_a_lost_registry_is_not_acknowledged(folder: Path) -> None:
    with repository(folder) as repo:
        database = repo._registry._database
        lost = before_next("link", lambda: fence(database))
        with lost, pytest.raises(ConflictError) as refused:
            repo.tag(f"{MODEL}@1", "best")
        assert refused.value.code == "registry-changed"


def a_push_survives_the_loss_of_power(folder: Path) -> None:
    name = "push of new content"
    world = World(folder / "disk", folder / "files", 0)
    states = list(crash_states(recorded(name, world), random.Random(0)))
    acknowledged = [state for state in states if state[0] == 1]
    Audit(OPERATIONS[name], world).look_at(acknowledged)


def a_file_gets_its_name_when_it_is_complete(folder: Path) -> None:
    """A write that the disk says it took, and did not."""
    with repository(folder) as repo:

        def hook(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            if kind == "write":
                handle, data, offset = args
                effect(handle, data[:1], offset)
                return len(data)
            return effect(*args)

        with observed(hook), pytest.raises(CkptError):
            push(repo, *MIXED, step=2)
        assert len(list(repo.location.store.glob("packs/*/*"))) == 2


def a_pack_of_another_size_is_not_registered(folder: Path) -> None:
    with repository(folder) as repo:

        def hook(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            result = effect(*args)
            if kind == "link" and "/packs/" in str(args[1]):
                os.truncate(args[1], 4200)
            return result

        with observed(hook), pytest.raises(IntegrityError):
            push(repo, *MIXED, step=2)
        assert [version.number for version in repo.log(MODEL)] == [1]


def what_is_read_is_what_was_pushed(folder: Path) -> None:
    with repository(folder) as repo:
        flip(path_of(repo, pack_of(repo)))
        with pytest.raises(IntegrityError):
            assert_pulls(repo, f"{MODEL}@1", *BASE)


def what_fsck_found_broken_is_written_again(folder: Path) -> None:
    with repository(folder) as repo:
        flip(path_of(repo, pack_of(repo)))
        repo.fsck(read_data=1)
        assert_pulls(repo, push(repo, *BASE, step=2), *BASE)
