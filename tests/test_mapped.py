"""``pull(mmap=True)``: tensors stay where they lie, checked all the same, and nobody sees changes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from test_partial import Reads
from torch import nn

import ckpt
from ckpt.core.effects import observed
from ckpt.core.errors import IntegrityError


def _packs(repo: ckpt.Repository) -> list[Path]:
    return sorted(repo.location.store.glob("packs/*/*"))


def _state() -> dict[str, Any]:
    torch.manual_seed(0)
    shared = torch.rand(300, 40)
    return {
        "large": torch.rand(5 << 20),  # two chunks
        "half": torch.rand(64, 33).bfloat16(),
        "turned": torch.rand(12, 20).t(),
        "tied": [shared, shared],
        "row": shared[3],
        "none": torch.empty(0, 4),
        "one": torch.tensor(3),
        "flags": torch.rand(17) > 0.5,
        "step": 7,
    }


def test_a_mapped_state_is_the_state(repo: ckpt.Repository) -> None:
    state = _state()
    repo.push(state, "model")
    pulled = repo.pull("model", mmap=True)
    assert pulled["step"] == 7
    assert pulled["tied"][0] is pulled["tied"][1]
    assert pulled["turned"].stride() == state["turned"].stride()
    for name in ("large", "half", "turned", "row", "none", "one", "flags"):
        assert torch.equal(pulled[name], state[name]), name
        assert pulled[name].dtype == state[name].dtype


def test_what_begins_at_no_aligned_place_is_read(repo: ckpt.Repository) -> None:
    state = {"a": torch.ones(3), "b": torch.rand(1 << 20)}  # b lies 12 bytes behind the first
    repo.push(state, "model", compress="none")
    pulled = repo.pull("model", mmap=True)
    assert pulled["b"].data_ptr() % 16 == 0
    assert torch.equal(pulled["b"], state["b"])


def test_a_large_tensor_is_not_read(repo: ckpt.Repository) -> None:
    repo.push({"large": torch.rand(1 << 20)}, "model", compress="none")
    reads = Reads("read")
    with observed(reads):
        repo.pull("model", mmap=True)
        repo.pull("model", tensors="large", mmap=True)
    assert reads.nbytes < 1 << 20
    with observed(reads):
        repo.pull("model")
    assert reads.nbytes >= 4 << 20


def test_modules_and_single_tensors_can_be_mapped(repo: ckpt.Repository) -> None:
    net = nn.Linear(40, 50)
    repo.push(net, "net")
    pulled = repo.pull("net", mmap=True)
    assert torch.equal(pulled["weight"], net.weight)
    assert torch.equal(repo.pull("net", tensors="bias", mmap=True)["bias"], net.bias)


def test_differences_are_decoded_into_memory_of_their_own(repo: ckpt.Repository) -> None:
    weights = torch.rand(1 << 20)
    repo.push({"weights": weights}, "model", compress="auto")
    changed = weights + 1e-6
    repo.push({"weights": changed}, "model", compress="auto")
    assert torch.equal(repo.pull("model:v2", mmap=True)["weights"], changed)
    assert torch.equal(repo.pull("model:v1", mmap=True)["weights"], weights)


def test_changes_stay_with_the_one_who_makes_them(repo: ckpt.Repository) -> None:
    state = {"weights": torch.rand(1 << 20)}
    repo.push(state, "model")
    mine = repo.pull("model", mmap=True)["weights"]
    mine.zero_()
    assert torch.equal(repo.pull("model", mmap=True)["weights"], state["weights"])
    assert torch.equal(repo.pull("model")["weights"], state["weights"])


def test_equal_tensors_that_are_stored_once_are_not_one_memory(repo: ckpt.Repository) -> None:
    same = torch.rand(1 << 20)
    repo.push({"a": same, "b": same.clone(), "c": {"d": same.clone()}}, "model", compress="none")
    pulled = repo.pull("model", mmap=True)
    pulled["a"].zero_()
    assert torch.equal(pulled["b"], same)
    pulled["b"].fill_(1)
    assert torch.equal(pulled["c"]["d"], same)


def test_a_mapped_tensor_outlives_its_pack(repo: ckpt.Repository) -> None:
    state = {"weights": torch.rand(1 << 20)}
    repo.push(state, "model")
    pulled = repo.pull("model", mmap=True)["weights"]
    for pack in _packs(repo):
        pack.unlink()
    assert torch.equal(pulled, state["weights"])


@pytest.mark.parametrize(("how", "code"), [("flipped", "object-corrupt"), ("cut", "object-short")])
def test_damage_is_found_in_what_is_mapped(repo: ckpt.Repository, how: str, code: str) -> None:
    repo.push({"weights": torch.rand(5 << 20)}, "model", compress="none")
    pack = max(_packs(repo), key=lambda path: path.stat().st_size)
    pack.chmod(0o644)
    if how == "flipped":
        with pack.open("r+b") as file:
            file.seek(-5, os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))
    else:
        os.truncate(pack, pack.stat().st_size - 100_000)
    with pytest.raises(IntegrityError) as caught:
        repo.pull("model", mmap=True)
    assert caught.value.code == code
    assert "weights" in caught.value.message


def test_a_whole_place_is_read_where_the_mapped_one_is_damaged(repo: ckpt.Repository) -> None:
    """Bytes that were damaged on the way once are read again, into the same tensor."""
    state = {"weights": torch.rand(1 << 20)}
    repo.push(state, "model", compress="none")
    wrong = iter([True])

    def hook(kind: str, act: Any, args: tuple[Any, ...]) -> Any:
        found = act(*args)
        if kind == "map" and next(wrong, False):
            found[len(found) - 8] ^= 1
        return found

    with observed(hook):
        pulled = repo.pull("model", mmap=True)["weights"]
    assert next(wrong, False) is False
    assert torch.equal(pulled, state["weights"])
