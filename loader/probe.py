"""The probe of a push: what a captured module gives on inputs, and how its forward behaves."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from ckpt.core.documents import Behaviour, Document, Probe, identity_bytes
from ckpt.core.errors import CkptError, UsageError
from ckpt.core.printable import escape
from ckpt.core.tensors import chunk_digests
from ckpt.loader.capture import Captured, capture
from ckpt.loader.conditions import describe_conditions, replaying
from ckpt.loader.forward import (
    Children,
    Inputs,
    Outputs,
    Run,
    run_children,
    run_forward,
    used_devices,
)
from ckpt.loader.outputs import is_plausible
from ckpt.loader.own_run import check_equal, first_difference, kept, runnable
from ckpt.loader.rebuild import rebuild
from ckpt.loader.replica import (
    FULL_BYTES,
    WideRestorer,
    copied,
    copied_again,
    drafted,
    replicate,
    share,
)
from ckpt.loader.restore import Restorer
from ckpt.loader.snapshot import capture_module
from ckpt.loader.sources import MemoryTensor
from ckpt.loader.trust import Trust

_SEED = 0


@dataclass(frozen=True, slots=True)
class RecordedProbe:
    """A probe ready to be pushed; ``captured.sources`` has the bytes of its tensors, ``skipped``
    says what of the result nobody can look into."""

    probe: Probe
    captured: Captured
    skipped: tuple[str, ...] = ()


def record_probe(
    captured: Captured,
    inputs: Inputs,
    known: Behaviour | None = None,
    module: nn.Module | None = None,
) -> RecordedProbe:
    """Run a captured module on ``inputs``, and keep what it gave.

    Up to ``FULL_BYTES`` a copy of it runs: once more to see whether it repeats itself, once
    under another seed, once in double precision. With ``known``, how the same structure behaved
    before, the first two are left out. A larger module runs once, as a copy that shares its
    parameters. ``module``, the user's own, runs once where nothing is known, and only if its
    copy showed that a forward leaves it as it is: it must give the same.

    Raises:
        UsageError: ``cannot-store`` for the inputs; ``probe-failed`` when the forward fails on
            them, gives no tensors, or writes to parameters that are too large to copy;
            ``rebuild-failed`` when a copy gives other outputs than ``module``.
    """
    trial = _Trial(captured, inputs)
    conditions = describe_conditions(trial.device)
    with replaying(conditions), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the user's forward, which runs several times
        if captured.nbytes <= FULL_BYTES:
            run, behaviour, children = _run_fully(trial, known)
            reference = trial.reference(run.outputs)
        else:
            run, behaviour = _run_once(trial)
            children, reference = (), {}
        if module is not None and known is None:
            _check_own(trial, module, (run, behaviour, children), reference)
    results = {"outputs": run.outputs, "reference": reference}
    described = capture({"inputs": inputs, **results} | ({"plain": run.plain} if run.plain else {}))
    probe = Probe(
        root=described.root,
        tensors=described.tensors,
        order=described.order,
        seed=_SEED,
        conditions=conditions,
        behaviour=behaviour,
        children=children,
    )
    return RecordedProbe(probe, described, trial.skipped)


def _run_fully(trial: _Trial, known: Behaviour | None) -> tuple[Run, Behaviour, Children]:
    module = trial.copy()
    before = _fingerprint(trial, module)
    first = trial.run(module, _SEED)
    changed = _fingerprint(trial, module) != before

    def fresh() -> nn.Module:
        return trial.copy() if changed else module

    children = trial.run_children(fresh())
    if known is not None and not known.once:
        return first, replace(known, changes_state=changed), children
    repeats = first.gave_same(trial.run(fresh(), _SEED))
    same = first.gave_same(trial.run(fresh(), _SEED + 1))
    behaviour = Behaviour(
        repeats=repeats,
        stochastic=repeats and not same,
        random=first.random,
        changes_state=changed,
        changes_inputs=trial.inputs_changed,
    )
    return first, behaviour, children


def _run_once(trial: _Trial) -> tuple[Run, Behaviour]:
    module = trial.sharing_copy()
    written = trial.parameter_writes()
    before = _fingerprint(trial, module)
    run = trial.run(module, _SEED)
    if trial.parameter_writes() != written:
        raise _failed("it writes to its parameters, which are too large to copy")
    changed = _fingerprint(trial, module) != before
    behaviour = Behaviour(
        random=run.random,
        changes_state=changed,
        changes_inputs=trial.inputs_changed,
        once=True,
    )
    return run, behaviour


def _check_own(
    trial: _Trial,
    module: nn.Module,
    recorded: tuple[Run, Behaviour, Children],
    reference: Outputs,
) -> None:
    """Compare what the user's module gives with what its copy gave."""
    run, behaviour, children = recorded
    own = runnable(module, trial.captured, behaviour)
    if own is None:
        return
    with kept(own, trial.captured, trial.spaces):
        found = trial.run(own, _SEED)
        if behaviour.once and not run.gave_same(found):
            again = trial.run(trial.sharing_copy(), _SEED)
            if not run.gave_same(again):  # it does not repeat itself
                return
        check_equal(
            run,
            found,
            reference,
            lambda: first_difference(children, trial.run_children(own)),
        )


