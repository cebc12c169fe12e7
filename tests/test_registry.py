"""The registry's schema and what its queries answer, over both databases; SQLite's settings."""

from __future__ import annotations

import contextlib
import json
import math
import random
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
import torch
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from postgres_server import repository_over
from sqlalchemy import Connection, String, func, insert, select, text, update

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import (
    ConflictError,
    IntegrityError,
    NotFoundError,
    StorageError,
    UsageError,
)
from ckpt.registry.engine import Database, Transaction
from ckpt.registry.postgres import open_postgres
from ckpt.registry.registry import Registry
from ckpt.registry.schema import SCHEMA
from ckpt.registry.sqlite import journal_mode, open_sqlite
from ckpt.registry.tables import chunks, metadata, models, pushes, versions
from ckpt.service.rebuild import rebuild_registry
from ckpt.storage.codecs import NAMES
from ckpt.storage.identity import read_identity
from ckpt.storage.local import LocalStore

pytest_plugins = ("postgres_server",)

STORE = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def repo(where: Path | str, tmp_path: Path) -> Iterator[ckpt.Repository]:
    """An empty repository over each database."""
    with repository_over(where, tmp_path) as repository:
        yield repository


@pytest.fixture
def database(where: Path | str) -> Iterator[Database]:
    """The database of a new registry."""
    Registry.create(where, STORE).close()
    found = open_postgres(where) if isinstance(where, str) else open_sqlite(where, create=False)
    yield found
    found.close()


