"""What a repository must hold after each act: the model that ``test_machine`` compares with."""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from crash_driver import file_of

NBYTES = 64


@dataclass(frozen=True)
class Content:
    """What is pushed: a tensor for each name, as a ``.safetensors`` file or as a state."""

    kind: Literal["file", "state"]
    names: tuple[str, ...]

    @functools.cached_property
    def file(self) -> bytes:
        """The bytes of the file."""
        return file_of(*self.names, nbytes=NBYTES)

    @functools.cached_property
    def tensors(self) -> dict[str, bytes]:
        """The bytes of each tensor, as ``file_of`` makes them."""
        return {
            f"t{place}": random.Random(name).randbytes(NBYTES)
            for place, name in enumerate(self.names)
        }

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """The tensors as torch has them."""
        return {
            name: torch.frombuffer(bytearray(body), dtype=torch.uint8)
            for name, body in self.tensors.items()
        }


@dataclass(frozen=True)
class Facts:
    """What a push says; ``loss`` is its only metric, ``label`` its only label."""

    content: Content
    step: int | None = None
    loss: float | None = None
    label: str | None = None
    run: str = "main"
    aliases: tuple[str, ...] = ()

    @property
    def metrics(self) -> dict[str, float]:
        return {} if self.loss is None else {"loss": self.loss}

    @property
    def labels(self) -> dict[str, str]:
        return {} if self.label is None else {"note": self.label}


@dataclass
class Kept:
    """A version that must be there."""

    model: str
    number: int
    content: Content
    step: int | None
    run: str
    parent: str | None
    metrics: dict[str, float]
    labels: dict[str, str]

    @property
    def reference(self) -> str:
        return f"{self.model}@{self.number}"

    @property
    def facts(self) -> Facts:
        """What to push so that it is there once more."""
        loss, label = self.metrics.get("loss"), self.labels.get("note")
        return Facts(self.content, self.step, loss, label, self.run)

    def is_repeated_by(self, facts: Facts) -> bool:
        """Whether a push of this, if it is the newest, is answered with it."""
        mine = self.content, self.step, self.run, self.labels
        same = mine == (facts.content, facts.step, facts.run, facts.labels)
        return same and repr(self.metrics) == repr(facts.metrics)  # a NaN equals itself here


@dataclass
class Line:
    """A model: its versions by number, and what is said of them."""

    next_number: int = 1
    versions: dict[int, Kept] = field(default_factory=dict)
    aliases: dict[str, int] = field(default_factory=dict)
    rules: tuple[str, ...] = ()

    @property
    def newest(self) -> Kept | None:
        return self.versions[max(self.versions)] if self.versions else None

    def aliases_of(self, number: int) -> tuple[str, ...]:
        return tuple(sorted(alias for alias, named in self.aliases.items() if named == number))

    def kept_by(self, rules: Iterable[str]) -> set[int]:
        """The numbers that a prune leaves; rules look at each run by itself."""
        kept = {*self.aliases.values()}
        for run in {one.run for one in self.versions.values()}:
            mine = {number: one for number, one in self.versions.items() if one.run == run}
            kept.add(max(mine))
            for rule in rules:
                kept |= _kept_of_run(mine, *rule.split(":"))
        return kept

    def lacks_metric(self, rules: Iterable[str]) -> bool:
        """Whether a rule is by a metric that no version has."""
        has_loss = any("loss" in one.metrics for one in self.versions.values())
        return not has_loss and any(rule.startswith("best:") for rule in rules)


def _kept_of_run(mine: Mapping[int, Kept], word: str, *given: str) -> set[int]:
    if word == "last":
        return set(sorted(mine)[-int(given[0]) :])
    if word == "every":
        steps = {number: one.step for number, one in mine.items() if one.step is not None}
        interval = {number: step // int(*given) for number, step in steps.items()}
        firsts = {min(n for n in steps if interval[n] == one) for one in interval.values()}
        return firsts | {number for number, step in steps.items() if not step % int(*given)}
    sign = 1 if given[1] == "min" else -1
    measured = [
        (sign * one.metrics["loss"], -number)
        for number, one in mine.items()
        if math.isfinite(one.metrics.get("loss", math.nan))
    ]
    return {-number for _, number in sorted(measured)[: int(given[2])]}


@dataclass
class Shelf:
    """All models of a repository; ``removed`` has what was there once, as ``(model, number)``."""

    lines: dict[str, Line] = field(default_factory=dict)
    removed: set[tuple[str, int]] = field(default_factory=set)

    @property
    def versions(self) -> list[Kept]:
        return [kept for line in self.lines.values() for kept in line.versions.values()]

    def is_repeated(self, model: str, facts: Facts, damaged: Container[int] = ()) -> bool:
        """Whether a push would be answered with the model's newest version; one that is damaged
        is never the answer. ``damaged`` has their ``id()``."""
        newest = self.lines[model].newest if model in self.lines else None
        return newest is not None and id(newest) not in damaged and newest.is_repeated_by(facts)

    def push(self, model: str, facts: Facts, damaged: Container[int] = ()) -> Kept:
        """The version that a push must answer."""
        again = self.is_repeated(model, facts, damaged)
        line = self.lines.setdefault(model, Line())
        kept = line.newest
        if kept is None or not again:
            kept = Kept(
                model=model,
                number=line.next_number,
                content=facts.content,
                step=facts.step,
                run=facts.run,
                parent=self._parent(model, facts.run),
                metrics=facts.metrics,
                labels=facts.labels,
            )
            line.versions[kept.number] = kept
            line.next_number += 1
        line.aliases |= dict.fromkeys(facts.aliases, kept.number)
        return kept

    def copy(self, model: str, facts: Facts) -> Kept:
        """The version that a copy must answer: also one that is not the newest."""
        line = self.lines.get(model, Line())
        known = [kept for kept in line.versions.values() if kept.is_repeated_by(facts)]
        return known[-1] if known else self.push(model, facts)

    def _parent(self, model: str, run: str) -> str | None:
        """The run's previous version, else the newest."""
        versions = self.lines[model].versions
        mine = [number for number, kept in versions.items() if kept.run == run]
        return f"{model}@{max(mine or versions)}" if versions else None

    def remove(self, kept: Kept) -> None:
        """The version is gone for ever."""
        del self.lines[kept.model].versions[kept.number]
        self.removed.add((kept.model, kept.number))
