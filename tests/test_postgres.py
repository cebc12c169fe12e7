"""What only PostgreSQL does: races between transactions, snapshots, logins, servers that go."""

from __future__ import annotations

import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
import torch
from postgres_server import GUARDED, PASSWORD, PostgresServer, repository_over
from sqlalchemy import event, func, insert, select, text
from sqlalchemy.exc import OperationalError

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import (
    AccessError,
    CkptError,
    ConflictError,
    IntegrityError,
    SpaceError,
    StorageError,
    UsageError,
)
from ckpt.registry import postgres as registry_postgres
from ckpt.registry import repair
from ckpt.registry.engine import Transaction
from ckpt.registry.postgres import PostgresDatabase, open_postgres
from ckpt.registry.registry import Registry
from ckpt.registry.tables import documents, meta, model_classes, models, structures
from ckpt.service.rebuild import rebuild_registry

pytest_plugins = ("postgres_server",)

STORE = "00000000-0000-4000-8000-000000000000"
SECONDS = 30
STATE = {"w": torch.ones(3)}
MODEL = {"name": "m", "folded": "m", "next_number": 1, "next_event": 1}
COMMIT = 1  # of a small push, counted from 0; the one before opens it

Act = Callable[..., Any]


@pytest.fixture
def repos(postgres_url: str, tmp_path: Path) -> Iterator[tuple[ckpt.Repository, ckpt.Repository]]:
    """One repository, opened twice."""
    with (
        repository_over(postgres_url, tmp_path) as one,
        repository_over(postgres_url, tmp_path) as two,
    ):
        yield one, two


@pytest.fixture
def repo(repos: tuple[ckpt.Repository, ckpt.Repository]) -> ckpt.Repository:
    return repos[0]


@pytest.fixture
def database(postgres_url: str) -> Iterator[PostgresDatabase]:
    """The database of a new registry."""
    Registry.create(postgres_url, STORE).close()
    found = open_postgres(postgres_url)
    yield found
    found.close()


