"""A run on several processes: each goes on with what is its own, and all fail together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = str(Path(__file__).with_name("ranks_worker.py"))


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 saw."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *launcher, PROGRAM, str(tmp_path_factory.mktemp("ranks"))]
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
        ("not restored", ["rank-failed", "RuntimeError"]),
    ],
)
def test_what_fails_on_one_rank_is_raised_on_all(
    seen: list[dict[str, Any]], what: str, codes: list[str]
) -> None:
    assert [one[what] for one in seen] == codes


def test_after_a_failure_that_all_raised_the_next_save_works(seen: list[dict[str, Any]]) -> None:
    assert seen[0]["steps"] == [1]
