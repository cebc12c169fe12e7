"""A run refuses to resume what does not fit, also where torch alone would take it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckpt
from ckpt.core.errors import CkptWarning, IntegrityError, UsageError


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
    with ckpt.Run(repo, "gpt", name="gives", quiet=True) as job:
        job.track(other=nn.Linear(1, 1), net=Gives()).save(0)
    with (
        ckpt.Run(repo, "gpt", name="gives", quiet=True) as job,
        pytest.raises(IntegrityError, match=r"saved \[3, 3\], model \[3, 2\]"),
    ):
        job.track(other=other, net=Gives(size=2)).resume()
    assert torch.equal(other.weight, before)


def test_another_scheduler_is_refused(repo: ckpt.Repository) -> None:
    net = nn.Linear(2, 2)
    opt = torch.optim.SGD(net.parameters())
    kinds = torch.optim.lr_scheduler
    with run(repo) as job:
        job.track(net=net, opt=opt, sched=kinds.StepLR(opt, 2)).save(0)
    with run(repo) as job, pytest.raises(IntegrityError, match="state of StepLR, the") as caught:
        job.track(net=net, opt=opt, sched=kinds.CosineAnnealingLR(opt, 7)).resume()
    assert caught.value.code == "scheduler-differs"


def prepared(*given: Any) -> dict[str, Any]:
    """What Accelerate makes of an optimizer and a scheduler."""
    opt, sched = Accelerator(cpu=True).prepare(*given)
    return {"opt": opt, "sched": sched}


def test_another_optimizer_or_scheduler_is_refused_also_below_the_wrappers_of_accelerate(
    repo: ckpt.Repository,
) -> None:
    net, kinds = nn.Linear(3, 3), torch.optim.lr_scheduler
    net(torch.ones(3)).sum().backward()
    opt = torch.optim.AdamW(net.parameters())
    parts = prepared(opt, kinds.StepLR(opt, 2))
    parts["opt"].step()
    with run(repo) as job:
        job.track(net=net, **parts).save(0)
    plain = torch.optim.AdamW(net.parameters())
    with run(repo) as job:
        assert job.track(net=net, opt=plain, sched=kinds.StepLR(plain, 2)).resume() == 1
    assert str(plain.state_dict()) == str(opt.state_dict())
    other = torch.optim.Adam(net.parameters())
    with run(repo) as job, pytest.raises(IntegrityError, match="there is Adam"):
        job.track(net=net, **prepared(other, kinds.StepLR(other, 2))).resume()
    with run(repo) as job, pytest.raises(IntegrityError, match="there is ExponentialLR"):
        job.track(net=net, **prepared(plain, kinds.ExponentialLR(plain, 0.9))).resume()


@pytest.mark.parametrize("step", [numpy.int64(3), torch.tensor(3)])
def test_a_step_may_be_a_number_of_numpy_or_a_tensor(repo: ckpt.Repository, step: Any) -> None:
    with run(repo) as job:
        job.track(net=nn.Linear(1, 1)).save(step)
    assert repo.get("gpt").step == 3


@pytest.mark.parametrize("step", [2.0, True, "3", torch.tensor(2.5), numpy.bool_(True), -1])
def test_what_is_no_whole_number_is_no_step(repo: ckpt.Repository, step: Any) -> None:
    with run(repo) as job, pytest.raises(UsageError) as caught:
        job.track(net=nn.Linear(1, 1)).save(step)
    assert caught.value.code == "step-invalid"


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_is_sharded_is_refused_with_the_way_to_save_it(
    repo: ckpt.Repository, alone: None
) -> None:
    sharded = nn.Linear(4, 4)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with run(repo) as job, pytest.raises(UsageError, match=r"ckpt\.dcp_writer"):
        job.track(net=sharded)
