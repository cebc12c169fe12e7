"""Names of classes and functions: ``module:qualname``, and what their source was."""

from __future__ import annotations

import ast
import functools
import io
import linecache
import os
import sys
import tokenize
import types
import unicodedata
from collections.abc import Iterable
from contextlib import suppress
from importlib.machinery import PathFinder
from typing import Any

from msgspec.structs import replace
from torch import nn

from ckpt.core.digests import digest_of
from ckpt.core.documents import ModelClass
from ckpt.loader.environment import version_of
from ckpt.loader.values import RefusedError

_GIVEN = (sys.stdlib_module_names | {"torch"}) - {"__main__"}


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
    # torch.relu calls itself torch._VariableFunctionsClass.relu
    is_method = isinstance(value, types.BuiltinFunctionType) and "." in name
    if is_method or not isinstance(module, str):
        name = value.__name__
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
    if found is not value and not _is_same_cell(module, name, found, value):
        if hasattr(value, "__wrapped__"):  # torch.compile and decorators say so
            raise RefusedError(
                f"a wrapped {module}.{name}, whose name means another object; "
                "wrap it where it is defined, or where it is called"
            )
        raise RefusedError(f"{module}.{name} now names a different object; define it once")
    if not is_reference(f"{module}:{name}"):
        raise RefusedError(f"{module}.{name} is no name that a load imports; give it another")
    return f"{module}:{name}"


def is_reference(text: str) -> bool:
    """Whether ``text`` has the form ``module:qualified.name`` of a class or function."""
    module, _, name = text.partition(":")
    return is_dotted_name(module) and is_dotted_name(name)


def is_dotted_name(text: str) -> bool:
    """Whether ``text`` is names joined by dots, in the one spelling that Python gives them, and
    none of those that it gives a meaning, such as ``__builtins__``."""
    return all(
        part.isidentifier()
        and unicodedata.is_normalized("NFKC", part)
        and (part == "__main__" or not (part.startswith("__") and part.endswith("__")))
        for part in text.split(".")
    )


def _is_same_cell(module: str, name: str, found: Any, value: Any) -> bool:
    """Whether a notebook's cell was only run again, so that the name means an equal class."""
    if module != "__main__" or type(found) is not type(value):
        return False
    digest = _cell_digest(value, name)
    return digest is not None and digest == _cell_digest(found, name)


def _home_of_builtin(value: Any, name: str) -> str:
    """The module of a built-in function, some of which do not say it."""
    for module in ("torch", "torch.nn.functional", "math"):
        if getattr(sys.modules.get(module), name, None) is value:
            return module
    raise RefusedError(f"cannot store the function {name}, which has no import path")


def describe_class(reference: str) -> ModelClass:
    """What the loader will compare: package, its version, and the digest of the source. Nothing
    is imported: what is not loaded is looked for on ``sys.path``."""
    module, _, name = reference.partition(":")
    package = module.partition(".")[0]
    return ModelClass(
        reference=reference,
        package=package,
        version=version_of(package),
        source_digest=_source_digest(module, name),
    )


def describe_classes(references: Iterable[str]) -> tuple[ModelClass, ...]:
    """The classes and functions that a state names, and the classes that these derive from."""
    bases = {reference: _bases_of(live_object(reference)) for reference in references}
    everything = {*bases, *(base for some in bases.values() for base in some)}
    return tuple(
        replace(describe_class(reference), bases=bases.get(reference, ()))
        for reference in sorted(everything)
    )


def _bases_of(kind: Any) -> tuple[str, ...]:
    """Where else the code of a class may stand: not what comes with torch or Python."""
    found = []
    for base in kind.__mro__[1:] if isinstance(kind, type) else ():
        if base.__module__.partition(".")[0] not in _GIVEN:
            with suppress(RefusedError):
                found.append(reference_of(base))
    return tuple(found)


def is_of_torch(value: Any) -> bool:
    """Whether a class or function is defined in torch."""
    return (getattr(value, "__module__", None) or "").partition(".")[0] == "torch"


