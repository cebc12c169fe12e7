"""What an operator does with a repository: free, prune, check, look."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from ckpt.core.durations import check_duration
from ckpt.core.names import check_count
from ckpt.core.records import Event
from ckpt.core.rules import Rule
from ckpt.registry.registry import Registry
from ckpt.service.config import Location
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.service.doctor import Finding
    from ckpt.service.fsck import Checked
    from ckpt.service.gc import Collected
    from ckpt.service.retention import Pruned
    from ckpt.service.usage import DiskUsage


class Upkeep:
    """The part of a :class:`~ckpt.Repository` that keeps it in order."""

    location: Location
    _registry: Registry
    _store: Store

    def gc(
        self,
        *,
        grace: float | str = 7 * 86400,
        dry_run: bool = False,
        allow: Collection[str] = (),
        repack: bool = False,
    ) -> Collected:
        """Free the bytes that no version needs, ``grace`` after the first call that saw so; safe beside
        pushes, pulls and other collectors.

        Args:
            grace: in seconds, or as text such as ``"7d"``.
            allow: reasons to refuse that are overruled: ``empty``, ``unknown``, ``much``.
            repack: first write packs again of which versions need less than half.

        Raises:
            ConflictError: ``gc-refused``, naming the reason.
            UsageError: ``duration-invalid``.
        """
        from ckpt.service.gc import collect

        seconds = check_duration(grace)
        return collect(
            self._store, self._registry, seconds, dry_run=dry_run, allow=allow, repack=repack
        )

    def prune(
        self,
        model: str,
        *,
        keep: Sequence[Rule | str] = (),
        dry_run: bool = False,
        save: bool = False,
    ) -> Pruned:
        """Remove the versions of a model that no rule keeps; their bytes go with a later ``gc``.
        Rules look at each run by itself; its newest version and every aliased one stay.

        Args:
            keep: ``ckpt.Latest(3)``, ``Best("val_loss", "min", 2)``, ``Every(1000)``,
                ``Within("7d")``, or as text ``"last:3"``, ``"best:val_loss:min:2"``,
                ``"every:1000"``, ``"within:7d"``; by default the rules that were saved.
            save: keep these rules for the next time.

        Raises:
            UsageError: ``rule-invalid``, ``no-rules``.
            NotFoundError: ``model-missing``, ``metric-missing``.
        """
        from ckpt.service.retention import prune_model

        return prune_model(self._store, self._registry, model, keep, dry_run=dry_run, save=save)

    def events(self, *, since: str | None = None, limit: int = 100) -> list[Event]:
        """Who did what to what, newest first by the clock of the registry; ``since`` is ``7d``,
        ``12h`` or an ISO date.

        Raises:
            UsageError: ``time-invalid``, ``limit-invalid``.
        """
        from ckpt.service.history import read_since

        return self._registry.queries.events(read_since(since), check_count("limit", limit))

    def fsck(self, *, read_data: float = 0.0, repair: bool = False) -> Checked:
        """Compare the store with the registry; a bad pack becomes broken, so that the next push
        of its content writes it again.

        Args:
            read_data: the share of the packs whose every byte is read, from 0 to 1.
            repair: write missing documents and events again, and move versions from broken packs
                to whole ones that have the same chunks. No pack is deleted.
        """
        from ckpt.service.fsck import check

        return check(self._store, self._registry, read_data, repair=repair)

    def doctor(self) -> list[Finding]:
        """What the repository rests on, looked at one by one, and what to do about each."""
        from ckpt.service.doctor import examine

        return examine(self.location, self._store, self._registry)

    def du(self) -> DiskUsage:
        """What the store holds, and what removing each version would free."""
        from ckpt.service.usage import disk_usage

        return disk_usage(self._registry)
