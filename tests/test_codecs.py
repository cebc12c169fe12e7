"""Codecs of chunks: nothing is ever changed, lost or made longer, and damage is told."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from trials import Trials

from ckpt.core.dtypes import ITEM_SIZES
from ckpt.core.errors import IntegrityError
from ckpt.storage import codecs, differences, groups, planes
from ckpt.storage.codecs import NAMES, Effort, Encoded, decode, encode, needs_base
from ckpt.storage.differences import ELEMENTS, Element

_EFFORTS: tuple[Effort, ...] = ("auto", "max")
_FLOATS = ("float16", "bfloat16", "float32", "float64", "complex64")
# Bit patterns, as float32, that a detour through arithmetic would change.
_HARD = np.array(
    [0, 1 << 31, 1, 0x807FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF],
    np.uint32,
)


def _training(count: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights like a trained layer's, and the same some steps earlier."""
    random_numbers = np.random.default_rng(seed)
    base = random_numbers.standard_normal(count).astype(np.float32) * np.float32(0.02)
    step = random_numbers.standard_normal(count).astype(np.float32) * np.float32(1e-4)
    return base + step, base


def _bytes(array: NDArray[Any]) -> memoryview:
    return memoryview(array.tobytes())


def _as_dtype(values: NDArray[np.float32], dtype: str) -> memoryview:
    """The bytes of ``values`` in a torch dtype, near enough to be like real ones."""
    if dtype == "bfloat16":
        return _bytes((values.view(np.uint32) >> 16).astype(np.uint16))
    if dtype == "float64":  # with a mantissa that is full
        return _bytes(values.astype(np.float64) * 1.1)
    return _bytes(values if dtype == "complex64" else values.astype(dtype))


def encoded_in_room(
    raw: memoryview, dtype: str, base: memoryview | None, effort: Effort
) -> Encoded | None:
    """The same, wherever the base lies."""
    apart = encode(raw, dtype, base, memoryview(bytearray(len(raw))), effort=effort)
    if base is not None:
        room = memoryview(bytearray(base))
        assert encode(raw, dtype, room, room, effort=effort) == apart
    return apart


def _round_trip(encoded: Encoded, base: memoryview | None, length: int) -> bytes:
    """The same, wherever the base lies."""
    body = b"".join(encoded.parts)
    reference = base if needs_base(encoded.codec) else None
    into = bytearray(b"\xa5" * length)
    decode(encoded.codec, body, reference, memoryview(into))
    if reference is not None:
        room = memoryview(bytearray(reference))
        decode(encoded.codec, body, room, room)
        assert room == into
    elif len(body) <= length:
        room = memoryview(bytearray(body.ljust(length)))
        decode(encoded.codec, room[: len(body)], None, room)
        assert room == into
    return bytes(into)


def _check(raw: memoryview, dtype: str, base: memoryview | None) -> None:
    """Whatever is chosen gives the chunk back, and saves what was promised."""
    for effort in _EFFORTS:
        encoded = encoded_in_room(raw, dtype, base, effort)
        if encoded is not None:
            assert _round_trip(encoded, base, len(raw)) == raw
            assert encoded.nbytes <= (0.9 if effort == "auto" else 0.98) * len(raw)


# --- numbers -------------------------------------------------------------------------------


@pytest.mark.parametrize("element", ELEMENTS.values(), ids=list(ELEMENTS))
def test_every_bit_pattern_comes_back_from_rotation_and_zigzag(element: Element) -> None:
    bits = np.frombuffer(random.Random(1).randbytes(8 * 5000), element.dtype)
    edges = np.array([0, 1, 2, -1, -2], np.int64).astype(element.dtype)
    for values in (bits, edges):
        assert np.array_equal(
            differences.rotated_back(differences.rotated(values, element), element), values
        )
        codes, spare = values.copy(), np.empty_like(values)
        differences.zigzag_back(differences.zigzag(codes, spare), spare)
        assert np.array_equal(codes, values)


