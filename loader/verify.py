"""What was proven of a loaded module: digests, the structural fixpoint, and what drifted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from msgspec.structs import replace
from torch import nn

from ckpt.core.documents import Document, Module, Tensor, identity_bytes
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import escape
from ckpt.loader.classes import describe_class
from ckpt.loader.outputs import Comparison
from ckpt.loader.replica import drafted
from ckpt.loader.snapshot import capture_module


@dataclass(frozen=True, slots=True)
class Report:
    """What a verification found.

    Attributes:
        verdict: ``outputs-exact``: bytes, structure and the outputs on the recorded inputs are
            the same; ``outputs-close``: the outputs differ by no more than noise may;
            ``structure``: every byte and the whole structure are the same; ``weights``: every
            byte is the same.
        reason: why the verdict is not higher.
        outputs: each recorded output against the one computed now.
        drift: classes whose source or package changed since the push.
        changed: of these, by name, the classes and their bases whose source changed.
        wrappers: by path, what was unwrapped at the push (``DataParallel``, ``compile``).
        renamed: the prefix that one side of ``load_into`` had, or empty.
        dropped: attributes that were left out at the push.
    """

    verdict: str
    reason: str = ""
    drift: tuple[str, ...] = ()
    wrappers: Mapping[str, tuple[str, ...]] | None = None
    renamed: str = ""
    outputs: tuple[Comparison, ...] = ()
    dropped: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


# From the weakest to the strongest.
VERDICTS = ("weights", "structure", "outputs-close", "outputs-exact")


def check_structure(document: Document, module: nn.Module, *, digests: bool = True) -> None:
    """V0 on the rebuilt tensors and V1: capturing the rebuilt module gives the same again.

    Without ``digests`` only the structure is compared.

    Raises:
        IntegrityError: ``structure-differs``, naming the first difference.
    """
    found = drafted(capture_module(module, document.dropped), digests=digests)
    if not digests:
        document, found = _without_digests(document), _without_digests(found)
    if identity_bytes(found) != identity_bytes(document):
        raise IntegrityError(
            "structure-differs",
            f"structure differs after rebuild: {_first_difference(document, found)}",
            hint="the code of its classes may have changed; get the weights with pull",
        )


def _without_digests(document: Document) -> Document:
    return replace(
        document, tensors=tuple(replace(tensor, chunks=()) for tensor in document.tensors)
    )


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


def find_changed(document: Document) -> tuple[str, ...]:
    """Classes and functions whose source is not what it was at the push; imports nothing."""
    pairs = ((known, describe_class(known.reference)) for known in document.classes)
    return tuple(
        known.reference
        for known, now in pairs
        if known.source_digest and now.source_digest and known.source_digest != now.source_digest
    )


def find_drift(document: Document) -> tuple[str, ...]:
    """Classes that are not what they were at the push; imports nothing."""
    sources = (f"{name}: its source changed since the push" for name in find_changed(document))
    packages = {}
    for known in document.classes:
        now = describe_class(known.reference)
        if known.version and now.version and known.version != now.version:
            packages[known.package] = f"{known.package} {known.version} → {now.version}"
    return (*sources, *packages.values())
