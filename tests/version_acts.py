"""The state machine of ``test_machine``, first part: what is done to versions.

Two actors in a repository and one in another, an invariant after every act, and the acts push,
tag, untag, annotate, rm and prune; some of them by an actor who dies in the middle.
"""

from __future__ import annotations

import itertools
import random
import shutil
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from shelf import Content, Facts, Kept
from shelved_place import Place

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import CkptError, ConflictError, NotFoundError

MOST_VERSIONS = 6

actors = st.integers(0, 2)  # two in the repository, one in the one that it is copied to
models = st.sampled_from(["m", "vision/n"])
picks = st.integers(0, 99)
contents = st.builds(
    Content,
    st.sampled_from(["file", "file", "state"]),
    st.lists(st.sampled_from("abcdef"), max_size=4).map(tuple),
)
aliases = st.lists(st.sampled_from(["best", "old"]), max_size=2, unique=True).map(tuple)
losses = st.sampled_from([None, 0.5, 0.25, float("nan")])
facts = st.builds(
    Facts,
    contents,
    step=st.sampled_from([None, 0, 5, 10]),
    loss=losses,
    label=st.sampled_from([None, "x"]),
    run=st.sampled_from(["main", "other"]),
    aliases=aliases,
)
rules_of_prune = st.lists(
    st.sampled_from(["last:1", "last:3", "best:loss:min:1", "best:loss:max:2", "every:10"]),
    min_size=1,
    max_size=2,
).map(tuple)


class Stopped(BaseException):
    """The actor died here."""


