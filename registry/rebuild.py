"""A registry made anew from what the store holds: packs, documents and events (rule (k))."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import func, insert, select, update

from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, canonical, structure_bytes
from ckpt.core.errors import IntegrityError
from ckpt.core.records import Chunk, FinishedPack, Pack, PushState
from ckpt.registry.aside import grant_again, set_aside
from ckpt.registry.books import insert_pack
from ckpt.registry.commit import (
    insert_document,
    insert_missing,
    note_classes,
    run_id,
    set_labels,
    set_metrics,
)
from ckpt.registry.engine import Database, Transaction
from ckpt.registry.fence import Fence, check_left, locked_position
from ckpt.registry.schema import lock_schema, make_tables
from ckpt.registry.tables import (
    aliases,
    dead_keys,
    environments,
    events,
    meta,
    models,
    policies,
    pushes,
    refs,
    versions,
)

_ENDINGS = ("rm", "prune")


@dataclass(frozen=True, slots=True)
class StoredVersion:
    """One document of the store: what the push said, what it pushed, and where."""

    facts: Mapping[str, Any]
    document: Document
    environment: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class StoreContents:
    """What a store holds that counts; ``epoch`` is the new one. ``keys`` are those of all packs,
    and ``lost`` by their ids those that versions name and that are missing or damaged."""

    epoch: int
    versions: Sequence[StoredVersion]
    events: Sequence[Mapping[str, Any]]
    packs: Sequence[FinishedPack]
    keys: frozenset[str]
    lost: Mapping[str, Pack]

    @property
    def removed(self) -> set[str]:
        """The pushes whose versions were removed by an act."""
        return {event["push"] for event in self.events if event["kind"] in _ENDINGS}


def check_numbers(contents: StoreContents) -> None:
    """Refuse what an old copy of the registry leaves that was put back and used: numbers that are
    given a second time.

    Raises:
        IntegrityError: ``number-twice``.
    """
    seen: dict[tuple[str, int], str] = {}
    for version in contents.versions:
        name = version.facts["model"], version.facts["number"]
        other = seen.setdefault(name, version.facts["push"])
        if other != version.facts["push"]:
            raise IntegrityError(
                "number-twice",
                f"two versions are {name[0]}@{name[1]}: of the pushes {other} and "
                f"{version.facts['push']}",
                hint="move the document of one out of documents/ in the store, and run again",
            )


def rebuild(
    database: Database,
    store: str,
    contents: StoreContents,
    closed: Fence,
    open_epoch: Callable[[], None],
) -> tuple[list[str], str | None]:
    """Make the registry of the store with this id anew, in one transaction; returns the versions
    whose bytes are not all there, which are kept, and the schema of an old one on a server.
    ``open_epoch`` writes the new epoch to the store, when all that can fail before is done."""

    def act(transaction: Transaction) -> tuple[list[str], str | None]:
        lock_schema(transaction)
        check_left(closed, locked_position(transaction))
        kept = set_aside(transaction, contents.epoch)
        make_tables(transaction, store)
        if kept is not None:
            grant_again(transaction, kept)
        damaged = _Rebuild(transaction, contents).run()
        open_epoch()
        return damaged, kept

    return database.write(act)


@dataclass(slots=True)
class _Rebuild:
    """The rows that follow from a store, in the order in which they refer to each other."""

    transaction: Transaction
    contents: StoreContents
    models: dict[str, int] = field(default_factory=dict)
    acts: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)  # of each model
    damaged: list[str] = field(default_factory=list)
    _places: dict[str, list[Chunk]] = field(default_factory=dict)
    _broken: set[str] = field(default_factory=set)

    def run(self) -> list[str]:
        every = [version.facts["counter"] for version in self.contents.versions]
        every += [event["counter"] for event in self.contents.events]
        counter = max(every, default=0) + 1
        values = {"epoch": self.contents.epoch, "next_counter": counter}
        self.transaction.run(update(meta).values(**values))
        removed = self.contents.removed
        check_numbers(self.contents)
        self._make_models()
        self._make_events()
        self._make_pushes(removed)
        self._make_packs()
        kept = {
            one.facts["push"]: one
            for one in self.contents.versions
            if one.facts["push"] not in removed
        }
        ids = {push: self._make_version(one) for push, one in kept.items()}
        mine = select(func.count()).select_from(versions).where(versions.c.model == models.c.id)
        self.transaction.run(update(models).values(version_count=mine.scalar_subquery()))
        for name in self.models:
            self._replay(name, kept, ids)
        return sorted(self.damaged)

    def _make_models(self) -> None:
        """Counters end above every number and place that was ever given."""
        said = [version.facts for version in self.contents.versions]
        said += [event for event in self.contents.events if "model" in event]
        for facts in said:
            self.acts.setdefault(facts["model"], []).append(facts)
        for name, mine in sorted(self.acts.items()):
            row = {
                "name": name,
                "folded": name.lower(),
                "next_number": max(facts.get("number", 0) for facts in mine) + 1,
                "next_event": max(facts["sequence"] for facts in mine) + 1,
            }
            made = self.transaction.run(insert(models).returning(models.c.id), row)
            self.models[name] = made.scalar_one()

    def _make_events(self) -> None:
        for event in self.contents.events:
            row = {
                "id": event["id"],
                "kind": event["kind"],
                "epoch": event["epoch"],
                "counter": event["counter"],
                "model": self.models.get(event.get("model", "")),
                "model_seq": event.get("sequence"),
                "created_at": event["time"],
                "author": event["author"],
                "body": canonical(event),
                "copied": True,
            }
            self.transaction.run(insert(events), row)
            if event["kind"] == "dead" and event["key"] in self.contents.keys:
                self.transaction.run(insert(dead_keys), {"key": event["key"], "event": event["id"]})

    def _make_pushes(self, removed: set[str]) -> None:
        """Committed for every version that there is or was, aborted for every other push seen."""
        committed = {version.facts["push"] for version in self.contents.versions} | removed
        seen = {pack.pack.push for pack in self.contents.packs} | committed
        for push in sorted(seen):
            state = PushState.COMMITTED if push in committed else PushState.ABORTED
            row = {"id": push, "kind": "push", "state": state.value}
            self.transaction.run(
                insert(pushes), {**row, "expires_at": 0, "epoch": self.contents.epoch}
            )

    def _make_packs(self) -> None:
        for finished in self.contents.packs:
            insert_pack(self.transaction, finished)
            for chunk in finished.chunks:
                self._places.setdefault(chunk.digest, []).append(chunk)

    def _make_version(self, version: StoredVersion) -> int:
        facts, document = version.facts, version.document
        insert_document(self.transaction, facts["document_digest"], document)
        environment = canonical(version.environment)
        insert_missing(
            self.transaction, environments, "digest", digest_of(environment), body=environment
        )
        proof = facts.get("proof") or [None, None]
        is_module = document.state == "module"
        model = self.models[facts["model"]]
        row = {
            "model": model,
            "run": run_id(self.transaction, model, facts["run"]),
            "document": facts["document_digest"],
            "environment": digest_of(environment),
            "state": document.state,
            "created_at": facts["time"],
            "structure_digest": digest_of(structure_bytes(document)) if is_module else None,
            "proof": proof[0],
            "proof_reason": proof[1],
            "facts": canonical(facts),
            "copied": True,
            **{name: facts[name] for name in _SAME},
        }
        made = self.transaction.run(insert(versions).returning(versions.c.id), row).scalar_one()
        note_classes(self.transaction, made, document)
        needed, whole = self._choose_packs(version)
        if not whole:
            self.damaged.append(f"{facts['model']}@{facts['number']}")
            needed |= self._make_lost(facts["packs"])
        if needed:
            rows = [{"version": made, "pack": pack} for pack in sorted(needed)]
            self.transaction.run(insert(refs), rows)
        return int(made)

    def _make_lost(self, named: Sequence[str]) -> set[str]:
        """Rows for the lost ones of ``named``, as broken packs: what is put back in their places
        is needed then, and no leftover of a push. Returns them."""
        lost = self.contents.lost.keys() & named
        for pack in sorted(lost - self._broken):
            found = self.contents.lost[pack]
            row = {"id": found.push, "kind": "push", "state": PushState.ABORTED.value}
            self.transaction.insert_absent(
                pushes, {**row, "expires_at": 0, "epoch": self.contents.epoch}
            )
            insert_pack(self.transaction, FinishedPack(found, ()))
        self._broken |= lost
        return lost

    def _choose_packs(self, version: StoredVersion) -> tuple[set[str], bool]:
        """Packs from which every digest can be read, those that the push named first, bases
        included; and whether there are."""
        named = set(version.facts["packs"])
        entries = (*version.document.tensors, *version.document.probe_tensors)
        chosen: set[str] = set()
        whole = True
        for digest in {chunk for entry in entries for chunk in entry.chunks}:
            places = sorted(
                self._places.get(digest, []),
                key=lambda chunk: (chunk.base is not None, chunk.pack not in named, chunk.pack),
            )
            for chunk in places:
                bases = [] if chunk.base is None else self._raw(chunk.base)
                if chunk.base is None or bases:
                    chosen |= {chunk.pack, *(base.pack for base in bases[:1])}
                    break
            else:
                whole = False
        return chosen, whole

    def _raw(self, digest: str) -> list[Chunk]:
        return [chunk for chunk in self._places.get(digest, []) if chunk.base is None]

    def _replay(
        self, model: str, there: Mapping[str, StoredVersion], ids: Mapping[str, int]
    ) -> None:
        """Aliases, labels and metrics, as the pushes and then the acts on the model left them."""
        named: dict[str, str] = {}
        labelled: dict[str, dict[str, str]] = {}
        measured: dict[str, dict[str, float]] = {}
        policy: str | None = None
        for act in sorted(self.acts[model], key=lambda act: act["sequence"]):
            push, kind = act.get("push", ""), act.get("kind", "push")
            if kind == "push":
                named |= dict.fromkeys(act["aliases"], push)
            if kind in ("push", "label"):
                for key in act.get("removed", ()):
                    labelled.get(push, {}).pop(key, None)
                    measured.get(push, {}).pop(key, None)
                labelled.setdefault(push, {}).update(act["labels"])
                values = {name: float(value) for name, value in act["metrics"].items()}
                measured.setdefault(push, {}).update(values)
            elif kind == "tag":
                named[act["alias"]] = push
            elif kind == "untag":
                named.pop(act["alias"], None)
            elif kind == "policy":
                policy = canonical(act["policy"]).decode()
        if policy is not None:
            self.transaction.run(insert(policies), {"model": self.models[model], "body": policy})
        for push in there:
            if there[push].facts["model"] == model:
                set_labels(self.transaction, ids[push], labelled.get(push))
                set_metrics(self.transaction, self.models[model], ids[push], measured.get(push))
        for alias, push in named.items():
            if push in ids:
                row = {"model": self.models[model], "name": alias, "version": ids[push]}
                self.transaction.run(insert(aliases), row)


_SAME = (
    "number",
    "push",
    "digest",
    "step",
    "parent",
    "message",
    "author",
    "nbytes",
    "new_bytes",
    "sequence",
    "epoch",
    "counter",
)
