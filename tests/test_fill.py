"""A module of one's own is filled strictly: wholly, or not at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ckpt
from ckpt.core.errors import CkptWarning, IntegrityError, UsageError

pytestmark = pytest.mark.usefixtures("proven_here")


class Counting(nn.Module):
    """Has a state beside its tensors."""

    def __init__(self, count: int = 0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), float(count)))
        self.count = count

    def get_extra_state(self) -> dict[str, int]:
        return {"count": self.count}

    def set_extra_state(self, state: Any) -> None:
        self.count = state["count"]


def two() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return two()


def overlapping() -> nn.Module:
    net = two()
    net[1].weight = nn.Parameter(torch.ones(1, 2).expand(2, 2))
    return net


def in_inference_mode() -> nn.Module:
    net = two()
    with torch.inference_mode():
        net[1] = nn.Linear(2, 2)
    return net


@pytest.mark.parametrize("made", [on_meta, overlapping, in_inference_mode])
def test_a_module_that_cannot_be_written_to_is_refused_unchanged(
    repo: ckpt.Repository, made: Callable[[], nn.Module]
) -> None:
    repo.push(two(), "net")
    net = made()
    before = net.get_parameter("0.weight").clone()
    with pytest.raises(IntegrityError) as caught:
        repo.load_into(net, "net")
    assert caught.value.code == "not-writable"
    after = net.get_parameter("0.weight")
    assert after.is_meta or torch.equal(after, before)


def test_what_is_pulled_of_a_module_is_what_its_state_dict_gives(repo: ckpt.Repository) -> None:
    net = two()
    net[1].weight = net[0].weight
    repo.push(net, "net")
    for pulled in (repo.pull("net"), repo.pull("net", tensors="*")):
        assert {type(one) for one in pulled.values()} == {torch.Tensor}
        assert pulled["0.weight"] is pulled["1.weight"]
        pulled["0.weight"].mul_(2)  # which a parameter would refuse
        assert torch.equal(pulled["1.weight"], net.get_parameter("0.weight") * 2)


def test_copies_of_a_tied_weight_are_one_when_their_bits_are(repo: ckpt.Repository) -> None:
    net = two()
    net.get_parameter("0.weight").data[0, 0] = math.nan
    net.get_parameter("1.weight").data.copy_(net.get_parameter("0.weight"))
    repo.push(net, "net")
    tied = two()
    tied[1].weight = tied[0].weight
    assert repo.load_into(tied, "net").verdict == "weights"
    assert tied.get_parameter("0.weight").isnan().sum() == 1
    net.get_parameter("1.weight").data[1, 1] += 1
    repo.push(net, "net")
    with pytest.raises(IntegrityError) as caught:
        repo.load_into(tied, "net")
    assert caught.value.code == "ties-differ"


class Transposing(nn.Module):
    """Its state_dict() has another tensor than it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(2, 3))

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}turned"] = self.weight.detach().t().contiguous()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        self.weight.data.copy_(state_dict[f"{prefix}turned"].t())


class Detaching(nn.Module):
    """Its state_dict() has views of what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.plain: list[Any] = [torch.rand(3)]
        self.plain += [self.plain, self.plain]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}plain"] = self.plain[0].detach()


def test_what_a_state_dict_makes_anew_is_not_written_to_and_taken_for_loaded(
    repo: ckpt.Repository,
) -> None:
    saved, net = Transposing(), nn.Sequential(Transposing(), nn.Linear(1, 1))
    repo.push(nn.Sequential(saved, nn.Linear(1, 1)).state_dict(), "net")
    before = [tensor.clone() for tensor in net.parameters()]
    with pytest.raises(IntegrityError, match=r"0\.turned is made anew") as caught:
        repo.load_into(net, "net")
    assert caught.value.code == "not-writable"
    assert all(map(torch.equal, before, net.parameters()))
    net.load_state_dict(repo.pull("net"))  # as the hint says
    assert torch.equal(net.get_parameter("0.weight"), saved.weight)
    assert repo.load_into(net, "net").verdict == "weights"  # there is nothing left to write


def test_views_of_a_modules_own_tensors_are_filled(repo: ckpt.Repository) -> None:
    saved, net = Detaching(), Detaching()
    repo.push(saved.state_dict(), "net")
    repo.load_into(net, "net")
    assert torch.equal(net.plain[0], saved.plain[0])


def tied_by_storage() -> nn.Module:
    net = two()
    net[1].weight.data = net[0].weight.data
    return net


def overlapping_by_storage() -> nn.Module:
    net, memory = two(), torch.zeros(6)
    net[0].weight.data, net[1].weight.data = memory[:4].view(2, 2), memory[2:].view(2, 2)
    return net


@pytest.mark.parametrize("made", [tied_by_storage, overlapping_by_storage])
def test_weights_in_one_memory_get_no_values_that_overwrite_each_other(
    repo: ckpt.Repository, made: Callable[[], nn.Module]
) -> None:
    repo.push(two(), "net")
    net, fitting = made(), made()
    before = [tensor.clone() for tensor in net.parameters()]
    with pytest.raises(IntegrityError, match=r"0\.weight, 1\.weight share memory") as caught:
        repo.load_into(net, "net")
    assert caught.value.code == "ties-differ"
    assert all(map(torch.equal, before, net.parameters()))
    for tensor in fitting.parameters():
        tensor.data.fill_(3)
    repo.push(fitting.state_dict(), "net")
    repo.load_into(net, "net")
    assert all(bool((tensor == 3).all()) for tensor in net.parameters())


def test_weights_between_each_others_elements_are_filled(repo: ckpt.Repository) -> None:
    net, memory = two(), torch.zeros(2, 4)
    net[0].weight.data, net[1].weight.data = memory[:, :2], memory[:, 2:]
    saved = two()
    repo.push(saved, "net")
    repo.load_into(net, "net")
    assert all(map(torch.equal, saved.parameters(), net.parameters()))


@pytest.mark.parametrize("other", [{}, torch.optim.SGD([torch.ones(1)]), nn.Linear])
def test_what_is_no_module_is_refused(repo: ckpt.Repository, other: Any) -> None:
    repo.push(two(), "net")
    with pytest.raises(UsageError, match=f"a {type(other).__name__} is no module") as caught:
        repo.load_into(other, "net")
    assert caught.value.code == "no-module"


def test_an_extra_state_that_was_pushed_comes_back(repo: ckpt.Repository) -> None:
    repo.push(nn.Sequential(Counting(9)).state_dict(), "net")
    inner = Counting()
    repo.load_into(nn.Sequential(inner), "net")
    assert (inner.count, inner.weight.tolist()) == (9, [9.0] * 4)


def test_an_extra_state_that_was_not_pushed_is_named(repo: ckpt.Repository) -> None:
    with pytest.warns(CkptWarning, match="get_extra_state of Counting is not asked"):
        repo.push(Counting(9), "net")
    net = Counting()
    with pytest.warns(CkptWarning, match="the extra state of the module stays as it is"):
        repo.load_into(net, "net")
    assert (net.count, net.weight.tolist()) == (0, [9.0] * 4)
    assert repo.load("net", trust=[Counting]).count == 9
