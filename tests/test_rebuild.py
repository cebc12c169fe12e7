"""A registry that was lost comes back from the store: what was acknowledged, and nothing removed."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chapter_models import MLP
from sqlalchemy.exc import OperationalError
from torch import nn

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, ConflictError, IntegrityError, StorageError
from ckpt.service import counted as service_counted
from ckpt.service import push, rebuild
from ckpt.service.config import locate
from ckpt.service.opening import upgrade_registry
from ckpt.service.rebuild import Rebuilt, rebuild_registry
from ckpt.storage.local import LocalStore


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{n}": torch.rand(32, 32, generator=generator) for n in range(3)}


def rebuilt(folder: Path) -> Rebuilt:
    location = locate(folder)
    return rebuild_registry(location, LocalStore(location.store))


@pytest.fixture(scope="module")
def _filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("filled")
    with ckpt.open(folder) as repo:
        repo.push(state(1), "a", step=1, metrics={"loss": 0.5, "bad": float("nan")}, alias="best")
        repo.push({**state(1), "w0": torch.ones(4)}, "a", labels={"who": "me"}, message="second")
        repo.push(state(3), "a", run="other", alias=["best", "keep"])
        repo.rm(repo.push(state(4), "a"))
        repo.tag("a@1", "first")
        repo.untag("a:keep")
        repo.annotate("a@2", metrics={"acc": 1.0}, labels={"x": "y"}, remove=["who"])
        repo.push(MLP(), "net", inputs=(torch.rand(2, 20),))
        repo.push(nn.Sequential(nn.Linear(20, 2)), "net")
        repo.prune("net", keep=["last:9"], save=True)
    return folder


@pytest.fixture
def filled(tmp_path: Path, _filled: Path) -> Path:
    """A repository with everything that a document or an event can say."""
    shutil.copytree(_filled, tmp_path, dirs_exist_ok=True)
    return tmp_path


def told(folder: Path) -> dict[str, Any]:
    """Everything that can be asked of a registry."""
    with ckpt.open(folder, create=False) as repo:
        models = {model.name: model.versions for model in repo.models()}
        versions = {name: repo.log(name) for name in models}
        return {
            "models": models,
            "versions": {name: [repr(version) for version in versions[name]] for name in models},
            "documents": [repo.document(v) for found in versions.values() for v in found],
            "environments": [repo.environment(v) for found in versions.values() for v in found],
            "classes": repo.classes(),
            "usage": repo.du(),
            "policy": repo._registry.queries.policy("net"),
        }


def test_everything_that_was_acknowledged_comes_back(filled: Path) -> None:
    before = told(filled)
    (filled / ".ckpt" / "registry.db").unlink()
    found = rebuilt(filled)
    assert (found.versions, found.damaged, found.unreadable, found.kept) == (5, (), (), None)
    after = told(filled)
    # The bytes of the removed version are of no push that is still known by a version.
    assert {**after, "usage": None} == {**before, "usage": None}
    with ckpt.open(filled) as repo:
        assert torch.equal(repo.pull("a:first")["w1"], state(1)["w1"])
        assert repo.verify("net@1", trust=[MLP]).verdict == "outputs-exact"
        assert repo.get("a").reference == "a@3"
        assert repo.push(state(5), "a").number == 5  # 4 was given once, and never again


def test_a_registry_that_cannot_be_closed_now_is_not_replaced(filled: Path) -> None:
    """Others may go on with it, and what they are told would be gone."""
    before = told(filled)

    def fail(kind: str, act: Any, given: Any) -> Any:
        if kind == "sql.commit":
            raise OperationalError(kind, None, sqlite3.OperationalError("disk I/O error"))
        return act(*given)

    with observed(fail), pytest.raises(StorageError, match="run again"):
        rebuilt(filled)
    assert not list((filled / ".ckpt" / "store").glob("epochs/*"))
    assert told(filled) == before


def test_a_second_rebuild_gives_the_same(filled: Path) -> None:
    rebuilt(filled)
    first = told(filled)
    with ckpt.open(filled) as repo:
        repo.push(state(6), "b")
        repo.tag("b@1", "new")
    second = told(filled)
    assert rebuilt(filled).epoch == 3
    assert told(filled) == second
    assert first["models"] | {"b": 1} == second["models"]


def test_a_damaged_registry_is_kept_beside_the_new_one(filled: Path) -> None:
    before = told(filled)
    (filled / ".ckpt" / "registry.db").write_bytes(b"SQLite format 3\0" + bytes(5000))
    kept = rebuilt(filled).kept
    assert kept is not None
    assert Path(kept).read_bytes()[:6] == b"SQLite"
    assert told(filled)["versions"] == before["versions"]


@pytest.mark.parametrize("moment", ["commit", "acknowledge_push"])
def test_a_push_in_flight_is_refused_and_its_process_goes_on(
    filled: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    act = getattr(push, moment)

    def rebuild_first(*arguments: Any) -> Any:
        rebuilt(filled)
        return act(*arguments)

    with ckpt.open(filled) as old:
        with monkeypatch.context() as patch:
            patch.setattr(push, moment, rebuild_first)
            with pytest.raises(ConflictError):
                old.push(state(7), "a")
        assert old.get("a").reference == "a@3"
        old.rm("a@2")
        assert old.push(state(7), "a").number == 5
        assert torch.equal(old.pull("a")["w1"], state(7)["w1"])


def test_what_a_push_left_that_the_new_registry_never_heard_of_goes_after_a_day(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(BaseException):
        """The process died here."""

    kinds: set[str] = set()

    def die(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
        kinds.add(kind)
        if "link" in kinds:
            raise StoppedError
        return act(*args)

    left = filled / ".ckpt" / "store" / ".tmp"
    with ckpt.open(filled) as old, pytest.raises(StoppedError), observed(die):
        old.push(state(7), "a")
    rebuilt(filled)
    with ckpt.open(filled) as repo:
        repo.gc(grace=0)
        assert len(list(left.iterdir())) == 1
        monkeypatch.setattr("ckpt.storage.store._ABANDONED_SECONDS", -1)
        repo.gc(grace=0)
        assert not list(left.iterdir())


def test_what_is_removed_before_or_after_does_not_come_back(filled: Path) -> None:
    rebuilt(filled)
    with ckpt.open(filled) as repo:
        repo.rm("a@2")
        repo.gc(grace=0)
    rebuilt(filled)
    with ckpt.open(filled) as repo:
        assert [version.number for version in repo.log("a")] == [3, 1]
        repo.gc(grace=0)
        assert torch.equal(repo.pull("a@1")["w2"], state(1)["w2"])
        assert torch.equal(repo.pull("a@3")["w2"], state(3)["w2"])


def test_a_pack_that_is_missing_is_told_and_its_version_kept(filled: Path) -> None:
    with ckpt.open(filled) as repo:
        push = repo.get("a@3").push
    (pack,) = (filled / ".ckpt" / "store").glob(f"packs/*/{push}-0.safetensors")
    pack.unlink()
    found = rebuilt(filled)
    assert found.damaged == ("a@3",)
    with ckpt.open(filled) as repo:
        with pytest.raises(CkptError):
            repo.pull("a@3")
        again = repo.push(state(3), "a")
        assert torch.equal(repo.pull(again)["w0"], state(3)["w0"])


def test_a_pack_that_is_put_back_after_a_rebuild_is_needed_and_no_leftover(filled: Path) -> None:
    packs, away = filled / ".ckpt" / "store" / "packs", filled / "away"
    packs.rename(away)
    assert len(rebuilt(filled).damaged) == 5
    away.rename(packs)
    before = set(packs.glob("*/*"))
    with ckpt.open(filled) as repo:
        repo.gc(grace=0)
        assert sorted(repo.fsck().damaged) == ["a@1", "a@2", "a@3", "net@1", "net@2"]
    assert len(before - set(packs.glob("*/*"))) == 1  # that of the version that was removed
    assert rebuilt(filled).damaged == ()
    with ckpt.open(filled) as repo:
        assert torch.equal(repo.pull("a@3")["w1"], state(3)["w1"])
        assert repo.fsck(read_data=1).is_clean


def test_a_version_whose_pack_a_rebuild_missed_is_repaired_by_its_content(filled: Path) -> None:
    with ckpt.open(filled) as repo:
        push = repo.get("a@3").push
    (pack,) = (filled / ".ckpt" / "store").glob(f"packs/*/{push}-0.safetensors")
    pack.unlink()
    rebuilt(filled)
    with ckpt.open(filled) as repo:
        assert repo.fsck().damaged == ["a@3"]
        repo.push(state(3), "other")
        assert repo.fsck(repair=True).repaired == ["a@3"]
        assert torch.equal(repo.pull("a@3")["w0"], state(3)["w0"])


def damage(path: Path, body: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(body)


def copies(folder: Path, place: str) -> list[Path]:
    return sorted((folder / ".ckpt" / "store" / place / "1").iterdir())


HARM: dict[str, Callable[[Path], None]] = {
    "missing": Path.unlink,
    "cut": lambda path: damage(path, path.read_bytes()[:-1]),
    "other": lambda path: damage(path, path.read_bytes().replace(b'"', b"'", 1)),
    "a number": lambda path: damage(path, b"5"),
    "empty": lambda path: damage(path, b"{}"),
    "deep": lambda path: damage(path, b"[" * 100_000),
}


@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("place", ["documents", "events"])
def test_a_registry_that_knows_more_than_its_store_is_not_replaced(
    filled: Path, place: str, harm: str
) -> None:
    before = told(filled)
    HARM[harm](copies(filled, place)[-1])
    with pytest.raises(IntegrityError, match=r"in the store is damaged|the store lacks") as caught:
        rebuilt(filled)
    assert caught.value.code in ("copy-missing", "copy-damaged")
    assert told(filled) == before
    with ckpt.open(filled) as repo:
        assert not repo.fsck(repair=True).damaged
        repo.push(state(9), "a")
    rebuilt(filled)
    with ckpt.open(filled) as repo:
        assert [version.number for version in repo.log("a")] == [5, 3, 2, 1]


def test_a_rebuild_beside_a_writer_misses_nothing_and_finds_nothing_missing(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ckpt.open(filled) as repo:
        listed = rebuild._Reader.contents

        def contents(reader: Any) -> Any:
            found = listed(reader)
            with suppress(ConflictError):  # the second time it is closed
                repo.push(state(6), "a", step=6)
                repo.rm("a@2")
            return found

        monkeypatch.setattr(rebuild._Reader, "contents", contents)
        assert rebuilt(filled).versions == 5
    with ckpt.open(filled) as repo:
        assert [version.number for version in repo.log("a")] == [5, 3, 1]


def test_a_document_that_is_collected_after_it_was_listed_is_no_damage(
    filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, removed = rebuild._read_version, threading.Event()

    def remove_first(store: Any, info: Any) -> Any:
        if not removed.is_set():
            removed.set()
            with ckpt.open(filled) as repo:
                repo.rm("a@2")
                repo.gc(grace=0)
        return read(store, info)

    monkeypatch.setattr(rebuild, "_read_version", remove_first)
    listed = list(LocalStore(filled / ".ckpt" / "store").list("documents/"))
    monkeypatch.setattr(rebuild, "counted", counted_of(listed))
    assert rebuilt(filled).versions == 4
    with ckpt.open(filled) as repo:
        assert [version.number for version in repo.log("a")] == [3, 1]


def counted_of(documents: Sequence[Any]) -> Callable[..., Any]:
    """As a server lists them: a page at once, of which some are gone when they are read."""
    counted = service_counted.counted
    return lambda store, place, *more: (
        iter(documents) if place == "documents/" else counted(store, place, *more)
    )


def test_a_rebuild_elsewhere_does_not_hide_what_a_registry_acknowledged_since(
    filled: Path, tmp_path: Path
) -> None:
    """Also not what its last process, which is open still, has not noted as copied."""
    location = locate(filled)
    store = LocalStore(location.store)
    with ckpt.open(filled) as repo:
        repo.push(state(6), "a")
        rebuild_registry(replace(location, registry_place=tmp_path / "other.db"), store)
        late = repo.push(state(7), "a")
        before = sorted((filled / ".ckpt").rglob("*"))
        with pytest.raises(IntegrityError, match=rf"knows: {late.reference}; .*documents/2/"):
            rebuilt(filled)
        assert sorted((filled / ".ckpt").rglob("*")) == before
    with pytest.raises(IntegrityError, match=late.reference):
        rebuilt(filled)
    (document,) = store.root.glob(f"documents/1/*{late.push}.json")
    (store.root / "documents" / "2").mkdir(exist_ok=True)
    shutil.copy(document, store.root / "documents" / "2")
    rebuilt(filled)
    with ckpt.open(filled) as repo:
        assert repo.get("a").push == late.push
        repo.gc(grace=0)
        assert torch.equal(repo.pull("a")["w0"], state(7)["w0"])
        assert repo.fsck(read_data=1).is_clean


def test_a_push_whose_document_is_not_in_the_store_yet_keeps_no_rebuild_back(filled: Path) -> None:
    with ckpt.open(filled) as repo, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt.service.acknowledge.copy_pending", stop)
        with pytest.raises(StorageError, match="stopped"):
            repo.push(state(6), "a")
    assert rebuilt(filled).versions == 5


def stop(*_: object) -> None:
    raise StorageError("io", "stopped")


def test_numbers_that_were_given_twice_change_nothing(filled: Path) -> None:
    document = next(one for one in copies(filled, "documents") if b'"number":3' in one.read_bytes())
    push = document.stem.rpartition("-")[2]
    other = "f" * 32
    twice = document.with_name(document.name.replace(push, other))
    twice.write_bytes(document.read_bytes().replace(push.encode(), other.encode()))
    before = sorted((filled / ".ckpt").rglob("*"))
    with pytest.raises(IntegrityError) as caught:
        rebuilt(filled)
    assert caught.value.code == "number-twice"
    assert sorted((filled / ".ckpt").rglob("*")) == before
    twice.unlink()
    assert rebuilt(filled).versions == 5


def test_without_a_registry_a_damaged_document_is_not_passed_over(filled: Path) -> None:
    (filled / ".ckpt" / "registry.db").unlink()
    (document,) = (one for one in copies(filled, "documents") if b'"number":3' in one.read_bytes())
    whole = document.read_bytes()
    damage(document, whole[:-1])
    for _ in range(2):
        with pytest.raises(IntegrityError, match="restore the file from a backup"):
            rebuilt(filled)
    damage(document, whole)
    assert rebuilt(filled).versions == 5


def test_the_registry_of_another_store_is_not_replaced(filled: Path, tmp_path: Path) -> None:
    with ckpt.open(tmp_path / "other") as other:
        other.push(state(1), "mine")
        theirs = other.location.registry
    location = replace(locate(filled), registry_place=theirs)
    with pytest.raises(IntegrityError) as caught:
        rebuild_registry(location, LocalStore(location.store))
    assert caught.value.code == "foreign-store"
    with ckpt.open(tmp_path / "other") as other:
        assert other.get("mine").reference == "mine@1"


def test_a_store_that_is_put_in_place_alone_becomes_a_repository(
    filled: Path, tmp_path: Path
) -> None:
    shutil.copytree(filled / ".ckpt" / "store", tmp_path / "new" / ".ckpt" / "store")
    rebuilt(tmp_path / "new")
    assert told(tmp_path / "new")["models"] == told(filled)["models"]


@pytest.mark.parametrize("left", [None, b""])
def test_no_empty_registry_is_made_over_a_full_store(
    filled: Path, tmp_path: Path, left: bytes | None
) -> None:
    root = tmp_path / "new" / ".ckpt"
    shutil.copytree(filled / ".ckpt" / "store", root / "store")
    if left is not None:
        (root / "registry.db").write_bytes(left)
    openings: tuple[Callable[[], object], ...] = (
        lambda: ckpt.open(tmp_path / "new"),
        lambda: ckpt.open(registry=root / "registry.db", store=root / "store").fsck(repair=True),
    )
    for opening in openings:
        with pytest.raises((StorageError, ConflictError), match="registry rebuild"):
            opening()
    rebuilt(tmp_path / "new")
    assert told(tmp_path / "new")["models"] == told(filled)["models"]


def test_an_upgrade_makes_no_tables(filled: Path) -> None:
    (filled / ".ckpt" / "registry.db").write_bytes(b"")
    with pytest.raises(StorageError, match="has no tables; run `ckpt registry rebuild`"):
        upgrade_registry(filled)


def test_what_is_no_copy_is_left_alone(filled: Path) -> None:
    store = filled / ".ckpt" / "store"
    (store / "documents" / "1" / "notes.txt").write_text("not ours")
    pack = next(store.glob("packs/*/*"))
    damage(pack, b"\0" * 100)
    found = rebuilt(filled)
    assert len(found.unreadable) == 1
    assert found.versions == 5
    assert pack.exists()


STRAY = (
    "documents/README.md",
    "documents/1/.keep",
    "documents/1/000000000009-notes.txt",
    f"documents/1/x/000000000009-{'c' * 32}.json",
    "events/1/x",
    "packs/README",
    "packs/aa/README.md",
    "packs/ü x/é.bin",
    "epochs/notes.txt",
    "epochs/3.json.bak",
    "FORMAT.bak",
    "other/x",
)


@pytest.mark.parametrize("stray", STRAY)
def test_an_object_of_others_is_no_reason_to_refuse_anything(filled: Path, stray: str) -> None:
    path = filled / ".ckpt" / "store" / stray
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"not ours")
    for expected in (4, 5):
        with ckpt.open(filled) as repo:
            assert repo.push(state(expected), "a").number == expected + 1
            repo.gc(grace=0)
            assert repo.fsck(repair=True).is_clean
            assert [one.name for one in repo.doctor() if not one.fine] == []
        found = rebuilt(filled)
        assert len(found.unreadable) == stray.startswith("packs/")
    assert path.read_bytes() == b"not ours"


def test_a_document_that_lands_late_is_a_leftover_and_keeps_no_collection_back(
    filled: Path,
) -> None:
    store = LocalStore(filled / ".ckpt" / "store")
    with ckpt.open(filled) as repo, pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt.service.acknowledge.copy_pending", stop)
        with pytest.raises(StorageError, match="stopped"):
            repo.push(state(6), "a")
        (late,) = repo._registry.copies.pending()
        rebuilt(filled)
        store.put(late.key, late.body)
    with ckpt.open(filled) as repo:
        assert [version.number for version in repo.log("a")] == [3, 2, 1]
        (agreement,) = (one for one in repo.doctor() if one.name == "agreement")
        assert agreement.fine
        assert "1 that count for nothing" in agreement.seen
        repo.gc(grace=0)
        assert repo.fsck().is_clean
        repo.push(state(7), "a")


BODIES = [
    b"5",
    b"[]",
    b'"text"',
    b'{"id":' + b"[" * 100_000,
    b'{"id":"%s","epoch":1,"counter":1,"author":"a","time":1}',
    b'{"id":"%s","epoch":1,"counter":1,"author":"a","time":1,"kind":5}',
    b'{"id":"%s","epoch":1,"counter":1,"author":"a","time":1,"kind":"rm"}',
    b'{"id":"%s","epoch":1,"counter":1,"author":"a","time":1,"kind":"dead"}',
    b'{"id":"%s","epoch":1,"counter":1,"author":"a","time":1,"kind":"x","model":"a"}',
]


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("place", ["events", "documents"])
def test_json_that_is_no_document_or_event_is_not_passed_over(
    filled: Path, place: str, body: bytes
) -> None:
    name = "e" * 32
    path = filled / ".ckpt" / "store" / place / "1" / f"000000000099-{name}.json"
    path.write_bytes(body.replace(b"%s", name.encode()))
    with pytest.raises(IntegrityError) as caught:
        rebuilt(filled)
    assert caught.value.code == "copy-damaged"
    path.unlink()
    assert rebuilt(filled).versions == 5


@pytest.mark.parametrize("described", ['{"chunks":[]}', "[" * 100_000, "5", '{"chunks":{"w0":5}}'])
def test_a_pack_that_describes_nothing_is_left_alone_and_told(filled: Path, described: str) -> None:
    metadata = json.dumps({"__metadata__": {"ckpt": described}}).encode()
    pack = filled / ".ckpt" / "store" / "packs" / "ff" / f"{'f' * 32}-0.safetensors"
    pack.parent.mkdir(exist_ok=True)
    pack.write_bytes(len(metadata).to_bytes(8, "little") + metadata)
    (unreadable,) = rebuilt(filled).unreadable
    assert "does not describe its chunks" in unreadable


def test_a_copy_that_lands_late_from_before_does_not_count(filled: Path) -> None:
    rebuilt(filled)
    documents = filled / ".ckpt" / "store" / "documents" / "1"
    late = min(documents.iterdir())
    other = documents / late.name.replace(late.stem.rpartition("-")[2], "a" * 32)
    other.write_bytes(late.read_bytes())
    assert rebuilt(filled).versions == 5


def test_an_old_registry_that_is_put_back_is_seen_by_gc(filled: Path, tmp_path: Path) -> None:
    registry = filled / ".ckpt" / "registry.db"
    backup = registry.read_bytes()
    with ckpt.open(filled) as repo:
        repo.push(state(8), "a")
    registry.write_bytes(backup)
    with ckpt.open(filled) as repo, pytest.raises(ConflictError) as caught:
        repo.gc(grace=0)
    assert caught.value.code == "gc-refused"
    rebuilt(filled)
    with ckpt.open(filled) as repo:
        assert torch.equal(repo.pull("a")["w0"], state(8)["w0"])
        repo.gc(grace=0)


def test_the_command_line_asks_and_tells(filled: Path) -> None:
    program = str(Path(sys.executable).with_name("ckpt"))
    command = [program, "-r", str(filled), "registry", "rebuild"]
    refused = subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert refused.returncode == 2
    done = subprocess.run([*command, "--yes"], capture_output=True, text=True, check=True)
    assert done.stdout == "rebuilt: 5 versions, epoch 2\n"
    assert "the old registry is" in done.stderr
    again = subprocess.run([*command, "-y", "--json"], capture_output=True, text=True, check=True)
    assert json.loads(again.stdout)["epoch"] == 3


def test_the_command_line_ends_with_4_when_bytes_are_missing(filled: Path) -> None:
    shutil.rmtree(filled / ".ckpt" / "store" / "packs")
    program = str(Path(sys.executable).with_name("ckpt"))
    command = [program, "-r", str(filled), "registry", "rebuild", "-y"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert done.stdout == "rebuilt: 5 versions, epoch 2\n"
    assert done.stderr.splitlines()[-1].startswith("error[damaged]: the store has not all bytes of")
