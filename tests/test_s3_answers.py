"""What an S3 server may answer, and the way to it: lies, refusals, addresses, credentials."""

from __future__ import annotations

import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from botocore.exceptions import ReadTimeoutError
from servers import ACCESS_KEY, BUCKET, SECRET_KEY, Liar, Reply, Server, Watch, publish

from ckpt.core.effects import observed
from ckpt.core.errors import (
    AccessError,
    CkptError,
    IntegrityError,
    NotFoundError,
    SpaceError,
    StorageError,
    UsageError,
)
from ckpt.storage import s3_upload
from ckpt.storage.s3 import RANGE_BYTES, S3Store
from ckpt.storage.s3_probe import EVERYTHING

pytest_plugins = ("servers",)


def error(code: str, status: int = 200, **headers: str) -> Reply:
    return Reply(status, f"<Error><Code>{code}</Code></Error>".encode(), headers)


class Hanging:
    """A server that answers until it is asked for ``from_on``, and a clock that its client's
    patience moves."""

    def __init__(self, from_on: str, answers: Mapping[str, Any]) -> None:
        self.now = 0.0
        self._from_on, self._answers = from_on, answers

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def ask(self, kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        asked = kind.removeprefix("s3.")
        if asked == "wait":
            return act(*args)
        if asked == self._from_on:
            self._answers = {}
        if asked in self._answers:
            return self._answers[asked]
        self.now += 60
        raise ReadTimeoutError(endpoint_url="http://hangs")


class TestAnswers:
    """A server that lies, or breaks off."""

    @pytest.fixture
    def store(self, liar: Liar) -> Iterator[S3Store]:
        found = S3Store(f"s3://{BUCKET}/x", endpoint=liar.endpoint, capabilities=EVERYTHING)
        yield found
        found.close()

    def test_a_range_is_read_again_until_it_is_whole(self, store: S3Store, liar: Liar) -> None:
        right = {"Content-Range": "bytes 5-14/20"}
        good = Reply(206, b"abcdefghij", right)
        liar.replies = [
            error("SlowDown", 503),
            error("TooManyRequests", 429),
            error("InternalError"),  # that calls itself 200
            Reply(206, b"abcdefghij", right, cut=4),
            Reply(206, b"0123456789", {"Content-Range": "bytes 0-9/20"}),
            Reply(206, b"abcde", {"Content-Range": "bytes 5-9/20"}),
            Reply(200, b"0123456789"),
            good,
        ]
        view, watch = memoryview(bytearray(10)), Watch()
        with observed(watch):
            store.read_into("k", 5, view)
        assert bytes(view) == b"abcdefghij"
        assert len(watch.waits) == 7

    def test_tries_end_and_waits_grow(self, store: S3Store, liar: Liar) -> None:
        broken = Reply(206, b"abcdefghij", {"Content-Range": "bytes 0-9/10"}, cut=9)
        for reply in (error("SlowDown", 503), broken):
            liar.replies, liar.asked, watch = [reply], [], Watch()
            with observed(watch), pytest.raises(StorageError):
                store.read_into("k", 0, memoryview(bytearray(10)))
            assert len(liar.asked) == 10
            assert all(wait <= min(10, 0.1 * 2**n) for n, wait in enumerate(watch.waits))
            assert len(set(watch.waits)) == 9

    @pytest.mark.parametrize("from_on", ["begin", "upload_part", "complete"])
    def test_a_server_that_never_answers_is_given_up_once(
        self, store: S3Store, monkeypatch: pytest.MonkeyPatch, from_on: str
    ) -> None:
        monkeypatch.setattr(s3_upload, "SINGLE_BYTES", 1)
        clock = Hanging(from_on, {"begin": {"UploadId": "u"}, "upload_part": {"ETag": "e"}})
        monkeypatch.setattr("ckpt.storage.s3_failures.time", clock)
        with observed(clock.ask), pytest.raises(StorageError) as caught:
            publish(store, "k", b"12")
        assert caught.value.code == "network"
        assert 300 < clock.now < 420

    def test_ranges_of_one_read_fail_together(self, store: S3Store, liar: Liar) -> None:
        liar.replies = [Reply(206, b"1", {"Content-Range": "bytes 0-0/1"})]
        with pytest.raises(IntegrityError) as caught:
            store.read_into("k", 0, memoryview(bytearray(3 * RANGE_BYTES)))
        assert caught.value.code == "object-short"

    def test_an_error_that_calls_itself_200_is_an_error(self, store: S3Store, liar: Liar) -> None:
        there = Reply(headers={"Content-Length": "2"})
        liar.replies = [error("InternalError"), Reply(), there]
        with observed(Watch()):
            store.put("k", b"12")
        assert [request.split()[0] for request in liar.asked] == ["PUT", "PUT", "HEAD"]

    def test_also_of_a_complete(
        self, store: S3Store, liar: Liar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(s3_upload, "PART_BYTES", 10)
        monkeypatch.setattr(s3_upload, "SINGLE_BYTES", 10)
        begun = (
            b"<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>"
        )
        done = b"<CompleteMultipartUploadResult><ETag>e</ETag></CompleteMultipartUploadResult>"
        part, there = Reply(headers={"ETag": "e"}), Reply(headers={"Content-Length": "12"})
        liar.replies = [Reply(body=begun), part, part, error("InternalError"), Reply(body=done)]
        liar.replies += [error("NoSuchKey", 404), there]  # HEAD is behind, then it is not
        with observed(Watch()):
            publish(store, "k", b"abcdefghijkl")
        assert [request.split()[0] for request in liar.asked] == [
            *("POST", "PUT", "PUT", "POST", "POST"),
            *("HEAD", "HEAD", "HEAD"),  # the second one asks for the bucket
        ]

    def test_another_size_than_was_sent_is_named(self, store: S3Store, liar: Liar) -> None:
        liar.replies = [Reply(), Reply(headers={"Content-Length": "40"})]
        with pytest.raises(StorageError, match="40 bytes are stored of 2") as caught:
            publish(store, "k", b"12")
        assert caught.value.code == "store-unfaithful"

    @pytest.mark.parametrize(
        ("reply", "kind", "code"),
        [
            (error("AccessDenied", 403), AccessError, "s3-denied"),
            (error("InvalidAccessKeyId", 401), AccessError, "s3-denied"),
            (error("ExpiredToken", 400), AccessError, "s3-denied"),
            (error("NoSuchBucket", 404), NotFoundError, "no-bucket"),
            (error("RequestTimeTooSkewed", 403), StorageError, "clock-skew"),
            (error("AuthorizationHeaderMalformed", 400), StorageError, "s3-region"),
            (error("XMinioStorageFull", 507), SpaceError, "no-space"),
            (error("InvalidRequest", 400), StorageError, "s3"),
        ],
    )
    def test_refusals_are_typed_and_not_repeated(
        self, store: S3Store, liar: Liar, reply: Reply, kind: type[CkptError], code: str
    ) -> None:
        liar.replies = [reply]
        for act in (
            lambda: store.put("k", b"1"),
            lambda: store.read_into("k", 0, memoryview(bytearray(1))),
            lambda: list(store.list("")),
            lambda: store.delete("k"),
        ):
            liar.asked = []
            with pytest.raises(kind) as caught:
                act()
            assert caught.value.code == code
            assert len(liar.asked) == 1
        # To look at an object has no room for the reason, so one more request asks for it.
        liar.asked = []
        with pytest.raises(kind) as caught:
            store.size("k")
        assert caught.value.code == code
        assert sum(request.startswith("GET") for request in liar.asked) <= 1

    def test_an_object_that_may_be_read_and_not_looked_at_is_refused_as_it_was(
        self, store: S3Store, liar: Liar
    ) -> None:
        whole = Reply(206, b"1", {"Content-Range": "bytes 0-0/1"})
        for told in (whole, error("NoSuchKey", 404)):
            liar.replies = [Reply(403), told]
            with pytest.raises(AccessError) as caught:
                store.size("k")
            assert caught.value.code == "s3-denied"


class TestTheWayThere:
    """Addresses, credentials, buckets."""

    def test_a_missing_bucket_is_named_by_every_act(self, server: Server) -> None:
        store = S3Store("s3://missing-bucket/x", endpoint=server.endpoint)
        acts: list[Callable[[], object]] = [
            lambda: store.put("k", b"1"),
            lambda: store.get("k"),
            lambda: store.size("k"),
            lambda: list(store.list("")),
            lambda: publish(store, "k", b"1"),
            store.probe_capabilities,
        ]
        for act in acts:
            with pytest.raises(NotFoundError, match="missing-bucket") as caught:
                act()
            assert caught.value.code == "no-bucket"
        store.close()

    def test_wrong_credentials_are_refused_and_none_are_shown(
        self, seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong := "wrong-secret-of-the-tests")
        store = S3Store(f"s3://{BUCKET}/x", endpoint=seaweedfs.endpoint)
        for act in (store.size, lambda key: store.put(key, b"1")):
            with pytest.raises(AccessError) as caught:
                act("k")
            shown = "".join(traceback.format_exception(caught.value)) + repr(vars(store))
            assert not any(secret in shown for secret in (wrong, SECRET_KEY, ACCESS_KEY))
        store.close()

    def test_without_credentials_nothing_is_asked(
        self, liar: Liar, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        store = S3Store(f"s3://{BUCKET}/x", endpoint=liar.endpoint)
        with pytest.raises(AccessError, match="NoCredentialsError"):
            store.size("k")
        assert not liar.asked
        store.close()

    def test_a_server_that_is_not_there_is_tried_again(self, credentials: None) -> None:
        store, watch = S3Store("s3://bucket", endpoint="http://127.0.0.1:9"), Watch()
        with observed(watch), pytest.raises(StorageError, match=r"127\.0\.0\.1:9") as caught:
            store.size("k")
        assert caught.value.code == "network"
        assert len(watch.waits) == 9
        store.close()

    @pytest.mark.parametrize(
        ("url", "endpoint"),
        [
            ("s3://", None),
            ("s3:///prefix", None),
            ("file:///etc", None),
            ("https://bucket/prefix", None),
            ("s3://user:secret@bucket/prefix", None),
            ("s3://bucket/a/../b", None),
            ("s3://bucket//a", None),
            ("s3://bucket/a?secret", None),
            ("s3://bucket/a\nb", None),
            ("s3://bucket", "ftp://host"),
            ("s3://bucket", "host:9000"),
            ("s3://bucket", "http://user:secret@host"),
            ("s3://bucket", "http://host:port"),
            ("s3://bucket", "http://169.254.169.254/"),
            ("s3://bucket", "http://[fe80::1/"),
        ],
    )
    def test_an_address_that_is_none_is_refused_and_not_shown(
        self, url: str, endpoint: str | None
    ) -> None:
        with pytest.raises(UsageError) as caught:
            S3Store(url, endpoint=endpoint)
        assert caught.value.code == "uri-refused"
        assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("endpoint", ["http://user:secret@host", "secret at host"])
    def test_also_one_of_the_configuration(
        self, endpoint: str, credentials: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        with pytest.raises(UsageError) as caught:
            S3Store("s3://bucket")
        assert caught.value.code == "uri-refused"
        assert "secret" not in "".join(traceback.format_exception(caught.value))

    def test_prefix_and_endpoint_may_come_from_the_configuration(
        self, moto: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto.endpoint)
        for url in (f"s3://{BUCKET}", f"s3://{BUCKET}/team=a/x+y/"):
            store = S3Store(url)
            assert store.name == url.rstrip("/")
            store.put("of-the-configuration", b"1")
            assert [entry.key for entry in store.list("of-")] == ["of-the-configuration"]
            store.delete("of-the-configuration")
            store.close()

    def test_aws_is_relied_on_and_gets_checksums(self, credentials: None) -> None:
        store = S3Store("s3://bucket", region="eu-central-1")
        assert store.capabilities == EVERYTHING
        assert store.checksum == {"ChecksumAlgorithm": "CRC32"}
        store.close()

    def test_boto3_is_loaded_by_the_first_store_only(self) -> None:
        code = "import sys, ckpt.storage.s3; sys.exit('boto3' in sys.modules)"
        subprocess.run([sys.executable, "-c", code], check=True)
