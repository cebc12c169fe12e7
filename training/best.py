"""Which version of a run is the best so far: the one that an alias names, whoever trained it."""

from __future__ import annotations

import math
import warnings

from ckpt.core.errors import CkptError, CkptWarning, NotFoundError
from ckpt.core.names import check_alias, named_metrics
from ckpt.core.records import Version
from ckpt.service.repository import Repository


def best_alias(run: str) -> str:
    """The alias of a run's best version; runs of other names have one of their own each."""
    return check_alias("best" if run == "main" else f"best-{run}")


def named_best(repo: Repository, model: str, alias: str) -> Version | None:
    """The version that the alias names now."""
    try:
        return repo.get(f"{model}:{alias}")
    except NotFoundError:
        return None


def is_best(
    repo: Repository, model: str, alias: str, metric: str, value: float, *, greater: bool
) -> bool:
    """Whether a value is better than that of the version which the alias names. Where that cannot
    be read, the alias stays where it is, which is told by a :class:`CkptWarning`."""
    if not math.isfinite(value):
        return False
    try:
        holder = named_best(repo, model, alias)
    except CkptError as error:
        said = f"{model}:{alias} was not compared with {metric} {value:g}: {error}"
        warnings.warn(said, CkptWarning, stacklevel=3)
        return False
    (key,) = named_metrics({metric: value})
    best = math.nan if holder is None else holder.metrics.get(key, math.nan)
    if not math.isfinite(best):
        return True
    return value > best if greater else value < best
