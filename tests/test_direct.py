"""Large writes go past the page cache where the filesystem lets them, and what is there is the
same. The folder of the tests may lie in memory, so a disk is tried as well."""

from __future__ import annotations

import errno
import itertools
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from ckpt.core.effects import observed
from ckpt.core.errors import StorageError
from ckpt.storage.direct import BLOCK
from ckpt.storage.local import LocalStore

MIB = 1 << 20
ALL = 9 * MIB + 777
BODY = random.Random(0).randbytes(ALL)
# The places where pieces begin, at any distance from a block, large and small ones.
CUTS = (0, 3 * MIB + 1, 3 * MIB + 64, 5 * MIB + BLOCK, 5 * MIB + BLOCK + 100, 8 * MIB - 1, ALL)


@pytest.fixture(params=["where the tests lie", "on a disk"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore]:
    if request.param == "where the tests lie":
        yield LocalStore(tmp_path)
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield LocalStore(Path(folder))


def write_all(store: LocalStore) -> None:
    pieces = list(itertools.pairwise(CUTS))
    with store.create("k") as upload:
        with ThreadPoolExecutor(3) as pool:
            for task in [pool.submit(upload.write, at, BODY[at:end]) for at, end in pieces]:
                task.result()
        upload.publish(ALL)


def ways() -> dict[str, Callable[[Any, tuple[Any, ...]], Any]]:
    """What a disk may do with a write that is to go past the cache: the others are let be."""

    def do(act: Any, given: tuple[Any, ...]) -> Any:
        return act(*given)

    def refuse(act: Any, given: tuple[Any, ...]) -> Any:
        raise OSError(errno.EINVAL, "Invalid argument")

    def write_half(act: Any, given: tuple[Any, ...]) -> Any:
        handle, view, offset = given
        return act(handle, view[: len(view) // 2 // BLOCK * BLOCK], offset)

    taken = itertools.count()

    def refuse_later(act: Any, given: tuple[Any, ...]) -> Any:
        return do(act, given) if next(taken) == 0 else refuse(act, given)

    return {
        "takes all": do,
        "refuses": refuse,
        "refuses later": refuse_later,
        "takes half": write_half,
    }


@pytest.mark.parametrize("piece", [MIB, 8 * MIB])
@pytest.mark.parametrize("way", ways())
def test_every_byte_is_where_it_was_written_to(
    store: LocalStore, way: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one write takes several pieces."""
    monkeypatch.setattr("ckpt.storage.direct._PIECE", piece)
    act_on_direct = ways()[way]
    direct = []

    def hook(kind: str, act: Any, given: tuple[Any, ...]) -> Any:
        if kind == "write" and is_direct(given[0]):
            direct.append(len(given[1]))
            return act_on_direct(act, given)
        return act(*given)

    with observed(hook):
        write_all(store)
    assert store.get("k") == BODY
    if has_direct(store.root):
        assert direct
        assert all(length % BLOCK == 0 for length in direct)


def test_a_filesystem_that_cannot_open_it_past_the_cache_is_written_through_it(
    store: LocalStore,
) -> None:
    def hook(kind: str, act: Any, given: tuple[Any, ...]) -> Any:
        if kind == "open" and given[1] & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return act(*given)

    with observed(hook):
        write_all(store)
    assert store.get("k") == BODY


def test_a_disk_that_fails_is_told_and_nothing_stays(store: LocalStore) -> None:
    def hook(kind: str, act: Any, given: tuple[Any, ...]) -> Any:
        if kind == "write" and len(given[1]) >= MIB:
            raise OSError(errno.EIO, "Input/output error")
        return act(*given)

    with observed(hook), pytest.raises(StorageError):
        write_all(store)
    assert store.size("k") is None
    assert list((store.root / ".tmp").iterdir()) == []


def is_direct(handle: int) -> bool:
    fields = Path(f"/proc/self/fdinfo/{handle}").read_text().split()
    return bool(int(fields[fields.index("flags:") + 1], 8) & os.O_DIRECT)


def has_direct(folder: Path) -> bool:
    """Whether a file in this folder can be opened for writes past the page cache."""
    probe = folder / "probe"
    try:
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True
