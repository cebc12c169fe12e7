"""Tensors of every dtype and layout come back bit for bit, and what shared memory still does."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_values import described, round_trip

import ckpt
from ckpt.core.documents import Document, Tensor, identity_bytes
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import IntegrityError, UsageError
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.loader.capture import capture
from ckpt.loader.devices import DeviceMap
from ckpt.loader.geometry import find_shared, is_dense
from ckpt.loader.restore import Restorer
from ckpt.loader.spaces import DeviceSpace, MemorySpace, Space, is_in_order

pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse:UserWarning"),
    pytest.mark.filterwarnings("ignore:ComplexHalf:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized.*:UserWarning"),
]
CPU = torch.device("cpu")
STEPS = itertools.count()  # a state that comes twice is a version of its own
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
    copy = plain.clone(memory_format=torch.contiguous_format)
    return copy.view(-1).view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def assert_same(got: torch.Tensor, wanted: torch.Tensor) -> None:
    for fact in (type, lambda x: x.dtype, lambda x: x.shape, lambda x: x.requires_grad, bits):
        assert fact(got) == fact(wanted)


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
        torch.randn(2, 1, 3, 3).to(memory_format=torch.channels_last),
        torch.randn(1, 5)[:, :2],
        torch.zeros(3, 0, 4).permute(2, 0, 1),
    ],
    ids=lambda tensor: f"{list(tensor.shape)}-{list(tensor.stride())}",
)
def test_dense_strides_come_back(tensor: torch.Tensor) -> None:
    got = round_trip(tensor)
    assert_same(got, tensor)
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
        assert torch.equal(got._indices(), made._indices())
        assert torch.equal(got._values(), made._values())


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("coalesced", [True, False])
def test_a_sparse_tensor_of_few_values_keeps_its_coalesced_mark(
    count: int, coalesced: bool
) -> None:
    indices, values = torch.arange(count)[None], torch.ones(count)
    made = torch.sparse_coo_tensor(
        indices, values, (4,), is_coalesced=coalesced, check_invariants=True
    )
    assert round_trip(made).is_coalesced() == coalesced


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
        x = torch.randn(3, requires_grad=True)
        got = round_trip({"a": x, "b": [x]})
        assert got["a"] is got["b"][0]
        assert_same(got["a"], x)

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

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_views_of_every_dtype_share_a_region(self, dtype: str) -> None:
        x = filled(dtype, (24,))
        views = [x[1:9], x[4:12:2], x[3:].unfold(0, 4, 2)]
        for got, wanted in zip(restored := round_trip(views), views, strict=True):
            assert_same(got, wanted)
            assert got.stride() == wanted.stride()
            distance = wanted.data_ptr() - x[1:].data_ptr()
            assert got.data_ptr() - restored[0].data_ptr() == distance

    def test_a_view_that_lies_askew_in_the_largest_tensor_still_shares(self) -> None:
        x = torch.arange(10.0)
        whole, askew = round_trip([x[1:9], x[2:6].view(torch.float64)])
        askew.zero_()
        assert whole.tolist() == [1, 0, 0, 0, 0, 6, 7, 8]

    def test_memory_at_an_odd_address_is_refused(self) -> None:
        data = numpy.arange(33, dtype=numpy.uint8)
        with pytest.raises(UsageError, match="odd address"):
            described([data[:20], data[1:29].view(numpy.float32)])

    def test_views_share_on_another_device(self) -> None:
        x = torch.arange(20.0)
        document, spaces = described([x[1:8], x[4:12]])
        assert document.tensors[2].align == 4
        one, other = Restorer(document, spaces, "meta").state()
        assert (one.storage_offset(), other.storage_offset()) == (1, 4)
        assert one.untyped_storage()._cdata == other.untyped_storage()._cdata

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

    def test_a_tensor_and_two_apart_in_it_share(self) -> None:
        x = torch.arange(9.0)
        whole, low, high = round_trip([x, x[:3], x[5:]])
        low[0], high[0] = 70, 80
        assert (whole[0], whole[5]) == (70, 80)

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

    def test_a_conjugate_or_negative_view_that_shares_is_named_and_a_lone_one_is_not(
        self, repo: ckpt.Repository
    ) -> None:
        x = torch.randn(3, dtype=torch.complex64)
        lone = torch.randn(3, dtype=torch.complex64).conj()
        state = {"x": x, "conj": x.conj(), "neg": x.conj().imag, "lone": lone}
        with pytest.warns(ckpt.CkptWarning) as said:
            repo.push(state, "m")
        assert [str(one.message).partition(":")[0] for one in said] == ["conj", "neg"]
        assert all("comes back with memory of its own" in str(one.message) for one in said)
        for name, got in repo.pull("m").items():
            assert_same(got, state[name])

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
    "entry",
    [
        {"shape": (2, 2), "strides": (1, 1 << 40)},
        {"shape": (4,), "strides": (-1,)},
        {"shape": (2, 2), "strides": (1, 1)},
        {"shape": (2, 2), "strides": (1,)},
        {"shape": (0, 1 << 70)},
        {"shape": (4,), "align": 4},
        {"shape": (4,), "align": -4, "kind": "region"},
        {"shape": (4,), "align": 4, "kind": "region"},
        {"shape": (2,), "region": 1, "dtype": "float64", "offset": 4, "strides": (1,)},
        {"shape": (1 << 40, 1 << 40), "region": 1, "strides": (0, 0)},
        {"shape": (4,), "components": {"integers": 0}, "layout": "quantized"},
        {"shape": (5,), "dtype": "qint8", "components": {"integers": 1}, "layout": "quantized"},
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
        how = draw(st.sampled_from(["plain", "turned", "slice", "step", "expand", "both", "apart"]))
        if tensor.dim() and how in ("slice", "step"):
            tensor = tensor[1:] if how == "slice" else tensor[::2]
        if tensor.dim() and how in ("turned", "both", "apart"):
            tensor = tensor.transpose(0, -1)
        if tensor.dim() and how == "both":
            pool.append(tensor[:1])
        if tensor.dim() and how == "apart":
            pool.append(tensor[1:])
            tensor = tensor[..., :-1]
        if how == "expand":
            tensor = tensor.unsqueeze(0).expand(3, *tensor.shape)
        pool.append(tensor)
    names = draw(st.lists(st.text(max_size=5), min_size=len(pool), max_size=len(pool), unique=True))
    flat = dict(zip(names, pool, strict=True))
    nested = draw(st.lists(st.sampled_from(pool), max_size=2))
    return {"flat": flat, "nested": [tuple(nested), {"step": draw(st.integers())}]}


def tensors_in(state: Any) -> list[torch.Tensor]:
    return [*state["flat"].values(), *state["nested"][0]]


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
    """Equal in order, bits, strides, and in what shares memory with what at which distance."""
    assert list(got["flat"]) == list(wanted["flat"])
    assert got["nested"][1] == wanted["nested"][1]
    pairs = list(zip(tensors_in(got), tensors_in(wanted), strict=True))
    for one, other in pairs:
        assert_same(one, other)
        once = [size if step else 1 for size, step in zip(other.shape, other.stride(), strict=True)]
        if is_dense(once, other.stride()):
            assert one.stride() == other.stride()
    pairs = list({id(other): (one, other) for one, other in pairs}.values())
    for group in find_shared([other for _, other in pairs]):
        one, other = pairs[group.members[0]]
        for index in group.members:
            distance = pairs[index][1].data_ptr() - other.data_ptr()
            assert pairs[index][0].data_ptr() - one.data_ptr() == distance
            assert pairs[index][0].stride() == pairs[index][1].stride()


def test_the_default_device_of_a_program_is_not_that_of_what_is_pulled(
    repo: ckpt.Repository,
) -> None:
    base = torch.arange(6.0)
    state: dict[str, Any] = {
        "whole": torch.ones(3),
        "views": [base[:4], base[2:]],
        "empty": torch.empty(0),
    }
    try:
        torch.set_default_device("meta")
        repo.push(state, "m")
        pulled = repo.pull("m")
    finally:
        torch.set_default_device(None)
    assert torch.equal(pulled["whole"], state["whole"])
    assert torch.equal(pulled["views"][1], base[2:])


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
        first = shared_repo.push(state, "state", step=next(STEPS))
        torch.set_num_threads(2)
        again = shared_repo.push(shuffled(state, random.Random(seed)), "other", step=next(STEPS))
    finally:
        torch.set_num_threads(threads)
    assert again.digest == first.digest
    compare(shared_repo.pull(first), state)


@settings(max_examples=100)
@given(state=states())
def test_random_states_come_back_where_each_piece_is_copied_to_a_device(
    state: Any, shared_repo: ckpt.Repository
) -> None:
    def space_for(entry: Tensor, _: DeviceMap) -> Space:
        return DeviceSpace(entry, CPU) if is_in_order(entry) else MemorySpace(entry)

    version = shared_repo.push(state, "pieces", step=next(STEPS))
    with patch("ckpt.loader.spaces.space_for", space_for):
        compare(shared_repo.pull(version), state)


def test_a_tensor_of_several_chunks_is_copied_to_its_device_whole(repo: ckpt.Repository) -> None:
    tensor = torch.arange(5 * CHUNK_BYTES // 16)  # of 8 bytes, in two chunks and a half
    repo.push({"w": tensor}, "m", compress="none")
    with (
        patch("ckpt.loader.spaces.space_for", lambda entry, _: DeviceSpace(entry, CPU)),
        torch.inference_mode(),
    ):
        assert torch.equal(repo.pull("m")["w"], tensor)


def test_a_device_without_memory_takes_nothing_and_says_so(tmp_path: Path) -> None:
    """Not that the document is damaged, which is what else torch raises RuntimeErrors for."""
    script = """
import resource, torch, ckpt
repo = ckpt.open(".")
repo.push({"w": torch.zeros(1 << 28)}, "m")
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), -1))
try:
    repo.pull("m")
except ckpt.CkptError as error:
    print(error.code, error.exit_code, error)
"""
    program = [sys.executable, "-c", script]
    done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith('no-memory 8 there is no room for "w" (')


def test_a_state_is_not_copied_on_its_way(tmp_path: Path) -> None:
    tensor = torch.randn(1000)
    (source,) = capture({"w": tensor}).sources
    assert source is not None
    view = numpy.frombuffer(source.read(0, source.nbytes), numpy.float32)
    tensor[0] = 5.0
    assert view[0] == 5.0
