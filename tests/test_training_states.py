"""Whole training states: optimizers, schedulers, scalers, random states; and the chapter's files."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn, optim
from torch.optim import lr_scheduler

import ckpt

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "ASGD": lambda p: optim.ASGD(p),
    "Adadelta": lambda p: optim.Adadelta(p),
    "Adafactor": lambda p: optim.Adafactor(p),
    "Adagrad": lambda p: optim.Adagrad(p),
    "Adam": lambda p: optim.Adam(p, amsgrad=True),
    "AdamW": lambda p: optim.AdamW(p),
    "Adamax": lambda p: optim.Adamax(p),
    "LBFGS": lambda p: optim.LBFGS(p, max_iter=3),
    "Muon": lambda p: optim.Muon([one for one in p if one.dim() == 2]),
    "NAdam": lambda p: optim.NAdam(p),
    "RAdam": lambda p: optim.RAdam(p),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: optim.Rprop(p),
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}
SCHEDULERS: dict[str, Callable[[optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3, 3]),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.PolynomialLR(o)], [2]
    ),
}


def equal(one: Any, other: Any) -> bool:
    """Equal, with equal types all the way down."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (torch.Tensor, numpy.ndarray)):
        same_kind: bool = one.dtype == other.dtype and one.shape == other.shape
        return same_kind and numpy.asarray(one).tobytes() == numpy.asarray(other).tobytes()
    if isinstance(one, torch.Generator):
        return torch.equal(one.get_state(), other.get_state())
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def train(net: nn.Module, optimizer: optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        x = torch.full((4, 3), 0.1 * (step + 1))

        def closure(x: torch.Tensor = x) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = net(x).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_bit_for_bit(repo: ckpt.Repository, name: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5, bias=name != "Muon"), nn.Linear(5, 2, bias=name != "Muon"))
    optimizer = OPTIMIZERS[name](list(net.parameters()))
    train(net, optimizer, 3)
    other = copy.deepcopy(net)
    repo.push({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, name)
    pulled = repo.pull(name)
    assert equal(pulled["optimizer"], optimizer.state_dict())
    resumed = OPTIMIZERS[name](list(other.parameters()))
    other.load_state_dict(pulled["net"])
    resumed.load_state_dict(pulled["optimizer"])
    train(net, optimizer, 3)
    train(other, resumed, 3)
    assert equal(net.state_dict(), other.state_dict())


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_goes_on_where_it_was(repo: ckpt.Repository, name: str) -> None:
    def make() -> tuple[optim.Optimizer, Any]:
        optimizer = optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, SCHEDULERS[name](optimizer)

    def advance(optimizer: optim.Optimizer, scheduler: Any) -> list[float]:
        rates = []
        for _ in range(4):
            optimizer.step()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # SequentialLR's own step(epoch)
                scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = make()
    advance(optimizer, scheduler)
    repo.push({"o": optimizer.state_dict(), "s": scheduler.state_dict()}, name)
    pulled = repo.pull(name)
    assert equal(pulled["s"], scheduler.state_dict())
    other, resumed = make()
    other.load_state_dict(pulled["o"])
    resumed.load_state_dict(pulled["s"])
    assert advance(other, resumed) == advance(optimizer, scheduler)


def test_a_grad_scaler_comes_back(repo: ckpt.Repository) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = optim.SGD([weight])
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)

    def step(scaler: torch.amp.GradScaler, loss: torch.Tensor) -> float:
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale()

    step(scaler, weight.sum())
    repo.push(scaler.state_dict(), "scaler")
    pulled = repo.pull("scaler")
    assert equal(pulled, scaler.state_dict())
    resumed = torch.amp.GradScaler("cpu")
    resumed.load_state_dict(pulled)
    assert step(resumed, weight.sum()) == step(scaler, weight.sum()) == 2048.0


def test_random_states_go_on_where_they_were(repo: ckpt.Repository) -> None:
    generator = numpy.random.default_rng(3)
    legacy = numpy.random.RandomState(4)
    state = {
        "python": random.getstate(),
        "numpy": legacy.get_state(),
        "generator": generator.bit_generator.state,
        "torch": torch.get_rng_state(),
        "own": torch.Generator().manual_seed(6),
    }
    repo.push(state, "rng")
    wanted = [random.random(), legacy.random(), generator.random(), torch.rand(3).tolist()]
    pulled = repo.pull("rng")
    assert equal(pulled, state)
    random.setstate(pulled["python"])
    legacy.set_state(pulled["numpy"])
    generator.bit_generator.state = pulled["generator"]
    torch.set_rng_state(pulled["torch"])
    assert wanted == [random.random(), legacy.random(), generator.random(), torch.rand(3).tolist()]


PULLING = """
import sys, torch, ckpt
from collections import OrderedDict
with ckpt.open(sys.argv[1], create=False) as repo:
    x, pair, named, params, views = (
        repo.pull(name) for name in ("x", "pair", "named", "params", "views")
    )
assert type(x) is torch.Tensor and torch.equal(x, torch.arange(4))
assert type(pair) is list and torch.equal(pair[0], x) and torch.equal(pair[1], torch.zeros(4))
assert type(named) is dict and list(named) == ["x", "y"] and torch.equal(named["x"], x)
assert type(params) is OrderedDict and list(params) == ["weight", "bias"]
assert params["weight"].shape == (2, 3) and not params["weight"].requires_grad
views[0][1] = 42.0
assert views[1].tolist() == [42.0, 2.0]
"""


def test_the_chapters_files_come_back_equal_in_another_process(
    repo: ckpt.Repository,
) -> None:
    x, y = torch.arange(4), torch.zeros(4)
    whole = torch.arange(3.0)
    repo.push(x, "x")
    repo.push([x, y], "pair")
    repo.push({"x": x, "y": y}, "named")
    repo.push(nn.Linear(3, 2).state_dict(), "params")
    repo.push([whole, whole[1:]], "views")
    folder = Path(repo.location.root)
    subprocess.run([sys.executable, "-c", PULLING, str(folder)], check=True, env=os.environ)
