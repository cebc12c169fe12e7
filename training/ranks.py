"""The processes of one job: rank 0 saves for all, all resume from one version, all fail together."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from ckpt.core.errors import CkptError, CkptWarning, IntegrityError
from ckpt.core.printable import escape
from ckpt.core.records import Version

Kept = TypeVar("Kept")
Sent = TypeVar("Sent")
Made = TypeVar("Made")


class Ranks:
    """This process among those of its job; alone where ``torch.distributed`` is not in use."""

    def __init__(self) -> None:
        together = distributed.is_available() and distributed.is_initialized()
        self.number = distributed.get_rank() if together else 0
        self.count = distributed.get_world_size() if together else 1

    @property
    def is_first(self) -> bool:
        """Whether this one saves."""
        return self.number == 0

    def led(
        self,
        prepare: Callable[[], tuple[Kept, Sent]],
        act: Callable[[Kept, list[Sent]], Made],
    ) -> Made | None:
        """What rank 0 makes of what it kept and what every rank sent; None on the others. When
        one of them fails, all raise: nobody is left to wait."""
        if self.count == 1:
            kept, sent = prepare()
            return act(kept, [sent])
        prepared, failure = _tried(prepare)
        mine = (None if prepared is None else prepared[1], self._told(failure))
        heard: list[Any] | None = [None] * self.count if self.is_first else None
        made = None
        try:
            distributed.gather_object(mine, heard)
            said = [next((told for _, told in heard or () if told is not None), None)]
            if heard is not None and prepared is not None and said[0] is None:
                made, failure = _tried(lambda: act(prepared[0], [sent for sent, _ in heard]))
                said = [self._told(failure)]
            distributed.broadcast_object_list(said)
        except Exception as lost:  # a rank has died: what went wrong here is still to be told
            if failure is not None:
                raise failure from lost
            raise
        if failure is not None:
            raise failure
        if said[0] is not None:
            raise said[0]
        return made

    def together(self, act: Callable[[], None]) -> None:
        """Have every rank do something; when one of them fails, all raise."""

        def prepare() -> tuple[None, None]:
            act()
            return None, None

        self.led(prepare, lambda kept, sent: None)

    def last(self, act: Callable[[], None]) -> None:
        """As :meth:`together`; alone where the others may never come: while an exception is under
        way here, or when the process group is gone."""
        if self.count > 1 and sys.exception() is None and distributed.is_initialized():
            self.together(act)
        else:
            act()

    def _told(self, failure: BaseException | None) -> Exception | None:
        """What the others raise for a failure here."""
        if failure is None:
            return None
        if isinstance(failure, TimeoutError):
            return TimeoutError(*failure.args)
        if isinstance(failure, CkptError):
            said = f"rank {self.number}: {failure.message}"
            return type(failure)(failure.code, said, hint=failure.hint)
        return CkptError(
            "rank-failed",
            f"rank {self.number}: {type(failure).__name__}: {escape(' '.join(str(failure).split()))}",
            hint="look at what that process says",
        )

    def own(self, state: Any) -> dict[str, Any]:
        """A saved state as it was on this rank.

        Raises:
            IntegrityError: ``ranks-differ`` when the job had another number of processes;
                ``parts-differ`` when what was saved is no state of a run.
        """
        if not isinstance(state, dict):
            raise IntegrityError(
                "parts-differ",
                f"saved was a {type(state).__name__}, which no run saves",
                hint="give the run another model or another name",
            )
        saved = state.get("ranks", [])
        if len(saved) != (self.count if self.count > 1 else 0):
            raise IntegrityError(
                "ranks-differ",
                f"saved by {max(1, len(saved))} processes, resumed by {self.count}",
                hint="start as many, or load the weights alone by repo.pull",
            )
        return {**state, **saved[self.number]} if saved else state

    def nearest(self, state: Any) -> dict[str, Any]:
        """A saved state as it was on this rank. Where the job had another number of processes,
        which is told by a :class:`CkptWarning`, a rank that was not there gets what is the same
        for all, and keeps the random numbers that it has.

        Raises:
            IntegrityError: ``parts-differ`` when what was saved is no state of a run.
        """
        try:
            return self.own(state)
        except IntegrityError as error:
            if error.code != "ranks-differ":
                raise
            warnings.warn(
                f"{error.message}: each goes on with the data and random numbers of its own rank,"
                " one that was not there with new ones, and not as an uninterrupted job would",
                CkptWarning,
                stacklevel=5,
            )
        saved = state.get("ranks") or [{}]
        if self.number < len(saved):
            return {**state, **saved[self.number]}
        return {name: value for name, value in state.items() if name != "random"}

    def chosen(self, choose: Callable[[], tuple[Version, Any] | None]) -> tuple[Any, Any]:
        """The version that rank 0 chooses, on every rank, and on rank 0 its state."""
        found: list[Any] = [None, None]

        def choose_first() -> None:
            if self.is_first:
                found[:] = choose() or (None, None)

        self.together(choose_first)
        if self.count > 1:
            version = [found[0]]
            distributed.broadcast_object_list(version)
            found[0] = version[0]
        return found[0], found[1]


def _tried(act: Callable[[], Made]) -> tuple[Made | None, BaseException | None]:
    try:
        return act(), None
    except BaseException as failure:  # noqa: BLE001  it is raised when the others were told
        return None, failure
