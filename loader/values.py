"""The value codec: plain Python values to JSON and back, tensors handed to the caller.

The tags are ``docs/format.md`` section 6. What has no tag is refused, all of it at once, each
with its path; nothing is pickled and nothing is called by a name from a document.
"""

from __future__ import annotations

import base64
import copy
import functools
import math
import pathlib
import re
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Mapping
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
_SMALL = 1 << 62
# Where Module.state_dict leaves the versions of the modules' layouts.
_NOTED = "_metadata"
_FACTORIES = {kind.__name__: kind for kind in (int, float, str, list, dict, set, tuple, bool)}
_PLAIN_NAN = struct.pack(">d", math.nan)
# As dtype.str gives it. numpy reads more than this, by code that is not for untrusted text.
_NUMPY_DTYPE = re.compile(r"[<>|=]?[?A-Za-z]\d*(\[\w+\])?\Z", re.ASCII)


class TensorTaker(Protocol):
    """Where an encoder leaves the tensors that it meets; returns the index of the entry."""

    def take(self, value: Any, path: Path) -> int: ...


class RefusedError(ValueError):
    """A single value cannot be stored; the reason names the way out."""


# What reading a malformed record may raise.
MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


@dataclass(slots=True)
class Encoder:
    """Encodes one state. ``order`` lists the dicts that were not filled in canonical order."""

    tensors: TensorTaker
    order: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    refusals: list[tuple[Path, str]] = field(default_factory=list)
    _dicts: int = 0
    _open: set[int] = field(default_factory=set)
    # By identity, kept alive as long as it counts: each generator, and the entry of its state.
    _generators: dict[int, tuple[torch.Generator, int]] = field(default_factory=dict)

    def encode_root(self, state: Any) -> Any:
        """The JSON form of a whole state; what cannot be stored is noted in ``refusals``."""
        try:
            return self.encode(state)
        except RecursionError:  # modules in modules: how many fit depends on the interpreter
            self.refusals.append(((), "it is nested too deeply; flatten it"))
            return None

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
        if kind in _SCALARS:
            return _SCALARS[kind](value)
        if kind in _CONTAINERS:
            self.open(value, path)
            try:
                return self._encode_container(value, kind, path)
            finally:
                self.close(value)
        if isinstance(value, (torch.Tensor, numpy.ndarray)):
            return {"$tensor": self.tensors.take(value, path)}
        if isinstance(value, numpy.generic):
            return _encode_numpy_scalar(value)
        if kind is torch.Generator:
            return {"$generator": [str(value.device), self._take_generator(value, path)]}
        return self._encode_other(value, path)

    def _take_generator(self, value: torch.Generator, path: Path) -> int:
        """The entry of its state, which no other generator has."""
        if id(value) not in self._generators:
            state = self.tensors.take(value.get_state(), (*path, "state"))
            self._generators[id(value)] = value, state
        return self._generators[id(value)][1]

    def _encode_other(self, value: Any, path: Path) -> Any:
        """What is no plain value; a module's encoder knows more of it."""
        raise RefusedError(_way_out(value))

    def open(self, value: Any, path: Path) -> None:
        """Begin to encode the items of a container; refuses cycles."""
        if id(value) in self._open:
            raise RefusedError("it contains itself; break the cycle")
        if len(path) > _DEPTH_LIMIT:
            raise RefusedError(f"it is nested deeper than {_DEPTH_LIMIT}; flatten it")
        self._open.add(id(value))

    def close(self, value: Any) -> None:
        """Its items are encoded."""
        self._open.discard(id(value))

    def _encode_container(self, value: Any, kind: type, path: Path) -> Any:
        if kind is list:
            return self._encode_items(value, path)
        if kind is tuple:
            return {"$tuple": self._encode_items(value, path)}
        if kind is dict:
            return self._encode_dict(value, path)
        if kind is OrderedDict:
            return self._encode_ordered(value, path)
        if kind is Counter:
            return {"$counter": self._encode_pairs(value, path)}
        if kind is deque:
            return {"$deque": [value.maxlen, self._encode_items(value, path)]}
        if kind is defaultdict:
            factory = self._factory(value.default_factory, path)
            return {"$defaultdict": [factory, self._encode_pairs(value, path)]}
        if kind is slice:
            parts = (value.start, value.stop, value.step)
            return {"$slice": [self._encode_alone(part, path, "slice") for part in parts]}
        items = [self._encode_alone(item, path, "set") for item in value]
        return {f"${kind.__name__}": sorted(items, key=canonical)}

    def _encode_ordered(self, value: OrderedDict[Any, Any], path: Path) -> Any:
        """An OrderedDict, and what ``Module.state_dict`` notes on it: of each module the version of
        its layout, by which ``load_state_dict`` reads an older one."""
        others = sorted(vars(value).keys() - {_NOTED})
        if others:
            raise RefusedError(f"an OrderedDict with the attribute {others[0]}; use dict(value)")
        pairs = self._encode_pairs(value, path)
        noted = vars(value).get(_NOTED)
        if noted is None:
            return {"$odict": pairs}
        if not isinstance(noted, dict):
            raise RefusedError(f"its {_NOTED} is no dict; use dict(value)")
        inner = (*path, _NOTED)
        facts = list(noted.values())
        # Of most modules it is the same. Of large arrays repr tells only a part.
        alike = all(map(_is_version, facts)) and len(set(map(repr, facts))) == 1
        encoded = self._encode_items(facts[:1] if alike else facts, inner)
        return {"$state_dict": [pairs, self._encode_items(list(noted), inner), encoded]}

    def _factory(self, factory: Any, path: Path) -> str | None:
        for name, known in _FACTORIES.items():
            if factory is known:
                return name
        if factory is not None:
            reason = "a defaultdict whose factory is not a built-in type; use dict(value)"
            self.refusals.append((path, reason))
        return None

    def _encode_items(self, items: Collection[Any], path: Path) -> list[Any]:
        if _are_themselves(items):
            return list(items)
        return [self.encode(item, (*path, str(place))) for place, item in enumerate(items)]

    def _encode_pairs(self, value: Mapping[Any, Any], path: Path) -> list[Any]:
        keyed = self._keyed(value, path)
        return [[encoded, self.encode(value[key], inner)] for encoded, inner, key in keyed]

    def _keyed(self, value: Mapping[Any, Any], path: Path) -> list[tuple[Any, Path, Any]]:
        """Each key as JSON, the path of its item, and the key itself."""
        keyed = []
        for key in value:
            encoded = self._encode_alone(key, path, "key")
            # Not str(): a set would be written in the order of its hashes.
            part = key if type(key) is str else canonical(encoded).decode()
            keyed.append((encoded, (*path, part), key))
        return keyed

    def _encode_dict(self, value: Mapping[Any, Any], path: Path) -> Any:
        number, self._dicts = self._dicts, self._dicts + 1
        keyed = self._keyed(value, path)
        places = sorted(range(len(keyed)), key=lambda place: _sort_key(keyed[place][0]))
        if places != list(range(len(keyed))):
            permutation = sorted(range(len(places)), key=places.__getitem__)
            self.order.append((number, tuple(permutation)))
        pairs = []
        for place in places:
            encoded, inner, key = keyed[place]
            pairs.append([encoded, self.encode(value[key], inner)])
        return {"$dict": pairs}

    def _encode_alone(self, value: Any, path: Path, place: str) -> Any:
        """A key, or another part that tells nothing of the order in which tensors are met."""
        if type(value) is str:
            return _encode_str(value)
        if type(value) is int and -_SMALL < value < _SMALL:
            return value
        if isinstance(self.tensors, _NoTensors):
            return self.encode(value, (*path, place))
        probe = Encoder(_NoTensors())
        encoded = probe.encode(value, (*path, place))
        self.refusals.extend((path, f"in a {place}: {reason}") for _, reason in probe.refusals)
        return encoded

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


