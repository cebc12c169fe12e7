"""What only S3 does: parts, answers that are lost, servers that promise less."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from servers import BUCKET, Act, RawS3, Server, Watch, publish

from ckpt.core.effects import observed
from ckpt.core.errors import AccessError, ConflictError
from ckpt.storage import s3_upload
from ckpt.storage.s3_failures import RefusedError
from ckpt.storage.s3_probe import EVERYTHING
from ckpt.storage.s3_upload import PART_BYTES, SINGLE_BYTES, part_at

pytest_plugins = ("servers",)

LARGE, MIDDLE = 70 << 20, 12 << 20


@pytest.fixture(scope="session")
def large() -> bytes:
    """Bytes for nine parts, no two of them alike."""
    return random.Random(5).randbytes(LARGE)


@pytest.fixture
def middle(large: bytes, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Bytes for three parts of the smallest size that servers take."""
    monkeypatch.setattr(s3_upload, "PART_BYTES", 5 << 20)
    monkeypatch.setattr(s3_upload, "SINGLE_BYTES", 5 << 20)
    return large[:MIDDLE]


@pytest.fixture(params=["known", "unknown"])
def raw(request: pytest.FixtureRequest, server: Server) -> Iterator[RawS3]:
    """A store that relies on what a probe found, and one that relies on nothing."""
    with RawS3(server, server.capabilities if request.param == "known" else None) as found:
        yield found


@pytest.fixture
def probed(server: Server) -> Iterator[RawS3]:
    with RawS3(server, server.capabilities) as found:
        yield found


def lost(kind: str, times: int = 1) -> Watch:
    """The first answers to requests of this kind are lost, after the server acted."""
    left = iter(range(times))

    def fault(found: str, act: Act, args: tuple[Any, ...]) -> Any:
        answer = act(*args)
        if found == kind and next(left, None) is not None:
            raise ConnectionResetError("Connection reset by peer")
        return answer

    return Watch(fault)


