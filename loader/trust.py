"""What a load may import: decided by the caller alone, before anything is imported."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from ckpt.core.documents import Document
from ckpt.core.errors import IntegrityError, NotFoundError, TrustError, UsageError
from ckpt.core.printable import escape
from ckpt.loader.classes import (
    is_dotted_name,
    is_plain_class,
    is_reference,
    live_object,
    reference_of,
)
from ckpt.loader.values import RefusedError

TrustLike = type | str

_NAMING = frozenset({"$class", "$enum", "$function", "$object"})
# Modules of torch whose nn.Module classes only hold tensors and compute.
_TRUSTED_MODULES = (
    "torch.nn.modules",
    "torch.nn.utils.parametrize",
    "torch.nn.utils.parametrizations",
)
# Whole functions that modules keep as attributes; stored by name, never called by the loader.
_TRUSTED_FUNCTIONS = frozenset(
    {"relu", "gelu", "silu", "elu", "selu", "celu", "leaky_relu", "hardswish", "mish", "tanh"}
    | {"softplus", "sigmoid", "softmax", "log_softmax", "logsigmoid", "log_sigmoid", "relu6"}
    | {"hardtanh", "glu"}
    | {"exp", "log", "sin", "cos", "sqrt", "abs", "erf"}
)
# Hooks by which torch.nn.utils recomputes a weight; their objects are stored.
STORED_HOOKS = frozenset(
    {"torch.nn.utils.weight_norm:WeightNorm", "torch.nn.utils.spectral_norm:SpectralNorm"}
    | {
        f"torch.nn.utils.prune:{name}"
        for name in (
            "CustomFromMask",
            "Identity",
            "L1Unstructured",
            "LnStructured",
            "PruningContainer",
            "RandomStructured",
            "RandomUnstructured",
        )
    }
)
# Nobody should have to trust all of these; what is in them is given itself.
_NO_MODULES = {"__main__", "builtins"}
_FUNCTION_HOMES = ("torch.nn.functional", "torch", "torch._C._nn", "math")
# No document has these: they carry generated code, or are taken off at the push.
_NEVER_STORED = (
    torch.jit.ScriptModule,
    torch.fx.GraphModule,
    nn.DataParallel,
    nn.parallel.DistributedDataParallel,
)


@dataclass(frozen=True, slots=True)
class Named:
    """One name in a document, and what it must turn out to be."""

    tag: str
    reference: str


def names_in(document: Document) -> list[Named]:
    """Every class, function, enum and object that a load would need; imports nothing.

    Raises:
        IntegrityError: ``document-damaged`` when a name has no proper form, or ``classes`` has one
            that nothing in the document uses or derives from.
    """
    found = {Named("$module", module.reference) for module in document.modules}
    for module in document.modules:
        for value in module.attrs.values():
            found.update(_names_of(value))
        for _, value in module.hooks:
            found.update(_names_of(value))
    found.update(_names_of(document.root))
    for name in found:
        if not is_reference(name.reference):
            raise _no_name(name.reference)
    used = {name.reference for name in found}
    bases = {base for known in document.classes if known.reference in used for base in known.bases}
    unused = {known.reference for known in document.classes} - used
    strange = {base for base in bases if not is_reference(base)} | (unused - bases)
    if strange:
        raise _no_name(min(strange))
    return sorted(found, key=lambda name: (name.reference, name.tag))


def _names_of(value: Any) -> Iterator[Named]:
    rest = [value]  # not by recursion: a document may be nested as deep as its author likes
    while rest:
        value = rest.pop()
        if isinstance(value, list):
            rest.extend(value)
        elif isinstance(value, dict):
            rest.extend(value.values())
            for tag in _NAMING.intersection(value):
                yield Named(tag, _name_in(tag, value[tag]))


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """A value of a document that was decoded before, with other names of classes."""
    if isinstance(value, (list, tuple)):
        return type(value)(_renamed(item, names) for item in value)
    if not isinstance(value, dict):
        return value
    found = {key: _renamed(item, names) for key, item in value.items()}
    for tag in _NAMING.intersection(found):
        if isinstance(found[tag], list):
            found[tag][0] = names.get(found[tag][0], found[tag][0])
        else:
            found[tag] = names.get(found[tag], found[tag])
    return found


def _name_in(tag: str, content: Any) -> str:
    """The name in the content of a tag. Any other form is refused: what is not seen here would
    not be compared with what is allowed."""
    if tag in ("$enum", "$object"):
        is_list = isinstance(content, list)
        if is_list and tag == "$object" and len(content) == 3 and type(content[2]) is int:
            content = content[:2]
        content = content[0] if is_list and len(content) == 2 else None
    if not isinstance(content, str):
        raise _no_name(tag)
    return content


def _no_name(name: str) -> IntegrityError:
    return IntegrityError(
        "document-damaged", f'"{escape(name, 80)}" is not the name of a class that it uses'
    )


class Trust:
    """The classes and modules that a caller allows, beside those of ``torch.nn``."""

    def __init__(self, allowed: Iterable[TrustLike] = ()) -> None:
        self._classes: dict[str, Any] = {}
        self._local: dict[str, Any] = {}
        self._prefixes: list[str] = []
        self._exact: frozenset[str] = frozenset()
        for one in [allowed] if isinstance(allowed, (str, type)) else allowed:
            self._allow(one)

    def _allow(self, one: TrustLike) -> None:
        if isinstance(one, str):
            if not is_dotted_name(one):
                raise UsageError(
                    "trust-invalid",
                    f'"{escape(one, 80)}" is not the name of a module',
                    hint='write trust=["mypackage.models"], or give the class itself',
                )
            self._prefixes.append(one)
            return
        name = getattr(one, "__qualname__", None)
        if not isinstance(name, str):
            raise UsageError(
                "trust-invalid", f"{one!r} is not a class", hint="give a class or a module's name"
            )
        reference = f"{one.__module__}:{name}"
        if isinstance(one, types.BuiltinFunctionType):  # few of them say where they are
            with suppress(RefusedError):
                reference = reference_of(one)
        self._classes[reference] = one
        self._local[name] = one

    @classmethod
    def of_live(cls, document: Document) -> Trust:
        """Exactly what a document names, as it is in this process: what is being pushed is
        trusted already."""
        trust = cls()
        for reference in {name.reference for name in names_in(document)}:
            module, _, qualified = reference.partition(":")
            found = trust._classes[reference] = live_object(reference)
            if module == "__main__":
                trust._local[qualified] = found
        return trust

    @classmethod
    def of_all(cls, document: Document) -> Trust:
        """Whatever a document names, to be imported: for who pushes it, never for who loads."""
        trust = cls()
        trust._exact = frozenset(name.reference for name in names_in(document))
        return trust

    def refused(self, document: Document) -> list[Named]:
        """What a document names and is not allowed; imports nothing."""
        return [name for name in names_in(document) if not self.allows(name)]

    def check(self, document: Document) -> None:
        """Refuse a document that names what is not allowed, all of it at once.

        Raises:
            TrustError: ``class-not-allowed``; nothing was imported.
        """
        refused = self.refused(document)
        if not refused:
            return
        shown = ", ".join(sorted({name.reference for name in refused}))
        modules = sorted({name.reference.partition(":")[0] for name in refused} - _NO_MODULES)
        if modules:
            way = f"trust={modules!r}, or --trust on the command line"
        else:  # only the program itself can say which class it means
            own = sorted({name.reference.partition(":")[2] for name in refused})
            way = f"from Python, trust=[{', '.join(own)}]"
        noun = "class" if len(refused) == 1 else "classes"
        raise TrustError(
            "class-not-allowed",
            f"the checkpoint names {len(refused)} {noun} you have not trusted: {shown}; "
            "nothing was imported",
            hint=f"if you trust them: {way}",
        )

    def allows(self, name: Named) -> bool:
        """Whether a name may be imported; imports nothing."""
        if self._given(name.reference) is not None or name.reference in self._exact:
            return True
        module, _, qualified = name.reference.partition(":")
        if any(_inside(module, prefix) for prefix in self._prefixes):
            return True
        if name.tag in ("$module", "$enum", "$class"):
            return any(_inside(module, home) for home in _TRUSTED_MODULES)
        if name.tag == "$object":
            return name.reference in STORED_HOOKS
        return (
            name.tag == "$function"
            and module in _FUNCTION_HOMES
            and qualified in _TRUSTED_FUNCTIONS
        )

    def _given(self, reference: str) -> Any:
        """The object that the caller gave for this name; a name in ``__main__`` matches alone."""
        module, _, qualified = reference.partition(":")
        if reference not in self._classes and module == "__main__":
            return self._local.get(qualified)
        return self._classes.get(reference)

    def as_given(self, document: Document) -> Document:
        """The document with the names that classes have where the caller found them: one of a
        script may live in a module by now."""
        names = {}
        for name in names_in(document):
            given = self._given(name.reference)
            now = f"{getattr(given, '__module__', '')}:{getattr(given, '__qualname__', '')}"
            if given is not None and name.reference.startswith("__main__:"):
                names[name.reference] = now
        if not names:
            return document
        modules = tuple(
            replace(
                module,
                reference=names.get(module.reference, module.reference),
                attrs=_renamed(module.attrs, names),
                hooks=_renamed(module.hooks, names),
            )
            for module in document.modules
        )
        return replace(document, modules=modules)

    def resolve(self, name: Named) -> Any:
        """Import what an allowed name means, and check that it is what it says.

        Raises:
            NotFoundError: ``class-missing``; TrustError: ``class-type``, ``class-origin``,
                ``class-not-allowed``.
        """
        if not self.allows(name):  # it was checked with the whole document; never rely on that
            raise TrustError("class-not-allowed", f"{escape(name.reference, 80)} is not trusted")
        found = self._given(name.reference)
        if found is None:
            found = _imported(name.reference)
            _check_origin(name.reference, found)
        _check_kind(name, found)
        return found


def _inside(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(f"{prefix}.")


def _imported(reference: str) -> Any:
    module, _, qualified = reference.partition(":")
    try:
        found: Any = sys.modules.get(module) or importlib.import_module(module)
    except ImportError as error:
        raise NotFoundError(
            "class-missing",
            f"cannot import {module}: {error}",
            hint="install it, name its folder (--path on the command line), or get the weights "
            "alone with pull",
        ) from error
    for place, part in enumerate(qualified.split(".")):
        if place and not isinstance(found, type):  # another module's attributes may import more
            raise TrustError(
                "class-origin",
                f"{reference} is not defined in a class of {module}",
                hint="trust the module that defines it",
            )
        if not hasattr(found, part):
            raise NotFoundError(
                "class-missing",
                f"{module} has no {qualified}",
                hint="install the version that it was saved with, or get the weights with pull",
            )
        found = getattr(found, part)
    return found


def _check_origin(reference: str, found: Any) -> None:
    """A name must be where the object was defined, not where somebody re-exported it."""
    module, _, qualified = reference.partition(":")
    home = getattr(found, "__module__", None)
    # Some functions of torch say that they are methods of a class of its own.
    name = "__name__" if isinstance(found, types.BuiltinFunctionType) else "__qualname__"
    if getattr(found, name, None) != qualified or home not in (module, None):
        raise TrustError(
            "class-origin",
            f"{reference} resolves to {home}:{getattr(found, '__qualname__', '?')}",
            hint="trust the module that defines it",
        )


def _check_kind(name: Named, found: Any) -> None:
    wanted: Mapping[str, bool] = {
        "$module": isinstance(found, type)
        and issubclass(found, nn.Module)
        and not issubclass(found, _NEVER_STORED),
        "$enum": isinstance(found, type) and issubclass(found, Enum),
        "$object": isinstance(found, type) and is_plain_class(found),
        "$class": isinstance(found, type),
        "$function": callable(found) and not isinstance(found, type),
    }
    if not wanted[name.tag]:
        words = {"$module": "an nn.Module class", "$enum": "an Enum", "$object": "a plain class"}
        word = words.get(name.tag, name.tag.removeprefix("$"))
        raise TrustError("class-type", f"{name.reference} is not {word}", hint="do not load this")
