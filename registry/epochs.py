"""The epoch of a registry: a rebuild closes the old one before it looks at the store."""

from __future__ import annotations

from ckpt.core.errors import ConflictError
from ckpt.registry.tables import CLOSED


def check_not_closed(epoch: int) -> None:
    """Refuse to write in a registry that a rebuild has cut off (k).

    Raises:
        ConflictError: ``registry-closed``.
    """
    if epoch == CLOSED:
        raise ConflictError(
            "registry-closed",
            "the registry is being rebuilt, or a rebuild of it failed or was stopped on its way",
            hint="wait for it; if none is at work, run `ckpt registry rebuild` again, which ends this",
        )
