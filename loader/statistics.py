"""How far two tensors lie apart, from their stored bytes in pieces; by numpy, without torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy

from ckpt.core.dtypes import ITEM_SIZES, QUANTIZED

Array = numpy.ndarray[Any, numpy.dtype[Any]]

# Elements that are computed on at a time; what is made of them stays in a processor's cache.
_BLOCK = 1 << 16
_PLAIN = (
    *("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
)
# Bits of exponent and mantissa, bias, and the codes that are NaN.
_FLOAT8 = {
    "float8_e4m3fn": (4, 3, 7, [0x7F, 0xFF]),
    "float8_e4m3fnuz": (4, 3, 8, [0x80]),
    "float8_e5m2fnuz": (5, 2, 16, [0x80]),
}
_FLOAT4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
# The dtypes whose stored elements are numbers.
NUMBERS = frozenset(ITEM_SIZES) - QUANTIZED


@dataclass(frozen=True, slots=True)
class Statistics:
    """Two tensors of one name, compared element by element.

    Of tensors whose shapes differ there are only the norms. Elements that are NaN or infinite in
    either tensor are counted, and left out of everything but ``changed``.

    Attributes:
        norms: the Euclidean norm of each.
        difference: the norm of their difference.
        largest: the largest absolute difference of two elements; exact between whole numbers.
        cosine: of the angle between them; None when one is zero.
        changed: how many of ``elements`` have other bits, or where the dtypes differ other values.
        elements: how many the second one has.
        nans, infinities: how many each has.
    """

    norms: tuple[float, float]
    difference: float | None
    largest: float | None
    cosine: float | None
    changed: int | None
    elements: int
    nans: tuple[int, int]
    infinities: tuple[int, int]

    @property
    def share(self) -> float | None:
        """The share of the elements that changed."""
        return None if self.changed is None else self.changed / max(1, self.elements)


@dataclass(slots=True)
class Sums:
    """The running sums of one pair of tensors, of these dtypes; ``paired`` says whether their
    elements belong together, and ``elements`` how many the second one has."""

    dtypes: tuple[str, str]
    paired: bool
    elements: int
    _squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _nans: list[int] = field(default_factory=lambda: [0, 0])
    _infinities: list[int] = field(default_factory=lambda: [0, 0])
    _product: float = 0.0
    _difference: float = 0.0
    _largest: float = 0
    _changed: int = 0

    def add(self, side: int, data: memoryview) -> None:
        """Add some elements of one of the two, for its norm alone."""
        dtype = self.dtypes[side]
        for block in _blocks(data, dtype):
            values = _widen(decode(block, dtype))
            self._squares[side] += _square(values[self._finite(side, values)])

    def add_pair(self, before: memoryview, after: memoryview) -> None:
        """Add the same elements of both."""
        blocks = _blocks(before, self.dtypes[0]), _blocks(after, self.dtypes[1])
        with numpy.errstate(over="ignore"):  # the difference of two doubles may be infinite
            for old, new in zip(*blocks, strict=True):
                self._add_block(old, new)

    def _add_block(self, before: memoryview, after: memoryview) -> None:
        old, new = decode(before, self.dtypes[0]), decode(after, self.dtypes[1])
        same = self.dtypes[0] == self.dtypes[1]
        wide = _widen(old), _widen(new)
        if same:
            self._changed += _count_changed(before, after, self.dtypes[0])
        else:
            both_nan = numpy.isnan(wide[0]) & numpy.isnan(wide[1])
            self._changed += int(numpy.count_nonzero((wide[0] != wide[1]) & ~both_nan))
        finite = self._finite(0, wide[0]) & self._finite(1, wide[1])
        first, second = wide[0][finite], wide[1][finite]
        self._squares[0] += _square(first)
        self._squares[1] += _square(second)
        self._product += float(numpy.vdot(first, second).real)
        if same and old.dtype.kind in "iu":
            # Modulo 2^n the larger less the smaller one is their distance, also of int64.
            distance = numpy.where(old > new, old - new, new - old).view(f"u{old.itemsize}")
            self._largest = max(self._largest, int(distance.max(initial=0)))
            distance = distance.astype(numpy.float64)
        else:
            distance = numpy.abs(first - second)
            self._largest = max(self._largest, float(distance.max(initial=0)))
        self._difference += _square(distance)

    def _finite(self, side: int, values: Array) -> Array:
        """Which elements are finite; the others are counted."""
        finite: Array = numpy.isfinite(values)
        others = values[~finite]
        if others.size:
            nans = int(numpy.count_nonzero(numpy.isnan(others)))
            self._nans[side] += nans
            self._infinities[side] += others.size - nans
        return finite

    def finish(self) -> Statistics:
        """What was found."""
        norms = math.sqrt(self._squares[0]), math.sqrt(self._squares[1])
        scale = norms[0] * norms[1]
        cosine = None
        if self.paired and 0 < scale < math.inf:
            cosine = min(1.0, max(-1.0, self._product / scale))
        return Statistics(
            norms=norms,
            difference=math.sqrt(self._difference) if self.paired else None,
            largest=self._largest if self.paired else None,
            cosine=cosine,
            changed=self._changed if self.paired else None,
            elements=self.elements,
            nans=(self._nans[0], self._nans[1]),
            infinities=(self._infinities[0], self._infinities[1]),
        )


def decode(data: memoryview, dtype: str) -> Array:
    """The elements in some stored bytes, each exactly; of ``float4_e2m1fn_x2``, both halves."""
    if dtype in _PLAIN:
        return numpy.frombuffer(data, dtype)
    if dtype == "bfloat16":
        return (numpy.frombuffer(data, numpy.uint16).astype(numpy.uint32) << 16).view(numpy.float32)
    if dtype == "complex32":
        return numpy.frombuffer(data, numpy.float16).astype(numpy.float32).view(numpy.complex64)
    codes = numpy.frombuffer(data, numpy.uint8)
    if dtype == "bool":
        return codes
    if dtype == "float4_e2m1fn_x2":
        halves = numpy.stack([codes & 15, codes >> 4], axis=-1).reshape(-1)
        return numpy.array(_FLOAT4)[halves]
    return _float8_values(dtype)[codes]


@cache
def _float8_values(dtype: str) -> Array:
    """What each of the 256 codes stands for."""
    codes = numpy.arange(256)
    if dtype == "float8_e5m2":  # the upper half of a float16
        halves: Array = (codes << 8).astype(numpy.uint16).view(numpy.float16)
        return halves
    if dtype == "float8_e8m0fnu":
        return numpy.where(codes == 255, numpy.nan, numpy.ldexp(1.0, codes - 127))
    exponent_bits, mantissa_bits, bias, nans = _FLOAT8[dtype]
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = codes & ((1 << mantissa_bits) - 1)
    whole = numpy.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    scale = numpy.maximum(exponent, 1) - bias - mantissa_bits
    values: Array = numpy.ldexp(whole.astype(numpy.float64), scale) * numpy.where(
        codes < 128, 1, -1
    )
    values[nans] = numpy.nan
    return values


def _blocks(data: memoryview, dtype: str) -> Iterator[memoryview]:
    step = _BLOCK * ITEM_SIZES[dtype]
    return (data[start : start + step] for start in range(0, len(data), step))


def _widen(values: Array) -> Array:
    return values.astype(numpy.complex128 if values.dtype.kind == "c" else numpy.float64)


def _square(values: Array) -> float:
    return float(numpy.vdot(values, values).real)


def _count_changed(before: memoryview, after: memoryview, dtype: str) -> int:
    """How many elements have other bits."""
    unit = min(8, ITEM_SIZES[dtype])
    old, new = (numpy.frombuffer(data, f"u{unit}") for data in (before, after))
    differs = (old != new).reshape(-1, ITEM_SIZES[dtype] // unit)
    return int(numpy.count_nonzero(differs.any(axis=1)))
