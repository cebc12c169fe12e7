"""What differs between two versions: from the registry alone, with statistics when asked for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, Tensor, canonical
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import IntegrityError, UsageError
from ckpt.core.json_numbers import json_numbers
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.tensors import CHUNK_BYTES, chunk_spans
from ckpt.registry.registry import Registry
from ckpt.service.diff_contents import (
    Contents,
    Difference,
    natural_key,
    structure_differences,
    value_differences,
)
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.loader.statistics import Statistics
    from ckpt.service.upload import Progress

CHANGES = ("changed", "added", "removed", "same")
# What of an entry counts; where a tensor was does not, as in a version's digest.
_FIELDS = ("dtype", "shape", "kind", "requires_grad", "strides", "layout", "details")
# Beyond any tensor; arithmetic on larger numbers would only take time.
_SHAPE_BITS = 4096
# What looking at a malformed document may raise.
_MALFORMED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


@dataclass(frozen=True, slots=True)
class TensorDifference:
    """One tensor entry of either version, by name.

    Attributes:
        change: ``same``, ``changed``, ``added`` or ``removed``.
        what: what changed: ``values``; ``parts``, the bytes that a view or a composed tensor rests
            on; ``tie``, where the name is a tie of another one in one version; or a field of the
            entry.
        before, after: the entries; of a tie that other one.
        nbytes: stored bytes under this name, the first version's where the second has none; a
            tie, a view and a composed tensor have none of their own.
        changed_bytes: how many of them are in chunks that differ.
        statistics: when asked for, of tensors whose ``values`` changed and are plain numbers.
    """

    name: str
    change: str
    what: tuple[str, ...]
    before: Tensor | None
    after: Tensor | None
    nbytes: int
    changed_bytes: int
    statistics: Statistics | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """The tensors of one module prefix. ``relative`` is the norm of the difference by the norm
    before, over the tensors with statistics: 0 where nothing changed, None where it is unknown."""

    name: str
    nbytes: int
    changed_bytes: int
    relative: float | None

    @property
    def share(self) -> float:
        """The share of the bytes that differ."""
        return self.changed_bytes / self.nbytes if self.nbytes else float(self.changed_bytes > 0)


@dataclass(frozen=True, slots=True)
class Diff:
    """Two versions, compared.

    Attributes:
        tensors: every tensor entry of either.
        ties_appeared, ties_vanished: pairs of a place and the tensor that it is one with.
        structure: modules, their classes, children and flags.
        values: plain values that differ.
        facts: step, metrics and labels that differ.
        with_statistics: whether statistics were asked for.
    """

    before: Version
    after: Version
    tensors: tuple[TensorDifference, ...]
    ties_appeared: tuple[tuple[str, str], ...]
    ties_vanished: tuple[tuple[str, str], ...]
    structure: tuple[Difference, ...]
    values: tuple[Difference, ...]
    facts: tuple[Difference, ...]
    with_statistics: bool = False

    @property
    def identical(self) -> bool:
        """Whether both have the same content; their facts may differ."""
        return self.before.digest == self.after.digest

    def total(self, change: str) -> tuple[int, int]:
        """How many tensors changed like this, and their bytes."""
        found = [tensor.nbytes for tensor in self.tensors if tensor.change == change]
        return len(found), sum(found)

    def layers(self, limit: int | None = None) -> list[Layer]:
        """The tensors by module prefix; with a limit, by the longest prefixes that are no more."""
        depth = max((tensor.name.count(".") for tensor in self.tensors), default=0)
        groups = self._grouped(depth)
        while limit is not None and len(groups) > limit and depth > 1:
            depth -= 1
            groups = self._grouped(depth)
        return [_layer(name, found) for name, found in groups.items()]

    def _grouped(self, depth: int) -> dict[str, list[TensorDifference]]:
        groups: dict[str, list[TensorDifference]] = {}
        for tensor in self.tensors:
            prefix = ".".join(tensor.name.split(".")[:-1][:depth])
            groups.setdefault(prefix, []).append(tensor)
        return groups


def _layer(name: str, tensors: Sequence[TensorDifference]) -> Layer:
    known = [t.statistics for t in tensors if t.statistics and t.statistics.difference is not None]
    norm = math.hypot(*(one.norms[0] for one in known))
    difference = math.hypot(*(one.difference or 0.0 for one in known))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    changed = sum(tensor.changed_bytes for tensor in tensors)
    relative = 0.0 if not changed else None
    if norm and math.isfinite(norm) and math.isfinite(difference / norm):
        relative = difference / norm
    return Layer(name, nbytes, changed, relative)


def compare(
    store: Store,
    registry: Registry,
    before: Version,
    after: Version,
    *,
    statistics: bool = False,
    progress: Progress | None = None,
) -> Diff:
    """Compare two versions; with ``statistics`` the tensors whose values changed are read.

    Raises:
        UsageError: ``no-weights`` when one is a folder of files.
        IntegrityError: ``document-damaged``; with ``statistics`` also ``object-missing`` and
            ``object-corrupt``.
    """
    found = Diff(before, after, (), (), (), (), (), tuple(_facts(before, after)), statistics)
    old, new = (_document(registry, version) for version in (before, after))
    try:
        found = _compare_documents(found, old, new)
    except _MALFORMED as error:
        raise _damaged(f"{before.reference} or {after.reference}: {error}") from None
    if not statistics:
        return found
    from ckpt.service.diff_statistics import with_statistics

    return replace(found, tensors=with_statistics(store, registry, found, progress))


def _document(registry: Registry, version: Version) -> Document:
    if version.state == "files":
        raise UsageError(
            "no-weights",
            f"{version.reference} is a folder of files",
            hint="pull both folders and compare their files",
        )
    return registry.queries.document(version)


def _compare_documents(found: Diff, before: Document, after: Document) -> Diff:
    old, new = Contents(before), Contents(after)
    tensors = list(_tensors(old, new))
    if "module" not in (before.state, after.state):  # a module says its order, a dict sorts keys
        tensors.sort(key=lambda tensor: natural_key(tensor.name))
    return replace(
        found,
        tensors=tuple(tensors),
        ties_appeared=tuple(sorted(new.ties.items() - old.ties.items())),
        ties_vanished=tuple(sorted(old.ties.items() - new.ties.items())),
        structure=tuple(structure_differences(before, after)),
        values=tuple(value_differences(old, new)),
    )


def _tensors(before: Contents, after: Contents) -> Iterator[TensorDifference]:
    sides = _Entries(before), _Entries(after)
    names = {tensor.name: None for side in (after, before) for tensor in side.document.tensors}
    for name in names:
        yield _tensor(name, *sides)


class _Entries:
    """The tensor entries of one version, by place."""

    def __init__(self, contents: Contents) -> None:
        self._tensors = contents.document.tensors
        self._places = contents.places
        self._contents: dict[int, str] = {}

    def get(self, name: str) -> Tensor | None:
        index = self._places.get(name)
        return None if index is None else self._tensors[index]

    def content(self, name: str) -> str:
        """A digest of the bytes that the tensor rests on, and of how it does."""
        return self._content(self._places[name])

    def _content(self, index: int) -> str:
        if index not in self._contents:
            entry = self._tensors[index]
            rests: list[Any] = [entry.chunks, entry.offset, entry.align]
            if entry.region is not None:
                rests += [entry.dtype, self._content(entry.region)]
            for role, part in (entry.components or {}).items():
                rests += [role, self._tensors[part].shape, self._content(part)]
            self._contents[index] = digest_of(canonical(rests))
        return self._contents[index]


def _tensor(name: str, before: _Entries, after: _Entries) -> TensorDifference:
    old, new = before.get(name), after.get(name)
    # A tie has no bytes of its own.
    nbytes = [stored_nbytes(one) if one and one.name == name else 0 for one in (old, new)]
    if old is None or new is None:
        change = "removed" if new is None else "added"
        return TensorDifference(name, change, (), old, new, max(nbytes), max(nbytes))
    what = [field for field in _FIELDS if getattr(old, field) != getattr(new, field)]
    if (old.name == name) != (new.name == name):
        what.append("tie")
    changed = 0
    if before.content(name) != after.content(name):
        plain = all(one.region is None and one.components is None for one in (old, new))
        what.append("values" if plain and old.chunks != new.chunks else "parts")
        changed = min(max(nbytes), _changed_bytes(old, new))
    size = nbytes[1] if new.name == name else nbytes[0]
    change = "changed" if what else "same"
    return TensorDifference(name, change, tuple(what), old, new, size, changed)


def _changed_bytes(old: Tensor, new: Tensor) -> int:
    """The bytes of the second in chunks that differ from those of the first."""
    runs, before = stored_runs(new), stored_runs(old)
    if [run.nbytes for run in before] != [run.nbytes for run in runs]:
        return sum(run.nbytes for run in runs)
    return sum(
        length
        for one, other in zip(before, runs, strict=True)
        for was, now, (_, length) in zip(
            one.chunks, other.chunks, chunk_spans(other.nbytes), strict=True
        )
        if was != now
    )


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that follow each other in an entry, with their chunks: all of it, or a part."""

    nbytes: int
    chunks: tuple[str, ...]


