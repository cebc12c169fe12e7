"""What a forward is computed under: told, set again, and isolated from the caller's own state."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy
import torch

from ckpt.core.documents import Conditions
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import escape
from ckpt.loader.environment import cpu_name

_Access = tuple[Callable[[], Any], Callable[[Any], Any]]


def _switch(owner: Any, name: str) -> _Access:
    return lambda: getattr(owner, name), lambda value: setattr(owner, name, bool(value))


# By name in the record, how to read and to write each; all are set again for a replay.
_FLAGS: dict[str, _Access] = {
    "default_dtype": (
        lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        lambda name: torch.set_default_dtype(getattr(torch, name)),
    ),
    "deterministic": (
        torch.are_deterministic_algorithms_enabled,
        lambda value: torch.use_deterministic_algorithms(bool(value), warn_only=True),
    ),
    "float32_matmul": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "cudnn_tf32": _switch(torch.backends.cudnn, "allow_tf32"),
    "cudnn_benchmark": _switch(torch.backends.cudnn, "benchmark"),
    "cudnn_deterministic": _switch(torch.backends.cudnn, "deterministic"),
    "mkldnn": _switch(torch.backends.mkldnn, "enabled"),
}
_DEFAULT_DTYPES = ("float16", "bfloat16", "float32", "float64")
# More threads than this for each processor are not started, whatever a record says.
_THREADS_EACH = 4
# Between a CPU and a GPU only full precision can be compared.
FULL_PRECISION: dict[str, bool | str] = {"float32_matmul": "highest", "cudnn_tf32": False}


def check_conditions(conditions: Conditions, seed: int) -> None:
    """Refuse recorded conditions that no forward can have had; IntegrityError
    ``document-damaged``."""
    try:
        torch.device(conditions.device)
        fine = 0 <= seed < 2**32 and conditions.threads >= 1
    except RuntimeError:
        fine = False
    flags = conditions.flags
    fine &= flags.get("float32_matmul", "highest") in ("highest", "high", "medium")
    fine &= str(flags.get("default_dtype", "float32")) in _DEFAULT_DTYPES
    if not fine:
        raise IntegrityError(
            "document-damaged",
            "the probe was recorded under conditions that there are not",
            hint="run `ckpt fsck`",
        )


def describe_conditions(device: str) -> Conditions:
    """The conditions of a forward on ``device`` in this process, now."""
    kind = torch.device(device).type
    name, capability = cpu_name(), torch.backends.cpu.get_cpu_capability()
    if kind == "cuda":
        properties = torch.cuda.get_device_properties(torch.device(device))
        name, capability = properties.name, f"{properties.major}.{properties.minor}"
    return Conditions(
        device=device,
        name=name,
        capability=capability,
        torch=str(torch.__version__),
        build=torch.version.git_version or "",
        threads=torch.get_num_threads(),
        flags={flag: read() for flag, (read, _) in _FLAGS.items()},
    )


def differences(recorded: Conditions, now: Conditions) -> tuple[str, ...]:
    """What a replay cannot make equal, in words: ``torch 2.13 → 2.14``."""
    found = []
    pairs = [
        ("device", torch.device(recorded.device).type, torch.device(now.device).type),
        ("torch", recorded.torch, now.torch),
        ("build", recorded.build, now.build),
        ("processor", recorded.name, now.name),
        ("capability", recorded.capability, now.capability),
        ("threads", recorded.threads, now.threads),
    ]
    for word, before, after in pairs:
        if before != after:
            found.append(f"{word} {escape(str(before), 80)} → {escape(str(after), 80)}")
    return tuple(found)


@contextmanager
def replaying(conditions: Conditions, *, full_precision: bool = False) -> Iterator[None]:
    """Set threads and flags as they were recorded, and afterwards as they are now."""
    wanted = {**conditions.flags, **(FULL_PRECISION if full_precision else {})}
    before = {flag: read() for flag, (read, _) in _FLAGS.items()}
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(min(conditions.threads, _THREADS_EACH * (os.cpu_count() or 1)))
        for flag, value in wanted.items():
            if flag in _FLAGS and before[flag] != value:
                _FLAGS[flag][1](value)
        yield
    finally:
        torch.set_num_threads(threads)
        for flag, (read, write) in _FLAGS.items():
            if read() != before[flag]:
                write(before[flag])


@contextmanager
def isolated(seed: int, devices: Sequence[str]) -> Iterator[None]:
    """Random numbers from ``seed`` on, no gradients, no autocast; the caller's generators are as
    they were afterwards."""
    gpus = [torch.device(device) for device in devices if torch.device(device).type != "cpu"]
    python, numbers = random.getstate(), numpy.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(gpus, enabled=True))
        stack.callback(random.setstate, python)
        stack.callback(numpy.random.set_state, numbers)
        for kind in {"cpu", *(device.type for device in gpus)}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.no_grad())
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)
        yield


def random_states() -> list[Any]:
    """Where the global generators stand, to see whether a forward asked them."""
    numbers: Any = numpy.random.get_state()
    states = [torch.get_rng_state().tolist(), random.getstate(), numbers[1].tolist(), numbers[2]]
    cuda: Any = torch.cuda  # its functions have no types
    if cuda.is_available() and cuda.is_initialized():
        states.append([state.tolist() for state in cuda.get_rng_state_all()])
    return states