def test_zigzag_makes_small_changes_small() -> None:
    changes = np.array([0, -1, 1, -2, 2], np.int32).view(np.uint32)
    assert differences.zigzag(changes, np.empty_like(changes)).tolist() == [0, 1, 2, 3, 4]


def test_a_scaled_base_never_depends_on_numbers_that_a_processor_may_flush() -> None:
    """Zeros, denormals, infinities, NaN, and what would become one, are predicted unscaled."""
    element = ELEMENTS["f32"]
    tiny = np.array([31 << 23, 232 << 23, (31 << 23) | 0x80000000], np.uint32)
    base = np.concatenate([_HARD, tiny])
    assert np.array_equal(differences.predicted(base, element, 0.35), base)
    normal = np.array([1.5, -3.0], np.float32)
    half = differences.predicted(normal.view(np.uint32), element, 0.5)
    assert half.view(np.float32).tolist() == [0.75, -1.5]


def test_the_common_decay_of_moments_is_found() -> None:
    _, base = _training(5000)
    values = base.copy()
    values[1000:] *= np.float32(0.3487)
    scale = differences.guess_scale(values.view(np.uint32), base.view(np.uint32), ELEMENTS["f32"])
    assert scale == pytest.approx(0.3487, rel=1e-6)
    unrelated, base = _training(5000)[0], _training(5000, seed=1)[1]
    assert (
        differences.guess_scale(unrelated.view(np.uint32), base.view(np.uint32), ELEMENTS["f32"])
        == 1
    )


