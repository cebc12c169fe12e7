"""BLAKE3 addresses of chunks and JSON bodies."""

from __future__ import annotations

from collections.abc import Iterable

from blake3 import blake3


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3-256 of ``data`` as 64 lower-case hex digits. Releases the GIL."""
    return blake3(data).hexdigest()


def digest_of_pieces(pieces: Iterable[bytes | bytearray | memoryview]) -> str:
    """The digest of all pieces, one after the other."""
    digest = blake3()
    for piece in pieces:
        digest.update(piece)
        del piece  # before the next one is made
    return digest.hexdigest()
