"""What is around a module: taken off where nothing is lost by it, else refused or kept."""

from __future__ import annotations

import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from kept_models import Delegating
from torch import nn
from torch.nn.utils import parametrizations

import ckpt
from ckpt.core.errors import UsageError
from ckpt.loader.snapshot import capture_module

pytestmark = pytest.mark.usefixtures("proven_here")


class WithHead(nn.DataParallel[Any]):
    """Computes more than what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.head = nn.Linear(2, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.module(x))


class OptimizedModule(nn.Module):
    """Has its name from torch, and is none of its."""

    def __init__(self) -> None:
        super().__init__()
        self._orig_mod = nn.Linear(2, 2)
        self.head = nn.Linear(2, 2)


def parallel() -> nn.Module:
    return nn.DataParallel(nn.Linear(2, 2))


def compiled() -> nn.Module:
    made: Any = torch.compile(nn.Linear(2, 2), backend="eager")
    return made  # type: ignore[no-any-return]


def test_what_lightning_notes_of_a_compiled_module_is_no_part_of_it() -> None:
    noted: Any = compiled()
    noted._compile_kwargs = {"backend": lambda graph, inputs: graph}
    assert set(capture_module(noted).modules[0].attrs) == {"in_features", "out_features"}


@pytest.mark.parametrize("make", [parallel, compiled])
def test_a_bare_wrapper_is_taken_off(make: Any) -> None:
    captured = capture_module(make())
    assert [module.reference for module in captured.modules] == ["torch.nn.modules.linear:Linear"]
    assert list(captured.wrappers) == [""]


@pytest.mark.parametrize("make", [parallel, compiled])
def test_a_wrapper_with_something_of_its_own_is_refused_and_says_what_to_push(
    repo: ckpt.Repository, make: Any
) -> None:
    hooked, parameter, buffer, child = (make() for _ in range(4))
    hooked.register_forward_hook(lambda *given: None)
    nn.Module.register_parameter(parameter, "gain", nn.Parameter(torch.ones(1)))
    nn.Module.register_buffer(buffer, "seen", torch.ones(1))
    nn.Module.add_module(child, "head", nn.Linear(2, 3))
    own = {"the forward hooks": hooked, "gain": parameter, "seen": buffer, "head": child}
    for what, net in own.items():
        message = f"0: the wrapper .* does more than .*, by {what}; push the module inside it, net."
        with pytest.raises(UsageError, match=message) as caught:
            repo.push(nn.Sequential(net), "m")
        assert caught.value.code == "cannot-store"


def test_a_subclass_of_a_wrapper_is_not_taken_off(repo: ckpt.Repository) -> None:
    with pytest.raises(UsageError, match=r"WithHead .* by its code, head; .*net\.module"):
        repo.push(WithHead(nn.Linear(2, 2)), "m")


def test_a_class_that_is_only_called_like_a_wrapper_is_kept_whole() -> None:
    captured = capture_module(OptimizedModule())
    assert captured.modules[0].reference.endswith(":OptimizedModule")
    assert {entry.name for entry in captured.tensors} >= {"_orig_mod.weight", "head.weight"}


_SHARDED = """
import sys, ckpt, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}/group", rank=0, world_size=1)
net = nn.Sequential(nn.Linear(2, 2))
fully_shard(net)
try:
    ckpt.open(sys.argv[1]).push(net, "m")
except ckpt.CkptError as error:
    print(error.code, error)
dist.destroy_process_group()
"""


def test_a_module_that_is_sharded_says_to_gather_it_first(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _SHARDED, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.startswith("cannot-store")
    assert "<root>: it is sharded by FSDP; gather it first" in found


@pytest.mark.parametrize("shared", [False, True])
def test_a_wrapper_that_delegates_to_a_parametrized_module_is_none_itself(
    repo: ckpt.Repository, shared: bool
) -> None:
    net: Any = Delegating(parametrizations.weight_norm(nn.Linear(2, 2)))
    if shared:
        net.parametrizations = net.base.parametrizations
    x = torch.rand(1, 2)
    repo.push(net, "m", inputs=(x,))
    loaded: Any = repo.load("m", trust=["kept_models"], require="outputs-exact")
    assert type(loaded) is Delegating
    assert torch.equal(loaded(x), net(x))


def test_a_weak_proxy_is_refused_with_its_path(repo: ckpt.Repository) -> None:
    parent: Any = nn.Sequential(nn.Linear(2, 2))
    vars(parent[0])["parent"] = weakref.proxy(parent)
    message = r'0\.parent: cannot store weakref\.proxy; .*drop=\["0\.parent"\]'
    with pytest.raises(UsageError, match=message):
        repo.push(parent, "m")
