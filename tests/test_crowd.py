"""Many push, pull and remove at once beside a collector: nothing is lost, nobody is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import crowd_worker
import pytest
from combinations import Combination, Make
from crash_driver import file_of
from crowd_worker import COLLECTOR, MODEL
from trials import Trials

import ckpt
from ckpt.core.errors import NotFoundError

pytest_plugins = ("servers", "postgres_server", "combinations")

USUAL = {"pushers": 4, "pushes": 10, "pullers": 2}
TORTURE = {"pushers": 32, "pushes": 50, "pullers": 6}
MOST_SECONDS = 3600


def gather(order: dict[str, Any]) -> dict[str, int]:
    """Let the crowd work; returns the exit code of each process."""
    with subprocess.Popen(
        [sys.executable, crowd_worker.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            said, _ = program.communicate(json.dumps(order) + "\n", timeout=MOST_SECONDS)
        except BaseException:
            os.killpg(program.pid, signal.SIGKILL)
            raise
    codes: dict[str, int] = json.loads(said)
    return codes


def said(folder: Path, who: str) -> Iterator[list[Any]]:
    """What processes of a kind did."""
    for path in folder.glob(f"{who}*.log"):
        for line in path.read_text().splitlines():
            yield json.loads(line)


def check_versions(
    repo: ckpt.Repository, pushed: dict[str, list[str]], removed: set[str], out: Path
) -> None:
    """What was acknowledged is there, bit for bit, but for what was removed."""
    log = repo.log(MODEL, limit=1 << 30)
    assert {version.reference for version in log} == pushed.keys() - removed
    for version in log:
        repo.pull_file(version, out, force=True)
        assert out.read_bytes() == file_of(*pushed[version.reference])
    for reference in removed:
        with pytest.raises(NotFoundError):
            repo.pull_file(reference, out, force=True)


def run_trial(place: Combination, folder: Path, order: dict[str, Any]) -> int:
    """A crowd at work, and what it leaves; returns how many pushes there were."""
    with place.open() as repo:
        first = folder / "first.safetensors"
        first.write_bytes(file_of("first"))
        repo.push_file(first, "first")
    where = {"registry": place.registry, "store": place.store, "folder": str(folder)}
    codes = gather(order | where)
    shown = {path.stem: path.read_text() for path in folder.glob("*.err")}
    if any(shown.values()):
        pytest.fail("\n".join(f"{name}:\n{text}" for name, text in shown.items() if text))
    assert codes == dict.fromkeys(shown, 0)

    pushes = [words for words in said(folder, "pusher") if words[0] == "pushed"]
    pushed = {reference: names for _, reference, names in pushes}
    removed = {words[1] for words in said(folder, "pusher") if words[0] == "removing"}
    assert pushed.keys() == {f"{MODEL}@{n}" for n in range(1, len(pushes) + 1)}
    assert len(pushes) == order["pushers"] * order["pushes"]
    missing = {words[1] for words in said(folder, "puller") if words[0] == "version-missing"}
    assert missing <= removed
    freed = sum(words[1] for words in said(folder, COLLECTOR))
    with place.open() as repo:
        check_versions(repo, pushed, removed, folder / "out")
        freed += len(repo.gc(grace=0).freed)
        place.check_nothing_else_is_stored(repo)
        assert repo.fsck(read_data=1).is_clean
        check_versions(repo, pushed, removed, folder / "out")
    assert freed
    return len(pushes)


@pytest.mark.torture("T8", unit="pushes")
def test_nothing_is_lost_in_a_crowd_and_nobody_sees_a_lock(
    make: Make, trials: Trials, tmp_path: Path
) -> None:
    size = USUAL if trials.seconds is None else TORTURE
    for seed in trials.seeds(1):
        folder = tmp_path / "crowd"
        folder.mkdir()
        with make() as place:
            trials.count(run_trial(place, folder, {"seed": seed, **size}))
        shutil.rmtree(folder)
