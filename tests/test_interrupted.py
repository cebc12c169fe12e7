"""Ctrl-C, SIGTERM and a closed pipe in a pull or a collection: nothing half-done, and it says so."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from test_damage import PROGRAM, STOPPED_AT, leftovers, run

import ckpt

SAID = "nothing is left half-done, it is safe to run it again"


@pytest.mark.parametrize(
    ("kind", "number", "status"),
    [
        ("create", signal.SIGTERM, 143),
        ("write", signal.SIGINT, 130),
        ("fsync", signal.SIGTERM, 143),
        ("link", signal.SIGINT, 130),
    ],
)
def test_a_signal_in_a_pull_leaves_the_whole_file_or_none(
    repo: ckpt.Repository, tmp_path: Path, kind: str, number: int, status: int
) -> None:
    repo.push({"w": torch.arange(5000.0)}, "m")
    folder = tmp_path / "pulled"
    folder.mkdir()
    out, whole = folder / "out.safetensors", tmp_path / "whole.safetensors"
    repo.pull_file("m", whole)
    where = ["-r", str(repo.location.root)]
    shown = run("-c", STOPPED_AT, kind, str(int(number)), *where, "pull", "m", out)
    assert (shown.returncode, shown.stdout) == (status, "")
    assert SAID in shown.stderr
    assert len(shown.stderr.splitlines()) == 1
    assert os.listdir(folder) == ([out.name] if kind == "link" else [])
    again = run(*where, "pull", "m", out, "--force", program=[PROGRAM])
    assert again.returncode == 0, again.stderr
    assert out.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("kind", "number", "status"),
    [
        ("sql.commit", signal.SIGINT, 130),
        ("link", signal.SIGTERM, 143),
        ("unlink", signal.SIGINT, 130),
    ],
)
def test_a_signal_in_a_collection_leaves_the_rest_to_the_next(
    repo: ckpt.Repository, kind: str, number: int, status: int
) -> None:
    kept = repo.push({"w": torch.ones(500)}, "m")
    repo.rm(repo.push({"w": torch.zeros(500)}, "m"))
    given = ["-r", str(repo.location.root), "gc", "--grace", "0"]
    shown = run("-c", STOPPED_AT, kind, str(int(number)), *given)
    assert (shown.returncode, shown.stdout) == (status, "")
    assert SAID in shown.stderr
    assert leftovers(repo) == []
    repo.gc(grace=0)
    assert [path.stem for path in repo.location.store.glob("packs/*/*")] == [f"{kept.push}-0"]
    assert torch.equal(repo.pull("m")["w"], torch.ones(500))


@pytest.mark.parametrize("verb", ["log", "events", "du"])
def test_a_pipe_that_is_closed_ends_a_listing_with_141(repo: ckpt.Repository, verb: str) -> None:
    repo.push({"w": torch.ones(3)}, "m")
    read, write = os.pipe()
    os.close(read)
    arguments = ["-r", str(repo.location.root), verb, *(["m"] if verb == "log" else [])]
    shown = run(*arguments, program=[PROGRAM], stdout=write)
    os.close(write)
    assert (shown.returncode, shown.stderr) == (141, "")
