"""What a run holds, and its end when nobody closes it: it drains, and a failure is told."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckpt.core.errors import CkptError, CkptWarning, StorageError
from ckpt.training.background import Background
from ckpt.training.saved import Saved, told

# The runs of this process that are not closed.
_LIVE: set[tuple[str, str, str]] = set()


class Held:
    """The writer of a run, and the save under way. It does not know the run, which goes when
    nobody needs it any more."""

    def __init__(
        self,
        repository: str,
        model: str,
        run: str,
        drain_seconds: float,
        release: Callable[[], None],
    ) -> None:
        self.writer: Background | None = None
        self.pending: Saved | None = None
        self.process = os.getpid()
        self._key = (repository, model, run)
        self._drain_seconds = drain_seconds
        self._release = release
        self._is_left = False  # the name, by a writer that was killed

    @property
    def is_here(self) -> bool:
        """Whether another run of this process has the name."""
        return self._key in _LIVE

    def begin(self, writer: Background) -> None:
        """Have a writer, and by it the name."""
        self.writer = writer
        self._is_left = False
        _LIVE.add(self._key)

    def spare(self, pushes: Sequence[str]) -> None:
        """Let no rule remove the versions of these pushes, if this is the process that saves."""
        if self.writer is None:
            return
        try:
            self.writer.spare(pushes)
        except StorageError:
            if self.writer.is_alive:  # else the next one is told
                raise

    def end(self, timeout: float | None = None) -> None:
        """End the writer, which gives the name up, unless it was killed."""
        writer, self.writer = self.writer, None
        if writer is not None:
            _LIVE.discard(self._key)
            writer.close(timeout)
            self._is_left = writer.was_killed

    def give_up(self, timeout: float | None) -> None:
        """End the writer, and give the name up in any case."""
        self.end(timeout)
        if self._is_left:
            with contextlib.suppress(CkptError):  # then its lease ends it
                self._release()

    def leave(self, quiet: bool) -> None:
        """End what nobody closed: called when the run is let go of, or the interpreter ends."""
        if self.writer is None or os.getpid() != self.process:
            return
        if self.writer.reads_here:  # it would wait for itself
            threading.Thread(target=self.leave, args=(quiet,)).start()
            return
        patience = None
        pending, self.pending = self.pending, None
        try:
            if pending is not None:
                said = pending.answer.result(self._drain_seconds)
                if not quiet:
                    print(f"ckpt: {line_of(pending, said)}", file=sys.stderr)
        except TimeoutError:
            patience = 0.0
            print(f"ckpt: {given_up(self._drain_seconds)}", file=sys.stderr)
        except CkptError as error:
            assert pending is not None
            if not pending.is_told:
                print(f"ckpt: step {pending.step} was not saved: {error}", file=sys.stderr)
        self.give_up(patience)


def line_of(pending: Saved, said: Mapping[str, Any]) -> str:
    """What is told of a save that is durable. Rules that were not applied are warned of."""
    if said["not_pruned"] is not None:
        reason = f"{said['reference']} is saved; the rules were not applied: "
        warnings.warn(reason + said["not_pruned"], CkptWarning, stacklevel=5)
    bytes_of = told(said["added"], said["nbytes"])
    return f"{said['reference']} step {pending.step}: {bytes_of}, stalled {pending.stalled:.3f} s"


def given_up(seconds: float | None) -> str:
    """What is told when the last save takes too long."""
    return f"the last save was not done after {seconds} s; it is given up"
