"""Only some tensors of a version: only their bytes are read, and ties come under each name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from servers import RawS3, Server
from torch import nn

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import NotFoundError

pytest_plugins = ("servers",)

MIB = 1 << 20


class Reads:
    """A hook that adds up what is read of packs."""

    def __init__(self, kind: str) -> None:
        self.count = self.nbytes = 0
        self._kind = kind

    def __call__(self, kind: str, act: Any, args: tuple[Any, ...]) -> Any:
        found = act(*args)
        if kind == self._kind:
            self.count += 1
            self.nbytes += found if isinstance(found, int) else args[2].nbytes
        return found


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.wte.weight


def test_a_tied_tensor_comes_under_each_of_its_names(repo: ckpt.Repository) -> None:
    net = Tied()
    repo.push(net, "net")
    pulled = repo.pull("net", tensors="head.*")
    assert list(pulled) == ["head.weight"]
    assert torch.equal(pulled["head.weight"], net.wte.weight)
    assert sorted(repo.pull("net", tensors="*")) == ["head.weight", "wte.weight"]
    assert list(repo.pull("net", tensors=["head.*", "wte.*"])) == list(repo.pull("net"))

    shared = torch.rand(4)
    repo.push({"a": {"x": shared}, "b": [shared, torch.ones(2)]}, "values")
    assert sorted(repo.pull("values", tensors="*")) == ["a.x", "b.0", "b.1"]
    assert torch.equal(repo.pull("values", tensors="b.0")["b.0"], shared)


def test_only_what_is_asked_for_is_read(repo: ckpt.Repository) -> None:
    state = {f"w{n}": torch.rand(MIB // 4) for n in range(8)}
    repo.push(state, "m")
    reads = Reads("read")
    with observed(reads):
        pulled = repo.pull("m", tensors="w3")
    assert torch.equal(pulled["w3"], state["w3"])
    assert reads.nbytes <= 1.05 * MIB


def test_a_file_has_a_tied_tensor_under_each_of_its_names_and_reads_it_once(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    shared, other = torch.rand(MIB // 4), torch.rand(MIB // 4)
    repo.push({"a": shared, "b": [shared, torch.ones(2)], "c": other}, "m")
    reads = Reads("read")
    with observed(reads):
        repo.pull_file("m", tmp_path / "some.safetensors", tensors="[ab]*")
    assert reads.nbytes <= 1.05 * MIB
    found = load_file(tmp_path / "some.safetensors")
    assert sorted(found) == ["a", "b.0", "b.1"]
    assert torch.equal(found["a"], shared)
    assert torch.equal(found["b.0"], shared)


def test_a_tensor_of_an_s3_store_costs_one_request(
    seaweedfs: Server, registry_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", seaweedfs.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    state = {f"w{n}": torch.rand(MIB) for n in range(12)}
    with (
        RawS3(seaweedfs, None) as raw,
        ckpt.open(registry=str(registry_file), store=raw.url) as repo,
    ):
        repo.push(state, "m")
        reads = Reads("s3.get")
        with observed(reads):
            pulled = repo.pull("m", tensors="w7")
        assert torch.equal(pulled["w7"], state["w7"])
        assert 1 <= reads.count <= 2
        assert reads.nbytes <= 1.05 * 4 * MIB


@pytest.fixture
def registry_file(tmp_path: Path) -> Path:
    """A registry in a file, beside a store that is elsewhere."""
    return tmp_path / "registry.db"


def test_the_command_line_writes_a_file_with_some(repo: ckpt.Repository, tmp_path: Path) -> None:
    state = {"encoder.w": torch.rand(9), "encoder.b": torch.rand(3), "head": torch.rand(2)}
    repo.push({"model": state, "view": state["head"][:1]}, "m")
    program = Path(sys.executable).with_name("ckpt")

    def pull(pattern: str, out: str) -> subprocess.CompletedProcess[str]:
        command: list[str | Path] = [program, "-r", repo.location.root, "pull", "m"]
        return subprocess.run(
            [*command, tmp_path / out, "--tensors", pattern],
            capture_output=True,
            text=True,
            check=False,
        )

    done = pull("model.encoder.*", "some.safetensors")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'some.safetensors'}\n")
    found = load_file(tmp_path / "some.safetensors")
    assert sorted(found) == ["model.encoder.b", "model.encoder.w"]
    assert torch.equal(found["model.encoder.w"], state["encoder.w"])
    missing = pull("decoder.*", "none.safetensors")
    assert missing.returncode == 3
    assert "has no tensor like" in missing.stderr
    assert not (tmp_path / "none.safetensors").exists()
    assert load_file(str(pull("view", "view.safetensors").stdout.strip())).keys() == {"view"}


def test_no_tensor_is_an_error(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(1)}, "m")
    with pytest.raises(NotFoundError, match="like"):
        repo.pull("m", tensors="x*")
