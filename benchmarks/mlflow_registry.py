"""MLflow's registry on SQLite: filled with versions by SQL, and asked what ckpt is asked."""

from __future__ import annotations

import importlib
import logging
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "model-1"
_WORKSPACE = "default"

# Every version has a run and a logged model of its own, each with three metrics and two tags.
_NUMBERED = """WITH RECURSIVE v(i) AS (
  SELECT 1 UNION ALL SELECT i + 1 FROM v WHERE i < :versions
)"""
_RUN = "printf('%032x', i)"
_LOGGED = f"'m-'||{_RUN}"
_TIME = "1700000000000 + i"
_METRICS = (
    ("loss", "(i * 48271 % 100000000) / 100000000.0"),
    ("accuracy", "i / 1000000.0"),
    ("rate", "0.1"),
)
_TAGS = (("data", "'set-'||(i % 7)"), ("owner", "'team-'||(i % 100)"))
_COLUMNS: tuple[tuple[str, str, str], ...] = (
    (
        "runs",
        (
            "run_uuid, name, source_type, source_name, entry_point_name, user_id, status, start_time,"
            " end_time, source_version, lifecycle_stage, artifact_uri, experiment_id"
        ),
        (
            f"{_RUN}, 'run', 'UNKNOWN', '', '', 'somebody', 'FINISHED', {_TIME}, {_TIME}, '',"
            " 'active', '/nowhere/'||i, :experiment"
        ),
    ),
    (
        "model_versions",
        (
            "name, version, creation_time, last_updated_time, user_id, current_stage, source, run_id,"
            " status, storage_location, workspace"
        ),
        (
            f"'{MODEL}', i, {_TIME}, {_TIME}, 'somebody', 'None', '/nowhere/'||i, {_RUN}, 'READY',"
            f" '/nowhere/'||i, '{_WORKSPACE}'"
        ),
    ),
    (
        "logged_models",
        (
            "model_id, experiment_id, name, artifact_location, creation_timestamp_ms,"
            " last_updated_timestamp_ms, status, lifecycle_stage, source_run_id"
        ),
        f"{_LOGGED}, :experiment, 'net', '/nowhere/'||i, {_TIME}, {_TIME}, 2, 'active', {_RUN}",
    ),
    *(
        one
        for name, value in _METRICS
        for one in (
            (
                "metrics",
                '"key", value, timestamp, run_uuid, step, is_nan',
                f"'{name}', {value}, {_TIME}, {_RUN}, i, 0",
            ),
            (
                "latest_metrics",
                '"key", value, timestamp, step, is_nan, run_uuid',
                f"'{name}', {value}, {_TIME}, i, 0, {_RUN}",
            ),
            (
                "logged_model_metrics",
                (
                    "model_id, metric_name, metric_timestamp_ms, metric_step, metric_value,"
                    " experiment_id, run_id"
                ),
                f"{_LOGGED}, '{name}', {_TIME}, i, {value}, :experiment, {_RUN}",
            ),
        )
    ),
    *(
        one
        for name, value in _TAGS
        for one in (
            ("tags", '"key", value, run_uuid', f"'{name}', {value}, {_RUN}"),
            (
                "model_version_tags",
                '"key", value, name, version, workspace',
                f"'{name}', {value}, '{MODEL}', i, '{_WORKSPACE}'",
            ),
        )
    ),
    (
        "registered_model_aliases",
        "alias, version, name, workspace",
        f"'best-'||i, i, '{MODEL}', '{_WORKSPACE}' FROM v WHERE i % 100 = 1",
    ),
)


class MlflowRegistry:
    """A registry with one model of so many versions."""

    def __init__(self, folder: Path, versions: int) -> None:
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        logging.getLogger("mlflow").setLevel(logging.ERROR)
        logging.getLogger("alembic").setLevel(logging.ERROR)
        mlflow: Any = importlib.import_module("mlflow")
        folder.mkdir()
        file = folder / "mlflow.db"
        uri = f"sqlite:///{file}"
        self._client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
        self._client.create_registered_model(MODEL)
        self._experiment = self._client.create_experiment("filled", str(folder / "artifacts"))
        self._source = str(folder / "artifacts")
        with sqlite3.connect(file) as connection:
            for table, columns, chosen in _COLUMNS:
                values = chosen if " FROM v" in chosen else f"{chosen} FROM v"
                connection.execute(
                    f"INSERT INTO {table} ({columns}) {_NUMBERED} SELECT {values}",
                    {"versions": versions, "experiment": int(self._experiment)},
                )

    def questions(self, versions: int) -> dict[str, Callable[[int], object]]:
        """What is asked, by name; each takes a number to vary by."""
        client, experiment = self._client, self._experiment
        by_name = f"name='{MODEL}'"
        return {
            "log": lambda n: client.search_model_versions(
                by_name, max_results=100, order_by=["version_number DESC"]
            ),
            "find": lambda n: client.search_runs(
                [experiment],
                "metrics.loss < 0.01",
                order_by=["metrics.loss ASC"],
                max_results=10,
            ),
            "find, logged models": lambda n: client.search_logged_models(
                [experiment],
                filter_string="metrics.loss < 0.01",
                order_by=[{"field_name": "metrics.loss", "ascending": True}],
                max_results=10,
            ),
            "get": lambda n: client.get_model_version(MODEL, str(1 + n % versions)),
            "get, by alias": lambda n: client.get_model_version_by_alias(
                MODEL, f"best-{1 + n * 100 % versions}"
            ),
            "ls": lambda n: client.search_registered_models(max_results=100),
            "tag": lambda n: client.set_registered_model_alias(
                MODEL, "moving", str(1 + n % versions)
            ),
        }

    def make_version(self, number: int) -> None:
        """Register one more version; MLflow stores nothing of it."""
        self._client.create_model_version(MODEL, f"{self._source}/{number}")
