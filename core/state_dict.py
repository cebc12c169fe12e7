"""The keys that ``state_dict()`` of a module gave, from its document alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from ckpt.core.documents import Document, Module
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import escape

_NAMES_LIMIT = 1_000_000
_DEPTH_LIMIT = 1_000  # Python's own, for a module that is called


def state_dict_names(document: Document) -> list[tuple[str, int]]:
    """``(key, tensor entry)`` in the order that ``state_dict()`` gave.

    Raises:
        IntegrityError: ``document-damaged`` when the tree is none, or names what is not there.
    """
    if not document.modules:
        return []
    try:
        walk = _walk(document.modules, document.root["$module"])
        names = list(islice(walk, _NAMES_LIMIT + 1))
    except (LookupError, TypeError) as error:
        raise _no_tree(str(error)) from None
    if len(names) > _NAMES_LIMIT:
        raise _no_tree(f"it has more than {_NAMES_LIMIT} names")
    for name, index in names:
        if type(index) is not int or not 0 <= index < len(document.tensors):
            raise _no_tree(f'"{escape(name, 80)}" is tensor {index!r}')
    return names


def _no_tree(reason: str) -> IntegrityError:
    return IntegrityError(
        "document-damaged", f"the module tree cannot be read: {reason}", hint="run `ckpt fsck`"
    )


def _walk(modules: Sequence[Module], root: int) -> Iterator[tuple[str, int]]:
    waiting: list[tuple[int, str, tuple[int, ...]]] = [(root, "", ())]
    while waiting:
        index, prefix, above = waiting.pop()
        if len(above) > _DEPTH_LIMIT:
            raise _no_tree(f"it is nested deeper than {_DEPTH_LIMIT}")
        module = modules[index]
        for name, entry in module.params:
            if entry is not None:
                yield prefix + name, entry
        for name, entry, persistent in module.buffers:
            if entry is not None and persistent:
                yield prefix + name, entry
        # A stack, since a generator in a generator for each level takes as long as it is deep.
        beneath = (*above, index)
        waiting += [
            (child, f"{prefix}{name}.", beneath)
            for name, child in reversed(module.children)
            if child is not None and child not in above
        ]
