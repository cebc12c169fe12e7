"""Folders with weights, such as Hugging Face's, pushed and pulled again byte for byte."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from safetensors.torch import save_file

import ckpt
from ckpt.core.documents import File
from ckpt.core.errors import CkptError, ConflictError, IntegrityError, UsageError
from ckpt.service.folder import check_name, open_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sharded checkpoint with its index, configuration and tokenizer, as links into a cache."""
    made, cache = tmp_path / "net", tmp_path / "cache"
    (made / "onnx").mkdir(parents=True)
    cache.mkdir()
    torch.manual_seed(0)
    shards = {
        "model-00001-of-00002.safetensors": {"a.weight": torch.rand(4, 3), "a.bias": torch.ones(4)},
        "model-00002-of-00002.safetensors": {"b.weight": torch.rand(2, 4).half()},
    }
    index = {name: file for file, tensors in shards.items() for name in tensors}
    for file, tensors in shards.items():
        save_file(tensors, cache / file, metadata={"format": "pt"})
        (made / file).symlink_to(cache / file)
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (made / "config.json").write_text('{"model_type": "bert"}')
    (made / "tokenizer.model").write_bytes(bytes(range(256)))
    (made / "empty.txt").touch()
    (made / "onnx" / "read me.md").write_text("nested")
    (made / ".cache").mkdir()
    (made / ".cache" / "download").touch()
    return made


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those of hidden folders."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_a_folder_comes_back_byte_for_byte(
    repo: ckpt.Repository, folder: Path, tmp_path: Path
) -> None:
    version = repo.push_file(folder, "bert")
    assert version.state == "files"
    repo.pull_file("bert", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert not list(tmp_path.glob(".ckpt-*"))


def test_its_state_is_the_weights_of_all_shards(repo: ckpt.Repository, folder: Path) -> None:
    repo.push_file(folder, "bert")
    state = repo.pull("bert")
    assert sorted(state) == ["a.bias", "a.weight", "b.weight"]
    assert state["b.weight"].dtype == torch.float16
    assert list(repo.pull("bert", tensors="b.*")) == ["b.weight"]


def test_a_second_push_stores_only_what_changed(repo: ckpt.Repository, folder: Path) -> None:
    first = repo.push_file(folder, "bert")
    assert repo.push_file(folder, "bert").push == first.push
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    assert repo.push_file(folder, "bert").number == first.number + 1
    packs = sorted(repo.location.store.glob("packs/*/*"), key=lambda path: path.stat().st_mtime)
    assert packs[-1].stat().st_size < 8192


def test_only_what_the_repository_keeps_may_not_lie_in_it(folder: Path) -> None:
    outside, hidden = folder.parent / "store", folder / ".ckpt" / "store"
    with open_folder(folder, [outside, hidden]) as opened:
        assert "config.json" in opened.files
    with pytest.raises(UsageError, match="holds the repository"), open_folder(folder, [folder]):
        pass


def test_tensors_of_one_name_in_two_files_are_both_kept(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    made = tmp_path / "net"
    made.mkdir()
    save_file({"w": torch.ones(2)}, made / "model.safetensors")
    save_file({"w": torch.zeros(3)}, made / "adapter.safetensors")
    repo.push_file(made, "net")
    assert {name: len(w) for name, w in repo.pull("net").items()} == {"w": 3, "w~2": 2}
    repo.pull_file("net", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made)


def test_a_folder_of_more_files_than_may_be_open_comes_back(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    made = tmp_path / "net"
    made.mkdir()
    for number in range(300):
        (made / f"{number}.json").write_text(str(number))
    save_file({"w": torch.ones(2)}, made / "model.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Beside those that this process has open anyway.
    most = max(map(int, os.listdir("/dev/fd"))) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    seen: list[tuple[int, int]] = []
    try:
        version = repo.push_file(made, "net")
        repo.pull_file("net", tmp_path / "again", progress=lambda *done: seen.append(done))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert contents(tmp_path / "again") == contents(made)
    assert seen == sorted(seen)
    assert seen[-1] == (version.nbytes, version.nbytes)


@pytest.mark.parametrize("act", ["written", "replaced"])
def test_a_file_that_changes_while_its_folder_is_pushed_is_told(
    act: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ckpt.service.folder._OPEN_FILES", 1)
    with open_folder(folder, []) as opened:
        opened.check_unchanged()
        changed, new = folder / "tokenizer.model", folder / "new"
        if act == "written":
            changed.write_bytes(bytes(255))
        else:
            shutil.copy2(changed, new)  # of the same size and time
            new.rename(changed)
        source = next(one for one in opened.sources if one.name == "tokenizer.model")
        for read in (opened.check_unchanged, lambda: source.read(0, 1)):
            with pytest.raises(ConflictError) as caught:
                read()
            assert caught.value.code == "file-changed"


def test_a_made_name_is_not_given_twice(repo: ckpt.Repository, tmp_path: Path) -> None:
    made = tmp_path / "net"
    made.mkdir()
    save_file({"a": torch.ones(1)}, made / "1.safetensors")
    save_file({"a": torch.ones(2), "a~2": torch.ones(3)}, made / "2.safetensors")
    repo.push_file(made, "net")
    back = repo.pull("net")
    assert {name: len(a) for name, a in back.items()} == {"a": 1, "a~2": 2, "a~2~2": 3}
    repo.pull_file("net", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(made)


def test_a_folder_is_not_pulled_over_another(
    repo: ckpt.Repository, folder: Path, tmp_path: Path
) -> None:
    repo.push_file(folder, "bert")
    (tmp_path / "again").mkdir()
    with pytest.raises(ConflictError) as caught:
        repo.pull_file("bert", tmp_path / "again", force=True)
    assert caught.value.code == "exists"


def test_what_is_no_folder_of_weights_is_refused(
    repo: ckpt.Repository, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(UsageError, match=r"no \.safetensors file"):
        repo.push_file(tmp_path / "bare", "net")
    shutil.copytree(repo.location.root, folder / "repository")
    inside = ckpt.open(folder / "repository")
    with inside, pytest.raises(UsageError, match="holds the repository"):
        inside.push_file(folder, "net")
    shutil.rmtree(folder / "repository")
    (folder / "linked").symlink_to(tmp_path / "bare")
    with pytest.raises(UsageError, match="is a link to a folder"):
        repo.push_file(folder, "net")
    (folder / "linked").unlink()
    (folder / "broken.safetensors").write_bytes(b"12345678{")
    with pytest.raises(IntegrityError, match=r"broken\.safetensors"):
        repo.push_file(folder, "net")
    assert repo.models() == []


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a//b", "", "a/.", "a\\b"])
def test_a_hostile_name_is_never_written_to(
    repo: ckpt.Repository,
    folder: Path,
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(UsageError):
        check_name(name)
    repo.push_file(folder, "bert")
    document = repo.document("bert")
    hostile = replace(document, files={name: File(tensors=(0,))})
    monkeypatch.setattr(repo._registry.queries, "document", lambda version: hostile)
    with pytest.raises(CkptError):
        repo.pull_file("bert", tmp_path / "again")
    assert not (tmp_path / "again").exists()
    assert not (tmp_path / "x").exists()


def test_a_file_that_contradicts_its_header_is_refused(
    repo: ckpt.Repository, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push_file(folder, "bert")
    document = repo.document("bert")
    first = next(file for file in document.files.values() if file.header)
    for tensors in ((0,), (9999, 1), ()):
        hostile = replace(document, files={"model.safetensors": replace(first, tensors=tensors)})
        monkeypatch.setattr(repo._registry.queries, "document", lambda version, h=hostile: h)
        with pytest.raises(IntegrityError):
            repo.pull_file("bert", tmp_path / "again")
        assert not list(tmp_path.glob(".ckpt-*"))


def test_the_command_line_pushes_and_pulls_folders(folder: Path, tmp_path: Path) -> None:
    program = str(Path(sys.executable).with_name("ckpt"))

    def run(*arguments: str) -> str:
        command = [program, "-r", str(tmp_path / "repo"), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        return result.stdout

    assert run("push", str(folder), "bert") == "bert@1\n"
    assert run("pull", "bert") == "bert-1\n"
    assert contents(tmp_path / "bert-1") == contents(folder)
    assert "config.json" in run("show", "bert")