@contextmanager
def dying(at: int) -> Iterator[None]:
    """Whoever acts dies before effect ``at``."""
    numbers = itertools.count()

    def hook(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if next(numbers) >= at:
            raise Stopped
        return act(*args)

    with observed(hook):
        yield


@contextmanager
def refused(code: str) -> Iterator[None]:
    """What is done ends with this error."""
    with pytest.raises(CkptError) as caught:
        yield
    assert caught.value.code == code


class VersionsMachine(RuleBasedStateMachine):
    """Acts on two repositories, each with two actors."""

    template: ClassVar[Path]
    examples: ClassVar[int] = 0
    ids: ClassVar[random.Random]  # where ckpt's own ids come from: an example can be repeated

    def __init__(self) -> None:
        super().__init__()
        VersionsMachine.examples += 1
        VersionsMachine.ids = random.Random(0)
        self.folder = self.template.with_name(f"example-{VersionsMachine.examples}")
        self.place = Place(self.template / "mine", self.folder / "mine")
        self.places = [self.place]  # a copy makes the second one
        self.gone: list[tuple[Place, ckpt.Version]] = []

    def teardown(self) -> None:
        try:
            for place in self.places:
                place.check_all_pulls(1)
            for place, version in self.gone:
                place.check_gone(1, version)
        finally:
            for place in self.places:
                place.close()
            shutil.rmtree(self.folder)

    def at(self, who: int) -> tuple[Place, int]:
        """An actor: where it is, and its number there."""
        return self.places[who // 2 % len(self.places)], who % 2

    def choose(self, who: int, pick: int) -> tuple[Place, int, Kept]:
        """An actor, and one of the versions there; some are somewhere."""
        place, actor = self.at(who)
        if not place.shelf.versions:
            place = next(each for each in self.places if each.shelf.versions)
        return place, actor, place.shelf.versions[pick % len(place.shelf.versions)]

    def has_versions(self) -> bool:
        return any(place.shelf.versions for place in self.places)

    @invariant()
    def all_is_as_the_model_says(self) -> None:
        for place in self.places:
            place.check_shelf()

    def has_room(self) -> bool:
        return all(len(place.shelf.versions) < MOST_VERSIONS for place in self.places)

    @precondition(has_room)
    @rule(who=actors, model=models, facts=facts)
    def push(self, who: int, model: str, facts: Facts) -> None:
        self.push_at(*self.at(who), model, facts)

    def push_at(
        self, place: Place, actor: int, model: str, facts: Facts, damaged: Container[int] = ()
    ) -> None:
        """Push, with the version as answer that the model expects."""
        again = place.shelf.is_repeated(model, facts, damaged)
        version = place.push(actor, model, facts)
        place.check_record(version, place.shelf.push(model, facts, damaged))
        if not again:
            place.check_pull(1 - actor, version, facts.content)

    @precondition(lambda self: self.has_room() and self.has_versions())
    @rule(who=actors, pick=picks, aliases=aliases, step=st.sampled_from([None, 5]))
    def push_known_content(
        self, who: int, pick: int, aliases: tuple[str, ...], step: int | None
    ) -> None:
        place, actor, kept = self.choose(who, pick)
        before = place.pack_files()
        same = kept.facts if step is None else replace(kept.facts, step=step)
        self.push_at(place, actor, kept.model, replace(same, aliases=aliases))
        assert place.pack_files() == before  # nothing is stored twice

    @precondition(has_room)
    @rule(who=actors, model=models, facts=facts, at=st.integers(0, 120))
    def push_and_die(self, who: int, model: str, facts: Facts, at: int) -> None:
        place, actor = self.at(who)
        facts = replace(facts, aliases=())
        line = place.shelf.lines.get(model)
        number = line.next_number if line else 1
        try:
            with dying(at):
                place.push(actor, model, facts)
        except Stopped:
            place.reopen(actor, Stopped)
            if number not in place.numbers(model):
                return
        version = place.actor(actor).get(model)
        place.check_record(version, place.shelf.push(model, facts))

    @rule(who=actors)
    def reopen(self, who: int) -> None:
        place, actor = self.at(who)
        place.reopen(actor)

    @precondition(has_versions)
    @rule(who=actors, pick=picks, alias=st.sampled_from(["best", "old"]))
    def tag(self, who: int, pick: int, alias: str) -> None:
        place, actor, kept = self.choose(who, pick)
        place.actor(actor).tag(kept.reference, alias)
        place.shelf.lines[kept.model].aliases[alias] = kept.number

    @precondition(has_versions)
    @rule(who=actors, pick=picks, alias=st.sampled_from(["best", "old"]), expected=picks)
    def tag_if_it_names(self, who: int, pick: int, alias: str, expected: int) -> None:
        place, actor, kept = self.choose(who, pick)
        line = place.shelf.lines[kept.model]
        number = sorted(line.versions)[expected % len(line.versions)]
        expect = line.versions[number].reference
        if line.aliases.get(alias) == number:
            place.actor(actor).tag(kept.reference, alias, expect=expect)
            line.aliases[alias] = kept.number
        else:
            with refused("alias-moved"):
                place.actor(actor).tag(kept.reference, alias, expect=expect)

    @precondition(has_versions)
    @rule(who=actors, pick=picks, alias=st.sampled_from(["best", "old"]))
    def untag(self, who: int, pick: int, alias: str) -> None:
        place, actor, kept = self.choose(who, pick)
        repo, model, shelf = place.actor(actor), kept.model, place.shelf
        if alias not in shelf.lines[model].aliases:
            with refused("alias-missing"):
                repo.untag(f"{model}:{alias}")
        else:
            repo.untag(f"{model}:{alias}")
            del shelf.lines[model].aliases[alias]

    @precondition(has_versions)
    @rule(who=actors, pick=picks, loss=losses, label=st.sampled_from(["y", None]))
    def annotate(self, who: int, pick: int, loss: float | None, label: str | None) -> None:
        place, actor, kept = self.choose(who, pick)
        metrics = {} if loss is None else {"loss": loss}
        labels = {} if label is None else {"note": label}
        repo, removed = place.actor(actor), ["note"] if "note" in kept.labels else []
        if not removed:
            with refused("label-missing"):
                repo.annotate(kept.reference, metrics=metrics, labels=labels, remove=["note"])
        version = repo.annotate(kept.reference, metrics=metrics, labels=labels, remove=removed)
        kept.metrics |= metrics
        kept.labels = labels
        place.check_record(version, kept)

    @precondition(has_versions)
    @rule(who=actors, pick=picks)
    def rm(self, who: int, pick: int) -> None:
        place, actor, kept = self.choose(who, pick)
        repo = place.actor(actor)
        if place.shelf.lines[kept.model].aliases_of(kept.number):
            with refused("aliased"):
                repo.rm(kept.reference)
            return
        self.end(place, kept, repo.rm(kept.reference))
        with refused("version-missing"):
            place.actor(1 - actor).rm(kept.reference)

    @precondition(has_versions)
    @rule(who=actors, pick=picks, at=st.integers(0, 40))
    def rm_and_die(self, who: int, pick: int, at: int) -> None:
        place, actor, kept = self.choose(who, pick)
        version = place.actor(actor).get(kept.reference)
        with suppress(Stopped, ConflictError), dying(at):
            place.actor(actor).rm(version)
        place.reopen(actor, Stopped)
        if kept.number not in place.numbers(kept.model):
            self.end(place, kept, version)

    def end(self, place: Place, kept: Kept, version: ckpt.Version) -> None:
        """The version is gone, and known to be."""
        place.shelf.remove(kept)
        place.check_gone(0, version)
        self.gone.append((place, version))

    @precondition(has_versions)
    @rule(who=actors, pick=picks, rules=rules_of_prune, mode=st.sampled_from(["dry", "save", ""]))
    def prune(self, who: int, pick: int, rules: tuple[str, ...], mode: str) -> None:
        place, actor, kept = self.choose(who, pick)
        line = place.shelf.lines[kept.model]
        if line.lacks_metric(rules):
            with pytest.raises(NotFoundError, match="has the metric"):
                place.actor(actor).prune(kept.model, keep=rules)
            return
        victims = sorted(line.versions.keys() - line.kept_by(rules))
        freed = place.freed_by([line.versions[number] for number in victims])
        repo = place.actor(actor)
        pruned = repo.prune(kept.model, keep=rules, dry_run=mode == "dry", save=mode == "save")
        assert [version.number for version in pruned.victims] == victims
        assert pruned.freed_bytes == freed
        if mode == "save":
            line.rules = rules
        for version in () if mode == "dry" else pruned.victims:
            self.end(place, line.versions[version.number], version)

    @precondition(has_versions)
    @rule(who=actors, pick=picks)
    def prune_by_the_saved_rules(self, who: int, pick: int) -> None:
        place, actor, kept = self.choose(who, pick)
        line = place.shelf.lines[kept.model]
        if not line.rules:
            with refused("no-rules"):
                place.actor(actor).prune(kept.model)
            return
        victims = sorted(line.versions.keys() - line.kept_by(line.rules))
        pruned = place.actor(actor).prune(kept.model)
        assert pruned.rules == line.rules
        assert [version.number for version in pruned.victims] == victims
        for version in pruned.victims:
            self.end(place, line.versions[version.number], version)
