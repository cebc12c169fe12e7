"""Whatever a document says, a load imports, runs and opens nothing, and ends in a typed error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import hostile_driver
import pytest
from hostile_documents import attacks

DRIVER = Path(__file__).with_name("hostile_process.py")
LOADS = {name: code for name, (_, code, _) in hostile_driver.attacks().items()}

# Edits that a load may go through with: nothing of them is code, and nothing is where it should
# not be.
HARMLESS = {
    "object subprocess:Popen",  # trusted by its loader: an empty object, made by nobody's code
    "value long path",
    "value huge range",
    "value huge size",
    "structure order of nothing",
    "tensor hostile device",
    "probe a million threads",
    "probe absent device",
    "probe unknown flag",
}


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    """What each attack led to, in a process that has an audit hook."""
    found = subprocess.run([sys.executable, str(DRIVER)], capture_output=True, check=True)
    answers: dict[str, Any] = json.loads(found.stdout)
    return answers


def test_there_are_many_attacks() -> None:
    assert len(attacks()) >= 200


@pytest.mark.parametrize("name", sorted(attacks()))
def test_a_hostile_document_reaches_nothing(results: dict[str, Any], name: str) -> None:
    found = results[name]
    assert found["events"] == []
    assert not found["load"].startswith("raw"), found["load"]
    assert not found["show"].startswith("raw"), found["show"]
    if name not in HARMLESS:
        assert found["load"] != "done"


@pytest.fixture(scope="module")
def loaded() -> dict[str, Any]:
    """What the documents of ``hostile_driver`` led to, each loaded from a real repository."""
    command = [sys.executable, str(DRIVER.with_name("hostile_driver.py"))]
    found = subprocess.run(command, capture_output=True, check=False, timeout=300)
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith(b'{"name"')]
    return {line["name"]: line for line in lines}


@pytest.mark.parametrize("name", sorted(LOADS))
def test_a_hostile_load_ends_as_it_should_and_costs_little(
    loaded: dict[str, Any], name: str
) -> None:
    assert name in loaded, "the process ended in an attack"
    found = loaded[name]
    assert found["events"] == []
    assert found["load"]["code"] == LOADS[name]
    assert not found["show"]["code"].startswith("raw"), found["show"]
    for one in (found["load"], found["show"]):
        assert one["printable"]
        assert one["seconds"] < 10
        assert one["mebibytes"] < 200


def test_a_tree_that_doubles_at_every_level_is_not_shown(loaded: dict[str, Any]) -> None:
    assert loaded["doubling"]["show"]["code"] == "document-damaged"
