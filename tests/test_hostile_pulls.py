"""A pull of a document that somebody edited ends in a typed error, or in tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from torch import nn

import ckpt
from ckpt.core.documents import Document, Tensor
from ckpt.core.errors import CkptError, IntegrityError
from ckpt.core.state_dict import state_dict_names
from ckpt.loader.spaces import MemorySpace


def with_module(place: int, **changes: Any) -> Callable[[Document], Document]:
    def edit(document: Document) -> Document:
        modules = list(document.modules)
        modules[place] = replace(modules[place], **changes)
        return replace(document, modules=tuple(modules))

    return edit


def with_tensor(place: int, **changes: Any) -> Callable[[Document], Document]:
    def edit(document: Document) -> Document:
        tensors = list(document.tensors)
        tensors[place] = replace(tensors[place], **changes)
        return replace(document, tensors=tuple(tensors))

    return edit


def doubling(document: Document) -> Document:
    """Sixty modules, each twice a child of the one before: 2 ** 60 names."""
    last = document.modules[1]
    made = [replace(document.modules[0], children=(("a", n + 1), ("b", n + 1))) for n in range(60)]
    return replace(document, modules=(*made, last))


def chain(document: Document) -> Document:
    """Ten thousand modules, each the child of the one before."""
    last = document.modules[1]
    made = [replace(document.modules[0], children=(("a", n + 1),)) for n in range(10_000)]
    return replace(document, modules=(*made, last))


EDITS: dict[str, Callable[[Document], Document]] = {
    "root is a list": lambda document: replace(document, root=[]),
    "root is text": lambda document: replace(document, root="x"),
    "root beyond": lambda document: replace(document, root={"$module": 99}),
    "child beyond": with_module(0, children=(("x", 99),)),
    "child of itself": with_module(1, children=(("x", 0),)),
    "parameter beyond": with_module(1, params=(("weight", 99),)),
    "parameter below": with_module(1, params=(("weight", -1),)),
    "view beyond": with_tensor(0, region=99, chunks=()),
    "view of itself": with_tensor(0, region=0, chunks=()),
    "made of itself": with_tensor(0, components={"indices": 0, "values": 0}, chunks=()),
    "made of nothing": with_tensor(0, components={"indices": -7}, chunks=()),
    "doubling": doubling,
    "chain": chain,
}


def test_a_tree_that_is_too_deep_is_refused_by_name(repo: ckpt.Repository) -> None:
    repo.push(nn.Sequential(nn.Linear(2, 3)), "m")
    with pytest.raises(IntegrityError, match="nested deeper than 1000"):
        state_dict_names(chain(repo.document("m")))


@pytest.mark.parametrize("name", EDITS)
def test_it_ends_in_a_typed_error(
    repo: ckpt.Repository, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push(nn.Sequential(nn.Linear(2, 3)), "m")
    hostile = EDITS[name](repo.document("m"))
    monkeypatch.setattr(repo._registry.queries, "document", lambda version: hostile)
    pulls: list[Callable[[], Any]] = [
        lambda: repo.pull("m"),
        lambda: repo.pull("m", tensors="*"),
        lambda: repo.load_into(nn.Sequential(nn.Linear(2, 3)), "m"),
    ]
    for pull in pulls:
        try:
            found = pull()
        except CkptError:
            continue
        values = found.values() if isinstance(found, dict) else ()
        assert all(isinstance(value, torch.Tensor) for value in values)


def test_room_for_bytes_that_a_quantised_tensor_has_not_is_refused() -> None:
    """It is made of components; torch itself ends here in an assertion of its own."""
    entry = Tensor(
        name="w", dtype="quint8", shape=(4,), layout="quantized", chunks=("0" * 64,), kind="tensor"
    )
    with pytest.raises(IntegrityError) as caught:
        MemorySpace(entry)
    assert caught.value.code == "document-damaged"
