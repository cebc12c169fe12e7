"""repack: versions that need little of a large pack get a small one, so that gc frees the rest."""

from __future__ import annotations

import secrets

from ckpt.core.errors import CkptError, IntegrityError
from ckpt.core.records import Pack
from ckpt.registry.registry import Registry
from ckpt.storage.chunks import Places
from ckpt.storage.repack import write_again
from ckpt.storage.store import Store

# Below this share of needed bytes a pack is written again: at least as much goes as is written.
SHARE = 0.5


def write_sparse_again(store: Store, registry: Registry) -> tuple[list[Pack], list[str]]:
    """Write every mostly dead pack again, with what is needed of it.

    Returns the packs that were replaced, and what a person should look at: a damaged pack stays
    as it is. May fail anywhere; then nothing has changed, and gc removes what was written.
    """
    replaced: list[Pack] = []
    warnings: list[str] = []
    sparse = registry.repacks.sparse(SHARE)
    places = Places.of(registry.repairs.packs() if sparse else ())
    for pack, needed in sparse:
        try:
            if _replace(store, registry, pack, needed, places):
                replaced.append(pack)
        except IntegrityError as error:
            warnings.append(f"not repacked, run `ckpt fsck --read-data`: {error.message}")
    return replaced, warnings


def _replace(store: Store, registry: Registry, old: Pack, needed: set[str], places: Places) -> bool:
    """Whether a version was moved; a pack that others are removing meanwhile is left to them."""
    push = secrets.token_hex(16)
    claimed = registry.books.open_push(push, "repack", {old.id})
    try:
        # (c): a claim, then the size.
        if not claimed or store.size(old.key) != old.size:
            registry.books.abort(push)
            return False
        finished = write_again(store, old, needed, push, places)
        return registry.repacks.switch(push, finished, old.id) > 0
    except BaseException as error:
        try:
            registry.books.abort(push)
        except CkptError as failed:
            error.add_note(f"the repack {push} stays open until its lease ends: {failed}")
        raise
