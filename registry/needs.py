"""What a version needs from packs: the chunks of its document, and the bases of differences."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from sqlalchemy import select

from ckpt.core.documents import Document, join_document
from ckpt.core.errors import IntegrityError
from ckpt.core.records import Chunk, PackState
from ckpt.registry.bodies import decompress
from ckpt.registry.books import as_chunk
from ckpt.registry.engine import Transaction, batches
from ckpt.registry.tables import chunks, documents, packs, refs, structures, versions


def document_chunks(document: Document) -> set[str]:
    """The digests of all chunks that a document names, those of its probe included."""
    entries = (*document.tensors, *document.probe_tensors)
    return {chunk for entry in entries for chunk in entry.chunks}


def chunks_of_version(transaction: Transaction, push: str) -> set[str]:
    """The digests that the version of ``push`` names; none when there is no such version."""
    query = (
        select(documents.c.body, structures.c.body.label("structure"))
        .join(structures, structures.c.digest == documents.c.structure)
        .join(versions, versions.c.document == documents.c.digest)
        .where(versions.c.push == push)
    )
    row = transaction.row(query)
    if row is None:
        return set()
    return document_chunks(join_document(decompress(row.structure), decompress(row.body)))


def chunks_of_documents(transaction: Transaction, digests: Collection[str]) -> dict[str, set[str]]:
    """The digests of the chunks that each of these documents names.

    Raises:
        IntegrityError: ``registry-damaged`` when one of them is not there.
    """
    query = (
        select(documents.c.digest, documents.c.body, structures.c.body.label("structure"))
        .join(structures, structures.c.digest == documents.c.structure)
        .where(documents.c.digest.in_(sorted(digests)))
    )
    found = {
        row.digest: document_chunks(join_document(decompress(row.structure), decompress(row.body)))
        for row in transaction.rows(query)
    }
    if found.keys() != set(digests):
        raise IntegrityError(
            "registry-damaged",
            f"the registry lacks {len(digests) - len(found)} of its documents",
            hint="run `ckpt registry rebuild`, which reads the store",
        )
    return found


def with_bases(digests: Collection[str], places: Iterable[Chunk]) -> set[str]:
    """``digests`` and the bases of every difference among ``places`` that stands for one."""
    wanted = set(digests)
    return wanted | {
        chunk.base for chunk in places if chunk.base is not None and chunk.digest in wanted
    }


def unreadable(digests: Collection[str], places: Iterable[Chunk]) -> set[str]:
    """Those of ``digests`` that cannot be decoded from ``places`` alone: a chunk needs a place of
    its own, or a difference and a place for its base. A base is never itself a difference."""
    alone: set[str] = set()
    bases: dict[str, set[str]] = {}
    for chunk in places:
        if chunk.base is None:
            alone.add(chunk.digest)
        else:
            bases.setdefault(chunk.digest, set()).add(chunk.base)
    return {one for one in digests if one not in alone and not bases.get(one, set()) & alone}


def places_of_version(transaction: Transaction, push: str) -> list[Chunk]:
    """Every chunk in the packs that a version refers to, broken ones left out."""
    query = (
        select(chunks)
        .join(refs, refs.c.pack == chunks.c.pack)
        .join(versions, versions.c.id == refs.c.version)
        .join(packs, packs.c.id == chunks.c.pack)
        .where(versions.c.push == push, packs.c.state != PackState.BROKEN.value)
    )
    return [as_chunk(row) for row in transaction.rows(query)]


def places_in(transaction: Transaction, wanted: Collection[str]) -> list[Chunk]:
    """Every chunk in these packs."""
    found: list[Chunk] = []
    for some in batches(sorted(wanted)):
        query = select(chunks).where(chunks.c.pack.in_(some))
        found += [as_chunk(row) for row in transaction.rows(query)]
    return found
