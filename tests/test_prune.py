"""prune removes what no rule keeps, tells why, and what goes is what it said; events tell of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt
from ckpt.core.errors import CkptError, NotFoundError, UsageError
from ckpt.core.records import Version
from ckpt.service.retention import parse_rule


@pytest.fixture
def trained(repo: ckpt.Repository) -> ckpt.Repository:
    """Ten versions: losses fall and rise, one is not finite, one has an alias."""
    losses = [9.0, 5.0, 3.0, 1.0, float("nan"), 2.0, 4.0, 6.0, 8.0, 7.0]
    for number, loss in enumerate(losses):
        state = {"w": torch.full((500,), float(number)), "shared": torch.ones(500)}
        repo.push(state, "net", step=number * 100, metrics={"loss": loss})
    repo.tag("net@2", "paper")
    return repo


def left(repo: ckpt.Repository) -> list[int]:
    return [version.number for version in reversed(repo.log("net"))]


def test_rules_that_are_refused_are_not_saved(trained: ckpt.Repository) -> None:
    trained.prune("net", keep=["last:9"], save=True)
    with pytest.raises(NotFoundError):
        trained.prune("net", keep=["best:los:min:3"], save=True)
    assert trained.prune("net", dry_run=True).rules == ("last:9",)


def test_rules_that_are_saved_already_are_no_act(trained: ckpt.Repository) -> None:
    for keep in (["last:9"], ["last:9"], ["last:8"]):
        trained.prune("net", keep=keep, save=True)
    assert [one.kind for one in trained.events()].count("policy") == 2


def test_a_metric_that_is_infinite_is_never_the_best(repo: ckpt.Repository) -> None:
    for loss in (float("-inf"), 1.0, float("inf"), float("nan"), 2.0):
        repo.push({"w": torch.tensor(loss)}, "net", metrics={"loss": loss})
    for mode, best in (("min", 2), ("max", 5)):
        kept = {one.number for one, why in repo.prune("net", keep=[f"best:loss:{mode}:1"],
                dry_run=True).kept if any(reason.startswith("best") for reason in why)}  # fmt: skip
        assert kept == {best}


@pytest.mark.parametrize(
    ("rules", "numbers"),
    [
        (["last:3"], [2, 8, 9, 10]),
        (["last:1"], [2, 10]),
        (["best:loss:min:2"], [2, 4, 6, 10]),
        (["best:loss:max:1"], [1, 2, 10]),
        (["every:300"], [1, 2, 4, 7, 10]),
        (["within:1h"], list(range(1, 11))),
        (["within:0d"], [2, 10]),
        (["best:loss:min:1", "every:400"], [1, 2, 4, 5, 9, 10]),
    ],
)
def test_what_a_rule_keeps_stays(
    trained: ckpt.Repository, rules: list[str], numbers: list[int]
) -> None:
    foreseen = trained.prune("net", keep=rules, dry_run=True)
    assert left(trained) == list(range(1, 11))
    pruned = trained.prune("net", keep=rules)
    assert left(trained) == numbers
    assert [one.number for one in pruned.victims] == [one.number for one in foreseen.victims]
    kept = {version.number: reasons for version, reasons in pruned.kept}
    assert "alias paper" in kept[2]
    assert "newest" in kept[10]
    assert trained.gc(grace=0).freed_bytes == foreseen.freed_bytes == pruned.freed_bytes
    for version in trained.log("net"):
        assert torch.equal(trained.pull(version)["shared"], torch.ones(500))


def test_of_each_interval_of_steps_the_first_that_was_saved_stays(repo: ckpt.Repository) -> None:
    steps = [*range(9, 400, 10), 100, 57]  # a loop that saves at (step + 1) % 10 == 0; then others
    for number, step in enumerate(steps):
        repo.push({"w": torch.tensor([number])}, "net", step=step)
        repo.prune("net", keep=[ckpt.Every(100), ckpt.Latest(1)])
    assert [version.step for version in reversed(repo.log("net"))] == [9, 109, 209, 309, 100, 57]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (ckpt.Latest, (0,)),
        (ckpt.Latest, (True,)),
        (ckpt.Latest, ("3",)),
        (ckpt.Latest, (2.0,)),
        (ckpt.Every, (0,)),
        (ckpt.Every, (-5,)),
        (ckpt.Best, ("loss", "foo")),
        (ckpt.Best, ("",)),
        (ckpt.Best, ("loss", "min", 0)),
        (ckpt.Within, (7,)),
        (ckpt.Within, ("soon",)),
    ],
)
def test_a_rule_that_is_none_is_refused_as_it_is_made(kind: Any, given: tuple[Any, ...]) -> None:
    with pytest.raises(UsageError) as caught:
        kind(*given)
    assert caught.value.code == "rule-invalid"


def test_a_metric_that_no_version_has_removes_nothing(trained: ckpt.Repository) -> None:
    with pytest.raises(NotFoundError, match='has the metric "lost"; there are loss'):
        trained.prune("net", keep=["best:lost:min:3"])
    assert left(trained) == list(range(1, 11))


def test_rules_look_at_each_run_by_itself(repo: ckpt.Repository) -> None:
    for number in range(4):
        for name in ("a", "b"):
            state = {"w": torch.tensor([number]), "run": name}
            repo.push(state, "net", run=name, metrics={"loss": number + (name == "b") * 10})
    repo.prune("net", keep=["last:1", "best:loss:min:1"], save=True)
    assert left(repo) == [1, 2, 7, 8]
    repo.push({"w": torch.tensor([9])}, "net", run="a")
    repo.prune("net")
    assert [(one.run, one.number) for one in repo.log("net")] == [
        ("a", 9),
        ("b", 8),
        ("b", 2),
        ("a", 1),
    ]


def test_within_is_measured_by_the_clock_that_dated_the_versions(
    trained: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry's: a machine whose clock is years ahead must not remove everything."""
    collector = trained._registry.collector
    now = collector.now()
    assert trained.prune("net", keep=["within:1h"], dry_run=True).victims == ()
    monkeypatch.setattr(collector, "now", lambda: now + 2 * 3600 * 10**6)
    assert len(trained.prune("net", keep=["within:1h"], dry_run=True).victims) == 8