def test_the_models_and_the_migrated_schema_agree(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": True})
        assert compare_metadata(context, metadata) == []


def expiry(database: Database, push: str) -> int:
    query = select(pushes.c.expires_at).where(pushes.c.id == push)
    with database.read() as transaction:
        return int(transaction.run(query).scalar_one())


def test_a_push_that_takes_long_renews_its_lease(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt.service.upload.LEASE_SECONDS", 0)
    monkeypatch.setattr("ckpt.storage.packs.PACK_BYTES", 1)
    begun: list[int] = []  # when a pack gets its name, of a push that is open
    database = repo._registry._database

    def hook(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if kind == "link":
            with database.read() as transaction:
                found = transaction.rows(select(pushes.c.id).where(pushes.c.state == "open"))
            begun.extend(expiry(database, row.id) for row in found)
        return act(*args)

    with observed(hook):
        repo.push({f"w{place}": torch.rand(100_000) for place in range(3)}, "net")
    first, *_, last = begun
    assert last > first


def test_a_closed_repository_refuses_every_call(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(2)}, "net")
    repo.close()
    calls: tuple[Callable[[], object], ...] = (
        repo.models,
        lambda: repo.get("net"),
        lambda: repo.pull("net"),
        lambda: repo.push({"w": torch.zeros(2)}, "net"),
        lambda: repo.tag("net", "best"),
        repo.gc,
    )
    for call in calls:
        with pytest.raises(UsageError) as caught:
            call()
        assert caught.value.code == "repository-closed"
    repo.close()


def test_a_call_that_gets_no_connection_says_that_the_registry_is_busy(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = database.engine.pool
    monkeypatch.setattr(pool, "_timeout", 0.01)
    monkeypatch.setattr(pool, "_max_overflow", 0)
    with contextlib.ExitStack() as stack:
        for _ in range(5):  # as many as the pool has
            stack.enter_context(database.read())
        with pytest.raises(StorageError) as caught:
            stack.enter_context(database.read())
    assert caught.value.code == "registry-busy"


def test_only_migrations_make_tables() -> None:
    root = Path(__file__).parents[1]
    layers = ("core", "storage", "registry", "loader", "service", "cli", "migrations")
    for folder in layers:
        for file in (root / folder).rglob("*.py"):
            assert "create_all" not in file.read_text(), file


def test_migrating_twice_changes_nothing(where: Path | str, database: Database) -> None:
    def everything() -> Any:
        if isinstance(where, Path):
            return where.read_bytes()
        # Of each row the transaction that wrote it.
        tables = (text(f"SELECT xmin::text, * FROM {name}") for name in ("meta", "alembic_version"))
        with database.read() as transaction:
            return [transaction.rows(table) for table in tables]

    before = everything()
    Registry.create(where, STORE).close()
    Registry.upgrade(where, STORE)
    assert everything() == before


@pytest.mark.parametrize(
    ("number", "code", "hint"),
    [("9999", "schema-newer", "pip install -U"), ("0000", "schema-older", "ckpt db upgrade")],
)
def test_another_schema_is_refused_with_the_command_that_helps(
    where: Path | str, database: Database, number: str, code: str, hint: str
) -> None:
    statement = text("UPDATE alembic_version SET version_num = :number")
    database.write(lambda transaction: transaction.run(statement, {"number": number}))
    with pytest.raises(StorageError) as caught:
        Registry.open(where, STORE)
    assert caught.value.code == code
    assert hint in str(caught.value)
    if number > SCHEMA:
        with pytest.raises(StorageError, match="schema"):
            Registry.upgrade(where, STORE)


def test_a_registry_of_the_first_release_is_upgraded_with_all_that_it_has(
    where: Path | str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as first, repository_of(first, "0001", where, tmp_path) as repo:
        version = repo.push({"w": torch.ones(3)}, "net", run="a", alias="best")
        location = replace(repo.location, registry_place=where)
    store = LocalStore(location.store)
    identity = str(read_identity(store))
    for act in (
        lambda: Registry.open(where, identity),
        lambda: rebuild_registry(location, store),  # an older ckpt may be at work in it
    ):
        with pytest.raises(StorageError, match="ckpt db upgrade") as caught:
            act()
        assert caught.value.code == "schema-older"
    assert list(store.list("epochs/")) == []
    Registry.upgrade(where, identity)
    with repository_over(where, tmp_path) as repo:
        assert repo.get("net:best") == version
        with repo._registry._database.engine.connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_server_default": True})
            assert compare_metadata(context, metadata) == []
    assert rebuild_registry(location, store).versions == 1


def repository_of(
    patch: pytest.MonkeyPatch, schema: str, where: Path | str, root: Path
) -> ckpt.Repository:
    """A repository whose registry has an older schema, by a ckpt that knows no other."""

    def upgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", "ckpt:migrations")
        config.attributes["connection"] = connection
        command.upgrade(config, schema)

    patch.setattr("ckpt.registry.schema.SCHEMA", schema)
    patch.setattr("ckpt.registry.schema._upgrade", upgrade)
    return repository_over(where, root)


def test_a_registry_of_another_store_is_refused(where: Path | str, database: Database) -> None:
    with pytest.raises(IntegrityError) as caught:
        Registry.open(where, STORE.replace("4", "5"))
    assert caught.value.code == "foreign-store"


def test_half_a_surrogate_and_a_number_without_end_are_refused(database: Database) -> None:
    for row in ({"name": "\ud800"}, {"next_number": 2**70}):
        full = {"name": "m", "folded": "m", "next_number": 1, "next_event": 1} | row
        statement = insert(models).values(full)
        with pytest.raises(UsageError) as caught:
            database.write(partial(Transaction.run, statement=statement))
        assert caught.value.code == "value-invalid"


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((3, 40, 1), False),
        ((3, 44, 5), False),
        ((3, 44, 6), True),
        ((3, 45, 0), False),
        ((3, 50, 6), False),
        ((3, 50, 7), True),
        ((3, 51, 2), False),
        ((3, 51, 3), True),
        ((4, 0, 0), True),
    ],
)
def test_a_write_ahead_log_is_used_only_where_sqlite_is_fixed(
    version: tuple[int, ...], safe: bool
) -> None:
    assert journal_mode(version) == ("wal" if safe else "truncate")


def test_sqlite_runs_with_the_durable_settings(tmp_path: Path) -> None:
    database = open_sqlite(tmp_path / "registry.db", create=True)
    wanted = {
        "journal_mode": journal_mode(sqlite3.sqlite_version_info),
        "synchronous": 2,
        "foreign_keys": 1,
        "trusted_schema": 0,
        "cell_size_check": 1,
    }
    with database.read() as transaction:
        found = {name: transaction.run(text(f"PRAGMA {name}")).scalar_one() for name in wanted}
    assert found == wanted
    database.close()


class TestReferences:
    """Every form of a reference finds its version."""

    @pytest.fixture(autouse=True)
    def _versions(self, repo: ckpt.Repository) -> None:
        for step in range(3):
            repo.push({"w": torch.tensor(float(step))}, "vision/net", step=step)
        repo.tag("vision/net@2", "best")

    @pytest.mark.parametrize(
        ("reference", "number"),
        [
            ("vision/net", 3),
            ("vision/net:latest", 3),
            ("vision/net@1", 1),
            ("vision/net@v1", 1),
            ("vision/net:1", 1),
            ("vision/net:v1", 1),
            ("vision/net:best", 2),
            ("vision/net~1", 2),
            ("vision/net:best~1", 1),
            ("vision/net~2", 1),
            ("vision/net@3~", 2),
            ("VISION/Net", 3),
        ],
    )
    def test_it_is_found(self, repo: ckpt.Repository, reference: str, number: int) -> None:
        assert repo.get(reference).number == number

    def test_a_digest_prefix_finds_it(self, repo: ckpt.Repository) -> None:
        version = repo.get("vision/net@2")
        assert repo.get(f"vision/net@b3:{version.digest[:8]}") == version
        assert repo.get(f"vision/net@b3:{version.digest}") == version

    def test_an_ambiguous_prefix_is_refused(self, repo: ckpt.Repository) -> None:
        similar = update(versions).values(digest="0123abcd" + func.substr(versions.c.digest, 9))
        repo._registry._database.write(lambda transaction: transaction.run(similar))
        with pytest.raises(UsageError) as caught:
            repo.get("vision/net@b3:0123abcd")
        assert caught.value.code == "ambiguous"
        assert "3 matches" in str(caught.value)

    @pytest.mark.parametrize(
        ("reference", "code"),
        [
            ("other", "model-missing"),
            ("vision/net@9", "version-missing"),
            ("vision/net:nope", "alias-missing"),
            ("vision/net~3", "version-missing"),
            ("vision/net@b3:00000000", "version-missing"),
        ],
    )
    def test_what_is_not_there_is_said(
        self, repo: ckpt.Repository, reference: str, code: str
    ) -> None:
        with pytest.raises(NotFoundError) as caught:
            repo.get(reference)
        assert caught.value.code == code


def test_the_same_content_step_metrics_and_labels_answer_the_newest(repo: ckpt.Repository) -> None:
    state = {"w": torch.ones(3)}
    facts = {"step": 1, "metrics": {"loss": math.nan, "acc": 0.5}, "labels": {"a": "b"}}
    first = repo.push(state, "m", **facts)  # type: ignore[arg-type]
    assert repo.push(state, "m", **facts).push == first.push  # type: ignore[arg-type]
    assert repo.push(state, "m", step=2).number == 2
    assert repo.push(state, "m").number == 3
    assert repo.push({"w": torch.zeros(3)}, "m").number == 4
    # Not the newest: a push of older content is a new version, or `m` would not be what was pushed.
    again = repo.push(state, "m")
    assert again.number == 5
    assert again.new_bytes == 0
    assert again.digest == first.digest


def test_an_alias_of_a_repeated_push_moves(repo: ckpt.Repository) -> None:
    state = {"w": torch.ones(3)}
    repo.push(state, "m")
    assert repo.push(state, "m", alias="best").aliases == ("best",)
    assert repo.get("m:best").number == 1


def test_a_parent_is_the_runs_previous_version_else_the_newest(repo: ckpt.Repository) -> None:
    for number, run in enumerate(["a", "a", "b", "a", "b"]):
        repo.push({"w": torch.tensor(number)}, "m", run=run)
    assert [version.parent for version in repo.log("m")] == ["m@3", "m@2", "m@2", "m@1", None]
    other = repo.push({"w": torch.tensor(9)}, "fine-tuned", parent="m@2")
    assert other.parent == "m@2"
    assert repo.get("fine-tuned~1").reference == "m@2"


def test_names_that_differ_only_in_case_clash(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(1)}, "Net")
    with pytest.raises(ConflictError) as caught:
        repo.push({"w": torch.ones(1)}, "net")
    assert caught.value.code == "name-clash"
    assert '"Net"' in str(caught.value)


def test_metrics_come_back_also_those_that_are_not_finite(repo: ckpt.Repository) -> None:
    given = {"nan": math.nan, "up": math.inf, "down": -math.inf, "third": 1 / 3, "zero": -0.0}
    repo.push({"w": torch.ones(1)}, "m", metrics=given)
    kept = {"down": -math.inf, "nan": math.nan, "third": 1 / 3, "up": math.inf, "zero": 0.0}
    assert repr(repo.get("m").metrics) == repr(kept)


def test_a_label_has_as_much_text_as_both_databases_hold(repo: ckpt.Repository) -> None:
    random.seed(1)  # PostgreSQL compresses what can be
    longest = "".join(chr(random.randrange(0x4E00, 0x9000)) for _ in range(666)) + "ab"
    key = "k" * 128
    assert len(longest.encode()) == 2000
    assert repo.push({"w": torch.ones(1)}, "m", labels={key: longest}).labels == {key: longest}
    assert repo.annotate("m", labels={"other": longest}).labels["other"] == longest
    acts: tuple[Callable[[], object], ...] = (
        lambda: repo.push({"w": torch.ones(1)}, "m", labels={key: f"{longest}a"}),
        lambda: repo.annotate("m", labels={key: f"{longest}a"}),
    )
    for act in acts:
        with pytest.raises(UsageError) as caught:
            act()
        assert caught.value.code == "label-invalid"
        assert "2001 bytes, the limit is 2000" in caught.value.message


@pytest.mark.parametrize("revision", ["bf29a5ff90ea", SCHEMA])
def test_tables_of_another_program_are_told_and_left_alone(
    postgres_url: str, revision: str
) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num varchar(32) NOT NULL)")
        connection.execute("INSERT INTO alembic_version VALUES (%s)", [revision])
        acts: tuple[Callable[[str, str], object], ...] = (
            Registry.open,
            Registry.create,
            Registry.upgrade,
            Registry.known,
        )
        for act in acts:
            with pytest.raises(StorageError) as caught:
                act(postgres_url, STORE)
            assert caught.value.code == "schema-unknown"
            assert "of its own" in str(caught.value)
        found = connection.execute("SELECT * FROM alembic_version").fetchall()
        assert found == [(revision,)]


