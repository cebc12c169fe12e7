"""One test, two lengths: a fixed number of trials, or with ``--minutes`` as many as fit.

A test marked ``torture("T8", unit="pushes")`` takes its seeds from ``trials``. In an ordinary
run these are 0, 1, 2 … up to the number that the test names. With ``--minutes N`` only marked
tests run; they share the time, go on with fresh seeds, and add a line each to
``docs/torture.jsonl``. ``--first-seed S`` repeats the seeds of such a line.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

RECORD = Path(__file__).parent.parent / "docs" / "torture.jsonl"


@dataclass
class Trials:
    """The seeds of one test; what it counted is kept."""

    first: int
    seconds: float | None
    number: int = 0
    counted: int = 0
    began: float = 0.0

    @property
    def seed(self) -> int:
        """The seed of the trial that runs."""
        return self.first + self.number - 1

    def seeds(self, usual: int) -> Iterator[int]:
        """``usual`` seeds, or fresh ones until the time is over, at least one."""
        self.began = time.monotonic()
        while self._goes_on(usual):
            self.number += 1
            yield self.seed

    def _goes_on(self, usual: int) -> bool:
        if self.seconds is None:
            return self.number < usual
        return self.number == 0 or time.monotonic() - self.began < self.seconds

    def count(self, done: int = 1) -> None:
        """Add to the number of things tried, in the unit of the test's mark."""
        self.counted += done


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--minutes", type=float, help="run the marked tests for so long, together")
    parser.addoption("--first-seed", type=int, help="where the seeds of --minutes begin")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "torture(row, unit): takes its seeds from `trials`; runs with --minutes"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--minutes") is None:
        return
    chosen = [item for item in items if item.get_closest_marker("torture")]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture
def trials(request: pytest.FixtureRequest) -> Trials:
    """The seeds of this test."""
    minutes = request.config.getoption("--minutes")
    if minutes is None:
        found = Trials(0, None)
    else:
        first = request.config.getoption("--first-seed")
        workers = int(getattr(request.config, "workerinput", {}).get("workercount", 1))
        seconds = minutes * 60 * workers / len(request.session.items)
        found = Trials(secrets.randbits(40) if first is None else first, seconds)
    request.node.stash[_TRIALS] = found
    return found


_TRIALS = pytest.StashKey[Trials]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    trials = item.stash.get(_TRIALS, None)
    mark = item.get_closest_marker("torture")
    if report.when != "call" or trials is None or mark is None:
        return report
    if report.failed:
        report.sections.append(("trials", f"it failed with seed {trials.seed}"))
    if trials.seconds is not None:
        _record(item, mark, trials, failed=report.failed)
    return report


def _record(item: pytest.Item, mark: pytest.Mark, trials: Trials, *, failed: bool) -> None:
    line: dict[str, Any] = {
        "row": mark.args[0],
        "test": item.nodeid.rpartition("/")[2],
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "first_seed": trials.first,
        "trials": trials.number,
        "counted": trials.counted,
        "unit": mark.kwargs["unit"],
        "violations": int(failed),
        "failed_seed": trials.seed if failed else None,
        "seconds": round(time.monotonic() - trials.began),
    }
    with RECORD.open("a") as record:
        record.write(json.dumps(line) + "\n")
