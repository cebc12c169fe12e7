"""The registry: its parts on one database, opened, created and closed together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ckpt.core.documents import Document
from ckpt.core.errors import AccessError, CkptError, ConflictError, IntegrityError, StorageError
from ckpt.core.records import Environment, FinishedPack, KnownCopy, PushFacts
from ckpt.registry.aside import check_may_replace
from ckpt.registry.books import Books
from ckpt.registry.changes import Changes
from ckpt.registry.collect import Collector
from ckpt.registry.commit import commit_push
from ckpt.registry.copies import Copies
from ckpt.registry.curves import Curves
from ckpt.registry.engine import Database
from ckpt.registry.fence import Fence, Position, check_left, fence, reopen
from ckpt.registry.postgres import open_postgres
from ckpt.registry.queries import Queries
from ckpt.registry.rebuild import StoreContents, rebuild
from ckpt.registry.repack import Repacks
from ckpt.registry.repair import Repairs
from ckpt.registry.runs import Runs
from ckpt.registry.schema import check_made, check_schema, is_made, is_older, migrate
from ckpt.registry.sqlite import open_sqlite
from ckpt.registry.usage import Usages

_BEYOND_USE = frozenset(
    {
        "document-damaged",
        "registry-corrupt",
        "registry-damaged",
        "registry-journal",
        "registry-missing",
        "registry-rule",
        "schema-older",
    }
)


def _is_beyond_use(error: CkptError) -> bool:
    """Whether a registry with this fault can do no harm any more; another may be in use."""
    return error.code in _BEYOND_USE


class Registry:
    """Facts about versions, and the books of the store that they lie in."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._newest_at: int | None = None  # losses of connections when it was found out
        self.copies = Copies(database)
        self.books = Books(database, before_write=self.copies.flush)
        self.queries = Queries(database)
        self.curves = Curves(database)
        self.changes = Changes(database, before_write=self.copies.flush_events)
        self.collector = Collector(database)
        self.usages = Usages(database)
        self.repairs = Repairs(database)
        self.repacks = Repacks(database)
        self.runs = Runs(database)

    @property
    def losses(self) -> int:
        """How many connections were lost so far."""
        return self._database.losses

    @property
    def is_newest(self) -> bool:
        """Whether it is known that no newer one used the same store: until a connection is lost,
        for then a server that is behind may have taken over."""
        return self._newest_at == self.losses

    def note_newest(self, losses: int) -> None:
        """It was the newest when so many connections had been lost."""
        self._newest_at = losses

    def confirm_by(self, check: Callable[[], object]) -> None:
        """Have ``check`` called before anything is written after a connection was lost."""
        self._database.confirm = check

    @classmethod
    def open(cls, where: Path | str, store: str) -> Registry:
        """The registry of the store with this id, in the SQLite file ``where`` or, when that is
        text, in the PostgreSQL database of this URL; checks its schema."""
        database = _database(where, create=False)
        with _closed_on_error(database):
            check_schema(database, store)
            return cls(database)

    @classmethod
    def create(cls, where: Path | str, store: str) -> Registry:
        """Like :meth:`open`; makes the file, but no database on a server, and the tables when
        they are not there."""
        database = _database(where, create=True)
        with _closed_on_error(database):
            migrate(database, store)
            check_schema(database, store)
            return cls(database)

    @classmethod
    def upgrade(cls, where: Path | str, store: str) -> None:
        """Bring the schema of an existing registry up to date.

        Raises:
            StorageError: ``registry-missing``, also when there are no tables.
        """
        database = _database(where, create=False)
        try:
            check_made(database)
            migrate(database, store)
        finally:
            database.close()

    @classmethod
    def is_at(cls, where: Path | str) -> bool:
        """Whether there is a registry, of whichever store.

        Raises:
            StorageError, AccessError: a database that cannot be reached, or is not there at all.
        """
        if isinstance(where, Path):
            return where.exists()
        database = _database(where, create=False)
        try:
            return is_made(database)
        finally:
            database.close()

    @classmethod
    def check_may_replace(cls, where: Path | str) -> None:
        """Refuse a user who could not finish a rebuild there.

        Raises:
            AccessError: ``permission``.
        """
        if isinstance(where, str):
            database = _database(where, create=False)
            try:
                check_may_replace(database)
            finally:
                database.close()

    @classmethod
    def fence(cls, where: Path | str, store: str) -> Fence:
        """Cut off an old registry, if it can be read at all: nothing is acknowledged or deleted
        from it any more.

        Raises:
            StorageError, IntegrityError: it may be used by others still, and was not closed.
        """
        try:
            database = _database(where, create=False)
        except (StorageError, AccessError):
            return Fence(None, None)
        try:
            check_schema(database, store)
            return fence(database)
        except (StorageError, IntegrityError) as error:
            if error.code == "registry":  # a disk that fails now may serve others, or later
                more = "; if it stays so, move it away and run `ckpt registry rebuild`"
                raise StorageError(error.code, error.message, hint=f"run again{more}") from error
            if not _is_beyond_use(error):
                raise
            left = _position(database)
            return Fence(left, left)
        finally:
            database.close()

    @classmethod
    def check_left(cls, where: Path, closed: Fence) -> None:
        """Refuse when another rebuild went on with the registry in this file.

        Raises:
            ConflictError: ``rebuilt-meanwhile``.
        """
        if where.exists():
            database = _database(where, create=False)
            try:
                check_left(closed, _position(database))
            finally:
                database.close()

    @classmethod
    def reopen(cls, where: Path | str, closed: Fence) -> None:
        """Give an old registry back what ``closed`` took, if nobody else closed it since."""
        if closed.before != closed.left:
            database = _database(where, create=False)
            try:
                reopen(database, closed)
            finally:
                database.close()

    @classmethod
    def known(cls, where: Path | str, store: str) -> Mapping[str, KnownCopy]:
        """What an old registry says of versions and of acts, by the id of the push or of the
        event, if it can be read.

        Raises:
            IntegrityError: ``foreign-store``; StorageError: ``schema-newer``, ``schema-older``,
                and what says that it may be readable another time.
        """
        try:
            database = _database(where, create=False)
        except (StorageError, AccessError):
            return {}
        try:
            check_schema(database, store)
            return Copies(database).known()
        except (StorageError, IntegrityError) as error:
            if not _is_beyond_use(error) or is_older(database):
                raise
            return {}
        finally:
            database.close()

    @classmethod
    def rebuild(
        cls,
        where: Path | str,
        store: str,
        contents: StoreContents,
        closed: Fence,
        open_epoch: Callable[[], None],
    ) -> tuple[list[str], str | None]:
        """Make the registry anew from what a store holds, unless another one went on with what
        ``closed`` left, or ``open_epoch`` refuses, which writes the epoch to the store; returns the
        versions whose bytes are not all there, and on a server the schema that the old tables are
        in now. In a file they are gone, so copy it first."""
        database = _database(where, create=True)
        try:
            return rebuild(database, store, contents, closed, open_epoch)
        finally:
            database.close()

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
            with suppress(ConflictError):  # one that is behind by now has no need of it
                self.copies.close()
        finally:
            self._database.close()


def _position(database: Database) -> Position | None:
    """The epoch and the counter, of a registry that has any which can be read."""
    try:
        return Copies(database).position() if is_made(database) else None
    except (StorageError, IntegrityError) as error:
        if not _is_beyond_use(error):
            raise
        return None


def _database(where: Path | str, *, create: bool) -> Database:
    return open_postgres(where) if isinstance(where, str) else open_sqlite(where, create=create)


@contextmanager
def _closed_on_error(database: Database) -> Iterator[None]:
    try:
        yield
    except BaseException:
        database.close()
        raise
