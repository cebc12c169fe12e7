"""The strict reader of safetensors headers: bytes from anywhere in, checked entries out."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from operator import attrgetter, itemgetter
from typing import Any, NoReturn

from ckpt.core.dtypes import CODES, ITEM_SIZES
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import escape, is_printable

HEADER_LIMIT = 16 << 20  # largest accepted declared header length

_LENGTH_BYTES = 8
_DEPTH_LIMIT = 4
_RANK_LIMIT = 64
_TENSOR_LIMIT = 1_000_000
_SIZE_LIMIT = (1 << 63) - 1  # what a signed 64-bit count of elements or bytes can hold
_NUMBER_LIMIT = 100  # characters; converting longer ones costs more than linear time
_SHOWN = 200  # characters of a name in a message
_FIELDS = {"dtype", "shape", "data_offsets"}

_PICKLE_OR_ZIP = re.compile(rb"\x80[\x02-\x05]|PK\x03\x04")
_FIRST_CHARACTERS = {"[": "array", '"': "string", "t": "boolean", "f": "boolean", "n": "null"}
_FIRST_CHARACTERS |= dict.fromkeys("-0123456789", "number")
_KINDS: dict[type, str] = {dict: "an object", list: "an array", str: "a string"}
_KINDS |= {bool: "a boolean", int: "a number", float: "a number", type(None): "null"}
_OBJECT, _ARRAY = b"{["
# A run of brackets and what stands before it, strings included. Possessive, so that megabytes of
# strings or of escapes leave no backtracking stack. A string without its closing quote reaches to
# the end: that it is no JSON is for the parser to say.
_BRACKETS = re.compile(
    rb'[^"\[\]{}]*+(?:"[^"\\]*+(?:\\.[^"\\]*+)*+"?[^"\[\]{}]*+)*+([\[\]{}]*+)', re.DOTALL
)
_SURROGATE = re.compile("[\ud800-\udfff]")

_SAVE_AGAIN = "save the file again with a current safetensors library"
_FETCH_AGAIN = "fetch the file again"


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file; ``start`` and ``end`` count from the first byte of the data."""

    name: str
    code: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> str:
        """Torch's name of the element type."""
        return CODES[self.code]

    @property
    def nbytes(self) -> int:
        """The bytes that the tensor takes in the file."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: entries in the order of their data, and where the data begins."""

    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    data_start: int


def header_length(first: bytes, file_size: int) -> int:
    """The length of the header that a file declares in its ``first`` eight bytes.

    Raises:
        IntegrityError: ``header-short``, ``not-safetensors``, ``header-too-large``, ``truncated``.
    """
    if len(first) < _LENGTH_BYTES:
        _refuse(
            "header-short",
            f"the file has {len(first)} bytes, needs at least {_LENGTH_BYTES}",
            _FETCH_AGAIN,
        )
    length = int.from_bytes(first[:_LENGTH_BYTES], "little")
    if length > HEADER_LIMIT:
        # Only here: 0x80 0x04 is also how a good header of 1,152 bytes begins.
        if _PICKLE_OR_ZIP.match(first):
            _refuse(
                "not-safetensors",
                "the file begins like a pickle or a zip, not like a safetensors file",
                "save its tensors as safetensors where you trust it",
            )
        _refuse(
            "header-too-large",
            f"the header declares {length}, limit {HEADER_LIMIT}",
            "check that it is a safetensors file, or split it into smaller ones",
        )
    present = file_size - _LENGTH_BYTES
    if length > present:
        needed = length + _LENGTH_BYTES
        _refuse(
            "truncated", f"the header needs {needed} bytes, the file has {file_size}", _FETCH_AGAIN
        )
    return length


