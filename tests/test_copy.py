"""A copy is the same version in another repository, and shares what is there already."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from chapter_models import MLP
from safetensors.torch import save_file

import ckpt
from ckpt.core.errors import IntegrityError


@pytest.fixture
def other(tmp_path: Path) -> Iterator[ckpt.Repository]:
    with ckpt.open(tmp_path / "other") as repository:
        yield repository


def test_a_module_arrives_with_its_proof_and_facts(
    repo: ckpt.Repository, other: ckpt.Repository
) -> None:
    version = repo.push(
        MLP(), "mlp", inputs=(torch.rand(2, 20),), step=7, metrics={"loss": 0.5}, message="here"
    )
    copied = other.copy(repo, "mlp", model="theirs")
    assert copied.reference == "theirs@1"
    assert (copied.digest, copied.step, copied.metrics) == (version.digest, 7, {"loss": 0.5})
    assert (copied.message, copied.proof) == ("here", version.proof)
    assert other.document(copied) == repo.document(version)
    assert other.environment(copied) == repo.environment(version)
    assert other.verify("theirs", trust=[MLP]).verdict == "outputs-exact"
    assert other.copy(repo, "mlp", model="theirs").push == copied.push


def test_views_expanded_and_sparse_tensors_arrive(
    repo: ckpt.Repository, other: ckpt.Repository
) -> None:
    base = torch.rand(4, 6)
    state = {
        "view": base[1:3],
        "whole": base,
        "expanded": torch.rand(3, 1).expand(3, 5),
        "sparse": torch.eye(3).to_sparse(),
        "empty": torch.empty(0, 2),
        "odd": torch.rand(5).to(torch.complex128),
    }
    repo.push(state, "m")
    other.copy(repo, "m")
    pulled = other.pull("m")
    assert all(torch.equal(pulled[k].to_dense(), v.to_dense()) for k, v in state.items())
    assert pulled["expanded"].stride() == (1, 0)


def test_only_what_is_not_there_is_written(repo: ckpt.Repository, other: ckpt.Repository) -> None:
    torch.manual_seed(0)
    big = {"a": torch.rand(5 << 20), "b": torch.rand(1000)}
    other.push(big, "m")
    repo.push({**big, "b": torch.zeros(1000)}, "m")
    copied = other.copy(repo, "m")
    assert copied.new_bytes < 20_000
    assert torch.equal(other.pull(copied)["a"], big["a"])


def test_copies_made_again_add_nothing(repo: ckpt.Repository, other: ckpt.Repository) -> None:
    """Also of versions that are not the newest there."""
    for number in range(3):
        state = {"w": torch.full((9,), float(number))}
        repo.push(state, "net", step=number, metrics={"loss": float("nan")}, labels={"of": "us"})
    copied = [other.copy(repo, f"net@{number}") for number in (1, 2, 3)]
    again = [other.copy(repo, f"net@{number}") for number in (1, 2, 3)]
    assert [one.push for one in again] == [one.push for one in copied]
    repo.annotate("net@2", labels={"of": "all"})
    assert other.copy(repo, "net@2").reference == "net@4"
    path = other.location.store / f"packs/{copied[0].push[:2]}/{copied[0].push}-0.safetensors"
    path.unlink()
    assert other.copy(repo, "net@1").reference == "net@5"
    assert torch.equal(other.pull("net@5")["w"], torch.zeros(9))


@pytest.mark.parametrize(
    ("arguments", "status"), [(["nosuch"], 3), (["net@9"], 3), (["net", "--model", "a b"], 2)]
)
def test_a_copy_that_is_refused_makes_no_repository(
    repo: ckpt.Repository, tmp_path: Path, arguments: list[str], status: int
) -> None:
    repo.push({"w": torch.ones(3)}, "net")
    there = tmp_path / "typo" / "deep"
    program = str(Path(sys.executable).with_name("ckpt"))
    command = [program, "-r", str(repo.location.root), "copy", *arguments[:1], str(there)]
    shown = subprocess.run(command + arguments[1:], capture_output=True, text=True, check=False)
    assert shown.returncode == status, shown.stderr
    assert not there.parent.exists()


def test_a_damaged_source_commits_nothing(repo: ckpt.Repository, other: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(50)}, "m")
    (pack,) = repo.location.store.glob("packs/*/*")
    pack.chmod(0o644)
    pack.write_bytes(pack.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="holds other bytes"):
        other.copy(repo, "m")
    assert other.models() == []


def test_the_command_line_copies_a_file_byte_for_byte(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    save_file({"w": torch.rand(5)}, tmp_path / "net.safetensors")
    program = str(Path(sys.executable).with_name("ckpt"))

    def run(root: Path, *arguments: str) -> str:
        command = [program, "-r", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    here, there = repo.location.root, tmp_path / "there"
    run(here, "push", str(tmp_path / "net.safetensors"), "net")
    assert run(here, "copy", "net", str(there)) == "net@1\n"
    run(there, "pull", "net", str(tmp_path / "out.safetensors"))
    again = (tmp_path / "out.safetensors").read_bytes()
    assert again == (tmp_path / "net.safetensors").read_bytes()
