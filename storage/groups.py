"""The coder ``pco``: numbers in groups of one size, each group as a pcodec file.

How much a float changes, counted in its last place, goes with its exponent. The differences are
therefore put in the order of the base's exponents, which the decoder knows, and each exponent is
coded apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.core.digests import digest_of
from ckpt.core.errors import IntegrityError
from ckpt.storage.differences import BLOCK, Element, Numbers
from ckpt.storage.scratch import scratch

_LEVEL = 8
_KEYS = 256
_GROUP = 4096  # elements; rarer exponents share a group with the next higher ones


class Order:
    """The elements of a chunk by the exponents of its base, equal ones in their own order; known
    once each block of the base was added."""

    def __init__(self, element: Element) -> None:
        self._element = element
        self._edges: list[NDArray[np.intp]] = []  # of each key within each block's sorted keys

    def add(self, base: Numbers) -> NDArray[np.intp]:
        """The next block's elements in its own order."""
        key = _keys(base, self._element)
        places = np.argsort(key, kind="stable")
        edges = np.searchsorted(key[places], np.arange(_KEYS, dtype=np.uint8))
        self._edges.append(np.append(edges, len(key)))
        return places

    @cached_property
    def groups(self) -> list[slice]:
        """The groups among all elements that are in order."""
        starts = self._starts
        return [slice(int(starts[a]), int(starts[b])) for a, b in self._keys_of_groups]

    def gather(self, codes: NDArray[Any]) -> Iterator[NDArray[Any]]:
        """The groups of codes of which each block is in its own order; one lies in memory until
        the next one is asked for."""
        for group, keys in zip(self.groups, self._keys_of_groups, strict=True):
            size = (group.stop - group.start) * codes.itemsize
            numbers = np.frombuffer(scratch("part", size), codes.dtype)
            for index, runs in enumerate(self._runs):
                block = codes[index * BLOCK : (index + 1) * BLOCK]
                for key, begin, end, target in runs:
                    if keys[0] <= key < keys[1]:
                        at = target - group.start
                        numbers[at : at + end - begin] = block[begin:end]
            yield numbers

    def take(self, index: int, places: NDArray[Any], ordered: NDArray[Any]) -> NDArray[Any]:
        """Block ``index`` as it was, given its own order."""
        sorted_codes = np.empty(len(places), ordered.dtype)
        codes = np.empty_like(sorted_codes)
        for _, begin, end, target in self._runs[index]:
            sorted_codes[begin:end] = ordered[target : target + end - begin]
        codes[places] = sorted_codes
        return codes

    @cached_property
    def _starts(self) -> NDArray[np.intp]:
        counts = sum((np.diff(edges) for edges in self._edges), np.zeros(_KEYS, np.intp))
        return np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def _keys_of_groups(self) -> list[tuple[int, int]]:
        return _grouped(self._starts)

    @cached_property
    def _runs(self) -> list[list[tuple[int, int, int, int]]]:
        """Of each block, where runs of one key go: ``(key, from, to)`` in the block, and the
        target."""
        targets = self._starts[:-1].copy()
        runs = []
        for edges in self._edges:
            counts = np.diff(edges)
            used = np.flatnonzero(counts).tolist()
            runs.append(
                [(key, int(edges[key]), int(edges[key + 1]), int(targets[key])) for key in used]
            )
            targets += counts
        return runs


def _keys(base: Numbers, element: Element) -> NDArray[np.uint8]:
    if element.mantissa is None:
        return np.zeros(len(base), np.uint8)
    # of f64 the lower 8 of 11 bits: numbers 2**256 apart share a group, which harms nothing
    exponents = 8 if element.name != "f16" else 5
    return ((base >> element.mantissa) & ((1 << exponents) - 1)).astype(np.uint8)


def _grouped(starts: NDArray[np.intp]) -> list[tuple[int, int]]:
    """Ranges of keys, each of at least :data:`_GROUP` elements but the last."""
    ranges: list[tuple[int, int]] = []
    first, count = 0, int(starts[-1])
    for last in range(1, len(starts)):
        begin, end = int(starts[first]), int(starts[last])
        if end - begin >= _GROUP or end == count > begin:
            ranges.append((first, last))
            first = last
    return ranges


def whole(count: int) -> list[slice]:
    """One group of all elements; none, if there are none."""
    return [slice(0, count)] if count else []


def write_groups(groups: Iterable[NDArray[Any]]) -> Iterator[bytes]:
    """Encode each group of numbers of 2, 4 or 8 bytes; yields the parts of the body.

    pcodec has not zstd's decade of use behind it, so its word is checked: what it wrote is read
    before anybody relies on it, into the place that it came from.
    """
    from pcodec import (  # type: ignore[import-untyped]  # imported on use
        ChunkConfig,
        DeltaSpec,
        ModeSpec,
        standalone,
    )

    config = ChunkConfig(
        compression_level=_LEVEL, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op()
    )
    for numbers in groups:
        digest = digest_of(numbers.data.cast("B"))
        file = standalone.simple_compress(numbers, config)
        numbers[:] = 0  # what it does not write is not there
        standalone.simple_decompress_into(file, numbers)
        if digest_of(numbers.data.cast("B")) != digest:
            raise AssertionError("pcodec does not give back what it got")
        yield len(file).to_bytes(4, "little")
        yield file


def read_groups(body: memoryview, groups: list[slice], numbers: NDArray[Any]) -> None:
    """Fill ``numbers`` from an encoded body.

    Raises:
        IntegrityError: the body is not exactly those groups.
    """
    from pcodec import standalone

    for group in groups:
        size = int.from_bytes(body[:4], "little")
        file = body[4 : 4 + size]
        if len(body) < 4 or len(file) != size:
            raise IntegrityError("pack-damaged", "an encoded chunk is cut off")
        room = numbers[group]
        try:
            progress = standalone.simple_decompress_into(bytes(file), room)
        except (RuntimeError, TypeError) as error:
            raise IntegrityError("pack-damaged", f"an encoded chunk is damaged: {error}") from None
        if progress.n_processed != len(room) or not progress.finished:
            raise IntegrityError("pack-damaged", "an encoded chunk has the wrong length")
        body = body[4 + size :]
    if len(body):
        raise IntegrityError("pack-damaged", "an encoded chunk has bytes after its end")
