"""Saving from every rank by torch.distributed.checkpoint, and loading on other numbers of them."""

from __future__ import annotations

import math
import random
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from crash_driver import check_books
from dcp_worker import GROUP_SECONDS, Ranks, big, equal, expected
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from trials import Trials

import ckpt
from ckpt.core.documents import Part, Tensor, decode_document, encode_document
from ckpt.core.errors import CkptError, IntegrityError, UsageError
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.loader.spaces import BoxSpace, stored_nbytes
from ckpt.training.dcp import DcpWriter

# As many a rank does at least, when it saves what the worker makes.
ACTS = 36

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """Groups of processes to give orders to."""
    made = Ranks()
    yield made
    made.close()


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[ckpt.Repository]:
    """The repository that the ranks open too."""
    with ckpt.open(tmp_path / "repo") as repository:
        yield repository


def raised(found: CheckpointException) -> CkptError:
    """The error that a rank raised, inside of DCP's own."""
    ((error, _),) = found.failures.values()
    assert isinstance(error, CkptError)
    return error


def save(repo: ckpt.Repository, model: str, state: dict[str, Any], **said: Any) -> ckpt.Version:
    """Save from this process alone."""
    writer = ckpt.dcp_writer(repo, model, **said)
    dcp_save(state, storage_writer=writer, no_dist=True)
    assert writer.version is not None
    return writer.version


def load(repo: ckpt.Repository, ref: str, state: dict[str, Any]) -> dict[str, Any]:
    """Load into ``state``, in this process alone."""
    dcp_load(state, storage_reader=ckpt.dcp_reader(repo, ref), no_dist=True)
    return state


# --- groups of processes -------------------------------------------------------------------------


def test_what_4_ranks_save_loads_on_2_and_what_these_save_loads_on_3(
    ranks: Ranks, repo: ckpt.Repository, tmp_path: Path
) -> None:
    saved = ranks.run(tmp_path, "save", 4, seed=1)
    assert [one.get("version") for one in saved] == ["gpt@1", None, None, None], saved
    version = repo.get("gpt:best")
    assert (version.step, version.metrics) == (1, {"loss": 0.5})
    loaded = ranks.run(tmp_path, "load", 2, seed=1, ref="gpt@1", resave=True)
    assert [one.get("equal") for one in loaded] == [True] * 2, loaded
    loaded = ranks.run(tmp_path, "load", 3, seed=1, ref="gpt@2")
    assert [one.get("equal") for one in loaded] == [True] * 3, loaded

    kept = expected(tmp_path)
    assert not torch.distributed.is_initialized()
    for ref in ("gpt@1", "gpt@2"):
        assert equal(repo.pull(ref), kept)
    entries = {entry.name: entry for entry in repo.document("gpt@1").tensors}
    assert [part.offset for part in entries["parallel.both"].parts] == [
        (0, 0),
        (0, 3),
        (3, 0),
        (3, 3),
    ]
    assert entries["parallel.same"].parts == ()  # replicated: stored once
    assert len(entries["parallel.same"].chunks) == 1
    sizes = [
        math.prod(entry.shape) * getattr(torch, entry.dtype).itemsize for entry in entries.values()
    ]
    assert version.nbytes == sum(sizes)
    part = repo.pull("gpt@1", tensors="parallel.*")
    assert torch.equal(part["parallel.column"], kept["parallel"]["column"])
    repo.pull_file("gpt@1", tmp_path / "out.safetensors")
    assert torch.equal(
        load_file(tmp_path / "out.safetensors")["parallel.both"], kept["parallel"]["both"]
    )
    assert repo.fsck(read_data=True).is_clean


