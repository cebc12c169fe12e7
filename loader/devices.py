"""Devices by name: which there are, and where what was on one of them goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ckpt.core.documents import Document
from ckpt.core.errors import UsageError
from ckpt.core.printable import escape

DeviceMap = str | torch.device | Mapping[str, str] | None


def parse_device(name: str | torch.device) -> torch.device:
    """torch's device of this name; UsageError ``device-invalid``."""
    try:
        return torch.device(name)
    except (RuntimeError, TypeError):
        raise UsageError(
            "device-invalid", f"{name!r} is not a device", hint='use "cpu" or "cuda:0"'
        ) from None


def check_devices(devices: DeviceMap) -> None:
    """Refuse a device that is unknown or absent before any byte is read.

    Raises:
        UsageError: ``device-invalid``, ``device-absent``.
    """
    wanted = devices.values() if isinstance(devices, Mapping) else [devices]
    for name in wanted:
        if name is not None and not is_available(parse_device(name)):
            raise UsageError(
                "device-absent", f"{name} is not available here", hint='use device="cpu"'
            )


def check_mapping(devices: DeviceMap, document: Document) -> None:
    """Refuse one device for a module that was on several; UsageError ``device-ambiguous``."""
    recorded = sorted({tensor.device for tensor in document.tensors if tensor.has_values})
    if devices is None or isinstance(devices, Mapping) or len(recorded) < 2:
        return
    mapping = ", ".join(f'"{escape(name, 20)}": …' for name in recorded)
    raise UsageError(
        "device-ambiguous",
        f"the module was on {' and '.join(escape(name, 20) for name in recorded)}",
        hint=f"say where each part goes: device={{{mapping}}}",
    )


def destination(recorded: str, devices: DeviceMap) -> torch.device | None:
    """Where a tensor that was on ``recorded`` goes now; None when that device is absent."""
    wanted = devices.get(recorded) if isinstance(devices, Mapping) else devices
    if wanted is not None:
        return parse_device(wanted)
    device = parse_device(recorded)
    return device if is_available(device) else None


def is_available(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    module: Any = getattr(torch, device.type, None)
    if module is None or not module.is_available():
        return False
    return device.index is None or device.index < int(module.device_count())
