"""Load: a version rebuilt as a module, or filled into one, and what was proven of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckpt.core.documents import Document
from ckpt.core.errors import CkptWarning, IntegrityError, UsageError
from ckpt.core.printable import escape, few
from ckpt.core.records import Version
from ckpt.core.state_dict import state_dict_names
from ckpt.registry.registry import Registry
from ckpt.service.pull import fill, fill_document
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from torch import nn

    from ckpt.loader.devices import DeviceMap
    from ckpt.loader.spaces import MemorySpace
    from ckpt.loader.trust import TrustLike
    from ckpt.loader.verify import Report


def load_module(
    store: Store,
    registry: Registry,
    version: Version,
    trust: Iterable[TrustLike] = (),
    device: DeviceMap = None,
    require: str | None = None,
) -> tuple[nn.Module, Report]:
    """Rebuild the module of a version, and prove that it is the one that was pushed.

    Raises:
        TrustError: ``class-not-allowed``, before a byte is read or anything imported.
        IntegrityError: ``structure-differs``, ``outputs-differ``, ``verdict-too-low``,
            ``object-corrupt``.
    """
    from ckpt.loader.devices import check_devices, check_mapping
    from ckpt.loader.rebuild import runs_own_code
    from ckpt.loader.replica import copied_again, replicate
    from ckpt.loader.trust import Trust
    from ckpt.loader.verify import check_structure

    check_require(require)
    check_devices(device)
    document = module_document(registry, version)
    check_mapping(device, document)
    allowed = Trust(trust)
    allowed.check(document)
    spaces, probed = fill_document(store, registry, version, document, device)
    module = replicate(document, spaces, allowed, device)
    # What was read was checked; only foreign code could have written to it since.
    check_structure(allowed.as_given(document), module, digests=runs_own_code(document, allowed))

    def copy() -> nn.Module:
        return replicate(document, copied_again(document, spaces), allowed, device)

    report = _judge(document, probed, copy, module, device)
    _refuse_below(report, require, version)
    if report.dropped:
        left_out = ", ".join(escape(path, 80) for path in report.dropped)
        warnings.warn(f"left out at the push: {left_out}", CkptWarning, stacklevel=4)
    return module, report


def warn_of_changes(report: Report) -> None:
    """Name the classes that now compute with other code than when the version was pushed."""
    if report.changed:
        changed = few([escape(name, 80) for name in report.changed])
        warnings.warn(
            f"the source changed since the push: {changed}; the verdict is {report.verdict}",
            CkptWarning,
            stacklevel=3,
        )


def _judge(
    document: Document,
    probed: Mapping[int, MemorySpace],
    copy: Callable[[], nn.Module],
    module: nn.Module,
    device: DeviceMap,
) -> Report:
    """The report on a module whose bytes and structure are proven already."""
    from ckpt.loader.replay import replay
    from ckpt.loader.verify import Report, find_changed, find_drift

    report = Report(
        "structure",
        reason="no inputs were recorded, so outputs were not compared",
        drift=find_drift(document),
        changed=find_changed(document),
        wrappers=document.wrappers,
        dropped=document.dropped,
    )
    if document.probe is None:
        return report
    try:
        outcome = replay(document.probe, probed, copy, module, device)
    except IntegrityError as error:
        if report.drift:
            raise IntegrityError(
                error.code, f"{error.message}; {'; '.join(report.drift)}", hint=error.hint
            ) from error
        raise
    return replace(report, verdict=outcome.verdict, reason=outcome.reason, outputs=outcome.outputs)


def load_into(store: Store, registry: Registry, version: Version, module: nn.Module) -> Report:
    """Fill a module's parameters and buffers in place: strict, without casts, ties kept.

    Raises:
        UsageError: ``no-module``.
        IntegrityError: ``keys-mismatch``, ``shape-mismatch``, ``dtype-mismatch``,
            ``not-writable``, ``ties-differ``; nothing of the module was changed.
    """
    from ckpt.loader.fill import check_module, fill_module
    from ckpt.loader.restore import Restorer
    from ckpt.loader.verify import Report

    check_module(module)
    document = registry.queries.document(version)
    own = [index for index, tensor in enumerate(document.tensors) if tensor.has_bytes]
    filled = fill(store, registry, version, document, own, None)
    restorer = Restorer(document, filled, "cpu")
    prefix = fill_module(module, weights(document, restorer))
    return Report("weights", reason="the module's own structure was used", renamed=prefix)


def weights(document: Document, restorer: Any) -> dict[str, Any]:
    """The tensors by the keys that ``state_dict()`` gave, or that a pushed dict had."""
    if document.state == "module":
        return {key: restorer.tensor(index) for key, index in state_dict_names(document)}
    state = restorer.state()
    if not isinstance(state, dict):
        raise UsageError(
            "no-weights", "the version is no dict of tensors", hint="pull it and take what you need"
        )
    return state


def module_document(registry: Registry, version: Version) -> Document:
    """The document of a version whose root is a module; UsageError ``no-module``."""
    document = registry.queries.document(version)
    if document.state != "module":
        raise UsageError(
            "no-module",
            f"{version.reference} is no module",
            hint="use pull, or load_into a module of yours",
        )
    return document


def check_require(require: str | None) -> None:
    """Refuse a verdict that there is not."""
    from ckpt.loader.verify import VERDICTS

    if require is not None and require not in VERDICTS:
        raise UsageError(
            "verdict-invalid", f'"{require}" is no verdict', hint=f"one of {', '.join(VERDICTS)}"
        )


def _refuse_below(report: Report, require: str | None, version: Version) -> None:
    from ckpt.loader.verify import VERDICTS

    if require is not None and VERDICTS.index(report.verdict) < VERDICTS.index(require):
        raise IntegrityError(
            "verdict-too-low",
            f"{version.reference} is proven to {report.verdict}, {require} was required "
            f"({report.reason})",
        )
