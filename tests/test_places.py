"""Addresses: which there are, and that no password of theirs is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import ckpt
from ckpt.core.durations import seconds_of
from ckpt.core.errors import UsageError
from ckpt.service.places import as_address, as_place, shown


@pytest.mark.parametrize(
    ("text", "what", "wanted"),
    [
        ("folder/x", "store", Path("folder/x")),
        ("sqlite:////var/r.db", "registry", Path("/var/r.db")),
        ("sqlite:///r.db", "registry", Path("r.db")),
        ("s3://bucket/prefix", "store", "s3://bucket/prefix"),
        ("postgresql+psycopg://host/db", "registry", "postgresql+psycopg://host/db"),
    ],
)
def test_what_names_a_place(text: str, what: str, wanted: Path | str) -> None:
    assert as_place(text, what) == wanted


@pytest.mark.parametrize(
    ("text", "what"),
    [("http://x", "store"), ("s3://x", "registry"), ("s3://x", "repository"), ("", "store")],
)
def test_what_does_not(text: str, what: str) -> None:
    with pytest.raises(UsageError):
        as_place(text, what)


@pytest.mark.parametrize(
    "text",
    [
        "postgresql://me:hunter2@host/db",
        "postgresql://me:hunter2@host/db?connect_timeout=3",
        "postgresql://host/db?password=hunter2&connect_timeout=3",
        "postgresql://host/db?x=1&PASSWORD=hunter2",
        "postgresql://host/db?sslpassword=hunter2",
    ],
)
def test_a_password_is_neither_shown_nor_written_down(text: str) -> None:
    assert "hunter2" not in shown(text)
    with pytest.raises(UsageError) as caught:
        as_address(text, "registry")
    assert "hunter2" not in str(caught.value)


def test_an_address_without_one_is_shown_as_it_is() -> None:
    for text in ("postgresql://me@host:5432/db?host=/tmp/x", "s3://bucket/a/b"):
        assert shown(text) == text


@given(st.integers(0, 10**9 - 1), st.sampled_from("smhdw"))
def test_a_duration_is_its_number_of_its_unit(number: int, unit: str) -> None:
    factor = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[unit]
    assert seconds_of(f"{number}{unit}") == number * factor


@pytest.mark.parametrize("text", ["", "7", "d", "-1d", "1.5h", "7 d", "7y", "٣d", "1d\n"])
def test_what_is_no_duration(text: str) -> None:
    assert seconds_of(text) is None


def test_a_repository_stays_where_it_is_when_the_program_goes_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    with ckpt.open("here") as repo:
        monkeypatch.chdir(tmp_path / "else")
        repo.push({"w": torch.ones(1)}, "m")
        assert list(repo.pull("m")) == ["w"]
    assert not list((tmp_path / "else").iterdir())


def test_a_registry_and_a_store_stay_where_they_are_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path)
    with ckpt.open(registry="here.db", store=Path("store")) as repo:
        monkeypatch.chdir(tmp_path / "else")
        repo.push({"w": torch.ones(1)}, "m")
        assert repo.fsck(read_data=1).is_clean
    assert not list((tmp_path / "else").iterdir())
    with ckpt.open(registry=tmp_path / "here.db", store=tmp_path / "store") as repo:
        assert list(repo.pull("m")) == ["w"]
