"""Records to a live module tree: classes by trust, attributes by value, no constructor called."""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ckpt.core.documents import Document, Module
from ckpt.core.errors import CkptError, IntegrityError, NotFoundError
from ckpt.core.printable import escape
from ckpt.loader.classes import is_method, would_replace
from ckpt.loader.cycles import find_cycle
from ckpt.loader.restore import Restorer
from ckpt.loader.snapshot import INTERNALS
from ckpt.loader.trust import STORED_HOOKS, Named, Trust
from ckpt.loader.values import Decoder

# What rebuilding calls on a module.
_CALLED = (
    "__init_subclass__",
    "__setstate__",
    "_register_load_state_dict_pre_hook",
    "has_uninitialized_params",
    "register_forward_hook",
    "register_forward_pre_hook",
)


def rebuild(document: Document, restorer: Restorer, trust: Trust) -> nn.Module:
    """The module that a document describes; nothing is imported before all of it is allowed.

    Raises:
        TrustError: ``class-not-allowed``, ``class-type``, ``class-origin``.
        NotFoundError: ``class-missing``.
        IntegrityError: ``document-damaged``, ``class-failed``.
    """
    trust.check(document)
    order = dict(document.order)
    builder = _Builder(
        restorer.tensor,
        order,
        restorer.generator,
        document=document,
        restorer=restorer,
        trust=trust,
    )
    try:
        if find_cycle(document.modules) is not None:
            raise IntegrityError("document-damaged", "a module of it is a child of itself")
        root = builder.decode(document.root)
        restorer.note_absent()
    except CkptError:
        raise
    except Exception as error:
        raise _failed("", error) from error
    if not isinstance(root, nn.Module):
        raise IntegrityError("document-damaged", "the root of the document is no module")
    return root


def runs_own_code(document: Document, trust: Trust) -> bool:
    """Whether rebuilding runs code that is not torch's, which may write to what was restored."""
    for reference in {module.reference for module in document.modules}:
        kind: Any = trust.resolve(Named("$module", reference))
        called = [getattr(kind, name, None) for name in _CALLED]
        own = [found for found in called if not _is_of_torch(found)]
        if own or kind.__new__ is not object.__new__:
            return True
    return False


def _is_of_torch(found: Any) -> bool:
    home = getattr(found, "__module__", None) or "builtins"
    return home.partition(".")[0] in ("torch", "builtins")


def _failed(path: str, error: Exception) -> IntegrityError:
    """The error for code of the module's own that raises."""
    what = f'the module "{escape(path, 80)}"' if path else "the module"
    return IntegrityError(
        "class-failed",
        f"{what} cannot be rebuilt: {type(error).__name__}: {escape(str(error))}",
        hint="its code may have changed since; get the weights with pull",
    )


@dataclass(slots=True)
class _Builder(Decoder):
    """The value codec, and the tags that only a module may hold; builds each module once, however
    often the tree refers to it."""

    document: Document = field(kw_only=True)
    restorer: Restorer = field(kw_only=True)
    trust: Trust = field(kw_only=True)
    _built: dict[int, nn.Module] = field(default_factory=dict)
    _objects: dict[int, Any] = field(default_factory=dict)

    def _decode_tag(self, tag: str, content: Any) -> Any:
        if tag == "$module":
            return self.module(content)
        if tag in ("$class", "$function"):
            return self.trust.resolve(Named(tag, content))
        if tag == "$enum":
            return self.trust.resolve(Named(tag, content[0]))[content[1]]
        if tag == "$object":
            return self.instance(*content)
        if tag == "$same":
            return self.same(content)
        if tag == "$partial":
            return _partial(*map(self.decode, content))
        return super(_Builder, self)._decode_tag(tag, content)

    def module(self, index: Any) -> nn.Module:
        if type(index) is not int or not 0 <= index < len(self.document.modules):
            raise IntegrityError("document-damaged", f"there is no module {index!r}")
        if index not in self._built:
            record = self.document.modules[index]
            kind = self._class_of(record)
            try:
                module = kind.__new__(kind)
                nn.Module.__init__(module)
            except Exception as error:
                raise _failed(record.path, error) from error
            self._built[index] = module  # before its content: that may refer back to it
            self._fill(module, record)
        return self._built[index]

    def _class_of(self, record: Module) -> Any:
        try:
            return self.trust.resolve(Named("$module", record.reference))
        except NotFoundError as error:
            error.message += f' (needed by "{escape(record.path, 80) or "<root>"}")'
            raise

    def _fill(self, module: nn.Module, record: Module) -> None:
        state: dict[str, Any] = {"training": record.training}
        state["_parameters"] = {name: self._tensor(index) for name, index in record.params}
        state["_buffers"] = {name: self._tensor(index) for name, index, _ in record.buffers}
        transient = {name for name, _, persistent in record.buffers if not persistent}
        state["_non_persistent_buffers_set"] = transient
        state["_modules"] = {
            name: None if index is None else self.module(index) for name, index in record.children
        }
        for name, value in record.attrs.items():
            self._check_name(module, name, value)
            state[name] = self.decode(value)
        if isinstance(module, nn.RNNBase):
            _check_recurrent(module, state)
        kind: Any = type(module)
        if kind.__setstate__ is vars(nn.Module)["__setstate__"]:
            vars(module).update(state)
        else:  # torch's own compatibility shims live there
            try:
                kind.__setstate__(module, {**vars(module), **state})
            except Exception as error:
                raise _failed(record.path, error) from error
        for place, value in record.hooks:
            _check_hook(place, value)
            hook = self.decode(value)
            if place == "_forward_pre_hooks":
                module.register_forward_pre_hook(hook)
            else:
                module.register_forward_hook(hook)
        _make_lazy(module)
        _inject(module, record.parametrized)

    def _tensor(self, index: int | None) -> Any:
        return None if index is None else self.restorer.tensor(index)

    @staticmethod
    def _check_name(module: nn.Module, name: str, value: Any) -> None:
        makes = isinstance(value, dict) and value.keys() <= {"$class", "$partial"}
        replaces = would_replace(type(module), name, makes)
        if name in INTERNALS or name == "__dict__" or replaces:
            raise IntegrityError(
                "document-damaged",
                f'attribute "{escape(name)}" would replace a method of {type(module).__qualname__}',
            )

    def instance(
        self, reference: str, attributes: Mapping[str, Any], number: int | None = None
    ) -> Any:
        """A plain object; one with a number is that of each ``$same`` with it."""
        kind = self.trust.resolve(Named("$object", reference))
        replaced = [name for name in attributes if callable(getattr(kind, name, None))]
        if replaced and reference in STORED_HOOKS:  # the forward calls their methods
            raise IntegrityError(
                "document-damaged", f'attribute "{escape(replaced[0])}" would replace a method'
            )
        made = object.__new__(kind)
        vars(made).update({name: self.decode(item) for name, item in attributes.items()})
        if number is not None:
            if type(number) is not int or number in self._objects:
                raise ValueError("an object's number is none, or another's")
            self._objects[number] = made
        return made

    def same(self, number: Any) -> Any:
        """The object with that number, which comes before all that refer to it."""
        return self._objects[number]


