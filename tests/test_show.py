"""What a person sees of a module: its tree, its classes, its proof; nothing of it is imported."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from chapter_models import MLP, cases
from torch import nn
from torch.nn.utils import parametrizations

import ckpt
from ckpt.cli.command import Settings
from ckpt.cli.main import ckpt as program
from ckpt.core.errors import UsageError

PROGRAM = Path(sys.executable).with_name("ckpt")
HERE = Path(__file__).parent

TREES: dict[str, Any] = {
    **{f"case {name}": (lambda net=net: net) for name, (net, _) in cases().items()},
    "recurrent": lambda: nn.LSTM(4, 4, 2, bidirectional=True),
    "transformer": lambda: nn.TransformerEncoderLayer(4, 2, 8),
    "convolution": lambda: nn.Conv2d(1, 2, 3, padding=1, stride=2, padding_mode="reflect"),
    "normalised": lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
    "parameters": lambda: nn.ParameterList([nn.Parameter(torch.ones(2, 3))]),
    "named": lambda: nn.ParameterDict({"a b": nn.Parameter(torch.ones(2))}),
    "settings": lambda: nn.Sequential(nn.GELU("tanh"), nn.Upsample(scale_factor=2.0), nn.PReLU(3)),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(4), nn.BatchNorm2d(3)),
    "repeated": lambda: nn.Sequential(*(nn.Linear(2, 2) for _ in range(4))),
}


@pytest.mark.usefixtures("proven_here")
@pytest.mark.parametrize("name", TREES)
def test_the_tree_is_what_print_gives(repo: ckpt.Repository, name: str) -> None:
    net = TREES[name]()
    repo.push(net, "m")
    shown = repo.describe("m").tree.splitlines()
    wanted = repr(net).splitlines()
    if name.startswith("case "):  # settings of the user's own classes would need their code
        assert len(shown) == len(wanted)
        assert [line.partition("(")[0] for line in shown] == [
            line.partition("(")[0] for line in wanted
        ]
    else:
        assert shown == wanted


def test_only_a_module_has_a_tree(repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(1)}, "m")
    with pytest.raises(UsageError, match="is no module"):
        repo.describe("m")


@pytest.fixture
def drifting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's that is edited between two pushes."""
    source = tmp_path / "edited.py"
    source.write_text("from torch import nn\nclass Net(nn.Linear):\n    note = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return source


@pytest.mark.usefixtures("proven_here")
def test_classes_are_listed_with_their_versions_and_changes(
    repo: ckpt.Repository, drifting: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(4):
        if number == 2:
            drifting.write_text(drifting.read_text().replace("1", "22"))
            monkeypatch.delitem(sys.modules, "edited")
        import edited  # type: ignore[import-not-found]

        torch.manual_seed(number)
        repo.push(edited.Net(2, 2), "net")
    repo.push(MLP(), "mlp")
    first, second = (one for one in repo.classes() if one.reference == "edited:Net")
    assert first.versions == ("net@1", "net@2")
    assert second.versions == ("net@3", "net@4")
    assert first.source_digest != second.source_digest
    assert {one.reference for one in repo.classes("mlp")} == {
        "chapter_models:MLP",
        "torch.nn.modules.linear:Linear",
    }
    listed = run(repo, "ls", "--classes").splitlines()
    assert [line.split() for line in listed if "edited" in line] == [
        ["edited:Net", "edited", (first.source_digest or "")[:8], "net@1-2"],
        ["edited:Net", "edited", f"{(second.source_digest or '')[:8]},", "changed", "net@3-4"],
    ]
    assert json.loads(run(repo, "ls", "--classes", "--json"))[0]["versions"] == ["mlp@1"]


def test_a_version_that_is_removed_leaves_the_list(repo: ckpt.Repository) -> None:
    repo.push(nn.ReLU(), "m")
    repo.rm("m@1")
    assert repo.classes() == []


def run(repo: ckpt.Repository, *arguments: str) -> str:
    """What a command prints; in this process, since torch takes two seconds to be imported."""
    printed = io.StringIO()
    command = ["-r", str(repo.location.root), *arguments]
    with (
        redirect_stdout(printed),
        program.make_context("ckpt", command, obj=Settings()) as context,
    ):
        program.invoke(context)
    return printed.getvalue()


def test_show_imports_nothing_and_tells_what_changed(repo: ckpt.Repository, tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    source = tmp_path / "noting.py"
    source.write_text(f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n")
    source.write_text(source.read_text() + "from torch import nn\nclass Net(nn.Linear): pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import noting  # type: ignore[import-not-found]

        repo.push(nn.Sequential(noting.Net(2, 2)), "m", inputs=(torch.ones(2, 2),))
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("noting", None)
    marker.unlink()
    shown = run(repo, "show", "m", "--path", str(tmp_path))
    assert "Sequential(\n  (0): Net()\n)" in shown
    assert "\nproof       fresh\n" in shown
    assert "changed since" not in shown
    source.write_text(source.read_text().replace("pass", "note = 1"))
    shown = run(repo, "show", "m", "--path", str(tmp_path))
    assert "the source of noting:Net changed since the push" in shown
    needed = run(repo, "show", "m", "--trust")
    assert [line.split()[:2] for line in needed.splitlines()[1:]] == [
        ["noting:Net", "yes"],
        ["torch.nn.modules.container:Sequential", "no"],
    ]
    told = json.loads(run(repo, "show", "m", "--trust", "--json"))
    assert [one["allowed"] for one in told] == [False, True]
    assert json.loads(run(repo, "show", "m", "--json"))["module"]["tree"].startswith("Sequential(")
    assert not marker.exists()


def test_names_with_spaces_are_shown(repo: ckpt.Repository) -> None:
    repo.push(cases()["f"][0], "f")
    shown = run(repo, "show", "f")
    assert "(block 3): Sequential(" in shown
    assert "0.block 3.2.bias" in shown


def test_the_command_line_prints_the_comparison(repo: ckpt.Repository) -> None:
    """The chapter's ending: save, clone, compare."""
    repo.push(MLP(), "mlp", inputs=(torch.rand(2, 20),))
    assert repo.verify("mlp", trust=[MLP]).verdict == "outputs-exact"
    command = [str(PROGRAM), "-r", str(repo.location.root), "verify", "mlp", "--path", str(HERE)]
    command += ["--trust", "chapter_models", "--require", "outputs-exact"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == "mlp@1: outputs-exact\n"
    assert found.stderr.splitlines()[1].split() == [
        *("output", "float32", "2x10", "none,", "bit", "for", "bit"),
    ]
    told = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True).stdout)
    assert told["outputs"][0]["equal"] is True
