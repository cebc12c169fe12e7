"""A store in a bucket of AWS S3, or of any server that speaks its protocol.

The ranges of reads and the parts of uploads are scheduled here, over single requests. s3transfer is
not used: its CRT client sends to AWS, whatever the endpoint. The SDK's own retries are off: they do
not repeat a body that broke off.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any
from urllib.parse import urlsplit

from ckpt.core.effects import perform
from ckpt.core.errors import CkptError, IntegrityError, UsageError
from ckpt.core.printable import escape
from ckpt.storage.s3_address import check_endpoint, parse_address, refuse_endpoint
from ckpt.storage.s3_failures import (
    NotAsWrittenError,
    RefusedError,
    RequestError,
    UnfaithfulError,
    UnreachableError,
    UnsignedError,
    repeat,
)
from ckpt.storage.s3_probe import EVERYTHING, HIDDEN, Capabilities, Probe, crc_of
from ckpt.storage.s3_upload import MARK, S3Upload, end_uploads
from ckpt.storage.store import (
    ObjectInfo,
    Store,
    Upload,
    check_key,
    differs,
    is_abandoned,
    missing,
    short,
)

RANGE_BYTES = 16 << 20
_PIECE = 1 << 20  # urllib3 makes a copy of each piece that it reads
_THREADS = 8
_CONNECT_SECONDS, _READ_SECONDS = 10, 60

_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)\Z")
_AWS = (".amazonaws.com", ".amazonaws.com.cn")

Answer = Mapping[str, Any]


class S3Store(Store):
    """Objects below ``s3://bucket/prefix``.

    Args:
        url: ``s3://bucket/prefix``.
        endpoint, region: by default those of the AWS configuration, which is also the only place
            that credentials come from.
        capabilities: what a probe of this server found. Of a server that nothing is known of,
            other than AWS, nothing is expected.

    Raises:
        UsageError: ``uri-refused`` for an address that is none, ``s3-options``.
    """

    def __init__(
        self,
        url: str,
        *,
        endpoint: str | None = None,
        region: str | None = None,
        capabilities: Capabilities | None = None,
    ) -> None:
        self._bucket, folders = parse_address(url)
        self._root = f"{folders[1:]}/" if folders else ""
        self._name = f"s3://{self._bucket}{folders}"
        self._server = endpoint, region
        self._connections = _Connections(*self._server)
        host = urlsplit(self._client.meta.endpoint_url).hostname or ""
        on_aws = host.endswith(_AWS)
        self.checksum = {"ChecksumAlgorithm": "CRC32"} if on_aws else {}
        self._checks: bool | None = None
        self.capabilities = EVERYTHING if on_aws and capabilities is None else capabilities
        self._sends_conditions = capabilities is None or capabilities.conditional_writes
        self._bucket_is_there = False

    @property
    def pool(self) -> ThreadPoolExecutor:
        """The threads of this process that wait for the server."""
        return self._own().pool

    @property
    def _client(self) -> Any:
        return self._own().client

    def _own(self) -> _Connections:
        if self._connections.process != os.getpid():  # forked: these are the other process's
            self._connections = _Connections(*self._server)
        return self._connections

    @property
    def name(self) -> str:
        return self._name

    def close(self) -> None:
        """End the threads and the connections."""
        self._connections.close()

    def create(self, key: str) -> Upload:
        return S3Upload(self, check_key(key))

    def put(self, key: str, body: bytes) -> None:
        written = self.write_whole(check_key(key), body, mark="")
        if not (written and self._relies_on_conditions()):
            repeat(self.place(f"reading {key} back"), lambda: self._read_back(key, body))

    def _read_back(self, key: str, body: bytes) -> None:
        """Look again whether an object is there and has these bytes: one answer may be wrong."""
        try:
            found = self.get(key)
        except IntegrityError as error:
            raise NotAsWrittenError(error) from None
        if found != body:
            raise NotAsWrittenError(differs(self, key))

    def read_into(self, key: str, offset: int, view: memoryview) -> None:
        check_key(key)
        if not view and self.size(key) is None:
            raise missing(self, key)
        ranges = [(at, view[at : at + RANGE_BYTES]) for at in range(0, len(view), RANGE_BYTES)]
        if len(ranges) == 1:
            self._read_range(key, offset, view)
            return
        reads = [self.pool.submit(self._read_range, key, offset + at, part) for at, part in ranges]
        try:
            for read in reads:
                read.result()
        finally:
            for read in reads:
                read.cancel()
            wait(reads)  # they write into memory that is the caller's

    def size(self, key: str) -> int | None:
        doing = self.place(f"looking at {check_key(key)}")
        found = repeat(doing, lambda: self._look(key))
        return None if found is None else found[0]

    def list(self, prefix: str, after: str = "") -> Iterator[ObjectInfo]:
        ordered = self.capabilities is not None and self.capabilities.start_after
        found = (
            entry
            for entry in self._listed(prefix, after if ordered else "")
            # Web consoles make folders of empty objects with a slash at the end.
            if entry.key > after
            and not entry.key.startswith(HIDDEN)
            and not entry.key.endswith("/")
        )
        yield from found if ordered else sorted(found, key=lambda entry: entry.key)

    def delete(self, key: str) -> None:
        self._remove(check_key(key))

    def discard_unfinished(self, is_over: Callable[[str], bool | None]) -> None:
        def is_dead(name: str, began: float) -> bool:
            return is_abandoned(is_over(name.rpartition("/")[2].partition("-")[0]), began)

        end_uploads(self, self.place("tidying uploads"), self.full("packs/"), is_dead)
        for entry in self._listed(HIDDEN, ""):
            if is_abandoned(None, entry.modified):
                self._remove(entry.key)

    def check_room(self, nbytes: int) -> None:
        """A bucket has no limit that could be asked for."""

    def probe_capabilities(self) -> Capabilities:
        """Find out what the server does, and rely on that from now on.

        Raises:
            NotFoundError: ``no-bucket``.
            AccessError, StorageError: the server refuses or fails what every store needs.
        """
        found = Probe(self).run()
        self.capabilities, self._sends_conditions = found, found.conditional_writes
        return found

    def keeps_deleted(self) -> bool | None:
        """Whether what is deleted stays as a version of the object, and so frees nothing; None
        where that may not be asked."""
        return Probe(self).keeps_deleted()

    def full(self, key: str) -> str:
        """The key in the bucket."""
        return self._root + key

    def place(self, doing: str) -> str:
        """``doing``, and where."""
        return f"{doing} in {self._name} at {self._client.meta.endpoint_url}"

    def request(self, kind: str, operation: str, **arguments: Any) -> Answer:
        """Ask the server once.

        Raises:
            RequestError: what went wrong.
        """
        with _failing():
            return perform(f"s3.{kind}", self._send, operation, arguments)

    def _send(self, operation: str, arguments: Mapping[str, Any]) -> Answer:
        answer: Answer = getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        return answer

    def proof_of(self, body: bytes | bytearray) -> Mapping[str, str]:
        """By what the server can tell that a body arrived as it was sent: a CRC where it looks at
        one, else the digest that every server knows and that takes eight times as long."""
        if self._checks_crc(len(body)):
            return {"ChecksumCRC32": crc_of(body)}
        digest = hashlib.md5(body, usedforsecurity=False).digest()
        return {"ContentMD5": base64.b64encode(digest).decode()}

    def _checks_crc(self, nbytes: int) -> bool:
        """Whether the server was seen to refuse a body with a wrong CRC; one that nobody looked
        at is tried when it is worth a request."""
        if self.capabilities is not None:
            return self.capabilities.checksums
        if self._checks is None and nbytes >= _PIECE:
            self._checks = Probe(self).refuses_wrong_checksum()
        return bool(self._checks)

    def write_whole(self, key: str, body: bytes | bytearray, mark: str) -> bool:
        """Write an object by one request; False when the key is taken, and not by ``mark``."""

        def send(condition: Mapping[str, str]) -> object:
            return self.request(
                "put",
                "put_object",
                Key=self.full(key),
                Body=body,
                Metadata={MARK: mark} if mark else {},
                **self.proof_of(body),
                **condition,
            )

        return self.publish(key, len(body), mark, send)

    def publish(
        self, key: str, size: int, mark: str, send: Callable[[Mapping[str, str]], object]
    ) -> bool:
        """Let ``send`` make the object appear; False when the key is taken, and not by ``mark``.

        A try whose answer was lost may have made it: the next one then finds the key taken, and
        whose object it is decides.
        """
        doing = self.place(f"writing {key}")
        sent = repeat(doing, lambda: self._publish_once(key, send))
        found, holder = repeat(doing, lambda: self._look_after_writing(key))
        ours = holder == mark if mark and holder else sent
        if not ours:
            return False
        if found != size:
            said = f"{found} bytes are stored of {size} that were sent"
            raise UnfaithfulError(said).typed(doing)
        return True

    def _publish_once(self, key: str, send: Callable[[Mapping[str, str]], object]) -> bool:
        if not self._relies_on_conditions() and self._look(key) is not None:
            return False
        try:
            send({"IfNoneMatch": "*"} if self._sends_conditions else {})
        except RefusedError as refusal:
            if refusal.status == 412 or refusal.code == "NoSuchUpload":
                return False
            if refusal.code != "NotImplemented" or not self._sends_conditions:
                raise
            self._sends_conditions = False
            return self._publish_once(key, send)
        return True

    def _relies_on_conditions(self) -> bool:
        return self.capabilities is not None and self.capabilities.conditional_writes

    def _look(self, key: str) -> tuple[int, str] | None:
        """Size and mark of an object, or None when there is none."""
        try:
            answer = self.request("head", "head_object", Key=self.full(key))
        except RefusedError as refusal:
            if refusal.status in (400, 403):
                raise self._reason(key, refusal) from None
            if refusal.status != 404:
                raise
            self._check_bucket()
            return None
        return answer["ContentLength"], answer.get("Metadata", {}).get(MARK, "")

    def _reason(self, key: str, refusal: RefusedError) -> RefusedError:
        """Why the server refused to look at an object: its answer to HEAD has no room for that."""
        try:
            answer = self.request("get", "get_object", Key=self.full(key), Range="bytes=0-0")
        except RefusedError as told:
            return told if told.status == refusal.status else refusal
        answer["Body"].close()
        return refusal

    def _look_after_writing(self, key: str) -> tuple[int, str]:
        found = self._look(key)
        if found is None:
            raise UnfaithfulError(f"{key} is not there after it was written")
        return found

    def _check_bucket(self) -> None:
        """Tell a missing bucket from a missing object, which look alike to HEAD."""
        if self._bucket_is_there:
            return
        try:
            self.request("head", "head_bucket")
        except RefusedError as refusal:
            if refusal.status == 404:
                raise RefusedError(404, "NoSuchBucket", "", "") from refusal
            if refusal.status != 403:  # looking at the bucket is a right of its own
                raise
        self._bucket_is_there = True

    def _remove(self, key: str) -> None:
        def act() -> None:
            try:
                self.request("delete", "delete_object", Key=self.full(key))
            except RefusedError as refusal:
                if refusal.status != 404 or refusal.code == "NoSuchBucket":
                    raise

        repeat(self.place(f"deleting {key}"), act)

    def _read_range(self, key: str, offset: int, view: memoryview) -> None:
        def act() -> None:
            try:
                with _failing():
                    perform("s3.get", self._get, key, offset, view)
            except RefusedError as refusal:
                if refusal.status == 404 and refusal.code != "NoSuchBucket":
                    raise missing(self, key) from None
                if refusal.status == 416:
                    raise short(self, key, offset + len(view)) from None
                raise

        repeat(self.place(f"reading {key}"), act)

    def _get(self, key: str, offset: int, view: memoryview) -> None:
        end = offset + len(view)
        answer = self._client.get_object(
            Bucket=self._bucket, Key=self.full(key), Range=f"bytes={offset}-{end - 1}"
        )
        body = answer["Body"]
        try:
            said = answer.get("ContentRange", "")
            described = _CONTENT_RANGE.match(said)
            if described is not None and int(described[3]) < end:
                raise short(self, key, end)
            if described is not None and (int(described[1]), int(described[2])) != (
                offset,
                end - 1,
            ):
                raise UnfaithfulError(f'bytes {offset}-{end - 1} were asked for, "{said}" came')
            # Without a Content-Range it is the whole object, or an error that calls itself 200.
            if answer["ContentLength"] != len(view) or (described is None and offset):
                raise UnfaithfulError(f"{len(view)} bytes were asked for, others came")
            done = 0
            while done < len(view):
                count = body.readinto(view[done : done + _PIECE])
                if not count:
                    raise UnreachableError(f"the body ended after {done} of {len(view)} bytes")
                done += count
        finally:
            body.close()

    def _listed(self, prefix: str, after: str) -> Iterator[ObjectInfo]:
        """Objects in the server's order, a page at a time."""
        page = {"Prefix": self.full(prefix)} | ({"StartAfter": self.full(after)} if after else {})
        while True:
            answer = repeat(
                self.place(f"listing {prefix}"),
                lambda: self.request("list", "list_objects_v2", **page),
            )
            for entry in answer.get("Contents", ()):
                key = entry["Key"][len(self._root) :]
                yield ObjectInfo(key, entry["Size"], entry["LastModified"].timestamp())
            if not answer.get("IsTruncated"):
                return
            page["ContinuationToken"] = answer["NextContinuationToken"]


