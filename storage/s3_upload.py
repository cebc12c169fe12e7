"""An upload to S3: one request while the object is small, parts side by side when it is not.

Parts are kept until they are whole, the first one until all others are there, since the header of a
pack is written last.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ckpt.core.errors import AccessError, CkptError, StorageError
from ckpt.storage.s3_failures import RefusedError, UnfaithfulError, repeat
from ckpt.storage.store import Upload, differs

if TYPE_CHECKING:
    from ckpt.storage.s3 import S3Store

MARK = "ckpt-upload"  # the metadata by which an upload knows its own object again
SINGLE_BYTES = 24 << 20  # from here on an object is sent in parts
PART_BYTES = 8 << 20
_PARTS_OF_ONE_SIZE = 1000
_MARKERS = ("KeyMarker", "UploadIdMarker")
_PARTS_AHEAD = 4  # whole parts that may wait to be sent, or be on their way


class Place(NamedTuple):
    """A part of an object: its number from 1, its first byte, its size when it is full."""

    number: int
    start: int
    size: int


def part_at(offset: int) -> Place:
    """The part that byte ``offset`` of any object lies in.

    Sizes double after each thousand parts: a server takes 10,000, and how much is still to come
    is not known.
    """
    first, start, size = 1, 0, PART_BYTES
    while offset >= start + _PARTS_OF_ONE_SIZE * size:
        first, start = first + _PARTS_OF_ONE_SIZE, start + _PARTS_OF_ONE_SIZE * size
        size *= 2
    number = (offset - start) // size
    return Place(first + number, start + number * size, size)


@dataclass(slots=True)
class _Part:
    """The bytes of one part."""

    place: Place
    body: bytearray
    written: int = 0


class S3Upload(Upload):
    """An object on its way to ``store``.

    The memory it takes: below 24 MiB the object; above, four whole parts, the first one, and
    those that still have gaps.
    """

    def __init__(self, store: S3Store, key: str) -> None:
        self._store = store
        self._key = key
        self._doing = store.place(f"writing {key}")
        self._mark = secrets.token_hex(16)
        self._lock = threading.Lock()
        self._parts: dict[int, _Part] = {}
        self._written = self._end = 0
        self._begins = 0
        self._id = ""
        self._room = threading.BoundedSemaphore(_PARTS_AHEAD)
        self._sending: list[Future[None]] = []
        self._sent: dict[int, Mapping[str, Any]] = {}
        self._sent_bodies: list[bytearray] = []
        self._failure: BaseException | None = None
        self._over = False

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        while view:
            place = part_at(offset)
            piece = view[: place.start + place.size - offset]
            with self._lock:
                part = self._parts.get(place.number)
                if part is None:
                    part = self._parts[place.number] = _Part(place, self._room_for(place.size))
            part.body[offset - place.start : offset - place.start + len(piece)] = piece
            view, offset = view[len(piece) :], offset + len(piece)
            self._send_whole(part, len(piece), offset)

    def _room_for(self, size: int) -> bytearray:
        """The memory of a part that was sent, if one has this size: the system clears new memory,
        and clearing takes longer than filling it."""
        fitting = self._sent_bodies and len(self._sent_bodies[-1]) == size
        return self._sent_bodies.pop() if fitting else bytearray(size)

    def publish(self, size: int) -> None:
        if not self._written == self._end == size:
            raise StorageError("io", f"{self._key} was not written completely")
        if self._begins:
            with self._noting():
                published = self._finish(size)
        else:
            published = self._store.write_whole(self._key, self._joined(size), self._mark)
        if not published:
            raise differs(self._store, self._key)
        if self._begins > 1:
            self._sweep()  # what an earlier try began although its answer was lost
        self._over = True
        self._let_go()

    def _joined(self, size: int) -> bytearray:
        """All parts as one, one after the other let go, so that no byte is kept twice."""
        body = bytearray()
        for number in sorted(self._parts):
            body += self._parts.pop(number).body
        del body[size:]
        return body

    def abort(self) -> None:
        if self._over:
            return
        self._over = True
        failure = self._failure = self._failure or StorageError(
            "aborted", f"{self._key} was given up"
        )
        wait(self._sending)
        self._let_go()
        # A server that was asked in vain for minutes is not asked for as long once more: what is
        # left goes with a collection, as what a process leaves that dies.
        if self._begins and not (isinstance(failure, StorageError) and failure.code == "network"):
            self._sweep()

    def _let_go(self) -> None:
        self._parts.clear()
        self._sent_bodies.clear()

    def _send_whole(self, part: _Part, count: int, end: int) -> None:
        """Note what was written, and send what is now whole."""
        with self._lock:
            part.written += count
            self._written += count
            self._end = max(self._end, end)
            if self._end < SINGLE_BYTES:
                return
            if not self._id:
                with self._noting():
                    self._id = repeat(self._doing, self._begin)
            whole = [
                self._parts.pop(number)
                for number, part in sorted(self._parts.items())
                if number > 1 and part.written == part.place.size
            ]
        for ready in whole:
            self._send(ready.place.number, ready.body)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep what goes wrong first."""
        try:
            yield
        except CkptError as failure:
            self._failure = self._failure or failure
            raise

    def _begin(self) -> str:
        self._begins += 1
        answer = self._store.request(
            "begin",
            "create_multipart_upload",
            Key=self._store.full(self._key),
            Metadata={MARK: self._mark},
            **self._store.checksum,
        )
        return str(answer["UploadId"])

    def _send(self, number: int, body: bytearray) -> None:
        """Hand a part over, as soon as few enough others are on their way."""
        self._room.acquire()
        if self._failure is not None:
            self._room.release()
            raise self._failure
        future = self._store.pool.submit(self._send_part, number, body)
        future.add_done_callback(self._note_sent)
        with self._lock:
            self._sending.append(future)

    def _note_sent(self, future: Future[None]) -> None:
        self._failure = self._failure or future.exception()
        self._room.release()

    def _send_part(self, number: int, body: bytearray) -> None:
        self._sent[number] = repeat(self._doing, lambda: self._put_part(number, body))
        with self._lock:
            self._sent_bodies.append(body)

    def _put_part(self, number: int, body: bytearray) -> Mapping[str, Any]:
        if self._failure is not None:  # between two tries, what they are for may have ended
            raise self._failure
        answer = self._store.request(
            "upload_part",
            "upload_part",
            Key=self._store.full(self._key),
            UploadId=self._id,
            PartNumber=number,
            Body=body,
            **self._store.proof_of(body),
        )
        checksums = {name: answer[name] for name in ("ChecksumCRC32",) if name in answer}
        return {"PartNumber": number, "ETag": answer["ETag"], **checksums}

    def _finish(self, size: int) -> bool:
        """Send what is left, the first part last, and make one object of all."""
        for number, part in sorted(self._parts.items()):
            if number > 1:
                del part.body[size - part.place.start :]
                self._send(number, part.body)
        self._drain()
        self._send(1, self._parts[1].body)
        self._drain()
        parts = [self._sent[number] for number in sorted(self._sent)]
        return self._store.publish(
            self._key,
            size,
            self._mark,
            lambda condition: self._store.request(
                "complete",
                "complete_multipart_upload",
                Key=self._store.full(self._key),
                UploadId=self._id,
                MultipartUpload={"Parts": parts},
                **condition,
            ),
        )

    def _drain(self) -> None:
        wait(self._sending)
        for sent in self._sending:
            sent.result()  # whoever waits may wake before ``_note_sent`` runs

    def _sweep(self) -> None:
        """End every unfinished upload of the key, which no other push ever writes.

        Raises:
            AccessError, StorageError: an upload may be left.
        """
        name = self._store.full(self._key)
        if self._id:
            repeat(self._doing, lambda: _end(self._store, name, self._id))
        try:
            end_uploads(self._store, self._doing, name, lambda found, _: found == name)
        except AccessError:
            # Listing uploads is a right of its own; without it, what is known has been ended.
            if not self._id or self._begins > 1:
                raise


