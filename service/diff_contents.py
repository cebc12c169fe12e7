"""What two documents say beside the bytes of their tensors: values, ties, module structure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckpt.core.documents import Document, Module, canonical

Path = tuple[str, ...]

_PAIRS = ("$dict", "$odict", "$counter")
_LISTED = ("parameters", "buffers", "children")


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing beside the tensors that differs.

    Attributes:
        path: where it stands in the state, parts joined by dots; empty for the state itself.
        what: ``value`` or ``type`` of a plain value; ``module``, ``class``, ``training``,
            ``children``, ``parameters``, ``buffers``, ``parametrized`` of a module; ``source`` of a
            class; ``step``, ``metric`` or ``label`` of the version.
        change: ``changed``, ``added`` or ``removed``.
        before, after: as JSON, values as ``docs/format.md`` section 6 has them; None where absent.
    """

    path: str
    what: str
    change: str
    before: Any
    after: Any


# What is known of a state, by path and by what it is.
Known = dict[tuple[Path, str], Any]


@dataclass(slots=True)
class Contents:
    """A document, looked through once.

    ``places`` has the index of the tensor at every place of the state; a tie has several.
    ``values`` has the plain values, ``attributes`` those of each module by its path.
    """

    document: Document
    places: dict[str, int] = field(default_factory=dict)
    values: Known = field(default_factory=dict)
    attributes: dict[str, Known] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tensors = self.document.tensors
        self.places.update((tensor.name, index) for index, tensor in enumerate(tensors))
        self._look(self.document.root, (), self.values)
        for module in self.document.modules:
            path = tuple(module.path.split(".")) if module.path else ()
            known = self.attributes.setdefault(module.path, {})
            for name, index in (*module.params, *(item[:2] for item in module.buffers)):
                if index is not None:
                    self._place((*path, name), index)
            for name, value in module.attrs.items():
                self._look(value, (*path, name), known)
            if module.hooks:
                self._look([list(hook) for hook in module.hooks], (*path, "<hooks>"), known)

    @property
    def ties(self) -> dict[str, str]:
        """The other places of each tensor, with its canonical name."""
        named = ((place, self.document.tensors[i].name) for place, i in self.places.items())
        return {place: name for place, name in named if place != name}

    def _place(self, path: Path, index: int) -> None:
        name = (".".join(path) or "tensor").encode("utf-8", "backslashreplace").decode()
        self.places.setdefault(name, index)

    def _look(self, value: Any, path: Path, known: Known) -> None:
        """Note the tensors and the plain values in one value of the document."""
        if isinstance(value, list):
            self._look_into("list", list(enumerate(value)), path, known, value)
            return
        if not isinstance(value, dict):
            known[path, "value"] = value
            return
        ((tag, content),) = value.items()
        if tag == "$tensor":
            self._place(path, content)
        elif tag == "$generator":
            known[path, "value"] = {tag: content[0]}
            self._place((*path, "state"), content[1])
        elif tag == "$module":
            if path:  # the state itself: its structure is compared
                known[path, "value"] = {tag: self.document.modules[content].path}
        elif (found := _inside(tag, content)) is not None:
            self._look_into(*found, path, known, value)
        else:
            known[path, "value"] = value

    def _look_into(
        self, kind: str, items: list[tuple[Any, Any]], path: Path, known: Known, value: Any
    ) -> None:
        known[path, "type" if items else "value"] = kind if items else value
        for key, item in items:
            part = key if isinstance(key, str) else canonical(key).decode()
            self._look(item, (*path, part), known)