def test_fsck_looks_at_one_moment(
    repos: tuple[ckpt.Repository, ckpt.Repository], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is pushed between two of its questions refers to packs that it has not seen."""
    repo, other = repos
    read = repair._packs

    def read_and_push(transaction: Transaction) -> Any:
        found = read(transaction)
        other.push(STATE, "late")
        return found

    monkeypatch.setattr(repair, "_packs", read_and_push)
    assert repo.fsck().is_clean


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def race(postgres: PostgresServer, postgres_database: str) -> Callable[..., tuple[Any, Any]]:
    """What two acts return when the second begins while the first is about to commit, and has to
    wait for that. ``nth`` is which commit of the first one is meant."""

    def run(first: Callable[[], Any], second: Callable[[], Any], nth: int = 0) -> tuple[Any, Any]:
        reached, released = threading.Event(), threading.Event()
        commits: list[None] = []
        holder: list[int] = []

        def held() -> Any:
            holder.append(threading.get_ident())
            return first()

        def hook(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            if kind == "sql.commit" and threading.get_ident() in holder:
                commits.append(None)
                if len(commits) == nth + 1:
                    reached.set()
                    assert released.wait(SECONDS)
            return act(*args)

        with observed(hook), ThreadPoolExecutor(2) as pool:
            try:
                one = pool.submit(held)
                assert reached.wait(SECONDS)
                two = pool.submit(second)
                wait_until(lambda: postgres.waiting(postgres_database) or two.done())
                assert not two.done(), "nothing was waited for"
            finally:
                released.set()
            return one.result(SECONDS), two.result(SECONDS)

    return run


def total(repo: ckpt.Repository, table: Any) -> int:
    with repo._registry._database.read() as transaction:
        return int(transaction.run(select(func.count()).select_from(table)).scalar_one())


class TestRaces:
    """Two transactions at once, each of which would be right alone."""

    def test_the_first_pushes_of_one_model(
        self, race: Act, repos: tuple[ckpt.Repository, ckpt.Repository]
    ) -> None:
        one, two = repos
        other = {"w": torch.zeros(3)}
        made = race(lambda: one.push(STATE, "m"), lambda: two.push(other, "m"), nth=COMMIT)
        assert [(version.number, version.parent) for version in made] == [(1, None), (2, "m@1")]
        assert [version.number for version in one.log("m")] == [2, 1]

    def test_the_first_pushes_of_one_content(
        self, race: Act, repos: tuple[ckpt.Repository, ckpt.Repository]
    ) -> None:
        one, two = repos
        made = race(lambda: one.push(STATE, "a"), lambda: two.push(STATE, "b"), nth=COMMIT)
        assert [version.reference for version in made] == ["a@1", "b@1"]
        assert (total(one, documents), total(one, structures)) == (1, 1)
        assert torch.equal(two.pull("b")["w"], STATE["w"])

    def test_rows_of_classes_that_both_insert(self, race: Act, database: PostgresDatabase) -> None:
        def noting(*digests: str) -> Callable[[], object]:
            rows = [{"digest": digest, "reference": "a:B"} for digest in digests]
            return lambda: database.write(lambda one: one.insert_absent(model_classes, rows))

        race(noting("1", "2"), noting("2", "3"))
        with database.read() as transaction:
            found = transaction.rows(select(model_classes.c.digest).order_by("digest"))
        assert [row.digest for row in found] == ["1", "2", "3"]

    def test_content_that_is_removed_while_it_is_pushed(
        self, race: Act, repos: tuple[ckpt.Repository, ckpt.Repository]
    ) -> None:
        one, two = repos
        one.push(STATE, "old")
        _, made = race(lambda: one.rm("old@1"), lambda: two.push(STATE, "new"))
        assert torch.equal(one.pull(made)["w"], STATE["w"])
        assert total(one, documents) == 1

    def test_content_that_is_pushed_while_it_is_removed(
        self, race: Act, repos: tuple[ckpt.Repository, ckpt.Repository]
    ) -> None:
        one, two = repos
        one.push(STATE, "old")
        made, _ = race(lambda: one.push(STATE, "new"), lambda: two.rm("old@1"), nth=COMMIT)
        assert torch.equal(two.pull(made)["w"], STATE["w"])
        assert [model.versions for model in one.models()] == [1, 0]

    @pytest.mark.parametrize("other", [STATE["w"], torch.zeros(3)], ids=["content", "structure"])
    def test_two_removals_leave_nothing_of_what_both_share(
        self, race: Act, repos: tuple[ckpt.Repository, ckpt.Repository], other: torch.Tensor
    ) -> None:
        one, two = repos
        one.push(STATE, "a")
        one.push({"w": other}, "b")
        assert total(one, structures) == 1
        race(lambda: one.rm("a@1"), lambda: two.rm("b@1"))
        assert (total(one, documents), total(one, structures)) == (0, 0)

    def test_many_pushes_at_once_get_a_number_each(
        self, postgres_url: str, repo: ckpt.Repository
    ) -> None:
        def work(place: int) -> list[int]:
            with repository_over(postgres_url, repo.location.root) as mine:
                states = [
                    {"same": torch.ones(9), "own": torch.tensor([place, n])} for n in range(8)
                ]
                return [mine.push(state, "m").number for state in states]

        with ThreadPoolExecutor(6) as pool:
            numbers = [number for some in pool.map(work, range(6)) for number in some]
        assert sorted(numbers) == list(range(1, 49))
        assert len(repo.log("m")) == 48

    def test_everybody_makes_the_tables_at_once(self, postgres_url: str) -> None:
        with ThreadPoolExecutor(6) as pool:
            for registry in pool.map(lambda _: Registry.create(postgres_url, STORE), range(6)):
                with registry._database.read() as transaction:
                    assert len(transaction.rows(select(meta))) == 1
                registry.close()


def prepared(repo: ckpt.Repository) -> int:
    """How many statements the server has planned for good, of a repository that was asked often."""
    for _ in range(9):
        repo.log("m")
    with repo._registry._database.read() as transaction:
        return int(
            transaction.run(text("SELECT count(*) FROM pg_prepared_statements")).scalar_one()
        )


class TestPreparing:
    """A statement is planned once, where that can be relied on."""

    def test_what_is_asked_again_is_prepared(self, repo: ckpt.Repository) -> None:
        repo.push(STATE, "m")
        assert prepared(repo)

    def test_nothing_is_prepared_where_another_process_answers_than_was_connected_to(
        self, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", 0)  # as a pooler makes it up
        with repository_over(postgres_url, tmp_path) as repo:
            repo.push(STATE, "m")
            assert not prepared(repo)

    def test_a_migration_by_another_process_is_survived(
        self, repo: ckpt.Repository, postgres: PostgresServer, postgres_database: str
    ) -> None:
        repo.push(STATE, "m")
        for _ in range(9):
            repo.tag("m", "best")
        change = "ALTER TABLE versions ALTER COLUMN message TYPE"
        postgres.run(f"{change} varchar(5000)", postgres_database)
        assert repo.tag("m", "best").aliases == ("best",)
        assert prepared(repo)
        postgres.run(f"{change} text", postgres_database)
        assert len(repo.log("m")) == 1


class TestTransactions:
    """What one transaction sees, waits for, and says."""

    def test_a_read_is_one_snapshot(self, database: PostgresDatabase) -> None:
        with database.read() as transaction:
            assert transaction.rows(select(models)) == []
            database.write(lambda other: other.run(insert(models), MODEL))
            assert transaction.rows(select(models)) == []
        with database.read() as transaction:
            assert len(transaction.rows(select(models))) == 1

    def test_a_write_sees_what_was_committed_meanwhile(self, database: PostgresDatabase) -> None:
        def act(transaction: Transaction) -> int:
            assert transaction.rows(select(models)) == []
            database.write(lambda other: other.run(insert(models), MODEL))
            return len(transaction.rows(select(models)))

        assert database.write(act) == 1

    def test_a_read_that_waits_for_a_rebuild_sees_what_it_made(
        self, race: Act, repos: tuple[ckpt.Repository, ckpt.Repository], postgres_url: str
    ) -> None:
        one, two = repos
        one.push(STATE, "m", step=500)
        location = replace(one.location, registry_place=postgres_url)
        reads: tuple[Callable[[], object], ...] = (
            lambda: [model.versions for model in two.models()],
            lambda: [version.step for version in two.log("m")],
            lambda: [version.step for version in two.find("m")],
            lambda: two.get("m").step,
            lambda: two.du().versions,
        )
        expected = [read() for read in reads]
        for read, seen in zip(reads, expected, strict=True):
            _, found = race(lambda: rebuild_registry(location, one._store), read, nth=1)
            assert found == seen

    def test_a_read_cannot_write(self, database: PostgresDatabase) -> None:
        with pytest.raises(AccessError) as caught, database.read() as transaction:
            transaction.run(insert(models), MODEL)
        assert caught.value.code == "permission"

    def test_a_lock_is_waited_for(
        self, database: PostgresDatabase, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt.registry.postgres._LOCK_SECONDS", 0.05)
        with psycopg.connect(postgres_url) as holder, ThreadPoolExecutor(1) as pool:
            holder.execute("LOCK TABLE models")
            waiting = pool.submit(
                database.write, lambda transaction: transaction.run(insert(models), MODEL)
            )
            time.sleep(0.3)
            assert not waiting.done()
            holder.commit()
            waiting.result(SECONDS)

    def test_a_lock_that_is_never_given_is_said(
        self, database: PostgresDatabase, postgres_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt.registry.postgres._LOCK_SECONDS", 0.05)
        monkeypatch.setattr("ckpt.registry.engine._ATTEMPTS", 3)
        with psycopg.connect(postgres_url) as holder:
            holder.execute("LOCK TABLE models")
            with pytest.raises(StorageError) as caught:
                database.write(lambda transaction: transaction.run(insert(models), MODEL))
        assert caught.value.code == "registry-busy"

    def test_commits_that_may_be_lost_are_refused(
        self, postgres: PostgresServer, postgres_database: str, postgres_url: str
    ) -> None:
        postgres.run(f"ALTER DATABASE {postgres_database} SET synchronous_commit = off")
        with pytest.raises(StorageError) as caught:
            Registry.create(postgres_url, STORE)
        assert caught.value.code == "registry-settings"

    @pytest.mark.parametrize("wrong", [{"name": "a\0b"}, {"folded": "x" * 256}])
    def test_a_text_that_it_cannot_hold_is_refused(
        self, database: PostgresDatabase, wrong: dict[str, str]
    ) -> None:
        with pytest.raises(UsageError) as caught:
            database.write(lambda transaction: transaction.run(insert(models), MODEL | wrong))
        assert caught.value.code == "value-invalid"

    def test_a_message_with_a_nul_is_refused_and_nothing_is_committed(
        self, repo: ckpt.Repository
    ) -> None:
        with pytest.raises(UsageError):
            repo.push(STATE, "m", message="a\0b")
        assert repo.models() == []

    def test_a_database_without_tables_is_no_registry_whose_address_is_to_be_checked(
        self, postgres_url: str
    ) -> None:
        for act in (Registry.open, Registry.upgrade):
            with pytest.raises(StorageError) as caught:
                act(postgres_url, STORE)
            assert caught.value.code == "registry-missing"
            assert "check its address" in str(caught.value)
            assert "upgrade" not in str(caught.value)

    def test_a_table_that_is_missing_names_the_command_that_helps(
        self, postgres: PostgresServer, postgres_database: str, repo: ckpt.Repository
    ) -> None:
        postgres.run("DROP TABLE runs CASCADE", postgres_database)
        with pytest.raises(StorageError) as caught:
            repo.push(STATE, "m")
        assert caught.value.code == "schema-older"
        assert "ckpt db upgrade" in str(caught.value)

    @pytest.mark.parametrize(
        ("state", "kind", "code"),
        [
            ("53100", SpaceError, "no-space"),
            ("42501", AccessError, "permission"),
            ("28P01", AccessError, "login-refused"),
            ("23503", IntegrityError, "registry-rule"),
            ("42P01", StorageError, "schema-older"),
            ("40P01", StorageError, "registry-busy"),
            ("53300", StorageError, "registry-unreachable"),
            ("57P01", StorageError, "registry-unreachable"),
            ("XX001", StorageError, "registry-corrupt"),
            ("22003", UsageError, "value-invalid"),
        ],
    )
    def test_every_state_has_its_error(self, state: str, kind: type[CkptError], code: str) -> None:
        database = open_postgres(f"postgresql://me:{PASSWORD}@server/db")
        driver = psycopg.errors.lookup(state)("what the server\nsaid\x1b")

        with pytest.raises(kind) as caught, database._typed():
            raise OperationalError(None, None, driver)
        assert caught.value.code == code
        assert "what the server said" in caught.value.message or code == "no-space"
        assert "\x1b" not in str(caught.value)
        assert PASSWORD not in str(caught.value)


class TestLostConnections:
    """A connection that breaks before a commit was sent: nothing happened, and it is done again."""

    ACTS: ClassVar[dict[str, Callable[[ckpt.Repository], Any]]] = {
        "push": lambda repo: repo.push({"w": torch.zeros(3)}, "m").number,
        "tag": lambda repo: repo.tag("m@1", "best").aliases,
        "rm": lambda repo: repo.rm("m@1").number,
        "log": lambda repo: [version.number for version in repo.log("m")],
        "models": lambda repo: [model.name for model in repo.models()],
        "find": lambda repo: [version.number for version in repo.find("m")],
    }

    @pytest.mark.parametrize("act", ACTS)
    def test_one_lost_connection_ends_no_act(
        self, postgres: PostgresServer, act: str, tmp_path: Path
    ) -> None:
        told: list[Any] = []
        for at in range(0, 40, 3):
            name = f"test_{secrets.token_hex(8)}"
            postgres.run(f"CREATE DATABASE {name}")
            seen: list[str] = []

            def cut(
                kind: str, do: Act, args: tuple[Any, ...], at: int = at, name: str = name
            ) -> Any:
                if kind.startswith("sql") and kind != "sql.commit":
                    seen.append(kind)  # noqa: B023
                    if len(seen) == at + 1:  # noqa: B023
                        postgres.cut(name)
                return do(*args)

            with repository_over(postgres.url(name), tmp_path / name) as repo:
                repo.push(STATE, "m")
                with observed(cut):
                    told.append(self.ACTS[act](repo))
                assert repo.fsck().is_clean
            postgres.run(f"DROP DATABASE {name} WITH (FORCE)")
            if len(seen) <= at:
                break
        assert len(told) > 1
        assert all(one == told[0] for one in told)


class TestFailover:
    """A standby that lags takes over: it knows less than what was acknowledged."""

    @pytest.fixture
    def fail_over(
        self,
        postgres: PostgresServer,
        postgres_database: str,
        repos: tuple[ckpt.Repository, ckpt.Repository],
    ) -> Iterator[Act]:
        """Acknowledges a push by the second repository, and has the state from before answer."""
        standby = f"{postgres_database}_standby"
        repos[0].push(STATE, "m", step=1)
        postgres.cut(postgres_database)
        postgres.run(f"CREATE DATABASE {standby} TEMPLATE {postgres_database}")
        repos[1].push(STATE, "m", step=2)

        def run() -> None:
            postgres.cut(postgres_database)
            postgres.run(f"ALTER DATABASE {postgres_database} RENAME TO {standby}_old")
            postgres.run(f"ALTER DATABASE {standby} RENAME TO {postgres_database}")

        yield run
        postgres.run(f"DROP DATABASE {standby}_old WITH (FORCE)")

    @pytest.mark.parametrize("act", ["push", "tag", "rm"])
    def test_nothing_is_written_there_by_who_was_connected_before(
        self, repos: tuple[ckpt.Repository, ckpt.Repository], fail_over: Act, act: str
    ) -> None:
        fail_over()
        one, two = repos
        acts: dict[str, Callable[[ckpt.Repository], object]] = {
            "push": lambda repo: repo.push(STATE, "m", step=3),
            "tag": lambda repo: repo.tag("m@1", "best"),
            "rm": lambda repo: repo.rm("m@1"),
        }
        for repo in (one, two):
            with pytest.raises(ConflictError) as caught:
                acts[act](repo)
            assert caught.value.code == "registry-old"
        assert [version.step for version in one.log("m")] == [1]

    def test_a_push_that_is_under_way_gives_no_number_again(
        self, repos: tuple[ckpt.Repository, ckpt.Repository], fail_over: Act
    ) -> None:
        commits: list[None] = []

        def hook(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            if kind == "sql.begin" and len(commits) == COMMIT:
                commits.append(None)
                fail_over()
            commits.extend([None] * (kind == "sql.commit"))
            return act(*args)

        with observed(hook), pytest.raises(ConflictError):
            repos[0].push({"w": torch.zeros(3)}, "m", step=3)
        assert [version.step for version in repos[0].log("m")] == [1]

    def test_who_comes_when_its_numbers_went_past_the_lost_ones_is_refused(
        self,
        repos: tuple[ckpt.Repository, ckpt.Repository],
        fail_over: Act,
        postgres_url: str,
        tmp_path: Path,
    ) -> None:
        fail_over()
        with pytest.MonkeyPatch.context() as patch:
            for module in ("push", "repository"):
                patch.setattr(f"ckpt.service.{module}.check_newest", lambda *_: None)
            with repository_over(postgres_url, tmp_path) as unaware:
                for step in (4, 5, 6):
                    unaware.push(STATE, "m", step=step)
        with (
            repository_over(postgres_url, tmp_path) as repo,
            pytest.raises(ConflictError) as caught,
        ):
            repo.push(STATE, "m", step=7)
        assert caught.value.code == "registry-old"


class TestLostCommits:
    """A connection that breaks at the commit of a push."""

    @pytest.mark.parametrize("happened", [True, False])
    def test_the_push_row_decides(
        self,
        postgres: PostgresServer,
        postgres_database: str,
        repo: ckpt.Repository,
        happened: bool,
    ) -> None:
        commits: list[None] = []

        def hook(kind: str, act: Act, args: tuple[Any, ...]) -> Any:
            commits.extend([None] * (kind == "sql.commit"))
            if kind != "sql.commit" or len(commits) != COMMIT + 1:
                return act(*args)
            if not happened:
                postgres.cut(postgres_database)
                return act(*args)
            act(*args)
            lost = psycopg.OperationalError("the connection is lost")
            raise OperationalError("COMMIT", None, lost)

        with observed(hook):
            if happened:
                assert repo.push(STATE, "m").number == 1
            else:
                with pytest.raises(StorageError) as caught:
                    repo.push(STATE, "m")
                assert caught.value.code == "registry-unreachable"
                assert repo.models() == []
        assert repo.push(STATE, "m").number == 1


class TestConnecting:
    """Addresses, logins, and servers that are not there."""

    @staticmethod
    def refused(url: str) -> CkptError:
        """The error of opening a registry; nothing of it shows the password."""
        with pytest.raises(CkptError) as caught:
            Registry.open(url, STORE)
        shown = "".join(traceback.format_exception(caught.value))
        assert "wrong-secret" not in shown
        assert PASSWORD not in shown
        return caught.value

    def test_a_wrong_password(self, postgres: PostgresServer, postgres_database: str) -> None:
        error = self.refused(postgres.url(postgres_database, f"{GUARDED}:wrong-secret"))
        assert isinstance(error, AccessError)
        assert error.code == "login-refused"
        assert f"{GUARDED}@" in error.message
        assert self.refused(postgres.url(postgres_database, GUARDED)).code == "login-refused"

    def test_a_user_without_rights(
        self, postgres: PostgresServer, postgres_database: str, database: PostgresDatabase
    ) -> None:
        error = self.refused(postgres.url(postgres_database, f"{GUARDED}:{PASSWORD}"))
        assert isinstance(error, AccessError)
        assert error.code == "permission"
        assert all(word in str(error.hint) for word in ("schema", "tables", "sequences"))

    def test_a_database_that_is_missing(self, postgres: PostgresServer) -> None:
        assert self.refused(postgres.url("nothing")).code == "registry-missing"

    def test_a_server_that_is_missing(self) -> None:
        error = self.refused("postgresql+psycopg://me:wrong-secret@127.0.0.1:1/db")
        assert isinstance(error, StorageError)
        assert error.code == "registry-unreachable"
        assert "postgresql+psycopg://me@127.0.0.1:1/db" in error.message

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql://me:wrong-secret/@host:port/db",
            "postgresql://me:pass@wrong-secret:x/db",
            "mysql://me:wrong-secret@host/db",
            "wrong-secret",
        ],
    )
    def test_an_address_of_something_else(self, url: str) -> None:
        assert self.refused(url).code == "uri-refused"

    def test_secrets_among_the_options_are_not_shown(self) -> None:
        database = open_postgres("postgresql://me@h/db?password=wrong-secret&port=1&sslpassword=x")
        assert database.name == "postgresql+psycopg://me@h/db?port=1"

    def test_a_connection_that_died_in_silence_is_replaced_when_it_rested(
        self,
        postgres: PostgresServer,
        postgres_database: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(registry_postgres, "_was_told", lambda connection: False)
        monkeypatch.setattr("ckpt.registry.engine._LOSSES", 0)
        url = postgres.url(postgres_database)
        with repository_over(url, tmp_path) as repo:
            repo.push(STATE, "m")
            postgres.cut(postgres_database)
            with pytest.raises(StorageError, match="cannot be reached"):
                repo.get("m")  # so soon that nobody asks whether it lives
            assert repo.get("m").number == 1
            postgres.cut(postgres_database)
            monkeypatch.setattr(registry_postgres, "_REST_SECONDS", 0)
            assert repo.get("m").number == 1

    def test_connections_that_do_not_last_are_told(
        self, postgres: PostgresServer, postgres_database: str, repo: ckpt.Repository
    ) -> None:
        repo.push(STATE, "m")
        engine = repo._registry._database.engine

        def cut(*_: object) -> None:
            postgres.cut(postgres_database)

        event.listen(engine, "checkout", cut, insert=True)
        with pytest.raises(StorageError) as caught:
            repo.models()
        assert caught.value.code == "registry-unreachable"
        event.remove(engine, "checkout", cut)
        assert len(repo.models()) == 1

    def test_a_server_that_is_full_is_not_told_to_be_away(
        self, postgres: PostgresServer, postgres_database: str, database: PostgresDatabase
    ) -> None:
        role = f"role_{secrets.token_hex(4)}"
        postgres.run(f"CREATE ROLE {role} LOGIN CONNECTION LIMIT 0")
        error = self.refused(postgres.url(postgres_database, role))
        assert error.code == "registry-unreachable"
        assert "no more connections" in error.message
        assert "pooler" in str(error.hint)
        postgres.run(f"DROP ROLE {role}")

    def test_a_server_that_goes_and_comes_back(
        self, postgres: PostgresServer, postgres_database: str, tmp_path: Path
    ) -> None:
        socket = tmp_path / "socket"
        socket.symlink_to(postgres.folder)
        url = postgres.url(postgres_database, f"postgres:{PASSWORD}", socket)
        with repository_over(url, tmp_path) as repo:
            repo.push(STATE, "m")
            postgres.cut(postgres_database)
            assert repo.push({"w": torch.zeros(3)}, "m").number == 2
            socket.unlink()
            postgres.cut(postgres_database)
            with pytest.raises(StorageError) as caught:
                repo.push(STATE, "m")
            assert caught.value.code == "registry-unreachable"
            assert PASSWORD not in "".join(traceback.format_exception(caught.value))
            socket.symlink_to(postgres.folder)
            assert repo.push(STATE, "m").number == 3
