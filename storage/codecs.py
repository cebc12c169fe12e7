"""Lossless codecs of chunks: names, the choice between them, encode and decode.

A codec's name is ``<coder>-<model>-<element>`` and says all that a decoder needs beside the base:
``planes-alone-f32``, ``pco-difference-bf16``. The bodies are described in ``docs/format.md``
section 3; a name that is given out once stays readable for good.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ckpt.core.errors import IntegrityError
from ckpt.storage import differences, groups, planes
from ckpt.storage.differences import ELEMENTS, Element, Numbers, blocks, element_of
from ckpt.storage.scratch import scratch

Effort = Literal["auto", "max"]

# What an encoded chunk may have of the raw one: less saving is not worth its decoding.
_MOST = {"auto": 0.90, "max": 0.98}
# A difference binds a version to the packs of its base, so it has to be smaller by some more.
_DIFFERENCE_GAIN = 0.98
# What pcodec has to leave of what planes take: it is many times slower.
_PCO_GAIN = 0.998
_SAMPLES, _SAMPLE_LENGTH = 16, {"auto": 512, "max": 2048}  # elements
_LEAST = 4096  # bytes; what a shorter chunk saves, its description in the pack costs
_LARGE = 8 << 20  # bytes; a shorter body is joined, to be written at once
_SCALE = struct.Struct("<f")


@dataclass(frozen=True, slots=True)
class Encoded:
    """A chunk in encoded form: the parts of its body, not joined, since a join would take as much
    memory again."""

    codec: str
    parts: tuple[bytes, ...]

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.parts))


@dataclass(frozen=True, slots=True)
class _Codec:
    coder: Literal["planes", "pco"]
    difference: bool
    element: Element

    @property
    def name(self) -> str:
        return f"{self.coder}-{'difference' if self.difference else 'alone'}-{self.element.name}"


_CODECS = {
    codec.name: codec
    for element in ELEMENTS.values()
    for difference in (False, True)
    for codec in (
        _Codec("planes", difference, element),
        *([_Codec("pco", difference, element)] if element.size > 1 else []),
    )
}
NAMES = tuple(_CODECS)


@dataclass(frozen=True, slots=True)
class _Plan:
    """One way to encode a chunk."""

    codec: _Codec
    scale: float = 1.0


def needs_base(codec: str) -> bool:
    """Whether chunks of ``codec`` are differences.

    Raises:
        IntegrityError: ``codec`` is none that is known here.
    """
    return _codec(codec).difference


def encode(
    raw: memoryview, dtype: str, base: memoryview | None, room: memoryview, *, effort: Effort
) -> Encoded | None:
    """The shortest form of a chunk that pays, or None where it is stored raw.

    ``base`` is the chunk at the same place of the same tensor in an earlier version, of the same
    dtype and length. It may lie in ``room``, which has the chunk's length too and any content
    afterwards. ``effort`` trades time for bytes. Releases the GIL for most of its time.
    """
    if base is not None and len(base) != len(raw):
        raise ValueError(f"a base of {len(base)} bytes for a chunk of {len(raw)}")
    if len(raw) < _LEAST:
        return None
    element = element_of(dtype, len(raw))
    values = np.frombuffer(raw, element.dtype)
    reference = None if base is None else np.frombuffer(base, element.dtype)
    plan = _choose(values, reference, element, effort)
    if plan is None:
        return None
    parts: list[bytes] = []
    left = _MOST[effort] * len(raw)
    codes = np.frombuffer(room, element.dtype)
    for part in _parts(plan, values, reference, codes, effort):
        left -= len(part)
        if left < 0:
            return None
        parts.append(part)
    if len(raw) < _LARGE:
        parts = [b"".join(parts)]
    return Encoded(plan.codec.name, tuple(parts))


def decode(codec: str, body: bytes | memoryview, base: memoryview | None, into: memoryview) -> None:
    """Fill ``into``, which has the raw chunk's length, from an encoded body. The base may lie
    there, and the body of a codec that needs none.

    Raises:
        IntegrityError: the body is damaged, or the codec is not known. ``into`` may then have
            any content.
    """
    found = _codec(codec)
    if found.difference != (base is not None) or (base is not None and len(base) != len(into)):
        raise IntegrityError("pack-damaged", f"a chunk of codec {codec} has no base of its length")
    if len(into) % found.element.size:
        raise IntegrityError("pack-damaged", f"{len(into)} bytes cannot have codec {codec}")
    target = np.frombuffer(into, found.element.dtype)
    reference = None if base is None else np.frombuffer(base, found.element.dtype)
    rest = memoryview(body)
    scale = 1.0
    if _has_scale(found):
        if len(rest) < _SCALE.size:
            raise IntegrityError("pack-damaged", "an encoded chunk is cut off")
        (scale,) = _SCALE.unpack(rest[: _SCALE.size])
        rest = rest[_SCALE.size :]
        if not differences.SMALLEST_SCALE <= scale <= 1:
            raise IntegrityError("pack-damaged", f"a chunk's base is scaled by {scale}")
    read = _read_pco if found.coder == "pco" else _read_planes
    read(_Plan(found, scale), rest, reference, target)


def _codec(name: str) -> _Codec:
    found = _CODECS.get(name)
    if found is None:
        raise IntegrityError(
            "unknown-codec", f"codec {name!r} is not known", hint="update ckpt and run again"
        )
    return found


def _has_scale(codec: _Codec) -> bool:
    return codec.difference and codec.element.name == "f32"


def _choose(
    values: Numbers, base: Numbers | None, element: Element, effort: Effort
) -> _Plan | None:
    """The plan that makes a sample of the chunk shortest, if it may pay."""
    sample = _sample(values, effort)
    reference = None if base is None else _sample(base, effort)
    lengths = {
        plan: _length(plan, sample, reference) for plan in _plans(sample, reference, element)
    }
    best = min(lengths, key=lambda plan: lengths[plan])
    if effort == "max" and element.size > 1:
        # What planes make of the models tells them apart, at a fraction of the other coder's time.
        other = replace(best, codec=replace(best.codec, coder="pco"))
        lengths[other] = _length(other, sample, reference)
        if lengths[other] < _PCO_GAIN * lengths[best]:
            best = other
    return best if lengths[best] < (_MOST[effort] + 0.02) * sample.nbytes else None


def _length(plan: _Plan, sample: Numbers, base: Numbers | None) -> float:
    """The bytes of a sample by that plan; a difference counts for some more."""
    codes = np.empty_like(sample)
    length = sum(map(len, _parts(plan, sample, base, codes, "auto")))
    return length / _DIFFERENCE_GAIN if plan.codec.difference else length


def _sample(values: Numbers, effort: Effort) -> Numbers:
    """Pieces spread over the chunk; the whole of a short one."""
    length = _SAMPLE_LENGTH[effort]
    if len(values) <= 2 * _SAMPLES * length:
        return values
    starts = np.linspace(0, len(values) - length, _SAMPLES).astype(int)
    return np.concatenate([values[at : at + length] for at in starts])


def _plans(values: Numbers, base: Numbers | None, element: Element) -> list[_Plan]:
    alone = _Plan(_Codec("planes", False, element))
    if base is None:
        return [alone]
    scales = sorted({1.0, differences.guess_scale(values, base, element)})
    return [alone, *(_Plan(_Codec("planes", True, element), scale) for scale in scales)]


def _parts(
    plan: _Plan, values: Numbers, base: Numbers | None, codes: Numbers, effort: Effort
) -> Iterator[bytes]:
    """The body, one part after the other, so that little of it lies in memory twice."""
    reference = base if plan.codec.difference else None
    if _has_scale(plan.codec):
        yield _SCALE.pack(plan.scale)
    if plan.codec.coder == "pco":
        yield from _pco_parts(plan, values, reference, codes)
    else:
        yield from _plane_parts(plan, values, reference, codes, effort)


def _plane_parts(
    plan: _Plan, values: Numbers, base: Numbers | None, codes: Numbers, effort: Effort
) -> Iterator[bytes]:
    element = plan.codec.element
    split_blocks = codes.view(np.uint8)
    for part in blocks(len(values)):
        numbers, spare = _room(values[part])
        if base is None:
            numbers = differences.rotated(values[part], element)
        else:
            expected = differences.predicted(base[part], element, plan.scale)
            np.subtract(values[part], expected, out=numbers)
            differences.zigzag(numbers, spare)
        rows = split_blocks[part.start * element.size : part.stop * element.size]
        planes.split(numbers, rows.reshape(element.size, -1), spare)
    return planes.write_planes(split_blocks, element.size, effort)


def _read_planes(plan: _Plan, body: memoryview, base: Numbers | None, target: Numbers) -> None:
    element = plan.codec.element
    rows = [
        row.copy() if base is None and np.may_share_memory(row, target) else row
        for row in planes.read_planes(body, element.size, len(target))
    ]
    for part in blocks(len(target)):
        codes, spare = _room(target[part])
        planes.join([row[part] for row in rows], codes, spare)
        if base is None:
            target[part] = differences.rotated_back(codes, element)
        else:
            expected = differences.predicted(base[part], element, plan.scale)
            np.add(differences.zigzag_back(codes, spare), expected, out=target[part])


def _room(block: Numbers) -> tuple[Numbers, Numbers]:
    """Twice room for as many numbers as ``block`` has."""
    room = np.frombuffer(scratch("block", 2 * block.nbytes), block.dtype)
    return room[: len(block)], room[len(block) :]


def _pco_parts(
    plan: _Plan, values: Numbers, base: Numbers | None, codes: Numbers
) -> Iterator[bytes]:
    element = plan.codec.element
    if base is None:
        for part in blocks(len(values)):
            codes[part] = differences.rotated(values[part], element)
        return groups.write_groups([codes] if len(codes) else [])
    order = groups.Order(element)
    for part in blocks(len(values)):
        change, _ = _room(values[part])
        np.subtract(
            values[part], differences.predicted(base[part], element, plan.scale), out=change
        )
        codes[part] = change[order.add(base[part])]
    return groups.write_groups(order.gather(codes.view(_signed(element))))


def _read_pco(plan: _Plan, body: memoryview, base: Numbers | None, target: Numbers) -> None:
    element = plan.codec.element
    if base is None:
        groups.read_groups(body, groups.whole(len(target)), target)
        for part in blocks(len(target)):
            target[part] = differences.rotated_back(target[part], element)
        return
    numbers = np.frombuffer(scratch("elements", target.nbytes), element.dtype)
    order = groups.Order(element)
    places = [order.add(base[part]).astype(np.uint16) for part in blocks(len(base))]
    groups.read_groups(body, order.groups, numbers.view(_signed(element)))
    for index, part in enumerate(blocks(len(target))):
        expected = differences.predicted(base[part], element, plan.scale)
        np.add(order.take(index, places[index], numbers), expected, out=target[part])


def _signed(element: Element) -> np.dtype[Any]:
    return np.dtype(f"<i{element.size}")
