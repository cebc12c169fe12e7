"""Which tensors of a version a pattern means, every name of a tied one included."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator
from typing import Any

from ckpt.core.documents import Document
from ckpt.core.errors import NotFoundError
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.state_dict import state_dict_names

# One pattern such as ``"encoder.*"``, or several.
Patterns = str | Iterable[str]

_MOST_NAMES = 1_000_000


def chosen_tensors(version: Version, document: Document, patterns: Patterns) -> dict[str, int]:
    """The names that match one of the patterns, as ``fnmatch`` does, each with the number of its
    tensor entry.

    Raises:
        NotFoundError: ``tensor-missing`` when none matches one of them.
    """
    wanted = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    known = {name: index for name, index in _names(document) if document.tensors[index].has_values}
    chosen: set[str] = set()
    for pattern in wanted:
        found = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not found:
            raise NotFoundError(
                "tensor-missing",
                f'{version.reference} has no tensor like "{escape(str(pattern))}"',
                hint=f"run `ckpt show {version.reference}` to see all",
            )
        chosen.update(found)
    return {name: index for name, index in known.items() if name in chosen}


def _names(document: Document) -> Iterator[tuple[str, int]]:
    """Every entry under its own name, and then under each other name that the state has for it."""
    for index, tensor in enumerate(document.tensors):
        yield tensor.name, index
    if document.state == "module":
        yield from state_dict_names(document)
        return
    for count, (name, index) in enumerate(_paths(document.root, "")):
        # A few values that share their parts can name more than fits anywhere.
        if count < _MOST_NAMES and isinstance(index, int) and 0 <= index < len(document.tensors):
            yield name, index


def _paths(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Where the tree of a state refers to tensors; keys are joined by dots."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _paths(item, f"{path}.{number}" if path else str(number))
    elif isinstance(value, dict) and len(value) == 1:
        ((tag, content),) = value.items()
        if tag == "$tensor":
            yield path, content
        elif tag in ("$dict", "$odict", "$state_dict"):
            for key, item in content if tag != "$state_dict" else content[0]:
                yield from _paths(item, f"{path}.{key}" if path else str(key))
        elif tag == "$tuple":
            yield from _paths(content, path)
