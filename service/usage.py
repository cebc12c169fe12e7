"""du: what the store holds, what each version holds alone, and what could be freed."""

from __future__ import annotations

from dataclasses import dataclass

from ckpt.core.records import Usage
from ckpt.registry.registry import Registry


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes of packs.

    Attributes:
        stored: all packs.
        reclaimable: packs that no version needs; ``gc`` frees them when their grace ends.
        versions: each version's own and shared bytes; removing one frees exactly its ``unique``.
    """

    stored: int
    reclaimable: int
    versions: tuple[Usage, ...]


def disk_usage(registry: Registry) -> DiskUsage:
    """Add up the books; the store is not asked."""
    unneeded = registry.collector.unneeded()
    return DiskUsage(
        stored=registry.queries.stored_bytes(),
        reclaimable=sum(one.pack.size for one in unneeded),
        versions=tuple(registry.usages.versions()),
    )
