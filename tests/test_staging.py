"""What a save copies before the loop goes on is exactly what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tensors import pytestmark as of_odd_tensors
from test_tensors import states

from ckpt.core.tensors import chunk_spans
from ckpt.loader.capture import capture
from ckpt.loader.sources import MemoryTensor
from ckpt.training.arena import Arena
from ckpt.training.staging import Stage

pytestmark = of_odd_tensors


@settings(max_examples=300)
@given(saved=st.lists(states(), min_size=1, max_size=3))
def test_what_is_staged_for_the_writer_is_what_is_stored(saved: list[Any]) -> None:
    """Whatever was staged before, and when the same is staged twice."""
    arena = Arena()
    stage = Stage(arena)
    for state in [saved[0], *saved]:
        sources = [source for source in capture(state).sources if source is not None]
        places, _ = stage.copy(sources)
        for source, place in zip(sources, places, strict=True):
            staged = arena.room(place + source.nbytes)[place:]
            assert staged == b"".join(source.read(*span) for span in chunk_spans(source.nbytes))
    arena.close()


def test_the_values_at_the_call_are_staged_each_time() -> None:
    arena = Arena()
    stage = Stage(arena)
    weights = torch.zeros(3000, 2)
    for value in range(3):
        weights.fill_(value)
        stage.copy([MemoryTensor("w", "", weights), MemoryTensor("turned", "", weights.t())])
        staged = torch.frombuffer(arena.room(24_000 + 576 + 24_000), dtype=torch.float32)
        assert staged[:6000].tolist() == [value] * 6000
        assert staged[6144:].tolist() == [value] * 6000
    arena.close()


def test_a_state_for_which_there_is_no_room_does_not_move_the_next_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arena = Arena()
    stage = Stage(arena)
    small = [MemoryTensor(name, "", torch.ones(9)) for name in "ab"]
    places, _ = stage.copy(small)
    with monkeypatch.context() as patch:
        patch.setattr(arena, "room", _no_room)
        with pytest.raises(OSError, match="no room"):
            stage.copy([MemoryTensor("a", "", torch.zeros(5000)), small[1]])
    assert stage.copy(small) == (places, None)
    arena.close()


def _no_room(nbytes: int) -> memoryview:
    raise OSError("no room")


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.float32, torch.complex64])
@pytest.mark.parametrize("begin", range(5))
def test_a_slice_is_staged_wherever_it_begins(dtype: torch.dtype, begin: int) -> None:
    values = torch.arange(40).to(dtype).requires_grad_(dtype.is_floating_point)
    source = MemoryTensor("w", "", values[begin : begin + 24])
    arena = Arena()
    assert Stage(arena).copy([source]) == ([0], None)
    assert arena.room(source.nbytes) == source.read(0, source.nbytes)
    arena.close()
