"""A team: the registry in PostgreSQL, the store in S3, named by two addresses; real servers."""

from __future__ import annotations

import json
import multiprocessing
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psycopg
import pytest
import torch
from chapter_models import MLP
from postgres_server import PostgresServer
from safetensors.torch import save_file
from servers import BUCKET, Server

import ckpt
from ckpt.core.errors import AccessError, ConflictError, NotFoundError, StorageError
from ckpt.service.opening import make_repository, reopen
from ckpt.service.places import open_store
from ckpt.service.rebuild import rebuild_registry

pytest_plugins = ("servers", "postgres_server")

Open = Callable[[], ckpt.Repository]


@pytest.fixture
def addresses(
    postgres_url: str, seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, str]:
    """The two addresses; the endpoint and the credentials are in the AWS configuration."""
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweedfs.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return postgres_url, f"s3://{BUCKET}/team/{secrets.token_hex(8)}"


@pytest.fixture
def join(addresses: tuple[str, str]) -> Open:
    """Opens the team's repository once more."""
    registry, store = addresses
    return lambda: ckpt.open(registry=registry, store=store)


def test_what_one_pushes_another_loads_proven(join: Open) -> None:
    net, x = MLP(), torch.rand(2, 20)
    with join() as mine:
        version = mine.push(net, "mlp", inputs=(x,), metrics={"loss": 0.1}, alias="best")
        assert version.reference == "mlp@1"
    with join() as theirs:
        loaded = theirs.load("mlp:best", trust=[MLP], require="outputs-exact")
        assert torch.equal(loaded(x), net(x))
        assert theirs.push(net, "mlp", metrics={"loss": 0.1}).push == version.push


def test_large_tensors_come_back_through_parts(join: Open) -> None:
    torch.manual_seed(0)
    state = {"big": torch.rand(20 << 20), "small": torch.ones(3)}
    with join() as repo:
        repo.push(state, "big")
        state["big"][7] += 1
        second = repo.push(state, "big")
        assert second.new_bytes < 17 << 20  # one chunk of five
        assert all(torch.equal(repo.pull("big")[name], state[name]) for name in state)


def test_processes_that_are_forked_use_connections_of_their_own(join: Open) -> None:
    """As the workers of a DataLoader do whose dataset has a repository."""
    forked = multiprocessing.get_context("fork")
    torch.manual_seed(0)
    state = {"w": torch.rand(5 << 20)}  # more than one request

    def read(repo: ckpt.Repository, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)  # torch itself hangs in a fork with more
        for _ in range(3):
            assert repo.get("net").number == 1
            assert torch.equal(repo.pull("net")["w"], state["w"])

    with join() as repo:
        repo.push(state, "net")
        read(repo)
        workers = [forked.Process(target=read, args=(repo, 1), daemon=True) for _ in range(3)]
        for worker in workers:
            worker.start()
        read(repo)
        for worker in workers:
            worker.join(60)
        assert [worker.exitcode for worker in workers] == [0, 0, 0]
        read(repo)


def test_what_is_removed_is_freed_and_the_rest_stays(join: Open) -> None:
    with join() as repo:
        repo.push({"w": torch.ones(1000)}, "a")
        repo.push({"w": torch.zeros(1000)}, "b")
        repo.rm("a@1")
        assert len(repo.gc(grace=0).freed) == 1
        assert repo.gc(grace=0).freed == ()
        assert torch.equal(repo.pull("b")["w"], torch.zeros(1000))
        assert len(list(repo._store.list("packs/"))) == 1
        with pytest.raises(ConflictError):
            repo.tag("b", "best", expect="b")


_PUSHING = """
import sys, numpy, ckpt
from safetensors.numpy import save_file
registry, store, file = sys.argv[1:]
with ckpt.open(registry=registry, store=store) as repo:
    for step in range(5):
        shared = {f"s{n}": numpy.full(500, n, numpy.float32) for n in range(8)}
        save_file({**shared, "own": numpy.full(50, hash(file) + step)}, file)
        print(repo.push_file(file, "m", step=step))
"""


def test_processes_push_at_once_beside_a_collector(
    join: Open, addresses: tuple[str, str], tmp_path: Path
) -> None:
    with join() as repo:
        repo.push({"first": torch.ones(1)}, "other")
        programs = [
            subprocess.Popen(
                [sys.executable, "-c", _PUSHING, *addresses, tmp_path / f"job-{n}"],
                stdout=subprocess.PIPE,
                text=True,
            )
            for n in range(4)
        ]
        while any(program.poll() is None for program in programs):
            repo.gc(grace=0)
        said = [line for program in programs for line in program.communicate()[0].split()]
        assert [program.returncode for program in programs] == [0, 0, 0, 0]
        assert sorted(int(line.partition("@")[2]) for line in said) == list(range(1, 21))
        repo.gc(grace=0)
        for reference in said:
            assert torch.equal(repo.pull(reference)["s3"], torch.full((500,), 3.0))


