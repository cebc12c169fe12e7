"""The value codec: plain Python values to JSON and back, tensors handed to the caller.

The tags are ``docs/format.md`` section 6. What has no tag is refused, all of it at once, each
with its path; nothing is pickled and nothing is called by a name from a document.
"""

from __future__ import annotations

import base64
import math
import pathlib
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy
import torch

from ckpt.core.documents import canonical
from ckpt.core.errors import IntegrityError, UsageError
from ckpt.core.printable import escape

Path = tuple[str, ...]

_DEPTH_LIMIT = 100
_INTEGER_BITS = 8192
_FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set, tuple, bool)}
_PLAIN_NAN = struct.pack(">d", math.nan)
_MALFORMED = (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError)


class TensorTaker(Protocol):
    """Where an encoder leaves the tensors that it meets; returns the index of the entry."""

    def take(self, value: Any, path: Path) -> int: ...


class RefusedError(Exception):
    """A single value cannot be stored; the reason names the way out."""


@dataclass(slots=True)
class Encoder:
    """Encodes one state. ``order`` lists the dicts that were not filled in canonical order."""

    tensors: TensorTaker
    order: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    refusals: list[tuple[Path, str]] = field(default_factory=list)
    _dicts: int = 0
    _open: set[int] = field(default_factory=set)

    def encode(self, value: Any, path: Path = ()) -> Any:
        """The JSON form of ``value``; what cannot be stored is noted in ``refusals``."""
        try:
            return self._encode(value, path)
        except RefusedError as refused:
            self.refusals.append((path, str(refused)))
            return None

    def _encode(self, value: Any, path: Path) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if isinstance(value, (torch.Tensor, numpy.ndarray)):
            return {"$tensor": self.tensors.take(value, path)}
        if kind in _SCALARS:
            return _SCALARS[kind](value)
        if isinstance(value, numpy.generic):
            return _encode_numpy_scalar(value)
        if isinstance(value, pathlib.PurePath):
            return {"$path": str(value)}
        if kind is torch.Generator:
            state = self.tensors.take(value.get_state(), (*path, "state"))
            return {"$generator": [str(value.device), state]}
        if kind in _CONTAINERS:
            with self.opened(value, path):
                return self._encode_container(value, kind, path)
        return self._encode_other(value, path)

    def _encode_other(self, value: Any, path: Path) -> Any:
        """What is no plain value; a module's encoder knows more of it."""
        raise RefusedError(_way_out(value))

    @contextmanager
    def opened(self, value: Any, path: Path) -> Iterator[None]:
        """The time in which the items of a container are encoded; refuses cycles."""
        if id(value) in self._open:
            raise RefusedError("it contains itself; break the cycle")
        if len(path) > _DEPTH_LIMIT:
            raise RefusedError(f"it is nested deeper than {_DEPTH_LIMIT}; flatten it")
        self._open.add(id(value))
        try:
            yield
        finally:
            self._open.discard(id(value))

    def _encode_container(self, value: Any, kind: type, path: Path) -> Any:
        if kind is list:
            return self._encode_items(value, path)
        if kind is tuple:
            return {"$tuple": self._encode_items(value, path)}
        if kind is dict:
            return self._encode_dict(value, path)
        if kind is OrderedDict:
            return {"$odict": self._encode_pairs(value, path)}
        if kind is Counter:
            return {"$counter": self._encode_pairs(value, path)}
        if kind is deque:
            return {"$deque": [value.maxlen, self._encode_items(value, path)]}
        if kind is defaultdict:
            return {"$defaultdict": [_factory(value), self._encode_pairs(value, path)]}
        return {f"${kind.__name__}": self._encode_set(value, path)}

    def _encode_items(self, items: Iterable[Any], path: Path) -> list[Any]:
        return [self.encode(item, (*path, str(place))) for place, item in enumerate(items)]

    def _encode_pairs(self, value: Mapping[Any, Any], path: Path) -> list[Any]:
        return [
            [self._encode_key(key, path), self.encode(item, (*path, str(key)))]
            for key, item in value.items()
        ]

    def _encode_dict(self, value: Mapping[Any, Any], path: Path) -> Any:
        number, self._dicts = self._dicts, self._dicts + 1
        keyed = [(self._encode_key(key, path), key) for key in value]
        places = sorted(range(len(keyed)), key=lambda place: canonical(keyed[place][0]))
        if places != list(range(len(keyed))):
            permutation = sorted(range(len(places)), key=places.__getitem__)
            self.order.append((number, tuple(permutation)))
        pairs = []
        for place in places:
            encoded, key = keyed[place]
            pairs.append([encoded, self.encode(value[key], (*path, str(key)))])
        return {"$dict": pairs}

    def _encode_key(self, key: Any, path: Path) -> Any:
        """A key, which tells nothing of the order in which tensors are met."""
        probe = Encoder(_NoTensors())
        encoded = probe.encode(key, path)
        self.refusals.extend((path, f"a key: {reason}") for _, reason in probe.refusals)
        return encoded

    def _encode_set(self, value: Iterable[Any], path: Path) -> list[Any]:
        return sorted((self._encode_key(item, path) for item in value), key=canonical)

    def raise_refusals(self) -> None:
        """Raise one error that names everything that cannot be stored.

        Raises:
            UsageError: ``cannot-store``.
        """
        if not self.refusals:
            return
        count = len(self.refusals)
        listed = "; ".join(
            f"{escape('.'.join(path)) or '<root>'}: {escape(reason)}"
            for path, reason in self.refusals
        )
        noun = "1 value" if count == 1 else f"{count} values"
        raise UsageError("cannot-store", f"{noun} cannot be stored: {listed}")


