"""Tensors of every dtype and layout come back bit for bit, and what shared memory still does."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_values import described, round_trip

import ckpt
from ckpt.core.documents import Document, Tensor, identity_bytes
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import IntegrityError
from ckpt.loader.geometry import find_shared
from ckpt.loader.restore import MemorySpace, Restorer

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized.*:UserWarning"),
]
DTYPES = [name for name in ITEM_SIZES if not name.startswith(("q", "bits"))]


def filled(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """A tensor of random bits, NaN payloads included."""
    kind: torch.dtype = getattr(torch, dtype)
    count = int(numpy.prod(shape, dtype=int)) * kind.itemsize
    data = numpy.random.default_rng(seed).integers(0, 256, count, numpy.uint8)
    if kind is torch.bool:
        data &= 1
    if not count:
        return torch.empty(shape, dtype=kind)
    return torch.from_numpy(data).view(kind).reshape(shape)


def bits(tensor: torch.Tensor) -> bytes:
    """The logical values, as bytes."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    if not plain.numel():
        return b""
    return (
        plain.clone(memory_format=torch.contiguous_format)
        .view(-1)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    assert type(got) is type(wanted)
    assert (got.dtype, got.shape, got.requires_grad) == (
        wanted.dtype,
        wanted.shape,
        wanted.requires_grad,
    )
    assert bits(got) == bits(wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: str, shape: tuple[int, ...]) -> None:
    tensor = filled(dtype, shape)
    assert_same(round_trip(tensor), tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(2, 3, 4).permute(2, 0, 1),
        torch.randn(3, 1).expand(3, 5),
        torch.ones(1).expand(4),
        torch.randn(4, 1, 6).permute(2, 0, 1).expand(6, 4, 1),
    ],
    ids=["transposed", "channels_last", "permuted", "expanded", "scalar-expanded", "size-1"],
)
def test_dense_strides_come_back(tensor: torch.Tensor) -> None:
    got = round_trip(tensor)
    assert_same(got, tensor)
    if not tensor.is_contiguous():
        assert got.stride() == tensor.stride()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(20.0)[::3],
        torch.arange(24.0).reshape(4, 6)[:, 1:4],
        torch.arange(10.0).unfold(0, 4, 2),
        torch.randn(3, dtype=torch.complex64).conj(),
        torch.randn(3, dtype=torch.complex64).conj().imag,
    ],
    ids=["gappy", "columns", "unfold", "conj", "neg"],
)
def test_values_of_views_with_gaps_and_lazy_bits_come_back(tensor: torch.Tensor) -> None:
    assert_same(round_trip(tensor), tensor)


@pytest.mark.parametrize("layout", ["coo", "coalesced", "csr", "csc", "bsr", "bsc"])
def test_sparse_layouts_come_back(layout: str) -> None:
    dense = torch.eye(4) * torch.arange(4.0)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "coo": lambda: torch.sparse_coo_tensor(
            torch.tensor([[1, 1], [2, 2]]), torch.tensor([1.0, 2.0]), (4, 4)
        ),
        "coalesced": dense.to_sparse,
        "csr": dense.to_sparse_csr,
        "csc": dense.to_sparse_csc,
        "bsr": lambda: dense.to_sparse_bsr((2, 2)),
        "bsc": lambda: dense.to_sparse_bsc((2, 2)),
    }
    made = ways[layout]()
    got = round_trip(made)
    assert got.layout == made.layout
    assert torch.equal(got.to_dense(), made.to_dense())
    if made.layout == torch.sparse_coo:
        assert got.is_coalesced() == made.is_coalesced()
        assert torch.equal(got._values(), made._values())


def test_quantised_tensors_come_back() -> None:
    scales, zeros = torch.tensor([0.1, 0.2]), torch.tensor([1, 2])
    for dtype in (torch.quint8, torch.qint8, torch.qint32):
        each = torch.quantize_per_tensor(torch.randn(3, 2), 0.1, 3, dtype)
        channel = torch.quantize_per_channel(torch.randn(3, 2), scales, zeros, 1, dtype)
        for one, got in zip((each, channel), round_trip([each, channel]), strict=True):
            assert (got.dtype, got.qscheme()) == (one.dtype, one.qscheme())
            assert torch.equal(got.int_repr(), one.int_repr())
            assert torch.equal(got.dequantize(), one.dequantize())