def _partial(function: Any, arguments: Any, keywords: Any) -> Any:
    """A partial; of a method of a module with that module alone, the bound method."""
    if not isinstance(arguments, tuple) or not isinstance(keywords, dict):
        raise TypeError("the arguments of a partial are no tuple and dict")
    owner = arguments[0] if len(arguments) == 1 and not keywords else None
    if isinstance(owner, nn.Module) and is_method(function, owner):
        return types.MethodType(function, owner)
    return functools.partial(function, *arguments, **keywords)


def _check_hook(place: str, value: Any) -> None:
    """Refuse a hook that no push stores: a forward would call it."""
    stored = isinstance(value, dict) and "$object" in value and value["$object"][0] in STORED_HOOKS
    if not stored or place not in ("_forward_hooks", "_forward_pre_hooks"):
        raise IntegrityError(
            "document-damaged", f'a hook at "{escape(place, 80)}" is none of torch.nn.utils'
        )


# By the forward that calls the kernel: which mode it may have, and how many gates.
_RECURRENT: dict[Any, dict[Any, int]] = {
    nn.RNN.forward: {"RNN_TANH": 1, "RNN_RELU": 1},
    nn.LSTM.forward: {"LSTM": 4},
    nn.GRU.forward: {"GRU": 3},
}


def _check_recurrent(module: nn.RNNBase, state: Mapping[str, Any]) -> None:
    """Refuse recurrent weights of other shapes than the settings say. Kernels take them on trust
    and read beyond their end; ``__setstate__`` counts to any number of layers."""
    names = state.get("all_weights", state.get("_all_weights"))
    modes = _RECURRENT.get(type(module).forward)
    try:
        flat = state["_flat_weights"]
        fine = all(isinstance(name, str) for layer in names or [[None]] for name in layer)
        fine &= len(flat) == len(state["_flat_weights_names"])
        if fine and modes is not None and all(weight is not None for weight in flat):
            shapes = _recurrent_shapes(state, modes[state["mode"]], len(flat))
            fine = shapes == [tuple(weight.shape) for weight in flat]
    except (AttributeError, KeyError, TypeError):
        fine = False
    if not fine:
        raise IntegrityError(
            "document-damaged", f"weights of a {type(module).__qualname__} do not fit its settings"
        )


def _recurrent_shapes(state: Mapping[str, Any], gates: int, limit: int) -> list[tuple[int, ...]]:
    """The shapes of the weights of a recurrent module, in order, of no more than ``limit`` layers."""
    hidden, projected = state["hidden_size"], state["proj_size"]
    directions = 2 if state["bidirectional"] else 1
    shapes: list[tuple[int, ...]] = []
    for layer in range(min(state["num_layers"], limit + 1)):
        given = (projected or hidden) * directions if layer else state["input_size"]
        one: list[tuple[int, ...]] = [(gates * hidden, given)]
        one.append((gates * hidden, projected or hidden))
        one += [(gates * hidden,)] * 2 if state["bias"] else []
        one += [(projected, hidden)] if projected else []
        shapes += one * directions
    return shapes


def _make_lazy(module: nn.Module) -> None:
    """Give a module with uninitialized parameters the two hooks that its constructor gives it."""
    if not isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return
    lazy: Any = module
    if not lazy.has_uninitialized_params():
        return
    lazy._load_hook = lazy._register_load_state_dict_pre_hook(lazy._lazy_load_hook)
    lazy._initialize_hook = lazy.register_forward_pre_hook(lazy._infer_parameters, with_kwargs=True)


def _inject(module: nn.Module, names: tuple[str, ...]) -> None:
    """Put the synthetic class of torch.nn.utils.parametrize in front again."""
    if not names:
        return
    from torch.nn.utils import parametrize

    given = module._modules.get("parametrizations")
    known = tuple(given) if isinstance(given, nn.ModuleDict) else ()
    if known != names or any(name.startswith("__") for name in names):
        raise IntegrityError(
            "document-damaged", f'"{escape(names[0], 80)}" is parametrized by no module'
        )
    parametrize._inject_new_class(module)
    for name in names:
        parametrize._inject_property(module, name)
