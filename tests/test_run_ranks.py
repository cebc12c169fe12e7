"""A run on several processes: each goes on with what is its own, and all fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckpt
from ckpt.core.errors import CkptWarning, StorageError
from ckpt.training.ranks import Ranks

PROGRAM = str(Path(__file__).with_name("ranks_worker.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with what one process saved."""
    folder = tmp_path_factory.mktemp("ranks")
    model = nn.Linear(1, 1)
    nn.init.constant_(model.weight, 7)
    with ckpt.open(folder) as repo, ckpt.Run(repo, "grown", quiet=True) as job:
        job.track(model=model, noise=torch.Generator().manual_seed(5)).save(3)
    return folder


@pytest.fixture(scope="module")
def seen(folder: Path) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 saw."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, PROGRAM, str(folder)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line.partition(" ")[2]) for line in sorted(done.stdout.splitlines())]


def test_each_rank_goes_on_with_its_own_data_and_generators(seen: list[dict[str, Any]]) -> None:
    assert [one["resumed"] for one in seen] == [one["expected"] for one in seen]
    assert seen[0]["expected"] != seen[1]["expected"]


def test_an_optimizer_whose_state_is_on_rank_0_alone_is_saved_and_resumed(
    seen: list[dict[str, Any]],
) -> None:
    assert [one["zero"] for one in seen] == [True, True]


@pytest.mark.parametrize(
    ("what", "codes"),
    [
        ("run-live", ["run-live", "run-live"]),
        ("bad metric", ["metric-invalid", "metric-invalid"]),
        ("not stored", ["cannot-store", "cannot-store"]),
        ("not spared", ["registry-busy", "registry-busy"]),
        ("not restored", ["rank-failed", "RuntimeError"]),
    ],
)
def test_what_fails_on_one_rank_is_raised_on_all(
    seen: list[dict[str, Any]], what: str, codes: list[str]
) -> None:
    assert [one[what] for one in seen] == codes


@pytest.mark.parametrize(
    "when", ["not durable", "not durable at the end", "not durable at the end of a block"]
)
def test_a_save_that_failed_in_the_background_is_raised_on_all(
    seen: list[dict[str, Any]], when: str
) -> None:
    assert [one[when] for one in seen] == ["io", "io"]


def test_what_was_raised_on_all_is_not_raised_again(seen: list[dict[str, Any]]) -> None:
    assert [one["told once"] for one in seen] == ["", ""]


def test_a_wait_that_is_too_short_is_so_on_all(seen: list[dict[str, Any]]) -> None:
    assert [one["not yet durable"] for one in seen] == ["TimeoutError"] * 2


def test_a_rank_that_leaves_by_an_exception_waits_for_no_other(seen: list[dict[str, Any]]) -> None:
    assert [one["together afterwards"] for one in seen] == [2, 2]


def test_what_failed_here_is_told_also_when_another_rank_has_died(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("Connection closed by peer")

    def fail() -> None:
        raise StorageError("io", "the disk is away")

    monkeypatch.setattr("torch.distributed.gather_object", broken)
    ranks = Ranks()
    ranks.count = 2
    with pytest.raises(StorageError, match="the disk is away"):
        ranks.together(fail)
    with pytest.raises(RuntimeError, match="Connection closed"):
        ranks.together(lambda: None)


def test_after_a_failure_that_all_raised_the_next_save_works(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["steps"] == [1]


def test_where_there_are_more_ranks_a_new_one_keeps_its_own_data_and_all_are_warned(
    seen: list[dict[str, Any]],
) -> None:
    assert [one["grown to"] for one in seen] == [4, 4]
    assert [one["grown weight"] for one in seen] == [7, 7]
    assert [one["grown noise"] for one in seen] == [5, 21]
    for one in seen:
        assert any("saved by 1 processes, resumed by 2" in said for said in one["grown told"])


@pytest.mark.usefixtures("seen")
def test_where_there_are_fewer_ranks_each_goes_on_with_its_own(folder: Path) -> None:
    noise = torch.Generator()
    with ckpt.open(folder) as repo, ckpt.Run(repo, "shrunk", quiet=True) as job:
        job.track(model=nn.Linear(1, 1), noise=noise)
        with pytest.warns(CkptWarning, match="saved by 2 processes, resumed by 1"):
            assert job.resume() == 1
    assert noise.initial_seed() == 20