class _Connections:
    """A client with its open connections, and the threads that use it; of one process."""

    def __init__(self, endpoint: str | None, region: str | None) -> None:
        self.process = os.getpid()
        self.client = _connect(endpoint, region)
        self.pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ckpt-s3")

    def close(self) -> None:
        if self.process == os.getpid():
            self.pool.shutdown()
            self.client.close()


def _connect(endpoint: str | None, region: str | None) -> Any:
    """A client of its own, which several threads may share."""
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError

    if endpoint is not None:
        check_endpoint(endpoint)
    config = Config(
        retries={"total_max_attempts": 1},
        max_pool_connections=4 * _THREADS,
        connect_timeout=_CONNECT_SECONDS,
        read_timeout=_READ_SECONDS,
        # Trailing checksums, the default, break some servers. On AWS they are asked for.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        # Over plain HTTP the SDK would hash each body once more to sign it, and few servers look.
        s3={"payload_signing_enabled": False},
    )
    try:
        session = boto3.session.Session(region_name=region)
        place = session.region_name or "us-east-1"
        client = session.client("s3", endpoint_url=endpoint, region_name=place, config=config)
    except BotoCoreError as error:
        raise UsageError(
            "s3-options",
            f"the AWS configuration cannot be used: {escape(str(error), 200)}",
            hint="check the region and AWS_PROFILE",
        ) from None
    except ValueError:  # its message shows an endpoint of the configuration
        refuse_endpoint()
    check_endpoint(client.meta.endpoint_url)
    return client


