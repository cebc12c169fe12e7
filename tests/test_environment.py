"""Device metadata: what is recorded at push, and where tensors go at pull."""

from __future__ import annotations

import platform
import sqlite3

import pytest
import torch
from msgspec.structs import replace

import ckpt
from ckpt.core.documents import Document
from ckpt.core.errors import UsageError
from ckpt.loader.restore import Restorer
from ckpt.registry.queries import Queries


def test_the_environment_of_a_push_is_recorded(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(1)}, "m")
    body = repo.environment("m").body
    assert body["python"] == platform.python_version()
    assert body["versions"]["torch"] == torch.__version__
    assert body["host"] == platform.node()
    described = body["torch"]
    assert described["threads"] == torch.get_num_threads()
    assert described["deterministic"] is False
    assert described["devices"] == []
    assert set(described["precision"]) >= {"float32_matmul", "cudnn_allow_tf32"}
    assert {"cuda", "cudnn", "driver", "git_version", "capability"} <= set(described)


def test_one_row_serves_all_pushes_of_one_environment(repo: ckpt.Repository) -> None:
    first = repo.push({"w": torch.ones(1)}, "m")
    second = repo.push({"w": torch.zeros(1)}, "m")
    assert first.environment == second.environment
    with sqlite3.connect(repo.location.registry) as connection:
        (count,) = connection.execute("SELECT count(*) FROM environments").fetchone()
    connection.close()
    assert count == 1


def test_a_tensors_device_is_recorded_and_not_part_of_its_identity(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push({"w": torch.ones(1)}, "m")
    assert [tensor.device for tensor in repo.document("m").tensors] == ["cpu"]
    pretend_cuda(monkeypatch)
    assert [tensor.device for tensor in repo.document("m").tensors] == ["cuda:0"]
    assert repo.push({"w": torch.ones(1)}, "m").number == 1


def pretend_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have documents say that their tensors were on ``cuda:0``."""
    read = Queries.document

    def moved(queries: Queries, version: ckpt.Version) -> Document:
        found = read(queries, version)
        tensors = tuple(replace(tensor, device="cuda:0") for tensor in found.tensors)
        return replace(found, tensors=tensors)

    monkeypatch.setattr(Queries, "document", moved)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_an_absent_device_falls_back_to_the_cpu_with_a_note(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push({"w": torch.ones(2)}, "m")
    pretend_cuda(monkeypatch)
    with pytest.warns(ckpt.CkptWarning, match="cuda:0 is not available here; loaded on cpu"):
        pulled = repo.pull("m")
    assert pulled["w"].device.type == "cpu"
    assert torch.equal(repo.pull("m", device="cpu")["w"], torch.ones(2))
    assert torch.equal(repo.pull("m", device={"cuda:0": "cpu"})["w"], torch.ones(2))


def test_a_device_that_is_asked_for_must_be_there(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(2)}, "m")
    for device, code in (("cuda:99", "device-absent"), ("quantum", "device-invalid")):
        with pytest.raises(UsageError) as caught:
            repo.pull("m", device=device)
        assert caught.value.code == code


def test_a_mapping_says_where_each_recorded_device_goes(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(2)}, "m")
    restorer = Restorer(repo.document("m"), {}, {"cuda:0": "cpu", "cpu": "meta"})
    assert restorer.device("cuda:0").type == "cpu"
    assert restorer.device("cpu").type == "meta"
