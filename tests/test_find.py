"""Versions found by metrics and steps: what matches, in which order, and what is no condition."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt
from ckpt.core.comparisons import Comparison, parse_comparisons
from ckpt.core.errors import NotFoundError, UsageError
from ckpt.core.names import check_metrics, named_metrics


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ckpt.Repository]:
    """net@1 to net@6, of which the last three have no, a NaN, an infinite loss."""
    losses = [0.5, 0.25, 0.25, None, math.nan, -math.inf]
    with ckpt.open(tmp_path_factory.mktemp("find")) as repo:
        for number, loss in enumerate(losses, 1):
            metrics = {"accuracy": number / 10} | ({} if loss is None else {"loss": loss})
            state = {"w": torch.tensor(number)}
            repo.push(state, "net", step=None if number == 6 else 100 * number, metrics=metrics)
        repo.push({"w": torch.tensor(0)}, "other", metrics={"loss": 0.0})
        yield repo


def found(repo: ckpt.Repository, where: str = "", order_by: str | None = None) -> list[int]:
    return [version.number for version in repo.find("net", where, order_by=order_by)]


@given(st.dictionaries(st.text() | st.sampled_from(["acc@1", "step", "f1 macro"]), st.floats()))
def test_whatever_a_framework_logs_has_names_that_metrics_may_have(
    logged: dict[str, float],
) -> None:
    assert len(check_metrics(named_metrics(logged))) <= len(logged)


def test_the_names_of_what_a_framework_logs_can_be_told() -> None:
    logged = {"acc@1": 1, "f1 macro": 2, "val/loss": 3, "step": 4, "-x": 5, "acc_1": 6}
    assert named_metrics(logged) == {"acc_1": 1, "f1_macro": 2, "val/loss": 3, "_x": 5}


@pytest.mark.parametrize(
    ("where", "numbers"),
    [
        ("", [6, 5, 4, 3, 2, 1]),
        ("loss < 0.3", [3, 2]),
        ("loss<=0.25", [3, 2]),
        ("loss = 0.25 and step > 200", [3]),
        ("loss == 0.5", [1]),
        ("loss != 0.5", [3, 2]),
        ("loss > -1e308", [3, 2, 1]),
        ("step >= 400", [5, 4]),
        ("step != 100 AND accuracy < 0.45", [4, 3, 2]),
        ("unknown < 1", []),
    ],
)
def test_what_lacks_a_metric_or_has_none_that_is_finite_never_matches(
    repo: ckpt.Repository, where: str, numbers: list[int]
) -> None:
    assert found(repo, where) == numbers


@pytest.mark.parametrize(
    ("order", "numbers"),
    [
        ("loss", [2, 3, 1]),
        ("-loss", [1, 3, 2]),
        ("step", [1, 2, 3, 4, 5]),
        ("-step", [5, 4, 3, 2, 1]),
        ("-accuracy", [6, 5, 4, 3, 2, 1]),
    ],
)
def test_an_order_leaves_out_what_has_no_place_in_it(
    repo: ckpt.Repository, order: str, numbers: list[int]
) -> None:
    assert found(repo, order_by=order) == numbers


def test_the_limit_takes_the_first_of_the_order(repo: ckpt.Repository) -> None:
    best = repo.find("net", "accuracy > 0.1", order_by="loss", limit=1)
    assert [version.reference for version in best] == ["net@2"]


@pytest.mark.parametrize(
    "where",
    [
        "loss",
        "loss <",
        "< 3",
        "loss < x",
        "loss < nan",
        "loss < inf",
        "loss ~ 3",
        "and",
        "a<1 or b<1",
    ],
)
def test_what_is_no_condition_is_refused(repo: ckpt.Repository, where: str) -> None:
    with pytest.raises(UsageError) as caught:
        repo.find("net", where)
    assert caught.value.code == "where-invalid"
    assert "val_loss < 0.3" in str(caught.value.hint)


def test_names_that_no_metric_can_have_are_refused(repo: ckpt.Repository) -> None:
    for where, order in (("a'b < 1", None), ("", "--loss"), ("", "")):
        with pytest.raises(UsageError) as caught:
            repo.find("net", where, order_by=order)
        assert caught.value.code == "name-invalid"
    with pytest.raises(NotFoundError):
        repo.find("nothing")


@given(
    st.lists(
        st.builds(
            Comparison,
            st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,20}", fullmatch=True),
            st.sampled_from(["<", "<=", "=", "!=", ">=", ">"]),
            st.floats(allow_nan=False, allow_infinity=False),
        )
    )
)
def test_conditions_that_are_written_are_read_as_they_were_meant(wanted: list[Comparison]) -> None:
    text = " and ".join(f"{one.name} {one.operator} {one.value!r}" for one in wanted)
    assert parse_comparisons(text) == tuple(wanted)


def test_models_know_how_many_versions_they_have(tmp_path: Path) -> None:
    with ckpt.open(tmp_path) as repo:
        for number in range(4):
            repo.push({"w": torch.tensor(number)}, "net")
        repo.rm("net@2")
        repo.prune("net", keep=["last:2"])
        assert [model.versions for model in repo.models()] == [2]
        repo.rm("net@3")
        repo.rm("net@4")
        assert [model.versions for model in repo.models()] == [0]