def test_versions_in_parts_are_compared_and_copied(
    ranks: Ranks, repo: ckpt.Repository, tmp_path: Path
) -> None:
    for seed in (1, 2):
        ranks.run(tmp_path, "save", 2, seed=seed)
    found = repo.diff("gpt@1", "gpt@2", stats=True).tensors
    changed = [one for one in found if one.what == ("values",)]
    assert any(one.after is not None and one.after.parts for one in changed)
    for one in changed:
        before, after = (
            repo.pull(ref, tensors=one.name)[one.name].double() for ref in ("gpt@1", "gpt@2")
        )
        assert one.statistics is not None
        assert one.statistics.largest == pytest.approx(float((after - before).abs().max()))
    with ckpt.open(tmp_path / "other") as other:
        copied = other.copy(repo, "gpt@2")
        assert copied.digest == repo.get("gpt@2").digest
        assert other.document(copied) == repo.document("gpt@2")
        assert equal(other.pull(copied), repo.pull("gpt@2"))
        assert other.copy(repo, "gpt@2").push == copied.push
        assert other.fsck(read_data=1).is_clean


def test_a_save_in_the_background_makes_the_version_and_the_same_again_does_not(
    ranks: Ranks, repo: ckpt.Repository, tmp_path: Path
) -> None:
    saved = ranks.run(tmp_path, "save", 2, seed=1, background=True)
    assert [one.get("version") for one in saved] == ["gpt@1", None], saved
    assert equal(repo.pull("gpt"), expected(tmp_path))
    again = ranks.run(tmp_path, "save", 2, seed=1)
    assert [one.get("version") for one in again] == ["gpt@1", None], again
    assert len(repo.log("gpt")) == 1


def test_a_retry_uses_the_packs_that_the_other_ranks_had_finished(
    ranks: Ranks, repo: ckpt.Repository, tmp_path: Path
) -> None:
    repo.push({"w": torch.ones(3)}, "other")
    died = ranks.run(tmp_path, "save", 3, seed=1, kill=[2, "link", 0])
    assert [one["signal"] for one in died] == [0, 0, 9]
    assert all("error" in one for one in died[:2])
    assert all(one["lasted"] < 2 * GROUP_SECONDS for one in died[:2])
    assert [model.name for model in repo.models()] == ["other"]
    finished = packs(repo, "other")
    assert len(finished) == 2
    assert repo.gc(grace=0).freed == ()  # the push that died has them claimed
    saved = ranks.run(tmp_path, "save", 3, seed=1)
    assert saved[0].get("version") == "gpt@1", saved
    assert equal(repo.pull("gpt"), expected(tmp_path))
    added = {pack: size for pack, size in packs(repo, "other").items() if pack not in finished}
    assert repo.get("gpt").new_bytes == sum(added.values())
    expire(repo)
    assert repo.gc(grace=0).freed == ()
    assert equal(repo.pull("gpt"), expected(tmp_path))


