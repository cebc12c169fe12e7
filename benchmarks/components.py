"""The codecs of chunks on real training states: bytes and speed by component, in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import zstandard
from safetensors.numpy import load_file

from benchmarks.codec_states import COMPONENTS, train_series
from benchmarks.measure import QUICK, take_turns
from benchmarks.table import Bar, Table
from ckpt.core.tensors import chunk_spans
from ckpt.storage.codecs import Effort, Encoded, decode, encode, needs_base
from ckpt.storage.scratch import scratch

SERIES = ("gpt",) if QUICK else ("gpt", "minilm")
_STEP = 5  # the checkpoint that is encoded, against the one before
EFFORTS: tuple[Effort, ...] = ("auto", "max")
_THREADS = 2

State = dict[str, np.ndarray]
Chunks = list[memoryview]


@dataclass(frozen=True, slots=True)
class Part:
    """The chunks of one component of a checkpoint, and of the one before it."""

    dtype: str
    chunks: Chunks
    bases: Chunks

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.chunks))


def parts(previous: State, current: State) -> Iterator[tuple[str, Part]]:
    """Every component of a checkpoint; the weights a second time in bfloat16."""
    for component in COMPONENTS:
        old, new = (_of(state, component) for state in (previous, current))
        yield component, Part("float32", _chunks(new), _chunks(old))
    old, new = ([_rounded(one) for one in _of(state, "weights")] for state in (previous, current))
    yield "weights, bf16", Part("bfloat16", _chunks(new), _chunks(old))


def _of(state: State, component: str) -> list[np.ndarray]:
    return [array for name, array in state.items() if name.startswith(f"{component}/")]


def _rounded(array: np.ndarray) -> np.ndarray:
    """float32 as the nearest bfloat16, ties to even."""
    bits = array.reshape(-1).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _chunks(arrays: Sequence[np.ndarray]) -> Chunks:
    return [
        array.reshape(-1).view(np.uint8).data[at : at + length]
        for array in arrays
        for at, length in chunk_spans(array.nbytes)
    ]


def encode_all(part: Part, effort: Effort, pool: ThreadPoolExecutor) -> list[Encoded | None]:
    """Encode every chunk as a push would."""
    bases: Sequence[memoryview | None] = part.bases or [None] * len(part.chunks)

    def act(chunk: memoryview, base: memoryview | None) -> Encoded | None:
        return encode(chunk, part.dtype, base, scratch("chunk", len(chunk)), effort=effort)

    return list(pool.map(act, part.chunks, bases))


def stored(part: Part, encoded: Sequence[Encoded | None]) -> int:
    """The bytes of chunks in a pack."""
    pairs = zip(encoded, part.chunks, strict=True)
    return sum(len(chunk) if one is None else one.nbytes for one, chunk in pairs)


def decode_all(
    part: Part, encoded: Sequence[Encoded | None], target: bytearray, pool: ThreadPoolExecutor
) -> None:
    """Decode every chunk into its place in ``target``."""
    ends = np.cumsum([len(chunk) for chunk in part.chunks]).tolist()

    def read(index: int) -> None:
        chunk, one = part.chunks[index], encoded[index]
        into = memoryview(target)[ends[index] - len(chunk) : ends[index]]
        if one is None:
            into[:] = chunk
        else:
            (body,) = one.parts
            decode(one.codec, body, part.bases[index] if needs_base(one.codec) else None, into)

    list(pool.map(read, range(len(part.chunks))))


def measure(folder: Path) -> Table:
    """Every component of both series, with each effort."""
    rows: list[tuple[str, ...]] = []
    bars: list[Bar] = []
    for series in SERIES:
        files = train_series(series)
        previous, current = (load_file(files[number]) for number in (_STEP - 1, _STEP))
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for component, part in parts(previous, current):
            for effort in EFFORTS:
                row, ratios = _component(series, component, part, effort)
                rows.append(row)
                found[component, effort] = ratios
                bars.append(Bar(f"{series}, {component}, {effort}", ratios[0]))
        for effort in EFFORTS:
            three = zip(*(found[component, effort] for component in COMPONENTS), strict=True)
            changed, alone = (f"{fmean(ratios):.4f}" for ratios in three)
            rows.append((series, changed, "the three in fp32", effort, alone, "", "", "", ""))
    return Table(
        title="Components of a checkpoint",
        compared="One AdamW checkpoint of each series, ten steps after its base: the codecs alone, in memory, on two threads. *Alone* is without a base. *The three* are what each checkpoint but the first would take if a base could be a difference. Ceilings are a copy, and zstd level 1 on the raw bytes.",
        columns=(
            "",
            "bytes over raw",
            "component",
            "compress",
            "alone",
            "encode, MB/s",
            "decode, MB/s",
            "ceiling: zstd, MB/s",
            "ceiling: copy, MB/s",
        ),
        rows=tuple(rows),
        axis="bytes over raw",
        bars=tuple(bars),
        packages=("zstandard", "pcodec"),
    )


def _component(
    series: str, component: str, part: Part, effort: Effort
) -> tuple[tuple[str, ...], tuple[float, float]]:
    """The row of one component, beside what memory and zstd alone can do, and its bytes over raw,
    with its base and alone."""
    target, source = bytearray(part.nbytes), b"".join(part.chunks)
    with ThreadPoolExecutor(_THREADS) as pool:
        # As a pull finds them: in one piece.
        encoded = [
            None if one is None else Encoded(one.codec, (b"".join(one.parts),))
            for one in encode_all(part, effort, pool)
        ]
        alone = Part(part.dtype, part.chunks, [])
        alone_ratio = stored(alone, encode_all(alone, effort, pool)) / part.nbytes
        decode_all(part, encoded, target, pool)
        if target != source:
            raise AssertionError(f"{component} of {series} did not come back")
        contestants: dict[str, Callable[[], object]] = {
            "ckpt encode": lambda: encode_all(part, effort, pool),
            "ckpt decode": lambda: decode_all(part, encoded, target, pool),
            "zstd": lambda: list(pool.map(_zstd, part.chunks)),
            "copy": lambda: target.__setitem__(slice(None), source),
        }
        turns = take_turns(contestants)
    speeds = [f"{part.nbytes / turns[name] / 1e6:.0f}" for name in contestants]
    ratio = stored(part, encoded) / part.nbytes
    row = (series, f"{ratio:.4f}", component, effort, f"{alone_ratio:.4f}", *speeds)
    return row, (ratio, alone_ratio)


def _zstd(chunk: memoryview) -> int:
    return len(zstandard.ZstdCompressor(level=1).compress(chunk))
