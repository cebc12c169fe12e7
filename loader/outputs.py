"""What a forward gave, as named tensors and plain values, and how two such results compare."""

from __future__ import annotations

import itertools
import math
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy
import torch

from ckpt.core.printable import escape
from ckpt.loader.sources import as_bits, from_array

_DEPTH_LIMIT = 20
_NUMBERS = (bool, int, float, complex)
_LARGE = 1 << 63  # a whole number from here on is no tensor
# What says how a result was made rather than what it is; not compared.
_EMPTY: tuple[type, ...] = (
    type,
    torch.dtype,
    torch.device,
    torch.layout,
    type(...),
)
_EMPTY += (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
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
# Values larger than this many times the middle one, such as logits that a mask set to -1e9, say
# nothing of how large an error of the others may be.
_HUGE = 1e4


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


@dataclass(slots=True)
class Results:
    """A forward's result: every tensor, array and number by where it stands, copied; every text,
    bytes and None, as they are; and where something stands that nobody can look into, with what
    it is."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    plain: dict[str, Any] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def collect(
        self, value: Any, name: str = "output", above: frozenset[int] = frozenset()
    ) -> None:
        """Add all that is in ``value``."""
        if isinstance(value, (numpy.ndarray, numpy.generic)) and value.dtype.hasobject:
            value = value.tolist()
        if isinstance(value, torch.Tensor):
            plain = _strided(value)
            if plain is None:
                self._skip(value, name)
            else:
                self._add(plain.clone(memory_format=torch.contiguous_format), name)
        elif isinstance(value, (numpy.ndarray, numpy.generic)):
            if value.dtype.char in "gG":  # with bytes that mean nothing
                self._skip(value, name)
            else:
                self._add(from_array(numpy.array(value)), name)
        elif isinstance(value, _NUMBERS) and not _is_large(value):
            self._add(torch.tensor(value, device="cpu"), name)
        elif isinstance(value, (type(None), str, bytes, int)):
            self.plain[_free_name(name, self.plain)] = _bare(value)
        elif not isinstance(value, _EMPTY) and id(value) not in above:
            items = None if len(above) > _DEPTH_LIMIT else _items(value)
            if items is None:
                self._skip(value, name)
            for key, item in items or ():
                self.collect(item, f"{name}.{key}", above | {id(value)})

    def _add(self, tensor: torch.Tensor, name: str) -> None:
        self.tensors[_free_name(name, self.tensors)] = tensor

    def _skip(self, value: Any, name: str) -> None:
        self.skipped.append(f"{name} (a {type(value).__qualname__})")


def _strided(value: torch.Tensor) -> torch.Tensor | None:
    """All values of a tensor in a plain one; None where it has none, or its class alone knows
    them."""
    kind: Any = type(value)
    own = kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if own or value.is_nested or value.is_meta:
        return None
    plain = value.detach().as_subclass(torch.Tensor)
    if plain.is_quantized:
        return plain.dequantize()
    return plain if plain.layout == torch.strided else plain.to_dense()


def _is_large(value: Any) -> bool:
    return isinstance(value, int) and not -_LARGE <= value < _LARGE


def _bare(value: Any) -> Any:
    """A plain value without the class that somebody derived from its type."""
    if isinstance(value, str):
        return str.__str__(value)
    return bytes(value) if isinstance(value, bytes) else value if value is None else int(value)


def named_tensors(value: Any) -> dict[str, torch.Tensor]:
    """Every tensor, array and number in a forward's result, by where it stands; copies."""
    results = Results()
    results.collect(value)
    return results.tensors


def _free_name(name: str, found: Mapping[str, Any]) -> str:
    """``name``, or another where keys read alike, such as 1 and "1"."""
    names = itertools.chain([name], (f"{name}#{count}" for count in itertools.count(2)))
    return next(one for one in names if one not in found)


def _items(value: Any) -> list[tuple[Any, Any]] | None:
    """What is in a value, in an order that the next run has too; None where that cannot be told."""
    if isinstance(value, Mapping):
        return list(value.items())
    if isinstance(value, (Sequence, deque)):
        return list(enumerate(value))
    if isinstance(value, AbstractSet):
        plain = all(isinstance(item, (*_NUMBERS, str, bytes, type(None))) for item in value)
        return list(enumerate(sorted(value, key=repr))) if plain else None
    if isinstance(value, torch.nn.Module):
        return None
    slots = dict(_slots_of(value))
    if not slots and not hasattr(value, "__dict__"):
        return None
    return sorted({**slots, **getattr(value, "__dict__", {})}.items())


def _slots_of(value: Any) -> Iterator[tuple[str, Any]]:
    for base in (one for one in type(value).__mro__ if "__slots__" in vars(one)):
        for name, member in vars(base).items():
            if isinstance(member, types.MemberDescriptorType) and hasattr(value, name):
                yield name, getattr(value, name)


def is_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Same dtype, shape and bytes."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(as_bits(one.cpu().contiguous()), as_bits(other.cpu().contiguous()))


def all_equal(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    """Whether two results have the same names and bytes."""
    return some.keys() == others.keys() and all(is_equal(some[key], others[key]) for key in some)


def plain_difference(recorded: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """The first plain value that is of another type or value, in words; empty where none is."""
    for name in sorted(recorded.keys() | found.keys()):
        if name not in recorded or name not in found:
            return f"{name} is on one side only"
        was, now = recorded[name], found[name]
        if type(was) is not type(now) or was != now:
            return f"{name}: {escape(repr(now), 80)} and not {escape(repr(was), 80)}"
    return ""


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
    if kind not in _TOLERANCES:
        share = (old != new).double().mean().item()
        return Comparison(name, dtype, shape, False, False, _largest(new - old), mismatches=share)
    if not torch.equal(_special(old), _special(new)):
        return Comparison(name, dtype, shape, False, False, math.inf, math.inf)
    wide = None if reference is None else _wide(reference)
    close, error, allowed = _within_noise(kind, old, new, wide, across=across)
    return Comparison(name, dtype, shape, False, close, _largest(new - old), error, allowed)


def _within_noise(
    kind: torch.dtype,
    old: torch.Tensor,
    new: torch.Tensor,
    wide: torch.Tensor | None,
    *,
    across: bool,
) -> tuple[bool, float, float]:
    """Whether values differ by no more than noise may do, the error, and what it may be."""
    relative, absolute, far = _TOLERANCES[kind]
    share = far if across else absolute
    ordinary, huge = _by_size(old)
    differences = (new - old).abs()
    allowed = share * _largest(old[ordinary])
    error = _rms((new - old)[ordinary])
    beyond = differences - (0 if across else relative) * old.abs()
    fine = bool((differences[huge] <= share * old[huge].abs()).all())
    close = fine and bool((beyond[ordinary] <= allowed).all())
    if wide is not None and not close:
        many = 10.0 if across else _TIMES_FEW if old.numel() <= _FEW else _TIMES
        tiny = torch.finfo(kind).eps * _largest(wide[ordinary])
        error = _rms((new - wide)[ordinary])
        allowed = many * _rms((old - wide)[ordinary]) + tiny
        close = fine and error <= allowed
    return close, error, allowed


def _by_size(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the values of one size are, and where the huge ones, each of which is judged by its own
    size. Equal values count once: a mask may set most of them."""
    sizes = tensor.abs()
    finite = sizes.isfinite()
    distinct = torch.unique(sizes[finite & (sizes > 0)])
    if not distinct.numel():
        return finite, torch.zeros_like(finite)
    within = sizes <= _HUGE * distinct[distinct.numel() // 2]
    return finite & within, finite & ~within


def is_plausible(recorded: torch.Tensor, reference: torch.Tensor) -> bool:
    """Whether a double-precision output is the same computation and not, after a branch that
    went another way, a different one."""
    kind = _REAL.get(recorded.dtype, recorded.dtype)
    if recorded.shape != reference.shape or kind not in _TOLERANCES:
        return False
    old, wide = _wide(recorded), _wide(reference)
    ordinary, _ = _by_size(old)
    old, wide = old[ordinary], wide[ordinary]
    return _rms(old - wide) <= 10 * _TOLERANCES[kind][2] * _largest(wide)


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