class TestSharedMemory:
    """What shared memory when it was pushed shares it when it is pulled."""

    def test_the_same_tensor_twice_is_one_tensor(self) -> None:
        x = torch.randn(3)
        got = round_trip({"a": x, "b": [x]})
        assert got["a"] is got["b"][0]

    def test_a_view_stays_a_view_of_its_tensor(self) -> None:
        x = torch.arange(12.0).reshape(3, 4)
        whole, row, turned = round_trip([x, x[1], x.t()])
        row[0] = 99
        assert whole[1, 0] == 99 == turned[0, 1]
        assert turned.stride() == (1, 4)

    def test_overlapping_views_without_a_whole_share_a_region(self) -> None:
        x = torch.arange(20.0)
        document, spaces = described([x[2:8], x[4:12]])
        assert [tensor.kind for tensor in document.tensors] == ["tensor", "tensor", "region"]
        one, other = Restorer(document, spaces).state()
        one[2] = 99
        assert other[0] == 99
        assert other.tolist()[1:] == list(range(5, 12))

    def test_bytes_that_no_view_covers_are_zero(self) -> None:
        x = torch.full((9,), 7.0)
        document, spaces = described([x[0:8:2], x[2:9:2]])
        (region,) = [i for i, tensor in enumerate(document.tensors) if tensor.kind == "region"]
        assert spaces[region].tensor.view(torch.float32).tolist() == [7, 0, 7, 0, 7, 0, 7, 0, 7]

    def test_a_long_tensor_is_not_missed_behind_a_short_one(self) -> None:
        x = torch.arange(100, dtype=torch.uint8)
        (group,) = find_shared([x, x[5:10], x[50:60]])
        assert group.members == (0, 1, 2)
        assert group.host == 0

    def test_views_of_other_dtypes_share(self) -> None:
        x = torch.arange(4, dtype=torch.int32)
        whole, raw = round_trip([x, x.view(torch.uint8)])
        raw[0] = 5
        assert whole[0] == 5

    def test_numpy_and_torch_share(self) -> None:
        array = numpy.arange(6, dtype=numpy.float32)
        got_array, got_tensor = round_trip([array, torch.from_numpy(array)[2:]])
        assert type(got_array) is numpy.ndarray
        got_tensor[0] = 42
        assert got_array[2] == 42

    def test_two_parameters_over_one_storage_stay_two(self) -> None:
        one = torch.nn.Parameter(torch.randn(3))
        other = torch.nn.Parameter(one.detach(), requires_grad=False)
        got = round_trip([one, other])
        assert got[0] is not got[1]
        assert got[0].data_ptr() == got[1].data_ptr()
        assert [type(x) for x in got] == [torch.nn.Parameter] * 2
        assert [x.requires_grad for x in got] == [True, False]

    def test_neighbours_in_one_storage_are_separate(self) -> None:
        x = torch.arange(10.0)
        document, _ = described([x[:5], x[5:]])
        assert all(tensor.region is None for tensor in document.tensors)


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
        numpy.zeros((0, 2), numpy.uint16),
    ],
    ids=lambda array: array.dtype.str,
)
def test_arrays_come_back(array: numpy.ndarray) -> None:
    got = round_trip({"a": array})["a"]
    assert type(got) is numpy.ndarray
    assert (got.dtype, got.shape) == (array.dtype, array.shape)
    assert got.tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": (2, 2), "strides": (1, 1 << 40)},
        {"shape": (4,), "strides": (-1,)},
        {"shape": (-4,)},
        {"shape": (1 << 40, 1 << 40)},
        {"shape": (4,), "region": 0, "strides": (1,)},
        {"shape": (4,), "region": 1, "strides": (1 << 50,)},
        {"shape": (4,), "region": 1, "strides": (1,), "offset": 3},
        {"shape": (400,), "region": 1, "strides": (1,)},
        {"shape": (4,), "region": 1, "strides": (1,), "offset": 1 << 60},
        {"shape": (4,), "region": 1, "strides": (1,), "offset": -4},
        {"shape": (4,), "region": 9, "strides": (1,)},
        {"shape": (4,), "components": {"indices": 0}, "layout": "sparse_coo"},
        {"shape": (4,), "components": {"values": 1}, "layout": "sparse_csr"},
        {"shape": (4,), "components": {}, "layout": "nonsense"},
        {"shape": (4,), "dtype": "load"},
        {"shape": (4,), "kind": "ndarray", "details": {"numpy": "|O", "shape": [2]}},
    ],
    ids=str,
)
def test_an_entry_that_contradicts_itself_is_damage_and_never_a_crash(
    entry: dict[str, Any],
) -> None:
    own = {} if {"region", "components"} & entry.keys() else {"chunks": ("",)}
    first = Tensor(**{"name": "w", "dtype": "float32", **own, **entry})
    plain = Tensor(name="v", dtype="float32", shape=(4,), chunks=("",))
    root = [{"$tensor": 0}]
    document = Document(format=1, state="values", root=root, tensors=(first, plain), environment="")

    def restore() -> None:
        entries = enumerate(document.tensors)
        spaces = {index: MemorySpace(tensor) for index, tensor in entries if tensor.has_bytes}
        Restorer(document, spaces).state()

    with pytest.raises(IntegrityError):
        restore()


