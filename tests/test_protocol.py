"""The rule of ``docs/safety.md`` as models: every state explored, and every part of it needed."""

from __future__ import annotations

import random

import pytest
from protocol import layout as of
from protocol.explore import explore, run_only, search, walk
from protocol.layout import Actor, Setting
from protocol.settings import LARGE, SAFE_ALONE, SMALL, WALKS
from protocol.sharing import Sharing
from protocol.variants import LOSSES, RESTORES, SHARING, Variant
from trials import Trials

LEAST_STATES = 600_000
SAMPLED = 400
# What needs no push and no reader: expiry, rm, collectors, and the arrival of what was sent.
CLEANING = ("T5", "rm", "gc", "sweep", "DELETE", "PUT 0 lands", "PUT 1 lands", "PUT 2 lands")


@pytest.mark.torture("T6", unit="states")
def test_no_state_breaks_a_promise(trials: Trials) -> None:
    """With ``--minutes`` the large settings follow the small ones."""
    models = {**SMALL, **LARGE}
    for name, _ in zip(models, trials.seeds(len(SMALL)), strict=False):
        found = explore(models[name])
        print(f"{found.states:>10,}  {name}")
        trials.count(found.states)
        assert found.violation is None, (name, found.violation, found.run)
    print(f"{trials.counted:>10,}  together")
    assert trials.seconds is not None or trials.counted >= LEAST_STATES


@pytest.mark.parametrize("name", SAFE_ALONE)
def test_one_defence_is_enough_where_there_are_two(name: str) -> None:
    found = explore(SAFE_ALONE[name])
    assert found.violation is None, found.run


@pytest.mark.parametrize(
    "variant", [*SHARING, *LOSSES, *RESTORES], ids=lambda variant: variant.name
)
def test_without_this_part_of_the_rule_a_promise_breaks(variant: Variant) -> None:
    found = explore(variant.model)
    assert found.violation == variant.promise
    assert len(found.run) == variant.steps, found.run


@pytest.mark.torture("T6", unit="steps")
def test_no_random_run_of_a_larger_setting_breaks_a_promise(trials: Trials) -> None:
    for seed in trials.seeds(200):
        for name, model in WALKS.items():
            found = walk(model, random.Random(f"{seed} {name}"), 300)
            trials.count(found.states)
            assert found.violation is None, (name, found.violation, found.run)


def _sample(model: Sharing) -> list[bytes]:
    _, states = search(model)
    return random.Random(0).sample(list(states), min(SAMPLED, len(states)))


def test_abort_rm_and_gc_alone_empty_the_store_from_any_state() -> None:
    model = Sharing(Setting(packs=(), versions=(), actors=(Actor(early=True), Actor())))
    for state in _sample(model):
        state = run_only(model, state, CLEANING)
        left = state[of.LIVE] | state[of.CONDEMNED] | state[of.PRESENT] | state[of.FLYING]
        assert not left, list(state)
        assert not any(state[place] for place in model.versions)


def test_a_fresh_push_left_alone_commits_from_any_state() -> None:
    model = Sharing(Setting(loses=1, actors=(Actor(), Actor())))
    at = model.actors[1]
    own = f"PUT {model.own[1]} lands"
    fresh = [state for state in _sample(model) if state[at] == of.NEW]
    assert len(fresh) > 10
    for state in fresh:
        after = run_only(model, state, ("T1 1", "look 1", "T2 1", "HEAD 1", "PUT 1", own, "T4 1"))
        assert after[at + of.ROW] == of.COMMITTED, list(state)


def test_a_reader_left_alone_ends_with_its_bytes_or_is_told() -> None:
    repack = Actor(kind="repack")
    model = Sharing(Setting(((0, None), (1, None)), packs=(3,), actors=(repack,), readers=(0,)))
    for state in _sample(model):
        after = run_only(model, state, ("reader",))
        assert after[model.readers[0]] == of.DONE, list(state)
