"""A real checkpoint of 22.7 M parameters: pushed, changed, pulled, opened by other readers."""

from __future__ import annotations

import filecmp
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

import ckpt


def changed_copy(source: Path, target: Path, name: str) -> int:
    """A copy of the file in which one tensor differs; returns that tensor's bytes."""
    tensors = load_file(source)
    tensors[name] = tensors[name] + 1
    save_file(tensors, target, metadata={"format": "pt"})
    return tensors[name].nbytes


def test_it_comes_back_byte_for_byte(
    repo: ckpt.Repository, real_checkpoint: Path, tmp_path: Path
) -> None:
    version = repo.push_file(real_checkpoint, "minilm")
    assert version.nbytes > 90_000_000
    repo.pull_file("minilm", tmp_path / "out.safetensors")
    assert filecmp.cmp(real_checkpoint, tmp_path / "out.safetensors", shallow=False)


def test_after_changing_one_tensor_that_tensor_alone_is_stored(
    repo: ckpt.Repository, real_checkpoint: Path, tmp_path: Path
) -> None:
    repo.push_file(real_checkpoint, "minilm")
    changed = tmp_path / "changed.safetensors"
    name = "encoder.layer.3.intermediate.dense.weight"
    nbytes = changed_copy(real_checkpoint, changed, name)
    second = repo.push_file(changed, "minilm", compress="none")
    assert nbytes <= second.new_bytes <= 1.02 * nbytes
    repo.pull_file(second, tmp_path / "second.safetensors")
    assert filecmp.cmp(changed, tmp_path / "second.safetensors", shallow=False)
    repo.pull_file("minilm~1", tmp_path / "first.safetensors")
    assert filecmp.cmp(real_checkpoint, tmp_path / "first.safetensors", shallow=False)


def test_the_same_file_again_is_the_same_version(
    repo: ckpt.Repository, real_checkpoint: Path
) -> None:
    first = repo.push_file(real_checkpoint, "minilm")
    assert repo.push_file(real_checkpoint, "minilm") == first


def test_equal_weights_have_one_digest_from_a_file_and_from_python(
    repo: ckpt.Repository, real_checkpoint: Path
) -> None:
    pushed = repo.push_file(real_checkpoint, "file")
    again = repo.push(load_file(real_checkpoint), "python")
    assert again.digest == pushed.digest
    assert again.new_bytes == 0


def test_a_file_with_another_header_is_another_version(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    tensors = {"w": torch.ones(2, 2)}
    for number, metadata in enumerate([{"format": "pt"}, {"note": "new"}], start=1):
        path = tmp_path / f"{number}.safetensors"
        save_file(tensors, path, metadata=metadata)
        assert repo.push_file(path, "m").number == number
        repo.pull_file("m", tmp_path / "out.safetensors", force=True)
        assert filecmp.cmp(path, tmp_path / "out.safetensors", shallow=False)


def test_the_first_pack_opens_in_safetensors_and_in_transformers(
    repo: ckpt.Repository, real_checkpoint: Path
) -> None:
    repo.push_file(real_checkpoint, "minilm", compress="auto")
    (pack,) = repo.location.store.glob("packs/*/*.safetensors")
    weights = load_file(real_checkpoint)
    read = load_file(pack)
    assert set(read) == set(weights)
    assert all(torch.equal(read[name], weights[name]) for name in weights)

    config = BertConfig.from_json_file(real_checkpoint.parent / "config.json")
    # transformers reads a folder with a file of its own name for the weights.
    folder = pack.parent
    (folder / "model.safetensors").symlink_to(pack)
    config.save_pretrained(folder)
    model = BertModel.from_pretrained(folder, local_files_only=True)
    state = model.state_dict()
    shared = [name for name in weights if name in state]
    assert len(shared) > 90
    assert all(torch.equal(state[name], weights[name]) for name in shared)
