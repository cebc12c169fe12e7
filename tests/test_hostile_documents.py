"""Whatever a document says, a load imports, runs and opens nothing, and ends in a typed error."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hostile_documents import attacks

DRIVER = Path(__file__).with_name("hostile_documents.py")

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
