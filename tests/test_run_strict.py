"""A run refuses to resume what does not fit, also where torch alone would take it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ckpt
from ckpt.core.errors import CkptWarning, IntegrityError


def run(repo: ckpt.Repository) -> ckpt.Run:
    return ckpt.Run(repo, "gpt", quiet=True)


def stepped(*given: Any) -> torch.optim.Adam:
    """An optimizer with moments."""
    for one in given:
        (one[1] if isinstance(one, tuple) else one).grad = torch.ones(3)
    optimizer = torch.optim.Adam(given)
    optimizer.step()
    return optimizer


def pair(kind: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(3, dtype=kind)) for _ in range(2)]


def test_a_changed_order_is_refused_by_the_names_that_the_optimizer_was_given(
    repo: ckpt.Repository,
) -> None:
    first, second = pair()
    with run(repo) as job:
        job.track(opt=stepped(("first", first), ("second", second))).save(0)
    with run(repo) as job:
        assert job.track(opt=torch.optim.Adam([("first", first), ("second", second)])).resume() == 1
    with run(repo) as job, pytest.raises(IntegrityError, match="is of first") as caught:
        job.track(opt=torch.optim.Adam([("second", second), ("first", first)])).resume()
    assert caught.value.code == "parameters-differ"


def test_where_no_name_is_known_the_place_counts_and_a_warning_says_so(
    repo: ckpt.Repository,
) -> None:
    with run(repo) as job:
        job.track(opt=stepped(*pair())).save(0)
    with run(repo) as job, pytest.warns(CkptWarning, match="their order is not checked"):
        assert job.track(opt=torch.optim.Adam(pair())).resume() == 1
    with (
        run(repo) as job,
        pytest.warns(CkptWarning),
        pytest.raises(IntegrityError, match="float16"),
    ):
        job.track(opt=torch.optim.Adam(pair(torch.float16))).resume()


class Gives(nn.Module):
    """Gives its state in a way of its own, and takes it as torch does."""

    def __init__(self, size: int = 3, kind: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.layer = nn.Linear(size, 3, dtype=kind)

    def state_dict(self, *given: Any, **named: Any) -> Any:
        return super().state_dict(*given, **named)


class Takes(Gives):
    """Also takes it in a way of its own."""

    def load_state_dict(self, state_dict: Any, *given: Any, **named: Any) -> Any:
        fitting = {
            name: value[:, : self.layer.in_features]
            for name, value in state_dict.items()
            if value.dim() == 2
        }
        return super().load_state_dict({**state_dict, **fitting}, *given, **named)


@pytest.mark.parametrize("kind", [Gives, Takes])
def test_a_cast_is_refused_also_of_a_module_that_restores_itself(
    repo: ckpt.Repository, kind: type[Gives]
) -> None:
    with run(repo) as job:
        job.track(net=kind()).save(0)
    with (
        run(repo) as job,
        pytest.raises(IntegrityError, match=r"net: layer\.\w+ saved torch.float32"),
    ):
        job.track(net=kind(kind=torch.bfloat16)).resume()


def test_another_shape_is_refused_unless_the_module_makes_something_of_it(
    repo: ckpt.Repository,
) -> None:
    with run(repo) as job:
        job.track(net=Takes()).save(0)
    with run(repo) as job:
        assert job.track(net=Takes(size=2)).resume() == 1
    other = nn.Linear(1, 1)
    before = other.weight.clone()
    with run(repo) as job:
        job.track(other=nn.Linear(1, 1), net=Gives()).save(0)
    with run(repo) as job, pytest.raises(IntegrityError, match=r"saved \[3, 3\], model \[3, 2\]"):
        job.track(other=other, net=Gives(size=2)).resume()
    assert torch.equal(other.weight, before)
