"""The module inside wrappers that only change how it runs: DataParallel, DDP, torch.compile."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ckpt.loader.values import RefusedError

# What changes the outputs of whatever it is registered on, in words.
HOOKS = {
    "_forward_hooks": "forward hook",
    "_forward_pre_hooks": "forward pre-hook",
    "_backward_hooks": "backward hook",
    "_backward_pre_hooks": "backward pre-hook",
}
_CHILDREN: dict[type, tuple[str, str]] = {
    nn.DataParallel: ("DataParallel", "module"),
    nn.parallel.DistributedDataParallel: ("DistributedDataParallel", "module"),
}


def unwrap(module: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The module inside all wrappers, and their names, outermost first.

    Raises:
        RefusedError: a wrapper has something of its own, which would be lost.
    """
    names: list[str] = []
    while True:
        known = _wrapper_of(module)
        if known is None:
            if vars(module).get("_compiled_call_impl") is not None:
                names.append("compile-in-place")
            return module, tuple(names)
        kind, name, child = known
        _check_bare(module, kind, child)
        names.append(name)
        # torch types every child as one that may be None.
        module = module._modules[child]  # type: ignore[assignment]


def _wrapper_of(module: nn.Module) -> tuple[type, str, str] | None:
    """The class of a wrapper, its name in the record, and the name of the child in it."""
    dynamo: Any = sys.modules.get("torch._dynamo.eval_frame")  # nothing is compiled without it
    kinds = dict(_CHILDREN)
    if dynamo is not None:
        kinds[dynamo.OptimizedModule] = ("compile", "_orig_mod")
    for kind, (name, child) in kinds.items():
        if isinstance(module, kind):
            return kind, name, child
    return None


def _check_bare(module: nn.Module, kind: type, child: str) -> None:
    name = type(module).__qualname__
    own = [] if type(module) is kind else ["its code"]
    own += [f"the {word}s" for place, word in HOOKS.items() if getattr(module, place)]
    for place in ("_parameters", "_buffers", "_modules"):
        own += [str(key) for key in vars(module)[place] if key != child]
    if own:
        raise RefusedError(
            f"the wrapper {name} does more than {kind.__name__}, by {', '.join(own)}; push the "
            f"module inside it, net.{child}"
        )