def stored_runs(entry: Tensor) -> list[Run]:
    """The bytes that an entry has itself, part by part; a dimension of stride 0 is stored once.

    Raises:
        ValueError: it contradicts itself.
    """
    if not entry.has_bytes:
        return []
    runs = []
    for part, chunks in entry.pieces():
        shape = part.shape if entry.parts else entry.stored_shape
        if sum(map(int.bit_length, shape)) > _SHAPE_BITS:
            raise ValueError(f'"{entry.name}" has a shape that no tensor has')
        nbytes = math.prod(shape) * ITEM_SIZES[entry.dtype]
        if nbytes < 0 or -(-nbytes // CHUNK_BYTES) != len(chunks):
            raise ValueError(f'"{entry.name}" has {len(chunks)} chunks for {nbytes} bytes')
        runs.append(Run(nbytes, chunks))
    return runs


def stored_nbytes(entry: Tensor) -> int:
    """The bytes in an entry's chunks."""
    return sum(run.nbytes for run in stored_runs(entry))


def _facts(before: Version, after: Version) -> Iterator[Difference]:
    """Step, metrics and labels."""
    if before.step != after.step:
        yield Difference("step", "step", "changed", before.step, after.step)
    kinds: Iterable[tuple[str, dict[str, Any], dict[str, Any]]] = (
        ("metric", json_numbers(before.metrics), json_numbers(after.metrics)),
        ("label", dict(before.labels), dict(after.labels)),
    )
    for what, old, new in kinds:
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) == new.get(name):
                continue
            change = "added" if name not in old else "changed" if name in new else "removed"
            yield Difference(name, what, change, old.get(name), new.get(name))


def _damaged(reason: str) -> IntegrityError:
    return IntegrityError(
        "document-damaged",
        f"a document contradicts itself: {escape(reason)}",
        hint="run `ckpt registry rebuild`, which reads the copies in the store",
    )
