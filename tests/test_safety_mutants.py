"""Each step of safety is shown to be needed: without it, the check of its own promise fails."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from crash_driver import MODEL, check_books, file_of
from safety_mutants import OTHERS, TELLING, Mutant
from sqlalchemy import Select, Update
from sqlalchemy.dialects import postgresql
from test_power_loss import OPERATIONS, Audit, World, crash_states, hurry, recorded
from trials import Trials

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, ConflictError, IntegrityError
from ckpt.registry.rebuild import fence
from ckpt.service.config import locate
from ckpt.service.gc import _delete
from ckpt.service.rebuild import rebuild_registry
from ckpt.storage.local import LocalStore

PUSH = "c" * 32  # a push that is made by hand
BASE = ("a", "b", "c")
MIXED = ("a", "b", "new")

Act = Callable[[], object]


class StoppedError(BaseException):
    """The process does nothing any more."""


@contextmanager
def repository(folder: Path) -> Iterator[ckpt.Repository]:
    """A repository with a version that stays, and ``m@1``."""
    with ckpt.open(folder) as repo:
        push(repo, "kept", model="kept")
        push(repo, *BASE)
        yield repo


def push(repo: ckpt.Repository, *names: str, model: str = MODEL, step: int = 1) -> ckpt.Version:
    file = repo.location.root / "pushed.safetensors"
    file.write_bytes(file_of(*names))
    return repo.push_file(file, model, step=step)


def assert_pulls(repo: ckpt.Repository, version: str | ckpt.Version, *names: str) -> None:
    file = repo.location.root / "pulled.safetensors"
    repo.pull_file(version, file, force=True)
    assert file.read_bytes() == file_of(*names)


@contextmanager
def by_hand(repo: ckpt.Repository) -> Iterator[sqlite3.Connection]:
    """The registry's own file, to do what no act of ours does."""
    with closing(sqlite3.connect(repo.location.registry, isolation_level=None)) as connection:
        yield connection


def pack_of(repo: ckpt.Repository, reference: str = f"{MODEL}@1") -> str:
    (pack,) = repo._registry.books.read_plan(repo.get(reference).push)[0]
    return pack


def path_of(repo: ckpt.Repository, pack: str) -> Path:
    (path,) = repo.location.store.glob(f"packs/*/{pack}.safetensors")
    path.chmod(0o600)
    return path


@contextmanager
def before_next(kind: str, act: Act) -> Iterator[None]:
    """Do something once, before the next effect of this kind."""
    waiting = [kind]

    def hook(found: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if found in waiting:
            waiting.remove(found)
            act()
        return effect(*args)

    with observed(hook):
        yield
    assert not waiting, f"there was no {kind}"


def statements(act: Act) -> list[Any]:
    """What is asked of the registry meanwhile."""
    asked: list[Any] = []

    def hook(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        asked.extend(args[:1] if kind == "sql" else ())
        return effect(*args)

    with observed(hook):
        act()
    return asked


def text_of(statement: Any) -> str:
    """A statement as PostgreSQL would get it, locks and all."""
    if not isinstance(statement, Select | Update):
        return ""
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]
    return " ".join(str(statement.compile(dialect=dialect)).split())


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


@contextmanager
def small_packs() -> Iterator[None]:
    """Each tensor gets a pack of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt.storage.packs.PACK_BYTES", 4096)
        yield


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
        repo._registry.repairs.mark(pack, broken=True)
        assert repo._registry.books.open_push(PUSH, "push", {pack}) == []


def a_damaged_pack_is_not_shared(folder: Path) -> None:
    with repository(folder) as repo:
        path = path_of(repo, pack_of(repo))
        path.write_bytes(path.read_bytes()[:4200])
        version = push(repo, *MIXED, step=2)
        assert_pulls(repo, version, *MIXED)


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


def rebuilt(folder: Path) -> None:
    location = locate(folder)
    rebuild_registry(location, LocalStore(location.store))


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


def flip(path: Path) -> None:
    body = bytearray(path.read_bytes())
    body[5000] ^= 1
    path.write_bytes(body)


def what_fsck_found_broken_is_written_again(folder: Path) -> None:
    with repository(folder) as repo:
        flip(path_of(repo, pack_of(repo)))
        repo.fsck(read_data=1)
        assert_pulls(repo, push(repo, *BASE, step=2), *BASE)


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


# Not NameError and the like: a mutant that does not even run shows nothing.
_FAILURES = (AssertionError, pytest.fail.Exception, CkptError, OSError, ValueError)


def is_killed(mutant: Mutant, folder: Path) -> bool:
    """Whether the check of its promise fails for a mutant."""
    check: Callable[[Path], None] = globals()[mutant.promise]
    with mutant.applied():
        try:
            check(folder)
        except _FAILURES:
            return True
    return False


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.mark.torture("T7", unit="mutants")
def test_every_step_of_safety_that_is_left_out_is_noticed(trials: Trials, tmp_path: Path) -> None:
    """Five in an ordinary run, all of them in a longer one; the check passes without a mutant."""
    chosen = TELLING if trials.seconds is None else (*TELLING, *OTHERS)
    for seed in trials.seeds(1):
        checked: set[str] = set()
        for number, mutant in enumerate(random.Random(seed).sample(chosen, len(chosen))):
            if mutant.promise not in checked:
                checked.add(mutant.promise)
                globals()[mutant.promise](made(tmp_path / f"{number}-whole"))
            assert is_killed(mutant, made(tmp_path / f"{number}")), f"it lives: {mutant.name}"
            trials.count()
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_every_mutant_leaves_out_what_is_there() -> None:
    """Also those that only a longer run tries."""
    for mutant in (*TELLING, *OTHERS):
        assert mutant.promise in globals(), mutant.name
        with mutant.applied():
            pass


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_push_is_never_refused_whatever_is_collected_beside_it(tmp_path: Path) -> None:
    """With grace 0, before each act of a push that shares what was just removed."""
    with repository(tmp_path) as repo, ckpt.open(tmp_path) as other:
        for moment in itertools.count():
            shared, new = f"{moment}-shared", f"{moment}-new"
            repo.rm(push(repo, shared, f"{moment}-other"))
            collection = Beside(moment, lambda: other.gc(grace=0, allow=["much"]))
            with observed(collection):
                version = push(repo, shared, new)
            assert_pulls(repo, version, shared, new)
            if collection.seen <= moment:
                break
    assert moment > 10


class Beside:
    """A hook that does something before one of the acts that are not the registry's own: inside
    its transactions SQLite lets nobody write."""

    def __init__(self, moment: int, act: Act) -> None:
        self.seen = 0
        self._moment, self._act = moment, act

    def __call__(self, kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if not kind.startswith("sql"):
            self.seen += 1
            if self.seen == self._moment + 1:
                with observed(lambda kind, effect, args: effect(*args)):
                    self._act()
        return effect(*args)
