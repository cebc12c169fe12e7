"""What the commands print, and where: results on stdout, the rest on stderr."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.numpy import load_file, save_file

import ckpt
from ckpt.cli import main as entry
from ckpt.cli.main import COMMANDS
from ckpt.core.errors import AccessError

ROOT = Path(__file__).parents[1]


class Shell:
    """Runs commands in this process, in a folder of their own."""

    def __init__(self, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capture = capture
        self.err = ""

    def __call__(self, *arguments: str, status: int = 0) -> str:
        """Run ``ckpt`` and return its stdout; its stderr is in ``err``."""
        before = sys.argv
        sys.argv = ["ckpt", *arguments]
        try:
            with pytest.raises(SystemExit) as stop:
                entry.main()
        finally:
            sys.argv = before
        out, self.err = self.capture.readouterr()
        assert (stop.value.code or 0) == status, self.err
        return out

    def save(self, name: str, **tensors: float) -> None:
        arrays = {key: numpy.full(3, value, numpy.float32) for key, value in tensors.items()}
        save_file(arrays, self.folder / name)


@pytest.fixture
def shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CKPT_REPO", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("signal.signal", lambda *given: None)
    shell = Shell(tmp_path, capsys)
    shell.save("net.safetensors", w=1)
    return shell


def test_a_pushed_folder_is_pulled_beside_what_is_there(shell: Shell) -> None:
    (shell.folder / "net").mkdir()
    shell.save("net/model.safetensors", w=1)
    shell("push", "net", "bert")
    assert shell("pull", "bert") == "bert-1\n"
    shell("pull", "bert", status=5)  # by its usual name it would be the same folder
    assert shell("pull", "bert", "net") == "net/bert-1\n"
    shell("pull", "bert", "net", "--force", status=5)
    assert "not replaced" in shell.err
    assert (shell.folder / "net/model.safetensors").exists()


def test_what_is_not_done_is_not_told_as_done(shell: Shell) -> None:
    shell("push", "net.safetensors", "net")
    shell("push", "net.safetensors", "net", "-m", "a note")
    assert "nothing is added, and the message is not kept" in shell.err
    shell("copy", "net", "other")
    assert " new there" in shell.err
    shell("copy", "net", "other")
    assert "was there already, nothing is added" in shell.err
    shell.save("net.safetensors", w=2)
    shell("push", "net.safetensors", "net")
    shell("copy", "net", "other")
    assert " new there" in shell.err
    assert shell("copy", "net@1", "other") == "net@1\n"
    assert "net@1 was there already, nothing is added" in shell.err


def test_push_prints_only_the_reference_on_stdout(shell: Shell) -> None:
    shell("init")
    assert shell("push", "net.safetensors", "net") == "net@1\n"
    assert str(shell.folder / ".ckpt") in shell.err
    assert shell("push", "-q", "net.safetensors", "net") == "net@1\n"
    assert shell.err == ""


def test_installing_and_pushing_is_enough_to_begin(shell: Shell) -> None:
    assert shell("push", "net.safetensors", "net") == "net@1\n"
    assert (shell.folder / "home" / "ckpt" / "repository" / "config.toml").is_file()


def test_only_push_and_init_make_a_repository(shell: Shell) -> None:
    for arguments in (["ls"], ["log", "net"], ["show", "net"], ["pull", "net"], ["rm", "net"]):
        shell(*arguments, status=3)
        assert "no-repository" in shell.err
    assert not (shell.folder / "home").exists()
    assert not (shell.folder / ".ckpt").exists()


@pytest.mark.parametrize(
    ("path", "model", "status"),
    [
        ("no.safetensors", "net", 3),
        ("net.pt", "net", 9),
        ("bare", "net", 2),
        ("net.safetensors", "", 2),
    ],
)
def test_a_push_that_is_refused_makes_no_repository(
    shell: Shell, path: str, model: str, status: int
) -> None:
    (shell.folder / "bare").mkdir()
    shell("push", path, model, status=status)
    assert not (shell.folder / "home").exists()


def test_the_nearest_repository_upwards_is_used(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("init")
    below = shell.folder / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    shell("push", "../../net.safetensors", "net")
    assert "net@1" in shell("ls")
    assert "net@1" in shell("-r", str(shell.folder), "ls")
    assert "net@1" in shell("ls", "--repo", str(shell.folder / ".ckpt"))
    monkeypatch.setenv("CKPT_REPO", str(shell.folder / "other"))
    shell("ls", status=3)


def test_pull_writes_a_name_of_its_own_or_the_given_one(shell: Shell) -> None:
    shell("init")
    shell("push", "net.safetensors", "vision/net")
    assert shell("pull", "vision/net") == "vision-net-1.safetensors\n"
    (shell.folder / "out").mkdir()
    assert shell("pull", "vision/net", "out") == "out/vision-net-1.safetensors\n"
    shell("pull", "vision/net", "out", status=5)
    shell("pull", "vision/net", "out", "--force")
    same = (shell.folder / "net.safetensors").read_bytes()
    assert (shell.folder / "out" / "vision-net-1.safetensors").read_bytes() == same


def test_every_command_speaks_json(shell: Shell) -> None:
    assert json.loads(shell("init", "--json"))["created"] is True
    pushed = json.loads(
        shell("push", "net.safetensors", "net:best", "--metric", "loss=nan", "--json")
    )
    assert pushed["reference"] == "net@1"
    assert pushed["metrics"] == {"loss": "nan"}
    assert json.loads(shell("ls", "--json"))[0]["newest"] == pushed
    assert json.loads(shell("log", "net", "--json")) == [pushed]
    shown = json.loads(shell("show", "net", "--json"))
    assert {key: shown[key] for key in pushed} == pushed
    assert shown["tensors"][0]["name"] == "w"
    assert json.loads(shell("inspect", "net", "--json")) == shown
    assert json.loads(shell("pull", "net", "--json"))["path"] == "net-1.safetensors"
    assert json.loads(shell("tag", "net", "new", "--json"))["aliases"] == ["best", "new"]
    assert json.loads(shell("label", "net", "a=b", "--json"))["labels"] == {"a": "b"}
    assert json.loads(shell("untag", "net:new", "--json"))["aliases"] == ["best"]
    shell("untag", "net:best")
    assert json.loads(shell("rm", "net", "--yes", "--json"))["removed"] is True
    assert json.loads(shell("db", "upgrade", "--json"))["registry"].endswith("registry.db")
    assert "ckpt" in json.loads(shell("completion", "bash", "--json"))["script"]


def test_log_shows_what_was_said_newest_first(shell: Shell) -> None:
    shell("init")
    for step in range(3):
        shell.save("net.safetensors", w=step)
        shell("push", "net.safetensors", "net", "--step", str(step), "--metric", f"loss={step / 2}",
              "-m", f"step {step}")  # fmt: skip
    lines = shell("log", "net").splitlines()
    assert [line.split()[0] for line in lines] == ["VERSION", "net@3", "net@2", "net@1"]
    assert "loss=0.5" in lines[2]
    assert "step 1" in lines[2]
    assert shell("log", "net", "-n", "1", "--before", "3").splitlines()[1].startswith("net@2")


def test_rm_asks_and_dry_run_removes_nothing(shell: Shell) -> None:
    shell("init")
    shell("push", "net.safetensors", "net")
    shell("rm", "net", "-n")
    assert "would remove net@1" in shell.err
    shell("rm", "net", status=2)
    assert "add --yes" in shell.err
    assert "net@1" in shell("ls")
    shell("rm", "net", "-y")
    shell("show", "net@1", status=3)


def test_of_several_versions_none_is_removed_while_one_is_kept(shell: Shell) -> None:
    shell("init")
    for value in range(3):
        shell.save("net.safetensors", w=value)
        shell("push", "net.safetensors", "net")
    shell("tag", "net@2", "best")
    for more in (["-y"], ["-n"], ["-y", "--json"]):
        shell("rm", *more, "net@1", "net@2", status=5)
        assert "error[aliased]: net@2 is kept by the alias net:best" in shell.err
        shell("rm", *more, "net@1", "net@9", status=3)
    assert len(shell("log", "net").splitlines()) == 4
    shell("untag", "net:best")
    shell("rm", "-y", "net@1", "net@2", "net@1")
    assert "removed net@1 net@2" in shell.err


def test_what_was_removed_before_another_failed_is_told(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("init")
    for value in range(2):
        shell.save("net.safetensors", w=value)
        shell("push", "net.safetensors", "net")
    remove = ckpt.Repository.rm

    def late(repo: ckpt.Repository, ref: ckpt.Version, *, dry_run: bool = False) -> ckpt.Version:
        if not dry_run and ref.number == 2:
            repo.tag(ref, "late")
        return remove(repo, ref, dry_run=dry_run)

    monkeypatch.setattr(ckpt.Repository, "rm", late)
    shell("rm", "-y", "net@1", "net@2", status=5)
    assert "net@2 is kept by the alias net:late" in shell.err
    assert "(removed before that: net@1)" in shell.err


def test_what_cannot_be_marked_is_told_with_what_is_wrong(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("init")
    shell("push", "net.safetensors", "net")
    (pack,) = shell.folder.glob(".ckpt/store/packs/*/*")
    pack.unlink()

    def refuse(*_: object) -> None:
        raise AccessError("permission", "not permitted to write the registry", hint="see its mode")

    monkeypatch.setattr("ckpt.registry.engine.Database.write", refuse)
    assert f"broken pack {pack.stem}: it is missing" in shell("fsck", status=4)
    assert "error[damaged]: damaged: net@1; push the same content again" in shell.err
    assert "(nothing could be marked: not permitted to write the registry)" in shell.err
    assert json.loads(shell("fsck", "--json", status=4))["unmarked"] is not None


class Terminal(io.StringIO):
    """What a person types."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    "arguments", [["rm", "net"], ["prune", "net", "--keep-last", "1"], ["registry", "rebuild"]]
)
def test_a_no_is_an_answer_and_no_interruption(
    shell: Shell, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shell("init")
    for value in range(2):
        shell.save("net.safetensors", w=value)
        shell("push", "net.safetensors", "net")
    monkeypatch.setattr("sys.stdin", Terminal("n\n"))
    shell(*arguments, status=1)
    assert "error[declined]: you said no; nothing was changed\n" in shell.err
    assert len(shell("log", "net").splitlines()) == 3
    monkeypatch.setattr("sys.stdin", Terminal(""))
    shell(*arguments, status=130)
    assert "error[interrupted]" in shell.err
    monkeypatch.setattr("sys.stdin", Terminal("y\n"))
    shell(*arguments)


def test_hostile_text_is_shown_escaped(shell: Shell) -> None:
    shell("init")
    evil = "<script>\x1b[31m\u202e"
    shell("push", "net.safetensors", "net", "-m", evil, "--label", f"k={evil}")
    for arguments in (["log", "net"], ["show", "net"]):
        out = shell(*arguments)
        assert "<script>" in out
        assert "\x1b" not in out
        assert "\u202e" not in out
    assert json.loads(shell("show", "net", "--json"))["message"] == evil


def test_a_state_from_python_comes_out_as_a_file(shell: Shell) -> None:
    base = torch.arange(12.0)
    with ckpt.open(shell.folder) as repo:
        state = {
            "net": {"w": base.reshape(3, 4), "view": base[2:5], "t": torch.ones(2, 3).t()},
            "wide": torch.ones(1).expand(4),
            "sparse": torch.eye(2).to_sparse(),
            "low": torch.ones(2, dtype=torch.float8_e8m0fnu),
            "step": 3,
        }
        repo.push(state, "state")
    shell("pull", "state", "out.safetensors")
    assert "1 plain value;" in shell.err
    read = load_file(shell.folder / "out.safetensors")
    assert set(read) == {"net.w", "net.view", "net.t", "wide", "sparse", "low"}
    assert read["net.view"].tolist() == [2, 3, 4]
    assert read["wide"].tolist() == [1, 1, 1, 1]
    assert read["sparse"].tolist() == [[1, 0], [0, 1]]
    assert read["low"].shape == (2, 1)


def test_a_bug_is_one_line_and_exit_70(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object, **more: object) -> None:
        raise ValueError("surprise")

    monkeypatch.setattr("ckpt.service.opening.open_repository", broken)
    shell("ls", status=70)
    assert shell.err.startswith("error[bug]: ValueError: surprise")
    assert "Traceback" not in shell.err
    shell("ls", "--debug", status=70)
    assert "Traceback" in shell.err


def test_each_step_is_told_when_asked(shell: Shell) -> None:
    def steps(*arguments: str) -> list[str]:
        done = subprocess.run(
            [Path(sys.executable).with_name("ckpt"), *arguments],
            cwd=shell.folder,
            capture_output=True,
            text=True,
            check=True,
        )
        return [text for line in done.stderr.splitlines() if (text := line.partition(" s  ")[2])]

    assert steps("push", "net.safetensors", "net") == []
    shell.save("net.safetensors", w=2)
    told = steps("-v", "push", "net.safetensors", "net")
    assert [line.split()[0] for line in told] == ["repository:", "wrote", "committed", "wrote"]
    assert "packs/" in told[1]
    assert "documents/" in told[3]
    assert "1 raw and 0 encoded chunks, 12 bytes" in steps("pull", "net", "-qv")[1]
    steps("rm", "-y", "net@1")
    assert [line.split()[0] for line in steps("gc", "--grace", "0", "-v")].count("deleted") == 2
    assert "nothing is wrong" in steps("fsck", "--verbose")[1]


def test_every_command_has_help_and_is_documented() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for name in COMMANDS:
        assert f"## ckpt {name}\n" in page or f"`{name}`" in page


def test_the_installed_command_runs(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("ckpt")
    environment = {**os.environ, "CKPT_REPO": str(tmp_path)}
    shown = subprocess.run(
        [program, "ls"], env=environment, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 3
    assert shown.stderr.startswith("error[no-repository]: there is no repository at ")
