"""The model of a backup of the registry that is restored, and of the tripwire against it."""

from __future__ import annotations

from collections.abc import Iterator

from protocol import loss as of
from protocol.explore import Step, bits
from protocol.loss import LossSetting
from protocol.rebuild import Rebuild

NOT_YET, MADE, RESTORED, OVER = range(4)


class Restore(Rebuild):
    """Losses, and one backup; its bytes come last, after a byte that says what became of it."""

    def __init__(self, setting: LossSetting) -> None:
        super().__init__(setting)
        self.backup = self.length
        self.length += 1 + len(self.registry)

    def steps(self, state: bytes) -> Iterator[Step]:
        yield from super().steps(state)
        if state[of.PHASE] != of.RUNNING:
            return
        if state[self.backup] == NOT_YET:
            registry = enumerate((state[place] for place in self.registry), self.backup + 1)
            yield "backup", self.put(state, (self.backup, MADE), *registry)
        elif state[self.backup] == MADE:
            yield from self._restore(state)

    def _restore(self, state: bytes) -> Iterator[Step]:
        """By the rule the backup is only an input of a rebuild."""
        backup = dict(zip(self.registry, state[self.backup + 1 :], strict=True))
        ended = [(self.step + push, of.END) for push in self.pushes if state[self.step + push]]
        if self.rule.restore == "back":
            ended += backup.items()
            ended += [(place, 0) for place in self._places()]
            yield "restore", self.put(state, (self.backup, RESTORED), *ended)
            return
        known = sum(1 << push for push in self.pushes if backup[self.refs + push])
        ended += [(place, 0) for place in (*self.registry, *self._places())]
        listed = self._listed(self.put(state, *ended, (self.backup, RESTORED)), of.KINDS)
        for added in {0, known & ~listed[of.RM_STORED]}:
            for after in self._rebuilt(listed, added):
                yield "restore", after

    def _places(self) -> range:
        return range(self.backup + 1, self.length)

    def _lose(self, state: bytes) -> Iterator[Step]:
        """A backup of an earlier epoch is of no use any more."""
        for name, after in super()._lose(state):
            if state[self.backup] == MADE and self.rule.older_backup_adds:
                yield name, after
            else:
                places = ((place, 0) for place in self._places())
                yield name, self.put(after, (self.backup, OVER), *places)

    def broken(self, state: bytes) -> Iterator[str]:
        """In a registry that was put back a version may be missing, or be there although it was
        removed; but what a rebuild needs must be left, and no new version lose its bytes."""
        if state[self.backup] != RESTORED or self.rule.restore != "back":
            yield from super().broken(state)
            return
        there = state[of.PRESENT] & ~state[of.SENT]
        promised = state[of.ACKED] & ~state[of.BEGUN]
        if any(state[self.refs + push] & ~there for push in bits(promised)):
            yield "bytes"
        documents = state[of.DOCS] & ~state[of.RM_STORED]
        if promised and (promised & ~documents or not there & ~state[of.DEAD_STORED]):
            yield "lost"
        if "number" in super().broken(state):
            yield "number"

    def may_push(self, state: bytes) -> bool:
        return not self.rule.push_tripwire or not self._unknown(state)

    def may_collect(self, state: bytes) -> bool:
        if self.rule.gc_tripwire == "seq":
            return not state[of.DEAD_STORED] & ~state[of.DEADS]
        return self.rule.gc_tripwire == "none" or not self._unknown(state)

    def _unknown(self, state: bytes) -> int:
        """Whether the store has a document or event that the registry does not know."""
        documents = state[of.DOCS] & ~self.versions(state) & ~state[of.RMS]
        removals = state[of.RM_STORED] & ~state[of.RMS]
        return documents | removals | state[of.DEAD_STORED] & ~state[of.DEADS]
