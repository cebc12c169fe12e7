"""The page of error codes, read from the calls that make the errors."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from ckpt.core import errors

_LAYERS = ("core", "storage", "registry", "loader", "service", "training", "cli")
_KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, errors.CkptError)
}
_HEAD = """\
A failure has a code, which stays the same while its words may get better, and a kind, which gives
the exit code of the command. In Python the kinds are classes in `ckpt.core.errors`, all of them
`ckpt.CkptError`:

```python
from ckpt.core.errors import NotFoundError

try:
    best = repo.get("mlp:best")
except NotFoundError as error:
    print(error.code, error.hint)
```

Below is what is said, with what to do next; `…` stands for what is put in. The command line says
`usage` also of arguments that it cannot read, `interrupted` (130) after Ctrl-C, `terminated` (143)
after SIGTERM, and `bug` (70) of what is none of these.
"""
_NOTHING: Mapping[str, str] = MappingProxyType({})


class _Error(NamedTuple):
    kind: str
    code: str
    said: str


def error_page(note: str) -> str:
    """Every code by kind, with what is said."""
    messages: dict[str, dict[str, list[str]]] = {name: {} for name in _KINDS}
    for error in sorted(_errors(), key=lambda error: error.code):
        known = messages[error.kind].setdefault(error.code, [])
        if error.said not in known and any(map(str.isalpha, error.said)):
            known.append(error.said)
    parts = ["# Errors\n", note, _HEAD]
    for name, codes in messages.items():
        kind = _KINDS[name]
        about = (kind.__doc__ or "").partition("\n")[0]
        rows = [f"| `{code}` | {'<br>'.join(said) or '…'} |" for code, said in codes.items()]
        head = f"## {name}\n\nExit code {kind.exit_code}. {about}\n\n| code | says |\n|---|---|\n"
        parts.append(head + "\n".join(rows) + "\n")
    _check_kinds(messages)
    return "\n".join(parts)


def _check_kinds(messages: Mapping[str, Iterable[str]]) -> None:
    """A code has one kind; only names may be wrong where they are given and in a file."""
    every = Counter(code for codes in messages.values() for code in codes)
    twice = {code for code, count in every.items() if count > 1} - {"name-invalid"}
    assert not twice, f"of two kinds: {twice}"


def _errors() -> Iterator[_Error]:
    root = Path(__file__).parents[1]
    files = [file for layer in _LAYERS for file in sorted((root / layer).glob("*.py"))]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    for tree in trees:
        for call in _calls(tree, _KINDS):
            if isinstance(call.args[0], ast.Constant):
                yield _error(call)
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            private = function.name.startswith("_")
            yield from _by_callers(function, [tree] if private else trees)


def _by_callers(function: ast.FunctionDef, trees: list[ast.Module]) -> Iterator[_Error]:
    """What is raised by a function that makes the code of its first argument."""
    names = [argument.arg for argument in function.args.args]
    for made in _calls(function, _KINDS):
        used = {node.id for node in ast.walk(made.args[0]) if isinstance(node, ast.Name)}
        if not names or used != {names[0]}:
            continue
        for tree in trees:
            for call in _calls(tree, {function.name}):
                given = {name: _shape(value) for name, value in zip(names, call.args, strict=False)}
                yield _error(made, given)


def _error(call: ast.Call, given: Mapping[str, str] = _NOTHING) -> _Error:
    code, message, *_ = (_shape(part, given) for part in call.args)
    hints = [_shape(one.value, given) for one in call.keywords if one.arg == "hint"]
    said = "; ".join([message, *(hint for hint in hints if any(map(str.isalpha, hint)))])
    return _Error(_called(call), code, said)


def _calls(tree: ast.AST, names: Container[str]) -> Iterator[ast.Call]:
    return (
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and _called(node) in names
    )


def _called(call: ast.Call) -> str:
    return call.func.id if isinstance(call.func, ast.Name) else ""


def _shape(node: ast.expr, given: Mapping[str, str] = _NOTHING) -> str:
    """A text as it is written, with … for what is put into it and is not ``given``."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_shape(part, given) for part in node.values).replace("……", "…")
    if isinstance(node, ast.FormattedValue):
        return _shape(node.value, given)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return (_shape(node.left, given) + _shape(node.right, given)).replace("……", "…")
    return given.get(node.id, "…") if isinstance(node, ast.Name) else "…"
