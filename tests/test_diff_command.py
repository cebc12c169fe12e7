"""``ckpt diff``: what it prints, where it fits, and the picture that it writes."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

import ckpt
from ckpt.cli import main as entry

FIXTURES = Path(__file__).parent / "fixtures"


class Shell:
    """Runs ``ckpt`` in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch) -> None:
        self.capture = capture
        self.patch = patch
        self.err = ""

    def __call__(self, *arguments: str, status: int = 0) -> str:
        self.patch.setattr(sys, "argv", ["ckpt", *arguments])
        self.capture.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry.main()
        out, self.err = self.capture.readouterr()
        assert (stop.value.code or 0) == status, self.err
        return out


@pytest.fixture
def shell(
    repo: ckpt.Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.chdir(repo.location.root)
    monkeypatch.setenv("CKPT_REPO", str(repo.location.root))
    monkeypatch.setattr("signal.signal", lambda *given: None)
    return Shell(capsys, monkeypatch)


@pytest.fixture
def states(repo: ckpt.Repository) -> None:
    """Two versions that differ in everything that is shown."""
    long = "a.very.long.name.of.some.module.that.nobody.would.ever.give.to.it"
    evil = "evil\x1b[31m\u202e<b>"

    def state(factor: float, ties: bool) -> dict[str, Any]:
        a, b, c = torch.arange(1.0, 5.0), torch.arange(1.0, 4.0), torch.ones(2)
        return {
            "x": {"w": a * factor, "b": b},
            "y": {"w": b.clone()},
            "z": {"v": c, "w": c if ties else c.clone()},
            long: {"w": a + factor},
            evil: {"w": c * factor},
            "lr": factor / 10,
        }

    before, after = state(1, ties=False), state(2, ties=True)
    before["old"], after["new"] = {"w": torch.ones(5)}, {"w": torch.ones(6)}
    repo.push(before, "m", step=1, metrics={"loss": 0.5})
    repo.push(after, "m", step=2, metrics={"loss": math.nan}, labels={"k": "\x1b[31m"})


VARYING = ("created_at", "push", "author", "digest", "new_bytes")


def without_chance(value: Any) -> Any:
    """Without what differs from push to push, or in the last bits between processors."""
    if isinstance(value, dict):
        return {key: without_chance(x) for key, x in value.items() if key not in VARYING}
    if isinstance(value, list):
        return [without_chance(item) for item in value]
    return round(value, 9) if isinstance(value, float) else value


@pytest.mark.usefixtures("states")
def test_the_json_is_stable(shell: Shell) -> None:
    shown = json.loads(shell("diff", "m@1", "m@2", "--stats", "--json"))
    golden = FIXTURES / "diff.json"
    assert without_chance(shown) == without_chance(json.loads(golden.read_text()))
    bare = json.loads(shell("diff", "m@1", "m@2", "--json"))
    assert bare.keys() == shown.keys()
    assert {one["statistics"] for one in bare["tensors"]} == {None}
    assert {one["relative"] for one in bare["layers"]} == {None}


@pytest.mark.usefixtures("states")
@pytest.mark.parametrize("options", [(), ("--stats",)])
def test_a_terminal_of_80_columns_shows_it_without_breaking_a_line(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    wide = shell("diff", "m@1", "m@2", *options)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    narrow = shell("diff", "m@1", "m@2", *options)
    assert max(map(len, narrow.splitlines())) <= 80
    assert len(narrow.splitlines()) == len(wide.splitlines())
    assert "a.very.long.name.of.some.module.that.nobody.would.ever.give.to.it.w" in wide
    assert "...." not in narrow
    for text in (wide, narrow):
        assert "\x1b" not in text
        assert "\u202e" not in text
        assert "~ lr: 0.1 -> 0.2" in text
        assert "+ z.w is z.v" in text
        assert "~ loss metric: 0.5 -> nan" in text


@pytest.mark.usefixtures("states")
def test_a_bar_says_how_much_of_a_layer_changed(shell: Shell, repo: ckpt.Repository) -> None:
    lines = shell("diff", "m@1", "m@2").splitlines()
    (x,) = (line for line in lines if line.startswith("x "))
    assert x.split() == ["x", "█" * math.ceil(24 * 16 / 28), "57", "%"]
    assert "and 2 layers whose bytes are the same" in lines
    measured = {layer.name: layer for layer in repo.diff("m@1", "m@2", stats=True).layers()}
    assert measured["x"].relative == 1.0
    assert measured["y"].relative == 0.0
    assert measured["new"].relative is None


def test_versions_of_the_same_content_need_one_line(shell: Shell, repo: ckpt.Repository) -> None:
    repo.push({"w": torch.ones(2)}, "m")
    repo.push({"w": torch.ones(2)}, "n")
    assert shell("diff", "m", "n") == "m@1 -> n@1\ntheir content is the same\n"


SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.usefixtures("states")
@pytest.mark.parametrize("options", [(), ("--stats",)])
def test_the_picture_is_well_formed_and_has_a_bar_per_layer(
    shell: Shell, repo: ckpt.Repository, tmp_path: Path, options: tuple[str, ...]
) -> None:
    path = tmp_path / "diff.svg"
    path.write_text("an older picture")
    shell("diff", "m@1", "m@2", "--output", str(path), *options)
    root = ElementTree.parse(path).getroot()
    assert root.tag == f"{SVG}svg"
    bars = [one for one in root.iter(f"{SVG}rect") if one.get("class") == "bar"]
    layers = repo.diff("m@1", "m@2").layers()
    assert len(bars) == len(layers) == 7
    texts = [one.text for one in root.iter(f"{SVG}text")]
    assert "layer" in texts
    assert any("m@1 and m@2" in (text or "") for text in texts)
    axis = "norm of the difference / norm before" if options else "share of the bytes that differ"
    assert axis in texts
    assert "evil\\x1b[31m\\u202e<b>" in texts
    assert "prefers-color-scheme: dark" in path.read_text()


@pytest.mark.usefixtures("states")
def test_a_picture_replaces_nothing_but_a_picture(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("weights")
    shell("diff", "m@1", "m@2", "--output", str(path), status=2)
    assert shell.err.startswith("error[output-invalid]: ")
    assert path.read_text() == "weights"
    shell("diff", "m@1", "m@2", "--output", str(tmp_path / "no" / "diff.svg"), status=3)
    assert "no-folder" in shell.err


@pytest.mark.usefixtures("states")
def test_failures_are_one_line_with_an_exit_code(shell: Shell) -> None:
    shell("diff", "m@1", "nobody", status=3)
    assert shell.err.startswith("error[model-missing]: ")
    assert shell.err.count("\n") == 1
    shell("diff", "m@1", status=2)
    assert shell.err.startswith("error[usage]: ")
