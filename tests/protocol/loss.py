"""What a state of the model of losses consists of, the rule, and the settings that are explored.

Push ``i`` makes version ``i`` and may write pack ``i``; all have the same content, so that any
pack serves any version. A state has masks of the registry, the store, of what was promised to somebody and
what processes know, and then some bytes for each push.
"""

from __future__ import annotations

from dataclasses import dataclass

# The registry: packs with a row, rm events by version, dead events by key, the next number; then
# for each push its state, the packs of its version, those it claims, and the rm events that the
# death of its key waits for.
ROWS, RMS, DEADS, NEXT = range(4)
PUSH, REFS, CLAIMS, WAITS, NUMBER, STEP = range(6)
NONE, OPEN, COMMITTED, ABORTED = range(4)

# Packs: there, DELETE sent, PUT under way. Of documents, rm events and dead events: in the store
# and counting, under way, and under way since before a loss. Documents that come a second time.
(
    PRESENT,
    SENT,
    FLYING,
    DOCS,
    DOCS_FLYING,
    DOCS_LATE,
    RM_STORED,
    RM_FLYING,
    RM_LATE,
    DEAD_STORED,
    DEAD_FLYING,
    DEAD_LATE,
    DUE,
    # Promised: versions, removals. Removals that began. Versions that came back incomplete.
    ACKED,
    RM_ACKED,
    BEGUN,
    INCOMPLETE,
    # How many losses are left, how far a listing is, and what it found; and what processes of
    # the lost registry still want to tell or delete.
    LOSSES,
    PHASE,
    GOT_DOCS,
    GOT_RMS,
    GOT_DEADS,
    OLD_PUSHES,
    OLD_KEYS,
) = range(4, 28)
FIXED = 28
START, CHOOSE, PUT, CLAIMED, END = range(5)
RUNNING, LOST, LISTED_ONE, LISTED_TWO = range(4)

# (stored, under way, late), and how its steps are called.
KINDS = (
    (DOCS, DOCS_FLYING, DOCS_LATE, "document"),
    (RM_STORED, RM_FLYING, RM_LATE, "rm"),
    (DEAD_STORED, DEAD_FLYING, DEAD_LATE, "dead"),
)


@dataclass(frozen=True)
class LossRule:
    """The rule; every field that is changed breaks one part of it."""

    document: str = "after"  # before, before-deleted, abort-event (safe, section 0 line 1)
    push_acknowledged: str = "asked"  # replied, committed
    rm_acknowledged: str = "asked"  # committed
    same_acknowledged: str = "asked"  # committed
    delete: str = "asked"  # replied, dead
    dead_events: str = "all"  # none, removed
    dead_waits: str = "earlier"  # all, nothing
    reads_rm: bool = True
    keeps_rm: bool = True
    late_counts: frozenset[str] = frozenset()  # kinds whose late copies count
    older_counts: bool = False
    cut_off: str = "all"  # pushes, collectors, documents: what is not
    numbers: str = "counter"  # newest
    rm_by: str = "push"  # number
    restore: str = "rebuild"  # back: the backup is put in place
    older_backup_adds: bool = False
    gc_tripwire: str = "all"  # seq, none
    push_tripwire: bool = True


@dataclass(frozen=True)
class LossSetting:
    """How many pushes, losses of the registry, and what else may happen.

    Attributes:
        done: pushes that are committed, copied and acknowledged at the beginning.
        listing: ``at once``, ``events first`` or ``documents first``.
        backups: whether a backup may be made, and once be restored.
    """

    pushes: int = 2
    losses: int = 1
    done: int = 0
    listing: str = "at once"
    same: bool = False
    second_document: bool = False
    backups: bool = False
    rule: LossRule = LossRule()
    promises: frozenset[str] = frozenset({"bytes", "lost", "returned", "number"})
