"""What a forward gave: what has a name, what nobody can look into, and when it is close."""

from __future__ import annotations

from collections import UserList, deque
from typing import Any

import numpy
import pytest
import torch
from probed_models import (
    Giving,
    Hiding,
    Slotted,
    as_dispatched,
    as_marked,
    as_nested,
    as_quantised,
    as_shape,
)
from torch import Tensor

import ckpt
from ckpt.loader.outputs import compare, named_tensors

TRUST = ["probed_models"]


def compared(old: Tensor, new: Tensor, reference: Tensor | None = None) -> Any:
    return compare("output", old, new, reference, across=False)


def test_noise_is_close_and_damage_is_not() -> None:
    torch.manual_seed(0)
    exact = torch.randn(1000, dtype=torch.float64)
    old = exact.float()
    noise = old + 1e-7 * torch.randn(1000)
    damage = old * 1.001
    assert compared(old, noise, exact).close
    assert not compared(old, damage, exact).close
    assert not compared(old, damage).close


def test_small_outputs_are_judged_by_their_own_size() -> None:
    old = torch.full((20,), 1e-6)
    assert not compared(old, old * 1.01).close


@pytest.mark.parametrize("fill", [-1e9, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("masked", [2, 50, 95])
@pytest.mark.parametrize("across", [False, True])
def test_masked_values_excuse_no_other_change(fill: float, masked: int, across: bool) -> None:
    torch.manual_seed(0)
    exact = torch.randn(100, dtype=torch.float64)
    exact[:masked] += fill
    old = exact.float()
    noise, damage, other = old * (1 - 1e-7 * torch.rand(100)), old.clone(), old.clone()
    damage[masked:] *= 1.01
    other[0] *= 1.01
    for reference in (exact, None):
        found = [
            compare("output", old, new, reference, across=across).close
            for new in (noise, damage, other)
        ]
        assert found == [True, False, False]


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_must_be_the_same(special: float) -> None:
    old = torch.tensor([1.0, special])
    assert compared(old, old.clone()).equal
    assert not compared(old, torch.tensor([1.0, 2.0])).close
    assert not compared(torch.tensor([1.0, 2.0]), old).close


def test_whole_numbers_and_zeros_of_another_sign_differ() -> None:
    assert not compared(torch.tensor([1, 2]), torch.tensor([1, 3])).close
    assert not compared(torch.tensor([0.0]), torch.tensor([-0.0])).equal
    assert not compared(torch.ones(2), torch.ones(2).double()).close
    assert not compared(torch.ones(2), torch.ones(3)).close


def test_results_of_any_form_have_names() -> None:
    class Result:
        def __init__(self) -> None:
            self.cache = [torch.ones(1)]
            self.itself = self

    found = named_tensors((torch.ones(2), {"a": numpy.ones(2), "b": None}, Result(), 1.5))
    assert sorted(found) == ["output.0", "output.1.a", "output.2.cache.0", "output.3"]


def test_results_in_any_container_are_compared() -> None:
    found = named_tensors(
        (
            deque([torch.ones(1)]),
            Slotted(torch.ones(1), [2]),
            {3, 1},
            UserList([True]),
            range(2),
        )
    )
    assert sorted(found) == [
        *("output.0.0", "output.1.logits", "output.1.rest.0", "output.2.0", "output.2.1"),
        *("output.3.0", "output.4.0", "output.4.1"),
    ]


@pytest.mark.usefixtures("proven_here")
def test_what_nobody_can_look_into_is_named_at_the_push_and_in_the_report(
    repo: ckpt.Repository,
) -> None:
    with pytest.warns(ckpt.CkptWarning) as said:
        repo.push(Hiding(), "m", inputs=(torch.ones(2),))
    hidden = ["output.hidden (a generator)", "output.some (a set)", "output.who (a Hiding)"]
    assert [str(one.message) for one in said] == [
        f"{name} cannot be looked into: it is not compared" for name in hidden
    ]
    report = repo.verify("m", trust=TRUST)
    assert (report.verdict, report.reason) == (
        "outputs-exact",
        f"not compared: {', '.join(hidden)}",
    )


@pytest.mark.usefixtures("proven_here")
@pytest.mark.parametrize("made", [as_quantised, as_marked])
def test_tensors_of_other_kinds_are_compared_by_their_values(
    repo: ckpt.Repository, made: Any
) -> None:
    repo.push(Giving(made), "m", inputs=(torch.rand(2, 3),))
    report = repo.verify("m", trust=TRUST)
    assert [output.name for output in report.outputs] == ["output.0", "output.1"]
    assert (report.verdict, report.reason) == ("outputs-exact", "")


@pytest.mark.usefixtures("proven_here")
@pytest.mark.parametrize(
    ("made", "kind"),
    [(as_nested, "NestedTensor"), (as_shape, "Tensor"), (as_dispatched, "Dispatched")],
)
def test_a_tensor_whose_values_nobody_can_read_is_named_and_the_others_compared(
    repo: ckpt.Repository, made: Any, kind: str
) -> None:
    with pytest.warns(ckpt.CkptWarning, match=rf"output\.1 \(a {kind}\) cannot be looked into"):
        repo.push(Giving(made), "m", inputs=(torch.rand(2, 3),))
    report = repo.verify("m", trust=TRUST)
    assert (report.verdict, report.reason) == (
        "outputs-exact",
        f"not compared: output.1 (a {kind})",
    )


def test_results_whose_keys_read_alike_all_have_names() -> None:
    alike = {1: torch.tensor(1), "1": torch.tensor(2), "a": {"b": 3}, "a.b": 4}
    found = named_tensors(alike)
    assert {name: int(value) for name, value in found.items()} == {
        "output.1": 1,
        "output.1#2": 2,
        "output.a.b": 3,
        "output.a.b#2": 4,
    }