def parse_header(text: bytes, file_size: int) -> Header:
    """The checked header of a file of ``file_size`` bytes; ``text`` is all of its header bytes.

    Raises:
        IntegrityError: the first thing that is wrong; ``code`` is one of rows 4 to 22 of the table
            of bad inputs, or ``header-json``.
    """
    header_length(len(text).to_bytes(_LENGTH_BYTES, "little"), file_size)
    _check_brackets(text)
    document = _load(text)
    metadata = _metadata(document.pop("__metadata__", {}))
    entries = sorted(
        (_entry(name, fields) for name, fields in document.items()), key=attrgetter("start", "end")
    )
    data_start = _LENGTH_BYTES + len(text)
    _check_layout(entries, file_size - data_start)
    return Header(tuple(entries), metadata, data_start)


def takes_shape(code: str, shape: Sequence[int]) -> bool:
    """Whether this reader takes an entry of that dtype with that shape."""
    nbytes = prod(size for size in shape if size) * ITEM_SIZES[CODES[code]]
    return len(shape) <= _RANK_LIMIT and nbytes <= _SIZE_LIMIT


def _refuse(code: str, message: str, hint: str = _SAVE_AGAIN) -> NoReturn:
    raise IntegrityError(code, message, hint=hint) from None


def _quote(text: str) -> str:
    # Cut before it is escaped too: a name may have millions of characters.
    return f'"{escape(text[:_SHOWN], _SHOWN - 1)}"'


def _check_brackets(text: bytes) -> None:
    """Refuse what would cost the JSON parser its stack or its memory, before it runs."""
    depth = objects = arrays = 0
    for bracket in chain.from_iterable(map(itemgetter(1), _BRACKETS.finditer(text))):
        if bracket == _OBJECT:
            depth += 1
            objects += 1
        elif bracket == _ARRAY:
            depth += 1
            arrays += 1
        else:
            depth -= 1
            continue
        if depth > _DEPTH_LIMIT:
            _refuse("header-depth", f"the header is nested more than {_DEPTH_LIMIT} deep")
        # A tensor has one object and two arrays; the header and __metadata__ are objects too.
        if objects > _TENSOR_LIMIT + 2 or arrays > 2 * _TENSOR_LIMIT:
            _refuse("tensor-limit", f"the number of tensors is > {_TENSOR_LIMIT}", "split the file")


def _load(text: bytes) -> dict[str, Any]:
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse("header-encoding", f"the header is not UTF-8: invalid byte at offset {error.start}")
    if not decoded.startswith("{"):
        first = decoded[:1]
        if first in _FIRST_CHARACTERS:
            _refuse("header-type", f"expected object, got {_FIRST_CHARACTERS[first]}")
        _refuse("header-json", "the header does not begin with {")
    try:
        document, end = _DECODER.raw_decode(decoded)
    except json.JSONDecodeError as error:
        _refuse("header-json", f"the header is not JSON: {error.msg} (character {error.pos})")
    padding = decoded[end:].lstrip(" ")
    if padding:
        byte = padding[0].encode()[0]
        _refuse("header-padding", f"byte 0x{byte:02x} after the JSON, only spaces allowed")
    loaded: dict[str, Any] = document
    return loaded


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        for key, _ in pairs:
            if key not in found:
                _refuse("duplicate-key", f"{_quote(key)} appears twice")
            del found[key]
    return found


def _whole_number(text: str) -> int | float:
    if len(text) > _NUMBER_LIMIT:
        _refuse_number(text)
    # For the library -0 is the float -0.0, which is neither a size nor an offset.
    return -0.0 if text == "-0" else int(text)


def _fraction(text: str) -> float:
    if len(text) > _NUMBER_LIMIT:
        _refuse_number(text)
    return float(text)


def _refuse_number(text: str) -> NoReturn:
    _refuse("header-json", f"a number of {len(text)} characters, limit {_NUMBER_LIMIT}")


def _constant(text: str) -> NoReturn:
    _refuse("header-json", f"the header is not JSON: {text}")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_whole_number,
    parse_float=_fraction,
    parse_constant=_constant,
)


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        _refuse("metadata-type", f"__metadata__ is {_KINDS[type(value)]}, not an object")
    for key, text in value.items():
        if not isinstance(text, str):
            _refuse("metadata-type", f"__metadata__ key {_quote(key)} is {_KINDS[type(text)]}")
        if _SURROGATE.search(key) or _SURROGATE.search(text):
            where = f"__metadata__ key {_quote(key)}"
            _refuse("header-encoding", f"half of a surrogate pair in {where}")
    return value


