"""Push: a described state becomes a version (the order of steps is ``docs/safety.md``)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec.structs import replace

from ckpt.core.digests import digest_of
from ckpt.core.documents import (
    FORMAT,
    Document,
    File,
    ModelClass,
    Module,
    Probe,
    SafetensorsFile,
    Tensor,
    canonical,
    encode_document,
    identity_bytes,
)
from ckpt.core.errors import CkptError, StorageError
from ckpt.core.records import (
    Added,
    Environment,
    FinishedPack,
    PackState,
    Proof,
    PushFacts,
    Version,
)
from ckpt.core.references import parse_reference
from ckpt.core.tensors import TensorBytes
from ckpt.registry.commit import name_clash
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import acknowledge_event, acknowledge_push
from ckpt.service.author import author
from ckpt.service.bases import Compress, Kept, find_bases
from ckpt.service.tripwire import check_newest
from ckpt.service.upload import Progress, Upload
from ckpt.storage.store import Store

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """A state, ready to be pushed; ``sources[i]`` has the bytes of ``tensors[i]``, or is None,
    and ``probe_sources`` those of the probe's tensors.

    ``check`` is called when all bytes were read, and raises if they changed meanwhile.
    """

    state: Literal["module", "values", "files"]
    root: Any
    tensors: Sequence[Tensor]
    sources: Sequence[TensorBytes | None]
    order: tuple[tuple[int, tuple[int, ...]], ...] = ()
    modules: tuple[Module, ...] = ()
    classes: tuple[ModelClass, ...] = ()
    wrappers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    probe: Probe | None = None
    probe_sources: Sequence[TensorBytes | None] = ()
    structure: str | None = None
    proof: Proof | None = None
    header: SafetensorsFile | None = None
    files: Mapping[str, File] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """What the caller says about the new version; every value is checked already."""

    model: str
    step: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    message: str | None = None
    parent: str | None = None
    run: str = "main"


def push_described(
    store: Store,
    registry: Registry,
    described: Described,
    said: Said,
    environment: Mapping[str, Any],
    progress: Progress | None = None,
    compress: Compress = "auto",
    kept: Kept | None = None,
) -> tuple[Version, Added]:
    """Make a version of a described state, and say what it took; durable and acknowledged when
    this returns.

    The newest version of the model is answered instead when it has the same run, content, step,
    metrics and labels.
    """
    check_may_push(store, registry, said.model)
    sources = [source for source in described.sources if source is not None]
    probed = [source for source in described.probe_sources if source is not None]
    recorded = Environment(digest_of(canonical(environment)), environment)
    everything = [*sources, *probed]
    with Upload(
        store,
        registry.books,
        everything,
        progress,
        apart=len(sources),
        compress=compress,
        bases=find_bases(store, registry, said.model, sources, compress, kept or {}),
        kept=kept,
    ) as upload:
        try:
            upload.hash()
            document = _document(described, upload.digests, recorded.digest)
            digest = digest_of(identity_bytes(document))
            same = None if upload.opened else same_version(store, registry, said, document, digest)
            if same is not None:
                described.check()
                return same, upload.added
            upload.finish()
            described.check()
            nbytes = sum(source.nbytes for source in sources)
            facts = describe_push(
                said, document, digest, nbytes, described.structure, described.proof
            )
            commit(
                registry,
                upload.push,
                facts,
                document,
                recorded,
                upload.unregistered,
                upload.needed,
                upload.new_bytes,
            )
        except BaseException as error:
            if upload.opened:
                abort(registry, upload.push, error)
            raise
    return acknowledge_push(store, registry, upload.push), upload.added


def check_may_push(store: Store, registry: Registry, model: str) -> None:
    """Refuse what no commit could make good.

    Raises:
        ConflictError: ``registry-old``, ``registry-closed``; ``name-clash`` when another model has
            this name but for the case.
    """
    check_newest(store, registry)
    taken = registry.queries.taken_name(model)
    if taken is not None and taken != model:
        raise name_clash(model, taken)


def _document(
    described: Described, digests: Sequence[tuple[str, ...]], environment: str
) -> Document:
    remaining = iter(digests)
    tensors = _with_chunks(described.tensors, described.sources, remaining)
    probe = described.probe
    if probe is not None:
        probed = _with_chunks(probe.tensors, described.probe_sources, remaining)
        probe = replace(probe, tensors=probed)
    return Document(
        format=FORMAT,
        state=described.state,
        root=described.root,
        tensors=tensors,
        environment=environment,
        modules=described.modules,
        classes=described.classes,
        wrappers=dict(described.wrappers),
        order=described.order,
        safetensors=described.header,
        files=dict(described.files),
        dropped=described.dropped,
        probe=probe,
    )


def _with_chunks(
    tensors: Sequence[Tensor],
    sources: Sequence[TensorBytes | None],
    digests: Iterator[tuple[str, ...]],
) -> tuple[Tensor, ...]:
    return tuple(
        tensor if source is None else replace(tensor, chunks=next(digests))
        for tensor, source in zip(tensors, sources, strict=True)
    )


def same_version(
    store: Store, registry: Registry, said: Said, document: Document, digest: str
) -> Version | None:
    """The model's newest version when a push of this would only repeat it, acknowledged anew."""
    if registry.queries.newest_digest(said.model) != digest:
        return None
    newest = registry.queries.newest(said.model)
    if newest is None or not is_repeated(store, registry, newest, said, document, digest):
        return None
    acknowledge_push(store, registry, newest.push)
    for alias in [alias for alias in said.aliases if alias not in newest.aliases]:
        named = parse_reference(newest.reference)
        event, newest = registry.changes.tag(named, alias, None, author())
        acknowledge_event(store, registry, event)
    return newest


