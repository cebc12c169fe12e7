"""``Run``: a training job's line of versions, saved in the background and resumed exactly."""

from __future__ import annotations

import contextlib
import os
import secrets
import sys
import time
import warnings
import weakref
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self

from ckpt.core.documents import FORMAT, Document
from ckpt.core.durations import check_duration
from ckpt.core.errors import CkptError, CkptWarning, ConflictError, UsageError
from ckpt.core.names import (
    check_aliases,
    check_labels,
    check_metrics,
    check_model,
    check_run,
    check_step,
)
from ckpt.core.records import Version
from ckpt.core.rules import Rule
from ckpt.loader.environment import describe_environment
from ckpt.loader.snapshot import capture_state
from ckpt.service.bases import check_compress
from ckpt.service.repository import Repository
from ckpt.service.retention import check_rules
from ckpt.training.background import Background, failed, location_of
from ckpt.training.held import Held, given_up, line_of
from ckpt.training.newest import begun_over, newest_whole
from ckpt.training.ranks import Ranks
from ckpt.training.saved import Saved, nothing
from ckpt.training.termination import Termination
from ckpt.training.tracking import bare, check_part, own_parts, restore, state_of


class Run:
    """One training job's sequence of versions of a model; also a context manager. One that nobody
    closed is when it is let go of, or the interpreter ends; what failed then is told on stderr.

    What is saved is the state at the call, even when the loop changes it at once: it is copied
    into memory that a process of its own reads, which hashes, encodes and stores it. A save waits
    for the one before. Under ``torch.distributed`` every rank makes the same calls; rank 0 saves.

    Args:
        repo: an open repository.
        model: the model that the versions are of.
        name: of the run, ``main`` by default; live in one job at a time.
        keep: rules such as ``ckpt.Latest(3)`` or ``ckpt.Best("loss")``, applied to the run's own
            versions after each save, and stored with the model for ``ckpt prune``. By default
            everything stays. The bytes go with the next ``gc``.
        compress: as in :meth:`Repository.push`.
        on_error: ``"raise"`` tells a failed save at the next call; ``"warn"`` only warns.
        drain_seconds: how long SIGTERM waits for the save that is under way.
        quiet: do not print a line per save.

    Raises:
        ConflictError: ``run-live`` when another job runs under this name.
    """

    def __init__(
        self,
        repo: Repository,
        model: str,
        *,
        name: str = "main",
        keep: Sequence[Rule | str] = (),
        compress: str = "auto",
        on_error: Literal["raise", "warn"] = "raise",
        drain_seconds: float = 30.0,
        quiet: bool = False,
    ) -> None:
        self._repo = repo
        self._model = check_model(model)
        self._name = check_run(name)
        self._keep = check_rules(keep)
        self._compress = check_compress(compress)
        self._warns = warns(on_error)
        self._drain_seconds = check_duration(drain_seconds)
        self._quiet = quiet
        self._parts: dict[str, Any] = {}
        self._ranks = Ranks()
        self._holder = secrets.token_hex(16)
        self._environment = describe_environment()
        place = str(location_of(repo.location)["places"])
        named = self._model, self._name
        release = partial(repo._registry.runs.release, *named, self._holder)
        self._held = Held(place, *named, self._drain_seconds, release)
        self._spared: list[str] | None = None  # not known, until it is resumed or begins anew
        self._termination = Termination()
        self._ended = False
        self._left = weakref.finalize(self, self._held.leave, quiet)
        self._ranks.together(self._begin)

    def __enter__(self) -> Self:
        self._termination.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._termination.put_off(is_leaving=kind is not None):
            self._leave_block(kind, error)

    def _leave_block(self, kind: type[BaseException] | None, error: BaseException | None) -> None:
        if kind is None:
            self.close()
            return
        try:
            self._end(self._drain_seconds)
        except CkptError as other:
            assert error is not None
            error.add_note(f"the last save failed too: {other}")

    def track(self, **parts: Any) -> Self:
        """Name what is saved: modules, optimizers, schedulers, scalers, loaders, generators, or
        anything with ``state_dict`` and ``load_state_dict``. The random number generators of
        Python, NumPy and torch always are.

        Raises:
            UsageError: ``not-trackable``.
        """
        for name, part in parts.items():
            check_part(name, part)
        self._parts.update((name, bare(part)) for name, part in parts.items())
        return self

    def resume(self) -> int:
        """Bring everything that is tracked back to the run's newest version that is whole, and
        return the step after it; 0 when there is none. It waits for the save under way. A damaged
        version is told by a :class:`CkptWarning`, and the one before is taken; so is another number
        of processes, where each has data of its own.

        Raises:
            CkptError: what went wrong in the background since the last call.
            IntegrityError: ``parts-differ``, ``parameters-differ`` and others when the version is
                not of what is tracked; ``none-whole`` when every version is damaged.
        """
        version, pulled = self._ranks.chosen(self._newest_whole)
        if version is None:
            self._spared = []
            return 0
        state: dict[str, Any] = {}

        def bring_back() -> None:
            saved = pulled if self._ranks.is_first else self._pull(version)
            state.update(self._ranks.nearest(saved))
            restore(self._parts, state)
            self.spare(version)

        self._ranks.together(bring_back)
        self._say(f"resumed from {version.reference}")
        return int(state["step"]) + 1

    def spare(self, version: Version) -> None:
        """Let no rule, of whomever, remove a version that the job goes on from."""
        self._spare([version.push])

    def _spare(self, pushes: list[str]) -> None:
        self._spared = pushes
        if pushes:
            self._held.spare(pushes)

    def _newest_whole(self) -> tuple[Version, Any] | None:
        self._settle(None)  # the save under way may be the newest
        return newest_whole(self._repo, self._model, self._name, self._spare_and_pull)

    def _spare_and_pull(self, version: Version) -> Any:
        """A version that nobody prunes before it is known to be whole."""
        self._held.spare([*(self._spared or ()), version.push])
        return self._pull(version)

    def _pull(self, version: Version) -> Any:
        return self._repo.pull(version, device="cpu")

    def save(
        self,
        step: int,
        metrics: Mapping[str, Any] | None = None,
        *,
        labels: Mapping[str, str] | None = None,
        alias: str | Iterable[str] = (),
    ) -> Saved:
        """Have the state of everything that is tracked saved, as it is now; returns when it is
        copied. Steps may repeat or go backwards: the newest save is what :meth:`resume` takes.

        Args:
            metrics: numbers by name; a tensor of one element counts as its number. NaN and
                infinities are kept, and are never best.

        Raises:
            UsageError: ``nothing-tracked``, ``run-closed``.
            CkptError: what went wrong in the background since the last call; this save is made.
        """
        began = time.monotonic()
        saved = self._ranks.led(
            lambda: self._prepared(step, metrics, labels, alias),
            lambda prepared, sent: self._saved(*prepared, sent, began),
        )
        return saved or Saved(self._repo, int(step), nothing(), time.monotonic() - began)

    def _prepared(
        self,
        step: int,
        metrics: Mapping[str, Any] | None,
        labels: Mapping[str, str] | None,
        alias: str | Iterable[str],
    ) -> tuple[tuple[dict[str, Any], dict[str, Any]], dict[str, Any]]:
        """What is said of a save and the state, and of the state what is this rank's own."""
        self._check_open()
        if self._ranks.is_first and not self._parts:
            raise UsageError(
                "nothing-tracked",
                "nothing is tracked, so there is nothing to save",
                hint="call track(model=…, optimizer=…) first",
            )
        measured = check_metrics(metrics)
        said = {
            "step": check_step(step),
            "metrics": {name: str(value) for name, value in measured.items()},
            "labels": check_labels(labels),
            "aliases": list(check_aliases(alias)),
            "environment": self._environment,
        }
        own = own_parts(self._parts)
        state = state_of(self._parts if self._ranks.is_first else own)
        return (said, state), {name: state[name] for name in (*own, "random")}

    def _saved(
        self, said: dict[str, Any], state: dict[str, Any], sent: list[dict[str, Any]], began: float
    ) -> Saved:
        """Hand a state over, with what each rank has of its own."""
        before = self._settled()  # when nothing else can be wrong, or it would be lost
        of_ranks = {"ranks": sent} if len(sent) > 1 else {}
        try:
            saved = self._hand_over({**state, "step": said["step"], **of_ranks}, said, began)
        except CkptError as error:
            raise error from before
        if before is not None:  # this save is not lost for it
            raise before
        return saved

    def _hand_over(self, state: dict[str, Any], said: dict[str, Any], began: float) -> Saved:
        """Give a state to the writer."""
        if self._spared is None:
            with contextlib.suppress(CkptError):  # then it is asked with the next save
                self._spare(begun_over(self._repo, self._model, self._name))
        captured = capture_state(state, ())
        document = Document(
            format=FORMAT,
            state="values",
            root=captured.root,
            tensors=captured.tensors,
            environment="",
            order=captured.order,
        )
        step = said["step"]
        if self._held.writer is None or not self._held.writer.is_alive:
            try:
                self._start()
            except CkptError as error:
                self._tell(step, error)
                return Saved(self._repo, step, failed(error), time.monotonic() - began)
        assert self._held.writer is not None
        answer = self._held.writer.save(document, captured.sources, said)
        self._held.pending = Saved(self._repo, step, answer, time.monotonic() - began)
        return self._held.pending

    @property
    def _is_open(self) -> bool:
        """Whether it goes on here: a child that was forked has no part in it."""
        return not self._ended and os.getpid() == self._held.process

    def _check_open(self) -> None:
        if not self._is_open:
            raise UsageError(
                "run-closed",
                f"the run {self._name} of {self._model} is closed, or of another process",
                hint="make another Run",
            )

    def wait(self, timeout: float | None = None) -> None:
        """Return when everything that was saved is durable.

        Raises:
            CkptError: what went wrong; TimeoutError.
        """
        self._ranks.last(lambda: self._settle(timeout))

    def close(self) -> None:
        """Wait for the save that is under way, and give the run up.

        Raises:
            CkptError: what went wrong in the background since the last call.
        """
        if self._is_open:
            self._ranks.last(lambda: self._end(None))

    def _end(self, timeout: float | None) -> None:
        if not self._is_open:
            return
        self._ended = True
        patience = None
        try:
            self._settle(timeout)
        except TimeoutError:
            patience = 0.0
            self._say(given_up(timeout))
        finally:
            self._left.detach()
            self._held.give_up(patience)

    def _begin(self) -> None:
        if not self._ranks.is_first:
            return
        try:
            self._start()
        except ConflictError as error:
            if error.code != "run-live" or not self._held.is_here:
                raise
            raise ConflictError(
                "run-live",
                f"the run {self._name} of {self._model} is live in this process",
                hint="close() the other Run, or let go of it, or give this one another name",
            ) from error

    def _start(self) -> None:
        self._held.end()
        setup = {
            "location": location_of(self._repo.location),
            "model": self._model,
            "run": self._name,
            "holder": self._holder,
            "keep": self._keep,
            "compress": self._compress,
            "spared": self._spared or [],
        }
        self._held.begin(Background(setup))

    def _settled(self) -> CkptError | None:
        """Why the save before failed, when that is to be raised."""
        try:
            self._settle(None)
        except CkptError as error:
            return error
        return None

    def _settle(self, timeout: float | None) -> None:
        """Wait for the save that is under way and tell how it ended."""
        pending = self._held.pending
        if pending is None:
            return
        try:
            said = pending.awaited(timeout, self._say)
        except CkptError as error:
            self._held.pending = None
            if pending.is_told:
                self._say(f"step {pending.step} was not saved: {error}")
            else:
                self._tell(pending.step, error)
            return
        self._held.pending = None
        self._say(line_of(pending, said))

    def _tell(self, step: int, error: CkptError) -> None:
        """Raise what went wrong with a save, or only warn."""
        if not self._warns:
            raise error
        warnings.warn(f"step {step} was not saved: {error}", CkptWarning, stacklevel=4)

    def _say(self, line: str) -> None:
        if not self._quiet and self._ranks.is_first:
            print(f"ckpt: {line}", file=sys.stderr)


def warns(on_error: str) -> bool:
    """Whether a failed save only warns; UsageError unless ``on_error`` is ``raise`` or ``warn``."""
    if on_error not in ("raise", "warn"):
        raise UsageError("usage", f"on_error is {on_error!r}", hint="write raise or warn")
    return on_error == "warn"
