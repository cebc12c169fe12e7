"""``TensorBytes``: the one live thing that passes between the loader and the storage."""

from __future__ import annotations

from typing import Protocol

from ckpt.core.digests import digest_of

CHUNK_BYTES = 16 << 20


class TensorBytes(Protocol):
    """The stored bytes of one tensor: little-endian, C order, read in pieces and more than once.

    ``dtype`` is a name of ``core.dtypes``; ``shape`` is the stored shape (an expanded dimension
    is stored once), so that ``prod(shape) * itemsize == nbytes``.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...

    def read(self, offset: int, length: int) -> memoryview:
        """``length`` bytes from ``offset``: a view where the bytes lie in memory, else a copy."""
        ...


class TensorSpace(Protocol):
    """Room for the bytes of one tensor that is being pulled."""

    def write(self, offset: int, data: memoryview) -> None:
        """Put ``data`` at ``offset``. Called from several threads, never twice for a byte."""
        ...

    def view(self, offset: int, length: int) -> memoryview | None:
        """Writable memory for these bytes, if they lie in memory; they are then not written."""
        ...


def chunk_spans(nbytes: int) -> list[tuple[int, int]]:
    """``(offset, length)`` of each chunk of a tensor of ``nbytes`` bytes; none for an empty one."""
    return [(at, min(CHUNK_BYTES, nbytes - at)) for at in range(0, nbytes, CHUNK_BYTES)]


def chunk_digests(source: TensorBytes) -> tuple[str, ...]:
    """The digests of the chunks of the bytes that a source has now."""
    return tuple(digest_of(source.read(*span)) for span in chunk_spans(source.nbytes))
