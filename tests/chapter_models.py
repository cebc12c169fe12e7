"""The models of the textbook chapter, importable by the process that pushes and the one that loads."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(20, 256)
        self.out = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.out(functional.relu(self.hidden(x)))
        return y


class MySequential(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        for index, block in enumerate(blocks):
            self._modules[str(index)] = block

    def forward(self, x: Tensor) -> Tensor:
        for block in self._modules.values():
            assert block is not None
            x = block(x)
        return x


class OldSequential(nn.Module):
    """The older edition, which uses the modules themselves as keys."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        for block in blocks:
            self._modules[block] = block  # type: ignore[index]


class FixedHiddenMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rand_weight = torch.rand((20, 20), requires_grad=False)
        self.linear = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = functional.relu(torch.mm(x, self.rand_weight) + 1)
        x = self.linear(x)
        while x.abs().sum() > 1:
            x /= 2
        return x.sum()


class NestMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
        self.linear = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(self.net(x))
        return y


class CenteredLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean()


class MyLinear(nn.Module):
    def __init__(self, in_units: int, units: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(in_units, units))
        self.bias = nn.Parameter(torch.randn(units))

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(torch.matmul(x, self.weight.data) + self.bias.data)


def nested_blocks() -> nn.Sequential:
    """Blocks whose names have spaces."""
    outer = nn.Sequential()
    for index in range(4):
        inner = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.ReLU())
        outer.add_module(f"block {index}", inner)
    return nn.Sequential(outer, nn.Linear(4, 1))


def shared_layer() -> nn.Sequential:
    """One Linear at two places."""
    shared = nn.Linear(8, 8)
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 1)
    )


def tied() -> nn.Sequential:
    """A tie that is made afterwards."""
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    return nn.Sequential(embedding, head)


def zero_small(module: nn.Module) -> None:
    """The chapter's own initialiser."""
    if isinstance(module, nn.Linear):
        nn.init.uniform_(module.weight, -10, 10)
        module.weight.data *= module.weight.data.abs() >= 5


def initialised() -> nn.Sequential:
    """Parameters set in every way that the chapter shows."""
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    net.apply(zero_small)
    first = net[0]
    assert isinstance(first, nn.Linear)
    first.weight.data[:] += 1
    first.weight.data[0, 0] = 42
    return net


def cases() -> dict[str, tuple[nn.Module, Tensor]]:
    """Every model of the chapter that has outputs, with an input."""
    x20, x4 = torch.rand(2, 20), torch.rand(2, 4)
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU())
    lazy(x4)
    return {
        "a": (nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 10)), x20),
        "b": (MLP(), x20),
        "c": (MySequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 10)), x20),
        "d": (FixedHiddenMLP(), x20),
        "e": (nn.Sequential(NestMLP(), nn.Linear(16, 20), FixedHiddenMLP()), x20),
        "f": (nested_blocks(), x4),
        "g-shared": (shared_layer(), x4),
        "g-tied": (tied(), torch.tensor([[1, 2, 3]])),
        "h-after": (lazy, x4),
        "i": (nn.Sequential(nn.Linear(4, 8), CenteredLayer()), x4),
        "j": (nn.Sequential(MyLinear(4, 8), MyLinear(8, 1)), x4),
        "k": (initialised(), x4),
    }