def is_repeated(
    store: Store,
    registry: Registry,
    version: Version,
    said: Said,
    document: Document,
    digest: str,
) -> bool:
    """Whether a push of this would only repeat a version of the model."""
    if version.digest != digest or version.step != said.step:
        return False
    if version.run != said.run:  # whose line of versions would miss this one
        return False
    if version.labels != said.labels or repr(version.metrics) != repr(dict(said.metrics)):
        return False
    # The digest leaves these out: what lies around the tensors of a pushed file, and the probe.
    known = registry.queries.document(version)
    if (known.safetensors, known.files) != (document.safetensors, document.files):
        return False
    if known.order != document.order:  # of the keys of its dicts
        return False
    if document.probe is not None and known.probe != document.probe:
        return False
    # What is damaged is not answered but written again.
    return is_whole(store, registry, version, document)


def is_whole(store: Store, registry: Registry, version: Version, document: Document) -> bool:
    """Whether the store has every pack of a version, and these have every chunk."""
    packs, rows = registry.books.read_plan(version.push)
    entries = (*document.tensors, *document.probe_tensors)
    return all(chunk in rows for entry in entries for chunk in entry.chunks) and all(
        pack.state is not PackState.BROKEN and store.size(pack.key) == pack.size
        for pack in packs.values()
    )


def describe_push(
    said: Said,
    document: Document,
    digest: str,
    nbytes: int,
    structure: str | None = None,
    proof: Proof | None = None,
) -> PushFacts:
    """What the registry is told of a new version beside its document."""
    return PushFacts(
        model=said.model,
        digest=digest,
        document_digest=digest_of(encode_document(document)),
        nbytes=nbytes,
        step=said.step,
        metrics=said.metrics,
        labels=said.labels,
        aliases=said.aliases,
        message=said.message,
        parent=said.parent,
        run=said.run,
        author=author(),
        structure=structure,
        proof=proof,
    )


def commit(
    registry: Registry,
    push: str,
    facts: PushFacts,
    document: Document,
    environment: Environment,
    finished: Sequence[FinishedPack],
    needed: Collection[str],
    new_bytes: int,
) -> None:
    """Commit a push; its version is there when this returns, and may not be told yet."""
    try:
        registry.commit(push, facts, document, environment, finished, needed, new_bytes)
        _log.debug("committed push %s", push)
    except StorageError:
        # The connection may have broken after the commit: the push row knows, we never guess.
        if not registry.books.is_acknowledgeable(push):
            raise


def abort(registry: Registry, push: str, error: BaseException) -> None:
    """End the push; if even that fails its lease will, and the first error is the one to show."""
    try:
        registry.books.abort(push)
    except CkptError as failed:
        error.add_note(f"the push {push} stays open until its lease ends: {failed}")
