"""gc frees what no version needs, nothing else, and refuses what looks wrong."""

from __future__ import annotations

import errno
import json
import sqlite3
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import delete, update
from sqlalchemy.exc import OperationalError

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import ConflictError, NotFoundError, SpaceError
from ckpt.registry.tables import chunks, claims, packs, pushes, refs, versions


def state(seed: int, count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"w{n}": torch.rand(64, 64, generator=generator) for n in range(count)}


def stored(repo: ckpt.Repository) -> set[str]:
    return {path.name for path in repo.location.store.glob("packs/*/*")}


def write(repo: ckpt.Repository, *statements: Any) -> None:
    """Change the registry behind its back."""

    def act(transaction: Any) -> None:
        for statement in statements:
            transaction.run(statement)

    repo._registry._database.write(act)


class StoppedError(BaseException):
    """The process does nothing any more."""


def stopping(kind: str, after: int = 0) -> Any:
    """A hook by which everything stops before one effect of this kind."""
    seen = 0

    def stop(found: str, act: Any, given: Any) -> Any:
        nonlocal seen
        seen += found == kind
        if seen > after:
            raise StoppedError
        return act(*given)

    return stop


def test_what_was_removed_is_freed_after_the_grace(repo: ckpt.Repository) -> None:
    first, second = repo.push(state(1), "a"), repo.push(state(2), "a")
    repo.rm(first)
    waiting = repo.gc()
    assert (waiting.freed, len(waiting.waiting)) == ((), 1)
    assert len(stored(repo)) == 2
    assert repo.gc(dry_run=True).freed == ()
    collected = repo.gc(grace=0)
    assert [pack.push for pack in collected.freed] == [first.push]
    assert stored(repo) == {f"{second.push}-0.safetensors"}
    assert not list(repo.location.store.glob(f"documents/*/*{first.push}*"))
    assert torch.equal(repo.pull("a")["w0"], state(2)["w0"])
    assert repo.gc(grace=0).freed == ()


@pytest.mark.parametrize("ahead", [-(10**15), 10**15])
def test_without_a_grace_no_clock_keeps_what_nobody_needs(
    repo: ckpt.Repository, ahead: int
) -> None:
    kept = repo.push(state(2), "a")
    repo.rm(repo.push(state(1), "a"))
    repo.gc()
    write(repo, update(packs).values(condemned_at=packs.c.condemned_at + ahead))
    foreseen = repo.gc(grace=0, dry_run=True).freed
    assert repo.gc(grace=0).freed == foreseen != ()
    assert stored(repo) == {f"{kept.push}-0.safetensors"}


