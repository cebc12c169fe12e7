"""The coder ``planes``: the bytes of equal rank together, each plane as a zstd frame or raw."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from ckpt.core.errors import IntegrityError
from ckpt.storage.differences import BLOCK, Numbers, blocks
from ckpt.storage.scratch import scratch

_RAW, _ZSTD = 0, 1
_HEAD = 5  # the kind, and the length as 4 bytes
# Planes of floats have no repetitions worth a search: with the smallest table zstd is all but a
# Huffman coder, twice as fast, and smaller than at its higher levels.
_ENTROPY = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST, window_log=17, hash_log=6, min_match=7
)
_LEVELS = {"auto": 3, "max": 12}  # of bytes that stand alone and may be text

_SAMPLES, _SAMPLE_BYTES = 4, 4096
_WORTH = 0.90  # with "auto", what a plane may have of its bytes: more is all but noise, and slow

Bytes = NDArray[np.uint8]


class _Coders(threading.local):
    """This thread's coders: to make one takes longer than to code a short plane."""

    def __init__(self) -> None:
        self.entropy = zstandard.ZstdCompressor(compression_params=_ENTROPY)
        self.runs = zstandard.ZstdCompressor(level=1)
        self.reader = zstandard.ZstdDecompressor()


_coders = _Coders()


def split(codes: Numbers, planes: Bytes, spare: Numbers) -> None:
    """Put the bytes of a block into its planes, one row for each rank, the lowest first; ``spare``
    is room for as many numbers."""
    planes[0] = codes
    for rank in range(1, len(planes)):
        # Shifts of whole numbers use the processor's vectors; picking every nth byte does not.
        np.right_shift(codes, codes.dtype.type(8 * rank), out=spare)
        planes[rank] = spare


def join(planes: Sequence[Bytes], codes: Numbers, spare: Numbers) -> None:
    """The inverse of :func:`split`: fill ``codes``."""
    if len(planes) > 4:  # vectors hold too few of such large numbers
        np.stack(planes, axis=1, out=codes.view(np.uint8).reshape(len(codes), -1))
        return
    codes[:] = planes[-1]
    for plane in reversed(planes[:-1]):
        codes <<= codes.dtype.type(8)
        spare[:] = plane
        codes |= spare


def write_planes(split_blocks: Bytes, size: int, effort: str) -> Iterator[bytes]:
    """Encode the planes of numbers of ``size`` bytes, which are split block by block; yields the
    parts of the body."""
    count = len(split_blocks) // size
    for rank in range(size):
        pieces = []
        for part in blocks(count):
            length = part.stop - part.start
            begin = part.start * size + rank * length
            pieces.append(split_blocks.data[begin : begin + length])
        body = _shorter(pieces, effort, alone=size == 1)
        yield bytes([_RAW if body is None else _ZSTD])
        body = b"".join(pieces) if body is None else body
        yield len(body).to_bytes(4, "little")
        yield body


def _shorter(pieces: Sequence[memoryview], effort: str, *, alone: bool) -> bytes | None:
    """The plane of these pieces as a zstd frame, where that pays."""
    if effort == "auto" and not alone and not _is_worth(pieces):
        return None
    plane = _joined(pieces)
    if alone:
        body = zstandard.ZstdCompressor(level=_LEVELS[effort]).compress(plane)
    else:
        body = _coders.entropy.compress(plane)
        if effort == "max" and len(body) < len(plane):  # there may be runs of zeros
            body = min(body, _coders.runs.compress(plane), key=len)
    return body if len(body) < len(plane) else None


def _joined(pieces: Sequence[memoryview]) -> memoryview:
    if len(pieces) == 1:
        return pieces[0]
    room, at = scratch("part", sum(map(len, pieces))), 0
    for piece in pieces:
        room[at : at + len(piece)] = piece
        at += len(piece)
    return room


def _is_worth(pieces: Sequence[memoryview]) -> bool:
    """Whether samples of a long plane become enough shorter."""
    length = sum(map(len, pieces))
    if length < 4 * _SAMPLES * _SAMPLE_BYTES:
        return True
    samples = []
    for start in np.linspace(0, length - _SAMPLE_BYTES, _SAMPLES).astype(int):
        index, at = divmod(int(start), BLOCK)
        samples.append(pieces[index][at : at + _SAMPLE_BYTES])
    sample = b"".join(samples)
    return len(_coders.entropy.compress(sample)) <= _WORTH * len(sample)


def read_planes(body: memoryview, planes: int, length: int) -> list[Bytes]:
    """The planes of an encoded body; each has ``length`` bytes.

    Raises:
        IntegrityError: the body is not exactly that many planes of that length.
    """
    found: list[Bytes] = []
    for _ in range(planes):
        size = int.from_bytes(body[1:_HEAD], "little")
        data = body[_HEAD : _HEAD + size]
        if len(body) < _HEAD or len(data) != size:
            raise IntegrityError("pack-damaged", "an encoded chunk is cut off")
        found.append(np.frombuffer(_read(body[0], data, length), np.uint8))
        body = body[_HEAD + size :]
    if len(body):
        raise IntegrityError("pack-damaged", "an encoded chunk has bytes after its end")
    return found


def _read(kind: int, data: memoryview, length: int) -> bytes | memoryview:
    if kind == _RAW and len(data) == length:
        return data
    if kind != _ZSTD:
        raise IntegrityError("pack-damaged", "a plane of an encoded chunk is damaged")
    try:
        # the decoder allocates what the frame announces, so that is looked at first
        announced = zstandard.get_frame_parameters(data).content_size
        if announced == length:
            return _coders.reader.decompress(data, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise IntegrityError(
            "pack-damaged", f"a plane of an encoded chunk is damaged: {error}"
        ) from None
    raise IntegrityError("pack-damaged", f"a plane has {announced} bytes instead of {length}")
