"""What a person at a terminal is told: names that complete, columns that align, what to do next."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.numpy import save_file

import ckpt
from ckpt.cli.render import table

PROGRAM = str(Path(sys.executable).with_name("ckpt"))


class Terminal:
    """Runs the program itself, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.err = ""

    def __call__(self, *arguments: str, status: int = 0, **variables: str) -> str:
        """Run ``ckpt`` and return its stdout; its stderr is in ``err``."""
        own = {"XDG_DATA_HOME": str(self.folder / "home"), **variables}
        environment = {key: value for key, value in os.environ.items() if key != "CKPT_REPO"}
        done = subprocess.run(
            [PROGRAM, *arguments],
            cwd=self.folder,
            env={**environment, **own},
            capture_output=True,
            text=True,
            check=False,
        )
        self.err = done.stderr
        assert done.returncode == status, done.stderr
        return done.stdout

    def completed(self, line: str) -> list[str]:
        """What a shell offers after ``line``, each with its kind before it."""
        place = str(len(line.split()) - 1)
        return self(_CKPT_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=place).split()


@pytest.fixture
def terminal(tmp_path: Path) -> Terminal:
    with ckpt.open(tmp_path) as repo:
        repo.push({"w": torch.ones(3)}, "net", metrics={"loss": 1.0})
        repo.push({"w": torch.zeros(3)}, "nets/other")
    return Terminal(tmp_path)


def test_models_and_files_are_completed(terminal: Terminal) -> None:
    assert terminal.completed("ckpt pull net") == ["plain,net", "plain,nets/other"]
    assert terminal.completed("ckpt log nets") == ["plain,nets/other"]
    assert terminal.completed("ckpt push mo") == ["file,mo"]
    assert terminal.completed("ckpt -r elsewhere pull net") == []


def test_a_command_that_is_nearly_one_is_suggested(terminal: Terminal) -> None:
    terminal("pus", status=2)
    assert "Did you mean 'push'? See `ckpt --help`\n" in terminal.err
    terminal("fly", status=2)
    assert terminal.err == "error[usage]: No such command 'fly'; see `ckpt --help`\n"


def test_columns_align_whatever_the_width_of_a_character() -> None:
    lines = table(["NAME", "SIZE"], [["模型", "1 B"], ["e\u0301a", "2 B"], ["plain", "3 B"]])
    assert lines.splitlines() == ["NAME   SIZE", "模型   1 B", "e\u0301a     2 B", "plain  3 B"]


def test_an_export_names_what_it_leaves_out_in_one_line(terminal: Terminal) -> None:
    net = torch.nn.Linear(3, 2)
    net.scale = torch.ones(2)  # no buffer: a state_dict has it not
    with ckpt.open(terminal.folder) as repo:
        repo.push(net, "module")
        repo.push({"w": torch.ones(2), "epoch": 3}, "values")
    terminal("export", "module", "module.pt")
    warned, told, way = terminal.err.splitlines()
    assert warned.startswith("warning: ")
    assert "scale" in warned
    assert told.endswith("every tensor in it bit for bit")
    assert way == "the module itself comes by load, from Python"
    terminal("export", "module", "quiet.pt", "-q")
    assert not terminal.err
    terminal("export", "values", "values.safetensors")
    assert "not in it: 1 plain value, which a .pt file would have" in terminal.err


def test_what_is_not_listed_is_told(terminal: Terminal) -> None:
    with ckpt.open(terminal.folder) as repo:
        for step in range(21):
            repo.push({"w": torch.ones(3)}, "long", step=step)
    assert len(terminal("log", "long").splitlines()) == 21
    assert terminal.err == "older ones: ckpt log long --before 2\n"
    terminal("log", "long", "--before", "2")
    assert "older" not in terminal.err
    terminal("log", "long", "--before", "1")
    assert "long has no versions below 1" in terminal.err


def test_only_what_is_there_is_removed_from_a_version(terminal: Terminal) -> None:
    terminal("label", "net", "--remove", "lss", status=3)
    assert terminal.err.startswith('error[label-missing]: net@1 has no label or metric "lss"')
    terminal("label", "net", "a=b", "--remove", "loss")
    assert ckpt.open(terminal.folder).get("net").metrics == {}
    first = terminal("events", "-n", "1").splitlines()[1]
    assert first.split()[3:] == ["label", "net", "net@1", "a=b", "removed=loss"]


def test_the_history_names_versions_that_are_gone(terminal: Terminal) -> None:
    terminal("rm", "net@1", "--yes")
    assert terminal("events", "-n", "1").splitlines()[1].split()[3:] == ["rm", "net", "net@1"]


@pytest.mark.parametrize("text", ["7", "604800", "soon"])
def test_a_duration_without_a_unit_is_told_how_to_write_it(terminal: Terminal, text: str) -> None:
    terminal("gc", "--grace", text, status=2)
    assert terminal.err.endswith("write 7d, 12h, 30m or 0\n")


def test_a_repository_is_found_by_what_is_left_of_it(terminal: Terminal) -> None:
    root = terminal.folder / ".ckpt"
    (root / "config.toml").unlink()
    (root / "registry.db").unlink()
    shutil.copytree(root / "store", terminal.folder / "bare" / "store")
    for folder in (str(root), "bare"):
        assert "2 versions" in terminal("-r", folder, "registry", "rebuild", "--yes")
        assert terminal("-r", folder, "ls").splitlines()[1].split()[0] == "net"


def test_where_no_repository_is_the_folder_to_make_one_in_is_named(terminal: Terminal) -> None:
    terminal("-r", "nowhere", "ls", status=3)
    assert f"run `ckpt init {terminal.folder / 'nowhere'}`" in terminal.err


@pytest.mark.parametrize("command", [("pull", "net", "-"), ("push", "-", "net")])
def test_a_dash_is_no_file(terminal: Terminal, command: tuple[str, ...]) -> None:
    terminal(*command, status=2)
    assert "name a file" in terminal.err
    assert not (terminal.folder / "-").exists()


def test_a_folder_of_files_gets_no_name_of_a_file(terminal: Terminal) -> None:
    folder = terminal.folder / "bert"
    folder.mkdir()
    save_file({"w": numpy.ones(3, numpy.float32)}, folder / "model.safetensors")
    terminal("push", "bert", "bert")
    terminal("pull", "bert", "out.safetensors", status=2)
    assert "error[is-folder]" in terminal.err
    terminal("pull", "bert", "out.safetensors", "--tensors", "*")


def test_a_new_repository_has_one_place(terminal: Terminal) -> None:
    terminal("-r", "one", "init", "two", status=2)
    assert "give one of them" in terminal.err
    assert not (terminal.folder / "one").exists()
    terminal("init", "three", CKPT_REPO=str(terminal.folder / "four"))
    assert (terminal.folder / "three/.ckpt/config.toml").exists()


def test_an_address_of_a_kind_that_init_takes_is_named(terminal: Terminal) -> None:
    terminal("init", "new", "--registry", "mysql://host/db", status=2)
    assert "give postgresql://…, or leave it out" in terminal.err
    assert not (terminal.folder / "new").exists()
