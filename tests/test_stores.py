"""The contract of ``Store``, over every store; bytes are reached by another way than the code."""

from __future__ import annotations

import gc
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import RawS3, Server

from ckpt.core.effects import observed
from ckpt.core.errors import (
    CkptError,
    ConflictError,
    IntegrityError,
    SpaceError,
    StorageError,
    UsageError,
)
from ckpt.storage.identity import ensure_identity, read_identity
from ckpt.storage.local import LocalStore
from ckpt.storage.memory import MemoryStore
from ckpt.storage.store import Store

pytest_plugins = ("servers",)


class RawLocal:
    """The folder itself."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store: Store = LocalStore(root)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def write(self, key: str, body: bytes) -> None:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(body)

    def everything(self) -> set[str]:
        files = (path for path in self.root.rglob("*") if path.is_file())
        return {str(path.relative_to(self.root)) for path in files}


class RawMemory:
    """The dict itself."""

    def __init__(self) -> None:
        self.memory = MemoryStore()
        self.store: Store = self.memory

    def read(self, key: str) -> bytes:
        return self.memory.objects[key][0]

    def write(self, key: str, body: bytes) -> None:
        self.memory.objects[key] = (body, 0.0)

    def everything(self) -> set[str]:
        return set(self.memory.objects)


Raw = RawLocal | RawMemory | RawS3


@pytest.fixture(params=["local", "memory", "seaweedfs", "moto"])
def raw(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Raw]:
    if request.param == "local":
        yield RawLocal(tmp_path / "store")
    elif request.param == "memory":
        yield RawMemory()
    else:
        server: Server = request.getfixturevalue(request.param)
        with RawS3(server, server.capabilities) as found:
            yield found


def upload(store: Store, key: str, body: bytes) -> None:
    with store.create(key) as writer:
        writer.write(0, body)
        writer.publish(len(body))


def test_what_was_published_is_there_byte_for_byte(raw: Raw) -> None:
    upload(raw.store, "packs/ab/x", b"hello")
    assert raw.read("packs/ab/x") == b"hello"
    assert raw.store.size("packs/ab/x") == 5


def test_parts_may_be_written_in_any_order_and_from_several_threads(raw: Raw) -> None:
    body = os.urandom(100_000)
    with raw.store.create("k") as writer:
        spans = [(at, body[at : at + 1000]) for at in range(0, len(body), 1000)]
        halves = (spans[1::2], spans[::2])

        def write(some: list[tuple[int, bytes]]) -> None:
            for at, data in reversed(some):
                writer.write(at, data)

        threads = [threading.Thread(target=write, args=(half,)) for half in halves]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        writer.publish(len(body))
    assert raw.read("k") == body


def test_nothing_is_visible_before_publish_and_nothing_stays_after_abort(raw: Raw) -> None:
    with raw.store.create("packs/x") as writer:
        writer.write(0, b"half")
        assert raw.store.size("packs/x") is None
        assert list(raw.store.list("")) == []
    assert raw.everything() == set()


def test_an_error_inside_the_block_leaves_nothing(raw: Raw) -> None:
    def interrupted() -> None:
        with raw.store.create("packs/x") as writer:
            writer.write(0, b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert raw.everything() == set()


def test_an_object_that_was_not_written_completely_is_not_published(raw: Raw) -> None:
    with raw.store.create("x") as writer:
        writer.write(0, b"1234")
        with pytest.raises(StorageError):
            writer.publish(5)
    assert raw.everything() == set()


def test_publishing_a_key_twice_is_a_conflict_and_keeps_the_first(raw: Raw) -> None:
    upload(raw.store, "k", b"first")
    with pytest.raises(ConflictError) as caught:
        upload(raw.store, "k", b"other")
    assert caught.value.code == "object-differs"
    assert raw.read("k") == b"first"
    assert raw.everything() == {"k"}


def test_put_again_with_the_same_bytes_counts_as_written(raw: Raw) -> None:
    raw.store.put("documents/1/a.json", b"{}")
    raw.store.put("documents/1/a.json", b"{}")
    with pytest.raises(ConflictError):
        raw.store.put("documents/1/a.json", b"{1}")
    assert raw.read("documents/1/a.json") == b"{}"
    assert raw.everything() == {"documents/1/a.json"}


def test_ranges_are_read_exactly(raw: Raw) -> None:
    raw.write("k", bytes(range(100)))
    view = memoryview(bytearray(10))
    raw.store.read_into("k", 90, view)
    assert bytes(view) == bytes(range(90, 100))
    assert raw.store.get("k") == bytes(range(100))


def test_what_is_written_to_a_mapped_object_stays_with_the_writer(raw: Raw) -> None:
    raw.write("k", bytes(range(100)))
    memory = raw.store.map("k")
    assert (memory is not None) == isinstance(raw.store, LocalStore)
    if memory is not None:
        assert memory.tobytes() == bytes(range(100))
        memory[:3] = b"abc"
    assert raw.read("k") == bytes(range(100))
    assert raw.store.map("no") is None


def test_a_missing_or_short_object_is_an_integrity_error(raw: Raw) -> None:
    with pytest.raises(IntegrityError) as caught:
        raw.store.read_into("no", 0, memoryview(bytearray(1)))
    assert caught.value.code == "object-missing"
    with pytest.raises(IntegrityError) as caught:
        raw.store.get("no")
    assert caught.value.code == "object-missing"
    raw.write("k", b"123")
    with pytest.raises(IntegrityError) as caught:
        raw.store.read_into("k", 1, memoryview(bytearray(3)))
    assert caught.value.code == "object-short"
    assert raw.store.size("no") is None


LISTINGS = {
    "keys": st.sets(st.from_regex(r"[a-c]([a-c.\-]{0,2}[a-c])?(/[a-c]{1,2}){0,2}", fullmatch=True)),
    "prefix": st.sampled_from(["", "a", "a/", "a/b", "b/", "c"]),
    "after": st.sampled_from(["", "a", "a/b", "b.c", "b/c"]),
}


@given(**LISTINGS)
def test_listings_are_sorted_and_complete(
    keys: set[str], prefix: str, after: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for raw in (RawMemory(), RawLocal(tmp_path_factory.mktemp("store"))):
        check_listing(raw, keys, prefix, after)


@given(**LISTINGS)
@settings(max_examples=12)
def test_listings_over_s3_are_sorted_and_complete(
    keys: set[str], prefix: str, after: str, seaweedfs: Server, moto: Server
) -> None:
    for server in (seaweedfs, moto):
        with RawS3(server, server.capabilities) as raw:
            check_listing(raw, keys, prefix, after)


def check_listing(raw: Raw, keys: set[str], prefix: str, after: str) -> None:
    kept = {key for key in keys if not any(other.startswith(f"{key}/") for other in keys)}
    for key in kept:
        raw.write(key, key.encode())
    listed = [(entry.key, entry.size) for entry in raw.store.list(prefix, after)]
    wanted = sorted(key for key in kept if key.startswith(prefix) and key > after)
    assert listed == [(key, len(key)) for key in wanted]


def test_delete_removes_and_an_absent_key_is_fine(raw: Raw) -> None:
    raw.write("a/b", b"1")
    raw.store.delete("a/b")
    raw.store.delete("a/b")
    assert raw.store.size("a/b") is None


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "../a", "a/../b", "a//b", "a\0b", ".tmp/x", "a\nb", "ä", "a/.x"]
)
def test_a_key_never_leaves_the_store(raw: Raw, key: str) -> None:
    for act in (raw.store.size, raw.store.delete, raw.store.create, raw.store.get):
        with pytest.raises(UsageError):
            act(key)


def test_an_identity_is_given_once(raw: Raw) -> None:
    assert read_identity(raw.store) is None
    first = ensure_identity(raw.store)
    assert ensure_identity(raw.store) == first == read_identity(raw.store)
    raw.write("FORMAT", b'{"format":2,"store":"0"}')
    with pytest.raises(IntegrityError):
        read_identity(raw.store)


def test_a_listing_goes_on_when_others_delete_meanwhile(raw: Raw) -> None:
    for name in "abc":
        raw.write(f"packs/{name}", b"1")
    listed = raw.store.list("packs/")
    found = [next(listed).key]
    raw.store.delete("packs/b")
    found += [info.key for info in listed]
    assert found[0] == "packs/a"
    assert found[-1] == "packs/c"


class TestOnDisk:
    """What only the folder promises."""

    @pytest.fixture
    def local(self, tmp_path: Path) -> RawLocal:
        return RawLocal(tmp_path / "store")

    def test_published_files_are_read_only(self, local: RawLocal) -> None:
        upload(local.store, "packs/ab/x", b"1")
        assert stat.S_IMODE((local.root / "packs/ab/x").stat().st_mode) == 0o444

    def test_bytes_are_durable_before_the_name_and_the_name_before_the_return(
        self, local: RawLocal
    ) -> None:
        acts: list[str] = []

        def hook(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
            acts.append(kind)
            return act(*args)

        with observed(hook):
            upload(local.store, "packs/ab/x", b"1")
        assert acts.index("write") < acts.index("fsync") < acts.index("link")
        assert "fsync_folder" in acts[acts.index("link") :]

    def test_a_new_folder_is_durable_in_its_parent(self, local: RawLocal) -> None:
        synced: list[str] = []

        def hook(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
            if kind == "fsync_folder":
                synced.append(os.readlink(f"/proc/self/fd/{args[0]}"))
            return act(*args)

        with observed(hook):
            upload(local.store, "packs/ab/x", b"1")
        for folder in (
            local.root.parent,
            local.root,
            local.root / "packs",
            local.root / "packs/ab",
        ):
            assert str(folder) in synced

    def test_a_failed_fsync_is_never_tried_again(self, local: RawLocal) -> None:
        calls = 0

        def hook(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
            nonlocal calls
            if kind == "fsync":
                calls += 1
                raise OSError(5, "Input/output error")
            return act(*args)

        with observed(hook), pytest.raises(CkptError):
            upload(local.store, "k", b"1")
        assert calls == 1
        assert local.everything() == set()

    def test_a_disk_without_links_gets_its_files_by_rename(self, local: RawLocal) -> None:
        def hook(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
            if kind == "link":
                raise OSError(1, "Operation not permitted")
            return act(*args)

        with observed(hook):
            upload(local.store, "k", b"1")
            with pytest.raises(ConflictError):
                upload(local.store, "k", b"2")
        assert local.everything() == {"k"}
        assert local.read("k") == b"1"

    def test_a_file_of_another_length_than_was_written_is_no_success(
        self, local: RawLocal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LocalStore, "size", lambda store, key: 2)
        with local.store.create("packs/ab/x.bin") as upload:
            upload.write(0, b"abc")
            with pytest.raises(IntegrityError) as caught:
                upload.publish(3)
        assert caught.value.code == "object-short"

    def test_what_has_no_room_is_refused_before_it_is_written(self, local: RawLocal) -> None:
        local.store.check_room(1)
        with pytest.raises(SpaceError) as caught:
            local.store.check_room(1 << 60)
        assert caught.value.code == "no-space"

    def test_a_short_write_is_continued(self, local: RawLocal) -> None:
        def hook(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
            if kind == "write":
                handle, view, offset = args
                return act(handle, view[: max(1, len(view) // 2)], offset)
            return act(*args)

        with observed(hook):
            upload(local.store, "k", b"0123456789")
        assert local.read("k") == b"0123456789"


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    if len(os.listdir("/proc/self/fd")) > before:
        gc.collect()  # an error that the test caught holds its connection, and is held by its frame
    assert len(os.listdir("/proc/self/fd")) <= before
