"""Each step of safety is shown to be needed: without it, the check of its own promise fails."""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collection_promises
import push_promises
import pytest
from promise_scene import Act, assert_pulls, push, repository
from safety_mutants import OTHERS, TELLING, Mutant
from test_power_loss import hurry
from trials import Trials

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError

PROMISES: dict[str, Callable[[Path], None]] = vars(push_promises) | vars(collection_promises)

# Not NameError and the like: a mutant that does not even run shows nothing.
_FAILURES = (AssertionError, pytest.fail.Exception, CkptError, OSError, ValueError)


def is_killed(mutant: Mutant, folder: Path) -> bool:
    """Whether the check of its promise fails for a mutant."""
    check: Callable[[Path], None] = PROMISES[mutant.promise]
    with mutant.applied():
        try:
            check(folder)
        except _FAILURES:
            return True
    return False


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.mark.torture("T7", unit="mutants")
def test_every_step_of_safety_that_is_left_out_is_noticed(trials: Trials, tmp_path: Path) -> None:
    """Five in an ordinary run, all of them in a longer one; the check passes without a mutant."""
    chosen = TELLING if trials.seconds is None else (*TELLING, *OTHERS)
    for seed in trials.seeds(1):
        checked: set[str] = set()
        for number, mutant in enumerate(random.Random(seed).sample(chosen, len(chosen))):
            if mutant.promise not in checked:
                checked.add(mutant.promise)
                PROMISES[mutant.promise](made(tmp_path / f"{number}-whole"))
            assert is_killed(mutant, made(tmp_path / f"{number}")), f"it lives: {mutant.name}"
            trials.count()
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()


def test_every_mutant_leaves_out_what_is_there() -> None:
    """Also those that only a longer run tries."""
    for mutant in (*TELLING, *OTHERS):
        assert mutant.promise in PROMISES, mutant.name
        with mutant.applied():
            pass


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_push_is_never_refused_whatever_is_collected_beside_it(tmp_path: Path) -> None:
    """With grace 0, before each act of a push that shares what was just removed."""
    with repository(tmp_path) as repo, ckpt.open(tmp_path) as other:
        for moment in itertools.count():
            shared, new = f"{moment}-shared", f"{moment}-new"
            repo.rm(push(repo, shared, f"{moment}-other"))
            collection = Beside(moment, lambda: other.gc(grace=0, allow=["much"]))
            with observed(collection):
                version = push(repo, shared, new)
            assert_pulls(repo, version, shared, new)
            if collection.seen <= moment:
                break
    assert moment > 10


class Beside:
    """A hook that does something before one of the acts that are not the registry's own: inside
    its transactions SQLite lets nobody write."""

    def __init__(self, moment: int, act: Act) -> None:
        self.seen = 0
        self._moment, self._act = moment, act

    def __call__(self, kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if not kind.startswith("sql"):
            self.seen += 1
            if self.seen == self._moment + 1:
                with observed(lambda kind, effect, args: effect(*args)):
                    self._act()
        return effect(*args)
