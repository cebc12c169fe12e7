"""The newest version of a run that is whole, which is what a job goes on from."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import TypeVar

from ckpt.core.errors import CkptError, CkptWarning, IntegrityError, NotFoundError
from ckpt.core.records import Version
from ckpt.service.fsck import mark_damaged
from ckpt.service.repository import Repository

Pulled = TypeVar("Pulled")


def newest_whole(
    repo: Repository, model: str, run: str, pull: Callable[[Version], Pulled]
) -> tuple[Version, Pulled] | None:
    """The newest version that ``pull`` gives, with what it gave; None when the run has none. A
    damaged version is told by a :class:`CkptWarning`, and the one before is taken; what is wrong
    is marked, so that no later save relies on it.

    Raises:
        IntegrityError: ``none-whole`` when every version is damaged.
    """
    failed: IntegrityError | None = None
    for version in versions_of(repo, model, run):
        try:
            return version, pull(version)
        except IntegrityError as error:
            failed = error
            with contextlib.suppress(CkptError):  # fsck can be run
                mark_damaged(repo._store, repo._registry, version)
            warnings.warn(
                f"{version.reference} is not whole and the one before is taken: {error}",
                CkptWarning,
                stacklevel=5,
            )
        except NotFoundError:  # a rule removed it meanwhile
            continue
    if failed is not None:
        raise IntegrityError(
            "none-whole",
            f"no version of the run {run} of {model} is whole",
            hint="run `ckpt fsck --repair`, or begin a run of another name",
        ) from failed
    return None


def begun_over(repo: Repository, model: str, run: str) -> list[str]:
    """The push of the run's newest version, which a training that begins anew is not to remove;
    that there is one is told by a :class:`CkptWarning`."""
    version = next(versions_of(repo, model, run), None)
    if version is None:
        return []
    warnings.warn(
        f"{version.reference} is the newest of the run {run}, and this training begins anew; call"
        " resume() first to go on from it, or give this run another name",
        CkptWarning,
        stacklevel=7,
    )
    return [version.push]


def versions_of(repo: Repository, model: str, run: str) -> Iterator[Version]:
    """The run's versions, newest first; the order of saves, whatever their steps."""
    before: int | None = None
    while page := _page(repo, model, before):
        yield from (version for version in page if version.run == run)
        before = page[-1].number


def _page(repo: Repository, model: str, before: int | None) -> list[Version]:
    try:
        return repo.log(model, before=before, limit=100)
    except NotFoundError:
        return []