class _Trial:
    """One module on one set of inputs; every run gets inputs of its own."""

    def __init__(self, captured: Captured, inputs: Inputs) -> None:
        self.full = captured.nbytes <= FULL_BYTES
        self.device, self._devices = used_devices([entry.device for entry in captured.tensors])
        self.inputs_changed = False
        self.skipped: tuple[str, ...] = ()
        self.document = drafted(captured, digests=False)
        self.captured = captured
        self._trust = Trust.of_live(self.document)
        self.spaces = copied(captured, self.document) if self.full else {}
        given = capture(inputs)
        self._given = drafted(given, digests=True)
        self._given_spaces = copied(given, self._given)

    def copy(self) -> nn.Module:
        """A copy of the module as it was pushed."""
        return replicate(self.document, copied_again(self.document, self.spaces), self._trust)

    def sharing_copy(self) -> nn.Module:
        """A copy whose parameters are the user's own memory."""
        return share(self.captured, self.document, self._trust)

    def parameter_writes(self) -> list[int]:
        """How often each of the user's tensors was written to in place."""
        sources = self.captured.sources
        return [source.values._version for source in sources if isinstance(source, MemoryTensor)]

    def run(self, module: nn.Module, seed: int) -> Run:
        """One forward; notes whether it wrote to its inputs."""
        spaces = copied_again(self._given, self._given_spaces)
        inputs = Restorer(self._given, spaces).state()
        try:
            run = run_forward(module, inputs, seed, self._devices)
        except CkptError:
            raise
        except Exception as error:
            raise _failed(f"{type(error).__name__}: {escape(str(error))}") from error
        self.skipped = run.skipped
        if not run.outputs:
            raise _failed("it gives no tensors")
        after = drafted(capture(inputs), digests=True)
        self.inputs_changed |= identity_bytes(after) != identity_bytes(self._given)
        return run

    def run_children(self, module: nn.Module) -> Children:
        """What each submodule gives; on a copy that may be written to."""
        spaces = copied_again(self._given, self._given_spaces)
        return run_children(module, Restorer(self._given, spaces).state(), _SEED, self._devices)

    def reference(self, outputs: Outputs) -> Outputs:
        """The outputs in double precision, where the module can compute them at all and they
        are of the same computation."""
        default = torch.get_default_dtype()
        try:
            torch.set_default_dtype(torch.float64)
            spaces = copied_again(self.document, self.spaces)
            module = rebuild(self.document, WideRestorer(self.document, spaces), self._trust)
            given = copied_again(self._given, self._given_spaces)
            inputs = WideRestorer(self._given, given).state()
            wide = run_forward(module, inputs, _SEED, self._devices).outputs
        except Exception:  # noqa: BLE001 -- user code that was not written for double precision
            return {}
        finally:
            torch.set_default_dtype(default)
        return {
            name: wide[name]
            for name, output in outputs.items()
            if name in wide and is_plausible(output, wide[name])
        }


def _fingerprint(trial: _Trial, module: nn.Module) -> Any:
    """What tells whether a forward changed a module: its structure and the bytes of its tensors,
    of a large one without the parameters."""
    now = capture_module(module, trial.document.dropped)
    document: Document = drafted(now, digests=False)
    digests = [
        chunk_digests(source)
        for entry, source in zip(now.tensors, now.sources, strict=True)
        if source is not None and (trial.full or entry.kind != "parameter")
    ]
    return identity_bytes(document), digests


def _failed(reason: str) -> UsageError:
    return UsageError(
        "probe-failed",
        f"the forward failed on the given inputs: {reason}",
        hint="check inputs=(…), or push without them",
    )