class _NoTensors:
    def take(self, value: Any, path: Path) -> int:
        raise RefusedError("a tensor cannot stand here; use it as a value of a dict or list")


def _encode_int(value: int) -> int:
    if value.bit_length() > _INTEGER_BITS:
        raise RefusedError(f"a whole number of {value.bit_length()} bits; store it as bytes")
    return value


def _encode_float(value: float) -> Any:
    if math.isfinite(value):
        return value
    if math.isinf(value):
        return {"$float": "inf" if value > 0 else "-inf"}
    bits = struct.pack(">d", value)
    return {"$float": "nan" if bits == _PLAIN_NAN else bits.hex()}


def _encode_str(value: str) -> Any:
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"$str": _base64(value.encode("utf-8", "surrogatepass"))}
    return value


def _encode_numpy_scalar(value: numpy.generic) -> Any:
    if value.dtype.hasobject or value.dtype.names is not None:
        raise RefusedError(f"a numpy scalar of dtype {value.dtype}; use a plain value")
    return {"$npscalar": [value.dtype.str, _base64(value.tobytes())]}


def _encode_slice(value: slice) -> Any:
    parts = Encoder(_NoTensors())
    encoded = [parts.encode(part) for part in (value.start, value.stop, value.step)]
    if parts.refusals:
        raise RefusedError("a slice of other things than plain values")
    return {"$slice": encoded}


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _factory(value: defaultdict[Any, Any]) -> str | None:
    factory = value.default_factory
    if factory is None:
        return None
    for name, known in _FACTORIES.items():
        if factory is known:
            return name
    raise RefusedError("a defaultdict whose factory is not a built-in type; use dict(value)")


_SCALARS: dict[type, Callable[[Any], Any]] = {
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    complex: lambda value: {"$complex": [_encode_float(value.real), _encode_float(value.imag)]},
    bytes: lambda value: {"$bytes": _base64(value)},
    bytearray: lambda value: {"$bytearray": _base64(value)},
    slice: _encode_slice,
    range: lambda value: {"$range": [value.start, value.stop, value.step]},
    type(...): lambda value: {"$ellipsis": None},
    torch.Size: lambda value: {"$size": list(value)},
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"$device": str(value)},
    torch.layout: lambda value: {"$layout": str(value).removeprefix("torch.")},
    torch.memory_format: lambda value: {"$memory_format": str(value).removeprefix("torch.")},
}
_CONTAINERS = frozenset(
    {list, tuple, dict, OrderedDict, Counter, defaultdict, deque, set, frozenset}
)


def _way_out(value: Any) -> str:
    name = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if isinstance(value, torch.nn.Module) or hasattr(value, "state_dict"):
        return f"cannot store {name}; use its state_dict()"
    if callable(value):
        return f"cannot store {name}, which is code; leave it out"
    if isinstance(value, (dict, list, tuple, set, str, int, float)):
        base = next(kind for kind in type(value).__mro__ if kind.__module__ == "builtins")
        return f"cannot store {name}; convert it to a plain {base.__name__}"
    return f"cannot store {name}; use plain values and tensors, or leave it out"


