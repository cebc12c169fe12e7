"""V2: the recorded probe run again on a loaded module, and what the comparison proves."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckpt.core.documents import FORMAT, Document, Probe
from ckpt.core.errors import CkptError, IntegrityError
from ckpt.core.printable import escape
from ckpt.loader.conditions import check_conditions, describe_conditions, differences, replaying
from ckpt.loader.devices import DeviceMap
from ckpt.loader.forward import (
    Inputs,
    Outputs,
    Run,
    check_inputs,
    run_children,
    run_forward,
    used_devices,
)
from ckpt.loader.outputs import Comparison, all_equal, compare, plain_difference
from ckpt.loader.replica import copied_again
from ckpt.loader.restore import Restorer
from ckpt.loader.spaces import MemorySpace
from ckpt.loader.values import MALFORMED

# From which share on a submodule's root mean square counts as another one, on other machines.
_CHILD_DIFFERS = 1e-3


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the replay proves, and every output's comparison."""

    verdict: str
    reason: str
    outputs: tuple[Comparison, ...]


def as_document(probe: Probe) -> Document:
    """A probe's inputs and outputs as a document of plain values."""
    return Document(
        format=FORMAT,
        state="values",
        root=probe.root,
        tensors=probe.tensors,
        order=probe.order,
        environment="",
    )


def replay(
    probe: Probe,
    spaces: Mapping[int, MemorySpace],
    copy: Callable[[], nn.Module],
    module: nn.Module,
    device: DeviceMap = None,
) -> Outcome:
    """Run the recorded inputs again, and compare what comes out.

    Args:
        spaces: the bytes of the probe's tensors.
        copy: makes a module of its own, equal to ``module``, which may be changed.
        module: what was loaded; it runs itself where its forward leaves it as it is.
        device: as for the load.

    Raises:
        IntegrityError: ``outputs-differ``, naming the first output and submodule that differ;
            ``document-damaged``.
    """
    try:
        return _Replay(probe, spaces, copy, module, device).judge()
    except CkptError:
        raise
    except MALFORMED as error:  # recorded outputs that no forward gives
        reason = escape(str(error).partition("\n")[0])
        raise _damaged(f"its outputs cannot be compared: {reason}") from error


