"""Watching a model grow: a metric over its versions, and new versions as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from ckpt.core.errors import NotFoundError
from ckpt.core.names import check_key, check_model
from ckpt.core.records import Curve, Version

if TYPE_CHECKING:
    from ckpt.service.repository import Repository

_PAGE = 100


def read_curve(
    repo: Repository,
    model: str,
    metric: str,
    before: int | None = None,
    limit: int | None = None,
) -> Curve:
    """A metric of a model's versions, in one snapshot that reads nothing else of them.

    Args:
        before: only of versions below this number.
        limit: of the newest so many that have it; by default of all.

    Raises:
        UsageError: ``name-invalid``.
        NotFoundError: ``model-missing``; ``metric-missing``, naming those that there are.
    """
    check_key("metric", metric)
    return repo._registry.curves.read(check_model(model), metric, before, limit)


def newest_number(repo: Repository, model: str) -> int:
    """The number of a model's newest version; 0 where there is none yet, nor a model."""
    newest = repo._registry.queries.newest(check_model(model))
    return 0 if newest is None else newest.number


def follow(
    repo: Repository, model: str, after: int, wait: Callable[[], None]
) -> Iterator[list[Version]]:
    """The versions above number ``after``, oldest first, in pages as they come; without end.
    ``wait`` is called whenever there are no more yet, nor a model."""
    while True:
        page = _page(repo, model, after)
        if page:
            after = page[-1].number
            yield page
        else:
            wait()


def _page(repo: Repository, model: str, after: int) -> list[Version]:
    try:
        return repo._registry.queries.since(model, after, _PAGE)
    except NotFoundError:
        return []
