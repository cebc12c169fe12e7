"""What a forward gave, as named tensors, and how two such results compare."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
import torch

from ckpt.loader.sources import as_bits

_DEPTH_LIMIT = 20
# rtol and atol of torch.testing.assert_close, atol as a share of the largest value, and the share
# of it that another kind of device may differ by (module-rebuild, section 3).
_TOLERANCES = {
    torch.float64: (1e-7, 1e-7, 1e-6),
    torch.float32: (1.3e-6, 1e-5, 1e-4),
    torch.float16: (1e-3, 1e-3, 1e-2),
    torch.bfloat16: (1.6e-2, 1e-2, 3e-2),
}
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32}
_REAL[torch.complex32] = torch.float16
# How far an error may exceed the recorded one against the reference; more where there are too few
# values for a root mean square to mean much, and between devices.
_TIMES, _TIMES_FEW, _FEW = 4.0, 10.0, 10


@dataclass(frozen=True, slots=True)
class Comparison:
    """One output against the recorded one.

    Attributes:
        name: where it stands, such as ``output.logits``.
        equal: same dtype, shape and bytes.
        close: within ``allowed``; true when equal.
        largest: the largest absolute difference.
        error: root mean square of the difference to the double-precision reference, or to the
            recorded output where there is no reference.
        allowed: what ``error``, or with ``by_table`` ``largest``, may be.
        mismatches: of whole numbers, the share of those that differ.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    equal: bool
    close: bool
    largest: float = 0.0
    error: float = 0.0
    allowed: float = 0.0
    mismatches: float = 0.0

    def __str__(self) -> str:
        if self.equal:
            return f"{self.name}: equal"
        if self.mismatches:
            return f"{self.name}: {self.mismatches:.2%} of its values differ"
        verb = "differs by" if self.close else "is off by"
        return f"{self.name}: {verb} {self.largest:.1e} at most, rms {self.error:.1e}, allowed {self.allowed:.1e}"


def named_tensors(value: Any) -> dict[str, torch.Tensor]:
    """Every tensor, array and number in a forward's result, by where it stands; copies."""
    found: dict[str, torch.Tensor] = {}
    _collect(value, "output", found, set())
    return found


def _collect(value: Any, name: str, found: dict[str, torch.Tensor], above: set[int]) -> None:
    if isinstance(value, torch.Tensor):
        plain = value.detach() if value.layout == torch.strided else value.detach().to_dense()
        found[_free_name(name, found)] = plain.clone(memory_format=torch.contiguous_format)
    elif isinstance(value, (numpy.ndarray, numpy.generic, bool, int, float, complex)):
        found[_free_name(name, found)] = torch.tensor(value, device="cpu")
    elif id(value) in above or len(above) > _DEPTH_LIMIT:
        return
    else:
        for key, item in _items(value):
            _collect(item, f"{name}.{key}", found, above | {id(value)})


def _free_name(name: str, found: Mapping[str, torch.Tensor]) -> str:
    """``name``, or another where keys read alike, such as 1 and "1"."""
    names = itertools.chain([name], (f"{name}#{count}" for count in itertools.count(2)))
    return next(one for one in names if one not in found)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (list, tuple)):
        return list(enumerate(value))
    if isinstance(value, (type, torch.nn.Module)):
        return []
    return sorted(vars(value).items()) if hasattr(value, "__dict__") else []


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same dtype, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bits(one.cpu().contiguous()), as_bits(other.cpu().contiguous()))


def all_equal(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Whether two results have the same names and bytes."""
    return some.keys() == others.keys() and all(is_equal(some[key], others[key]) for key in some)


def compare(
    name: str,
    recorded: torch.Tensor,
    found: torch.Tensor,
    reference: torch.Tensor | None,
    *,
    across: bool,
) -> Comparison:
    """Compare an output with the recorded one: by bytes, else by what noise may do.

    Args:
        reference: the output in double precision, if there is one.
        across: whether the two were computed on different kinds of devices.
    """
    dtype, shape = str(found.dtype).removeprefix("torch."), tuple(found.shape)
    if is_equal(recorded, found):
        return Comparison(name, dtype, shape, True, True)
    if recorded.dtype != found.dtype or recorded.shape != found.shape:
        return Comparison(name, dtype, shape, False, False, math.inf, math.inf)
    kind = _REAL.get(recorded.dtype, recorded.dtype)
    old, new = _wide(recorded), _wide(found)
    largest = _largest(new - old)
    if kind not in _TOLERANCES:
        share = (old != new).double().mean().item()
        return Comparison(name, dtype, shape, False, False, largest, mismatches=share)
    if not torch.equal(_special(old), _special(new)):
        return Comparison(name, dtype, shape, False, False, math.inf, math.inf)
    relative, absolute, far = _TOLERANCES[kind]
    scale = _largest(old)
    allowed = (far if across else absolute) * scale
    error = _rms(new - old)
    beyond = (new - old).abs() - (0 if across else relative) * old.abs()
    close = bool((beyond[beyond.isfinite()] <= allowed).all())
    if reference is not None and not close:
        wide = _wide(reference)
        many = 10.0 if across else _TIMES_FEW if old.numel() <= _FEW else _TIMES
        tiny = torch.finfo(kind).eps * _largest(wide)
        error, allowed = _rms(new - wide), many * _rms(old - wide) + tiny
        close = error <= allowed
    return Comparison(name, dtype, shape, False, close, largest, error, allowed)


def is_plausible(recorded: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether a double-precision output is the same computation and not, after a branch that
    went another way, a different one."""
    kind = _REAL.get(recorded.dtype, recorded.dtype)
    if recorded.shape != reference.shape or kind not in _TOLERANCES:
        return False
    wide = _wide(reference)
    return _rms(_wide(recorded) - wide) <= 10 * _TOLERANCES[kind][2] * _largest(wide)


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In double precision on the CPU, complex numbers as pairs."""
    tensor = tensor.detach().cpu()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex128))
    return tensor.double()


def _special(tensor: torch.Tensor) -> torch.Tensor:
    """Where a tensor is not finite, and how."""
    zero = torch.zeros((), dtype=tensor.dtype, device="cpu")
    return tensor.where(~tensor.isfinite(), zero).nan_to_num(nan=2, posinf=1, neginf=-1)


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _rms(tensor: torch.Tensor) -> float:
    finite = tensor[tensor.isfinite()]
    return float(finite.square().mean().sqrt()) if finite.numel() else 0.0


def root_mean_square(tensor: torch.Tensor) -> float:
    """Of a tensor's values in double precision; -1 where that is no finite number."""
    value = _rms(_wide(tensor))
    return value if math.isfinite(value) else -1.0
