"""Reading a version's chunks from the store: planned, in parallel, every one checked."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from ckpt.core.digests import digest_of
from ckpt.core.documents import Tensor
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import IntegrityError, NotFoundError
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.tensors import CHUNK_BYTES, TensorSpace, chunk_spans
from ckpt.registry.registry import Registry
from ckpt.service.mapping import Mappings
from ckpt.service.upload import Progress
from ckpt.storage.chunks import Places, read_chunk
from ckpt.storage.read_ahead import read_in
from ckpt.storage.scratch import scratch
from ckpt.storage.store import Store

_log = logging.getLogger(__name__)

# A pull may have 128 MiB beside its state. Chunks that go to a file wait in memory, 16 MiB each;
# decoding takes memory beside the chunk, and the processors.
_THREADS, _DECODING_THREADS = 6, 2


@dataclass(frozen=True, slots=True)
class Wanted:
    """One tensor to read: its chunks, and where its bytes go. ``adopt`` takes the bytes where they
    lie instead, and says whether it can."""

    name: str
    nbytes: int
    chunks: tuple[str, ...]
    space: TensorSpace
    adopt: Callable[[memoryview], bool] | None = None


def stored_size(tensor: Tensor) -> int:
    """The bytes of a tensor whose values are all stored, in C order."""
    return math.prod(tensor.shape) * ITEM_SIZES[tensor.dtype]


@dataclass(frozen=True, slots=True)
class _Piece:
    """One chunk to read, with ``encoded`` to decode too, or with ``adopted`` only to check where
    it lies; ``offset`` is its place in the tensor."""

    wanted: Wanted
    digest: str
    offset: int
    length: int
    place: tuple[str, int]
    encoded: bool
    adopted: bool


def fetch(
    store: Store,
    registry: Registry,
    version: Version,
    wanted: Sequence[Wanted],
    progress: Progress | None = None,
    places: Places | None = None,
) -> None:
    """Fill the spaces of ``wanted`` with checked bytes; ``places`` are those of the version, where
    somebody has asked for them already.

    A pack may be replaced by another while we read; then the plan is made anew. What is missing
    or wrong under an unchanged plan is an error.

    Raises:
        IntegrityError: ``object-missing``, ``object-short``, ``object-corrupt``, naming version,
            tensor, key, and for the last the expected and the found digest.
        NotFoundError: ``version-missing`` when the version was removed meanwhile.
    """
    before: set[str] | None = None
    while True:
        if places is None:
            places = Places(*registry.books.read_plan(version.push))
        try:
            pieces = _plan(version, wanted, places, Mappings(store, places))
            _read_all(store, version, places, pieces, progress)
            return
        except IntegrityError:
            if registry.queries.by_push(version.push) is None:
                raise NotFoundError(
                    "version-missing", f"{version.reference} was removed while it was read"
                ) from None
            if before == set(places.packs):
                raise
            before, places = set(places.packs), None


def _plan(
    version: Version,
    wanted: Sequence[Wanted],
    places: Places,
    mappings: Mappings,
) -> list[_Piece]:
    pieces = []
    for tensor in wanted:
        spans = chunk_spans(tensor.nbytes)
        if len(spans) != len(tensor.chunks):
            raise IntegrityError(
                "document-damaged",
                f'{version.reference}: "{escape(tensor.name)}" has {len(tensor.chunks)} chunks '
                f"for {tensor.nbytes} bytes",
                hint="run `ckpt fsck`",
            )
        adopted = tensor.adopt is not None and mappings.offer(tensor.chunks, tensor.adopt)
        for (offset, length), digest in zip(spans, tensor.chunks, strict=True):
            rows = [row for row in places.rows.get(digest, ()) if row.raw_length == length]
            if not rows:
                raise IntegrityError(
                    "object-missing",
                    f'{version.reference}: no pack has chunk {digest} of "{escape(tensor.name)}"',
                    hint="run `ckpt fsck`",
                )
            place = (places.packs[rows[0].pack].key, rows[0].offset)
            encoded = rows[0].codec is not None
            pieces.append(_Piece(tensor, digest, offset, length, place, encoded, adopted))
    # In the order of the bytes on the disk.
    pieces.sort(key=lambda piece: piece.place)
    return pieces


def _read_all(
    store: Store,
    version: Version,
    places: Places,
    pieces: Sequence[_Piece],
    progress: Progress | None,
) -> None:
    total = sum(piece.length for piece in pieces)
    done = 0
    raw = [piece for piece in pieces if not piece.encoded]
    encoded = [piece for piece in pieces if piece.encoded]
    _log.debug(
        "reading %s: %d raw and %d encoded chunks, %d bytes when decoded",
        version.reference,
        len(raw),
        len(encoded),
        total,
    )

    def read(batch: Sequence[_Piece]) -> int:
        for piece in batch:
            _read_piece(store, version, places, piece)
        return sum(piece.length for piece in batch)

    for some, threads in ((raw, _THREADS), (encoded, _DECODING_THREADS)):
        with ThreadPoolExecutor(threads, thread_name_prefix="ckpt-pull") as pool:
            futures = [pool.submit(read, batch) for batch in _batched(some)]
            try:
                for future in futures:
                    done += future.result()
                    if progress is not None:
                        progress(done, total)
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise


def _read_piece(store: Store, version: Version, places: Places, piece: _Piece) -> None:
    """Read one chunk, straight into its place where that lies in memory; what was adopted is
    read too if it is not right."""
    view = piece.wanted.space.view(piece.offset, piece.length)
    if piece.adopted and view is not None:
        read_in(view)
        if digest_of(view) == piece.digest:
            return
    target = scratch("piece", piece.length) if view is None else view
    try:
        _read_again(lambda: read_chunk(store, places, piece.digest, target))
    except IntegrityError as error:
        where = f'{version.reference}, tensor "{escape(piece.wanted.name)}"'
        raise IntegrityError(error.code, f"{where}: {error.message}", hint=_HINT) from error
    if view is None:
        piece.wanted.space.write(piece.offset, target)


def _read_again(read: Callable[[], None]) -> None:
    """Bytes may be damaged on the way: what is not right is read up to three times."""
    for _ in range(2):
        with contextlib.suppress(IntegrityError):
            return read()
    read()


_HINT = (
    "run `ckpt fsck --read-data`, which marks what is damaged; then push the same content again, "
    "which stores it anew, and run `ckpt fsck --repair`"
)


def _batched(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces gathered so that one task reads about one chunk."""
    batches: list[list[_Piece]] = []
    room = 0
    for piece in pieces:
        if piece.length > room or len(batches[-1]) >= 256:
            batches.append([])
            room = CHUNK_BYTES
        batches[-1].append(piece)
        room -= piece.length
    return batches