def _are_themselves(items: Collection[Any]) -> bool:
    """Whether their JSON forms are surely the items themselves, as those of most long lists are."""
    kinds = set(map(type, items))
    if kinds == {int}:
        return bool(min(items) > -_SMALL and max(items) < _SMALL)
    return kinds == {str} and all(map(str.isascii, items))


def _is_version(fact: Any) -> bool:
    """Whether this is what torch itself notes of a module."""
    return type(fact) is dict and all(type(value) is int for value in fact.values())


def _sort_key(encoded: Any) -> bytes:
    """The canonical JSON of a key. Few texts are keys of many dicts."""
    return _canonical_text(encoded) if type(encoded) is str else canonical(encoded)


@functools.lru_cache(maxsize=1024)
def _canonical_text(text: str) -> bytes:
    return canonical(text)


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
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return {"$str": _base64(value.encode("utf-8", "surrogatepass"))}
    return value


def _encode_numpy_scalar(value: numpy.generic) -> Any:
    dtype = value.dtype
    if type(value) is not dtype.type or numpy.dtype(dtype.str) != dtype:
        raise RefusedError(_way_out(value))
    check_portable(dtype)
    # An empty text has the bytes of one character all the same.
    return {"$npscalar": [dtype.str, _base64(value.tobytes()[: dtype.itemsize])]}


def check_portable(dtype: numpy.dtype[Any]) -> None:
    """Refuse what means nothing, or something else, on another machine."""
    if dtype.hasobject:
        raise RefusedError("Python objects inside numpy; use a list")
    if dtype.char in "gG":
        raise RefusedError("a long double, which differs between machines; use float64")
    parts = [dtype[name] for name in dtype.names or ()]
    for part in parts if dtype.base is dtype else [dtype.base]:
        check_portable(part)


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


