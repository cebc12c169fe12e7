"""doctor says what is well, what is not, and what to do."""

from __future__ import annotations

import errno
import json
import secrets
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import BUCKET, Server

import ckpt
from ckpt.core.effects import observed
from ckpt.registry.registry import Registry
from ckpt.storage.identity import read_identity
from ckpt.storage.s3_failures import RefusedError
from ckpt.storage.s3_probe import Capabilities

pytest_plugins = ("servers",)


def told(repo: ckpt.Repository) -> dict[str, bool]:
    return {one.name: one.fine for one in repo.doctor()}


def test_a_healthy_repository_is_well_and_nothing_is_left_behind(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(5)}, "a")
    before = sorted(repo.location.store.rglob("*"))
    assert all(told(repo).values())
    assert sorted(repo.location.store.rglob("*")) == before


def test_a_missing_pack_and_a_store_that_knows_more_are_told(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(5)}, "a")
    (pack,) = repo.location.store.glob("packs/*/*")
    pack.unlink()
    repo._store.put(f"documents/1/000000000077-{'a' * 32}.json", b"{}")
    found = told(repo)
    assert not found.pop("packs")
    assert not found.pop("agreement")
    assert all(found.values())


def test_a_registry_that_a_stopped_rebuild_closed_is_told(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(5)}, "a")
    Registry.fence(repo.location.registry, str(read_identity(repo._store)))
    found = {one.name: one for one in repo.doctor()}
    assert [name for name, one in found.items() if not one.fine] == ["epoch"]
    assert "registry rebuild" in found["epoch"].todo


def test_a_clock_that_is_wrong_is_told(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repo._registry.collector, "now", lambda: 0)
    assert not told(repo)["clock"]


def test_a_store_that_may_not_be_written_is_told(repo: ckpt.Repository) -> None:
    def refuse(kind: str, act: Any, given: Any) -> Any:
        if kind == "create":
            raise PermissionError(errno.EACCES, "Permission denied")
        return act(*given)

    with observed(refuse):
        found = {one.name: one for one in repo.doctor()}
    assert not found["store"].fine
    assert found["store"].todo
    assert [name for name, one in found.items() if not one.fine] == ["store"]


def test_what_an_s3_server_lacks_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.endpoint)
    place = f"s3://{BUCKET}/doctor/{secrets.token_hex(8)}"
    with ckpt.open(registry=str(tmp_path / "registry.db"), store=place) as repo:
        assert all(told(repo).values())
        lacking = Capabilities.named({"range_reads", "start_after"})
        monkeypatch.setattr(repo._store, "probe_capabilities", lambda: lacking)
        (s3,) = (one for one in repo.doctor() if one.name == "s3")
        assert not s3.fine
        assert "multipart" in s3.seen
        assert "conditional_writes" in s3.seen
        assert s3.todo == "use another server"


def test_a_pack_of_another_size_is_not_well(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(5)}, "a")
    assert all(told(repo).values())
    path = next(iter(repo.location.store.glob("packs/*/*")))
    path.chmod(0o644)
    with path.open("ab") as file:
        file.write(b"more")
    assert not told(repo)["packs"]


def test_a_bucket_that_keeps_what_is_deleted_is_told(
    moto: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto.endpoint)
    bucket = f"bucket-{secrets.token_hex(8)}"
    moto.client.create_bucket(Bucket=bucket)

    def bucket_of(repo: ckpt.Repository) -> Any:
        (found,) = (one for one in repo.doctor() if one.name == "bucket")
        return found

    with ckpt.open(registry=str(tmp_path / "registry.db"), store=f"s3://{bucket}/x") as repo:
        assert bucket_of(repo).fine
        moto.client.put_bucket_versioning(
            Bucket=bucket, VersioningConfiguration={"Status": "Enabled"}
        )
        assert not bucket_of(repo).fine
        assert "lifecycle" in bucket_of(repo).todo
        rule = {
            "ID": "ends",
            "Status": "Enabled",
            "Filter": {"Prefix": ""},
            "NoncurrentVersionExpiration": {"NoncurrentDays": 1},
        }
        moto.client.put_bucket_lifecycle_configuration(
            Bucket=bucket, LifecycleConfiguration={"Rules": [rule]}
        )
        assert bucket_of(repo).fine

        def refuse(kind: str, act: Any, given: Any) -> Any:
            if kind == "s3.versions":
                raise RefusedError(403, "AccessDenied", "", "")
            return act(*given)

        with observed(refuse):
            assert bucket_of(repo).fine
            assert bucket_of(repo).seen == "may not be looked at"


def test_the_store_is_looked_at_also_when_the_registry_is_away(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    repo.push({"w": torch.ones(5)}, "a")
    repo.tag("a", "best")
    away, kept = tmp_path / "away" / ".ckpt", repo.location.store
    away.mkdir(parents=True)
    address = "postgresql://me@127.0.0.1:1/db"
    (away / "config.toml").write_text(f'registry = "{address}"\nstore = "{kept}"\n')
    program = str(Path(sys.executable).with_name("ckpt"))
    command = [program, "-r", str(away.parent), "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert [name for name, one in found.items() if not one["fine"]] == ["opening"]
    assert "cannot be reached" in found["opening"]["seen"]
    assert found["contents"]["seen"] == "documents: 1, events: 1, epoch 1"


def test_the_command_line_ends_with_1_when_something_is_wrong(repo: ckpt.Repository) -> None:
    program = str(Path(sys.executable).with_name("ckpt"))
    command = [program, "-r", str(repo.location.root), "doctor"]
    repo.push({"w": torch.ones(5)}, "a")
    fine = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "LOOK" not in fine.stdout
    next(iter(repo.location.store.glob("packs/*/*"))).unlink()
    wrong = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    (one,) = (finding for finding in json.loads(wrong.stdout) if not finding["fine"])
    assert one["todo"] == "run `ckpt fsck --repair`"
