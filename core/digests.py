"""BLAKE3 addresses of chunks, tensors and JSON bodies."""

from __future__ import annotations

from collections.abc import Sequence

from blake3 import blake3


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3-256 of ``data`` as 64 lower-case hex digits. Releases the GIL."""
    return blake3(data).hexdigest()


def tensor_digest(chunks: Sequence[str]) -> str:
    """The digest of a tensor from its chunks' digests (``docs/format.md`` section 2)."""
    if len(chunks) == 1:
        return chunks[0]
    return digest_of(b"".join(map(bytes.fromhex, chunks)))