_SCALARS: dict[type, Callable[[Any], Any]] = {
    int: _encode_int,
    float: _encode_float,
    str: _encode_str,
    complex: lambda value: {"$complex": [_encode_float(value.real), _encode_float(value.imag)]},
    bytes: lambda value: {"$bytes": _base64(value)},
    bytearray: lambda value: {"$bytearray": _base64(value)},
    range: lambda value: {"$range": list(map(_encode_int, (value.start, value.stop, value.step)))},
    type(...): lambda value: {"$ellipsis": None},
    torch.Size: lambda value: {"$size": list(value)},
    torch.dtype: lambda value: {"$dtype": str(value).removeprefix("torch.")},
    torch.device: lambda value: {"$device": str(value)},
    torch.layout: lambda value: {"$layout": str(value).removeprefix("torch.")},
    torch.memory_format: lambda value: {"$memory_format": str(value).removeprefix("torch.")},
    type(pathlib.Path()): lambda value: {"$path": _encode_str(str(value))},
}
_CONTAINERS = frozenset(
    {list, tuple, dict, OrderedDict, Counter, defaultdict, deque, set, frozenset, slice}
)


def _way_out(value: Any) -> str:
    if isinstance(value, type):
        name = f"{value.__module__}.{value.__qualname__}"
        return f"cannot store the class {name}, which is code; leave it out"
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
    _generators: dict[int, torch.Generator] = field(default_factory=dict)

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
        except MALFORMED as error:
            reason = escape(str(error).partition("\n")[0])
            raise IntegrityError(
                "document-damaged", f"a value of the document cannot be read: {reason}"
            ) from None

    def _decode_tag(self, tag: str, content: Any) -> Any:
        if tag == "$tensor":
            return self.tensors(content)
        if tag == "$dict":
            return self._decode_dict(content)
        if tag == "$generator":
            return self._decode_generator(*content)
        if tag == "$deque":
            return deque(self._decode_items(content[1]), maxlen=content[0])
        if tag == "$defaultdict":
            factory = None if content[0] is None else _FACTORIES[content[0]]
            return defaultdict(factory, self._decode_pairs(content[1]))
        if tag == "$state_dict":
            return self._decode_state_dict(*content)
        if tag == "$path":
            return pathlib.Path(self.decode(content))
        if tag in _PAIR_TAGS:
            return _PAIR_TAGS[tag](self._decode_pairs(content))
        if tag in _ITEM_TAGS:
            return _ITEM_TAGS[tag](self._decode_items(content))
        made = _PLAIN_TAGS[tag](content)
        encode: Callable[[Any], Any] = _SCALARS.get(type(made), _encode_numpy_scalar)
        if encode(made) != {tag: content}:
            raise ValueError(f"{tag} is not in its canonical form")
        return made

    def _decode_generator(self, device: str, state: int) -> torch.Generator:
        """One object for each state, however often it is referred to."""
        if state not in self._generators:
            self._generators[state] = self.generator(device, self.tensors(state))
        return self._generators[state]

    def _decode_items(self, items: Any) -> list[Any]:
        if not isinstance(items, list):
            raise TypeError("a list is expected")
        return [self.decode(item) for item in items]

    def _decode_pairs(self, pairs: Any) -> dict[Any, Any]:
        decoded = dict(self._decode_items(pair) for pair in pairs)
        if len(decoded) != len(pairs):
            raise ValueError("a key appears twice")
        return decoded

    def _decode_state_dict(self, pairs: Any, modules: Any, facts: Any) -> OrderedDict[Any, Any]:
        if len(facts) != len(modules) and len(facts) != 1:
            raise ValueError("other modules than facts of them")
        made = OrderedDict(self._decode_pairs(pairs))
        names, each = self._decode_items(modules), self._decode_items(facts)
        if len(each) != len(names):
            each = [copy.deepcopy(each[0]) for _ in names]
        vars(made)[_NOTED] = OrderedDict(zip(names, each, strict=True))
        return made

    def _decode_dict(self, pairs: Any) -> dict[Any, Any]:
        number, self._dicts = self._dicts, self._dicts + 1
        decoded = self._decode_pairs(pairs)
        places = self.order.get(number)
        if places is None:
            return decoded
        if sorted(places) != list(range(len(decoded))):
            raise ValueError("the order of a dict is no permutation")
        items = list(decoded.items())
        return dict(items[place] for place in places)


def _decode_float(content: str) -> float:
    if content in ("nan", "inf", "-inf"):
        return float(content)
    (value,) = struct.unpack(">d", bytes.fromhex(content))
    return float(value)


def _torch_named(content: str, kind: type) -> Any:
    value = vars(torch)[content]
    if not isinstance(value, kind):
        raise TypeError(f"{content!r} is not a {kind.__name__} of torch")
    return value


def numpy_dtype(text: Any) -> numpy.dtype[Any]:
    """numpy's dtype of one plain element; ValueError for any other text."""
    if not isinstance(text, str) or not _NUMPY_DTYPE.match(text):
        raise ValueError("this is no dtype of numpy")
    return numpy.dtype(text)


def _decode_numpy_scalar(content: list[str]) -> Any:
    dtype, data = numpy_dtype(content[0]), base64.b64decode(content[1])
    if dtype.kind == "U":
        return numpy.str_(data.decode("utf-32-le", "surrogatepass"))
    if dtype.kind in "SV":
        return dtype.type(data)
    (value,) = numpy.frombuffer(data, dtype)
    return value


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
    "$npscalar": _decode_numpy_scalar,
}