def test_an_upgrade_from_what_was_never_a_schema_is_refused(
    where: Path | str, database: Database
) -> None:
    statement = text("UPDATE alembic_version SET version_num = '0000'")
    database.write(lambda transaction: transaction.run(statement))
    with pytest.raises(StorageError) as caught:
        Registry.upgrade(where, STORE)
    assert caught.value.code == "schema-unknown"


def test_labels_and_metrics_can_be_set_and_removed(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(1)}, "m", labels={"a": "1", "b": "2"}, metrics={"x": 1.0})
    repo.annotate("m", remove="a")  # one alone, not letter by letter
    version = repo.annotate("m", labels={"b": "3", "c": "4"}, metrics={"y": 2.0}, remove=["x"])
    assert version.labels == {"b": "3", "c": "4"}
    assert version.metrics == {"y": 2.0}


def test_an_alias_moves_only_from_where_it_was_expected(repo: ckpt.Repository) -> None:
    for number in range(3):
        repo.push({"w": torch.tensor(number)}, "m")
    repo.tag("m@1", "best")
    repo.tag("m@2", "best", expect="m@1")
    with pytest.raises(ConflictError) as caught:
        repo.tag("m@3", "best", expect="m@1")
    assert caught.value.code == "alias-moved"
    assert repo.get("m:best").number == 2


