"""Modules whose forwards behave in every way that a probe has to tell apart."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn


class Counting(nn.Module):
    """Counts its calls even in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return {"y": self.linear(x) * self.calls, "calls": self.calls}


class Caching(nn.Module):
    """Fills a cache on its first call, as timm's levit does."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: dict[str, Tensor] = {}
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if "bias" not in self.cache:
            self.cache["bias"] = self.linear.weight.sum()
        y: Tensor = self.linear(x) + self.cache["bias"]
        return y


class Writing(nn.Module):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(1)


class Unsteady(nn.Module):
    """Gives something else each time, whatever the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        noise = int.from_bytes(os.urandom(2), "little")
        y: Tensor = x * self.weight + noise
        return y


class Noisy(nn.Module):
    """Draws from all three global generators."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(3) + random.random() + float(numpy.random.random())


class Scaled(nn.Module):
    """Its code may change after the push."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        self.tail = Tail()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.tail(self.net(x))
        return y


class Tail(nn.Module):
    """The child whose code changes."""

    def forward(self, x: Tensor) -> Tensor:
        return x * Scaled.factor


class LargestOf(nn.Module):
    """Whole numbers and a nested result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)

    def forward(self, x: Tensor, *, times: int) -> Any:
        y = self.linear(x) * times
        return {"logits": (y, [y.argmax(-1)]), "none": None, "count": times, "text": "x"}


class MakesTensors(nn.Module):
    """Its result depends on the default dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.ones(2)


class Hookless(nn.Module):
    """Counts on being alone with its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        if self.layer._forward_hooks:
            raise RuntimeError("somebody listens")
        return self.layer(x)  # type: ignore[no-any-return]


class Forgetting(nn.Module):
    """Scales by what its state does not have, and counts in secret."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.calls = 3.0, 0
        self.seen: dict[str, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "gain": 1.0, "calls": 0, "seen": {}}

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen["x"] = self.calls
        return x * self.gain


@dataclass(slots=True)
class Slotted:
    """A result without a dict."""

    logits: Tensor
    rest: list[int]


class Hiding(nn.Module):
    """Gives a tensor, and what nobody can look into."""

    def forward(self, x: Tensor) -> dict[str, Any]:
        return {"y": x, "hidden": (x for _ in ()), "some": {x}, "who": self, "name": "y"}


class Naming(nn.Module):
    """Gives words and other plain values beside a tensor; some of them may be lost, or change."""

    extra: Any = None

    def __init__(self, label: str) -> None:
        super().__init__()
        self.label = label

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "label": "cat"}

    def forward(self, x: Tensor) -> dict[str, Any]:
        words = numpy.array(["a", "b"])
        plain = {"label": self.label, "raw": b"\0", "none": None, "large": 1 << 70}
        return {"y": x, "words": words, "back": words[::-1], **plain, "extra": Naming.extra}


class Timing(nn.Module):
    """Gives another text each time."""

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, os.urandom(1 + os.urandom(1)[0] % 8).hex()


class Marked(Tensor):
    """A tensor of another class."""


class Dispatched(Tensor):
    """A tensor whose class decides what is done with it."""

    @classmethod
    def __torch_dispatch__(cls, function: Any, *given: Any) -> Any:
        _, args, kwargs = given
        return function(*args, **(kwargs or {}))


class Giving(nn.Module):
    """Gives a tensor, and what was made of it."""

    def __init__(self, made: Any) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor) -> Any:
        return x * 2, self.made(x)


def as_marked(x: Tensor) -> Tensor:
    """A tensor of another class, of the same values."""
    return x.as_subclass(Marked)


def as_dispatched(x: Tensor) -> Tensor:
    """A tensor that only its class can read."""
    return x.as_subclass(Dispatched)


def as_quantised(x: Tensor) -> Tensor:
    """A quantised tensor."""
    return torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)


def as_nested(x: Tensor) -> Tensor:
    """Rows of several lengths."""
    return torch.nested.nested_tensor([x[0], x[1, :2]], layout=torch.jagged)


def as_shape(x: Tensor) -> Tensor:
    """A shape without values."""
    return x.to("meta")


def double(x: Tensor) -> Tensor:
    """Twice as much."""
    return x * 2
