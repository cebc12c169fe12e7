"""A live state written in torch's own formats."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy
import torch

from ckpt.core.digests import digest_of
from ckpt.core.documents import identity_bytes
from ckpt.core.tensors import chunk_digests
from ckpt.loader.capture import capture
from ckpt.loader.replica import drafted
from ckpt.loader.sources import laid_out


class UnwritableError(ValueError):
    """A format cannot hold a state, with torch's reason."""


def save_file(state: Any, file: BinaryIO) -> None:
    """Write a state with ``torch.save``; what shares memory goes on sharing it.

    Raises:
        UnwritableError: torch cannot write it, such as one memory as two dtypes.
        OSError: what the system said to the writing of it.
    """
    try:
        torch.save(state, file)
    except RuntimeError as error:
        raise _system_error(error) or UnwritableError(str(error)) from None


def save_shards(state: dict[str, Any], folder: Path) -> None:
    """Write a state as a folder of ``torch.distributed.checkpoint``, by this process alone.

    Raises:
        UnwritableError: it cannot hold this state.
        OSError: what the system said to the writing of it.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        try:
            save(state, checkpoint_id=folder, no_dist=True)
        except CheckpointException as error:  # which is no Exception
            first = next(iter(error.failures.values()))[0]
            raise _system_error(first) or UnwritableError(str(first)) from error


def _system_error(error: BaseException) -> OSError | None:
    """What the system said, over which the writer of torch's archives raises an error of its own."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__cause__ or found.__context__
    return found


def state_digest(state: Any) -> str:
    """The digest that a version of this state would have."""
    return digest_of(identity_bytes(drafted(capture(state), digests=True)))


def named_values(state: Any) -> dict[str, tuple[str, tuple[int, ...], tuple[str, ...]]]:
    """Dtype, shape and digests of the values of every tensor in a state, by its path."""
    found = {}
    for name, tensor in _tensors(state, ()):
        plain = laid_out(name, tensor)
        found[name] = (plain.dtype, plain.shape, chunk_digests(plain))
    return found


def _tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (torch.Tensor, numpy.ndarray)):
        yield ".".join(path), value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            yield from _tensors(item, (*path, str(place)))