@contextlib.contextmanager
def _failing() -> Iterator[None]:
    """Turn what the SDK and the system raise into a ``RequestError``."""
    try:
        yield
    except (CkptError, RequestError):
        raise
    except Exception as error:
        failure = _failure(error)
        if failure is None:
            raise
        try:
            raise failure from error
        finally:
            del failure  # else it and its frame keep each other, and a connection, alive


def _failure(error: Exception) -> RequestError | None:
    from botocore import exceptions as aws
    from botocore.parsers import ResponseParserError
    from urllib3.exceptions import HTTPError

    kind = type(error).__name__
    if isinstance(error, aws.ClientError):
        answer, said = error.response.get("ResponseMetadata", {}), error.response.get("Error", {})
        date = answer.get("HTTPHeaders", {}).get("date", "")
        status = int(answer.get("HTTPStatusCode", 0))
        return RefusedError(status, str(said.get("Code", "")), str(said.get("Message", "")), date)
    unsigned = (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError)
    if isinstance(error, (*unsigned, aws.TokenRetrievalError, aws.SSOError)):
        return UnsignedError(kind)
    if isinstance(error, aws.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
        return UnreachableError("the certificate of the server is not trusted", passes=False)
    passing = (aws.ConnectionError, aws.HTTPClientError, aws.IncompleteReadError)
    if isinstance(error, (OSError, HTTPError, ResponseParserError, *passing)):
        return UnreachableError(f"{kind}: no whole answer")
    return UnreachableError(kind, passes=False) if isinstance(error, aws.BotoCoreError) else None
