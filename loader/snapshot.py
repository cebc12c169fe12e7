"""A module tree to records: parameters, buffers, children, flags and every other attribute."""

from __future__ import annotations

import functools
import types
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import nn

from ckpt.core.documents import Module
from ckpt.core.errors import UsageError
from ckpt.core.printable import escape
from ckpt.loader.capture import Captured, TensorTable, capture
from ckpt.loader.classes import (
    container_of,
    describe_classes,
    has_slots,
    is_method,
    is_of_torch,
    is_plain_class,
    reference_of,
    would_replace,
)
from ckpt.loader.cycles import find_cycle
from ckpt.loader.trust import STORED_HOOKS
from ckpt.loader.values import Encoder, Path, RefusedError
from ckpt.loader.wrappers import HOOKS, unwrap

# What nn.Module.__init__ makes; everything else in __dict__ is the module's own.
INTERNALS = frozenset(vars(nn.Module())) | {"_compiled_call_impl"}
# The second by Lightning, which replaces torch.compile where it is imported.
_MADE_BY_COMPILE = {"_is_torch_compile", "_compile_kwargs"}
STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_MADE_BY_LAZY = {"_load_hook", "_initialize_hook"}


def capture_state(state: Any, drop: Collection[str] = ()) -> Captured:
    """Describe what is pushed: a module, or any nesting of plain values with tensors in it.

    Raises:
        UsageError: ``cannot-store``, naming everything that cannot be stored; ``drop-invalid``.
    """
    if not isinstance(state, nn.Module):
        if drop:
            raise _drop_invalid(sorted(drop), "only attributes of a module can be left out")
        return capture(state)
    captured = capture_module(state, drop)
    unknown = sorted(set(drop) - set(captured.dropped))
    if unknown:
        raise _drop_invalid(unknown, "the module has no such attribute")
    return captured


def _drop_invalid(paths: list[str], reason: str) -> UsageError:
    shown = ", ".join(escape(path, 80) for path in paths)
    return UsageError(
        "drop-invalid", f"cannot leave out {shown}: {reason}", hint="check the names in drop"
    )


def capture_module(module: nn.Module, drop: Collection[str] = ()) -> Captured:
    """Describe a module and everything in it; copies no tensor and calls no hook. Attributes
    whose path is in ``drop`` are left out.

    Raises:
        UsageError: ``cannot-store``, naming everything that cannot be stored.
    """
    table = TensorTable(lazy=True)
    encoder = _ModuleEncoder(table, table=table, drop=frozenset(drop))
    root = encoder.encode_root(module)
    for path, reason in table.share():
        encoder.refusals.append((path, reason))
    modules = tuple(record for record in encoder.modules if record is not None)
    cycle = None if encoder.refusals else find_cycle(modules)
    if cycle is not None:
        reason = "it is a child of itself; keep the parent in a list, not as a child"
        encoder.refusals.append((tuple(cycle.split(".")) if cycle else (), reason))
    encoder.raise_refusals()
    entries, sources = table.finish()
    return Captured(
        root,
        entries,
        sources,
        tuple(encoder.order),
        modules=modules,
        classes=describe_classes(encoder.references),
        wrappers=encoder.wrappers,
        dropped=tuple(sorted(encoder.dropped)),
        notes=(*table.all_notes(), *encoder.notes),
    )