class _Replay:
    """One replay; the runs that only a failure needs are made on demand."""

    def __init__(
        self,
        probe: Probe,
        spaces: Mapping[int, MemorySpace],
        copy: Callable[[], nn.Module],
        module: nn.Module,
        device: DeviceMap,
    ) -> None:
        check_conditions(probe.conditions, probe.seed)
        self._probe = probe
        self._document = as_document(probe)
        self._spaces = spaces
        self._device = device
        self._skipped: tuple[str, ...] = ()
        self._make = copy if probe.behaviour.changes_state else (lambda: module)
        places = [str(tensor.device) for tensor in _tensors_of(module)]
        self._place, self._devices = used_devices(places)
        recorded = torch.device(probe.conditions.device).type
        self._across = recorded != torch.device(self._place).type
        state = self._state()
        self._outputs: Outputs = state["outputs"]
        self._reference: Outputs = state["reference"]
        self._plain: dict[str, Any] | None = state.get("plain")  # of an older probe unknown

    def judge(self) -> Outcome:
        """Run, compare, and say what that proves."""
        with replaying(self._probe.conditions, full_precision=self._across):
            conditions = describe_conditions(self._place)
            run = self._run()
            other = "" if self._plain is None else plain_difference(self._plain, run.plain)
            if all_equal(self._outputs, run.outputs) and not other:
                return Outcome("outputs-exact", self._unseen(), self._compare(run.outputs))
            changed = differences(self._probe.conditions, conditions)
            return self._judge_unequal(run, other, changed)

    def _judge_unequal(self, run: Run, other: str, changed: tuple[str, ...]) -> Outcome:
        """``other`` says which plain value is another one, if one is."""
        found = run.outputs
        if found.keys() != self._outputs.keys():
            names = sorted(found.keys() ^ self._outputs.keys())
            raise _differ(f"{names[0]} is on one side only", changed, "")
        outputs = self._compare(found)
        behaviour = self._probe.behaviour
        same_form = all(
            found[name].shape == output.shape and found[name].dtype == output.dtype
            for name, output in self._outputs.items()
        )
        if same_form and not behaviour.repeats:
            return Outcome("structure", "the forward does not repeat itself", outputs)
        drawn = behaviour.stochastic or (behaviour.once and behaviour.random)
        if same_form and drawn and changed:
            reason = f"the forward draws random numbers, and {', '.join(changed)}"
            return Outcome("structure", reason, outputs)
        whole = [str(output) for output in outputs if not output.close]
        if not drawn and not whole and not other:
            reasons = [", ".join(changed) or "the last bits differ", self._unseen()]
            return Outcome("outputs-close", "; ".join(filter(None, reasons)), outputs)
        if not whole and other and changed:  # it may tell last digits, or name the machine
            return Outcome("structure", f"{other}; {', '.join(changed)}", outputs)
        if self._across and all(output.close or output.mismatches for output in outputs):
            return Outcome("structure", whole[0] if whole else other, outputs)
        if behaviour.once and not run.gave_same(self._run()):
            return Outcome("structure", "the forward does not repeat itself", outputs)
        what = whole[0] if whole else other or str(outputs[0])
        raise _differ(what, changed, self._first_child(changed))

    def _unseen(self) -> str:
        names = ", ".join(escape(name, 80) for name in self._skipped)
        return f"not compared: {names}" if names else ""

    def _compare(self, found: Outputs) -> tuple[Comparison, ...]:
        return tuple(
            compare(name, recorded, found[name], self._reference.get(name), across=self._across)
            for name, recorded in self._outputs.items()
        )

    def _run(self) -> Run:
        inputs: Inputs = check_inputs(self._state()["inputs"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the user's forward, which said them before
            try:
                run = run_forward(self._make(), inputs, self._probe.seed, self._devices)
            except Exception as error:
                raise IntegrityError(
                    "outputs-differ",
                    f"the forward fails on the recorded inputs: {type(error).__name__}: "
                    f"{escape(str(error))}",
                    hint="its code may have changed; get the weights with pull",
                ) from error
        self._skipped = run.skipped
        return run

    def _state(self) -> dict[str, Any]:
        """Inputs and outputs; built anew each time, for a forward may write to its inputs."""
        fresh = copied_again(self._document, self._spaces)
        state = Restorer(self._document, fresh, self._device).state()
        wanted = {"inputs", "outputs", "reference"}
        if not isinstance(state, dict) or state.keys() - {"plain"} != wanted:
            raise _damaged("it has no inputs and outputs")
        for results in (state["outputs"], state["reference"]):
            if not isinstance(results, dict) or not all(
                isinstance(tensor, torch.Tensor) for tensor in results.values()
            ):
                raise _damaged("its outputs are no tensors by name")
        if not isinstance(state.get("plain", {}), dict):
            raise _damaged("its plain values have no names")
        if not isinstance(state["inputs"], (tuple, dict)) or not state["outputs"]:
            raise _damaged("it has no inputs or no outputs")
        return state

    def _first_child(self, changed: tuple[str, ...]) -> str:
        """The first submodule whose output is another one, if that can be told."""
        recorded = {path: (digest, size) for path, digest, size in self._probe.children}
        if not recorded:
            return ""
        inputs = check_inputs(self._state()["inputs"])
        for path, digest, size in run_children(
            self._make(), inputs, self._probe.seed, self._devices
        ):
            before, before_size = recorded.get(path, (digest, size))
            if changed or self._across:
                differs = abs(size - before_size) > _CHILD_DIFFERS * abs(before_size)
            else:
                differs = digest != before
            if differs:
                return path
        return ""


def _damaged(reason: str) -> IntegrityError:
    return IntegrityError(
        "document-damaged", f"the probe contradicts itself: {reason}", hint="run `ckpt fsck`"
    )


def _tensors_of(module: nn.Module) -> list[torch.Tensor]:
    lazy = nn.parameter.is_lazy
    return [one for one in (*module.parameters(), *module.buffers()) if not lazy(one)]


def _differ(what: str, changed: tuple[str, ...], child: str) -> IntegrityError:
    parts = [f"outputs differ: {escape(what)}"]
    if changed:
        parts.append(f"({', '.join(changed)}; a branch on values may have gone another way)")
    where = f"; first differing child: {escape(child)}" if child else ""
    return IntegrityError(
        "outputs-differ",
        " ".join(parts) + where,
        hint="every byte is intact; look at what changed in the code, or get the weights with pull",
    )
