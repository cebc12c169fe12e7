"""``ckpt log``: a metric over steps, read in one snapshot, drawn, written as a picture, followed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from postgres_server import repository_over

import ckpt
from ckpt.cli import main as entry
from ckpt.core.effects import observed
from ckpt.core.errors import NotFoundError, UsageError
from ckpt.core.records import Point
from ckpt.service.watching import follow, read_curve

pytest_plugins = ("postgres_server",)

COMMAND = [sys.executable, "-c", "from ckpt.cli.main import main; main()"]


@pytest.fixture
def shared(where: Path | str, tmp_path: Path) -> Iterator[ckpt.Repository]:
    """An empty repository over each database."""
    with repository_over(where, tmp_path) as repository:
        yield repository


def push(repo: ckpt.Repository, step: int | None, loss: float | None, **said: Any) -> ckpt.Version:
    metrics = {} if loss is None else {"loss": loss, "rate": 0.1}
    return repo.push({"w": torch.ones(2)}, "gpt", step=step, metrics=metrics, **said)


class TestCurves:
    """What the registry answers, over both databases."""

    def test_a_metric_of_all_versions_comes_oldest_first(self, shared: ckpt.Repository) -> None:
        push(shared, 0, 0.5)
        push(shared, 1, None)
        push(shared, 2, math.inf, run="b", alias=["best", "kept"])
        push(shared, None, -1.0)
        shared.push({"w": torch.ones(2)}, "other", metrics={"loss": 9.0})
        found = read_curve(shared, "GPT", "loss")
        assert (found.model, found.metric) == ("gpt", "loss")
        assert found.points == (
            Point(1, 0, "main", 0.5),
            Point(3, 2, "b", math.inf),
            Point(4, None, "main", -1.0),
        )
        assert found.aliases == {3: ("best", "kept")}
        assert [point.number for point in read_curve(shared, "gpt", "loss", limit=2).points] == [
            3,
            4,
        ]
        assert [point.number for point in read_curve(shared, "gpt", "loss", before=4).points] == [
            1,
            3,
        ]

    def test_the_saved_rules_come_along(self, shared: ckpt.Repository) -> None:
        push(shared, 0, 0.5)
        assert read_curve(shared, "gpt", "loss").rules == ()
        shared.prune("gpt", keep=[ckpt.Best("loss")], save=True)
        assert read_curve(shared, "gpt", "loss").rules == ("best:loss:min:1",)

    def test_however_many_versions_it_is_one_snapshot_of_four_questions(
        self, shared: ckpt.Repository
    ) -> None:
        for step in range(30):
            push(shared, step, float(step))
        asked: list[str] = []

        def hook(kind: str, effect: Callable[..., Any], args: tuple[Any, ...]) -> Any:
            asked.extend([kind] if kind.startswith("sql") else [])
            return effect(*args)

        with observed(hook):
            assert len(read_curve(shared, "gpt", "loss").points) == 30
        assert asked.count("sql") == 4
        assert asked.count("sql.begin") <= 1  # PostgreSQL begins by itself

    def test_a_metric_that_no_version_has_is_an_error_that_names_those_there_are(
        self, shared: ckpt.Repository
    ) -> None:
        push(shared, 0, 0.5)
        with pytest.raises(NotFoundError, match="there are: loss, rate") as failed:
            read_curve(shared, "gpt", "lost")
        assert failed.value.code == "metric-missing"
        with pytest.raises(NotFoundError) as failed:
            read_curve(shared, "gtp", "loss")
        assert failed.value.code == "model-missing"
        with pytest.raises(UsageError):
            read_curve(shared, "gpt", "not a name")
        shared.push({"w": torch.ones(2)}, "bare")
        with pytest.raises(NotFoundError, match="none of its versions has any metric"):
            read_curve(shared, "bare", "loss")

    def test_following_gives_every_version_once_in_pages_by_number(
        self, shared: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt.service.watching._PAGE", 2)
        rounds = iter(range(4))

        def wait() -> None:
            """What others do meanwhile: nothing, the first push, four and a removal, no more."""
            match next(rounds, None):
                case 1:
                    push(shared, 0, 0.0)
                case 2:
                    for step in (1, 2, 3, 4):
                        push(shared, step, 0.0)
                    shared.rm("gpt@3")
                case 3:
                    raise EOFError

        seen: list[list[int]] = []
        with contextlib.suppress(EOFError):
            for page in follow(shared, "gpt", 0, wait):
                seen.append([version.number for version in page])
        assert seen == [[1], [2, 4], [5]]


@pytest.fixture
def shell(
    repo: ckpt.Repository, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[str, str]]:
    """Runs ``ckpt`` in this process; gives its output and what it told."""
    monkeypatch.setenv("CKPT_REPO", str(repo.location.root))
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("signal.signal", lambda *given: None)

    def run(*arguments: str, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["ckpt", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry.main()
        out, err = capsys.readouterr()
        assert (stop.value.code or 0) == status, err
        return out, err

    return run


@pytest.fixture
def trained(repo: ckpt.Repository) -> ckpt.Repository:
    """Ten versions whose loss falls, the last but one broken."""
    for step in range(10):
        loss = math.nan if step == 8 else 2.0 - step / 5
        alias = "early" if step == 2 else ()
        repo.push(
            {"w": torch.full((2,), step)},
            "gpt",
            step=10 * step,
            metrics={"loss": loss},
            alias=alias,
        )
    return repo


@pytest.mark.usefixtures("trained")
def test_a_plot_fits_the_width_and_says_what_it_leaves_out(
    shell: Callable[..., tuple[str, str]],
) -> None:
    lines = shell("log", "gpt", "--plot", "loss")[0].splitlines()
    assert lines[0] == "gpt: loss over steps"
    assert max(map(len, lines)) == 60
    assert lines[-2].split() == ["main", "10", "0.2", "@10", "2", "@1", "0.2", "@10"]
    assert lines[-1] == "1 value is not finite: nan at @9"


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        (("--where", "loss < 1 and step >= 60"), [10, 8, 7]),
        (("--order-by", "loss", "-n", "3"), [10, 8, 7]),
        (("--order-by", "-loss", "--where", "step < 40"), [1, 2, 3, 4]),
        (("--where", "loss < 0"), []),
    ],
)
def test_versions_are_found_and_ordered_by_their_metrics(
    shell: Callable[..., tuple[str, str]], arguments: tuple[str, ...], numbers: list[int]
) -> None:
    out, told = shell("log", "gpt", *arguments)
    assert [line.split()[0] for line in out.splitlines()[1:]] == [f"gpt@{one}" for one in numbers]
    assert told == ("" if numbers else "no version of gpt matches\n")


@pytest.mark.usefixtures("trained")
def test_the_json_of_a_plot_has_every_point(shell: Callable[..., tuple[str, str]]) -> None:
    shown = json.loads(shell("log", "gpt", "--plot", "loss", "--json", "-n", "2")[0])
    nan = {"version": "gpt@9", "step": 80, "run": "main", "value": "nan"}
    last = {"version": "gpt@10", "step": 90, "run": "main", "value": pytest.approx(0.2)}
    assert shown == {"model": "gpt", "metric": "loss", "points": [nan, last]}


@pytest.mark.usefixtures("trained")
def test_a_picture_is_written_beside_the_drawing(
    shell: Callable[..., tuple[str, str]], tmp_path: Path
) -> None:
    path = tmp_path / "loss.svg"
    path.write_text("an older picture")
    out, _ = shell("log", "gpt", "--plot", "loss", "--output", str(path))
    assert out.startswith("gpt: loss over steps\n")
    root = ElementTree.parse(path).getroot()
    texts = {one.text for one in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"early", "lowest 0.2", "highest 2"} <= texts


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("--plot", "lost"), 3, "error[metric-missing]: no version of gpt has a metric"),
        (("--plot", "a b"), 2, "error[name-invalid]: "),
        (("--plot", "loss", "--output", "loss.png"), 2, "error[output-invalid]: "),
        (("--plot", "loss", "--output", "no/loss.svg"), 3, "error[no-folder]: "),
        (("--output", "loss.svg"), 2, "error[usage]: --output needs --plot METRIC"),
        (("--follow", "--before", "3"), 2, "error[usage]: --follow and --before"),
        (("--where", "loss<1", "--plot", "loss"), 2, "error[usage]: --where excludes --follow"),
        (("--order-by", "loss", "--follow"), 2, "error[usage]: --order-by excludes --follow"),
        (("--where", "loss"), 2, "error[where-invalid]: "),
        (("--order-by", ""), 2, "error[name-invalid]: "),
        (("--plot", "loss", "-n", "0"), 2, "error[usage]: "),
    ],
)
def test_what_cannot_be_shown_is_one_clear_line(
    shell: Callable[..., tuple[str, str]], arguments: tuple[str, ...], status: int, said: str
) -> None:
    _, told = shell("log", "gpt", *arguments, status=status)
    assert told.startswith(said)
    assert told.count("\n") == 1


class Follower:
    """``ckpt log --follow`` in a process of its own."""

    def __init__(self, root: Path, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [*COMMAND, "log", "gpt", "--follow", "-r", str(root), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "COLUMNS": "60"},
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.out, self.told = self.process.stdout, self.process.stderr

    def ends(self) -> int:
        """Its exit status."""
        status = self.process.wait(60)
        self.out.close()
        self.told.close()
        return status


@pytest.fixture
def follower() -> Iterator[Callable[..., Follower]]:
    """Begins to follow; whatever is left at the end is killed."""
    begun: list[Follower] = []

    def begin(root: Path, *arguments: str) -> Follower:
        begun.append(Follower(root, *arguments))
        return begun[-1]

    yield begin
    for one in begun:
        if one.process.poll() is None:
            one.process.kill()
            one.ends()


def test_following_waits_for_what_is_not_there_and_ends_at_ctrl_c(
    tmp_path: Path, follower: Callable[..., Follower]
) -> None:
    following = follower(tmp_path)
    assert "there is no repository" in following.told.readline()
    with ckpt.open(tmp_path) as repo:
        assert 'there is no model "gpt"' in following.told.readline()
        assert following.out.readline().split()[:3] == ["VERSION", "STEP", "SIZE"]
        for step in range(3):
            push(repo, step, 0.5, message="two\nlines" if step else None)
            assert following.out.readline().startswith(f"gpt@{step + 1} ")
    following.process.send_signal(signal.SIGINT)
    assert following.told.read().startswith("error[interrupted]: stopped by you")
    assert following.ends() == 130


def test_following_ends_when_nobody_reads_any_more(
    repo: ckpt.Repository, tmp_path: Path, follower: Callable[..., Follower]
) -> None:
    push(repo, 0, 0.5)
    following = follower(tmp_path)
    assert following.out.readline().startswith("VERSION")
    assert following.out.readline().startswith("gpt@1 ")
    following.out.close()  # and no version comes that could not be written
    assert following.told.read() == ""
    assert following.ends() == 141


def test_following_as_json_is_one_line_for_each_version(
    repo: ckpt.Repository, tmp_path: Path, follower: Callable[..., Follower]
) -> None:
    for step in range(3):
        push(repo, step, 0.5)
    versions = follower(tmp_path, "--json", "-n", "2")
    points = follower(tmp_path, "--json", "--plot", "loss")
    assert [json.loads(versions.out.readline())["number"] for _ in range(2)] == [2, 3]
    assert [json.loads(points.out.readline())["step"] for _ in range(3)] == [0, 1, 2]
    push(repo, 3, None)
    push(repo, 4, math.nan)
    assert [json.loads(versions.out.readline())["number"] for _ in range(2)] == [4, 5]
    found = json.loads(points.out.readline())
    assert found == {"version": "gpt@5", "step": 4, "run": "main", "value": "nan"}


def test_following_a_plot_draws_it_anew_with_each_version(
    repo: ckpt.Repository, tmp_path: Path, follower: Callable[..., Follower]
) -> None:
    push(repo, 0, None)
    path = tmp_path / "loss.svg"
    following = follower(tmp_path, "--plot", "loss", "--output", str(path))
    assert "none of its versions has any metric" in following.told.readline()
    for number in (2, 3):
        push(repo, number, 1.0 / number)
        drawn = [following.out.readline()]
        while drawn[-1] != "\n" or len(drawn) < 3:
            drawn.append(following.out.readline())
        while not drawn[-1].startswith("main"):
            drawn.append(following.out.readline())
        assert drawn[0] == "gpt: loss over steps\n"
        assert drawn[-1].split()[1] == str(number - 1)
        assert following.out.readline() == "\n"
    following.process.send_signal(signal.SIGINT)
    assert following.ends() == 130
    assert "highest 0.5" in path.read_text()
