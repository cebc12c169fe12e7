"""prune: which versions of a model the rules keep, and the end of the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

from ckpt.core.durations import seconds_of
from ckpt.core.errors import ConflictError, NotFoundError, UsageError
from ckpt.core.names import check_model
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.rules import Best, Every, Latest, Rule, Within, rule_of
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import acknowledge_event
from ckpt.service.author import author
from ckpt.service.tripwire import check_newest
from ckpt.storage.store import Store

# What a rule keeps, as pushes, of versions that are given newest first, at a time of the registry.
Keep = Callable[[Sequence[Version], int], Collection[str]]


@dataclass(frozen=True, slots=True)
class Pruned:
    """What a prune removed, or with ``dry_run`` would remove.

    Attributes:
        victims: versions that no rule keeps, oldest first.
        kept: versions with the rules that keep them.
        freed_bytes: what goes from the store with exactly these victims, after ``gc``.
    """

    model: str
    victims: tuple[Version, ...]
    kept: tuple[tuple[Version, tuple[str, ...]], ...]
    rules: tuple[str, ...]
    freed_bytes: int
    dry_run: bool


def prune_model(
    store: Store,
    registry: Registry,
    model: str,
    rules: Sequence[Rule | str] = (),
    *,
    dry_run: bool = False,
    save: bool = False,
    run: str | None = None,
    spared: Collection[str] = (),
) -> Pruned:
    """Remove the versions of a model that no rule keeps. Rules look at each run by itself; its
    newest version, every aliased one and what a live run resumed from stay.

    Args:
        rules: ``last:N``, ``best:METRIC:min|max:N``, ``every:STEPS``, ``within:7d``; none means
            those that were saved.
        save: keep these rules for the next time.
        run: look at this run alone.
        spared: pushes of versions that whoever asks resumed from.

    Raises:
        UsageError: ``rule-invalid``, or ``no-rules`` when there are none.
        NotFoundError: ``metric-missing`` when no version has the metric of a rule that is given.
    """
    check_model(model)
    check_newest(store, registry)
    chosen = tuple(check_rules(rules)) or registry.queries.policy(model)
    if not chosen:
        raise UsageError(
            "no-rules",
            f"no rule says what to keep of {model}",
            hint="give --keep-last 3 or others, or keep=[…] from Python",
        )
    keepers = {rule: parse_rule(rule) for rule in chosen}
    versions = registry.queries.log(model, None, 1 << 40)
    if run is not None:
        versions = [version for version in versions if version.run == run]
    if rules and run is None:
        _check_metrics(model, keepers, versions)
    if save and not dry_run and chosen != registry.queries.policy(model):
        event = registry.changes.save_policy(model, chosen, author())
        acknowledge_event(store, registry, event)
    kept: dict[str, tuple[str, ...]] = {}
    now = registry.collector.now()
    resumed = {*spared, *registry.runs.spared()}
    for name in {version.run for version in versions}:
        mine = [version for version in versions if version.run == name]
        kept |= _kept(mine, keepers, now, resumed)
    victims = [version for version in reversed(versions) if version.push not in kept]
    freed = registry.usages.freed_by({version.push for version in victims})
    if not dry_run:
        victims = [version for version in victims if _remove(store, registry, version)]
    reasons = tuple((version, kept[version.push]) for version in versions if version.push in kept)
    return Pruned(model, tuple(victims), reasons, chosen, freed, dry_run)


def _check_metrics(model: str, rules: Iterable[str], versions: Sequence[Version]) -> None:
    """Refuse a rule by a metric that no version has: it would keep nothing."""
    known = {name for version in versions for name in version.metrics}
    for rule in rules:
        best = rule_of(rule)
        if versions and isinstance(best, Best) and best.metric not in known:
            raise NotFoundError(
                "metric-missing",
                f'no version of {model} has the metric "{escape(best.metric, 80)}"',
                hint=f"there are {escape(', '.join(sorted(known)), 200) or 'none'}",
            )


def _kept(
    versions: Sequence[Version],
    keepers: dict[str, Keep],
    now: int,
    resumed: Collection[str],
) -> dict[str, tuple[str, ...]]:
    """Pushes of the versions that stay, with the reasons."""
    reasons: dict[str, list[str]] = {}
    for version in versions:
        if version.aliases:
            reasons[version.push] = [f"alias {' '.join(version.aliases)}"]
        if version.push in resumed:
            reasons.setdefault(version.push, []).append("resumed from")
    if versions:
        reasons.setdefault(versions[0].push, []).append("newest")
    for rule, keep in keepers.items():
        for push in dict.fromkeys(keep(versions, now)):
            reasons.setdefault(push, []).append(rule)
    return {push: tuple(words) for push, words in reasons.items()}


def _remove(store: Store, registry: Registry, version: Version) -> bool:
    """End one version; one that somebody removed, named or resumed from meanwhile is left alone."""
    try:
        event = registry.changes.remove(version.push, author(), kind="prune")
    except (ConflictError, NotFoundError):
        return False
    acknowledge_event(store, registry, event)
    return True


def check_rules(rules: Sequence[Rule | str] | Rule) -> list[str]:
    """The rules as text, also of one alone; UsageError ``rule-invalid`` for what is none."""
    given = [rules] if isinstance(rules, (str, Latest, Best, Every, Within)) else rules or ()
    said = [str(rule) for rule in given]
    for rule in said:
        parse_rule(rule)
    return said


def parse_rule(rule: str) -> Keep:
    """The function that picks what a rule keeps; it is given versions newest first, and the time
    by the clock that dated them, the registry's, in microseconds since 1970.

    Raises:
        UsageError: ``rule-invalid``.
    """
    match rule_of(rule):
        case Latest(count):
            return lambda versions, now: [version.push for version in versions[:count]]
        case Every(steps):
            return lambda versions, now: _every(versions, steps)
        case Within(duration):
            seconds = seconds_of(duration)
            assert seconds is not None
            return lambda versions, now: _recent(versions, now, seconds)
        case Best(metric, mode, count):
            sign = 1 if mode == "min" else -1
            return lambda versions, now: _best(versions, metric, sign, count)


def _every(versions: Sequence[Version], steps: int) -> list[str]:
    first: dict[int, str] = {}
    multiples = []
    for version in reversed(versions):
        if version.step is not None:
            first.setdefault(version.step // steps, version.push)
            if version.step % steps == 0:
                multiples.append(version.push)
    return [*first.values(), *multiples]


def _recent(versions: Sequence[Version], now: int, seconds: int) -> list[str]:
    since = now / 1e6 - seconds
    return [version.push for version in versions if version.created_at.timestamp() >= since]


def _best(versions: Sequence[Version], metric: str, sign: int, count: int) -> list[str]:
    """Non-finite metrics are never best; of equal ones the newer is."""
    measured = [
        version
        for version in versions
        if metric in version.metrics and math.isfinite(version.metrics[metric])
    ]
    ordered = sorted(measured, key=lambda version: sign * version.metrics[metric])
    return [version.push for version in ordered[:count]]
