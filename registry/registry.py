"""The registry: its parts on one database, opened, created and closed together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from ckpt.core.documents import Document
from ckpt.core.records import Environment, FinishedPack, PushFacts
from ckpt.registry.books import Books
from ckpt.registry.changes import Changes
from ckpt.registry.collect import Collector
from ckpt.registry.commit import commit_push
from ckpt.registry.copies import Copies
from ckpt.registry.engine import Database, open_sqlite
from ckpt.registry.queries import Queries
from ckpt.registry.schema import check_schema, migrate
from ckpt.registry.usage import Usages


class Registry:
    """Facts about versions, and the books of the store that they lie in."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.copies = Copies(database)
        self.books = Books(database, before_write=self.copies.flush)
        self.queries = Queries(database)
        self.changes = Changes(database)
        self.collector = Collector(database)
        self.usages = Usages(database)

    @classmethod
    def open(cls, path: Path, store: str) -> Registry:
        """The registry in the file ``path`` of the store with this id; checks its schema."""
        return cls._checked(open_sqlite(path, create=False), store)

    @classmethod
    def create(cls, path: Path, store: str) -> Registry:
        """Like :meth:`open`; makes the file and its tables when they are not there."""
        database = open_sqlite(path, create=True)
        migrate(database, store)
        return cls._checked(database, store)

    @classmethod
    def upgrade(cls, path: Path, store: str) -> None:
        """Bring the schema of an existing registry up to date."""
        database = open_sqlite(path, create=False)
        try:
            migrate(database, store)
        finally:
            database.close()

    @classmethod
    def _checked(cls, database: Database, store: str) -> Registry:
        try:
            check_schema(database, store)
        except BaseException:
            database.close()
            raise
        return cls(database)

    def commit(
        self,
        push: str,
        facts: PushFacts,
        document: Document,
        environment: Environment,
        finished: Sequence[FinishedPack],
        needed: Collection[str],
        new_bytes: int,
    ) -> None:
        """Make the version of ``push`` in one transaction; see :func:`commit_push`."""
        self._database.write(
            lambda transaction: commit_push(
                transaction, push, facts, document, environment, finished, needed, new_bytes
            )
        )

    def close(self) -> None:
        """Write down which copies are done, and close all connections."""
        try:
            self.copies.close()
        finally:
            self._database.close()
