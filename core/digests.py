"""BLAKE3 addresses of chunks and JSON bodies."""

from __future__ import annotations

from blake3 import blake3


def digest_of(data: bytes | bytearray | memoryview) -> str:
    """BLAKE3-256 of ``data`` as 64 lower-case hex digits. Releases the GIL."""
    return blake3(data).hexdigest()