@dataclass(slots=True)
class _ModuleEncoder(Encoder):
    """The value codec, and the things that only a module may hold."""

    table: TensorTable = field(kw_only=True)
    modules: list[Module | None] = field(default_factory=list)
    references: set[str] = field(default_factory=set)
    wrappers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    drop: frozenset[str] = frozenset()
    dropped: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    # Modules and plain objects by identity, kept alive as long as it counts, with their indices
    # and their descriptions.
    _seen: dict[int, tuple[nn.Module, int]] = field(default_factory=dict)
    _objects: dict[int, tuple[Any, list[Any]]] = field(default_factory=dict)
    _numbers: int = 0

    def _encode_other(self, value: Any, path: Path) -> Any:
        if isinstance(value, weakref.ProxyTypes):
            raise RefusedError(_not_stored("weakref.proxy", path))
        if isinstance(value, nn.Module):
            return {"$module": self._take_module(value, path)}
        if isinstance(value, Enum):
            if value.name not in type(value).__members__:
                raise RefusedError("a combination of flags; keep its .value and make it again")
            return {"$enum": [self._refer(type(value)), value.name]}
        if isinstance(value, functools.partial):
            if type(value) is not functools.partial or vars(value):
                raise RefusedError("a partial with a class or attributes of its own; use a module")
            parts = [value.func, value.args, value.keywords]
            return {"$partial": [self._encode(part, path) for part in parts]}
        if isinstance(value, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
            raise RefusedError("an operator of torch.ops; use its function, such as torch.relu")
        if isinstance(value, types.MethodType):
            return self._encode_method(value, path)
        if isinstance(value, type):
            return {"$class": self._refer(value)}
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
            return {"$function": self._refer(value)}
        return self._encode_object(value, path)

    def _encode_method(self, value: types.MethodType, path: Path) -> Any:
        """A method of a module that is described already: its function, with that module as the
        only argument of a partial."""
        owner: Any = value.__self__
        function = value.__func__
        if id(owner) not in self._seen or not is_method(function, owner):
            raise RefusedError("a bound method; store its object and look the method up in forward")
        parts: list[Any] = [function, (owner,), {}]
        return {"$partial": [self._encode(part, path) for part in parts]}

    def _encode_object(self, value: Any, path: Path) -> Any:
        """A plain object; one that several places refer to is described at the first of them,
        and gets a number there for the others."""
        if id(value) not in self._objects:
            described = self._describe_object(value, path)
            self._objects[id(value)] = value, described["$object"]
            return described
        _, content = self._objects[id(value)]
        if len(content) == 2:
            content.append(self._numbers)
            self._numbers += 1
        return {"$same": content[2]}

    def _describe_object(self, value: Any, path: Path) -> dict[str, list[Any]]:
        """Its class by name, its attributes as values."""
        kind = type(value)
        name = f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
        if not is_plain_class(kind) or has_slots(kind) or not hasattr(value, "__dict__"):
            raise RefusedError(_not_stored(name, path))
        reference = self._refer(kind)
        self.open(value, path)
        try:
            attributes = {
                key: self.encode(item, (*path, key))
                for key, item in sorted(vars(value).items())
                if not self._leaves_out((*path, key))
            }
        finally:
            self.close(value)
        return {"$object": [reference, attributes]}

    def _leaves_out(self, path: Path) -> bool:
        name = ".".join(path) if self.drop else ""
        if name not in self.drop:
            return False
        self.dropped.add(name)
        return True

    def _refer(self, value: Any) -> str:
        reference = reference_of(value)
        self.references.add(reference)
        return reference

    def _take_module(self, module: nn.Module, path: Path) -> int:
        unwrapped, wrappers = unwrap(module)
        if id(unwrapped) in self._seen:
            return self._seen[id(unwrapped)][1]
        index = len(self.modules)
        self._seen[id(unwrapped)] = unwrapped, index
        self.modules.append(None)
        if wrappers:
            self.wrappers[".".join(path)] = wrappers
        self.modules[index] = self._describe(unwrapped, path)
        return index

    def _describe(self, module: nn.Module, path: Path) -> Module:
        if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
            is_graph = isinstance(module, torch.fx.GraphModule)
            name = "GraphModule" if is_graph else type(module).__qualname__
            raise RefusedError(f"{name} carries generated code; push the original module")
        if type(module).__module__ == "torch.distributed.fsdp._fully_shard._fsdp_init":
            raise RefusedError(
                "it is sharded by FSDP; gather it first, or push with ckpt.dcp_writer"
            )
        kind = _own_class(module)
        reference = self._refer(kind)
        if has_slots(kind):
            raise RefusedError(
                f"{kind.__qualname__} has __slots__, whose values are not in its dict; remove them"
            )
        if container := container_of(kind):
            raise RefusedError(
                f"{kind.__qualname__} is a {container} too, whose items are not in its dict; "
                "keep them in an attribute"
            )
        state = _state_of(module)
        parametrized = _parametrized(module)
        if parametrized and isinstance(module, nn.RNNBase):  # a list of what they compute
            self.table.recomputed.update(map(id, module._flat_weights))
        hooks = self._hooks(module, path)
        params = self._named(state["_parameters"], path)
        persistent = state["_non_persistent_buffers_set"]
        buffers = tuple(
            (name, entry, name not in persistent)
            for name, entry in self._named(state["_buffers"], path)
        )
        for _, entry, _ in buffers:
            if entry is not None:
                self.table.mark_buffer(entry)
        return Module(
            path=".".join(path),
            reference=reference,
            training=bool(state["training"]),
            params=params,
            buffers=buffers,
            children=self._children(state["_modules"], path),
            attrs=self._attributes(module, state, path),
            hooks=hooks,
            parametrized=parametrized,
        )

    def _named(self, tensors: Mapping[str, Any], path: Path) -> tuple[tuple[str, int | None], ...]:
        found = []
        for name, tensor in tensors.items():
            entry = None if tensor is None else self.encode(tensor, (*path, name))
            found.append((name, None if entry is None else entry["$tensor"]))
            if tensor is not None:
                self._note_hooks(tensor, escape(".".join((*path, name)), 80))
        return tuple(found)

    def _note_hooks(self, tensor: torch.Tensor, where: str) -> None:
        """Hooks change no outputs: they are left out, and named."""
        if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
            self.notes.append(f"{where}: its hooks are not stored")

    def _children(
        self, modules: Mapping[Any, Any], path: Path
    ) -> tuple[tuple[str, int | None], ...]:
        found: list[tuple[str, int | None]] = []
        for name, child in modules.items():
            if not isinstance(name, str):
                reason = (
                    f"child key of type {type(name).__name__} is not a string; "
                    "write self._modules[str(i)] = m or add_module(name, m)"
                )
                self.refusals.append((path, reason))
                continue
            entry = None if child is None else self.encode(child, (*path, name))
            found.append((name, None if entry is None else entry["$module"]))
        return tuple(found)

    def _attributes(
        self, module: nn.Module, state: Mapping[str, Any], path: Path
    ) -> dict[str, Any]:
        made = INTERNALS | _MADE_BY_COMPILE | (_MADE_BY_LAZY if _is_lazy(module) else frozenset())
        found = {}
        for name, value in sorted(state.items()):
            if name in made:
                continue
            if self._leaves_out((*path, name)):
                continue
            if would_replace(type(module), name, isinstance(value, (type, functools.partial))):
                reason = f'attribute "{name}" would replace a method of {type(module).__qualname__}'
                self.refusals.append(((*path, name), f"{reason}; rename it, or subclass"))
                continue
            found[name] = self.encode(value, (*path, name))
        return found

    def _hooks(self, module: nn.Module, path: Path) -> tuple[tuple[str, Any], ...]:
        """Hooks change outputs and are refused, but for those of torch.nn.utils."""
        stored = []
        for place, word in HOOKS.items():
            for hook in getattr(module, place).values():
                kind = type(hook)
                if _is_lazy(module) and getattr(hook, "__name__", "") == "_infer_parameters":
                    continue
                if f"{kind.__module__}:{kind.__qualname__}" in STORED_HOOKS:
                    made: Any = getattr(hook, "name", None) or getattr(hook, "_tensor_name", "")
                    self.table.recomputed.add(id(vars(module).get(made)))
                    stored.append((place, self._alone(hook, path)))
                    continue
                name = getattr(hook, "__qualname__", kind.__qualname__)
                reason = f"{word} {name} changes outputs and cannot be stored; remove it first"
                self.refusals.append((path, reason))
        self._note_state_dict(module, path)
        return tuple(stored)

    def _alone(self, hook: Any, path: Path) -> Any:
        """A hook, which is rebuilt after everything else, shares no objects with it."""
        others, self._objects = self._objects, {}
        try:
            return self._describe_object(hook, path)
        finally:
            self._objects = others

    def _note_state_dict(self, module: nn.Module, path: Path) -> None:
        """What a class or a hook makes of state_dict() changes no outputs: it is left out, and
        named."""
        kind: Any = _own_class(module)
        where = escape(".".join(path)) or "<root>"
        for name in ("get_extra_state", "state_dict"):
            if getattr(kind, name) is not getattr(nn.Module, name) and not is_of_torch(kind):
                self.notes.append(f"{where}: {name} of {kind.__qualname__} is not asked")
        for place in STATE_HOOKS:
            for hook in getattr(module, place).values():
                function = getattr(hook, "hook", hook)
                name = getattr(function, "__qualname__", type(function).__qualname__)
                if not is_of_torch(function):
                    self.notes.append(f"{where}: state_dict hook {escape(name, 80)} is not stored")


def _not_stored(name: str, path: Path) -> str:
    way = f'drop=["{_attribute_path(path)}"]'
    return f"cannot store {name}; create it in __setstate__, or leave it out with {way}"


def _attribute_path(path: Path) -> str:
    """The attribute that a value stands in, which may be inside a list."""
    parts = list(path)
    while parts and parts[-1].isdigit():
        parts.pop()
    return escape(".".join(parts), 80)


def _is_parametrized(module: nn.Module) -> bool:
    """Whether its class is the one that parametrize made for it. Torch's own question goes to
    __getattr__ too, which may answer for another module."""
    made = vars(type(module)).get("__getstate__")
    own = isinstance(module._modules.get("parametrizations"), nn.ModuleDict)
    return own and getattr(made, "__module__", None) == nn.utils.parametrize.__name__


def _own_class(module: nn.Module) -> type:
    """The class that the user wrote; parametrize puts a synthetic subclass in front of it."""
    kind = type(module)
    return kind.__bases__[0] if _is_parametrized(module) else kind


def _parametrized(module: nn.Module) -> tuple[str, ...]:
    if not _is_parametrized(module):
        return ()
    # torch types an attribute as a tensor or a module, of which few can be listed.
    return tuple(module._modules["parametrizations"])  # type: ignore[arg-type]


def _is_lazy(module: nn.Module) -> bool:
    lazy = nn.modules.lazy.LazyModuleMixin
    return isinstance(module, lazy) and hasattr(module, "_initialize_hook")


def _state_of(module: nn.Module) -> Mapping[str, Any]:
    """``__dict__``, or what the class itself gives for it."""
    kind: Any = _own_class(module)
    if kind.__getstate__ in (vars(nn.Module).get("__getstate__"), vars(object)["__getstate__"]):
        return vars(module)
    state = kind.__getstate__(module)
    if not isinstance(state, dict) or not vars(nn.Module()).keys() <= state.keys():
        raise RefusedError(f"{kind.__qualname__}.__getstate__ gives no module's dict")
    return state