def test_a_version_with_an_alias_is_not_removed(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(1)}, "m", alias="best")
    with pytest.raises(ConflictError) as caught:
        repo.rm("m")
    assert caught.value.code == "aliased"
    repo.untag("m:best")
    repo.rm("m")
    with pytest.raises(NotFoundError):
        repo.get("m")
    assert [model.versions for model in repo.models()] == [0]


def test_every_act_lies_in_the_store_before_it_is_acknowledged(repo: ckpt.Repository) -> None:
    version = repo.push({"w": torch.ones(1)}, "m", alias="a", metrics={"x": math.inf})
    store = repo.location.store

    def stored(folder: str) -> list[dict[str, object]]:
        return [json.loads(path.read_bytes()) for path in sorted(store.glob(f"{folder}/1/*"))]

    (document,) = stored("documents")
    assert document["push"] == version.push
    assert (document["number"], document["aliases"]) == (1, ["a"])
    assert document["metrics"] == {"x": "inf"}
    repo.tag(version, "b")
    repo.untag("m:a")
    repo.annotate(version, labels={"k": "v"})
    repo.untag("m:b")
    repo.rm(version)
    kinds = [event["kind"] for event in stored("events")]
    assert kinds == ["tag", "untag", "label", "untag", "rm"]
    assert [event["sequence"] for event in stored("events")] == [2, 3, 4, 5, 6]
    assert all(event["push"] == version.push for event in stored("events"))


