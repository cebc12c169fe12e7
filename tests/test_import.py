"""Checkpoints of other programs become versions; hostile ones become one line."""

from __future__ import annotations

import pickle
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.state_dict_saver import save as save_shards

import ckpt
from ckpt.core.errors import CkptError, CkptWarning, UsageError
from ckpt.service.importing import find_checkpoints
from ckpt.service.unpickling import Unpickler

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.usefixtures("one_unpickler"),
]


def training_state(seed: int = 0) -> dict[str, Any]:
    """A module and its optimizer after a step, tied tensors, views and plain values."""
    torch.manual_seed(seed)
    net = torch.nn.Linear(6, 4)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.rand(2, 6)).sum().backward()
    optimizer.step()
    tied, base = torch.rand(6, 4), torch.rand(8)
    return {
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "tied": [tied, tied],
        "views": [base[:5], base[3:]],
        "transposed": torch.rand(3, 5).t(),
        "half": torch.rand(3).bfloat16(),
        "empty": torch.empty(0, 3),
        "sparse": torch.eye(3).to_sparse(),
        "parameter": torch.nn.Parameter(torch.rand(2)),
        "step": 3,
        "names": ("a", b"b", None, 1.5, {1, 2}),
    }


def test_a_pt_file_is_what_pushing_its_state_would_be(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    state = training_state()
    torch.save(state, tmp_path / "state.pt")
    (done,) = repo.import_files(tmp_path / "state.pt", "net", step=7, alias="best")
    assert done.version is not None
    pushed = repo.push(torch.load(tmp_path / "state.pt", weights_only=True), "other")
    assert done.version.digest == pushed.digest
    assert (done.version.step, done.version.message) == (7, "imported from state.pt")
    back = repo.pull("net:best")
    assert back["tied"][0] is back["tied"][1]
    back["views"][0][4] = 9.0
    assert back["views"][1][1] == 9.0
    assert list(back) == list(state)


def test_a_pull_after_an_import_loads_into_the_optimizer(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    state = training_state()
    torch.save(state, tmp_path / "state.pth")
    repo.import_files(tmp_path / "state.pth", "net")
    back = repo.pull("net")
    optimizer = torch.optim.AdamW(torch.nn.Linear(6, 4).parameters())
    optimizer.load_state_dict(back["optimizer"])
    for index, moments in state["optimizer"]["state"].items():
        assert torch.equal(back["optimizer"]["state"][index]["exp_avg"], moments["exp_avg"])


def test_what_an_import_leaves_out_of_a_tensor_is_named_as_by_a_push(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    weight: Any = torch.nn.Parameter(torch.rand(2))
    weight.my_tag = "mine"
    torch.save({"a": {"w": weight}}, tmp_path / "state.pt")
    with pytest.warns(CkptWarning) as said:
        repo.import_files(tmp_path / "state.pt", "net")
    (note,) = [str(one.message) for one in said]
    assert note == "state.pt: a.w: its attribute my_tag is not stored"
    many: Any = torch.rand(2)
    vars(many).update({f"tag{number}\x1b": "x" * 10_000 for number in range(3000)})
    torch.save(many, tmp_path / "many.pt")
    with pytest.warns(CkptWarning) as said:
        repo.import_files(tmp_path / "many.pt", "many")
    texts = [str(one.message) for one in said]
    assert texts[-1] == "many.pt: 2980 more like these"
    assert len(texts) == 21
    assert all(text.isprintable() for text in texts)


def lightning(step: int, epoch: int) -> dict[str, Any]:
    """What Lightning's Trainer writes, as far as its structure goes."""
    weights = {"net.weight": torch.full((2, 3), float(step)), "net.bias": torch.zeros(2)}
    return {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": "2.6.1",
        "state_dict": OrderedDict(weights),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 1}}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'loss'}": {"best_model_score": torch.ones(())}},
        "optimizer_states": [{"state": {0: {"step": torch.ones(())}}, "param_groups": []}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1, "layers": [3, 2]},
    }


