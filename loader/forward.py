"""One forward of a module on recorded inputs: isolated, seeded, its results by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckpt.core.digests import digest_of
from ckpt.core.errors import UsageError
from ckpt.loader.conditions import isolated, random_states
from ckpt.loader.outputs import (
    Results,
    all_equal,
    named_tensors,
    plain_difference,
    root_mean_square,
)
from ckpt.loader.sources import MemoryTensor

Inputs = tuple[Any, ...] | dict[str, Any]
Outputs = dict[str, torch.Tensor]
# Path, digest of its first output, that output's root mean square; in the order of finishing.
Children = tuple[tuple[str, str, float], ...]


@dataclass(frozen=True, slots=True)
class Run:
    """What a forward gave, tensors and plain values, whether it asked a global generator for
    numbers, and what of its result nobody can look into."""

    outputs: Outputs
    random: bool
    plain: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def gave_same(self, other: Run) -> bool:
        """Whether another forward gave the same, to the last bit."""
        if not all_equal(self.outputs, other.outputs):
            return False
        return not plain_difference(self.plain, other.plain)


def check_inputs(inputs: Any) -> Inputs:
    """Refuse what is neither positional nor keyword arguments; UsageError ``inputs-invalid``."""
    if isinstance(inputs, tuple):
        return inputs
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        return dict(inputs)
    raise UsageError(
        "inputs-invalid",
        f"inputs is of type {type(inputs).__name__}",
        hint="give a tuple of arguments, inputs=(x,), or a dict of keyword arguments",
    )


def run_forward(module: nn.Module, inputs: Inputs, seed: int, devices: Sequence[str]) -> Run:
    """Call the module; whatever it raises comes through."""
    with isolated(seed, devices):
        before = random_states()
        result = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
        asked = random_states() != before
    results = Results()
    results.collect(result)
    return Run(results.tensors, asked, results.plain, tuple(results.skipped))


def run_children(module: nn.Module, inputs: Inputs, seed: int, devices: Sequence[str]) -> Children:
    """Call the module, and tell what each submodule gave first.

    Hooks change the path that some modules take, so nothing else is read off this run; of one that
    does not run with them, nothing.
    """
    found: dict[str, tuple[str, float]] = {}

    def note(path: str, result: Any) -> None:
        for tensor in named_tensors(result).values():
            if path not in found:
                found[path] = (digest_of(_bytes_of(tensor)), root_mean_square(tensor))

    handles = [
        child.register_forward_hook(lambda _, __, result, path=path: note(path, result))
        for path, child in module.named_modules()
        if path
    ]
    try:
        run_forward(module, inputs, seed, devices)
    except Exception:  # noqa: BLE001 -- user code, which ran without hooks
        return ()
    finally:
        for handle in handles:
            handle.remove()
    return tuple((path, digest, size) for path, (digest, size) in found.items())


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    source = MemoryTensor("", "", tensor)
    return source.read(0, source.nbytes)


def used_devices(devices: Sequence[str]) -> tuple[str, list[str]]:
    """The device whose conditions count, an accelerator before the CPU, and all of them."""
    known = sorted(set(devices)) or ["cpu"]
    return next((device for device in known if device != "cpu"), "cpu"), known
