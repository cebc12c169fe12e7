"""A version leaves as a file of another program, and comes back as the version that it was."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_import import training_state
from torch.distributed.checkpoint.state_dict_loader import load as load_shards

import ckpt
from ckpt.cli import main as entry
from ckpt.core.effects import observed
from ckpt.core.errors import ConflictError, IntegrityError, SpaceError, StorageError, UsageError

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.usefixtures("one_unpickler"),
]


def again(repo: ckpt.Repository, path: Path) -> ckpt.Version:
    """The version that importing a file makes."""
    (done,) = repo.import_files(path, "again")
    assert done.version is not None
    return done.version


def test_a_pt_file_loads_with_weights_only_and_imports_as_the_same_version(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    version = repo.push(training_state(), "net")
    done = repo.export_file(version, tmp_path / "net.pt")
    assert (done.format, done.exact) == ("pt", True)
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert state["tied"][0] is state["tied"][1]
    assert state["views"][0].untyped_storage().data_ptr() == (
        state["views"][1].untyped_storage().data_ptr()
    )
    assert again(repo, tmp_path / "net.pt").digest == version.digest


def test_a_module_leaves_as_its_state_dict(repo: ckpt.Repository, tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    done = repo.export_file(repo.push(net, "net"), tmp_path / "net.pth")
    assert not done.exact
    state = torch.load(tmp_path / "net.pth", weights_only=True)
    assert all(torch.equal(state[name], value) for name, value in net.state_dict().items())
    assert state.keys() == net.state_dict().keys()


@pytest.mark.parametrize("value", [numpy.ones(2), range(3)])
def test_what_weights_only_would_refuse_is_not_exported(
    value: Any, repo: ckpt.Repository, tmp_path: Path
) -> None:
    repo.push({"w": torch.ones(2), "value": value}, "net")
    with pytest.raises(UsageError, match="cannot be carried by this format") as error:
        repo.export_file("net", tmp_path / "net.pt")
    assert error.value.code == "cannot-export"
    assert [path.name for path in tmp_path.iterdir()] == [".ckpt"]


def test_one_memory_of_two_dtypes_is_refused_by_torch_and_nothing_is_left(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    whole = torch.arange(4, dtype=torch.int32)
    repo.push({"whole": whole, "bytes": whole.view(torch.uint8)}, "net")
    with pytest.raises(UsageError, match=r"is nothing that torch\.save can write") as error:
        repo.export_file("net", tmp_path / "net.pt")
    assert error.value.code == "cannot-export"
    assert [path.name for path in tmp_path.iterdir()] == [".ckpt"]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1).expand(1 << 45),
        torch.sparse_coo_tensor(
            torch.tensor([[9]]), torch.ones(1), (1 << 45,), check_invariants=True
        ),
    ],
    ids=["repeated", "sparse"],
)
def test_what_is_too_large_to_be_written_out_is_told_and_nothing_is_left(
    repo: ckpt.Repository, tmp_path: Path, tensor: torch.Tensor
) -> None:
    repo.push({"large": tensor}, "net")
    with pytest.raises(SpaceError, match='there is no room for "large"') as error:
        repo.export_file("net", tmp_path / "net.safetensors")
    assert error.value.code == "no-memory"
    assert [path.name for path in tmp_path.iterdir()] == [".ckpt"]


@pytest.mark.parametrize(
    "state",
    [{"s": torch.eye(3).to_sparse()}, {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}],
)
def test_what_a_dcp_folder_cannot_hold_is_refused_and_nothing_is_left(
    repo: ckpt.Repository, tmp_path: Path, state: dict[str, Any]
) -> None:
    repo.push(state, "net")
    with pytest.raises(UsageError) as error:
        repo.export_file("net", tmp_path / "net", format="dcp")
    assert error.value.code == "cannot-export"
    assert [path.name for path in tmp_path.iterdir()] == [".ckpt"]


def test_a_file_that_does_not_read_back_as_it_is_gets_no_name(
    repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = repo.push({"w": torch.ones(2)}, "net")
    write = torch.save
    monkeypatch.setattr(torch, "save", lambda state, file: write({"w": torch.zeros(2)}, file))
    with pytest.raises(IntegrityError) as error:
        repo.export_file(version, tmp_path / "net.pt")
    assert error.value.code == "export-differs"
    assert [path.name for path in tmp_path.iterdir()] == [".ckpt"]


@pytest.mark.parametrize("form", ["pt", "dcp"])
def test_a_disk_that_takes_no_more_is_told_and_nothing_is_left(
    repo: ckpt.Repository, tmp_path: Path, form: Any
) -> None:
    version = repo.push({"w": torch.ones(1 << 20)}, "net")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(StorageError, match="File too large while writing") as error:
            repo.export_file(version, tmp_path / "out", format=form)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.code == "io"
    assert [path.name for path in tmp_path.iterdir()] == [".ckpt"]


@pytest.mark.parametrize("array", [numpy.array(["ab", "c"]), numpy.arange(3, dtype=">i4")])
def test_arrays_that_torch_lacks_lie_as_bytes_in_a_file_whatever_is_beside_them(
    repo: ckpt.Repository, tmp_path: Path, array: numpy.ndarray
) -> None:
    repo.push({"array": array}, "alone")
    repo.push({"array": array, "sparse": torch.eye(2).to_sparse()}, "beside")
    for name in ("alone", "beside"):
        repo.pull_file(name, tmp_path / f"{name}.safetensors")
    repo.pull_file("beside", tmp_path / "some.safetensors", tensors=["array", "sparse"])
    for name in ("alone", "beside", "some"):
        found = load_file(tmp_path / f"{name}.safetensors")["array"]
        assert bytes(found.tolist()) == array.tobytes()


def test_a_dcp_folder_loads_with_torch_and_imports_with_the_same_tensors(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    state = training_state()
    del state["sparse"]
    version = repo.push(state, "net")
    done = repo.export_file(version, tmp_path / "dcp", format="dcp")
    assert not done.exact
    into = {"model": {name: torch.zeros_like(t) for name, t in state["model"].items()}}
    load_shards(into, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(into["model"]["weight"], state["model"]["weight"])
    again(repo, tmp_path / "dcp")
    back = repo.pull("again")
    assert torch.equal(
        back["optimizer"]["state"]["0"]["exp_avg"], state["optimizer"]["state"][0]["exp_avg"]
    )
    assert back["step"] == 3
    assert torch.equal(back["half"], state["half"])


def test_a_nesting_that_dcp_carries_imports_as_the_same_version(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    state = {"model": {"a.w": torch.rand(3, 2), "b": torch.rand(2).half()}, "list": [torch.ones(2)]}
    version = repo.push(state, "net")
    assert repo.export_file(version, tmp_path / "dcp", format="dcp").exact
    assert again(repo, tmp_path / "dcp").digest == version.digest


def test_safetensors_leave_plain_and_a_folder_as_it_was(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    weights = {"a": torch.rand(3), "b": torch.rand(2, 2)}
    version = repo.push(weights, "net")
    assert repo.export_file(version, tmp_path / "net.safetensors").exact
    assert torch.equal(load_file(tmp_path / "net.safetensors")["b"], weights["b"])
    assert again(repo, tmp_path / "net.safetensors").digest == version.digest
    (tmp_path / "hf").mkdir()
    save_file(weights, tmp_path / "hf" / "model.safetensors")
    (tmp_path / "hf" / "config.json").write_text("{}")
    folder = repo.push_file(tmp_path / "hf", "bert")
    assert repo.export_file(folder, tmp_path / "out").exact
    names = ["config.json", "model.safetensors"]
    assert all(
        (tmp_path / "out" / n).read_bytes() == (tmp_path / "hf" / n).read_bytes() for n in names
    )
    assert again(repo, tmp_path / "out").digest == folder.digest


def test_plain_values_beside_the_tensors_are_told_not_to_be_in_safetensors(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    version = repo.push({"w": torch.rand(3), "step": 3}, "net")
    assert not repo.export_file(version, tmp_path / "net.safetensors").exact


def test_a_name_that_a_header_cannot_carry_takes_no_other_tensors_name(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    names = ["\x01", "tensor-0", "tensor-3", "\u200b"]
    repo.push({name: torch.full((2,), float(at)) for at, name in enumerate(names)}, "net")
    repo.pull_file("net", tmp_path / "net.safetensors")
    found = load_file(tmp_path / "net.safetensors")
    assert len(found) == len(names)
    assert (found["tensor-0"].tolist(), found["tensor-3"].tolist()) == ([1.0] * 2, [2.0] * 2)


def test_a_disk_without_links_gets_its_files_and_keeps_what_is_there(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    def hook(kind: str, act: Any, arguments: tuple[Any, ...]) -> Any:
        if kind == "link":
            if arguments[1].name == "taken.safetensors":
                arguments[1].write_text("mine")
            raise OSError(errno.EPERM, "Operation not permitted")
        return act(*arguments)

    (tmp_path / "hf").mkdir()
    save_file({"w": torch.ones(2)}, tmp_path / "hf" / "model.safetensors")
    folder, version = repo.push_file(tmp_path / "hf", "bert"), repo.push({"w": torch.ones(2)}, "a")
    with observed(hook):
        repo.pull_file(version, tmp_path / "net.safetensors")
        repo.export_file(version, tmp_path / "net.pt")
        repo.pull_file(folder, tmp_path / "again")
        with pytest.raises(ConflictError):
            repo.pull_file(version, tmp_path / "taken.safetensors")
    assert load_file(tmp_path / "net.safetensors")["w"].tolist() == [1.0, 1.0]
    assert torch.load(tmp_path / "net.pt", weights_only=True)["w"].tolist() == [1.0, 1.0]
    assert (tmp_path / "again" / "model.safetensors").is_file()
    assert (tmp_path / "taken.safetensors").read_text() == "mine"
    assert not list(tmp_path.glob(".ckpt-*"))


@pytest.mark.parametrize(("name", "form"), [("net.pt", "pt"), ("dcp", "dcp")])
def test_nothing_is_replaced_unasked(
    name: str, form: Any, repo: ckpt.Repository, tmp_path: Path
) -> None:
    version = repo.push({"w": torch.rand(3)}, "net")
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConflictError):
        repo.export_file(version, tmp_path / name, format=form)
    assert (tmp_path / name).read_text() == "mine"


def test_what_a_format_cannot_be_is_said(repo: ckpt.Repository, tmp_path: Path) -> None:
    version = repo.push({"w": torch.rand(3)}, "net")
    with pytest.raises(UsageError, match="--format safetensors"):
        repo.export_file(version, tmp_path / "x", format="hf")
    with pytest.raises(UsageError, match="does not say in which format"):
        repo.export_file(version, tmp_path / "x")
    with pytest.raises(UsageError, match="no dict with names"):
        repo.export_file(repo.push([torch.rand(2)], "list"), tmp_path / "x", format="dcp")


def run(capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, *arguments: str) -> Any:
    """The status, the lines of stdout, and stderr of a command."""
    patch.setattr("sys.argv", ["ckpt", *arguments])
    with pytest.raises(SystemExit) as stop:
        entry.main()
    said = capture.readouterr()
    return stop.value.code, said.out, said.err


def test_the_commands_print_references_and_paths_alone(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CKPT_REPO", str(tmp_path / "repo"))
    (tmp_path / "job").mkdir()
    for step in (20, 3):
        torch.save({"w": torch.full((2,), float(step))}, tmp_path / "job" / f"step_{step}.pt")
    status, out, err = run(capsys, monkeypatch, "import", "job", "net", "--dry-run")
    assert status == 0
    assert [line.split()[:2] for line in out.splitlines()[1:]] == [
        ["step_3.pt", "3"],
        ["step_20.pt", "20"],
    ]
    assert "would import 2 checkpoints" in err
    assert not (tmp_path / "repo").exists()
    status, out, _ = run(capsys, monkeypatch, "import", "job", "net:best")
    assert (status, out) == (0, "net@1\nnet@2\n")
    status, out, err = run(capsys, monkeypatch, "import", "job", "net")
    assert (status, out) == (0, "net@1\nnet@2\n")
    assert "was there already" in err
    status, out, _ = run(capsys, monkeypatch, "export", "net:best", "out.pt")
    assert (status, out) == (0, "out.pt\n")
    assert torch.load("out.pt", weights_only=True)["w"].tolist() == [20.0, 20.0]
    status, out, _ = run(capsys, monkeypatch, "export", "net", "one.safetensors", "--json")
    assert json.loads(out)["exact"] is True


def test_a_refused_checkpoint_fails_the_command_and_not_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("CKPT_REPO", str(tmp_path / "repo"))
    (tmp_path / "job").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "job" / "step_1.pt")
    torch.save({"w": numpy.ones(2)}, tmp_path / "job" / "step_2.pt")
    (tmp_path / "job" / "notes.txt").touch()
    job = str(tmp_path / "job")
    status, out, err = run(capsys, monkeypatch, "import", job, "net", "--json")
    found = {Path(one["path"]).name: one for one in json.loads(out)["checkpoints"]}
    assert found["step_1.pt"]["version"]["reference"] == "net@1"
    assert found["step_2.pt"]["refused"]["code"] == "pickle-refused"
    assert status == 1
    assert "error[import-incomplete]" in err
    status, _, err = run(capsys, monkeypatch, "import", f"{job}/step_2.pt", "net")
    assert status == 9
    assert "numpy" in err
    assert err.count("\n") == 1
