"""Names of classes and functions: ``module:qualname``, and what their source was."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import sys
import types
from typing import Any

from ckpt.core.digests import digest_of
from ckpt.core.documents import ModelClass
from ckpt.loader.values import RefusedError


def reference_of(value: Any) -> str:
    """The name under which a class or function can be found again.

    Raises:
        RefusedError: it has none: a lambda, something local, or a name that means another object.
    """
    module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(name, str):
        raise RefusedError(
            f"cannot store {type(value).__qualname__}; use a named function or class"
        )
    if name.endswith("<lambda>"):
        raise RefusedError("a lambda has no import path; use a named function or nn.Module")
    if not isinstance(module, str):
        module = _home_of_builtin(value, name)
    if "<locals>" in name:
        kind = "class" if isinstance(value, type) else "function"
        raise RefusedError(
            f"{module}.{name} is defined inside a function, so it has no import path; "
            f"move the {kind} to module level"
        )
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is not value:
        raise RefusedError(f"{module}.{name} now names a different object; define it once")
    return f"{module}:{name}"


def _home_of_builtin(value: Any, name: str) -> str:
    """The module of a built-in function, some of which do not say it."""
    for module in ("torch", "torch.nn.functional", "math"):
        if getattr(sys.modules.get(module), name, None) is value:
            return module
    raise RefusedError(f"cannot store the function {name}, which has no import path")


def describe_class(reference: str) -> ModelClass:
    """What the loader will compare: package, its version, and the digest of the source."""
    module, _, name = reference.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    package = module.partition(".")[0]
    return ModelClass(
        reference=reference,
        package=package,
        version=_version(package),
        source_digest=source_digest(found),
    )


def source_digest(value: Any) -> str | None:
    """The BLAKE3 of the source text of a class or function; None where there is no source."""
    if not isinstance(value, (type, types.FunctionType)):
        return None
    try:
        return digest_of(inspect.getsource(value).encode())
    except (OSError, TypeError):
        return None  # built in, or typed at a prompt


@functools.cache
def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def is_plain_class(kind: Any) -> bool:
    """Whether objects of the class are nothing but their ``__dict__``: made by ``object.__new__``
    and copied or pickled in no way of their own."""
    return (
        kind.__new__ is object.__new__
        and kind.__reduce__ is object.__reduce__
        and kind.__reduce_ex__ is object.__reduce_ex__
        and getattr(kind, "__getstate__", None) is vars(object).get("__getstate__")
        and not hasattr(kind, "__setstate__")
    )
