"""The chunks of a push made smaller: ahead of their being written, in order, in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from ckpt.core.tensors import CHUNK_BYTES, TensorBytes, chunk_spans
from ckpt.service.bases import ENCODED_BYTES, Bases, Compress, Kept, encode_chunk
from ckpt.service.sharing import Sharing
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.storage.codecs import Encoded

_THREADS = 2
_SMALL_BYTES = 1 << 20  # to hand over a smaller tensor would cost more than to encode it

# (source, chunk number)
Place = tuple[int, int]
# Takes a chunk in its encoded form; None where it is to be stored as it is.
Use = Callable[[int, int, "Encoded | None"], None]


class Encoding:
    """Encodes chunks of ``sources``, of those before ``apart``, in threads of its own."""

    def __init__(
        self,
        store: Store,
        sources: Sequence[TensorBytes],
        apart: int,
        sharing: Sharing,
        compress: Compress,
        bases: Bases,
        kept: Kept,
    ) -> None:
        self._store = store
        self._sources = sources
        self._apart = apart
        self._sharing = sharing
        self._compress = compress
        self._bases = bases
        self._kept = kept
        # A chunk that "max" encodes takes up to 48 MiB beside it, and a server's parts take 56.
        threads = 1 if compress == "max" and not store.is_near else _THREADS
        self._coders = [_Coder() for _ in range(threads)]

    def close(self) -> None:
        """End the threads; what none of them has begun is not done."""
        for coder in self._coders:
            coder.pool.shutdown(wait=True, cancel_futures=True)

    def may_shrink(self, index: int) -> bool:
        """Whether the chunks of a source are worth the try."""
        if index >= self._apart or self._sources[index].nbytes < ENCODED_BYTES:
            return False
        return self._compress == "max" or any(self._bases.get(index, ()))

    def base(self, index: int, number: int) -> str | None:
        """What a chunk may be stored as the difference to."""
        return self._bases[index][number] if index in self._bases else None

    def encode_all(self, places: Iterable[Place], use: Use) -> None:
        """Have ``use`` called for each place, in order, while later ones are being encoded."""
        running: deque[_Running] = deque()
        room = len(self._coders) * CHUNK_BYTES
        for place in places:
            length = self._length(*place)
            while running and sum(coder.held for coder in self._coders) + length > room:
                running.popleft().hand_over(use)
            running.append(self._begin(place, length))
        while running:
            running.popleft().hand_over(use)

    def _length(self, index: int, number: int) -> int:
        return chunk_spans(self._sources[index].nbytes)[number][1]

    def _begin(self, place: Place, length: int) -> _Running:
        """Have it done by the coder that holds least, so that one whose work is not yet used gets
        no more: what a thread frees, the C library keeps for that thread, and what it takes beside
        that stays taken."""
        coder = min(self._coders, key=lambda one: one.held)
        coder.held += length
        if self._sources[place[0]].nbytes > _SMALL_BYTES:
            return _Running(place, length, coder, coder.pool.submit(self._encode, *place))
        done: Future[Encoded | None] = Future()
        done.set_result(self._encode(*place))
        return _Running(place, length, coder, done)

    def _encode(self, index: int, number: int) -> Encoded | None:
        """The chunk in a smaller form, if there is one."""
        if not self.may_shrink(index):
            return None
        source, base = self._sources[index], self.base(index, number)
        if base is not None and self._sharing.base_pack(base) is None:
            base = None
        if base is None and self._compress != "max":
            return None
        raw = source.read(*chunk_spans(source.nbytes)[number])
        places = self._sharing.base_places()
        return encode_chunk(
            self._store, places, raw, source.dtype, base, self._compress, self._kept
        )


class _Coder:
    """A thread, and how many bytes of chunks it has in work or made and not seen used."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="ckpt-encode")
        self.held = 0


class _Running:
    """One chunk in work."""

    def __init__(
        self, place: Place, length: int, coder: _Coder, task: Future[Encoded | None]
    ) -> None:
        self._place, self._length, self._coder, self._task = place, length, coder, task

    def hand_over(self, use: Use) -> None:
        use(*self._place, self._task.result())
        self._coder.held -= self._length
