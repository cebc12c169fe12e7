"""Large reads bring their range into the page cache at once, and never change what is read."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckpt.core.errors import IntegrityError
from ckpt.core.pages import are_cached
from ckpt.storage.local import LocalStore
from ckpt.storage.read_ahead import read_ahead, read_in

SIZE = 9 << 20
BODY = random.Random(0).randbytes(SIZE)


@pytest.fixture
def path() -> Iterator[Path]:
    """A file on a disk, which the page cache has not: the folders of tests are in memory."""
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder:
        file = Path(folder) / "packs" / "ab" / "x"
        file.parent.mkdir(parents=True)
        file.write_bytes(BODY)
        handle = os.open(file, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
        yield file


def cached(path: Path, start: int, end: int) -> bool:
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    return are_cached(address + start, address + end)


def test_a_range_is_in_the_cache_afterwards(path: Path) -> None:
    with path.open("rb") as file:
        read_ahead(file.fileno(), 12_345, 4 << 20)
    for start in range(4096 * 3, 12_345 + (4 << 20), 1 << 20):
        assert cached(path, start // 4096 * 4096, start + 1)


def test_what_is_mapped_is_read_in(path: Path) -> None:
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    read_in(memoryview(pages)[5 : 5 + (4 << 20)])
    assert cached(path, 0, 4 << 20)
    assert pages[:] == BODY


@pytest.mark.parametrize(
    ("start", "length"), [(0, SIZE), (1, SIZE - 1), (4095, 3 << 20), (5_000_001, 2 << 20), (7, 9)]
)
def test_any_range_is_read_as_it_is(path: Path, start: int, length: int) -> None:
    room = bytearray(length)
    store = LocalStore(path.parents[2])
    for _ in range(2):  # from the disk, then from the cache
        store.read_into("packs/ab/x", start, memoryview(room))
        assert room == BODY[start : start + length]


def test_a_range_that_is_not_there_is_told_by_the_read(path: Path) -> None:
    with path.open("rb") as file:
        read_ahead(file.fileno(), SIZE - 100, 4 << 20)
    with pytest.raises(IntegrityError) as caught:
        LocalStore(path.parents[2]).read_into(
            "packs/ab/x", SIZE - (2 << 20), memoryview(bytearray(4 << 20))
        )
    assert caught.value.code == "object-short"
