"""The states of the random number generators that a training loop draws from."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def random_states() -> dict[str, Any]:
    """Those of Python, NumPy where it is loaded, torch on the CPU and on each GPU in use."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if "numpy" in sys.modules:
        import numpy

        states["numpy"] = numpy.random.get_state(legacy=False)
        if states["numpy"]["bit_generator"] == "MT19937":
            name, keys, *rest = numpy.random.get_state(legacy=True)
            # Not as an array, which weights_only=True does not read after `ckpt export`.
            plain = torch.from_numpy(numpy.asarray(keys).astype(numpy.int64))
            states["numpy"] = (name, plain, *rest)
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states: dict[str, Any]) -> None:
    """Go on where :func:`random_states` was; the states of GPUs that are absent are left out."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"].cpu())
    if "numpy" in states:
        import numpy

        if isinstance(states["numpy"], dict):  # of a generator that somebody chose
            numpy.random.set_state(states["numpy"])
        else:
            name, keys, *rest = states["numpy"]
            numpy.random.set_state((name, numpy.asarray(keys).astype(numpy.uint32), *rest))
    if "cuda" in states and torch.cuda.is_available():
        for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), device)