@pytest.mark.parametrize(("skew", "told"), [(0, False), (-3600, True), (3600, True)])
def test_a_skewed_clock_is_a_warning_and_no_refusal(
    repo: ckpt.Repository, skew: int, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push(state(2), "a")
    repo.rm(repo.push(state(1), "a"))
    real = time.time
    monkeypatch.setattr("time.time", lambda: real() + skew)
    collected = repo.gc(grace=0)
    assert len(collected.freed) == 1
    assert any("clock" in warning for warning in collected.warnings) == told


def test_a_dry_run_tells_exactly_and_changes_nothing(repo: ckpt.Repository) -> None:
    repo.push(state(1), "a")
    repo.rm(repo.push(state(2), "a", compress="none"))
    foreseen = repo.gc(grace=0, dry_run=True)
    assert len(stored(repo)) == 2
    assert repo.gc(grace=0).freed_bytes == foreseen.freed_bytes > 3 * 64 * 64 * 4


def test_a_dry_run_tells_of_a_broken_pack_what_the_run_does(repo: ckpt.Repository) -> None:
    repo.push(state(1), "a")
    removed = repo.push(state(2), "a", compress="none")
    write(repo, update(packs).where(packs.c.push == removed.push).values(state="broken"))
    repo.rm(removed)
    foreseen, done = repo.gc(dry_run=True), repo.gc()
    assert [pack.push for pack in done.freed] == [removed.push]
    assert (foreseen.freed, foreseen.waiting) == (done.freed, done.waiting)


def test_a_shared_pack_stays_as_long_as_anyone_needs_it(repo: ckpt.Repository) -> None:
    first = repo.push(state(1), "a")
    repo.push({**state(1), "more": torch.ones(5)}, "b")
    repo.rm(first)
    assert repo.gc(grace=0).freed == ()
    assert torch.equal(repo.pull("b")["w0"], state(1)["w0"])


def test_what_was_condemned_is_rescued_by_a_push_that_needs_it(repo: ckpt.Repository) -> None:
    repo.push(state(2), "b")
    repo.rm(repo.push(state(1), "a"))
    repo.gc()
    again = repo.push(state(1), "a")
    assert again.new_bytes == 0
    assert repo.gc(grace=0).freed == ()
    assert torch.equal(repo.pull("a")["w1"], state(1)["w1"])


def test_a_claimed_pack_survives_any_collection(repo: ckpt.Repository) -> None:
    """Claims and the check of the commit are two defences; each is tested by itself."""
    repo.push(state(2), "b")
    first = repo.push(state(1), "a")
    (pack,) = repo._registry.books.read_plan(first.push)[0]
    repo._registry.books.open_push("c" * 32, "push", {pack})
    repo.rm(first)
    assert repo.gc(grace=0).freed == ()
    repo._registry.books.abort("c" * 32)
    assert len(repo.gc(grace=0).freed) == 1


def test_a_commit_refuses_a_pack_whose_row_is_gone(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push(state(1), "a")
    books = repo._registry.books
    original = books.claim, books.open_push

    def lost(claimed: list[Any]) -> list[Any]:
        write(repo, delete(claims), delete(refs), delete(chunks), delete(packs))
        return claimed

    monkeypatch.setattr(books, "claim", lambda *given: lost(original[0](*given)))
    monkeypatch.setattr(books, "open_push", lambda *given: lost(original[1](*given)))
    with pytest.raises(ConflictError) as caught:
        repo.push({**state(1), "more": torch.ones(5)}, "b")
    assert caught.value.code == "pack-gone"


@pytest.mark.parametrize("at", ["link", "sql.commit", "fsync", "write"])
def test_what_a_killed_push_left_goes_with_its_lease(repo: ckpt.Repository, at: str) -> None:
    kept = repo.push(state(1), "a")
    with pytest.raises(StoppedError), observed(stopping(at)):
        repo.push(state(9), "killed")
    repo.gc(grace=0)
    write(repo, update(pushes).where(pushes.c.state == "open").values(expires_at=0))
    repo.gc(grace=0)
    assert stored(repo) == {f"{kept.push}-0.safetensors"}
    assert not list((repo.location.store / ".tmp").iterdir())
    assert torch.equal(repo.pull("a")["w0"], state(1)["w0"])


def test_a_dry_run_counts_what_a_push_left_whose_lease_has_ended(repo: ckpt.Repository) -> None:
    kept = repo.push(state(1), "a")
    with pytest.raises(StoppedError), observed(stopping("sql.commit", 1)):
        repo.push(state(9), "killed")
    (left,) = stored(repo) - {f"{kept.push}-0.safetensors"}
    (path,) = repo.location.store.glob(f"packs/*/{left}")
    nbytes = path.stat().st_size
    assert repo.gc(grace=0, dry_run=True).orphans == ()
    write(repo, update(pushes).where(pushes.c.state == "open").values(expires_at=0))
    for collected in (repo.gc(grace=0, dry_run=True), repo.gc(grace=0)):
        assert (len(collected.orphans), collected.orphan_bytes) == (1, nbytes)
    assert not path.exists()


def test_a_dry_run_counts_what_only_a_push_claims_whose_lease_has_ended(
    repo: ckpt.Repository,
) -> None:
    repo.push(state(2), "b")
    first = repo.push(state(1), "a")
    (pack,) = repo._registry.books.read_plan(first.push)[0]
    repo._registry.books.open_push("c" * 32, "push", {pack})
    repo.rm(first)
    assert repo.gc(grace=0, dry_run=True).freed == ()
    write(repo, update(pushes).where(pushes.c.id == "c" * 32).values(expires_at=0))
    foreseen = repo.gc(grace=0, dry_run=True)
    assert [one.id for one in foreseen.freed] == [pack]
    assert [one.id for one in repo.gc(grace=0).freed] == [pack]


def test_what_an_earlier_collection_left_is_counted_by_the_one_that_finishes_it(
    repo: ckpt.Repository,
) -> None:
    repo.push(state(2), "b")
    removed = repo.rm(repo.push(state(1), "a"))
    with suppress(StoppedError), observed(stopping("unlink")):
        repo.gc(grace=0)
    (left,) = repo.location.store.glob(f"packs/*/{removed.push}-0.safetensors")
    nbytes = left.stat().st_size
    for collected in (repo.gc(grace=0, dry_run=True), repo.gc(grace=0)):
        assert (len(collected.finished), collected.finished_bytes) == (1, nbytes)
        assert (collected.freed, collected.orphans) == ((), ())
    assert not left.exists()
    assert repo.gc(grace=0).finished == ()


def test_a_push_whose_file_was_tidied_away_says_that_its_lease_is_over(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    ended = update(pushes).where(pushes.c.state == "open").values(expires_at=0)
    collected: list[bool] = []

    def hook(kind: str, act: Any, given: Any) -> Any:
        if kind == "link" and not collected:
            collected.append(True)
            write(other, ended)
            other.gc(grace=0)
        return act(*given)

    with ckpt.open(tmp_path) as other:
        with observed(hook), pytest.raises(ConflictError) as caught:
            repo.push(state(1), "a")
        assert caught.value.code == "push-expired"
    assert repo.push(state(1), "a").number == 1


def test_a_full_disk_is_told_of_the_store_also_when_the_registry_is_on_it(
    repo: ckpt.Repository,
) -> None:
    full: list[bool] = []

    def hook(kind: str, act: Any, given: Any) -> Any:
        if kind == "fsync" or (full and kind.startswith("sql")):
            full.append(True)
            if kind == "fsync":
                raise OSError(errno.ENOSPC, "no space")
            said = sqlite3.OperationalError("database or disk is full")
            raise OperationalError(kind, None, said)
        return act(*given)

    with observed(hook), pytest.raises(SpaceError, match="while writing packs/"):
        repo.push(state(1), "a")
    assert repo.push(state(1), "a").number == 1


def test_a_copy_that_a_collection_takes_while_it_is_made_fails_nobody(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    first = repo.push(state(1), "a")
    taken: list[bool] = []

    def hook(kind: str, act: Any, given: Any) -> Any:
        result = act(*given)
        path = str(given[0]) if kind == "stat" else ""
        if "/documents/" in path and first.push in path and not taken:
            taken.append(True)
            repo.rm(first)
            repo.gc(grace=0)
            assert not list(repo.location.store.glob(f"documents/*/*-{first.push}.json"))
        return result

    with ckpt.open(tmp_path) as other, observed(hook):
        assert other.push(state(2), "a").number == 2
    assert taken


def test_a_pack_of_an_open_push_is_left_alone(repo: ckpt.Repository) -> None:
    repo.push(state(1), "a")
    push = "d" * 32
    repo._registry.books.open_push(push, "push")
    key = f"packs/dd/{push}-0.safetensors"
    repo._store.put(key, b"bytes")
    repo._store.put(f"packs/ee/{'e' * 32}-0.safetensors", b"of nobody")
    collected = repo.gc(grace=0)
    assert collected.orphans == ()
    assert len(collected.unknown) == 1
    assert repo._store.size(key) == 5
    repo._registry.books.abort(push)
    assert repo.gc(grace=0).orphans == (key,)
    assert repo._store.size(key) is None


def test_nothing_is_deleted_before_its_event_is_in_the_store(repo: ckpt.Repository) -> None:
    repo.push(state(2), "b")
    repo.rm(repo.push(state(1), "a"))
    order: list[str] = []

    def watch(kind: str, act: Any, given: Any) -> Any:
        if kind == "link" and "/events/" in str(given):
            order.append("event")
        if kind == "unlink" and "/packs/" in str(given):
            order.append("delete")
        return act(*given)

    with observed(watch):
        repo.gc(grace=0)
    assert order == ["event", "delete"]
    bodies = [json.loads(path.read_text()) for path in repo.location.store.glob("events/1/*")]
    assert sorted(body["kind"] for body in bodies) == ["dead", "rm"]


@pytest.mark.parametrize("kind", ["sql.commit", "link", "unlink", "fsync_folder"])
def test_a_collection_that_is_stopped_anywhere_is_finished_by_the_next(
    repo: ckpt.Repository, kind: str
) -> None:
    kept = repo.push(state(2), "b")
    repo.push(state(1), "a")
    repo.rm("a@1")
    for stop_at in range(12):
        with suppress(StoppedError), observed(stopping(kind, stop_at)):
            repo.gc(grace=0)
        assert torch.equal(repo.pull("b")["w2"], state(2)["w2"])
    repo.gc(grace=0)
    assert stored(repo) == {f"{kept.push}-0.safetensors"}


class TestRefusals:
    """gc refuses what looks wrong, and names what overrules it."""

    def refused(self, repo: ckpt.Repository, reason: str) -> None:
        before = stored(repo)
        with pytest.raises(ConflictError, match=f"--allow {reason}") as caught:
            repo.gc(grace=0)
        assert caught.value.code == "gc-refused"
        assert stored(repo) == before

    def test_a_registry_without_versions(self, repo: ckpt.Repository) -> None:
        repo._store.put(f"packs/dd/{'d' * 32}-0.safetensors", b"bytes")
        self.refused(repo, "empty")
        assert repo.gc(grace=0, allow=["empty"]).unknown

    @pytest.mark.parametrize("place", ["documents", "events"])
    def test_a_store_that_knows_more(self, repo: ckpt.Repository, place: str) -> None:
        repo.push(state(1), "a")
        repo._store.put(f"{place}/1/000000000099-{'f' * 32}.json", b"{}")
        self.refused(repo, "unknown")
        repo.gc(grace=0, allow=["unknown"])

    def test_much_that_dies_without_an_act(self, repo: ckpt.Repository) -> None:
        repo.push(state(1), "a")
        lost = repo.push(state(2), "b")
        write(
            repo,
            delete(refs).where(refs.c.version == 2),
            delete(versions).where(versions.c.id == 2),
        )
        for path in repo.location.store.glob(f"documents/1/*-{lost.push}.json"):
            path.unlink()  # else the store knows more
        self.refused(repo, "much")
        assert len(repo.gc(grace=0, allow=["much"]).freed) == 1

    def test_an_unknown_duration_is_refused(self, repo: ckpt.Repository) -> None:
        program = Path(sys.executable).with_name("ckpt")
        command = [str(program), "-r", str(repo.location.root), "gc", "--grace", "soon"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 2
        assert "duration-invalid" in found.stderr


def test_what_removing_frees_is_told_exactly(repo: ckpt.Repository) -> None:
    repo.push(state(1), "a")
    repo.push({**state(1), "more": torch.rand(300)}, "b")
    repo.push(state(3), "c")
    for reference in ("c@1", "b@1", "a@1"):
        usage = {one.reference: one for one in repo.du().versions}[reference]
        before = repo.du().stored
        repo.rm(reference)
        assert repo.du().reclaimable == usage.unique
        assert repo.gc(grace=0, allow=["empty"]).freed_bytes == usage.unique
        assert repo.du().stored == before - usage.unique
    assert repo.du().stored == 0
    with pytest.raises(NotFoundError):
        repo.get("a")


def test_the_command_line_tells_what_it_frees(repo: ckpt.Repository) -> None:
    repo.push(state(1), "a", compress="auto")
    repo.rm(repo.push(state(2), "b", compress="auto"))
    program = str(Path(sys.executable).with_name("ckpt"))

    def run(*arguments: str) -> str:
        command = [str(program), "-r", str(repo.location.root), *arguments]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return found.stdout + found.stderr

    assert "52.0 KiB stored" not in run("du").splitlines()[-2]
    assert "104.0 KiB stored, 52.0 KiB of it unneeded" in run("du")
    assert "unneeded: 52.0 KiB in 1 pack until" in run("gc")
    assert "would free 52.0 KiB in 1 pack" in run("gc", "--grace", "0", "-n")
    assert "freed 52.0 KiB in 1 pack" in run("gc", "--grace", "0")
    push = "d" * 32
    repo._registry.books.open_push(push, "push")
    repo._store.put(f"packs/dd/{push}-0.safetensors", bytes(3 << 10))
    repo._registry.books.abort(push)
    assert "would free 3.0 KiB in 1 unfinished pack of pushes that ended" in run("gc", "-n")
    assert json.loads(run("gc", "-n", "--json"))["orphan_bytes"] == 3 << 10
    assert "freed 3.0 KiB in 1 unfinished pack of pushes that ended" in run("gc")
    assert json.loads(run("gc", "--json"))["freed"] == []
