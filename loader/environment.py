"""Device metadata: what a state was on and made with, as far as this process knows it."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import socket
import sys
from types import ModuleType
from typing import Any

_PACKAGES = ("ckpt-registry", "torch", "numpy", "safetensors", "transformers", "lightning")


def describe_environment() -> dict[str, Any]:
    """The environment of ``docs/format.md`` section 8.

    torch is described only where it is loaded already: pushing a file does not need it.
    """
    described: dict[str, Any] = {
        "ckpt": version_of("ckpt-registry"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "machine": platform.machine(),
        "cpu": {"name": cpu_name(), "count": os.cpu_count()},
        "host": socket.gethostname(),
        "versions": {name: version for name in _PACKAGES if (version := version_of(name))},
    }
    torch = sys.modules.get("torch")
    if torch is not None:
        described["torch"] = _describe_torch(torch)
    return described


@functools.cache
def version_of(package: str) -> str | None:
    """The version of a package, or None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def cpu_name() -> str:
    """The name of the processor, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the standard library's word will do
    return platform.processor()


def _describe_torch(torch: ModuleType) -> dict[str, Any]:
    backends = torch.backends
    return {
        "git_version": torch.version.git_version,
        "capability": backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "interop_threads": torch.get_num_interop_threads(),
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": {
            "float32_matmul": torch.get_float32_matmul_precision(),
            "cudnn_allow_tf32": backends.cudnn.allow_tf32,
            "cudnn_benchmark": backends.cudnn.benchmark,
            "cudnn_deterministic": backends.cudnn.deterministic,
            "mkldnn": backends.mkldnn.enabled,
        },
        "devices": _devices(torch),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "cudnn": backends.cudnn.version(),
        "driver": _driver_version() if torch.cuda.is_available() else None,
    }


def _devices(torch: ModuleType) -> list[dict[str, Any]]:
    """The accelerators; nothing is initialised that was not in use."""
    found: list[dict[str, Any]] = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = [properties.major, properties.minor]
            found.append(
                {
                    "type": "cuda",
                    "index": index,
                    "name": properties.name,
                    "memory": properties.total_memory,
                    "capability": capability,
                }
            )
    if torch.backends.mps.is_available():
        found.append({"type": "mps", "index": 0, "name": platform.processor()})
    return found


def _driver_version() -> str | None:
    """The NVIDIA driver's version, from the place where it tells it."""
    try:
        with open("/sys/module/nvidia/version", encoding="ascii") as version:
            return version.read().strip()
    except OSError:
        return None  # no such module: AMD, or a container that hides it
