"""The coder ``pco``: numbers in groups of one size, each group as a pcodec file.

How much a float changes, counted in its last place, goes with its exponent. The differences are
therefore put in the order of the base's exponents, which the decoder knows, and each exponent is
coded apart.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ckpt.core.errors import IntegrityError
from ckpt.storage.differences import Element, Numbers, blocks

_LEVEL = 8
_KEYS = 256
_GROUP = 4096  # elements; rarer exponents share a group with the next higher ones


class Order:
    """The elements of a chunk by the exponents of its base, equal ones in their own order."""

    def __init__(self, base: Numbers, element: Element) -> None:
        self._places: list[NDArray[np.uint16]] = []
        self._edges: list[NDArray[np.intp]] = []  # of each key within each block's sorted keys
        keys = np.arange(_KEYS, dtype=np.uint8)
        for part in blocks(len(base)):
            key = _keys(base[part], element)
            places = np.argsort(key, kind="stable")
            self._places.append(places.astype(np.uint16))
            edges = np.searchsorted(key[places], keys)
            self._edges.append(np.append(edges, len(key)))
        counts = sum((np.diff(edges) for edges in self._edges), np.zeros(_KEYS, np.intp))
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self.groups = _grouped(self._starts)
        self._runs = self._all_runs()

    def _all_runs(self) -> list[list[tuple[int, int, int]]]:
        """Of each block, where runs of one key go: ``(from, to)`` in the block, and the target."""
        targets = self._starts[:-1].copy()
        runs = []
        for edges in self._edges:
            counts = np.diff(edges)
            used = np.flatnonzero(counts)
            runs.append([(int(edges[key]), int(edges[key + 1]), int(targets[key])) for key in used])
            targets += counts
        return runs

    def put(self, index: int, codes: NDArray[Any], ordered: NDArray[Any]) -> None:
        """Bring block ``index`` into order."""
        codes = codes[self._places[index]]
        for begin, end, target in self._runs[index]:
            ordered[target : target + end - begin] = codes[begin:end]

    def take(self, index: int, ordered: NDArray[Any]) -> NDArray[Any]:
        """Block ``index`` as it was."""
        places = self._places[index]
        sorted_codes = np.empty(len(places), ordered.dtype)
        codes = np.empty_like(sorted_codes)
        for begin, end, target in self._runs[index]:
            sorted_codes[begin:end] = ordered[target : target + end - begin]
        codes[places] = sorted_codes
        return codes


def _keys(base: Numbers, element: Element) -> NDArray[np.uint8]:
    if element.mantissa is None:
        return np.zeros(len(base), np.uint8)
    # of f64 the lower 8 of 11 bits: numbers 2**256 apart share a group, which harms nothing
    exponents = 8 if element.name != "f16" else 5
    return ((base >> element.mantissa) & ((1 << exponents) - 1)).astype(np.uint8)


def _grouped(starts: NDArray[np.intp]) -> list[slice]:
    """Groups of whole keys, each of at least :data:`_GROUP` elements but the last."""
    groups: list[slice] = []
    begin, count = 0, int(starts[-1])
    for end in map(int, starts[1:]):
        if end - begin >= _GROUP or end == count > begin:
            groups.append(slice(begin, end))
            begin = end
    return groups


def whole(count: int) -> list[slice]:
    """One group of all elements; none, if there are none."""
    return [slice(0, count)] if count else []


def write_groups(numbers: NDArray[Any], groups: list[slice]) -> list[bytes | memoryview]:
    """Encode each group; the parts of the body, to be joined. ``numbers`` have 2, 4 or 8 bytes.

    pcodec has not zstd's decade of use behind it, so its word is checked: what it wrote is read
    before anybody relies on it.
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
    files = [standalone.simple_compress(numbers[group], config) for group in groups]
    for group, file in zip(groups, files, strict=True):
        again = np.empty_like(numbers[group])
        standalone.simple_decompress_into(file, again)
        if not np.array_equal(again, numbers[group]):
            raise AssertionError("pcodec does not give back what it got")
    return [part for file in files for part in (len(file).to_bytes(4, "little"), file)]


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
