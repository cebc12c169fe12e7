"""The value codec: every plain value comes back with its type and bits, the rest is refused."""

from __future__ import annotations

import math
import os
import pathlib
import struct
import threading
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import nn

import ckpt
from ckpt.core.documents import Document, canonical, decode_document, encode_document
from ckpt.core.errors import CkptWarning, IntegrityError, UsageError
from ckpt.core.tensors import chunk_spans
from ckpt.loader.capture import capture
from ckpt.loader.restore import Restorer
from ckpt.loader.spaces import MemorySpace
from ckpt.loader.values import Decoder, _sort_key

Pair = namedtuple("Pair", "a b")


def described(state: Any) -> tuple[Document, dict[int, MemorySpace]]:
    """The document of a state as it is read back, and its bytes."""
    captured = capture(state)
    document = Document(
        format=1,
        state="values",
        root=captured.root,
        tensors=captured.tensors,
        environment="",
        order=captured.order,
    )
    document = decode_document(encode_document(document))
    spaces = {}
    for index, source in enumerate(captured.sources):
        if source is not None:
            count = len(chunk_spans(source.nbytes))
            spaces[index] = MemorySpace(replace(document.tensors[index], chunks=("",) * count))
            for at in range(0, source.nbytes, 7):  # odd pieces, as chunks would be
                piece = source.read(at, min(7, source.nbytes - at))
                spaces[index].write(at, piece)
    return document, spaces


def round_trip(state: Any) -> Any:
    document, spaces = described(state)
    return Restorer(document, spaces).state()


