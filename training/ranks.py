"""The processes of one job: rank 0 saves for all, and all resume from the same version."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import distributed

from ckpt.core.errors import IntegrityError
from ckpt.core.records import Version

# What each rank has of its own; the rest of a state is the same everywhere.
_OWN = ("random",)


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

    def gathered(self, state: dict[str, Any]) -> dict[str, Any] | None:
        """The state with what every rank has of its own, on rank 0; None on the others."""
        if self.count == 1:
            return state
        mine = {name: state[name] for name in _OWN}
        found: list[Any] | None = [None] * self.count if self.is_first else None
        distributed.gather_object(mine, found)
        return None if found is None else {**state, "ranks": found}

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

    def agreed(
        self,
        choose: Callable[[], tuple[Version, Any] | None],
        pull: Callable[[Version], Any],
    ) -> tuple[Version | None, Any]:
        """What rank 0 chooses, pulled by every rank."""
        if self.count == 1:
            return choose() or (None, None)
        chosen: list[Any] = [None]
        state = None
        if self.is_first:
            try:
                found = choose()
                if found is not None:
                    chosen, state = [found[0]], found[1]
            except BaseException as error:
                chosen = [error]
                distributed.broadcast_object_list(chosen)
                raise
        distributed.broadcast_object_list(chosen)
        if isinstance(chosen[0], BaseException):
            raise chosen[0]
        version: Version | None = chosen[0]
        if version is not None and not self.is_first:
            state = pull(version)
        return version, state
