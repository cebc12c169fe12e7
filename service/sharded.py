"""Pushes of several processes: one opens the push, each writes packs of its own, one commits.

The rule of ``docs/safety.md`` holds as for any push: every pack carries the push's id, its rows
follow its bytes, what is shared is claimed under the push, and there is one commit.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, canonical, identity_bytes
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import NotFoundError
from ckpt.core.records import Environment, Version
from ckpt.core.tensors import TensorBytes
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import acknowledge_push
from ckpt.service.bases import Bases, base_of, check_compress
from ckpt.service.fetch import Wanted, fetch
from ckpt.service.pull import fill, with_bytes
from ckpt.service.push import Said, abort, check_may_push, commit, describe_push, same_version
from ckpt.service.upload import Progress, Upload
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.loader.restore import Restorer
    from ckpt.service.repository import Repository

# More packs than one process writes: its own are those from its number times this on.
_PACKS_EACH = 1_000_000


@dataclass(frozen=True, slots=True)
class Shard:
    """A box out of the tensor ``name``, with its values; a whole tensor is a box too."""

    name: str
    offset: tuple[int, ...]
    source: TensorBytes


@dataclass(frozen=True, slots=True)
class Written:
    """What one process brought into the store: the chunks of each of its shards, the packs that
    these rely on, and the bytes that it added."""

    chunks: tuple[tuple[str, ...], ...]
    needed: frozenset[str]
    new_bytes: int


class JointPush:
    """What each process of a push knows of it. One of them opens it and tells the others its id;
    each writes; when all have, the first commits. Whichever fails aborts it for all."""

    def __init__(
        self, store: Store, registry: Registry, said: Said, compress: str = "auto"
    ) -> None:
        self.said = said
        self._store = store
        self._registry = registry
        self._compress = check_compress(compress)

    def open(self) -> str:
        """Begin the push, and its lease; returns its id.

        Raises:
            ConflictError: as :func:`~ckpt.service.push.check_may_push`.
        """
        check_may_push(self._store, self._registry, self.said.model)
        push = secrets.token_hex(16)
        self._registry.books.open_push(push, "push")
        return push

    def is_open(self, push: str) -> bool:
        """Whether a push that was begun has not ended."""
        return self._registry.books.is_over(push) is False

    def push_alone(
        self,
        document: Document,
        environment: Mapping[str, Any],
        shards: Sequence[Shard],
        progress: Progress | None = None,
    ) -> Version:
        """Make the version of ``document`` from this process alone; ``shards`` are all of it."""
        push = self.open()
        try:
            written = self.write(push, 0, shards, progress)
            return self.commit(push, document, environment, [written])
        except BaseException as error:
            self.abort(push, error)
            raise

    def write(
        self, push: str, member: int, shards: Sequence[Shard], progress: Progress | None = None
    ) -> Written:
        """Bring the shards of process number ``member`` into the store, claimed for the push.

        Raises:
            ConflictError: ``push-expired`` when the push is not open any more.
        """
        sources = [shard.source for shard in shards]
        bases = self._find_bases(shards)
        with Upload(
            self._store,
            self._registry.books,
            sources,
            progress,
            compress=self._compress,
            bases=bases,
            push=push,
            first_pack=member * _PACKS_EACH,
        ) as upload:
            upload.hash()
            upload.finish()
            for finished in upload.unregistered:
                self._registry.books.register(push, finished)
        return Written(tuple(upload.digests), frozenset(upload.needed), upload.new_bytes)

    def _find_bases(self, shards: Sequence[Shard]) -> Bases:
        """The chunks of the same boxes of the model's newest version."""
        newest = None
        if self._compress == "max" or (self._compress == "auto" and self._store.is_near):
            newest = self._registry.queries.newest(self.said.model)
        if newest is None:
            return {}
        try:
            entries = self._registry.queries.document(newest).tensors
        except NotFoundError:  # removed meanwhile
            return {}
        known = {
            (entry.name, entry.dtype, part.offset, part.shape): chunks
            for entry in entries
            for part, chunks in entry.pieces()
        }
        boxes = [(one.name, one.source.dtype, one.offset, one.source.shape) for one in shards]
        wanted = {index: known[box] for index, box in enumerate(boxes) if box in known}
        digests = {digest for chunks in wanted.values() for digest in chunks}
        rows = self._registry.books.find_chunks(digests)
        return {
            index: [base_of(rows.get(digest, ()), digest) for digest in chunks]
            for index, chunks in wanted.items()
        }

    def commit(
        self,
        push: str,
        document: Document,
        environment: Mapping[str, Any],
        written: Iterable[Written],
    ) -> Version:
        """Make the version of what all processes wrote; durable and acknowledged when this
        returns. The newest version is answered instead when it has the same run, content, step,
        metrics and labels.
        """
        store, registry = self._store, self._registry
        recorded = Environment(document.environment, environment)
        digest = digest_of(identity_bytes(document))
        same = same_version(store, registry, self.said, document, digest)
        if same is not None:
            registry.books.abort(push)
            return same
        everything = list(written)
        needed = {pack for one in everything for pack in one.needed}
        nbytes = sum(
            math.prod(entry.shape) * ITEM_SIZES[entry.dtype]
            for entry in document.tensors
            if entry.has_bytes
        )
        facts = describe_push(self.said, document, digest, nbytes)
        new_bytes = sum(one.new_bytes for one in everything)
        commit(registry, push, facts, document, recorded, (), needed, new_bytes)
        return acknowledge_push(store, registry, push)

    def abort(self, push: str, error: BaseException) -> None:
        """End the push for all of its processes; what they wrote is there for the next one."""
        abort(self._registry, push, error)


def joint_push(repo: Repository, model: str, compress: str, **said: Any) -> JointPush:
    """A push that is not open yet; ``said`` is what :meth:`Repository.push` takes: step, metrics,
    labels, alias, message, parent and run."""
    return JointPush(repo._store, repo._registry, repo._said(model, **said), compress)


def environment_digest(environment: Mapping[str, Any]) -> str:
    """The digest under which a document names an environment."""
    return digest_of(canonical(environment))


def restorer_of(
    repo: Repository, version: Version, document: Document, indices: Iterable[int]
) -> Restorer:
    """What rebuilds these tensor entries, on the CPU; their bytes are read and checked."""
    from ckpt.loader.restore import Restorer

    needed = sorted(with_bytes(document, indices))
    filled = fill(repo._store, repo._registry, version, document, needed, None)
    return Restorer(document, filled, "cpu")


def read_wanted(repo: Repository, version: Version, wanted: Sequence[Wanted]) -> None:
    """Fill the spaces of ``wanted`` with checked bytes of a version."""
    fetch(repo._store, repo._registry, version, wanted)
