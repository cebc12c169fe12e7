"""The house: one link per layer, nothing heavy loaded where it is not needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import save_file

import ckpt

ROOT = Path(__file__).parents[1]
LAYERS = {"core", "storage", "training", "registry", "loader", "service", "cli", "migrations"}


def test_every_layer_has_its_relative_link() -> None:
    folders = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert folders == LAYERS
    for layer in LAYERS:
        link = ROOT / "src" / "ckpt" / layer
        assert link.is_symlink()
        assert str(link.readlink()) == f"../../{layer}"


def test_every_file_says_its_job_in_its_first_line() -> None:
    for layer in LAYERS:
        for file in (ROOT / layer).rglob("*.py"):
            assert file.read_text().startswith('"""'), file


def loaded_by(code: str, folder: Path) -> set[str]:
    """The top-level modules that a fresh interpreter has loaded after ``code``."""
    shown = f"{code}\nimport sys\nprint('LOADED', *sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", shown], cwd=folder, capture_output=True, text=True, check=True
    )
    line = next(line for line in result.stdout.splitlines() if line.startswith("LOADED"))
    return {name.partition(".")[0] for name in line.split()[1:]}


def command(*arguments: str) -> str:
    return (
        "import sys\nfrom ckpt.cli.main import main\n"
        f"sys.argv = ['ckpt', {', '.join(map(repr, arguments))}]\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code"
    )


def test_importing_ckpt_loads_nothing_heavy(tmp_path: Path) -> None:
    loaded = loaded_by("import ckpt", tmp_path)
    assert not loaded & {"torch", "boto3", "sqlalchemy", "numpy", "click", "msgspec"}


def test_the_frameworks_are_imported_by_their_own_callbacks_alone(tmp_path: Path) -> None:
    names = [path.stem for path in (ROOT / "training").glob("*.py")]
    others = {name for name in names if name not in ("__init__", "lightning", "huggingface")}
    frameworks = {"lightning", "pytorch_lightning", "transformers", "accelerate", "torchdata"}
    code = "import ckpt\nfor name in ckpt.__all__:\n    getattr(ckpt, name)\n"
    code += "".join(f"import ckpt.training.{name}\n" for name in sorted(others))
    assert not loaded_by(code, tmp_path) & frameworks


def test_help_loads_neither_torch_nor_boto3_nor_the_database(tmp_path: Path) -> None:
    loaded = loaded_by(command("--help"), tmp_path)
    assert not loaded & {"torch", "boto3", "sqlalchemy", "numpy", "rich", "alembic"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a repository in which one model lies, and a file."""
    import numpy

    save_file({"w": numpy.ones((3, 4), numpy.float32)}, tmp_path / "w.safetensors")
    with ckpt.open(tmp_path) as repo:
        repo.push_file(tmp_path / "w.safetensors", "net", metrics={"loss": 0.5})
    return tmp_path


def test_ls_loads_neither_torch_nor_boto3(folder: Path) -> None:
    plot = ["log", "net", "--plot", "loss", "--output", "loss.svg"]
    for arguments in (["ls"], ["log", "net"], plot, ["show", "net"], ["diff", "net", "net"]):
        loaded = loaded_by(command(*arguments), folder)
        assert not loaded & {"torch", "boto3", "numpy", "rich", "alembic"}


def test_pushing_and_pulling_a_safetensors_file_loads_no_torch(folder: Path) -> None:
    push, pull = ["push", "w.safetensors", "other"], ["pull", "net", "out.safetensors"]
    for arguments in (push, pull, ["pull", "net", "some.safetensors", "--tensors", "w*"]):
        loaded = loaded_by(command(*arguments), folder)
        assert not loaded & {"torch", "boto3", "numpy", "rich", "alembic", "safetensors"}


def test_the_public_names_are_all_there() -> None:
    for name in ckpt.__all__:
        assert getattr(ckpt, name) is not None
    assert set(dir(ckpt)) == set(ckpt.__all__)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = ckpt.no_such_name
