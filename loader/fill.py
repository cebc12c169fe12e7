"""Filling a module in place: strict in keys, shapes and dtypes, ties kept."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ckpt.core.errors import CkptWarning, IntegrityError, UsageError
from ckpt.core.printable import escape
from ckpt.loader.geometry import SharedBytes, find_shared
from ckpt.loader.outputs import is_equal
from ckpt.loader.sources import as_bits, laid_out, typed_view

# What DataParallel, DDP and torch.compile put before every key.
_PREFIXES = ("module.", "_orig_mod.")
_EXTRA = "_extra_state"  # the key of what get_extra_state gives


def check_module(module: object) -> None:
    """Refuse what is no ``nn.Module``; optimizers too have a ``load_state_dict``."""
    if not isinstance(module, nn.Module):
        raise UsageError(
            "no-module",
            f"a {type(module).__name__} is no module of torch",
            hint="fill the module; for an optimizer: optimizer.load_state_dict(repo.pull(…))",
        )


def fill_module(module: nn.Module, weights: Mapping[str, Any]) -> str:
    """Copy ``weights`` into the module's own tensors, which keeps its ties and its devices.

    One common wrapper prefix on either side is accepted; returns it, or an empty string.

    Raises:
        IntegrityError: ``keys-mismatch``, ``shape-mismatch``, ``dtype-mismatch``,
            ``not-writable``, ``ties-differ``; everything is checked before anything is changed.
    """
    own = module.state_dict(keep_vars=True)
    targets, given, prefix = _fitted(module, own, weights)
    extra_states = set(filter(_is_extra, weights))
    if extra_states != set(filter(_is_extra, own)):
        warnings.warn(
            "the extra state of the module stays as it is: what was saved has none, or another",
            CkptWarning,
            stacklevel=4,
        )
        extra_states = set()
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(given[key])
    for key in extra_states:
        module.get_submodule(key.removesuffix(_EXTRA).rstrip(".")).set_extra_state(weights[key])
    return prefix


def check_fit(module: nn.Module, weights: Mapping[str, Any]) -> None:
    """Refuse what :func:`fill_module` would refuse; nothing is changed."""
    _fitted(module, module.state_dict(keep_vars=True), weights)


def _fitted(
    module: nn.Module, own: Mapping[str, Any], weights: Mapping[str, Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], str]:
    """The tensors of a module's state, what each is to be filled from, and the wrapper's prefix."""
    targets = {
        key: value
        for key, value in own.items()
        if isinstance(value, torch.Tensor) and not _is_extra(key)
    }
    given, prefix = _aligned(
        targets, {key: value for key, value in weights.items() if not _is_extra(key)}
    )
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
    _check_own(module, targets, given)
    _check_ties(targets, given)
    _check_overlaps(targets, given)
    return targets, given, prefix


def unwrapped(name: str) -> str:
    """The name of a parameter without the prefixes of wrappers around its module."""
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _is_extra(key: str) -> bool:
    return key == _EXTRA or key.endswith(f".{_EXTRA}")


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
    reason = _not_writable(target)
    if reason:
        raise IntegrityError(
            "not-writable", f"{escape(key)} of the module {reason}", hint="or use load"
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


def _not_writable(target: torch.Tensor) -> str:
    """Why torch could not copy into a tensor, or would copy nothing; else empty."""
    if target.is_meta:
        return "is on device meta, it has no memory; call module.to_empty(device=…) first"
    sizes = zip(target.shape, target.stride(), strict=True)
    if target.layout == torch.strided and any(step == 0 and size > 1 for size, step in sizes):
        return "has elements that are one; make a new tensor of it"
    if target.is_inference() and not torch.is_inference_mode_enabled():
        return "was made in inference mode; load in that mode too"
    return ""


def _check_ties(targets: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """One tensor of the module must not get two different values."""
    seen: dict[int, str] = {}
    for key, target in targets.items():
        first = seen.setdefault(id(target), key)
        if first != key and not _is_same(given[first], given[key]):
            raise IntegrityError(
                "ties-differ",
                f"{escape(first)} and {escape(key)} are one tensor in the model and differ in what "
                "was saved",
                hint="untie them in the model",
            )


def _check_own(
    module: nn.Module, targets: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> None:
    """What state_dict() made anew is not of the module: to write there would change nothing."""
    held = _tensors_in([vars(one) for one in module.modules()])
    objects = {id(tensor) for tensor in held}
    memory = {_storage(tensor) for tensor in held} - {None}
    for key, target in targets.items():
        if id(target) in objects or _storage(target) in memory or _is_same(target, given[key]):
            continue
        raise IntegrityError(
            "not-writable",
            f"{escape(key)} is made anew by the module's state_dict(), it is no tensor of its own",
            hint="let its own code load: module.load_state_dict(repo.pull(REF))",
        )


def _tensors_in(value: Any) -> list[torch.Tensor]:
    """All tensors in plain containers, which may contain themselves."""
    found, rest, seen = [], [value], set()
    while rest:
        one = rest.pop()
        if isinstance(one, torch.Tensor):
            found.append(one)
        elif isinstance(one, (Mapping, list, tuple)) and id(one) not in seen:
            seen.add(id(one))
            rest.extend(one.values() if isinstance(one, Mapping) else one)
    return found


def _storage(tensor: torch.Tensor) -> tuple[str, int] | None:
    """The memory that a tensor lies in; None where that cannot be told."""
    if not _has_address(tensor) or not tensor.numel():
        return None
    return str(tensor.device), tensor.untyped_storage().data_ptr()


def _has_address(tensor: torch.Tensor) -> bool:
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and not nn.parameter.is_lazy(tensor)
    return plain and tensor.layout == torch.strided and not tensor.is_meta


def _has_bits(tensor: torch.Tensor) -> bool:
    """Whether its memory has its values, with nothing put off."""
    put_off = tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
    return _has_address(tensor) and not put_off


def _check_overlaps(targets: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]) -> None:
    """Tensors of the module that lie in one memory must not get values that no memory can have."""
    keys = list({id(target): key for key, target in targets.items()}.values())
    found = [targets[key] for key in keys]
    for group in find_shared([target if _has_bits(target) else None for target in found]):
        members = [keys[index] for index in group.members]
        key = _overwritten(group, {name: targets[name] for name in members}, given)
        if key:
            raise IntegrityError(
                "ties-differ",
                f"{', '.join(map(escape, members))} share memory in the model and differ in what "
                "was saved",
                hint="untie them in the model",
            )


def _overwritten(
    group: SharedBytes, members: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> str:
    """The first of ``members`` that would not have its value once all of them are written."""
    scratch = torch.zeros(group.high - group.low, dtype=torch.uint8, device="cpu")
    windows = {}
    for key, target in members.items():
        offset, size = target.data_ptr() - group.low, target.element_size()
        if offset % size:
            return key
        bits = as_bits(target)
        window = typed_view(scratch, offset, bits.dtype).as_strided(target.shape, target.stride())
        windows[key] = window.copy_(_bits_of(given[key]))
    lost = (key for key in windows if not torch.equal(windows[key], _bits_of(given[key])))
    return next(lost, "")


def _bits_of(value: torch.Tensor) -> torch.Tensor:
    return as_bits(value.cpu().contiguous())


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have the same bits, NaN among them, whatever their layouts."""
    return is_equal(laid_out("", one).values, laid_out("", other).values)