def test_a_copy_that_is_missing_is_made_by_the_next_act(
    repo: ckpt.Repository, where: Path | str
) -> None:
    repo.push({"w": torch.ones(1)}, "m")
    (document,) = repo.location.store.glob("documents/1/*")
    body = document.read_bytes()
    document.unlink()  # as if the process had died between the commit and the copy
    with repository_over(where, repo.location.root) as another:
        another.push({"w": torch.zeros(1)}, "other")
    assert document.read_bytes() == body


def test_a_repeated_rm_says_gone_only_when_its_event_is_in_the_store(
    repo: ckpt.Repository, where: Path | str
) -> None:
    version = repo.push({"w": torch.ones(1)}, "m")
    repo._registry.changes.remove(version.push, "me")  # the process dies here
    assert not list(repo.location.store.glob("events/1/*"))
    with (
        repository_over(where, repo.location.root) as another,
        pytest.raises(NotFoundError),
    ):
        another.rm("m@1")
    (event,) = repo.location.store.glob("events/1/*")
    assert json.loads(event.read_bytes())["kind"] == "rm"


def test_every_codec_has_a_name_that_the_registry_can_hold() -> None:
    """SQLite does not mind; PostgreSQL does."""
    kind = chunks.c.codec.type
    assert isinstance(kind, String)
    assert kind.length is not None
    assert max(map(len, NAMES)) <= kind.length


def test_what_was_copied_is_noted_as_done_by_the_next_act(repo: ckpt.Repository) -> None:
    """Else each act would read the events of all before it."""
    repo.push({"w": torch.ones(1)}, "m")
    for number in range(5):
        repo.tag("m@1", f"alias-{number}")
    uncopied = text("SELECT count(*) FROM events WHERE NOT copied AND counter IS NOT NULL")
    with repo._registry._database.read() as transaction:
        assert transaction.run(uncopied).scalar_one() == 1
    assert repo._registry.copies.pending() == []


# Each statement is a way to a server and back; so are a begin and an end. With what is beside a
# tag's own transaction: what waits for its copy, and whether the event still stands. What waits
# is asked by one statement for its order too: two would let a later copy go before an earlier one.
MOST_STATEMENTS = {"pending": 1, "get": 3, "log": 3, "tag": 11, "annotate": 12, "push": 39}


@pytest.mark.parametrize("call", MOST_STATEMENTS)
def test_a_call_asks_the_database_few_times(repo: ckpt.Repository, call: str) -> None:
    calls: dict[str, Callable[[], object]] = {
        "pending": repo._registry.copies.pending,
        "get": lambda: repo.get("m@2"),
        "log": lambda: repo.log("m"),
        "tag": lambda: repo.tag("m@2", "best"),
        "annotate": lambda: repo.annotate("m@2", metrics={"loss": 2.0}, labels={"a": "c"}),
        "push": lambda: repo.push({"w": torch.ones(3)}, "m", metrics={"loss": 3.0}),
    }
    for number in range(3):
        repo.push({"w": torch.tensor(number)}, "m", metrics={"loss": 1.0})
    repo.tag("m@2", "best")
    asked: list[str] = []

    def count(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        asked.append(kind)
        return act(*args)

    with observed(count):
        calls[call]()
    assert sum(kind.startswith("sql") for kind in asked) <= MOST_STATEMENTS[call]
