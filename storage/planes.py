"""The coder ``planes``: the bytes of equal rank together, each plane as a zstd frame or raw."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from ckpt.core.errors import IntegrityError
from ckpt.storage.differences import Numbers, blocks
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


def join(planes: Sequence[Bytes], codes: Numbers, spare: Numbers) -> None:
    """Fill ``codes`` from the planes of their bytes, the lowest first; ``spare`` is room for as
    many numbers."""
    if len(planes) > 4:  # vectors hold too few of such large numbers
        np.stack(planes, axis=1, out=codes.view(np.uint8).reshape(len(codes), -1))
        return
    codes[:] = planes[-1]
    for plane in reversed(planes[:-1]):
        codes <<= codes.dtype.type(8)
        spare[:] = plane
        codes |= spare


def write_planes(codes: Numbers, effort: str) -> Iterator[bytes | memoryview]:
    """Encode the bytes of equal rank of ``codes`` together, the lowest first; yields the parts of
    the body, each of which is of use until the next one is asked for."""
    alone = codes.itemsize == 1
    for rank in range(codes.itemsize):
        yield from _written(codes if alone else _plane(codes, rank), effort, alone=alone)


def _plane(codes: Numbers, rank: int) -> Bytes:
    plane = np.frombuffer(scratch("part", len(codes)), np.uint8)
    for part in blocks(len(codes)):
        # Shifts of whole numbers use the processor's vectors; picking every nth byte does not.
        plane[part] = codes[part] >> codes.dtype.type(8 * rank) if rank else codes[part]
    return plane


def _written(plane: Bytes, effort: str, *, alone: bool) -> tuple[bytes, bytes | memoryview]:
    body: bytes | memoryview
    if alone:
        body = zstandard.ZstdCompressor(level=_LEVELS[effort]).compress(plane.data)
    elif effort == "auto" and not _is_worth(plane):
        body = plane.data
    else:
        body = _coders.entropy.compress(plane.data)
        if effort == "max" and len(body) < len(plane):  # there may be runs of zeros
            body = min(body, _coders.runs.compress(plane.data), key=len)
    if len(body) < len(plane):
        return bytes([_ZSTD]) + len(body).to_bytes(4, "little"), body
    return bytes([_RAW]) + len(plane).to_bytes(4, "little"), plane.data


def _is_worth(plane: Bytes) -> bool:
    """Whether pieces of a long plane become enough shorter."""
    if len(plane) < 4 * _SAMPLES * _SAMPLE_BYTES:
        return True
    starts = np.linspace(0, len(plane) - _SAMPLE_BYTES, _SAMPLES).astype(int)
    pieces = np.concatenate([plane[at : at + _SAMPLE_BYTES] for at in starts])
    return len(_coders.entropy.compress(pieces.data)) <= _WORTH * len(pieces)


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
