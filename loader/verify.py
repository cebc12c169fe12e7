"""What was proven of a loaded module: digests, the structural fixpoint, and what drifted."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace
from torch import nn

from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, Module, Tensor, identity_bytes
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import escape
from ckpt.core.tensors import TensorBytes, chunk_spans
from ckpt.loader.capture import Captured
from ckpt.loader.classes import describe_class
from ckpt.loader.snapshot import capture_module


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        verdict: ``structure``: every byte and the whole structure are the same; ``weights``:
            every byte is the same.
        reason: why the verdict is not higher.
        drift: classes whose source or package changed since the push.
        wrappers: by path, what was unwrapped at the push (``DataParallel``, ``compile``).
        renamed: the prefix that one side of ``load_into`` had, or empty.
    """

    verdict: str
    reason: str = ""
    drift: tuple[str, ...] = ()
    wrappers: Mapping[str, tuple[str, ...]] | None = None
    renamed: str = ""


def check_structure(document: Document, module: nn.Module) -> None:
    """V0 on the rebuilt tensors and V1: capturing the rebuilt module gives the same again.

    Raises:
        IntegrityError: ``structure-differs``, naming the first difference.
    """
    again = capture_module(module)
    found = replace(
        document,
        root=again.root,
        modules=again.modules,
        tensors=_with_chunks(again),
    )
    if identity_bytes(found) != identity_bytes(document):
        raise IntegrityError(
            "structure-differs",
            f"structure differs after rebuild: {_first_difference(document, found)}",
            hint="the code of its classes may have changed; get the weights with pull",
        )


def _with_chunks(again: Captured) -> tuple[Tensor, ...]:
    """The entries with the digests of the bytes that the module has now; what was read was
    checked already, but the module's own code has run since."""
    pairs = zip(again.tensors, again.sources, strict=True)
    return tuple(
        entry if source is None else replace(entry, chunks=_digests(source))
        for entry, source in pairs
    )


def _digests(source: TensorBytes) -> tuple[str, ...]:
    return tuple(digest_of(source.read(*span)) for span in chunk_spans(source.nbytes))


def _first_difference(wanted: Document, found: Document) -> str:
    """Where two descriptions of a module part, in words."""
    tied = _ties(wanted), _ties(found)
    for names in tied[0]:
        if len(names) > 1 and names not in tied[1]:
            return f"{' and '.join(sorted(names))} were one tensor, now they are not"
    for names in tied[1]:
        if len(names) > 1 and names not in tied[0]:
            return f"{' and '.join(sorted(names))} are one tensor now, and were not"
    for before, after in zip(wanted.modules, found.modules, strict=False):
        if before != after:
            return _module_difference(before, after)
    for one, other in zip(wanted.tensors, found.tensors, strict=False):
        if one != other:
            return _tensor_difference(one, other)
    return "another number of modules or tensors"


def _ties(document: Document) -> list[frozenset[str]]:
    """The names under which each tensor is registered."""
    names: dict[int, set[str]] = {}
    for module in document.modules:
        for name, index in (*module.params, *((name, index) for name, index, _ in module.buffers)):
            if index is not None:
                path = f"{module.path}.{name}" if module.path else name
                names.setdefault(index, set()).add(path)
    return [frozenset(group) for group in names.values()]


def _module_difference(before: Module, after: Module) -> str:
    path = before.path or "<root>"
    for field in before.__struct_fields__:
        one, other = getattr(before, field), getattr(after, field)
        if one != other and field == "attrs":
            names = sorted(set(one) ^ set(other)) or [n for n in one if one[n] != other[n]]
            return f'attribute "{escape(names[0])}" of {path}'
        if one != other:
            return f"{field} of {path}"
    return path


def _tensor_difference(one: Tensor, other: Tensor) -> str:
    for field in one.__struct_fields__:
        if getattr(one, field) != getattr(other, field):
            word = "digest" if field == "chunks" else field
            return f'{word} of "{escape(one.name)}"'
    return one.name


def find_drift(document: Document) -> tuple[str, ...]:
    """Classes that are not what they were at the push, of those that are loaded now."""
    changed = []
    for known in document.classes:
        if known.reference.partition(":")[0] not in sys.modules:
            continue
        now = describe_class(known.reference)
        if known.source_digest and now.source_digest and known.source_digest != now.source_digest:
            changed.append(f"{known.reference}: its source changed since the push")
        elif known.version != now.version:
            changed.append(f"{known.reference}: {known.package} {known.version} → {now.version}")
    return tuple(changed)


def state_dict_names(document: Document) -> list[tuple[str, int]]:
    """``(key, tensor entry)`` in the order that ``state_dict()`` gave."""
    if not document.modules:
        return []
    root = document.root["$module"] if isinstance(document.root, dict) else 0
    return list(_walk(document.modules, root, "", ()))


def _walk(modules: Sequence[Module], index: int, prefix: str, above: tuple[int, ...]) -> Any:
    module = modules[index]
    for name, entry in module.params:
        if entry is not None:
            yield prefix + name, entry
    for name, entry, persistent in module.buffers:
        if entry is not None and persistent:
            yield prefix + name, entry
    for name, child in module.children:
        if child is not None and child not in above:
            yield from _walk(modules, child, f"{prefix}{name}.", (*above, index))
