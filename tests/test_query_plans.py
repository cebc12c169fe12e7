"""Questions stay fast however many versions there are: SQLite's own plans say that nothing reads a
whole table, or sorts more than what few versions match."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqlalchemy import event

import ckpt
from ckpt.registry import search
from ckpt.registry.tables import metadata

TABLES = {*metadata.tables} - {"meta"}  # which has one row
VERSIONS = 12
MODELS_IN_ORDER = "SCAN models USING INDEX "


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ckpt.Repository]:
    with ckpt.open(tmp_path_factory.mktemp("plans")) as repo:
        for number in range(VERSIONS):
            metrics = {"loss": 1 / (number + 1), "accuracy": number / VERSIONS}
            state = {"w": torch.tensor(number)}
            repo.push(state, "net", step=number, metrics=metrics, labels={"data": "a"})
        repo.tag("net@3", "best")
        yield repo


QUESTIONS: dict[str, Callable[[ckpt.Repository], Any]] = {
    "get newest": lambda repo: repo.get("net"),
    "get number": lambda repo: repo.get("net@5"),
    "get alias": lambda repo: repo.get("net:best"),
    "get digest": lambda repo: repo.get(f"net@b3:{repo.get('net@7').digest[:16]}"),
    "of a digest": lambda repo: repo._registry.queries.of_digest("net", repo.get("net@7").digest),
    "get parent": lambda repo: repo.get("net~1"),
    "log": lambda repo: repo.log("net", limit=5),
    "log, next page": lambda repo: repo.log("net", before=8, limit=5),
    "ls": lambda repo: repo.models(),
    "find": lambda repo: repo.find("net", "loss < 0.5", limit=5),
    "find the best": lambda repo: repo.find("net", order_by="loss", limit=5),
    "find the worst": lambda repo: repo.find("net", "accuracy > 0", order_by="-loss", limit=5),
    "find by step": lambda repo: repo.find("net", "step >= 3 and step < 6", limit=5),
    "find the last steps": lambda repo: repo.find("net", "loss > 0", order_by="-step", limit=5),
    "find what few match": lambda repo: repo.find("net", "loss < 0.1", order_by="-step"),
    "tag": lambda repo: repo.tag("net@4", "other"),
    "push": lambda repo: repo.push({"w": torch.tensor(-1)}, "net"),
    "rm": lambda repo: repo.rm(repo.push({"w": torch.tensor(-2)}, "net")),
}


def plans(repo: ckpt.Repository, ask: Callable[[ckpt.Repository], Any]) -> dict[str, list[str]]:
    """The plan of each statement that a question becomes."""
    asked: list[tuple[str, Any]] = []
    engine = repo._registry.queries._database.engine

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
            asked.append((statement, parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        ask(repo)
    finally:
        event.remove(engine, "before_cursor_execute", note)
    with engine.connect() as connection:
        return {
            statement: [
                str(step[3])
                for step in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", values)
            ]
            for statement, values in asked
        }


def reads_whole(step: str) -> bool:
    return step.startswith("SCAN ") and step.split()[1] in TABLES


@pytest.mark.parametrize("few", [0, 2])
@pytest.mark.parametrize("name", QUESTIONS)
def test_no_question_reads_a_whole_table(
    repo: ckpt.Repository, name: str, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``ls`` reads the models, of which there are few, in their order."""
    monkeypatch.setattr(search, "FEW", few)
    found = plans(repo, QUESTIONS[name])
    assert found
    for statement, steps in found.items():
        others = [step for step in steps if name != "ls" or not step.startswith(MODELS_IN_ORDER)]
        assert not any(map(reads_whole, others)), f"{statement}\n{steps}"


@pytest.mark.parametrize("order", ["loss", "-loss", "step", "-step", None])
def test_many_versions_are_not_sorted(
    repo: ckpt.Repository, order: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "FEW", 0)
    found = plans(repo, lambda repo: repo.find("net", "accuracy >= 0", order_by=order, limit=3))
    (statement,) = [one for one in found if "ORDER BY" in one and "FROM versions" in one]
    assert not any("TEMP B-TREE" in step for step in found[statement]), found[statement]


def test_a_plan_without_its_index_is_noticed(tmp_path: Path) -> None:
    with ckpt.open(tmp_path) as repo:
        repo.push({"w": torch.tensor(1)}, "net", metrics={"loss": 1.0})
        engine = repo._registry.queries._database.engine
        with engine.begin() as connection:
            connection.exec_driver_sql("DROP INDEX ix_versions_run_number")
        found = plans(repo, lambda repo: repo.push({"w": torch.tensor(2)}, "net"))
        assert any(reads_whole(step) for steps in found.values() for step in steps)