def test_a_folder_made_with_two_addresses_is_the_teams_repository(
    addresses: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CKPT_REPO", raising=False)
    registry, store = addresses
    save_file({"w": torch.ones(5)}, tmp_path / "net.safetensors")
    program = str(Path(sys.executable).with_name("ckpt"))

    def run(folder: str, *arguments: str, status: int = 0) -> str:
        place = tmp_path / folder
        place.mkdir(exist_ok=True)
        found = subprocess.run(
            [program, *arguments], cwd=place, capture_output=True, text=True, check=False
        )
        assert found.returncode == status, found.stderr
        return found.stdout + found.stderr

    run("one", "init", "--registry", registry, "--store", store)
    assert "net@1" in run("one", "push", "../net.safetensors", "net")
    run("two", "init", "--registry", registry, "--store", store)
    assert "net@1" in run("two", "ls")
    run("two", "pull", "net", "out.safetensors")
    assert (tmp_path / "two/out.safetensors").read_bytes() == (
        tmp_path / "net.safetensors"
    ).read_bytes()
    assert "is up to date" in run("two", "db", "upgrade")
    assert "is a repository already" in run("two", "init", "--store", store, status=2)
    # Somebody else's configuration, found by walking up, may name no remote place.
    config = tmp_path / "two" / ".ckpt" / "config.toml"
    seen = 'capabilities = ["conditional_writes", "range_reads", "multipart", "checksums"]'
    assert seen in config.read_text()
    config.write_text(config.read_text() + 'region = "eu-central-1"\n')
    refused = run("two", "ls", status=9)
    assert "config-remote" in refused
    assert json.loads(run("two", "-r", ".", "ls", "--json"))[0]["name"] == "net"


@pytest.mark.parametrize("lost", [True, False], ids=["lost", "there"])
def test_a_registry_on_a_server_is_rebuilt_from_the_bucket(
    join: Open, postgres_url: str, lost: bool
) -> None:
    """In one transaction; tables that are there are kept in a schema of their own."""
    with join() as repo:
        one = repo.push({"w": torch.ones(3)}, "m", alias="best", labels={"who": "me"})
        repo.push({"w": torch.zeros(3)}, "m")
        repo.rm("m@2")
        location, store = (
            repo.location,
            open_store(repo.location.store_place, repo.location.options),
        )
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            if lost:
                connection.execute("DROP SCHEMA public CASCADE")
                connection.execute("CREATE SCHEMA public")
            found = rebuild_registry(location, store, lost=lost)
            schemas = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'ckpt_before_%'"
            kept = [name for (name,) in connection.execute(schemas)]
            for name in kept:
                old = connection.execute(f"SELECT number FROM {name}.versions").fetchall()
                assert old == [(1,)]
        store.close()
        assert (found.epoch, found.versions, found.damaged, found.unreadable) == (2, 1, (), ())
        assert len(kept) == (0 if lost else 1)
        assert (found.kept is None) == lost
    with join() as repo:
        (version,) = repo.log("m")
        assert (version.push, version.aliases, version.labels) == (
            one.push,
            ("best",),
            {"who": "me"},
        )
        assert torch.equal(repo.pull("m")["w"], torch.ones(3))
        assert repo.push({"w": torch.rand(3)}, "m").number == 3
        repo.gc(grace=0)
        assert repo.fsck(read_data=1).is_clean


def test_a_database_without_tables_is_taken_for_the_wrong_one(
    join: Open, postgres: PostgresServer, postgres_url: str, tmp_path: Path
) -> None:
    """A rebuild there would cut off the registry that the others go on with."""
    with join() as repo:
        repo.push({"w": torch.ones(3)}, "m")
        location, store = repo.location, repo._store
        wrong = f"wrong_{secrets.token_hex(8)}"
        postgres.run(f"CREATE DATABASE {wrong}")
        address, place = postgres.url(wrong), location.store_place
        elsewhere = replace(location, registry_place=address)
        acts: tuple[Callable[[], object], ...] = (
            lambda: ckpt.open(registry=address, store=str(place)),
            lambda: ckpt.open(registry=address, store=str(place), create=False),
            lambda: make_repository(replace(elsewhere, root=tmp_path / "new", exists=False)),
            lambda: reopen(elsewhere),
            lambda: rebuild_registry(elsewhere, store),
            lambda: rebuild_registry(replace(location, registry_place=f"{address}x"), store),
        )
        for act in acts:
            with pytest.raises((StorageError, NotFoundError)) as caught:
                act()
            assert "check its address" in str(caught.value) or caught.value.code == "no-repository"
        tables = "SELECT count(*) FROM pg_tables WHERE schemaname = 'public'"
        assert postgres.run(tables, wrong) == [(0,)]
        assert list(store.list("epochs/")) == []
        assert repo.push({"w": torch.zeros(3)}, "m").number == 2
        assert rebuild_registry(elsewhere, store, lost=True).versions == 2
        postgres.run(f"DROP DATABASE {wrong} WITH (FORCE)")


def test_who_cannot_finish_a_rebuild_closes_nothing(
    join: Open, postgres: PostgresServer, postgres_database: str
) -> None:
    role = f"role_{secrets.token_hex(4)}"
    postgres.run(f"CREATE ROLE {role} LOGIN")
    address = postgres.url(postgres_database, role)
    with join() as repo:
        repo.push({"w": torch.ones(3)}, "m")
        theirs = replace(repo.location, registry_place=address)

        def refused() -> str:
            with pytest.raises(AccessError) as caught:
                rebuild_registry(theirs, repo._store)
            assert list(repo._store.list("epochs/")) == []
            return str(caught.value)

        assert "owner" in refused()
        postgres.run(f"GRANT CREATE ON DATABASE {postgres_database} TO {role}", postgres_database)
        postgres.run(f"GRANT CREATE ON SCHEMA public TO {role}", postgres_database)
        assert "another role owns" in refused()
        assert repo.push({"w": torch.zeros(3)}, "m").number == 2


def test_two_repositories_in_one_database_are_rebuilt_and_keep_who_may_use_them(
    seaweedfs: Server, addresses: tuple[str, str], postgres: PostgresServer, postgres_database: str
) -> None:
    role = f"role_{secrets.token_hex(4)}"
    postgres.run(f'CREATE ROLE "{role}:Ü" LOGIN')
    run = partial(postgres.run, database=postgres_database)
    for schema in ("one", "Two's"):
        run(f'CREATE SCHEMA "{schema}"')
        registry, store = (
            f'{addresses[0]}&options=-csearch_path="{schema}"',
            f"{addresses[1]}{schema[0]}",
        )
        with ckpt.open(registry=registry, store=store) as repo:
            run(f'GRANT USAGE ON SCHEMA "{schema}" TO "{role}:Ü"')
            for kind in ("TABLES", "SEQUENCES"):
                run(f'GRANT ALL ON ALL {kind} IN SCHEMA "{schema}" TO "{role}:Ü" WITH GRANT OPTION')
            run(f'GRANT SELECT ON "{schema}".versions TO PUBLIC')
            granted = grants(postgres, postgres_database, schema)
            assert len(granted) > 20
            for epoch in (2, 3):
                repo.push({"w": torch.full((3,), float(epoch))}, "m")
                found = rebuild_registry(repo.location, repo._store)
                assert found.epoch == epoch
                assert found.kept is not None
                assert schema in found.kept
                assert grants(postgres, postgres_database, schema) == granted
    run(f'DROP OWNED BY "{role}:Ü"')


def grants(postgres: PostgresServer, database: str, schema: str) -> set[object]:
    where = f"nspname = '{schema.replace(chr(39), chr(39) * 2)}' AND relkind IN ('r', 'S')"
    of = "pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace"
    return set(postgres.run(f"SELECT relname, relacl::text FROM {of} WHERE {where}", database))


def test_the_command_line_rebuilds_a_lost_registry_of_an_address_when_it_is_told_so(
    join: Open, addresses: tuple[str, str], postgres_url: str, tmp_path: Path
) -> None:
    with join() as repo:
        repo.push({"w": torch.ones(3)}, "m")
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")
    (tmp_path / ".ckpt").mkdir()
    registry, store = addresses
    config = f'registry = "{registry}"\nstore = "{store}"\n'
    (tmp_path / ".ckpt" / "config.toml").write_text(config)
    program = str(Path(sys.executable).with_name("ckpt"))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [program, "-r", str(tmp_path), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    for arguments in (["ls"], ["db", "upgrade"], ["registry", "rebuild", "-y"]):
        refused = run(*arguments)
        assert refused.returncode == 6
        assert "error[registry-missing]" in refused.stderr
        assert "check its address" in refused.stderr
    assert run("registry", "rebuild", "-y", "--lost").stdout == "rebuilt: 1 version, epoch 2\n"
    assert "m" in run("ls").stdout


def test_a_runs_successors_are_differences_to_what_it_has_in_memory(join: Open) -> None:
    """The store is far: its packs are not read for it."""
    model = torch.nn.Linear(300, 300)
    with join() as repo:
        with ckpt.Run(repo, "net", quiet=True) as run:
            run.track(model=model)
            saved = []
            for step in range(4):
                saved.append(run.save(step))
                run.wait()
                with torch.no_grad():
                    model.weight += 1e-5 * torch.randn(300, 300)
        versions = [version for one in saved if (version := one.version())]
        assert len(versions) == 4
        for number, version in enumerate(versions[1:], 1):
            assert version.new_bytes < 0.8 * versions[0].new_bytes
            described = repo._registry.books.read_plan(version.push)[1]
            assert any(row.base for rows in described.values() for row in rows), number
        assert repo.fsck(read_data=1).is_clean
        for version in versions:
            repo.pull(version)
        # By itself, a push does not fetch what it would be a difference to.
        plain = repo.push(repo.pull("net"), "net", step=9)
        assert plain.new_bytes == 0
        state = repo.pull("net")
        state["model"]["weight"] = state["model"]["weight"] + 1e-5
        assert repo.push(state, "net", compress="auto").new_bytes > 300 * 300 * 4
