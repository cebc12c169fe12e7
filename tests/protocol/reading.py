"""The steps of a reader without a claim, as in ``service/fetch.py``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from protocol import layout as of
from protocol.explore import Step, bits, changed

if TYPE_CHECKING:
    from protocol.sharing import Sharing


def steps(model: Sharing, state: bytes, number: int) -> Iterator[Step]:
    """What a reader may do next."""
    at, version = model.readers[number], model.setting.readers[number]
    place = state[at]
    if place == of.IDLE:
        yield from _plan(model, state, number, at, version)
    elif place in (of.READ, of.AGAIN):
        yield from _read(model, state, number, at, version)


def _plan(model: Sharing, state: bytes, number: int, at: int, version: int) -> Iterator[Step]:
    """``Books.read_plan``: one snapshot; rows of the version's packs only, chains closed."""
    refs = state[model.refs + version]
    need = model.needs[version]
    if not refs:
        yield f"reader {number} finds nothing", changed(state, (at, of.DONE), *_cleared(at))
        return
    if model.rule.reader == "any-row" and _is_astray(model, state, need, refs):
        yield f"reader {number} takes a row without its base", changed(state, (at, of.FAILED))
    for plan, _ in model.plans(state, need, refs, None):
        changes = (at, of.READ), (at + of.LEFT, plan), (at + of.NOW, refs)
        yield f"reader {number} plans {plan:b}", changed(state, *changes)


def _is_astray(model: Sharing, state: bytes, need: int, refs: int) -> bool:
    """Whether some row of the digest has a base that none of the version's packs has."""
    known = model.readable[model.contents(state, refs)]
    return any(
        base is not None and need >> digest & 1 and not known >> base & 1
        for bit in bits(model.contents(state, state[of.LIVE]))
        for digest, base in [model.setting.entries[bit]]
    )


def _read(model: Sharing, state: bytes, number: int, at: int, version: int) -> Iterator[Step]:
    """``fetch``: what is missing under an unchanged plan is an error, else it is made anew."""
    pack = min(bits(state[at + of.LEFT]))
    if state[of.PRESENT] >> pack & 1:
        left = state[at + of.LEFT] ^ 1 << pack
        changes = ((at + of.LEFT, left),) if left else ((at, of.DONE), *_cleared(at))
        yield f"reader {number} reads {pack}", changed(state, *changes)
    elif model.rule.reader == "first-plan":
        place = of.FAILED if state[at] == of.AGAIN else of.AGAIN
        yield f"reader {number} misses {pack}", changed(state, (at, place))
    elif not state[model.refs + version] or state[of.DAMAGED] >> version & 1:
        yield f"reader {number} is told", changed(state, (at, of.DONE), *_cleared(at))
    elif state[at + of.BEFORE] == state[at + of.NOW]:
        yield f"reader {number} gives up", changed(state, (at, of.FAILED))
    else:
        changes = (at, of.IDLE), (at + of.BEFORE, state[at + of.NOW])
        yield f"reader {number} misses {pack}", changed(state, *changes)


def _cleared(at: int) -> tuple[tuple[int, int], ...]:
    return (at + of.LEFT, 0), (at + of.NOW, 0), (at + of.BEFORE, 0)
