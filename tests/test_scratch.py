"""Memory that is used again: one thread's, as large as the largest use, gone with its thread."""

from __future__ import annotations

import gc
import threading
import weakref

from ckpt.storage import scratch as module
from ckpt.storage.scratch import scratch


def test_a_use_gets_the_same_memory_again_and_other_uses_get_other() -> None:
    first = scratch("test", 100)
    first[:] = b"a" * 100
    assert scratch("test", 50).tobytes() == b"a" * 50
    scratch("other", 100)[:] = b"b" * 100
    assert scratch("test", 100).tobytes() == b"a" * 100


def test_what_was_lent_stays_whole_when_more_is_asked_for() -> None:
    lent = scratch("grows", 1000)
    lent[:] = b"x" * 1000
    grown = scratch("grows", 5 << 20)
    grown[:3] = b"yyy"
    assert len(grown) == 5 << 20
    assert lent.tobytes() == b"x" * 1000


def test_threads_share_nothing_and_leave_nothing() -> None:
    scratch("test", 10)[:] = b"m" * 10
    left: list[weakref.ref[memoryview]] = []

    def use() -> None:
        scratch("test", 10)[:] = b"t" * 10
        left.append(weakref.ref(module._rooms.by_use["test"]))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    gc.collect()
    assert scratch("test", 10).tobytes() == b"m" * 10
    assert left[0]() is None
