"""The bytes of a push on their way into the store: hash, look up, claim, write what is new.

Tensors are hashed ahead while earlier ones are being written. Nothing is shared with the store
before its pack is claimed and its size was checked (rule (c)); what turns out not to be there
any more is written again.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Self

from ckpt.core.digests import digest_of_pieces
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import CkptError, UsageError
from ckpt.core.printable import escape
from ckpt.core.records import Added, Chunk, FinishedPack, Pack
from ckpt.core.tensors import CHUNK_BYTES, TensorBytes, chunk_spans
from ckpt.registry.books import LEASE_SECONDS, Books, push_expired
from ckpt.service.bases import Bases, Compress, Kept
from ckpt.service.encoding import Encoding
from ckpt.service.safetensors_file import FileTensor
from ckpt.service.sharing import Sharing
from ckpt.storage.packs import HEADER_BYTES, PackWriter, chunk_cost, header_cost
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.storage.codecs import Encoded

_log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

_THREADS = 2  # that hash, and as many that wait for what they write
_HASHED_AHEAD = 12
_WRITES_AHEAD = 24
_FLUSH_BYTES = 16 << 20
_PIECE_BYTES = 8 << 20  # of a file, read at once
# Equal tensors up to this size are written under each name (docs/decisions/002).
_REPEATED_BYTES = 1 << 20

# (source, chunk number, offset, length)
_Span = tuple[int, int, int, int]


class Upload:
    """Brings ``sources`` into the store under one push; those from ``apart`` on lie in packs of
    their own. Leaving the context without a commit leaves no temporary file; finished packs
    stay, for the next push of the same content. ``push`` is one that others opened, whose packs
    from ``first_pack`` on are ours.

    Raises:
        UsageError: ``name-too-long``.
    """

    def __init__(
        self,
        store: Store,
        books: Books,
        sources: Sequence[TensorBytes],
        progress: Progress | None = None,
        apart: int | None = None,
        *,
        compress: Compress = "none",
        bases: Bases | None = None,
        kept: Kept | None = None,
        push: str | None = None,
        first_pack: int = 0,
    ) -> None:
        self.push = secrets.token_hex(16) if push is None else push
        self.opened = push is not None
        self.new_bytes = 0
        self._raw_bytes = 0  # of the tensors' bytes, those that are written
        self._by_differences = self._by_coding = 0
        self.needed: set[str] = set()
        self.unregistered: list[FinishedPack] = []
        self.digests: list[tuple[str, ...]] = [()] * len(sources)
        self._store = store
        self._books = books
        self._sources = sources
        self._apart = len(sources) if apart is None else apart
        sizes = [ITEM_SIZES[source.dtype] for source in sources]
        self._order = sorted(
            range(len(sources)), key=lambda index: (index >= self._apart, -sizes[index])
        )
        self._costs = [header_cost(source) for source in sources]
        _check_names(sources, self._costs)
        self._header_room = sum(self._costs)  # what is not known to be shared may still need
        self._typed: list[int] = []
        self._typed_bytes = 0
        self._empty: list[int] = []
        self._chunks: list[tuple[int, int]] = []
        self._mine: set[str] = set()
        self._hits: dict[str, tuple[list[Chunk], tuple[int, int]]] = {}
        self._sharing = Sharing(store, books)
        self._encoding = Encoding(
            store, sources, self._apart, self._sharing, compress, bases or {}, kept or {}
        )
        self._pack: PackWriter | None = None
        self._packs = first_pack
        self._writes: deque[Future[None]] = deque()
        self._renewed = time.monotonic()
        self._meter = _Meter(progress, sum(source.nbytes for source in sources))
        self._stack = ExitStack()
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="ckpt-push")
        self._writers = ThreadPoolExecutor(_THREADS, thread_name_prefix="ckpt-write")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pool in (self._pool, self._writers):
            pool.shutdown(wait=True, cancel_futures=True)
        self._encoding.close()
        self._stack.close()

    def hash(self) -> None:
        """Take all digests; whole new tensors may already be written meanwhile.

        Raises:
            ConflictError: ``push-expired`` when it failed because the push is over.
        """
        with self._told_when_over():
            for group in self._hashed():
                wanted = [digest for index in group for digest in self.digests[index]]
                known = self._books.find_chunks(wanted) if wanted else {}
                for index in group:
                    self._place(index, known)
                if self._typed_bytes >= _FLUSH_BYTES:
                    self._write_typed(range(self._apart))

    def finish(self) -> None:
        """Claim what is shared, write what is not, and finish the packs.

        Afterwards ``needed`` names every pack that the version refers to.

        Raises:
            ConflictError: ``push-expired`` when it failed because the push is over.
        """
        with self._told_when_over():
            self._share()
            for group in (range(self._apart), range(self._apart, len(self._sources))):
                self._write_typed(group)
                self._write_chunks(group)
                self._drain()
                if self._pack is not None:
                    self._close_pack(last=True)
            if not self.opened:
                self._open(())
        self._meter.finish()

    @contextmanager
    def _told_when_over(self) -> Iterator[None]:
        """Whatever fails in a push that is over fails because a collection took its bytes."""
        try:
            yield
        except CkptError as error:
            if self.opened and self._is_over():
                raise push_expired(self.push) from error
            raise

    def _is_over(self) -> bool:
        try:
            return self._books.is_over(self.push) is not False
        except CkptError:  # what went wrong first is what to tell
            return False

    @property
    def added(self) -> Added:
        """What became of the bytes of the sources; of use once all is written."""
        shared = sum(source.nbytes for source in self._sources) - self._raw_bytes
        return Added(self.new_bytes, shared, self._by_differences, self._by_coding)

    def _hashed(self) -> Iterator[list[int]]:
        """Groups of sources, in writing order, whose digests are all taken."""
        running: deque[tuple[list[_Span], Future[list[str]]]] = deque()
        found: dict[int, list[str]] = {}
        for spans in _batched(self._order, self._sources):
            running.append((spans, self._pool.submit(self._digests_of, spans)))
            if len(running) > _HASHED_AHEAD:
                yield self._collect(*running.popleft(), found)
        while running:
            yield self._collect(*running.popleft(), found)

    def _digests_of(self, spans: Sequence[_Span]) -> list[str]:
        taken = []
        for index, _, offset, length in spans:
            taken.append(digest_of_pieces(self._pieces(index, offset, length)))
            self._meter.add(length)
        return taken

    def _pieces(self, index: int, offset: int, length: int) -> Iterator[memoryview]:
        """A chunk, or what is shorter; of a file, one piece after the other is in memory."""
        source, end = self._sources[index], offset + length
        most = _PIECE_BYTES if isinstance(source, FileTensor) else CHUNK_BYTES
        for at in range(offset, end, most):
            yield source.read(at, min(most, end - at))

    def _collect(
        self, spans: Sequence[_Span], future: Future[list[str]], found: dict[int, list[str]]
    ) -> list[int]:
        complete = []
        for (index, _, offset, length), digest in zip(spans, future.result(), strict=True):
            if length:
                found.setdefault(index, []).append(digest)
            if offset + length == self._sources[index].nbytes:
                self.digests[index] = tuple(found.pop(index, ()))
                complete.append(index)
        return complete

    def _place(self, index: int, known: dict[str, list[Chunk]]) -> None:
        """Decide for one tensor: a typed entry, or chunks of which some may be shared."""
        source, digests = self._sources[index], self.digests[index]
        if not digests:
            self._empty.append(index)
            return
        fresh = (
            not any(digest in known for digest in digests) and self._costs[index] <= HEADER_BYTES
        )
        own = len(set(digests)) == len(digests) and self._mine.isdisjoint(digests)
        own |= source.nbytes <= _REPEATED_BYTES
        if fresh and own and not self._encoding.may_shrink(index):
            self._typed.append(index)
            self._typed_bytes += source.nbytes
            self._mine.update(digests)
            return
        self._header_room -= self._costs[index]
        for number, digest in enumerate(digests):
            if digest in known:
                self._hits.setdefault(digest, (known[digest], (index, number)))
            elif digest not in self._mine:
                self._mine.add(digest)
                self._add_chunk(index, number)
                continue
            self._meter.add(self._length(index, number))

    def _add_chunk(self, index: int, number: int) -> None:
        """One chunk of a tensor is to be written by itself."""
        self._chunks.append((index, number))
        self._header_room += chunk_cost(self._sources[index].name)

    def _share(self) -> None:
        """Claim the packs of the hits and of the bases; a hit that cannot be relied on becomes a
        chunk to write."""
        bases = {self._encoding.base(*place) for place in self._chunks} - {None}
        hits = {digest: rows for digest, (rows, _) in self._hits.items()}
        relied_on = {base for base in bases if base is not None}
        settled = self._sharing.settle(hits, relied_on, self._claim)
        self.needed.update(*settled.values())
        for digest, (_, place) in self._hits.items():
            if digest not in settled:
                self._add_chunk(*place)

    def _claim(self, wanted: set[str]) -> list[Pack]:
        return self._books.claim(self.push, wanted) if self.opened else self._open(wanted)

    def _open(self, wanted: Iterable[str]) -> list[Pack]:
        claimed = self._books.open_push(self.push, "push", set(wanted))
        self.opened = True
        return claimed

    def _write_typed(self, group: range) -> None:
        """Give the waiting tensors of a group their typed entries, and start to write their
        bytes."""
        typed = [index for index in self._typed if index in group]
        if not typed:
            return
        self._store.check_room(self._typed_bytes)
        empty = [index for index in self._empty if index in group]
        for index in [*empty, *typed]:
            source = self._sources[index]
            pack = self._pack_for(self._costs[index])
            place = pack.add_tensor(source, self.digests[index])
            self._raw_bytes += source.nbytes
            for offset, length in chunk_spans(source.nbytes):
                self._write(pack, place + offset, index, offset, length)
        self._empty = [index for index in self._empty if index not in group]
        self._typed = [index for index in self._typed if index not in group]
        self._typed_bytes = sum(self._sources[index].nbytes for index in self._typed)

    def _write_chunks(self, group: range) -> None:
        """Write the new chunks of those tensors of a group that are partly in the store, or may
        be made smaller."""
        places = [place for place in self._chunks if place[0] in group]
        self._encoding.encode_all(places, self._write_chunk)

    def _length(self, index: int, number: int) -> int:
        return chunk_spans(self._sources[index].nbytes)[number][1]

    def _write_chunk(self, index: int, number: int, encoded: Encoded | None) -> None:
        """Write a chunk, in its encoded form if there is one."""
        source = self._sources[index]
        offset, length = chunk_spans(source.nbytes)[number]
        self._raw_bytes += length
        pack = self._pack_for(chunk_cost(source.name))
        name, digest = f"{source.name}#{number}", self.digests[index][number]
        if encoded is None:
            self._store.check_room(length)
            place = pack.add_chunk(name, digest, length)
            self._write(pack, place, index, offset, length)
            return
        self._store.check_room(encoded.nbytes)
        from ckpt.storage.codecs import needs_base

        base = self._encoding.base(index, number) if needs_base(encoded.codec) else None
        if base is not None:
            relied_on = self._sharing.base_pack(base)
            assert relied_on is not None
            self.needed.add(relied_on)
            self._by_differences += length - encoded.nbytes
        else:
            self._by_coding += length - encoded.nbytes
        place = pack.add_chunk(
            name, digest, encoded.nbytes, raw_length=length, codec=encoded.codec, base=base
        )
        for part in encoded.parts:  # by this thread, so that no other body waits
            pack.upload.write(place, part)
            place += len(part)
        self._meter.add(length)

    def _write(self, pack: PackWriter, place: int, index: int, offset: int, length: int) -> None:
        def act() -> None:
            at = place
            for piece in self._pieces(index, offset, length):
                pack.upload.write(at, piece)
                at += len(piece)
                del piece  # before the next one is read
            self._meter.add(length)

        if length <= _REPEATED_BYTES:
            act()  # a hand-over would cost more than the write
        else:
            self._submit(act)

    def _submit(self, act: Callable[[], None]) -> None:
        while len(self._writes) >= _WRITES_AHEAD:
            self._writes.popleft().result()
        self._writes.append(self._writers.submit(act))

    def _drain(self) -> None:
        while self._writes:
            self._writes.popleft().result()
        if self.opened and time.monotonic() - self._renewed > LEASE_SECONDS / 4:
            self._books.renew(self.push)
            self._renewed = time.monotonic()

    def _pack_for(self, cost: int) -> PackWriter:
        """The open pack, or a new one when it is full."""
        if self._pack is not None and not self._pack.fits(cost):
            self._close_pack(last=False)
        if self._pack is None:
            if not self.opened:
                self._open(())
            room = max(cost, self._header_room)
            self._pack = PackWriter(self._store, self.push, self._packs, room)
            self._stack.enter_context(self._pack.upload)
            self._packs += 1
        self._header_room -= cost
        return self._pack

    def _close_pack(self, *, last: bool) -> None:
        """Finish the open pack; the last one gets its rows with the commit."""
        assert self._pack is not None
        self._drain()
        finished = self._pack.finish()
        self._pack.upload.abort()  # only its temporary name and its handle are left
        self._pack = None
        _log.debug("wrote %s: %d bytes", finished.pack.key, finished.pack.size)
        self.new_bytes += finished.pack.size
        self.needed.add(finished.pack.id)
        if last:
            self.unregistered.append(finished)
        else:
            self._books.register(self.push, finished)


def _check_names(sources: Sequence[TensorBytes], costs: Sequence[int]) -> None:
    """Refuse a name with which not even one chunk has room in a pack's header."""
    for source, cost in zip(sources, costs, strict=True):
        if cost > HEADER_BYTES and chunk_cost(source.name) > HEADER_BYTES:
            raise UsageError(
                "name-too-long",
                f"the name of a tensor has {len(source.name)} characters: "
                f"{escape(source.name[:80], 80)}; the header of a pack, where it stands twice, "
                f"takes {HEADER_BYTES >> 20} MiB",
                hint="give it a shorter name",
            )


class _Meter:
    """Progress in bytes; each byte counts half when hashed and half when it is stored."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress = progress
        self._total = total
        self._halves = 0
        self._lock = threading.Lock()

    def add(self, length: int) -> None:
        with self._lock:
            self._halves += length
        if self._progress is not None:
            self._progress(min(self._halves // 2, self._total), self._total)

    def finish(self) -> None:
        if self._progress is not None:
            self._progress(self._total, self._total)


def _batched(order: Iterable[int], sources: Sequence[TensorBytes]) -> Iterator[list[_Span]]:
    """Spans in order, gathered so that one task has about one chunk of work."""
    batch: list[_Span] = []
    room = CHUNK_BYTES
    for index in order:
        for number, (offset, length) in enumerate(chunk_spans(sources[index].nbytes) or [(0, 0)]):
            if batch and (length > room or len(batch) >= 256):
                yield batch
                batch, room = [], CHUNK_BYTES
            batch.append((index, number, offset, length))
            room -= length
    if batch:
        yield batch
