"""The user's own module against its copy: what a push loses is lost in the copy too, and only the
module itself can tell."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from ckpt.core.documents import Behaviour
from ckpt.core.errors import UsageError
from ckpt.core.printable import escape
from ckpt.loader.capture import Captured
from ckpt.loader.forward import Children, Outputs, Run
from ckpt.loader.outputs import compare, plain_difference
from ckpt.loader.replica import Spaces
from ckpt.loader.sources import MemoryTensor, as_bits
from ckpt.loader.wrappers import unwrap


def runnable(module: nn.Module, captured: Captured, behaviour: Behaviour) -> nn.Module | None:
    """The user's module inside its wrappers, where a forward leaves it as it is and gives the same
    again, and is not compiled: that changes last bits, and takes minutes. Else None."""
    moves = behaviour.changes_state or behaviour.changes_inputs
    if moves or behaviour.random or behaviour.stochastic or not behaviour.repeats:
        return None
    inner, names = unwrap(module)
    if "compile-in-place" in names or captured.wrappers.keys() - {""}:
        return None
    return inner


def check_equal(recorded: Run, found: Run, reference: Outputs, child: Callable[[], str]) -> None:
    """Refuse what the copy computes otherwise.

    Last bits may differ: the user's tensors may lie at other addresses and with other gaps than
    the copy's, for which kernels take other paths.

    Raises:
        UsageError: ``rebuild-failed``; ``child`` names the first submodule that differs.
    """
    if recorded.gave_same(found):
        return
    now = found.outputs
    names = sorted(now.keys() ^ recorded.outputs.keys())
    what = [f"{name} is on one side only" for name in names] or [
        str(one)
        for name, tensor in recorded.outputs.items()
        if not (one := compare(name, tensor, now[name], reference.get(name), across=False)).close
    ]
    what = what or list(filter(None, [plain_difference(found.plain, recorded.plain)]))
    if not what:
        return
    where = child()
    raise UsageError(
        "rebuild-failed",
        f"a rebuilt copy gives other outputs than the module: {escape(what[0])}"
        + (f"; first differing child: {escape(where)}" if where else ""),
        hint="attributes are stored by their values, not in their order, nor what __getstate__ or "
        "drop leave out; without inputs it is pushed as it is",
    )


def first_difference(recorded: Children, found: Children) -> str:
    """The path of the first submodule whose output is another one, or empty."""
    before = {path: digest for path, digest, _ in recorded}
    return next((path for path, now, _ in found if before.get(path, now) != now), "")


@contextmanager
def kept(module: nn.Module, captured: Captured, spaces: Spaces) -> Iterator[None]:
    """Put back what a forward changes of a module, though its copy's forward changed nothing."""
    attributes = [(place, dict(place)) for place in _places(module)]
    sources = {
        index: (source.values, source.values._version)
        for index, source in enumerate(captured.sources)
        if isinstance(source, MemoryTensor) and not source.values.is_inference()
    }
    try:
        yield
    finally:
        for place, before in attributes:
            if not _is_same(place, before):
                place.clear()
                place.update(before)
        for index, (values, version) in sources.items():
            if values._version != version and index in spaces:
                as_bits(values).copy_(as_bits(spaces[index].tensor))


def _places(module: nn.Module) -> Iterator[dict[Any, Any]]:
    """The dict of every module, and the dicts in it."""
    for one in module.modules():
        yield vars(one)
        yield from (value for value in vars(one).values() if type(value) in (dict, OrderedDict))


def _is_same(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    return len(now) == len(before) and all(
        key == other and value is was
        for (key, value), (other, was) in zip(now.items(), before.items(), strict=True)
    )
