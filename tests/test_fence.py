"""A registry that is being rebuilt, or is an old copy, acknowledges, gives and deletes nothing."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from postgres_server import PostgresServer, repository_over

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import AccessError, ConflictError, SpaceError
from ckpt.registry.registry import Registry
from ckpt.service import gc, rebuild
from ckpt.service.acknowledge import copy_pending
from ckpt.service.config import Location, locate
from ckpt.storage.identity import read_identity
from ckpt.storage.local import LocalStore

pytest_plugins = ("postgres_server",)


def state(value: float) -> dict[str, torch.Tensor]:
    return {"w": torch.full((64, 64), value)}


def rebuilt(folder: Path, meanwhile: Callable[[], None] = lambda: None) -> None:
    """A rebuild; ``meanwhile`` runs when the store was listed and nothing is replaced yet."""
    location = locate(folder)
    make = rebuild._make

    def make_after(*given: Any) -> Any:
        meanwhile()
        return make(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rebuild, "_make", make_after)
        rebuild.rebuild_registry(location, LocalStore(location.store))


def references(folder: Path) -> list[str]:
    with ckpt.open(folder) as repo:
        for version in repo.log("a"):
            assert torch.equal(repo.pull(version)["w"], state(version.step or 0)["w"])
        return [version.reference for version in repo.log("a")]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    with ckpt.open(tmp_path) as repo:
        for step in (1, 2):
            repo.push(state(step), "a", step=step)
    return tmp_path


@pytest.mark.parametrize("act", ["push", "rm", "tag", "annotate", "prune", "gc"])
def test_nothing_is_done_in_a_registry_that_is_being_rebuilt(two: Path, act: str) -> None:
    acts: dict[str, Callable[[ckpt.Repository], object]] = {
        "push": lambda repo: repo.push(state(3), "a", step=3),
        "rm": lambda repo: repo.rm("a@1"),
        "tag": lambda repo: repo.tag("a@1", "best"),
        "annotate": lambda repo: repo.annotate("a@1", labels={"x": "y"}),
        "prune": lambda repo: repo.prune("a", keep=["last:1"]),
        "gc": lambda repo: repo.gc(grace=0, allow=["unknown"]) and repo.rm("a@1"),
    }

    def meanwhile() -> None:
        with ckpt.open(two) as repo, pytest.raises(ConflictError, match="being rebuilt"):
            acts[act](repo)

    rebuilt(two, meanwhile)
    assert references(two) == ["a@2", "a@1"]
    with ckpt.open(two) as repo:
        acts[act](repo)


@pytest.fixture
def collector(two: Path) -> ckpt.Repository:
    """One that has removed a version, and has not told anybody."""
    repo = ckpt.open(two)
    repo._registry.changes.remove(repo.get("a@1").push, "me")
    return repo


def test_a_collector_from_before_deletes_no_pack(two: Path, collector: ckpt.Repository) -> None:
    books = collector._registry.collector
    books.condemn(one.pack for one in books.unneeded())
    assert books.remove(0, "me") != []

    def meanwhile() -> None:
        copy_pending(collector._store, collector._registry)
        gc._delete(collector._store, collector._registry)

    rebuilt(two, meanwhile)
    gc._delete(collector._store, collector._registry)
    collector.close()
    assert references(two) == ["a@2", "a@1"]


def test_a_collector_from_before_deletes_no_document(two: Path, collector: ckpt.Repository) -> None:
    epoch, _ = collector._registry.copies.position()
    listed = gc._Listed(collector._store)
    ended = gc._check(collector._registry, listed, ())

    def meanwhile() -> None:
        gc._delete_documents(collector._store, collector._registry, listed, ended, epoch)

    rebuilt(two, meanwhile)
    meanwhile()
    collector.close()
    rebuilt(two)
    assert references(two) == ["a@2", "a@1"]


def test_a_collector_that_begins_meanwhile_deletes_no_document(
    two: Path, collector: ckpt.Repository
) -> None:
    def meanwhile() -> None:
        epoch, _ = collector._registry.copies.position()
        listed = gc._Listed(collector._store)
        ended = gc._check(collector._registry, listed, ())
        assert listed.documents.keys() & ended
        gc._delete_documents(collector._store, collector._registry, listed, ended, epoch)

    rebuilt(two, meanwhile)
    collector.close()
    rebuilt(two)
    assert references(two) == ["a@2", "a@1"]


def test_the_document_of_a_version_that_is_there_stays(two: Path) -> None:
    """Such as one that was gone until an older copy of the registry was put back."""
    with ckpt.open(two) as repo:
        epoch, _ = repo._registry.copies.position()
        listed, pushes = gc._Listed(repo._store), {version.push for version in repo.log("a")}
        gc._delete_documents(repo._store, repo._registry, listed, pushes, epoch)
        assert gc._Listed(repo._store).documents.keys() == pushes


@pytest.mark.parametrize("how", ["documents", "events", "epochs"])
def test_nothing_is_written_through_an_old_copy(two: Path, how: str) -> None:
    database = two / ".ckpt" / "registry.db"
    shutil.copy(database, two / "copy.db")
    if how == "epochs":
        rebuilt(two)
    else:
        with ckpt.open(two) as repo:
            repo.push(state(3), "a", step=3) if how == "documents" else repo.tag("a@1", "best")
    expected = references(two)
    shutil.copy(two / "copy.db", database)
    with ckpt.open(two) as repo:
        for act in (
            lambda: repo.push(state(9), "a", step=9),
            lambda: repo.rm("a@2"),
            lambda: repo.tag("a@2", "x"),
            lambda: repo.prune("a", keep=["last:1"]),
        ):
            with pytest.raises(ConflictError, match="older copy"):
                act()
    rebuilt(two)
    assert references(two) == expected


def test_a_rebuild_that_was_stopped_is_run_again(
    two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StoppedError(Exception):
        pass

    write = rebuild._write_epoch

    def write_and_stop(*given: Any) -> None:
        write(*given)
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(rebuild, "_write_epoch", write_and_stop)
        with pytest.raises(StoppedError):
            rebuilt(two)
    with ckpt.open(two) as repo:
        assert torch.equal(repo.pull("a@1")["w"], state(1)["w"])
        with pytest.raises(ConflictError, match="registry rebuild"):
            repo.push(state(3), "a", step=3)
    rebuilt(two)
    with ckpt.open(two) as repo:
        assert repo.push(state(3), "a", step=3).number == 3


@pytest.fixture
def team(where: Path | str, tmp_path: Path) -> Location:
    """Where a repository with one version is, over either database."""
    with repository_over(where, tmp_path) as repo:
        repo.push(state(1), "a", step=1)
        return replace(repo.location, registry_place=where)


class TestFailedRebuilds:
    """What a rebuild that fails leaves, over either database."""

    @staticmethod
    def acts(team: Location, fails: int = -1) -> list[str]:
        """The acts of a rebuild; instead of that with the number ``fails`` the disk is full."""
        seen: list[str] = []

        def hook(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            seen.append(kind)
            if len(seen) - 1 == fails:
                raise SpaceError("no-space", "there is no room")
            return act(*args)

        with observed(hook):
            rebuild.rebuild_registry(team, LocalStore(team.store))
        return seen

    def test_whatever_fails_before_its_epoch_is_in_the_store_leaves_all_as_it_was(
        self, team: Location, where: Path | str
    ) -> None:
        """Of each kind of act the first and the last one fails."""
        _, acts = self.acts(team), self.acts(team)
        epoch = len(acts) - 1 - acts[::-1].index("link")
        assert "sql" not in acts[epoch:]  # only the commit is left
        there = sorted(team.root.iterdir())
        reversed_acts = acts[:epoch][::-1]
        first = {acts.index(kind) for kind in reversed_acts}
        last = {epoch - 1 - reversed_acts.index(kind) for kind in reversed_acts}
        for place in sorted(first | last):
            with pytest.raises(SpaceError):
                self.acts(team, place)
            with repository_over(where, team.root) as repo:
                assert repo._registry.copies.position()[0] == 3, acts[place]
        assert sorted(team.root.iterdir()) == there
        with repository_over(where, team.root) as repo:
            assert repo.push(state(2), "a", step=2).number == 2

    def test_a_commit_that_fails_leaves_it_closed_and_says_what_ends_that(
        self, team: Location, where: Path | str
    ) -> None:
        _, acts = self.acts(team), self.acts(team)
        last = len(acts) - 1 - acts[::-1].index("sql.commit")
        with pytest.raises(SpaceError, match="nobody can write until `ckpt registry rebuild`"):
            self.acts(team, last)
        with repository_over(where, team.root) as repo:
            with pytest.raises(ConflictError, match="failed or was stopped") as caught:
                repo.push(state(2), "a", step=2)
            assert "run `ckpt registry rebuild` again" in str(caught.value)
        self.acts(team)
        with repository_over(where, team.root) as repo:
            assert repo.push(state(2), "a", step=2).number == 2


class TestTwoRebuilds:
    """Two at once, over either database, of which one replaces a registry."""

    @staticmethod
    def rebuilt(team: Location, place: str, meanwhile: Callable[[], object]) -> None:
        """A rebuild, beside which ``meanwhile`` happens once before its part ``place``."""
        act, left = getattr(rebuild, place), [meanwhile]

        def act_after(*given: Any) -> Any:
            if left:
                left.pop()()
            return act(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rebuild, place, act_after)
            rebuild.rebuild_registry(team, LocalStore(team.store), lost=True)

    @pytest.mark.parametrize("lost", [True, False], ids=["lost", "there"])
    @pytest.mark.parametrize("place", ["_replace", "_make"])
    def test_the_later_one_replaces_no_registry_that_is_in_use(
        self, team: Location, where: Path | str, place: str, lost: bool, request: Any
    ) -> None:
        if lost and isinstance(where, Path):
            where.unlink()
        elif lost:
            server, name = (request.getfixturevalue(f"postgres{end}") for end in ("", "_database"))
            server.run("DROP SCHEMA public CASCADE", name)
            server.run("CREATE SCHEMA public", name)

        def rebuild_and_push() -> None:
            rebuild.rebuild_registry(team, LocalStore(team.store), lost=True)
            with repository_over(where, team.root) as repo:
                assert repo.push(state(2), "a", step=2).number == 2

        with pytest.raises(ConflictError) as caught:
            self.rebuilt(team, place, rebuild_and_push)
        assert caught.value.code == "rebuilt-meanwhile"
        with repository_over(where, team.root) as repo:
            assert repo.push(state(3), "a", step=3).number == 3
            assert repo.fsck(read_data=1).is_clean

    @pytest.mark.parametrize("what", ["whole", "missing", "damaged"])
    @pytest.mark.parametrize("where", ["sqlite"], indirect=True)
    def test_of_two_in_one_file_the_later_one_waits_and_is_refused(
        self, team: Location, where: Path, what: str
    ) -> None:
        old = where.read_bytes() if what == "whole" else b"no database" * 1000
        where.unlink() if what == "missing" else where.write_bytes(old)
        store, caught = LocalStore(team.store), []
        listed, goes, acts = threading.Event(), threading.Event(), threading.Event()

        def later() -> None:
            def wait() -> None:
                listed.set()
                assert goes.wait(30)

            with pytest.raises(ConflictError) as error:
                self.rebuilt(team, "_make", wait)
            caught.append(error.value.code)

        other = threading.Thread(target=later)

        def hook(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            if threading.current_thread() is other:
                if goes.is_set():
                    acts.set()
            elif kind == "sql.migrate":  # the old registry is set aside, nothing is committed
                goes.set()
                assert acts.wait(30)
            return act(*args)

        other.start()
        assert listed.wait(30)
        with observed(hook):
            kept = rebuild.rebuild_registry(team, store).kept
            other.join(30)
        assert caught == ["rebuilt-meanwhile"]
        assert (None if kept is None else Path(kept).name) == (
            None if what == "missing" else "registry.db.before-epoch-2"
        )
        assert what != "damaged" or Path(str(kept)).read_bytes() == old
        assert [info.key for info in store.list("epochs/")] == ["epochs/2.json"]
        with repository_over(where, team.root) as repo:
            assert repo.push(state(2), "a", step=2).number == 2

    @pytest.mark.parametrize("where", ["postgresql"], indirect=True)
    def test_no_epoch_is_written_while_another_one_ends(
        self, team: Location, postgres: PostgresServer, postgres_database: str, where: str
    ) -> None:
        """It would be newer than that of the registry which the other one makes."""
        postgres.run("DROP SCHEMA public CASCADE", postgres_database)
        postgres.run("CREATE SCHEMA public", postgres_database)
        store, done = LocalStore(team.store), threading.Event()
        caught: list[BaseException] = []

        def later() -> None:
            try:
                rebuild.rebuild_registry(team, store, lost=True)
            except ConflictError as error:
                caught.append(error)
            done.set()

        def hook(kind: str, act: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            if kind == "sql.migrate" and threading.current_thread() is threading.main_thread():
                threading.Thread(target=later).start()
                while not postgres.waiting(postgres_database):
                    assert not done.wait(0.01)
            return act(*args)

        with observed(hook):
            rebuild.rebuild_registry(team, store, lost=True)
        assert done.wait(30)
        assert [error.code for error in caught if isinstance(error, ConflictError)] == [
            "rebuilt-meanwhile"
        ]
        assert [info.key for info in store.list("epochs/")] == ["epochs/2.json"]
        with repository_over(where, team.root) as repo:
            assert repo.push(state(2), "a", step=2).number == 2

    def test_one_that_finds_a_newer_epoch_ends(self, team: Location) -> None:
        def write_newer() -> None:
            LocalStore(team.store).put("epochs/3.json", b'{"documents":[],"events":[]}')

        with pytest.raises(ConflictError) as caught:
            self.rebuilt(team, "_make", write_newer)
        assert caught.value.code == "rebuilt-meanwhile"

    def test_the_later_one_goes_on_when_both_have_closed_it(
        self, team: Location, where: Path | str
    ) -> None:
        identity = str(read_identity(LocalStore(team.store)))
        with pytest.raises(ConflictError, match="after this rebuild had begun"):
            self.rebuilt(team, "_replace", lambda: Registry.fence(where, identity))
        rebuild.rebuild_registry(team, LocalStore(team.store))
        with repository_over(where, team.root) as repo:
            assert repo.push(state(2), "a", step=2).number == 2

    @pytest.mark.parametrize("place", ["contents", "_write_epoch"])
    def test_one_that_cannot_go_on_gives_the_registry_back(
        self, team: Location, where: Path | str, place: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        listed, calls = rebuild._Reader.contents, [True, False]

        def refuse(*_: object) -> None:
            raise AccessError("permission", "may not")

        def contents(reader: Any) -> Any:
            return listed(reader) if calls.pop(0) else refuse()

        if place == "contents":
            monkeypatch.setattr(rebuild._Reader, "contents", contents)
        else:
            monkeypatch.setattr(rebuild, "_write_epoch", refuse)
        with repository_over(where, team.root) as repo:
            with pytest.raises(AccessError):
                rebuild.rebuild_registry(team, LocalStore(team.store))
            assert repo.push(state(2), "a", step=2).number == 2
            assert repo._registry.copies.position()[0] == 1
