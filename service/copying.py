"""copy: a version into another repository, its chunks read from here and checked on the way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, Tensor, structure_bytes
from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import escape
from ckpt.core.records import Environment, Version
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import acknowledge_push
from ckpt.service.push import Described, Said, check_may_push, is_repeated, push_described
from ckpt.service.sharded import JointPush, Shard
from ckpt.service.upload import Progress
from ckpt.storage.chunks import Places, read_chunk
from ckpt.storage.store import Store


class StoredTensor:
    """Bytes of one tensor entry in a store, all of it or a part; every chunk is checked when it is
    read."""

    def __init__(
        self,
        entry: Tensor,
        shape: tuple[int, ...],
        chunks: Sequence[str],
        store: Store,
        places: Places,
    ) -> None:
        self.name = entry.name
        self.dtype = entry.dtype
        self.shape = shape
        self.nbytes = math.prod(shape) * ITEM_SIZES[entry.dtype]
        self._chunks = chunks
        self._store = store
        self._places = places

    def read(self, offset: int, length: int) -> memoryview:
        """One whole chunk: a push reads along their bounds."""
        if not length:
            return memoryview(b"")
        body = memoryview(bytearray(length))
        try:
            read_chunk(self._store, self._places, self._chunks[offset // CHUNK_BYTES], body)
        except IntegrityError as error:
            said = f'"{escape(self.name, 80)}": {error.message}'
            raise IntegrityError(
                "object-corrupt", said, hint="run `ckpt fsck --read-data`"
            ) from error
        return body


def copy_version(
    source: tuple[Store, Registry],
    version: Version,
    target: tuple[Store, Registry],
    model: str,
    progress: Progress | None = None,
) -> Version:
    """Push a version of one repository to another: the same document, environment and facts; the
    chunks that are there already are shared. Run again, it goes on where it was.

    A version of the model there is answered instead when it has the same run, content, step,
    metrics and labels, also one that is not the newest: copies of several versions, made again,
    add nothing.

    Raises:
        IntegrityError: ``object-corrupt`` when the source is damaged; nothing was committed.
    """
    store, registry = source
    document = registry.queries.document(version)
    environment: Environment = registry.queries.environment(version)
    places = Places(*registry.books.read_plan(version.push))
    said = Said(
        model=model,
        step=version.step,
        metrics=version.metrics,
        labels=version.labels,
        message=version.message,
        run=version.run,
    )
    check_may_push(*target, model)
    known = _copied_before(*target, said, document, version.digest)
    if known is not None:
        return known
    if any(entry.parts for entry in document.tensors):
        shards = list(_shards(document, store, places))
        joint = JointPush(*target, said)
        return joint.push_alone(document, environment.body, shards, progress)

    sources = _whole(document.tensors, store, places)
    probed = _whole(document.probe_tensors, store, places)
    described = _described(document, version, sources, probed)
    return push_described(*target, described, said, environment.body, progress)[0]


def _copied_before(
    store: Store, registry: Registry, said: Said, document: Document, digest: str
) -> Version | None:
    for version in registry.queries.of_digest(said.model, digest):
        if is_repeated(store, registry, version, said, document, digest):
            return acknowledge_push(store, registry, version.push)
    return None


def _whole(entries: Sequence[Tensor], store: Store, places: Places) -> list[StoredTensor | None]:
    return [
        StoredTensor(entry, entry.stored_shape, entry.chunks, store, places)
        if entry.has_bytes
        else None
        for entry in entries
    ]


def _shards(document: Document, store: Store, places: Places) -> Iterator[Shard]:
    """The parts of every entry: chunked anew as wholes, they would make another version."""
    for entry in document.tensors:
        if not entry.has_bytes:
            continue
        for part, chunks in entry.pieces():
            shape = part.shape if entry.parts else entry.stored_shape
            stored = StoredTensor(entry, shape, chunks, store, places)
            yield Shard(entry.name, part.offset, stored)


def _described(
    document: Document,
    version: Version,
    sources: Sequence[StoredTensor | None],
    probed: Sequence[StoredTensor | None],
) -> Described:
    return Described(
        state=document.state,
        root=document.root,
        tensors=document.tensors,
        sources=sources,
        order=document.order,
        modules=document.modules,
        classes=document.classes,
        wrappers=document.wrappers,
        dropped=document.dropped,
        probe=document.probe,
        probe_sources=probed,
        structure=digest_of(structure_bytes(document)) if document.modules else None,
        proof=version.proof,
        header=document.safetensors,
        files=document.files,
    )
