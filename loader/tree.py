"""A module tree as ``print(net)`` would give it, without importing what the document names.

Modules of ``torch.nn`` are rebuilt without their values, so that they say their own settings; of
any other class a stand-in has its name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckpt.core.documents import Document, Module, Tensor
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import CkptError, IntegrityError
from ckpt.core.printable import escape
from ckpt.loader.trust import Named, Trust, names_in
from ckpt.loader.values import MALFORMED, Decoder

_LINE_LIMIT = 400
# A few records that share their children can describe a tree that fills any memory.
_SHOWN_LIMIT = 200_000


def module_tree(document: Document) -> str:
    """The tree of a module's document, printable.

    Raises:
        IntegrityError: ``document-damaged`` when it is not a tree that a module could have.
    """
    names_in(document)
    builder = _Skeletons(document)
    try:
        _check_size(document, document.root["$module"])
        text = repr(builder.module(document.root["$module"]))
    except CkptError:
        raise
    except (*MALFORMED, RecursionError) as error:
        raise IntegrityError(
            "document-damaged", f"the module tree cannot be shown: {escape(str(error))}"
        ) from None
    return "\n".join(escape(line, _LINE_LIMIT) for line in text.split("\n"))


def _check_size(document: Document, root: int) -> None:
    """Refuse a tree that shows more modules than anybody can read."""
    sizes: dict[int, int] = {}

    def size_of(index: int) -> int:
        if index not in sizes:
            children = [child for _, child in document.modules[index].children if child is not None]
            sizes[index] = 1 + sum(map(size_of, children))
        return sizes[index]

    if size_of(root) > _SHOWN_LIMIT:
        raise IntegrityError(
            "document-damaged", f"the module tree would show {sizes[root]} modules"
        )


@dataclass(slots=True)
class _Skeletons:
    document: Document
    trust: Trust = field(default_factory=Trust)
    _built: dict[int, nn.Module] = field(default_factory=dict)

    def module(self, index: int) -> nn.Module:
        if index not in self._built:
            record = self.document.modules[index]
            module = self._made(record)
            self._built[index] = module
            for name, child in record.children:
                module._modules[escape(name)] = None if child is None else self.module(child)
        return self._built[index]

    def _made(self, record: Module) -> nn.Module:
        """A module without children: of its own class if that is torch's, else a stand-in."""
        name = Named("$module", record.reference)
        allowed = self.trust.allows(name)
        kind: Any = self.trust.resolve(name) if allowed else nn.Module
        shown = record.reference.rpartition(":")[2].rpartition(".")[2]
        if record.parametrized or not allowed:
            shown = f"Parametrized{shown}" if record.parametrized else shown
            kind = type(shown, (kind,), {})
        module: nn.Module = kind.__new__(kind)
        nn.Module.__init__(module)
        # Only these say the shapes of their tensors; any other could be made to compute with them.
        listing = isinstance(module, (nn.ParameterList, nn.ParameterDict))
        shown_as: Any = self._tensor if listing else _absent_or_name
        module._parameters.update({name: shown_as(entry) for name, entry in record.params})
        module._buffers.update({name: shown_as(entry) for name, entry, _ in record.buffers})
        for key, value in record.attrs.items():
            vars(module)[key] = self._value(value)
        try:
            module.extra_repr()
        except Exception:  # noqa: BLE001 -- made by another version of torch, or by nobody
            vars(module)["extra_repr"] = str
        return module

    def _value(self, value: Any) -> Any:
        try:
            return _PlainDecoder(_absent_or_name, {}, _no_generator).decode(value)
        except CkptError:
            return None  # something that only trusted code could make

    def _tensor(self, index: int | None) -> Any:
        """A tensor of the shape and dtype, of one element's memory."""
        if index is None:
            return None
        entry: Tensor = self.document.tensors[index]
        dtype = getattr(torch, entry.dtype) if entry.dtype in ITEM_SIZES else torch.uint8
        made = torch.zeros((), dtype=torch.uint8, device="cpu").to(dtype).expand(entry.shape)
        return nn.Parameter(made, requires_grad=False) if entry.kind == "parameter" else made


class _PlainDecoder(Decoder):
    """Decodes what needs no import; the rest is shown by its name."""

    def _decode_tag(self, tag: str, content: Any) -> Any:
        if tag in ("$class", "$function"):
            return _Name(str(content).rpartition(":")[2])
        if tag == "$enum":
            return _Name(f"{str(content[0]).rpartition(':')[2]}.{content[1]}")
        if tag == "$range":  # its length may be any number
            return _Name(repr(range(*content)))
        return super()._decode_tag(tag, content)


class _Name:
    """Prints as a name."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return self._name


def _absent_or_name(index: int | None) -> Any:
    return None if index is None else _Name("tensor")


def _no_generator(device: str, state: Any) -> Any:
    raise IntegrityError("document-damaged", "a generator has no printed form")