def test_a_lightning_checkpoint_brings_its_step_and_epoch(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    torch.save(lightning(1200, 3), tmp_path / "last.ckpt")
    (done,) = repo.import_files(tmp_path / "last.ckpt", "net")
    assert done.version is not None
    assert done.version.step == 1200
    assert done.version.labels == {"epoch": "3"}
    assert repo.pull("net")["hyper_parameters"] == {"lr": 0.1, "layers": [3, 2]}


@pytest.mark.parametrize(
    ("name", "step", "epoch"),
    [
        ("step_1000.pt", 1000, None),
        ("epoch=3-step=1200.ckpt", 1200, "3"),
        ("model_0002000.pth", 2000, None),
        ("checkpoint_epoch_10.pt", None, "10"),
        ("global_step500.pt", 500, None),
        ("iter-7.bin", 7, None),
        ("last.pt", None, None),
        ("resnet50-1000.pt", 1000, None),
        ("300.pt", 300, None),
        ("step=1200-0.31.ckpt", 1200, None),
        ("epoch_3_0.95.pt", None, "3"),
        ("epoch=3-step=1200-v1.ckpt", 1200, "3"),
        ("2024-05-12_step_500.pt", 500, None),
        ("step-500-2024-05-12.pt", 500, None),
    ],
)
def test_the_step_is_found_in_the_name(
    name: str, step: int | None, epoch: str | None, tmp_path: Path
) -> None:
    (tmp_path / name).touch()
    (found,) = find_checkpoints(tmp_path)
    assert (found.step, found.labels.get("epoch")) == (step, epoch)


@pytest.mark.parametrize(
    "name",
    [
        "model-val_loss=0.31.pt",
        "val_loss=3.pt",
        "acc_0.95.pt",
        "model-v1.2.pt",
        "run-2024-05-12.pt",
        "run_20240512.pt",
        "checkpoint-20240512-103000.pt",
        "step-100k.pt",
        "step=1e5.pt",
        "step=1.5.pt",
        "step_1_000.pt",
        "step1_000.pt",
        "global_step1000_2.pt",
        "step1000-1.pt",
        "checkpoint0_31.pt",
        "step_-5.pt",
        "checkpoint_3_1000.pt",
    ],
)
def test_a_number_in_the_name_that_counts_no_steps_is_no_step(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    (found,) = find_checkpoints(tmp_path)
    assert found.step is None


def test_a_lone_number_is_no_step_without_others(tmp_path: Path) -> None:
    (tmp_path / "resnet-50.pt").touch()
    (found,) = find_checkpoints(tmp_path / "resnet-50.pt")
    assert found.step is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of a job: three steps, one that is refused, and what lies beside them."""
    made = tmp_path / "job"
    made.mkdir()
    for step in (200, 1000, 30):
        torch.save({"w": torch.full((4,), float(step))}, made / f"step_{step}.pt")
    torch.save({"w": numpy.ones(2)}, made / "step_2000.pt")
    (made / "README.md").write_text("notes")
    (made / ".hidden.pt").touch()
    return made


def test_a_folder_is_imported_in_the_order_of_its_steps(
    repo: ckpt.Repository, folder: Path
) -> None:
    done = repo.import_files(folder, "net", alias="last")
    assert [version.step for version in repo.log("net")] == [1000, 200, 30]
    refused = {one.checkpoint.path.name: one.checkpoint.refused for one in done if not one.version}
    assert refused.keys() == {"step_2000.pt", "README.md"}
    assert "numpy" in str(refused["step_2000.pt"])
    assert repo.get("net:last").step == 1000


def test_the_steps_within_decide_the_order_whatever_the_names(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    steps = {"best-val.ckpt": 300, "last.ckpt": 500, "zz-old.ckpt": 100, "epoch=2.ckpt": 20}
    (tmp_path / "job").mkdir()
    for name, step in steps.items():
        torch.save(lightning(step, 2), tmp_path / "job" / name)
    foreseen = repo.import_files(tmp_path / "job", "net", dry_run=True)
    assert [one.checkpoint.step for one in foreseen] == [20, 100, 300, 500]
    done = repo.import_files(tmp_path / "job", "net", alias="best")
    assert [one.version.step for one in done if one.version] == [20, 100, 300, 500]
    assert repo.get("net").step == repo.get("net:best").step == 500


def test_an_import_that_is_run_again_adds_nothing(repo: ckpt.Repository, folder: Path) -> None:
    first = repo.import_files(folder, "net")
    again = repo.import_files(folder, "net")
    assert [one.version for one in first] == [one.version for one in again]
    assert all(one.known for one in again if one.version is not None)
    torch.save({"w": torch.zeros(4)}, folder / "step_3000.pt")
    more = repo.import_files(folder, "net")
    assert [one.version.number for one in more if one.version and not one.known] == [4]


def test_what_another_run_or_label_is_asked_for_is_a_version_of_its_own(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "step-0.pt")

    def run_import(**said: Any) -> tuple[int, bool]:
        (done,) = repo.import_files(tmp_path / "step-0.pt", "gpt", **said)
        assert done.version is not None
        return done.version.number, done.known

    assert run_import(run="a") == (1, False)
    assert run_import(run="b", labels={"seed": "2"}, message="run b") == (2, False)
    assert run_import(run="b", labels={"seed": "3"}) == (3, False)
    assert run_import(run="a") == (1, True)
    assert run_import(run="b", labels={"seed": "2"}) == (2, True)
    assert repo.get("gpt@2").labels == {"seed": "2"}


def test_a_changed_checkpoint_of_the_same_step_is_a_new_version(
    repo: ckpt.Repository, folder: Path
) -> None:
    repo.import_files(folder, "net")
    torch.save({"w": torch.zeros(4)}, folder / "step_30.pt")
    done = repo.import_files(folder, "net")
    assert [one.known for one in done if one.version is not None] == [False, True, True]


def sharded(folder: Path) -> dict[str, torch.Tensor]:
    """A DCP folder whose tensors lie in pieces, of rows and of both dimensions."""
    torch.manual_seed(1)
    whole = {"rows": torch.rand(7, 5), "grid": torch.rand(6, 8).bfloat16(), "bias": torch.rand(3)}
    cuts: dict[str, list[tuple[slice, ...]]] = {
        "rows": [(slice(0, 3),), (slice(3, 7),)],
        "grid": [(slice(r, r + 3), slice(c, c + 4)) for r in (0, 3) for c in (0, 4)],
        "bias": [(slice(0, 3),)],
    }
    parts = {
        f"{name}#{number}": whole[name][cut].clone()
        for name, pieces in cuts.items()
        for number, cut in enumerate(pieces)
    }
    save_shards(dict(parts), checkpoint_id=folder, no_dist=True)
    with (folder / ".metadata").open("rb") as file:
        metadata: Metadata = pickle.load(file)
    entries, places = {}, {}
    stored = {index.fqn: info for index, info in metadata.storage_data.items()}
    for name, pieces in cuts.items():
        chunks = []
        for number, cut in enumerate(pieces):
            full = (*cut, *[slice(0, n) for n in whole[name].shape[len(cut) :]])
            low = torch.Size([part.start for part in full])
            chunks.append(ChunkStorageMetadata(low, parts[f"{name}#{number}"].size()))
            places[MetadataIndex(name, low, number)] = stored[f"{name}#{number}"]
        kind = TensorProperties(dtype=whole[name].dtype)
        entries[name] = TensorStorageMetadata(kind, whole[name].size(), chunks)
    metadata.state_dict_metadata = dict(entries)
    metadata.storage_data = places
    metadata.planner_data = {name: ("model", name) for name in whole}
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    return whole


def test_tensors_of_a_dcp_folder_come_whole_whatever_their_pieces(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    whole = sharded(tmp_path / "dcp")
    repo.import_files(tmp_path / "dcp", "net")
    back = repo.pull("net")["model"]
    assert back.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(back[name], tensor), name


def test_a_read_of_any_bytes_of_a_sharded_tensor_is_right(
    tmp_path: Path, unpickler: Unpickler
) -> None:
    whole = sharded(tmp_path / "dcp")
    opened = unpickler.open(tmp_path / "dcp")
    chance = random.Random(0)
    for entry, source in zip(opened.document.tensors, opened.sources, strict=True):
        assert source is not None
        tensor = whole[entry.name.rpartition(".")[2]]
        body = tensor.view(torch.uint8).numpy().tobytes()
        for _ in range(60):
            first, last = sorted(chance.sample(range(len(body) + 1), 2))
            assert bytes(source.read(first, last - first)) == body[first:last]


def test_a_dcp_folder_of_a_training_state_keeps_its_nesting(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    state = {
        "model": {"a.weight": torch.rand(3, 2), "a.bias": torch.rand(3)},
        "optimizer": {"state": {"a": {"exp_avg": torch.rand(3)}}, "param_groups": [{"lr": 0.1}]},
        "list": [torch.ones(2), 5],
        "step": 7,
    }
    save_shards(dict(state), checkpoint_id=tmp_path / "step_40", no_dist=True)
    (done,) = repo.import_files(tmp_path / "step_40", "net")
    assert done.version is not None
    assert done.version.step == 40
    assert done.version.digest == repo.push(state, "other").digest


@pytest.mark.filterwarnings("ignore:torch.quantize_per:UserWarning")
@pytest.mark.filterwarnings("ignore:.*quantized.*:UserWarning")
def test_a_dcp_folder_with_a_quantised_tensor_is_refused_by_its_name(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    quantised = torch.quantize_per_tensor(torch.rand(3, 4), 0.1, 3, torch.qint8)
    state = {"net": {"q": quantised}, "w": torch.ones(2)}
    save_shards(dict(state), checkpoint_id=tmp_path / "dcp", no_dist=True)
    with pytest.raises(UsageError, match=r"net\.q is a quantised tensor") as caught:
        repo.import_files(tmp_path / "dcp", "net")
    assert caught.value.code == "cannot-store"
    repo.push(state, "net")
    with pytest.raises(UsageError, match=r"net\.q is a quantised tensor") as caught:
        repo.export_file("net", tmp_path / "out", format="dcp")
    assert caught.value.code == "cannot-export"
    assert not (tmp_path / "out").exists()


def test_a_hugging_face_folder_is_imported_as_it_is_pushed(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    for name in ("checkpoint-500", "checkpoint-40"):
        (tmp_path / "job" / name).mkdir(parents=True)
        (tmp_path / "job" / name / "config.json").write_text(f'{{"name": "{name}"}}')
        save_file({"w": torch.ones(2)}, tmp_path / "job" / name / "model.safetensors")
    done = repo.import_files(tmp_path / "job", "bert")
    assert [one.version.step for one in done if one.version] == [40, 500]
    pushed = repo.push_file(tmp_path / "job" / "checkpoint-500", "other")
    assert done[1].version is not None
    assert (done[1].version.digest, done[1].version.state) == (pushed.digest, "files")
    again = repo.import_files(tmp_path / "job", "bert")
    assert [one.known for one in again] == [True, True]


def test_a_part_of_a_hugging_face_checkpoint_is_no_checkpoint(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    torch.save({}, tmp_path / "pytorch_model-00001-of-00002.bin")
    with pytest.raises(UsageError, match="one part of a checkpoint"):
        repo.import_files(tmp_path / "pytorch_model-00001-of-00002.bin", "net")


def unconverted(folder: Path) -> Path:
    """A checkpoint of Hugging Face's Trainer without safetensors."""
    folder.mkdir(parents=True)
    for name in ("pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({"w": torch.ones(2)}, folder / name)
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_a_hugging_face_checkpoint_of_pickles_is_one_that_has_to_be_converted(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    folder = unconverted(tmp_path / "job" / "checkpoint-500")
    with pytest.raises(UsageError, match=r"one checkpoint.*safe_serialization") as caught:
        repo.import_files(folder, "bert", alias="best")
    assert caught.value.code == "not-converted"
    unconverted(tmp_path / "job" / "checkpoint-1000")
    done = repo.import_files(tmp_path / "job", "bert")
    assert [(one.checkpoint.step, one.version) for one in done] == [(500, None), (1000, None)]
    refused = [one.checkpoint.refused for one in done]
    assert [error.code for error in refused if error] == ["not-converted"] * 2
    assert repo.models() == []


@pytest.mark.parametrize(
    "names",
    [
        ["adapter_config.json", "adapter_model.bin", "optimizer.pt"],
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"],
        ["pytorch_model.bin", "optimizer.bin", "random_states_0.pkl"],
        ["trainer_state.json", "optimizer.pt", "rng_state_0.pth"],
        ["model_index.json", "unet/diffusion_pytorch_model.bin"],
    ],
)
def test_a_folder_of_one_checkpoint_is_never_several(names: list[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UsageError) as caught:
        find_checkpoints(tmp_path)
    assert caught.value.code == "not-converted"


def test_checkpoints_beside_a_configuration_are_one_each(tmp_path: Path) -> None:
    for name in ("config.json", "step_1.pt", "step_2.pt"):
        (tmp_path / name).touch()
    found = find_checkpoints(tmp_path)
    assert [one.step for one in found if one.refused is None] == [1, 2]


def test_a_pipeline_with_weights_in_its_folders_is_imported_as_one(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    (tmp_path / "flux" / "unet").mkdir(parents=True)
    (tmp_path / "flux" / "model_index.json").write_text("{}")
    save_file({"w": torch.ones(2)}, tmp_path / "flux" / "unet" / "model.safetensors")
    (done,) = repo.import_files(tmp_path / "flux", "flux")
    assert done.version is not None
    assert done.version.state == "files"


def test_a_folder_with_checkpoints_among_others_is_told_with_its_command(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    for name in ("a/step-10.pt", "b/v0/last.ckpt", "b/v1/last.ckpt", "logs/events.bin"):
        (runs / name).parent.mkdir(parents=True, exist_ok=True)
        (runs / name).touch()
    for _ in range(2):
        done = repo.import_files(runs, "gpt")
        said = {one.checkpoint.path.name: str(one.checkpoint.refused) for one in done}
        assert f"run `ckpt import {runs}/a MODEL --run a`" in said["a"]
        assert f"`ckpt import {runs}/b/v0 MODEL --run b-v0`, and the same for" in said["b"]
        assert "is no checkpoint;" in said["logs"]
        torch.save({"w": torch.ones(2)}, runs / "final.pt")
    assert [version.number for version in repo.log("gpt")] == [1]


def test_a_link_to_nothing_is_refused_and_not_the_others(
    repo: ckpt.Repository, folder: Path
) -> None:
    for name in ("latest", "latest.pt"):
        (folder / name).symlink_to(folder / "gone.pt")
    (folder / "logs").mkdir()
    (folder / "logs" / "latest").symlink_to(folder / "gone")
    done = repo.import_files(folder, "net")
    refused = {one.checkpoint.path.name: one.checkpoint.refused for one in done if not one.version}
    assert refused["latest.pt"] is not None
    assert refused["latest.pt"].code == "not-found"
    assert {"latest", "logs"} < refused.keys()
    assert len(repo.log("net")) == 3
    with pytest.raises(CkptError, match="no such file"):
        repo.import_files(folder / "latest.pt", "net")