def same(one: Any, other: Any) -> bool:
    """Equal in type and bits, also NaNs, signs of zero and the order of dicts."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack(">d", one) == struct.pack(">d", other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, dict):
        pairs = zip(one.items(), other.items(), strict=False)
        return len(one) == len(other) and all(same(a, b) and same(c, d) for (a, c), (b, d) in pairs)
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, numpy.generic):
        sizes = [len(text) if isinstance(text, (str, bytes)) else 0 for text in (one, other)]
        same_bits: bool = one.tobytes() == other.tobytes()
        return same_bits and one.dtype == other.dtype and sizes[0] == sizes[1]
    if isinstance(one, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    return bool(one == other)


NUMPY_KINDS = [
    "<f2",
    "<f4",
    "<f8",
    "<c8",
    "<c16",
    "<i2",
    "<u8",
    "|i1",
    "<M8[25s]",
    "<m8[ns]",
    "|V5",
]


def numpy_scalar(kind: str, data: bytes) -> numpy.generic:
    """A scalar of any bits."""
    dtype = numpy.dtype(kind)
    if dtype.kind == "V":
        return numpy.void(data[: dtype.itemsize])
    scalar: numpy.generic = numpy.frombuffer(data[: dtype.itemsize], dtype)[0]
    return scalar


any_float = st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack(">d", bits.to_bytes(8))[0])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**80), 2**80),
    st.floats(),
    any_float,
    st.text(st.characters()),
    st.text(st.characters(categories=["Cs", "Lu"])),
    st.binary(),
    st.builds(complex, any_float, any_float),
    st.binary().map(bytearray),
    st.builds(range, st.integers(), st.integers(), st.integers().filter(bool)),
    st.builds(slice, st.none() | st.integers(), st.integers(), st.none() | st.integers()),
    st.lists(st.integers(0, 9)).map(torch.Size),
    st.sampled_from(
        [..., torch.bfloat16, torch.device("cuda:1"), torch.strided, torch.channels_last]
    ),
    st.builds(numpy_scalar, st.sampled_from(NUMPY_KINDS), st.binary(min_size=16, max_size=16)),
    st.booleans().map(numpy.bool_),
    st.text(st.characters(), max_size=3).map(numpy.str_),
    st.binary(max_size=3).map(numpy.bytes_),
    st.binary(max_size=4).map(lambda data: pathlib.Path(os.fsdecode(data.replace(b"\0", b"")))),
)
keys = st.text(max_size=4) | st.integers() | st.booleans() | st.none() | st.tuples(st.integers())
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.dictionaries(st.text(), st.integers()).map(Counter),
        st.dictionaries(st.text(), inner, max_size=3).map(lambda items: defaultdict(list, items)),
        st.lists(inner, max_size=3).map(lambda items: deque(items, maxlen=5)),
        st.frozensets(st.integers() | st.text()),
        st.sets(st.text() | st.tuples(st.integers(), st.text())),
    ),
    max_leaves=12,
)


@given(values)
def test_every_plain_value_comes_back_with_its_type_and_bits(value: Any) -> None:
    assert same(round_trip(value), value)


@given(st.permutations(list("abcdef")))
def test_the_order_of_a_dict_comes_back_and_is_no_part_of_its_identity(order: list[str]) -> None:
    state = {name: {name: torch.tensor(ord(name)), "z": 1} for name in order}
    document, spaces = described(state)
    assert list(Restorer(document, spaces).state()) == order
    other, _ = described({name: state[name] for name in sorted(order)})
    assert (document.root, document.tensors) == (other.root, other.tensors)


def test_the_same_content_in_another_order_is_a_version_of_its_own(repo: ckpt.Repository) -> None:
    one, other = (
        {"a": torch.ones(1), "b": torch.zeros(1)},
        {"b": torch.zeros(1), "a": torch.ones(1)},
    )
    repo.push(one, "m")
    assert list(repo.pull(repo.push(other, "m"))) == ["b", "a"]
    assert repo.push(other, "m").number == 2


def test_special_values_keep_their_bits() -> None:
    payload = struct.unpack(">d", bytes.fromhex("7ff8000000000001"))[0]
    state = [math.nan, -math.nan, payload, math.inf, -math.inf, -0.0, 2**100, "\ud800", 1e-320]
    state.append(range(-(2**100), 2**100))
    assert same(round_trip(state), state)


def test_a_generator_goes_on_where_it_was() -> None:
    generator = torch.Generator().manual_seed(5)
    torch.rand(3, generator=generator)
    restored = round_trip({"g": generator})["g"]
    wanted = torch.rand(4, generator=generator)
    assert torch.equal(torch.rand(4, generator=restored), wanted)


def test_a_generator_in_two_places_is_one_and_another_of_the_same_state_is_another(
    repo: ckpt.Repository,
) -> None:
    shared, other = torch.Generator(), torch.Generator()
    got = repo.pull(repo.push({"a": shared, "b": [shared], "c": other}, "m"))
    assert got["a"] is got["b"][0]
    assert got["a"] is not got["c"]
    assert torch.equal(got["a"].get_state(), got["c"].get_state())


def test_a_deque_keeps_its_bound_and_a_defaultdict_its_factory() -> None:
    state = {"d": deque([1, 2], maxlen=2), "f": defaultdict(int, a=1), "n": defaultdict(None)}
    restored = round_trip(state)
    assert restored["d"].maxlen == 2
    assert restored["f"]["missing"] == 0
    assert restored["n"].default_factory is None


@pytest.mark.parametrize("alike", [True, False])
def test_what_a_state_dict_notes_of_its_modules_comes_back(
    repo: ckpt.Repository, tmp_path: Path, alike: bool
) -> None:
    last: nn.Module = nn.Linear(2, 2) if alike else nn.BatchNorm1d(2)
    state = nn.Sequential(nn.Linear(2, 2), last).state_dict()
    noted = vars(state)["_metadata"]
    version = repo.push({"net": state}, "net")
    pulled = repo.pull(version)["net"]
    assert type(pulled) is OrderedDict
    assert vars(pulled) == {"_metadata": noted}
    vars(pulled)["_metadata"][""]["version"] = 7
    assert noted[""]["version"] == vars(pulled)["_metadata"]["0"]["version"] == 1
    assert set(repo.pull(version, tensors="net.1.*")) == {
        f"net.1.{name}" for name in last.state_dict()
    }
    repo.export_file(version, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=True)["net"]
    assert vars(loaded) == {"_metadata": noted}
    (imported,) = repo.import_files(tmp_path / "net.pt", "again")
    assert imported.version is not None
    assert imported.version.digest == version.digest
    plain = repo.push({"net": OrderedDict(state.items())}, "plain")
    differences = repo.diff(plain, version).values
    assert {one.change for one in differences} == {"added"}
    assert all(one.path.startswith("net._metadata.") for one in differences)


def test_what_somebody_hung_on_a_tensor_is_named(repo: ckpt.Repository) -> None:
    weight = nn.Parameter(torch.rand(2))
    weight.tag = "mine"  # type: ignore[attr-defined]
    with pytest.warns(CkptWarning, match=r"a\.w: its attribute tag is not stored"):
        repo.push({"a": {"w": weight}, "b": weight}, "net")


def test_what_is_noted_of_modules_may_be_large_and_differ(repo: ckpt.Repository) -> None:
    state = OrderedDict(w=torch.ones(1))
    noted = {name: {"scale": [*range(2000), last]} for name, last in (("a", 1), ("b", 2))}
    vars(state)["_metadata"] = OrderedDict(noted)
    assert vars(repo.pull(repo.push({"net": state}, "net"))["net"])["_metadata"] == noted


def test_an_ordered_dict_with_another_attribute_is_refused(repo: ckpt.Repository) -> None:
    state = OrderedDict(a=1)
    vars(state)["mine"] = 2
    with pytest.raises(UsageError, match="with the attribute mine"):
        repo.push({"x": state}, "net")


def test_the_name_of_a_tensor_does_not_depend_on_the_order_of_a_set() -> None:
    document, _ = described({frozenset({"a", "b", "c"}): torch.ones(1), 7: torch.ones(2)})
    names = [tensor.name for tensor in document.tensors]
    assert sorted(names) == ["7", '{"$frozenset":["a","b","c"]}']


@pytest.mark.parametrize(
    "array",
    [
        numpy.arange(6).reshape(2, 3),
        numpy.asfortranarray(numpy.arange(6.0).reshape(2, 3)),
        numpy.arange(6)[::-1],
        numpy.arange(3, dtype=">f4"),
        numpy.array(["a", "bc"]),
        numpy.array(["2026-01-01"], dtype="datetime64[D]"),
        numpy.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8", (1,))]),
        numpy.array(3.5),
        numpy.array("abc"),
        numpy.zeros(2, {"names": ["x"], "formats": ["f4"], "titles": ["T"]}),
        numpy.zeros((0, 2), numpy.uint16),
    ],
    ids=lambda array: array.dtype.str,
)
def test_arrays_come_back(array: numpy.ndarray) -> None:
    got = round_trip({"a": array})["a"]
    assert type(got) is numpy.ndarray
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tobytes() == array.tobytes()


class Weird(torch.Tensor):
    """A tensor subclass."""


class Meters(numpy.float64):
    """A numpy scalar that is more than its bits."""


def freed() -> torch.Tensor:
    """A tensor as FSDP leaves it: a shape whose memory was given back."""
    tensor = torch.ones(3)
    tensor.untyped_storage().resize_(0)
    return tensor


def nested_sets(depth: int) -> frozenset[Any]:
    made: frozenset[Any] = frozenset()
    for _ in range(depth):
        made = frozenset([made])
    return made


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda: 1, "which is code"),
        (threading.Lock(), "cannot store _thread.lock"),
        (nn.Linear(1, 1), "use its state_dict()"),
        (torch.optim.SGD([torch.ones(1)]), "use its state_dict()"),
        (Pair(1, 2), "convert it to a plain tuple"),
        (type("Own", (dict,), {})(), "convert it to a plain dict"),
        (defaultdict(lambda: 1), "factory is not a built-in type"),
        (torch.empty(1, device="meta"), "on device meta"),
        (torch.ones(1).as_subclass(Weird), "tensor subclass"),
        (nn.UninitializedParameter(), "run one forward first"),
        (numpy.array([object()]), "Python objects"),
        (numpy.ma.masked_array([1]), "numpy.asarray"),
        ({torch.ones(1): 1}, "cannot stand here"),
        ({frozenset([1]): {1, 2}, "bad": 1j**2, "worse": {print}}, "which is code"),
        (2**9000, "bits"),
        (range(2**9000), "bits"),
        ({2**20000: 1}, "in a key: a whole number"),
        (slice(print), "in a slice: cannot store"),
        (nested_sets(500), "nested deeper"),
        (pathlib.PureWindowsPath("C:"), "cannot store pathlib.PureWindowsPath"),
        (Meters(1.0), "Meters"),
        (numpy.longdouble(1), "differs between machines"),
        (numpy.zeros(2, [("x", "f4"), ("y", numpy.longdouble)]), "differs between machines"),
        (numpy.zeros(1, [("x", "i4")])[0], "cannot store numpy.void"),
        (numpy.zeros(3, "V0"), "an array of dtype"),
        (torch.zeros(3).to_mkldnn(), "use to_dense()"),
        (freed(), "its memory was freed"),
        (torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), "subclass"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_stored_is_refused_with_its_path(value: Any, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        capture({"fine": 1, "deep": [0, {"x": value}]})
    assert caught.value.code == "cannot-store"
    assert "deep.1.x" in str(caught.value)
    assert reason in str(caught.value)


def test_everything_that_cannot_be_stored_is_refused_at_once() -> None:
    made: dict[str, Any] = defaultdict(lambda: 1)
    state = {"a": print, "b": [1, threading.Lock()], "c": {"d": nn.ReLU()}, "e": made}
    made["f"] = print
    with pytest.raises(UsageError) as caught:
        capture(state)
    message = str(caught.value)
    assert message.startswith("5 values cannot be stored: a: ")
    assert "; b.1: " in message
    assert "; c.d: " in message
    assert "; e: a defaultdict" in message
    assert "; e.f: " in message


def test_a_cycle_and_too_deep_a_nesting_are_refused() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    for state, reason in ((cycle, "contains itself"), (deep, "nested deeper")):
        with pytest.raises(UsageError, match=reason):
            capture({"s": state})


@pytest.mark.parametrize(
    "root",
    [
        {"$unknown": 1},
        {"$tuple": [], "$list": []},
        {},
        {"$bytes": 1},
        {"$bytes": "a"},
        {"$bytes": "!!!!"},
        {"$str": "YQ=="},
        {"$float": "3ff0000000000000"},
        {"$float": "7FF8000000000001"},
        {"$complex": [10**400, 0]},
        {"$ellipsis": 5},
        {"$tuple": "ab"},
        {"$set": [[]]},
        {"$slice": [1, 2, 3, 4]},
        {"$range": [0, 1, 0]},
        {"$size": "12"},
        {"$deque": [-1, []]},
        {"$deque": [2**70, []]},
        {"$dict": {"ab": 1}},
        {"$dict": [["a", 1], ["a", 2]]},
        {"$odict": ["ab"]},
        {"$path": 1},
        {"$generator": ["cpu", 0]},
        {"$float": "one"},
        {"$dict": [[1]]},
        {"$dict": [[[], 1]]},
        {"$dtype": "os"},
        {"$dtype": "load"},
        {"$dtype": "half"},
        {"$dtype": ["float32"]},
        {"$layout": "float32"},
        {"$npscalar": ["|O", "AAAAAAAAAAA="]},
        {"$npscalar": ["<f4", ""]},
        {"$npscalar": ["<f4", "AAAAAAAAAAA="]},
        {"$npscalar": [">f4", "AAAAAA=="]},
        {"$npscalar": ["f4,,", "AAAAAA=="]},
        {"$npscalar": ["<U1", "////fw=="]},
        {"$defaultdict": ["exec", []]},
        {"$tensor": 0},
        {"$tensor": "x"},
        {"$module": 0},
        {"$object": ["os:system", {}]},
        {"$device": "nowhere:-5"},
        {"$device": 0},
    ],
    ids=str,
)
def test_a_malformed_value_is_damage_and_nothing_else(root: Any) -> None:
    document = Document(format=1, state="values", root=root, tensors=(), environment="")
    with pytest.raises(IntegrityError) as caught:
        Restorer(document, {}).state()
    assert caught.value.code == "document-damaged"


def test_an_order_that_is_no_permutation_is_damage() -> None:
    decoder = Decoder(lambda index: index, {0: (0, 0)}, lambda device, state: torch.Generator())
    with pytest.raises(IntegrityError):
        decoder.decode({"$dict": [["a", 1], ["b", 2]]})


@given(key=st.text() | st.text(st.characters(max_codepoint=126)))
def test_keys_are_sorted_by_their_canonical_form(key: str) -> None:
    assert _sort_key(key) == canonical(key)