def live_object(reference: str) -> Any:
    """What a reference means in this process now, or None; imports nothing."""
    module, _, name = reference.partition(":")
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _source_digest(module: str, name: str) -> str | None:
    """The BLAKE3 of the source text of a class or function; None where there is no source."""
    path = _source_file(module)
    if path is not None:
        try:
            info = os.stat(path)
            return _digests_in(path, info.st_mtime_ns, info.st_size).get(name)
        except (OSError, SyntaxError, ValueError):
            return None
    return _cell_digest(live_object(f"{module}:{name}"), name)


def _cell_digest(value: Any, name: str) -> str | None:
    """The digest of a class or function of a notebook's cell, whose text linecache keeps."""
    functions = [value] if not isinstance(value, type) else list(vars(value).values())
    for function in functions:
        code = getattr(function, "__code__", None)
        if code is not None:
            text = "".join(linecache.getlines(code.co_filename))
            try:
                return _digests_of(text).get(name)
            except SyntaxError:  # a cell may have lines that are no Python
                return None
    return None  # built in, or typed at a prompt


def _source_file(module: str) -> str | None:
    loaded = sys.modules.get(module)
    if loaded is not None:
        path = getattr(loaded, "__file__", None)
    else:
        spec, places = None, None
        parts = module.split(".")
        for count in range(1, len(parts) + 1):
            spec = PathFinder.find_spec(".".join(parts[:count]), places)
            if spec is None:
                return None
            places = spec.submodule_search_locations
        path = None if spec is None else spec.origin
    return path if isinstance(path, str) and path.endswith(".py") else None


@functools.lru_cache(maxsize=512)
def _digests_in(path: str, modified: int, size: int) -> dict[str, str]:
    """The digest of the lines of every class and function in a source file, by qualified name.
    ``modified`` and ``size`` tell one state of the file from the next."""
    with tokenize.open(path) as file:
        return _digests_of(file.read())


def _digests_of(text: str) -> dict[str, str]:
    # Not splitlines(), which also ends a line at a form feed, as ast does not.
    lines = io.StringIO(text, newline=None).readlines()
    found: dict[str, str] = {}

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                first = min([child.lineno, *(one.lineno for one in child.decorator_list)])
                block = "".join(lines[first - 1 : child.end_lineno])
                found[prefix + child.name] = digest_of(block.rstrip().encode())
                if isinstance(child, ast.ClassDef):
                    visit(child, f"{prefix}{child.name}.")
            elif not isinstance(child, ast.expr):
                visit(child, prefix)  # a class may be defined under an if or a try

    visit(ast.parse(text), "")
    return found


def would_replace(kind: type, name: str, makes: bool) -> bool:
    """Whether an attribute would stand in for a method of its class. A class that is there by
    default, such as ``norm = nn.LayerNorm``, is no method: it may give way to what ``makes``
    objects too, another class or a partial of one."""
    found = getattr(kind, name, None)
    default = makes and isinstance(found, type) and not name.startswith("__")
    return callable(found) and not default


def is_method(function: Any, owner: Any) -> bool:
    """Whether a function is what the class of ``owner`` has under its name."""
    name = getattr(function, "__name__", "")
    return isinstance(function, types.FunctionType) and getattr(type(owner), name, 0) is function


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


def container_of(kind: type[nn.Module]) -> str:
    """The name of a built-in type that a module's class derives from too, such as dict, whose items
    no dict of the module has; empty where there is none."""
    if kind.__basicsize__ == nn.Module.__basicsize__ and not kind.__itemsize__:
        return ""
    names = [
        base.__name__ for base in kind.__mro__ if base.__module__ in ("builtins", "collections")
    ]
    return next((name for name in names if name != "object"), "")


def has_slots(kind: type) -> bool:
    """Whether instances keep values where their dict has none."""
    slots = (vars(base).get("__slots__", ()) for base in kind.__mro__)
    names = {name for some in slots for name in ((some,) if isinstance(some, str) else some)}
    return not names <= {"__dict__", "__weakref__"}