@dataclass(slots=True)
class Decoder:
    """Decodes one root; ``tensors[i]`` is what ``{"$tensor": i}`` stands for."""

    tensors: Callable[[int], Any]
    order: Mapping[int, tuple[int, ...]]
    generator: Callable[[str, Any], torch.Generator]
    _dicts: int = 0

    def decode(self, value: Any) -> Any:
        """The Python value of a JSON value.

        Raises:
            IntegrityError: ``document-damaged`` for an unknown or malformed tag.
        """
        if isinstance(value, list):
            return [self.decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        try:
            ((tag, content),) = value.items()
            return self._decode_tag(tag, content)
        except _MALFORMED as error:
            raise IntegrityError(
                "document-damaged", f"a value of the document cannot be read: {error}"
            ) from None

    def _decode_tag(self, tag: str, content: Any) -> Any:
        if tag == "$tensor":
            return self.tensors(content)
        if tag == "$dict":
            return dict(self._decode_dict(content))
        if tag == "$generator":
            return self.generator(content[0], self.tensors(content[1]))
        if tag == "$deque":
            return deque(self.decode(content[1]), maxlen=content[0])
        if tag == "$defaultdict":
            factory = None if content[0] is None else _FACTORIES[content[0]]
            return defaultdict(factory, self._decode_pairs(content[1]))
        if tag in _PAIR_TAGS:
            return _PAIR_TAGS[tag](dict(self._decode_pairs(content)))
        if tag in _ITEM_TAGS:
            return _ITEM_TAGS[tag](self.decode(content))
        return _PLAIN_TAGS[tag](content)

    def _decode_pairs(self, pairs: Any) -> Iterator[tuple[Any, Any]]:
        return ((self.decode(key), self.decode(item)) for key, item in pairs)

    def _decode_dict(self, pairs: Any) -> list[tuple[Any, Any]]:
        number, self._dicts = self._dicts, self._dicts + 1
        decoded = list(self._decode_pairs(pairs))
        places = self.order.get(number)
        if places is None:
            return decoded
        if sorted(places) != list(range(len(decoded))):
            raise ValueError("the order of a dict is no permutation")
        return [decoded[place] for place in places]


def _decode_float(content: str) -> float:
    if content in ("nan", "inf", "-inf"):
        return float(content)
    (value,) = struct.unpack(">d", bytes.fromhex(content))
    return float(value)


def _torch_named(content: str, kind: type) -> Any:
    value = getattr(torch, content)
    if not isinstance(value, kind):
        raise TypeError(f"{content!r} is not a {kind.__name__} of torch")
    return value


def _decode_numpy_scalar(content: list[str]) -> Any:
    dtype = numpy.dtype(content[0])
    if dtype.hasobject:
        raise TypeError("a numpy scalar of objects")
    return numpy.frombuffer(base64.b64decode(content[1]), dtype)[0]


_PAIR_TAGS: dict[str, Callable[[Any], Any]] = {"$odict": OrderedDict, "$counter": Counter}
_ITEM_TAGS: dict[str, Callable[[Any], Any]] = {
    "$tuple": tuple,
    "$set": set,
    "$frozenset": frozenset,
    "$slice": lambda parts: slice(*parts),
    "$complex": lambda parts: complex(*parts),
}
_PLAIN_TAGS: dict[str, Callable[[Any], Any]] = {
    "$float": _decode_float,
    "$str": lambda content: base64.b64decode(content).decode("utf-8", "surrogatepass"),
    "$bytes": base64.b64decode,
    "$bytearray": lambda content: bytearray(base64.b64decode(content)),
    "$range": lambda content: range(*content),
    "$ellipsis": lambda content: ...,
    "$size": torch.Size,
    "$dtype": lambda content: _torch_named(content, torch.dtype),
    "$device": torch.device,
    "$layout": lambda content: _torch_named(content, torch.layout),
    "$memory_format": lambda content: _torch_named(content, torch.memory_format),
    "$path": pathlib.Path,
    "$npscalar": _decode_numpy_scalar,
}