@st.composite
def states(draw: st.DrawFn) -> Any:
    """A nested state of tensors of any dtype, shape and layout, some of them views of others."""
    pool: list[torch.Tensor] = []
    for _ in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
        tensor = filled(draw(st.sampled_from(DTYPES)), shape, draw(st.integers(0, 10**6)))
        how = draw(st.sampled_from(["plain", "turned", "slice", "step", "expand", "both"]))
        if how == "turned" and tensor.dim() > 1:
            tensor = tensor.transpose(0, -1)
        if how == "slice" and tensor.dim():
            tensor = tensor[1:]
        if how == "step" and tensor.dim():
            tensor = tensor[::2]
        if how == "expand" and tensor.dim() and tensor.shape[0] == 1:
            tensor = tensor.expand(3, *tensor.shape[1:])
        if how == "both" and tensor.dim():
            pool.append(tensor[:1])
        pool.append(tensor)
    names = draw(st.lists(st.text(max_size=5), min_size=len(pool), max_size=len(pool), unique=True))
    flat = dict(zip(names, pool, strict=True))
    nested = draw(st.lists(st.sampled_from(pool), max_size=2))
    return {"flat": flat, "nested": [tuple(nested), {"step": draw(st.integers())}]}


def tensors_in(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = state.values()
    return (
        [found for item in state for found in tensors_in(item)]
        if not isinstance(state, int)
        else []
    )


def shuffled(state: Any, chance: random.Random) -> Any:
    """The same state, its dicts filled in another order."""
    if isinstance(state, dict):
        items = [(key, shuffled(item, chance)) for key, item in state.items()]
        chance.shuffle(items)
        return dict(items)
    if isinstance(state, (list, tuple)):
        return type(state)(shuffled(item, chance) for item in state)
    return state


@pytest.fixture(scope="module")
def shared_repo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with ckpt.open(tmp_path_factory.mktemp("states")) as repo:
        yield repo


def compare(got: Any, wanted: Any) -> None:
    assert list(got["flat"]) == list(wanted["flat"])
    pairs = zip(tensors_in(got), tensors_in(wanted), strict=True)
    for one, other in pairs:
        assert_same(one, other)


@settings(max_examples=2000)
@given(state=states(), seed=st.integers(0, 10**6))
def test_2000_random_states_come_back_with_one_digest_whatever_the_order(
    state: Any, seed: int
) -> None:
    document, spaces = described(state)
    compare(Restorer(document, spaces).state(), state)
    other, _ = described(shuffled(state, random.Random(seed)))
    assert identity_bytes(other) == identity_bytes(document)


@settings(max_examples=100)
@given(state=states(), seed=st.integers(0, 10**6))
def test_random_states_come_back_through_a_repository_with_one_digest_whatever_the_threads(
    state: Any, seed: int, shared_repo: ckpt.Repository
) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = shared_repo.push(state, "state")
        torch.set_num_threads(2)
        again = shared_repo.push(shuffled(state, random.Random(seed)), "other", step=seed)
    finally:
        torch.set_num_threads(threads)
    assert again.digest == first.digest
    got = shared_repo.pull(first)
    pairs = zip(tensors_in(shuffled(got, random.Random(1))),
                tensors_in(shuffled(state, random.Random(1))), strict=True)  # fmt: skip
    if list(got["flat"]) == list(state["flat"]):
        compare(got, state)
    assert len(list(pairs)) == len(tensors_in(state))


def test_a_state_is_not_copied_on_its_way(tmp_path: Path) -> None:
    from ckpt.loader.capture import capture

    tensor = torch.randn(1000)
    (source,) = capture({"w": tensor}).sources
    assert source is not None
    view = numpy.frombuffer(source.read(0, source.nbytes), numpy.float32)
    tensor[0] = 5.0
    assert view[0] == 5.0