def _by_blocks(rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Planes, block by block."""
    parts = differences.blocks(rows.shape[1])
    return np.concatenate([rows[:, part].reshape(-1) for part in parts])


# --- coders --------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", _EFFORTS)
def test_planes_come_back_and_noise_stays_raw(effort: Effort) -> None:
    noise = np.frombuffer(random.Random(2).randbytes(5000), np.uint8)
    zeros = np.zeros(5000, np.uint8)
    rows = np.stack([noise, zeros, noise % 7, zeros])
    body = b"".join(planes.write_planes(_by_blocks(rows), 4, effort))
    assert len(body) < 5000 + 3000
    assert np.array_equal(planes.read_planes(memoryview(body), 4, 5000), rows)


def test_a_plane_is_not_unpacked_to_more_than_its_length() -> None:
    """A frame that announces gigabytes is refused before anything is allocated."""
    bomb = b"\x28\xb5\x2f\xfd\xe0" + (1 << 40).to_bytes(8, "little") + b"\x03\x00\x00"
    body = b"\x01" + len(bomb).to_bytes(4, "little") + bomb
    with pytest.raises(IntegrityError):
        planes.read_planes(memoryview(body), 1, 100)


@pytest.mark.parametrize("count", [0, 1, 4095, 4096, 70_000, 200_001])
def test_order_is_by_exponent_stable_and_undone(count: int) -> None:
    element = ELEMENTS["f32"]
    base = _training(count)[1].view(np.uint32)
    order = groups.Order(element)
    codes = np.empty(count, np.uint32)
    parts = list(differences.blocks(count))
    places = [order.add(base[part]) for part in parts]
    for part, places_of_part in zip(parts, places, strict=True):
        codes[part] = base[part][places_of_part]
    ordered = np.concatenate([[], *map(np.copy, order.gather(codes))]).astype(np.uint32)
    expected = base[np.argsort((base >> 23) & 0xFF, kind="stable")]
    assert np.array_equal(ordered, expected)
    for index, part in enumerate(parts):
        assert np.array_equal(order.take(index, places[index], ordered), base[part])
    assert [group.start for group in order.groups[1:]] == [g.stop for g in order.groups[:-1]]
    assert sum(group.stop - group.start for group in order.groups) == count


# --- codecs --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_every_dtype_comes_back_alone_and_as_a_difference(dtype: str) -> None:
    values, base = _training(150_000)
    raw, old = (
        _bytes((one * 1000).astype(np.int16)) if ITEM_SIZES[dtype] < 4 else _bytes(one)
        for one in (values, base)
    )
    for reference in (None, old, raw):
        _check(raw, dtype, reference)


@pytest.mark.parametrize("dtype", _FLOATS)
@pytest.mark.parametrize("effort", _EFFORTS)
def test_trained_floats_shrink_and_their_differences_more(dtype: str, effort: Effort) -> None:
    values, base = _training(150_000)
    raw, old = _as_dtype(values, dtype), _as_dtype(base, dtype)
    alone = encoded_in_room(raw, dtype, None, "max")
    difference = encoded_in_room(raw, dtype, old, effort)
    assert alone is not None
    assert difference is not None
    assert not needs_base(alone.codec)
    assert needs_base(difference.codec)
    assert difference.nbytes < 0.95 * alone.nbytes < 0.95 * len(raw)


def test_more_effort_is_shorter() -> None:
    values, base = _training(150_000)
    lengths = {}
    for effort in _EFFORTS:
        encoded = encoded_in_room(_bytes(values), "float32", _bytes(base), effort)
        assert encoded is not None
        lengths[effort] = encoded.nbytes
    assert lengths["max"] < lengths["auto"]


def test_a_moment_that_only_decayed_costs_little() -> None:
    """AdamW's moments of an embedding row that was not seen: the base times a power of beta."""
    _, base = _training(200_000)
    values = base
    for _ in range(10):
        values = values * np.float32(0.9)
    for effort in _EFFORTS:
        encoded = encoded_in_room(_bytes(values), "float32", _bytes(base), effort)
        assert encoded is not None
        assert encoded.nbytes < 0.2 * values.nbytes
        assert _round_trip(encoded, _bytes(base), values.nbytes) == values.tobytes()


@pytest.mark.parametrize("effort", _EFFORTS)
def test_an_unrelated_base_is_not_used(effort: Effort) -> None:
    values, base = _training(150_000)[0], _training(150_000, seed=1)[1]
    encoded = encoded_in_room(_bytes(values), "float32", _bytes(base), effort)
    assert encoded is not None
    assert not needs_base(encoded.codec)


@pytest.mark.parametrize("effort", _EFFORTS)
def test_noise_is_stored_raw(effort: Effort) -> None:
    noise = memoryview(random.Random(3).randbytes(300_000))
    for dtype in ("uint8", "bfloat16", "float32", "float64"):
        assert encoded_in_room(noise, dtype, None, effort) is None
        assert encoded_in_room(noise, dtype, memoryview(bytes(300_000)), effort) is None


@pytest.mark.parametrize("effort", _EFFORTS)
def test_a_chunk_that_equals_its_base_costs_nearly_nothing(effort: Effort) -> None:
    noise = memoryview(random.Random(4).randbytes(400_000))
    for dtype in ("uint8", "int16", "float32", "float64"):
        encoded = encoded_in_room(noise, dtype, noise, effort)
        assert encoded is not None
        assert encoded.nbytes < 8000
        assert _round_trip(encoded, noise, len(noise)) == noise


@pytest.mark.parametrize("dtype", ["uint8", "bfloat16", "float32", "float64"])
def test_the_shortest_chunks_come_back(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are stored raw, as they do not pay; every codec can hold them all the same."""
    assert encoded_in_room(memoryview(bytes(4000)), dtype, None, "max") is None
    monkeypatch.setattr(codecs, "_LEAST", 0)
    monkeypatch.setattr(codecs, "_MOST", {"auto": 1000.0, "max": 1000.0})
    for length in range(1, 70):
        raw = memoryview(random.Random(length).randbytes(length))
        for base in (None, raw, memoryview(bytes(length))):
            for effort in _EFFORTS:
                encoded = encoded_in_room(raw, dtype, base, effort)
                assert encoded is not None
                assert _round_trip(encoded, base, length) == raw


@pytest.mark.parametrize("effort", _EFFORTS)
def test_text_shrinks(effort: Effort) -> None:
    text = memoryview(__doc__.encode() * 200)
    encoded = encoded_in_room(text, "uint8", None, effort)
    assert encoded is not None
    assert encoded.nbytes < len(text) / 10


def test_bits_that_arithmetic_would_change_come_back() -> None:
    """NaN with payloads, -0.0, denormals, infinities, against bases of the same kind."""
    values, base = _training(60_000)
    for seed in range(3):
        places = np.random.default_rng(seed).integers(0, 60_000, (2, 9000))
        values.view(np.uint32)[places[0]] = np.tile(_HARD, 1000)
        base.view(np.uint32)[places[1]] = np.tile(_HARD, 1000)
        for dtype in ("float32", "bfloat16", "float64", "complex64"):
            _check(_bytes(values), dtype, _bytes(base))


def test_the_base_has_the_length_of_the_chunk() -> None:
    with pytest.raises(ValueError, match="a base of 8 bytes"):
        encoded_in_room(memoryview(bytes(16)), "float32", memoryview(bytes(8)), "auto")


def test_what_is_not_known_is_told() -> None:
    for name in ("", "zstd", "planes-alone-f33", "pco-alone-u8"):
        with pytest.raises(IntegrityError, match="not known"):
            needs_base(name)
        with pytest.raises(IntegrityError, match="not known"):
            decode(name, b"", None, memoryview(bytearray(4)))


@given(
    dtype=st.sampled_from(sorted(ITEM_SIZES)),
    length=st.integers(0, 40_000),
    kind=st.sampled_from(["noise", "small", "training", "hard"]),
    base_kind=st.sampled_from(["none", "same", "near", "noise", "zeros"]),
    seed=st.integers(0, 1 << 32),
)
@settings(max_examples=150)
def test_any_chunk_of_any_length_comes_back(
    dtype: str, length: int, kind: str, base_kind: str, seed: int
) -> None:
    """Also empty ones, single elements, and lengths that the item size does not divide."""
    chance = random.Random(seed)
    raw = _content(kind, length, chance)
    base: bytes | None = None
    if base_kind == "same":
        base = raw
    elif base_kind == "near":
        near = bytearray(raw)
        for _ in range(length // 50):
            near[chance.randrange(length)] ^= 1 << chance.randrange(8)
        base = bytes(near)
    elif base_kind != "none":
        base = chance.randbytes(length) if base_kind == "noise" else bytes(length)
    _check(memoryview(raw), dtype, None if base is None else memoryview(base))


def _content(kind: str, length: int, chance: random.Random) -> bytes:
    if kind == "noise":
        return chance.randbytes(length)
    if kind == "small":
        return bytes(chance.choices(range(5), k=length))
    values = _training(length // 4 + 1, chance.randrange(1000))[0]
    if kind == "hard":
        values.view(np.uint32)[::3] = chance.choice(_HARD.tolist())
    return values.tobytes()[:length]


# --- the format ----------------------------------------------------------------------------

_FIXTURES = Path(__file__).parent / "fixtures" / "codecs"


def _golden(name: str) -> tuple[bytes, bytes | None]:
    """The chunk that the fixture of a codec holds, and its base: whole numbers by a formula."""
    element = ELEMENTS[name.rpartition("-")[2]]
    index = np.arange(9000, dtype=np.uint64)
    bits = index * 7 % 32
    if element.mantissa is not None:
        bias = {"f16": 12, "bf16": 112, "f32": 112, "f64": 1000}[element.name]
        exponent = (index % 3 + bias) << np.uint64(element.mantissa)
        sign = np.uint64(8 * element.size - 1)
        bits = (bits << np.uint64(element.mantissa - 5)) + exponent + ((index % 11 == 0) << sign)
    base = bits.astype(element.dtype)
    scale = 0.5 if element.name == "f32" else 1.0
    change = (index % 5).astype(element.dtype)
    values = differences.predicted(base, element, scale) + change - element.dtype.type(2)
    return values.tobytes(), base.tobytes() if needs_base(name) else None


@pytest.mark.parametrize("name", NAMES)
def test_what_the_first_release_wrote_stays_readable(name: str) -> None:
    raw, base = _golden(name)
    body = (_FIXTURES / f"{name}.bin").read_bytes()
    into = bytearray(len(raw))
    decode(name, body, None if base is None else memoryview(base), memoryview(into))
    assert into == raw


def test_every_fixture_is_of_a_codec_that_is_known() -> None:
    assert sorted(path.stem for path in _FIXTURES.iterdir()) == sorted(NAMES)


def test_a_body_byte_for_byte() -> None:
    """Two elements as the format page describes them: one change of +1, one of -2."""
    base = np.array([1.5, -2.0], np.float32)
    raw = (base.view(np.uint32) + np.array([1, -2], np.int32).view(np.uint32)).tobytes()
    planes_body = b"".join(b"\x00\x02\x00\x00\x00" + row for row in (b"\x02\x03", *[bytes(2)] * 3))
    body = b"\x00\x00\x80\x3f" + planes_body  # unscaled; then four raw planes of two bytes
    into = bytearray(8)
    decode("planes-difference-f32", body, _bytes(base), memoryview(into))
    assert into == raw


# --- damage --------------------------------------------------------------------------------


def _damaged(body: bytes, chance: random.Random) -> bytes:
    hurt = bytearray(body)
    for _ in range(chance.choice((1, 1, 2, 8, 40))):
        at = chance.randrange(min(len(hurt), chance.choice((12, 60, 1 << 20))))
        match chance.randrange(5):
            case 0:
                del hurt[at:]
            case 1:
                hurt[at:at] = chance.randbytes(chance.randrange(1, 9))
            case 2:
                hurt[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF))
            case _:
                hurt[at] ^= 1 << chance.randrange(8)
        if not hurt:
            return b""
    return bytes(hurt)


@pytest.mark.torture("codecs", unit="damaged bodies")
def test_damage_ends_in_an_error_or_in_other_bytes(trials: Trials) -> None:
    """Never in a crash, another error, bytes outside of the chunk, or memory without bound."""
    for seed in trials.seeds(1):
        chance = random.Random(seed)
        tracemalloc.start()
        for name in NAMES:
            raw, base = _golden(name)
            body = (_FIXTURES / f"{name}.bin").read_bytes()
            reference = None if base is None else memoryview(base)
            for _ in range(700):
                room = bytearray(b"\xa5" * (len(raw) + 16))
                into = memoryview(room)[8:-8]
                with contextlib.suppress(IntegrityError):
                    decode(name, _damaged(body, chance), reference, into)
                assert room[:8] == room[-8:] == b"\xa5" * 8
            trials.count(700)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 8 << 20


def test_with_auto_a_plane_that_is_all_but_noise_stays_as_it_is() -> None:
    """And with ``max`` it does not: 5 % are saved of it."""
    noise = np.random.default_rng(0)
    plane = noise.normal(128, 45, 200_000).astype(np.int64).astype(np.uint8)  # 7.5 of 8 bits
    quiet = noise.integers(0, 4, 200_000).astype(np.uint8)
    sizes = {}
    for effort in ("auto", "max"):
        both = _by_blocks(np.stack([plane, quiet]))
        body = b"".join(planes.write_planes(both, 2, effort))
        read = planes.read_planes(memoryview(body), 2, 200_000)
        assert np.array_equal(read[0], plane)
        assert np.array_equal(read[1], quiet)
        sizes[effort] = len(body)
    assert 200_000 < sizes["max"] < sizes["auto"] < 260_000
