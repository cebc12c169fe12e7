"""A save that goes on in the background, and what is told of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from ckpt.core.errors import CkptError, NotFoundError
from ckpt.core.records import Added, Version
from ckpt.core.sizes import size
from ckpt.service.repository import Repository

_TELL_SECONDS = 30.0  # of a wait, between two lines


class Saved:
    """A save that goes on in the background."""

    def __init__(
        self,
        repo: Repository,
        step: int,
        answer: Future[dict[str, Any]],
        stalled: float,
    ) -> None:
        self.step = step
        self.stalled = stalled
        self.answer = answer
        self.is_told = False  # that it failed
        self._repo = repo

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self.answer.done()

    def awaited(self, timeout: float | None, say: Callable[[str], None]) -> dict[str, Any]:
        """What the process that saves answers; one who waits long is told so. Raises what went
        wrong, and TimeoutError."""
        waited = 0.0
        while True:
            left = math.inf if timeout is None else timeout - waited
            patience = min(_TELL_SECONDS, left)
            try:
                return self.answer.result(patience)
            except TimeoutError:
                if patience == left:
                    raise
            waited += patience
            say(f"waiting for step {self.step} to be stored, {waited:.0f} s so far")

    def version(self, timeout: float | None = None) -> Version | None:
        """The version, when it is durable; None on the ranks that save nothing. Raises what went
        wrong, which no later call of the run does then, and TimeoutError."""
        try:
            said = self.answer.result(timeout)
        except CkptError:
            self.is_told = True
            raise
        if not said:
            return None
        found = self._repo._registry.queries.by_push(said["push"])
        if found is None:
            raise NotFoundError("version-missing", "a rule removed this version meanwhile")
        return found


def told(of: Mapping[str, int], nbytes: int) -> str:
    """Where the bytes of a save are."""
    added = Added(**of)
    line = f"{size(nbytes)}, {size(added.new)} new, {size(added.shared)} shared"
    line += f", {size(added.by_differences)} saved by differences"
    return f"{line}, {size(added.by_coding)} by coding" if added.by_coding else line


def nothing() -> Future[dict[str, Any]]:
    """The answer to a save on a rank that saves nothing."""
    answer: Future[dict[str, Any]] = Future()
    answer.set_result({})
    return answer