def _inside(tag: str, content: Any) -> tuple[str, list[tuple[Any, Any]]] | None:
    """``(type, items)`` of a value that holds others; None when it holds none."""
    if tag in _PAIRS:
        return tag[1:], [(key, item) for key, item in content]
    if tag == "$state_dict":
        pairs, *noted = content
        return "odict", [*((key, item) for key, item in pairs), ("_metadata", noted)]
    if tag == "$defaultdict":
        return f"defaultdict of {content[0]}", [(key, item) for key, item in content[1]]
    if tag == "$tuple":
        return "tuple", list(enumerate(content))
    if tag == "$deque":
        return f"deque of {content[0]}", list(enumerate(content[1]))
    if tag == "$object":
        return f"object of {content[0]}", list(content[1].items())
    if tag == "$partial":
        return "partial", list(zip(("func", "args", "keywords"), content, strict=True))
    return None


def value_differences(before: Contents, after: Contents) -> Iterator[Difference]:
    """The plain values that differ: of the state, and of the modules that both have."""
    yield from _compare(before.values, after.values)
    for path, known in after.attributes.items():
        if path in before.attributes:
            yield from _compare(before.attributes[path], known)


def _compare(before: Known, after: Known) -> Iterator[Difference]:
    for key in sorted({**before, **after}, key=lambda key: natural_key(".".join(key[0]))):
        path, what = key
        in_both = key in before and key in after
        old, new = before.get(key), after.get(key)
        # True == 1 == 1.0, and no two of them are the same value; nor are 0.0 and -0.0.
        if in_both and canonical(old) == canonical(new):
            continue
        if in_both or what == "value":
            change = "changed" if in_both else "added" if key in after else "removed"
            yield Difference(".".join(path), what, change, old, new)


def structure_differences(before: Document, after: Document) -> Iterator[Difference]:
    """How two trees of modules differ, and the classes whose source changed."""
    old = {module.path: module for module in before.modules}
    new = {module.path: module for module in after.modules}
    if not old or not new:
        if old or new:
            change = "added" if new else "removed"
            pair = [tree[""].reference if "" in tree else None for tree in (old, new)]
            yield Difference("", "module", change, *pair)
        return
    moved = old.keys() ^ new.keys()
    for path in {**old, **new}:
        if path not in new:
            yield Difference(path, "module", "removed", old[path].reference, None)
        elif path not in old:
            yield Difference(path, "module", "added", None, new[path].reference)
        else:
            sides = _facets(before, old[path]), _facets(after, new[path])
            yield from _compare_module(path, *sides, moved)
    sources = {known.reference: known.source_digest for known in before.classes}
    for known in after.classes:
        source = sources.get(known.reference)
        if source and known.source_digest and source != known.source_digest:
            digests = source, known.source_digest
            yield Difference(known.reference, "source", "changed", *digests)


def _facets(document: Document, module: Module) -> dict[str, Any]:
    """What a module is, beside its attributes; tensors only by whether they are there."""
    modules = document.modules
    return {
        "class": module.reference,
        "training": module.training,
        "parameters": [(name, index is not None) for name, index in module.params],
        "buffers": [(name, index is not None, kept) for name, index, kept in module.buffers],
        "children": [
            (name, None if index is None else modules[index].path)
            for name, index in module.children
        ],
        "parametrized": list(module.parametrized),
    }


def _compare_module(
    path: str, before: Mapping[str, Any], after: Mapping[str, Any], moved: set[str]
) -> Iterator[Difference]:
    for what in before:
        old, new = before[what], after[what]
        if what in _LISTED:
            names = {item[0] for item in old} & {item[0] for item in new}
            old, new = (_untold(items, names, moved) for items in (old, new))
            both = set(old) & set(new)
            if both < {*old, *new}:  # else only their order differs
                old, new = ([item for item in items if item not in both] for items in (old, new))
        if old != new:
            yield Difference(path, what, "changed", old, new)


def _untold(items: list[Any], names: set[str], moved: set[str]) -> list[Any]:
    """Without what is there on one side only, and told as a tensor or a module of its own."""
    return [item for item in items if item[0] in names or not (item[1] is True or item[1] in moved)]


def natural_key(path: str) -> list[tuple[int, str]]:
    """A key that sorts ``layer.2`` before ``layer.10``."""
    parts = path.split(".")
    return [(len(part) if part.isdecimal() else 0, part) for part in parts]
