"""A live state to what is pushed of it: captured, and of a module probed and proven."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ckpt.core.digests import digest_of
from ckpt.core.documents import Behaviour, structure_bytes
from ckpt.core.errors import CkptWarning, NotFoundError, UsageError
from ckpt.core.printable import escape
from ckpt.core.records import Proof, Version
from ckpt.loader.capture import Captured
from ckpt.loader.forward import check_inputs
from ckpt.loader.probe import record_probe
from ckpt.loader.prove import prove
from ckpt.loader.replica import drafted
from ckpt.loader.snapshot import capture_state
from ckpt.loader.trust import names_in
from ckpt.registry.registry import Registry
from ckpt.service.push import Described

if TYPE_CHECKING:
    from ckpt.loader.probe import RecordedProbe


def describe_state(
    registry: Registry, state: Any, inputs: Any = None, drop: Collection[str] = ()
) -> Described:
    """Capture a state; run a module on ``inputs`` if there are any, and prove that it can be
    rebuilt unless its structure was proven before. Nothing is written.

    Raises:
        UsageError: ``cannot-store``, ``drop-invalid``, ``inputs-invalid``, ``probe-failed``,
            ``rebuild-failed``.
    """
    given = None if inputs is None else check_inputs(inputs)
    captured = capture_state(state, drop)
    for note in captured.notes:
        _warn(note)
    if not captured.modules:
        if given is not None:
            raise UsageError(
                "inputs-invalid", "only a module has inputs", hint="push without inputs="
            )
        return Described(
            state="values",
            root=captured.root,
            tensors=captured.tensors,
            sources=captured.sources,
            order=captured.order,
        )
    structure = digest_of(structure_bytes(drafted(captured, digests=False)))
    before = registry.queries.proven(structure)
    recorded = None
    if given is not None:
        recorded = record_probe(captured, given, _known_behaviour(registry, before), state)
        for skipped in recorded.skipped:
            _warn(f"{escape(skipped, 80)} cannot be looked into: it is not compared")
    proof = _proof(captured, recorded, before)
    return Described(
        state="module",
        root=captured.root,
        tensors=captured.tensors,
        sources=captured.sources,
        order=captured.order,
        modules=captured.modules,
        classes=captured.classes,
        wrappers=captured.wrappers,
        dropped=captured.dropped,
        probe=recorded.probe if recorded else None,
        probe_sources=recorded.captured.sources if recorded else (),
        structure=structure,
        proof=proof,
    )


def _known_behaviour(registry: Registry, before: Version | None) -> Behaviour | None:
    """How the same structure behaved when it was probed last."""
    if before is None:
        return None
    try:
        probe = registry.queries.document(before).probe
    except NotFoundError:  # removed meanwhile
        return None
    return None if probe is None else probe.behaviour


def _proof(captured: Captured, recorded: RecordedProbe | None, before: Version | None) -> Proof:
    if before is not None and before.proof is not None:
        return Proof(before.proof.kind, f"as {before.reference}")
    proof = prove(captured, recorded)
    if proof.kind == "fresh" and proof.reason:
        _warn(f"in another interpreter: {proof.reason}")
    names = sorted({name.reference for name in names_in(drafted(captured, digests=False))})
    local = [name for name in names if name.startswith("__main__:")]
    if local:
        given = local[0].partition(":")[2]
        _warn(f"{', '.join(local)} was defined in this script; to load, give trust=[{given}]")
    return proof


def _warn(text: str) -> None:
    warnings.warn(text, CkptWarning, stacklevel=6)
