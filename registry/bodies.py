"""JSON bodies in the registry: packed with zstd, and damage made typed when they are read."""

from __future__ import annotations

from typing import Any

import msgspec
import zstandard

from ckpt.core.errors import IntegrityError


def compress(body: bytes) -> bytes:
    """The body as a row keeps it."""
    return zstandard.ZstdCompressor(level=3).compress(body)


def decompress(packed: bytes) -> bytes:
    """The body of a row; IntegrityError ``document-damaged`` when it cannot be decompressed."""
    try:
        return zstandard.ZstdDecompressor().decompress(packed)
    except zstandard.ZstdError as error:
        raise _damaged(str(error)) from None


def read_json(body: bytes) -> Any:
    """The value of a JSON body; IntegrityError ``document-damaged``."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _damaged(str(error)) from None


def _damaged(reason: str) -> IntegrityError:
    return IntegrityError(
        "document-damaged",
        f"a body in the registry cannot be read: {reason}",
        hint="run `ckpt registry rebuild`, which reads the copies in the store",
    )
