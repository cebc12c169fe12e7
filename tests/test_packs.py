"""Packs are safetensors files, byte for byte as ``docs/format.md`` says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load

import ckpt
from ckpt.core.digests import digest_of
from ckpt.core.errors import IntegrityError
from ckpt.core.records import Pack
from ckpt.core.tensors import CHUNK_BYTES
from ckpt.loader.sources import MemoryTensor
from ckpt.storage.memory import MemoryStore
from ckpt.storage.packs import PackWriter, header_cost, pack_key, read_pack

PUSH = "0123456789abcdef" * 2
GOLDEN = Path(__file__).parent / "fixtures" / "pack-1.safetensors"


def source(name: str, tensor: torch.Tensor) -> MemoryTensor:
    return MemoryTensor(name, str(tensor.dtype).removeprefix("torch."), tensor)


def write_pack(store: MemoryStore, tensors: dict[str, torch.Tensor], chunks: list[str]) -> Pack:
    sources = [source(name, tensor) for name, tensor in tensors.items()]
    with PackWriter(store, PUSH, 0, sum(map(header_cost, sources))).upload:
        pass  # leaving without finish leaves nothing
    assert not store.objects
    writer = PackWriter(store, PUSH, 0, sum(map(header_cost, sources)))
    for one in sorted(sources, key=lambda one: one.name in chunks):
        data = one.read(0, one.nbytes)
        if one.name in chunks:
            writer.upload.write(writer.add_chunk(f"{one.name}#0", digest_of(data), len(data)), data)
        else:
            digests = [digest_of(data)] if one.nbytes else []
            writer.upload.write(writer.add_tensor(one, digests), data)
    return writer.finish().pack


def test_the_bytes_of_a_pack_are_golden() -> None:
    store = MemoryStore()
    tensors = {
        "weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        'na"me é': torch.tensor([True, False]),
        "__metadata__": torch.tensor(7, dtype=torch.int8),
        "part": torch.arange(5, dtype=torch.uint8),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex128),
        "empty": torch.empty(0, 3),
    }
    pack = write_pack(store, tensors, chunks=["part"])
    body = store.objects[pack.key][0]
    assert body == GOLDEN.read_bytes(), "the format is a promise: a change needs a new format"
    assert pack.key == f"packs/01/{PUSH}-0.safetensors"
    assert len(body) == pack.size


def test_data_begins_on_a_page_and_metadata_comes_first() -> None:
    body = GOLDEN.read_bytes()
    length = int.from_bytes(body[:8], "little")
    assert (8 + length) % 4096 == 0
    header = json.loads(body[8 : 8 + length])
    assert next(iter(header)) == "__metadata__"
    assert list(header["__metadata__"]) == ["ckpt", "format"]
    assert header["__metadata__"]["format"] == "pt"
    described = json.loads(header["__metadata__"]["ckpt"])
    assert described["push"] == PUSH
    assert described["chunks"]["part#0"][0][2:] == [5, 5]
    assert header["part#0"]["shape"] == [64]


def test_any_safetensors_reader_opens_a_pack() -> None:
    read = load(GOLDEN.read_bytes())
    assert torch.equal(read["weight"], torch.arange(6.0).reshape(2, 3))
    assert read['na"me é'].tolist() == [True, False]
    assert read["complex"].dtype == torch.uint8
    assert read["complex"].shape == (1, 16)
    assert "tensor-2" in read  # a name that a header cannot carry


def test_what_a_pack_says_of_its_chunks_is_read_back() -> None:
    store = MemoryStore()
    tensor = torch.randn(100, dtype=torch.float64)
    writer = PackWriter(store, PUSH, 3, 4000)
    one = source("w", tensor)
    writer.upload.write(writer.add_tensor(one, [digest_of(one.read(0, 800))]), one.read(0, 800))
    finished = writer.finish()
    assert read_pack(store, finished.pack) == finished
    (chunk,) = finished.chunks
    view = memoryview(bytearray(chunk.length))
    store.read_into(finished.pack.key, chunk.offset, view)
    assert digest_of(view) == chunk.digest


@pytest.mark.parametrize(
    "row",
    [
        [1, 12, 12],
        [-1, 12, 12],
        [0, 13, 13],
        [0, 12, 11],
        [0, -1, 12],
        [0, 12, CHUNK_BYTES + 1],
        [0, 12.0, 12],
        ["0", 12, 12],
        [0, 12],
    ],
    ids=str,
)
def test_a_header_whose_chunks_cannot_be_there_is_refused(row: list[object]) -> None:
    store = MemoryStore()
    pack = write_pack(store, {"w": torch.arange(3, dtype=torch.int32)}, chunks=[])
    body, changed = store.objects[pack.key]
    digest = digest_of(bytes(body[-12:]))
    first = json.dumps(json.dumps([digest, 0, 12, 12], separators=(",", ":")))[1:-1].encode()
    other = json.dumps(json.dumps([digest, *row], separators=(",", ":")))[1:-1].encode()
    assert body.count(first) == 1
    header = bytes(body[: len(body) - 12]).replace(first, other).rstrip()
    store.objects[pack.key] = (header.ljust(len(body) - 12) + bytes(body[-12:]), changed)
    with pytest.raises(IntegrityError) as caught:
        read_pack(store, pack)
    assert caught.value.code == "pack-damaged"


def test_a_cut_pack_is_refused() -> None:
    store = MemoryStore()
    pack = write_pack(store, {"w": torch.ones(10)}, [])
    body, modified = store.objects[pack.key]
    store.objects[pack.key] = (body[:-1], modified)
    cut = Pack(pack.id, pack.key, pack.size - 1, pack.push)
    with pytest.raises(IntegrityError) as caught:
        read_pack(store, cut)
    assert caught.value.code == "truncated"


@given(
    st.dictionaries(
        st.text(max_size=20),
        st.tuples(
            st.sampled_from([torch.float32, torch.int64, torch.bool, torch.bfloat16]),
            st.lists(st.integers(0, 4), max_size=3),
        ),
        max_size=8,
    )
)
def test_whatever_the_names_the_header_fits_and_the_library_reads_it(
    spec: dict[str, tuple[torch.dtype, list[int]]],
) -> None:
    store = MemoryStore()
    tensors = {name: torch.ones(shape, dtype=dtype) for name, (dtype, shape) in spec.items()}
    pack = write_pack(store, tensors, chunks=[])
    read = load(store.objects[pack.key][0])
    assert len(read) == len(tensors)
    plain = {name for name in tensors if name and name.isascii() and name.isprintable()}
    assert plain - {"__metadata__"} <= set(read)


class TestPushedPacks:
    """Packs as a push makes them."""

    def packs(self, repo: ckpt.Repository) -> list[Path]:
        return sorted(repo.location.store.glob("packs/*/*"), key=lambda path: path.stat().st_mtime)

    def test_the_pack_of_a_first_push_opens_as_the_models_weights(
        self, repo: ckpt.Repository
    ) -> None:
        net = torch.nn.Sequential(
            torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
        )
        state = net.state_dict()  # both norms hold the same ones and zeros
        repo.push(state, "net")
        (pack,) = self.packs(repo)
        read = load(pack.read_bytes())
        assert set(read) == set(state)
        assert all(torch.equal(read[name], state[name]) for name in state)

    def test_a_tie_is_stored_once_under_its_canonical_name(self, repo: ckpt.Repository) -> None:
        weight = torch.randn(600, 600)
        repo.push({"emb": weight, "head": weight}, "tied", compress="none")
        (pack,) = self.packs(repo)
        with safe_open(pack, "pt") as read:
            assert list(read.keys()) == ["emb"]
        pulled = repo.pull("tied")
        assert pulled["emb"] is pulled["head"]

    def test_large_equal_tensors_are_stored_once(self, repo: ckpt.Repository) -> None:
        one = torch.randn(600, 600)
        version = repo.push({"a": one, "b": one.clone()}, "m")
        assert version.nbytes == 2 * one.nbytes
        assert version.new_bytes < 1.1 * one.nbytes
        pulled = repo.pull("m")
        assert torch.equal(pulled["a"], pulled["b"])
        assert pulled["a"] is not pulled["b"]

    def test_a_tensor_of_equal_chunks_is_stored_as_one_chunk(self, repo: ckpt.Repository) -> None:
        zeros = torch.zeros(40 << 20, dtype=torch.uint8)
        version = repo.push({"z": zeros}, "z")
        assert version.new_bytes < 25 << 20
        assert torch.equal(repo.pull("z")["z"], zeros)

    def test_only_the_changed_chunk_of_a_large_tensor_is_stored(
        self, repo: ckpt.Repository
    ) -> None:
        random = numpy.random.default_rng(0)
        big = torch.from_numpy(random.integers(0, 255, 40 << 20, numpy.uint8))
        repo.push({"w": big}, "m")
        big[17 << 20] += 1
        second = repo.push({"w": big}, "m", compress="none")
        assert 16 << 20 <= second.new_bytes < 17 << 20
        assert torch.equal(repo.pull("m")["w"], big)

    def test_packs_close_after_the_tensor_that_passes_the_limit(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt.storage.packs.PACK_BYTES", 1 << 20)
        state = {f"w{place}": torch.randn(300_000) for place in range(6)}
        version = repo.push(state, "m", compress="none")
        assert len(self.packs(repo)) == 6
        assert all(path.stem.startswith(version.push) for path in self.packs(repo))
        pulled = repo.pull("m")
        assert all(torch.equal(pulled[name], state[name]) for name in state)

    def test_a_pack_closes_before_its_header_would_pass_the_limit(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt.storage.packs.HEADER_BYTES", 8192)
        state = {f"w{place}": torch.tensor(place) for place in range(100)}
        repo.push(state, "m")
        assert len(self.packs(repo)) > 1
        assert repo.pull("m") == state

    def test_a_tensor_of_more_chunks_than_a_header_has_room_for_spans_packs(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for module in ("ckpt.storage.packs", "ckpt.service.upload"):
            monkeypatch.setattr(f"{module}.HEADER_BYTES", 700)
        monkeypatch.setattr("ckpt.storage.packs._PAGE", 64)
        state = {
            "large": torch.arange(10 * CHUNK_BYTES // 4, dtype=torch.int32),
            "usual": torch.ones(3),
        }
        repo.push(state, "m", compress="none")
        assert len(self.packs(repo)) > 1
        assert repo.fsck(read_data=1).is_clean
        pulled = repo.pull("m")
        assert all(torch.equal(pulled[name], state[name]) for name in state)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((1,) * 65, torch.float32),
        ((1,) * 64, torch.complex32),  # which safetensors lacks: as bytes, one dimension more
        ((0, 2**31, 2**31), torch.float32),
    ],
)
def test_a_shape_that_no_header_can_carry_is_stored_flat(
    repo: ckpt.Repository, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    state = {"odd": torch.zeros(shape, dtype=dtype), "usual": torch.ones(3)}
    repo.push(state, "net")
    assert repo.fsck(read_data=1).is_clean
    pulled = repo.pull("net")
    assert pulled["odd"].shape == shape
    assert pulled["odd"].dtype == dtype


def test_keys_fan_out_by_the_push() -> None:
    assert pack_key(f"{PUSH}-12") == f"packs/01/{PUSH}-12.safetensors"
