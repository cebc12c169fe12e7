"""Modules that keep more than parameters: every kind of attribute, and what must be refused."""

from __future__ import annotations

import functools
import math
import threading
from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum
from typing import Any, Self

import numpy
import torch
from torch import Tensor, nn
from torch.nn import functional


class Mode(Enum):
    """An enumeration."""

    FAST = 1
    SLOW = 2


@dataclass
class Settings:
    """A plain object."""

    width: int
    scale: Tensor


def double(x: Tensor) -> Tensor:
    """A named function."""
    return x * 2


class Keeping(nn.Module):
    """Has an attribute of every kind that can be stored."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("missing", None)
        self.register_parameter("absent", None)
        self.mode = Mode.SLOW
        self.settings = Settings(3, torch.ones(3))
        self.function = double
        self.activation = functional.gelu
        self.rounding = functools.partial(double)
        self.kind = nn.Linear
        self.floats = [math.inf, -math.inf, -0.0, 1e-300]
        self.numbers = {1: 2**80, "two": complex(1, -2), (3, 4): {5, 6}}
        self.array = numpy.arange(3, dtype=numpy.int16)
        self.scalar = numpy.float32(0.1)
        self.dtype, self.device, self.size = torch.bfloat16, torch.device("cpu"), torch.Size([1])
        self.ordered = OrderedDict(b=1, a=2)
        self.part = slice(1, None, 2)
        self.hidden = [nn.Linear(2, 2), (nn.ReLU(), {"x": nn.Tanh()})]
        self.same = self.linear.weight
        self.view = self.linear.weight.detach()[0]
        self.generator = torch.Generator().manual_seed(3)
        self.nan = math.nan

    def forward(self, x: Tensor) -> Tensor:
        layer: Any = self.hidden[0]
        noise = torch.rand(2, generator=self.generator)
        y: Tensor = self.function(self.activation(layer(self.linear(x)))) + noise
        return y * self.settings.scale[0]


class Backward(nn.Module):
    """Its child knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(2, 2)
        self.child.owner = [self]  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.child(x)
        return y


class NeedsArguments(nn.Module):
    """Cannot be made without arguments."""

    def __new__(cls, width: int) -> Self:
        return super().__new__(cls)

    def __init__(self, width: int) -> None:
        super().__init__()


class Locking(nn.Module):
    """Has a lock, which no checkpoint can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.lock: Any = threading.Lock()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


class LockingAgain(Locking):
    """Makes its lock when it is restored."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, "lock": threading.Lock()})  # type: ignore[no-untyped-call]


class Strange(nn.Module):
    """Every tensor that a module may hold beside dense ones, as buffers and attributes."""

    def __init__(self) -> None:
        super().__init__()
        base = torch.arange(24, dtype=torch.float32)
        whole = base.view(4, 6)
        self.register_buffer("whole", whole)
        self.register_buffer("row", whole[1])
        self.register_buffer("transposed", torch.rand(3, 4).t())
        self.register_buffer("expanded", torch.rand(3, 1).expand(3, 4))
        self.register_buffer(
            "channels", torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
        )
        self.register_buffer("conjugate", torch.rand(3, dtype=torch.complex64).conj())
        self.register_buffer("empty", torch.empty(0, 3))
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.bfloat16))
        self.register_buffer("small", torch.rand(8).to(torch.float8_e4m3fn))
        self.sparse = torch.eye(3).to_sparse()
        self.shared = [torch.from_numpy(numpy.ones(4)), None]
        self.shared[1] = self.shared[0][1:]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        whole: Any = self.whole
        y: Tensor = x + whole[0, :3] + self.sparse.to_dense()[0]
        return y


class Fresh(nn.Module):
    """Gives objects for its state that nothing else refers to."""

    def __init__(self, number: int = 0) -> None:
        super().__init__()
        self.number = number

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "made": Shared(number=self.number)}


class Shared:
    """A plain object that several modules refer to."""

    def __init__(self, **values: Any) -> None:
        vars(self).update(values)


class Delegating(nn.Module):
    """Asks what is inside it for what it has not."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x) * 5
        return y


class OwnPartial(functools.partial[Any]):
    """Does more than a partial."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return 2 * super().__call__(*args, **keywords)


class Passing(nn.Module):
    """Looked at through its __getstate__, its children live only meanwhile."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        self.number = number

    def __getstate__(self) -> dict[str, Any]:
        made = nn.Linear(1, 1, bias=False)
        made.weight.data.fill_(self.number)
        return {**vars(self), "_modules": {"linear": made}}


class Defaulting(nn.Module):
    """Has a class by default, in the place of which it may be given another."""

    norm: Any = nn.LayerNorm

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.norm = norm
        self.layer = self.norm(2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        return y


class Calling(nn.Module):
    """Keeps methods of itself and of a child."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Delegating(nn.Linear(2, 2))
        self.step: Any = self.inner.forward
        self.steps: list[Any] = [self.scale, functools.partial(double)]

    def scale(self, x: Tensor) -> Tensor:
        return x * 3

    @classmethod
    def register(cls) -> None:
        """A method of the class."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.step(x)
        for step in self.steps:
            y = step(y)
        return y


class Listing(nn.Module, list[int]):
    """A module that is a list too."""