def end_uploads(
    store: S3Store, doing: str, prefix: str, is_dead: Callable[[str, float], bool]
) -> None:
    """End the unfinished uploads below ``prefix`` of which ``is_dead`` is true, by the name in the
    bucket and the time when it began.

    Raises:
        AccessError, StorageError: one may be left.
    """

    def act() -> None:
        every = _unfinished(store, prefix)
        found = [(name, upload) for name, upload, began in every if is_dead(name, began)]
        for name, upload in found:
            _end(store, name, upload)
        if found:  # a part that was on its way may have brought one back
            raise UnfaithfulError(f"{len(found)} unfinished uploads were still there")

    repeat(doing, act)


def _unfinished(store: S3Store, prefix: str) -> Iterator[tuple[str, str, float]]:
    page = {"Prefix": prefix}
    while True:
        answer = store.request("list", "list_multipart_uploads", **page)
        for upload in answer.get("Uploads", ()):
            began = upload.get("Initiated")
            yield upload["Key"], upload["UploadId"], began.timestamp() if began else time.time()
        if not answer.get("IsTruncated"):
            return
        # SeaweedFS goes on from the upload alone.
        after = {name: answer[f"Next{name}"] for name in _MARKERS if answer.get(f"Next{name}")}
        if not after:
            raise UnfaithfulError("a list of uploads is cut and cannot be continued")
        page |= after


def _end(store: S3Store, name: str, upload: str) -> None:
    try:
        store.request("abort", "abort_multipart_upload", Key=name, UploadId=upload)
    except RefusedError as refusal:
        if refusal.code != "NoSuchUpload":
            raise
