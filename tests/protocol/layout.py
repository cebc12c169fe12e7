"""What a state of the model of sharing consists of, the rule, and the settings that are explored.

A state is a row of bytes. Most of them are masks with one bit for each pack; then come what the
packs contain, what the versions refer to, and where each actor and reader is.
"""

from __future__ import annotations

from dataclasses import dataclass

# Masks of packs: rows by state, keys that are dead, DELETE sent, bytes there, PUT under way,
# second PUT under way, lost by the disk, seen in an old snapshot, locked by an open transaction.
LIVE, CONDEMNED, BROKEN, DEAD, SENT, PRESENT, FLYING, DUE, LOST, SEEN, LOCKED = range(11)
DAMAGED = 11  # a mask of versions
CONTENTS = 12

# Of an actor: where it is, the state of its row, its claims, its plan, and packs it leaves out.
STEP, ROW, CLAIMS, PLAN, AVOID = range(5)
NEW, LOOK, CLAIM, RESCUE, CHECK, EARLY, WRITE, PUT, REGISTER, COMMIT, INSERT, SWITCH, END = range(
    13
)
NONE, OPEN, COMMITTED, ABORTED = range(4)

# Of a reader: where it is, the packs left to read, the references seen now and the time before.
PLACE, LEFT, NOW, BEFORE = range(4)
IDLE, READ, AGAIN, DONE, FAILED = range(5)


@dataclass(frozen=True)
class Rule:
    """The rule; every field that is changed breaks one part of it."""

    refs: str = "closed"  # direct, one: without bases, without bases of bases
    claims: bool = True
    claims_bases: bool = True
    claims_need_open: bool = True
    claims_broken: bool = False
    rescue: str = "locked"  # unlocked, upsert
    checks_size: bool = True
    bytes_first: bool = True
    registers_open: bool = True
    claims_own: bool = True
    commit_checks_push: bool = True
    commit_checks_rows: bool = True
    commit_checks_digests: bool = True
    commit_at_once: bool = True
    abort_at_once: bool = True
    abort_removes: str = "nothing"  # rows, bytes
    reopens: bool = False
    adopts: bool = False
    gc_reads_refs: bool = True
    gc_reads_claims: bool = True
    gc_snapshot: str = "fresh"  # old, old-live
    deletes_condemned: bool = False
    sweep: str = "rule"  # row-ignored, open-ignored, row-first
    repack_claims: bool = True
    repack_live_set: str = "locked"  # start, without-bases, relying
    repack_kills: str = "no"  # claims-moved, claims-forgotten
    repack_checks_push: bool = True
    repair_claims: bool = True
    repair_checks: bool = True
    reader: str = "rule"  # any-row, first-plan


@dataclass(frozen=True)
class Actor:
    """A push, repack or repair.

    Attributes:
        need: the digests of the push, a mask.
        delta: whether it writes a difference where it can.
        early: whether its pack is registered before the commit.
        source: the pack to be repacked or replaced.
        version: the version to be repaired.
        key: the pack that it writes, if not one of its own.
    """

    kind: str = "push"
    need: int = 1
    delta: bool = False
    early: bool = False
    source: int = 0
    version: int = 0
    key: int | None = None


@dataclass(frozen=True)
class Setting:
    """What there is at the beginning, and who takes part.

    Attributes:
        entries: what a pack can contain: a digest, and its base or None.
        packs: the contents of the packs that are there, masks of entries.
        versions: of those that are there: the digests needed and the packs referred to.
        readers: the version that each reads.
        loses: packs that the disk may lose while no open push claims them.
        doubts: packs that fsck may call broken although they are whole.
    """

    entries: tuple[tuple[int, int | None], ...] = ((0, None),)
    packs: tuple[int, ...] = (1,)
    versions: tuple[tuple[int, int], ...] = ((1, 1),)
    actors: tuple[Actor, ...] = (Actor(),)
    readers: tuple[int, ...] = ()
    loses: int = 0
    doubts: int = 0
    fsck: bool = False
    second_put: bool = False
    forgets: bool = False
    decodes: bool = False
    split_switch: bool = False
    rule: Rule = Rule()
    promises: frozenset[str] = frozenset({"bytes", "rows", "claims", "kept", "reader"})
