"""How far the tensors of two versions lie apart: as torch computes it, in bounded memory."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy
import pytest
import torch
from store_reads import reads

import ckpt
from ckpt.core.tensors import CHUNK_BYTES


def measure(repo: ckpt.Repository, before: Any, after: Any) -> Any:
    """The statistics of two tensors."""
    repo.push({"w": before}, "before")
    repo.push({"w": after}, "after")
    return repo.diff("before", "after", stats=True).tensors[0].statistics


def random(name: str) -> torch.Tensor:
    """Finite elements of any dtype."""
    dtype = getattr(torch, name)
    if dtype.is_floating_point and dtype.itemsize > 1:
        return (torch.randn(1000) * 3).to(dtype)
    if dtype.is_complex:
        return torch.randn(1000, dtype=torch.complex128).to(dtype)
    codes = torch.randint(0, 256, (1000 * dtype.itemsize,), dtype=torch.uint8)
    if dtype == torch.bool:
        return codes > 128
    drawn = codes.view(dtype)
    if dtype.is_floating_point:
        drawn = torch.where(drawn.to(torch.float64).isfinite(), codes, 1).view(dtype)
    return drawn


DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
    *("float16", "bfloat16", "float32", "float64", "complex32", "complex64", "complex128"),
    *("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"),
)


@pytest.mark.filterwarnings("ignore:ComplexHalf support")
@pytest.mark.parametrize("name", DTYPES)
def test_statistics_are_what_torch_computes_in_double_precision(
    repo: ckpt.Repository, name: str
) -> None:
    torch.manual_seed(0)
    before, after = random(name), random(name)
    after.view(torch.uint8)[: 100 * after.itemsize] = before.view(torch.uint8)[
        : 100 * after.itemsize
    ]
    found = measure(repo, before, after)
    wide = torch.complex128 if before.is_complex() else torch.float64
    a, b = before.to(wide), after.to(wide)
    assert found.norms == pytest.approx([a.norm().item(), b.norm().item()])
    assert found.difference == pytest.approx((a - b).norm().item())
    assert found.largest == pytest.approx((a - b).abs().max().item())
    product = torch.vdot(a, b).real if a.is_complex() else a @ b
    assert found.cosine == pytest.approx((product / (a.norm() * b.norm())).item())
    bits = [one.view(torch.uint8).reshape(1000, -1) for one in (before, after)]
    assert found.changed == int((bits[0] != bits[1]).any(1).sum())
    assert (found.elements, found.nans, found.infinities) == (1000, (0, 0), (0, 0))


def test_every_code_of_the_small_dtypes_is_read_as_torch_reads_it() -> None:
    from ckpt.loader.statistics import decode

    codes = torch.arange(256, dtype=torch.uint8)
    for name in (one for one in DTYPES if one.startswith("float8")):
        found = decode(codes.numpy().data, name).astype(numpy.float64)
        wanted = codes.view(getattr(torch, name)).to(torch.float64).numpy()
        numpy.testing.assert_array_equal(found, wanted, err_msg=name)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    for name in ("float16", "bfloat16"):
        raw = every.view(torch.uint8).numpy().data
        wanted = every.view(getattr(torch, name)).to(torch.float64).numpy()
        numpy.testing.assert_array_equal(decode(raw, name), wanted)
    halves = decode(memoryview(bytes([0x72, 0xF9])), "float4_e2m1fn_x2")
    assert halves.tolist() == [1.0, 6.0, -0.5, -6.0]


def test_elements_that_are_no_numbers_are_counted_and_left_out(repo: ckpt.Repository) -> None:
    nan, inf = math.nan, math.inf
    found = measure(repo, torch.tensor([3.0, nan, nan, 1.0, inf, 4.0]),
                    torch.tensor([3.0, nan, 2.0, nan, inf, 5.0]))  # fmt: skip
    assert (found.nans, found.infinities) == ((2, 2), (1, 1))
    assert found.norms == (5.0, pytest.approx(math.sqrt(34)))
    assert (found.difference, found.largest, found.changed) == (1.0, 1.0, 3)


def test_the_largest_difference_of_whole_numbers_is_exact(repo: ckpt.Repository) -> None:
    small, large = -(2**63), 2**63 - 1
    assert measure(repo, torch.tensor([small]), torch.tensor([large])).largest == 2**64 - 1
    assert measure(repo, torch.tensor([2**60]), torch.tensor([2**60 + 1])).largest == 1


def test_a_cast_is_compared_by_value(repo: ckpt.Repository) -> None:
    before = torch.tensor([1.0, math.nan, 1 / 3])
    found = measure(repo, before, before.bfloat16())
    assert found.changed == 1
    assert found.largest == pytest.approx((before[2] - before[2].bfloat16()).abs().item())


def test_a_share_too_large_for_a_number_is_unknown(repo: ckpt.Repository) -> None:
    repo.push({"a.w": torch.full((4,), 1e-160, dtype=torch.float64)}, "before")
    repo.push({"a.w": torch.full((4,), 1e150, dtype=torch.float64)}, "after")
    (layer,) = repo.diff("before", "after", stats=True).layers()
    assert (layer.changed_bytes, layer.relative) == (32, None)


def test_tensors_of_other_shapes_have_their_norms_alone(repo: ckpt.Repository) -> None:
    found = measure(repo, torch.ones(4), torch.ones(3, 3))
    assert found.norms == (2.0, 3.0)
    assert (found.difference, found.largest, found.cosine, found.changed) == (None,) * 4


def test_nothing_has_no_angle(repo: ckpt.Repository) -> None:
    found = measure(repo, torch.zeros(3), torch.ones(3))
    assert (found.cosine, found.difference) == (None, pytest.approx(math.sqrt(3)))
    assert measure(repo, torch.zeros(0, 2), torch.zeros(0, 2)) is None


def test_only_the_changed_tensors_are_read_each_chunk_once(repo: ckpt.Repository) -> None:
    same, old, new = torch.rand(4000), torch.rand(1000), torch.rand(1000)
    repo.push({"same": same, "changed": old, "tied": old, "removed": torch.rand(500)}, "before")
    repo.push({"same": same, "changed": new, "tied": new, "added": torch.rand(700)}, "after")
    with reads() as counted:
        found = repo.diff("before", "after", stats=True)
    assert sum(counted) == 2 * 4000
    assert [one.name for one in found.tensors if one.statistics] == ["changed"]


def test_a_large_tensor_is_compared_in_bounded_memory(repo: ckpt.Repository) -> None:
    number = 5 * CHUNK_BYTES // 4 + 1000
    before = torch.arange(number, dtype=torch.float32)
    after = before.clone()
    after[-1] += 4096
    repo.push({"w": before}, "before", compress="none")
    repo.push({"w": after}, "after", compress="none")
    (one,) = repo.diff("before", "after").tensors
    assert (one.nbytes, one.changed_bytes) == (4 * number, 4000)
    tracemalloc.start()
    try:
        with reads() as counted:
            found = repo.diff("before", "after", stats=True).tensors[0].statistics
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found is not None
    assert (found.changed, found.largest) == (1, 4096.0)
    assert found.norms[0] == pytest.approx(before.double().norm().item())
    assert sum(counted) == 4 * number + 4000  # what both have is read once
    assert peak < 64 << 20


def test_dtypes_of_other_sizes_are_walked_side_by_side(repo: ckpt.Repository) -> None:
    number = CHUNK_BYTES // 2 + 12345  # three chunks of float32, two of bfloat16
    before = torch.arange(number) % 251
    repo.push({"w": before.float()}, "before", compress="none")
    repo.push({"w": (before + (before == 7)).bfloat16()}, "after", compress="none")
    with reads() as counted:
        found = repo.diff("before", "after", stats=True).tensors[0].statistics
    assert found is not None
    assert found.changed == int((before == 7).sum())
    assert found.difference == pytest.approx(math.sqrt(found.changed))
    assert sum(counted) == 6 * number  # a chunk of the smaller dtype is kept for the next pieces
