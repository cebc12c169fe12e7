"""What a save copies before the loop goes on is exactly what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from test_tensors import pytestmark as of_odd_tensors
from test_tensors import states

from ckpt.core.tensors import chunk_spans
from ckpt.loader.capture import capture
from ckpt.loader.sources import MemoryTensor
from ckpt.training.arena import Arena
from ckpt.training.staging import stage

pytestmark = of_odd_tensors


@settings(max_examples=300)
@given(state=states())
def test_what_is_staged_for_the_writer_is_what_is_stored(state: Any) -> None:
    arena = Arena()
    sources = [source for source in capture(state).sources if source is not None]
    places = stage(arena, sources)
    for source, place in zip(sources, places, strict=True):
        staged = arena.room(place + source.nbytes)[place:]
        assert staged == b"".join(source.read(*span) for span in chunk_spans(source.nbytes))
    arena.close()


@pytest.mark.parametrize("dtype", [torch.float16, torch.uint8, torch.float32, torch.complex64])
@pytest.mark.parametrize("begin", range(5))
def test_a_slice_is_staged_wherever_it_begins(dtype: torch.dtype, begin: int) -> None:
    values = torch.arange(40).to(dtype).requires_grad_(dtype.is_floating_point)
    source = MemoryTensor("w", "", values[begin : begin + 24])
    arena = Arena()
    assert stage(arena, [source]) == [0]
    assert arena.room(source.nbytes) == source.read(0, source.nbytes)
    arena.close()