def test_saved_rules_are_used_the_next_time(trained: ckpt.Repository) -> None:
    with pytest.raises(UsageError, match="no rule says what to keep"):
        trained.prune("net")
    trained.prune("net", keep=["last:4"], save=True)
    trained.push({"w": torch.zeros(3)}, "net")
    assert trained.prune("net").rules == ("last:4",)
    assert left(trained) == [2, 8, 9, 10, 11]


def test_a_dry_run_saves_no_rules(trained: ckpt.Repository) -> None:
    trained.prune("net", keep=["last:4"], save=True, dry_run=True)
    assert trained._registry.queries.policy("net") == ()


@pytest.mark.parametrize(
    "rule", ["last", "last:0", "last:x", "best:loss:2", "best:loss:low:1", "within:soon", "keep:1"]
)
def test_a_rule_that_is_none_removes_nothing(trained: ckpt.Repository, rule: str) -> None:
    with pytest.raises(UsageError, match="is no rule"):
        trained.prune("net", keep=["last:1", rule])
    assert len(left(trained)) == 10


@given(st.text(max_size=30))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        keep = parse_rule(text)
    except UsageError:
        return
    versions: list[Version] = []
    assert not keep(versions, 0)


def test_the_command_line_asks_tells_and_keeps_a_history(trained: ckpt.Repository) -> None:
    program = str(Path(sys.executable).with_name("ckpt"))

    def run(*arguments: str, status: int = 0) -> str:
        command = [program, "-r", str(trained.location.root), *arguments]
        found = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert found.returncode == status, found.stderr
        return found.stdout + found.stderr

    said = run("prune", "net", "--keep-last", "2", "--keep-best", "loss:min:1", "-n")
    assert "would remove 6 versions of net" in said
    assert "net@1" in said
    assert "kept by none of best:loss:min:1, last:2" in said
    assert "saves no rules" not in said
    assert "a dry run saves no rules" in run(
        "prune", "net", "--keep-last", "2", "-n", "--save-policy"
    )
    each = ("--keep-every", "300", "--keep-within", "0d", "--keep-best", "loss:max:1")
    foreseen = json.loads(run("prune", "net", *each, "-n", "--json"))
    # 1, 4, 7 and 10 stay by their steps, 2 by its alias.
    assert [one["number"] for one in foreseen["victims"]] == [3, 5, 6, 8, 9]
    run("prune", "net", "--keep-last", "2", status=2)
    run("prune", "net", "--keep-last", "2", "--save-policy", "--yes")
    assert left(trained) == [2, 9, 10]
    assert "removed 0 versions" in run("prune", "net")
    history = run("events", "--since", "1h", "-n", "1000")
    for word in ("prune", "push", "policy", "tag"):
        assert word in history
    assert "net@2 alias=paper" in history
    told = json.loads(run("events", "--json"))
    assert {event["kind"] for event in told} == {"push", "prune", "policy", "tag"}
    assert json.loads(run("events", "--since", "2999-01-01", "--json")) == []
    assert "time-invalid" in run("events", "--since", "soon", status=2)
    run("events", "-n", "0", status=2)


def test_a_version_that_is_named_meanwhile_stays(
    trained: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove = trained._registry.changes.remove

    def late(push: str, author: str, kind: str = "rm") -> str:
        if trained.get("net@5").push == push:
            trained.tag("net@5", "late")
        return remove(push, author, kind)

    monkeypatch.setattr(trained._registry.changes, "remove", late)
    try:
        trained.prune("net", keep=["last:1"])
    except CkptError:
        pytest.fail("one that stays is no error")
    assert 5 in left(trained)
