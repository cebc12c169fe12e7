"""Filling a module in place: strict in keys, shapes and dtypes, ties kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ckpt.core.errors import IntegrityError
from ckpt.core.printable import escape

# What DataParallel, DDP and torch.compile put before every key.
_PREFIXES = ("module.", "_orig_mod.")


def fill_module(module: nn.Module, weights: Mapping[str, Any]) -> str:
    """Copy ``weights`` into the module's own tensors, which keeps its ties and its devices.

    One common wrapper prefix on either side is accepted; returns it, or an empty string.

    Raises:
        IntegrityError: ``keys-mismatch``, ``shape-mismatch``, ``dtype-mismatch``, ``ties-differ``;
            everything is checked before anything is changed.
    """
    targets = {
        key: value
        for key, value in module.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor)
    }
    given, prefix = _aligned(targets, weights)
    missing, extra = sorted(set(targets) - set(given)), sorted(set(given) - set(targets))
    if missing or extra:
        shown = ", ".join(
            [f"missing {key}" for key in missing] + [f"unexpected {key}" for key in extra]
        )
        raise IntegrityError(
            "keys-mismatch",
            f"missing {len(missing)}, unexpected {len(extra)}: {escape(shown)}",
            hint="give the same architecture, or pull and choose yourself",
        )
    for key, target in targets.items():
        _check_fits(key, target, given[key])
    _check_ties(targets, given)
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(given[key])
    return prefix


def _aligned(
    targets: Mapping[str, torch.Tensor], weights: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The weights under the module's keys, and the prefix that had to be added or removed."""
    given = dict(weights)
    if set(given) == set(targets):
        return given, ""
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in given) and given:
            bare = {key.removeprefix(prefix): value for key, value in given.items()}
            if set(bare) == set(targets):
                return bare, prefix
        more = {prefix + key: value for key, value in given.items()}
        if set(more) == set(targets):
            return more, prefix
    return given, ""


def _check_fits(key: str, target: torch.Tensor, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise IntegrityError("keys-mismatch", f"{escape(key)} is {type(value).__name__}, no tensor")
    if nn.parameter.is_lazy(target):
        raise IntegrityError(
            "shape-mismatch",
            f"{escape(key)} has no shape in the module yet",
            hint="run one forward first, or use load",
        )
    if value.shape != target.shape:
        raise IntegrityError(
            "shape-mismatch",
            f"{escape(key)} saved {list(value.shape)}, model {list(target.shape)}",
            hint="give the same architecture",
        )
    if value.dtype != target.dtype:
        raise IntegrityError(
            "dtype-mismatch",
            f"{escape(key)} saved {value.dtype}, model {target.dtype}; nothing is cast silently",
            hint=f"convert the model first: model.to({value.dtype})",
        )


def _check_ties(targets: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """One tensor of the module must not get two different values."""
    seen: dict[int, str] = {}
    for key, target in targets.items():
        first = seen.setdefault(id(target), key)
        if first != key and not torch.equal(given[first], given[key]):
            raise IntegrityError(
                "ties-differ",
                f"{escape(first)} and {escape(key)} are one tensor in the model and differ in what "
                "was saved",
                hint="untie them in the model",
            )
