"""What a module version is made of and what a load of it would need; imports none of its code."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.core.documents import Document


@dataclass(frozen=True, slots=True)
class NamedClass:
    """A class or function that a version names.

    Attributes:
        reference: ``module:qualname``.
        allowed: whether a load may import it without being told to trust it.
        package, version: what it came from when it was pushed.
        source: of the source text here and now: ``same``, ``changed``, or ``unknown`` when it
            or the pushed one is not there.
    """

    reference: str
    allowed: bool
    package: str | None
    version: str | None
    source: str


@dataclass(frozen=True, slots=True)
class ModuleDescription:
    """The tree as ``print(net)`` gives it, and the classes by name."""

    tree: str
    classes: tuple[NamedClass, ...]


def describe_module(document: Document) -> ModuleDescription:
    """Describe the module of a document.

    Raises:
        IntegrityError: ``document-damaged``.
    """
    from ckpt.loader.tree import module_tree

    return ModuleDescription(module_tree(document), named_classes(document))


def named_classes(document: Document) -> tuple[NamedClass, ...]:
    """Everything that a load would import, by name."""
    from ckpt.loader.classes import describe_class
    from ckpt.loader.trust import Trust, names_in
    from ckpt.loader.verify import find_changed

    refused = {name.reference for name in Trust().refused(document)}
    recorded = {known.reference: known for known in document.classes}
    changed = set(find_changed(document))
    found = []
    for reference in sorted({name.reference for name in names_in(document)}):
        before, now = recorded.get(reference), describe_class(reference)
        source = "unknown"
        if before is not None and before.source_digest and now.source_digest:
            source = "changed" if changed & {reference, *before.bases} else "same"
        found.append(
            NamedClass(
                reference,
                reference not in refused,
                before.package if before else None,
                before.version if before else None,
                source,
            )
        )
    return tuple(found)