@pytest.mark.torture("T8", unit="ranks killed")
def test_a_rank_that_dies_leaves_no_version_and_what_it_left_is_freed(
    ranks: Ranks, tmp_path: Path, trials: Trials
) -> None:
    for seed in trials.seeds(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        chance = random.Random(seed)
        rank, act = chance.randrange(3), chance.randrange(ACTS)
        with ckpt.open(folder / "repo") as repo:
            repo.push({"w": torch.ones(3)}, "other")
            died = ranks.run(folder, "save", 3, seed=seed, kill=[rank, "", act])
            assert died[rank]["signal"] == 9, died  # else ACTS is too high
            others = [one for number, one in enumerate(died) if number != rank]
            assert all("error" in one for one in others)
            assert all(one["lasted"] < 2 * GROUP_SECONDS for one in others)
            check_books(folder / "repo")
            # Only a coordinator that died after its commit may leave one, and it is whole.
            assert rank == 0 or [model.name for model in repo.models()] == ["other"]
            expire(repo)
            if len(repo.models()) == 1:
                repo.gc(grace=0)
                assert packs(repo, "other") == {}
                assert len(list((repo.location.store / "packs").glob("*/*"))) == 1
                assert not list(repo.location.store.glob(".tmp/*"))
            saved = ranks.run(folder, "save", 3, seed=seed)
            assert saved[0].get("version") == "gpt@1", saved
            assert equal(repo.pull("gpt"), expected(folder))
        trials.count()


def packs(repo: ckpt.Repository, apart: str) -> dict[str, int]:
    """The size of each pack that the registry has, those of one model left out."""
    mine = repo.get(apart).push
    with closing(sqlite3.connect(repo.location.registry)) as connection:
        rows = connection.execute("SELECT id, size FROM packs WHERE push != ?", (mine,))
        return dict(rows.fetchall())


def expire(repo: ckpt.Repository) -> None:
    """Let the leases of all open pushes end."""
    with closing(sqlite3.connect(repo.location.registry)) as connection:
        connection.execute("UPDATE pushes SET expires_at = 0 WHERE state = 'open'")
        connection.commit()


def test_what_one_rank_cannot_store_is_told_by_all_of_them(
    ranks: Ranks, repo: ckpt.Repository, tmp_path: Path
) -> None:
    refused = ranks.run(tmp_path, "save", 2, seed=1, odd=1)
    assert [one.get("error") for one in refused] == ["CheckpointException"] * 2, refused
    assert all("odd.code: cannot store builtin_function" in one["text"] for one in refused)
    assert repo.models() == []
    with closing(sqlite3.connect(repo.location.registry)) as connection:
        assert connection.execute("SELECT state FROM pushes").fetchall() == [("aborted",)]


def test_a_rank_reads_only_the_chunks_that_its_shard_needs(
    ranks: Ranks, repo: ckpt.Repository, tmp_path: Path
) -> None:
    repo.push({"big": big()}, "big", compress="none")
    loaded = ranks.run(tmp_path, "load_big", 2)
    assert [one.get("equal") for one in loaded] == [True] * 2, loaded
    assert [one["read"] for one in loaded] == [2 * CHUNK_BYTES] * 2


# --- one process ---------------------------------------------------------------------------------


def full_state() -> dict[str, Any]:
    return {
        "net": {"w": torch.rand(5, 4), "empty": torch.zeros(0, 3), "one": torch.tensor(3)},
        "list": [torch.arange(4), {"deep": torch.ones(2, dtype=torch.bfloat16)}],
        "values": {"lr": 0.1, "inf": float("-inf"), "none": None, "text": "é", "raw": b"\x00\xff"},
        "tuple": (1, torch.ones(3), {"b": 2, "a": numpy.arange(3)}),
        "array": numpy.arange(6.0).reshape(2, 3),
        "plain": [1, [2, 3]],
    }


def blank(value: Any) -> Any:
    """The same structure without its contents."""
    if isinstance(value, dict):
        return {key: blank(item) for key, item in value.items()}
    if isinstance(value, list):
        return [blank(item) for item in value]
    return torch.zeros_like(value) if isinstance(value, torch.Tensor) else None


def same(one: Any, other: Any) -> bool:
    """Whether two nestings of values, arrays and tensors are equal."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, numpy.ndarray):
        return one.dtype == other.dtype and numpy.array_equal(one, other)
    return equal(one, other)


def test_values_of_every_kind_come_back_by_load_and_by_pull(repo: ckpt.Repository) -> None:
    state = full_state()
    version = save(repo, "m", state, step=5, labels={"a": "b"}, message="hello", run="r")
    assert (version.step, version.labels, version.message, version.run) == (
        5,
        {"a": "b"},
        "hello",
        "r",
    )
    assert same(repo.pull("m"), state)
    assert same(load(repo, "m", blank(state)), state)


def test_a_state_that_was_pushed_loads_by_dcp_too(repo: ckpt.Repository) -> None:
    state = full_state()
    base = torch.arange(24.0).reshape(4, 6)
    state["views"] = {"base": base, "part": base[1:3, 2:], "turned": base.t()}
    state["wide"] = torch.rand(3, 1).expand(3, 4)
    repo.push(state, "m")
    assert same(load(repo, "m", blank(state)), state)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    repo.push(net, "net")
    assert same(load(repo, "net", blank(dict(net.state_dict()))), dict(net.state_dict()))


def test_whole_tensors_give_the_version_that_a_push_gives(repo: ckpt.Repository) -> None:
    state = {"b": torch.rand(3), "a": {"w": torch.rand(2, 2), "n": 1}}
    assert save(repo, "m", state).digest == repo.push(state, "other").digest


def test_a_successor_is_stored_as_a_difference(repo: ckpt.Repository) -> None:
    weights = torch.rand(500, 500)
    first = save(repo, "m", {"w": weights})
    changed = weights.clone()
    changed[7] += 1.0
    second = save(repo, "m", {"w": changed})
    assert second.new_bytes < first.new_bytes // 10
    assert torch.equal(repo.pull("m")["w"], changed)


def test_a_writer_makes_one_version_at_a_time(repo: ckpt.Repository) -> None:
    writer = ckpt.dcp_writer(repo, "m")
    state = {"w": torch.ones(2)}
    writer.prepare_global_plan([SavePlan([])])  # of a save that failed before it wrote
    (plan,) = writer.prepare_global_plan([SavePlan([])])
    writer.write_data(plan, DefaultSavePlanner())
    with pytest.raises(CheckpointException) as found:
        dcp_save(state, storage_writer=writer, no_dist=True)
    assert "still saving" in raised(found.value).message
    writer._joint.abort(plan.storage_data.push, CkptError("bug", "the first one failed"))
    dcp_save(state, storage_writer=writer, no_dist=True)
    dcp_save({"w": torch.zeros(2)}, storage_writer=writer, no_dist=True)
    assert [version.number for version in repo.log("m")] == [2, 1]


def test_nothing_is_saved_through_an_old_registry(repo: ckpt.Repository) -> None:
    save(repo, "m", {"w": torch.ones(2)})
    repo.close()
    backup = repo.location.registry.read_bytes()
    with ckpt.open(repo.location.root) as newer:
        save(newer, "m", {"w": torch.zeros(2)})
    repo.location.registry.write_bytes(backup)
    with ckpt.open(repo.location.root) as older, pytest.raises(CheckpointException) as found:
        save(older, "m", {"w": torch.full((2,), 3.0)})
    assert raised(found.value).code == "registry-old"


def test_what_cannot_be_stored_is_refused_with_its_name(repo: ckpt.Repository) -> None:
    state = {"a": {"code": print}, "b": (lambda: 0,), "c": torch.eye(3).to_sparse()}
    with pytest.raises(CheckpointException) as found:
        save(repo, "m", state)
    error = raised(found.value)
    assert (type(error), error.code) == (UsageError, "cannot-store")
    for path in ("a.code: ", "b.0: ", "c: not a plain dense tensor"):
        assert path in error.message
    assert repo.models() == []
    # The push was aborted: what it wrote could go at once.
    assert repo.push({"w": torch.ones(2)}, "m").number == 1


def test_nothing_is_cast_on_the_way(repo: ckpt.Repository) -> None:
    save(repo, "m", {"w": torch.rand(3)})
    with pytest.raises(CheckpointException) as found:
        load(repo, "m", {"w": torch.zeros(3, dtype=torch.float64)})
    assert raised(found.value).code == "dtype-mismatch"


def test_every_byte_that_is_loaded_is_checked(repo: ckpt.Repository) -> None:
    save(repo, "m", {"w": torch.rand(64)})
    (pack,) = repo.location.store.glob("packs/*/*")
    data = bytearray(pack.read_bytes())
    data[-1] ^= 1
    pack.chmod(0o644)
    pack.write_bytes(data)
    with pytest.raises(CheckpointException) as found:
        load(repo, "m", {"w": torch.zeros(64)})
    assert raised(found.value).code == "object-corrupt"


def test_what_would_not_be_one_version_of_all_ranks_is_refused(repo: ckpt.Repository) -> None:
    writer = ckpt.dcp_writer(repo, "m")
    with pytest.raises(UsageError, match="needs collectives"):
        dcp_save({"w": torch.ones(2)}, storage_writer=writer, no_dist=True, use_collectives=False)
    with pytest.raises(UsageError, match="no checkpoint_id"):
        dcp_save({"w": torch.ones(2)}, storage_writer=writer, checkpoint_id="x", no_dist=True)
    with pytest.raises(UsageError, match="no dict"):
        ckpt.dcp_reader(repo, repo.push([torch.ones(2)], "list"))
    assert [model.name for model in repo.models()] == ["list"]


def test_a_cached_plan_is_refused_and_never_saved_under_an_old_push(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata"):
        monkeypatch.setattr(DefaultSavePlanner, f"_cached_{name}", {})

    def cached() -> DcpWriter:
        writer, planner = ckpt.dcp_writer(repo, "m"), DefaultSavePlanner(enable_plan_caching=True)
        dcp_save({"w": torch.ones(2)}, storage_writer=writer, planner=planner, no_dist=True)
        return writer

    cached()
    with pytest.raises(CheckpointException) as found:
        cached()
    assert raised(found.value).code == "plan-cached"


# --- parts ---------------------------------------------------------------------------------------


def entry(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Tensor:
    parts = tuple(Part(offset=offset, shape=own, chunks=1) for offset, own in boxes)
    return Tensor(name="w", dtype="float32", shape=shape, parts=parts, chunks=("d",) * len(parts))


def test_parts_that_are_not_the_tensor_once_are_refused() -> None:
    good = entry((4, 4), ((0, 0), (4, 2)), ((0, 2), (2, 2)), ((2, 2), (2, 2)))
    assert stored_nbytes(good) == 64
    for bad in (
        entry((4, 4), ((0, 0), (4, 2)), ((0, 2), (2, 2))),  # a gap
        entry((4, 4), ((0, 0), (4, 2)), ((0, 1), (4, 2))),  # overlap, and a gap
        entry((4, 4), ((0, 0), (4, 2)), ((0, 3), (4, 2))),  # beyond the end
        entry((4, 4), ((0, 0), (4, 2)), ((0, -2), (4, 2))),
        entry((4, 4), ((0,), (4,)), ((0, 2), (4, 2))),  # another number of dimensions
        entry((1 << 70, 4), ((0, 0), (4, 2)), ((1 << 69, 2), (4, 2))),
    ):
        with pytest.raises(IntegrityError, match="not made up of its parts"):
            stored_nbytes(bad)


def test_parts_survive_the_document(repo: ckpt.Repository) -> None:
    save(repo, "m", {"w": torch.rand(4, 4)})
    document = repo.document("m")
    parted = decode_document(
        encode_document(
            type(document)(
                format=1,
                state="values",
                root=document.root,
                tensors=(entry((4, 4), ((0, 0), (4, 2)), ((0, 2), (4, 2))),),
                environment=document.environment,
            )
        )
    )
    assert [part.offset for part, _ in parted.tensors[0].pieces()] == [(0, 0), (0, 2)]


@pytest.mark.torture("T8", unit="boxes")
def test_a_box_takes_exactly_its_values_however_they_arrive(trials: Trials) -> None:
    for seed in trials.seeds(300):
        chance = random.Random(seed)
        shape = [chance.randint(1, 6) for _ in range(chance.randint(0, 4))]
        offset = [chance.randrange(size) for size in shape]
        lengths = [chance.randint(1, n - at) for n, at in zip(shape, offset, strict=True)]
        values = torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape)
        room = torch.full([*lengths, 2], -1, dtype=torch.int32)
        target = room[..., 0] if chance.random() < 0.5 else torch.full(lengths, -1).int()
        space = BoxSpace(target, shape, offset)
        data, at = bytearray(values.numpy().tobytes()), 0
        while at < len(data):
            length = min(4 * chance.randint(1, 20), len(data) - at)
            view = space.view(at, length)
            if view is None:
                space.write(at, memoryview(data)[at : at + length])
            else:
                view[:] = data[at : at + length]
            at += length
        box = tuple(slice(at, at + n) for at, n in zip(offset, lengths, strict=True))
        assert torch.equal(target, values[box])
        trials.count()
