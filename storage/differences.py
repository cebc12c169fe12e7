"""Elements as whole numbers that compress well: a number alone, or its difference from a base.

Everything works on the bit patterns, block by block, so that what is in hand stays in the
processor's cache. The formulas are a promise (``docs/format.md`` section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.core.dtypes import ITEM_SIZES

BLOCK = 1 << 16  # elements; places within a block fit into 16 bits

Numbers = NDArray[np.unsignedinteger[Any]]

_COMPLEX = {"complex32": "f16", "complex64": "f32", "complex128": "f64"}
_FLOATS = {"float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64"}
# A product stays a normal number, whatever the processor does with others (flush-to-zero),
# as long as the exponent of the factor that is not the scale is one of these.
_SAFE_EXPONENT, _SAFE_EXPONENTS = 32, 200
SMALLEST_SCALE = 1 / 16
_LARGEST_SCALE = 0.9999  # weight decay alone is not worth a scale
_ALIKE = 1.0002  # how far apart, as a factor, ratios that count as one may be


@dataclass(frozen=True, slots=True)
class Element:
    """How the bytes of a chunk are read: as unsigned numbers, of floats with that mantissa."""

    name: str
    dtype: np.dtype[Any]
    mantissa: int | None = None

    @property
    def size(self) -> int:
        return self.dtype.itemsize


ELEMENTS = {
    element.name: element
    for element in (
        Element("u8", np.dtype("<u1")),
        Element("u16", np.dtype("<u2")),
        Element("u32", np.dtype("<u4")),
        Element("u64", np.dtype("<u8")),
        Element("f16", np.dtype("<u2"), 10),
        Element("bf16", np.dtype("<u2"), 7),
        Element("f32", np.dtype("<u4"), 23),
        Element("f64", np.dtype("<u8"), 52),
    )
}


def element_of(dtype: str, nbytes: int) -> Element:
    """The element that chunks of a torch dtype consist of; bytes, where that does not divide."""
    name = _FLOATS.get(dtype) or _COMPLEX.get(dtype) or f"u{8 * ITEM_SIZES[dtype]}"
    element = ELEMENTS[name]
    return element if nbytes % element.size == 0 else ELEMENTS["u8"]


def blocks(count: int) -> Iterator[slice]:
    """The blocks of ``count`` elements, in order."""
    return (slice(at, min(at + BLOCK, count)) for at in range(0, count, BLOCK))


def rotated(values: Numbers, element: Element) -> Numbers:
    """Floats with their sign moved to the lowest bit, so that the exponent leads; else ``values``."""
    if element.mantissa is None:
        return values
    turned: Numbers = np.bitwise_or(values << 1, values >> (8 * element.size - 1))
    return turned


def rotated_back(codes: Numbers, element: Element) -> Numbers:
    """The inverse of :func:`rotated`."""
    if element.mantissa is None:
        return codes
    values: Numbers = np.bitwise_or(codes >> 1, codes << (8 * element.size - 1))
    return values


def predicted(base: Numbers, element: Element, scale: float) -> Numbers:
    """What is expected where the base is: the base, and of ``f32`` the base times ``scale``.

    AdamW's moments of a parameter without gradient only decay, by the same factor everywhere.
    """
    if scale == 1 or element.name != "f32":
        return base
    with np.errstate(all="ignore"):  # what is no normal number is not used
        product = (base.view("<f4") * np.float32(scale)).view("<u4")
    exponent = (base >> 23) & 0xFF
    return np.where(exponent - np.uint32(_SAFE_EXPONENT) < _SAFE_EXPONENTS, product, base)


def zigzag(difference: Numbers, spare: Numbers) -> Numbers:
    """Small numbers of either sign as small numbers, in place: 0, -1, 1, -2 become 0, 1, 2, 3.
    ``spare`` is room for as many."""
    signed = f"<i{difference.itemsize}"
    np.right_shift(difference.view(signed), 8 * difference.itemsize - 1, out=spare.view(signed))
    np.left_shift(difference, 1, out=difference)
    return np.bitwise_xor(difference, spare, out=difference)


def zigzag_back(codes: Numbers, spare: Numbers) -> Numbers:
    """The inverse of :func:`zigzag`, in place too."""
    np.bitwise_and(codes, 1, out=spare)
    np.negative(spare, out=spare)
    np.right_shift(codes, 1, out=codes)
    return np.bitwise_xor(codes, spare, out=codes)


def guess_scale(values: Numbers, base: Numbers, element: Element) -> float:
    """The factor by which the most elements changed alike, as an ``f32`` below 1; 1 if none did."""
    if element.name != "f32":
        return 1.0
    with np.errstate(all="ignore"):
        ratios = values.view("<f4") / base.view("<f4")
    ratios = np.sort(ratios[(ratios >= SMALLEST_SCALE) & (ratios < _LARGEST_SCALE)])
    alike = max(32, len(values) // 100)
    if len(ratios) <= alike:
        return 1.0
    widths = ratios[alike:] / ratios[:-alike]
    narrowest = int(widths.argmin())
    if widths[narrowest] > _ALIKE:
        return 1.0
    return float(ratios[narrowest + alike // 2])