def _entry(name: str, fields: Any) -> Entry:
    if not is_printable(name):
        _refuse(
            "name-invalid",
            f"control or bidi character in the tensor name {_quote(name)}",
            "rename the tensor and save the file again",
        )
    if not isinstance(fields, dict):
        _refuse("header-type", f"{_quote(name)} is {_KINDS[type(fields)]}, not an object")
    if fields.keys() != _FIELDS:
        wrong = _FIELDS - fields.keys() or fields.keys() - _FIELDS
        verb = "has no" if wrong <= _FIELDS else "has an unknown"
        _refuse("header-type", f"{_quote(name)} {verb} field {_quote(min(wrong))}")
    code = _code(name, fields["dtype"])
    shape = _shape(name, fields["shape"])
    start, end = _offsets(name, fields["data_offsets"])
    _check_size(name, code, shape, end - start)
    return Entry(name, code, shape, start, end)


def _code(name: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse("header-type", f"dtype of {_quote(name)} is {_KINDS[type(value)]}, not a string")
    if value not in CODES:
        supported = ", ".join(CODES)
        _refuse(
            "dtype-unknown",
            f"{_quote(name)} has dtype {_quote(value)}, supported: {supported}",
            # A shape in a header counts its halves of bytes, torch's the bytes.
            "load it with safetensors.torch, and push what you get: repo.push(state, model)"
            if value == "F4"
            else "save the tensor with a supported dtype",
        )
    return value


def _shape(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        _refuse("header-type", f"shape of {_quote(name)} is {_KINDS[type(value)]}, not an array")
    if len(value) > _RANK_LIMIT:
        _refuse(
            "rank-limit",
            f"{_quote(name)} has too many dimensions: {len(value)} > {_RANK_LIMIT}",
            "save the tensor with fewer dimensions",
        )
    for size in value:
        if type(size) is not int or size < 0:
            large = isinstance(size, (dict, list))
            shown = _KINDS[type(size)] if large else escape(json.dumps(size), limit=40)
            _refuse("shape-invalid", f"shape of {_quote(name)}: {shown} is not a size")
    return tuple(value)


def _offsets(name: str, value: Any) -> tuple[int, int]:
    if isinstance(value, list) and len(value) == 2:
        start, end = value
        if type(start) is type(end) is int and start >= 0 and end >= 0:
            return start, end
    _refuse("header-type", f"data_offsets of {_quote(name)} are not two whole numbers from 0")


def _check_size(name: str, code: str, shape: tuple[int, ...], found: int) -> None:
    item_size = ITEM_SIZES[CODES[code]]
    elements = prod(shape)
    if elements > _SIZE_LIMIT:
        _refuse("shape-overflow", f"{_quote(name)} has more than 2^63 elements")
    # Frameworks multiply the other sizes even where one is 0, to find strides.
    if not elements and prod(filter(None, shape)) * item_size > _SIZE_LIMIT:
        _refuse("shape-overflow", f"{_quote(name)}: dimensions exceed the limit although empty")
    if elements * item_size != found:
        expected = f"[{','.join(map(str, shape))}] = {elements * item_size} bytes"
        _refuse("size-mismatch", f"{_quote(name)} {code} {expected}, range is {found}")


def _check_layout(entries: list[Entry], available: int) -> None:
    position = 0
    for entry in entries:
        if entry.start < position:
            starts = f"{_quote(entry.name)} starts at {entry.start}"
            _refuse("offset-overlap", f"{starts}, previous ends at {position}")
        if entry.start > position:
            _refuse("offset-gap", f"bytes {position}-{entry.start} belong to no tensor")
        if entry.end > available:
            needs = f"{_quote(entry.name)} needs {entry.nbytes} bytes"
            present = available - entry.start
            _refuse("truncated", f"{needs}, {present} present", _FETCH_AGAIN)
        position = entry.end
    if position < available:
        _refuse("trailing-data", f"{available - position} bytes after the last tensor")