class TestParts:
    """Large objects."""

    def test_written_in_any_order_by_threads_and_read_back(
        self, probed: RawS3, large: bytes
    ) -> None:
        spans = [(at, at + 3_000_000) for at in range(0, LARGE, 3_000_000)]
        random.Random(1).shuffle(spans)
        watch = Watch()
        with observed(watch), probed.s3.create("packs/ab/x") as writer:
            with ThreadPoolExecutor(3) as pool:
                list(pool.map(lambda span: writer.write(span[0], large[slice(*span)]), spans))
            assert probed.s3.size("packs/ab/x") is None
            writer.publish(LARGE)
        assert probed.s3.size("packs/ab/x") == LARGE
        assert probed.everything() == {"packs/ab/x"}
        assert watch.parts[-1] == 1
        assert sorted(watch.parts) == list(range(1, 10))
        read = bytearray(LARGE - 1)
        probed.s3.read_into("packs/ab/x", 1, memoryview(read))
        assert hashlib.sha256(read).digest() == hashlib.sha256(large[1:]).digest()

    def test_with_checksums_as_on_aws(self, moto: Server, middle: bytes) -> None:
        with RawS3(moto, EVERYTHING) as raw:
            raw.s3.checksum = {"ChecksumAlgorithm": "CRC32"}
            publish(raw.s3, "k", middle)
            raw.s3.put("small", b"1")
            assert raw.read("k") == middle

    @pytest.mark.parametrize("known", [True, False])
    def test_a_body_that_was_changed_on_its_way_is_sent_again(
        self, seaweedfs: Server, middle: bytes, known: bool
    ) -> None:
        changed: list[str] = []

        def change(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            body = args[1].get("Body", b"") if kind in ("s3.put", "s3.upload_part") else b""
            if len(body) > 10 and kind not in changed:
                changed.append(kind)
                other = bytearray(body)
                other[-1] ^= 1
                return act(args[0], {**args[1], "Body": other})
            return act(*args)

        with RawS3(seaweedfs, seaweedfs.capabilities if known else None) as raw:
            with observed(Watch(change)):
                raw.s3.put("small", b"of eleven bytes")
                publish(raw.s3, "large", middle)
            assert raw.read("small") == b"of eleven bytes"
            assert raw.read("large") == middle
        assert len(changed) == 2

    def test_a_small_object_is_one_request(self, probed: RawS3) -> None:
        watch = Watch()
        with observed(watch):
            publish(probed.s3, "k", b"12")
        assert watch.kinds == ["s3.put", "s3.head"]

    def test_an_error_leaves_no_upload(self, probed: RawS3, middle: bytes) -> None:
        def interrupted() -> None:
            with probed.s3.create("k") as writer:
                writer.write(0, middle)
                raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            interrupted()
        assert probed.everything() == set()

    def test_a_part_that_fails_ends_the_upload(self, probed: RawS3, middle: bytes) -> None:
        def fault(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            if kind == "s3.upload_part" and args[1]["PartNumber"] == 3:
                raise RefusedError(403, "AccessDenied", "", "")
            return act(*args)

        with observed(Watch(fault)), pytest.raises(AccessError):
            publish(probed.s3, "k", middle)
        assert probed.everything() == set()

    def test_a_large_object_is_never_overwritten(self, raw: RawS3, middle: bytes) -> None:
        raw.write("k", b"first")
        with pytest.raises(ConflictError):
            publish(raw.s3, "k", middle)
        assert raw.read("k") == b"first"
        assert raw.everything() == {"k"}

    def test_part_numbers_suffice_for_the_largest_object(self) -> None:
        number, end, size = 0, 0, 0
        while end < 5 << 40:
            place = part_at(end)
            assert place == part_at(end + place.size - 1)
            assert (place.number, place.start) == (number + 1, end)
            assert max(8 << 20, size) <= place.size <= 5 << 30
            number, end, size = place.number, end + place.size, place.size
        assert number <= 10_000
        assert part_at(SINGLE_BYTES - 1).start + PART_BYTES == SINGLE_BYTES

    def test_memory_is_bounded_while_the_server_is_slow(
        self, moto: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At most four parts wait; whoever writes more waits too."""
        monkeypatch.setattr(s3_upload, "PART_BYTES", 1000)
        monkeypatch.setattr(s3_upload, "SINGLE_BYTES", 4000)
        answers = {"s3.begin": {"UploadId": "id"}, "s3.head": {"ContentLength": 41_000}}
        written, most, together = 0, 0, threading.Barrier(4, timeout=30)

        def slow(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            nonlocal most
            if kind == "s3.upload_part" and args[1]["PartNumber"] > 1:
                together.wait()
                most = max(most, written - 1000 * (len(watch.parts) - 4))
                together.wait()
            return answers.get(kind, {"ETag": ""})

        watch = Watch(slow)
        with RawS3(moto, EVERYTHING) as raw, observed(watch), raw.s3.create("k") as writer:
            for at in range(0, 41_000, 500):
                writer.write(at, bytes(500))
                written += 500
            writer.publish(41_000)
        assert len(watch.parts) == 41
        assert most <= 1000 * (4 + 2)  # four, the first one, and the one that is being filled


class TestLostAnswers:
    """The server acted, and its answer never came."""

    @pytest.mark.parametrize("times", [1, 3])
    def test_of_a_put(self, raw: RawS3, times: int) -> None:
        with observed(lost("s3.put", times)):
            raw.s3.put("documents/1/a.json", b"{}")
            publish(raw.s3, "packs/ab/x", b"12")
        assert raw.read("documents/1/a.json") == b"{}"
        assert raw.read("packs/ab/x") == b"12"

    def test_of_a_put_to_a_key_that_others_hold(self, raw: RawS3) -> None:
        raw.write("k", b"first")
        with observed(lost("s3.head")), pytest.raises(ConflictError):
            publish(raw.s3, "k", b"other")
        with observed(lost("s3.get")), pytest.raises(ConflictError):
            raw.s3.put("k", b"other")
        assert raw.read("k") == b"first"

    @pytest.mark.parametrize("kind", ["s3.begin", "s3.upload_part", "s3.complete", "s3.head"])
    def test_of_an_upload_in_parts(self, raw: RawS3, middle: bytes, kind: str) -> None:
        with observed(lost(kind)):
            publish(raw.s3, "k", middle)
        assert raw.everything() == {"k"}
        assert raw.s3.get("k") == middle

    @pytest.mark.parametrize("kind", ["s3.begin", "s3.abort"])
    def test_nothing_is_left_after_an_abort(self, probed: RawS3, middle: bytes, kind: str) -> None:
        with observed(lost(kind)), probed.s3.create("k") as writer:
            writer.write(0, middle)
        assert probed.everything() == set()

    def test_of_a_delete(self, probed: RawS3) -> None:
        probed.write("k", b"1")
        with observed(lost("s3.delete")):
            probed.s3.delete("k")
        assert probed.everything() == set()


def test_what_dead_pushes_left_is_discarded(probed: RawS3) -> None:
    dead, alive, unknown = "d" * 32, "a" * 32, "c" * 32
    keys = [
        f"packs/{push[:2]}/{push}-{number}.safetensors"
        for push in (dead, alive, unknown)
        for number in (0, 1)
    ]
    client = probed.server.client
    for key in (*keys, f"nested/packs/dd/{dead}-0.safetensors"):
        client.create_multipart_upload(Bucket=BUCKET, Key=f"{probed.prefix}/{key}")
    probed.write(keys[0], b"whole")
    probed.write(".tmp/1/a", b"")

    def small(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
        if args[0] == "list_multipart_uploads":
            args[1]["MaxUploads"] = 1
        return act(*args)

    with observed(Watch(small)), pytest.MonkeyPatch.context() as patch:
        # The lists of moto say that every upload began in 2010.
        patch.setattr("ckpt.storage.store._ABANDONED_SECONDS", 1 << 40)
        probed.s3.discard_unfinished({dead: True, alive: False}.get)
    left = {keys[0], *keys[2:], ".tmp/1/a", f"nested/packs/dd/{dead}-0.safetensors"}
    assert probed.everything() == left
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ckpt.storage.store._ABANDONED_SECONDS", -60)
        probed.s3.discard_unfinished({dead: True, alive: False}.get)
    assert probed.everything() == {keys[0], *keys[2:4], f"nested/packs/dd/{dead}-0.safetensors"}


class TestCapabilities:
    """What is probed, and what happens where a server promises less."""

    def test_are_found_and_leave_nothing(self, seaweedfs: Server, moto: Server) -> None:
        by_folders = replace(EVERYTHING, start_after=False)
        unchecked = replace(EVERYTHING, checksums=False)
        for server, wanted in ((seaweedfs, by_folders), (moto, unchecked)):
            with RawS3(server, None) as raw:
                assert raw.s3.probe_capabilities() == wanted == raw.s3.capabilities
                assert raw.everything() == set()

    def test_a_server_that_ignores_conditions_is_found_out(
        self, server: Server, middle: bytes
    ) -> None:
        def ignore(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            if kind in ("s3.put", "s3.complete"):
                args[1].pop("IfNoneMatch", None)
            return act(*args)

        for probe in (True, False):
            with RawS3(server, None) as raw, observed(Watch(ignore)):
                assert not probe or not raw.s3.probe_capabilities().conditional_writes
                raw.write("k", b"first")
                for body in (b"other", middle):
                    with pytest.raises(ConflictError):
                        publish(raw.s3, "k", body)
                with pytest.raises(ConflictError):
                    raw.s3.put("k", b"other")
                assert raw.read("k") == b"first"

    def test_a_server_that_knows_no_conditions_is_not_asked_for_them(self, server: Server) -> None:
        asked = 0

        def refuse(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            nonlocal asked
            if kind in ("s3.put", "s3.complete") and "IfNoneMatch" in args[1]:
                asked += 1
                raise RefusedError(501, "NotImplemented", "", "")
            return act(*args)

        with RawS3(server, None) as raw, observed(Watch(refuse)):
            raw.s3.put("a", b"1")
            publish(raw.s3, "b", b"2")
            assert asked == 1
            assert not raw.s3.probe_capabilities().conditional_writes
            assert raw.everything() == {"a", "b"}

    def test_listings_go_on_from_page_to_page(self, raw: RawS3) -> None:
        keys = [f"events/1/{number:012d}-{number % 7}.json" for number in range(9)]
        for key in (*keys, "events/1-a", "events/folder/", ".tmp/probe-1/a"):
            raw.write(key, b"1")

        def small(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            args[1]["MaxKeys"] = 2
            return act(*args)

        with observed(Watch(small)):
            assert [entry.key for entry in raw.s3.list("events/1/", keys[3])] == keys[4:]
            assert [entry.key for entry in raw.s3.list("")] == ["events/1-a", *keys]
