"""Codecs on real training states: bytes and speed by component, and whole series beside peers.

``python -m benchmarks.codecs FOLDER`` trains the states into the folder, if they are not there,
and prints both tables. Peers that are not installed are left out.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from benchmarks.codec_states import COMPONENTS, load_series
from benchmarks.measure import take_turns
from ckpt.core.tensors import chunk_spans
from ckpt.storage.codecs import Effort, Encoded, decode, encode, needs_base

SERIES = ("gpt", "minilm")
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
    return list(
        pool.map(
            lambda pair: encode(pair[0], part.dtype, pair[1], effort=effort),
            zip(part.chunks, bases, strict=True),
        )
    )


def stored(part: Part, encoded: Sequence[Encoded | None]) -> int:
    """The bytes of chunks in a pack."""
    pairs = zip(encoded, part.chunks, strict=True)
    return sum(len(chunk) if one is None else len(one.body) for one, chunk in pairs)


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
            decode(one.codec, one.body, part.bases[index] if needs_base(one.codec) else None, into)

    list(pool.map(read, range(len(part.chunks))))


def component_row(series: str, component: str, part: Part, effort: Effort) -> str:
    """Ratio and speed of one component, beside what memory and zstd alone can do."""
    target, source = bytearray(part.nbytes), b"".join(part.chunks)
    with ThreadPoolExecutor(_THREADS) as pool:
        encoded = encode_all(part, effort, pool)
        alone = Part(part.dtype, part.chunks, [])
        alone_ratio = stored(alone, encode_all(alone, effort, pool)) / part.nbytes
        decode_all(part, encoded, target, pool)
        if target != source:
            raise AssertionError(f"{component} of {series} did not come back")
        contestants: dict[str, Callable[[], object]] = {
            "encode": lambda: encode_all(part, effort, pool),
            "decode": lambda: decode_all(part, encoded, target, pool),
            "zstd": lambda: list(pool.map(_zstd, part.chunks)),
            "copy": lambda: target.__setitem__(slice(None), source),
        }
        timings = take_turns({name: _silent(act) for name, act in contestants.items()})
    speeds = [f"{part.nbytes / timings[name].median / 1e6:.0f}" for name in contestants]
    ratio = stored(part, encoded) / part.nbytes
    cells = [series, component, effort, f"{alone_ratio:.4f}", f"{ratio:.4f}", *speeds]
    return f"| {' | '.join(cells)} |"


def _silent(act: Callable[[], object]) -> Callable[[], None]:
    def run() -> None:
        act()

    return run


def _zstd(chunk: memoryview) -> int:
    return len(zstandard.ZstdCompressor(level=1).compress(chunk))


def series_sizes(states: list[State], effort: Effort, *, chained: bool) -> int:
    """Bytes of a series: a first checkpoint alone, the others against it or the one before."""
    total = 0
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, state in enumerate(states):
            base = states[number - 1 if chained else 0]
            for component, part in parts(base, state):
                if component in COMPONENTS:
                    bases = part.bases if number else []
                    one = Part(part.dtype, part.chunks, bases)
                    total += stored(one, encode_all(one, effort, pool))
    return total


def moonclip_bytes(states: list[State]) -> tuple[int, float, float]:
    """Bytes of a series in a moonclip store, and MB/s of its saves and loads (medians)."""
    moonclip: Any = importlib.import_module("moonclip")
    saves, loads = [], []
    nbytes = sum(array.nbytes for array in states[0].values())
    with tempfile.TemporaryDirectory() as folder:
        manager = moonclip.MoonclipManager(folder, async_save=False)
        for number, state in enumerate(states):
            tensors = {
                name: (list(array.shape), "float32", array.tobytes())
                for name, array in state.items()
            }
            start = time.perf_counter()
            snapshot = manager.save_tensors(number, tensors)
            saves.append(time.perf_counter() - start)
            start = time.perf_counter()
            manager.load(snapshot)
            loads.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    save, load = (nbytes / float(np.median(one)) / 1e6 for one in (saves, loads))
    return size, save, load


def z4ai_bytes(states: list[State]) -> dict[bool, int]:
    """Bytes of a series with z4ai, of each tensor the shorter of delta and alone; by ``chained``."""
    z4ai: Any = importlib.import_module("z4ai")
    totals = {False: 0, True: 0}
    for number, state in enumerate(states):
        for name, array in state.items():
            raw = array.tobytes()
            alone = len(z4ai.compress(raw, dtype="fp32"))
            for chained in totals:
                base = states[number - 1 if chained else 0][name].tobytes()
                delta = len(z4ai.compress_delta(raw, base, dtype="fp32")) if number else alone
                totals[chained] += min(alone, delta)
    return totals


def series_rows(series: str, states: list[State]) -> Iterator[str]:
    """Bytes of a whole series over its raw bytes, with each way to choose bases."""
    raw = sum(array.nbytes for state in states for array in state.values())
    rules = {False: "the first", True: "the one before"}
    for chained, rule in rules.items():
        for effort in EFFORTS:
            size = series_sizes(states, effort, chained=chained)
            yield f"| {series} | ckpt {effort} | {rule} | {size / raw:.4f} |"
    if importlib.util.find_spec("moonclip"):
        size, save, load = moonclip_bytes(states)
        name = f"moonclip ({save:.0f} MB/s save, {load:.0f} MB/s load)"
        yield f"| {series} | {name} | the last full one | {size / raw:.4f} |"
    if importlib.util.find_spec("z4ai"):
        for chained, size in z4ai_bytes(states).items():
            yield f"| {series} | z4ai | {rules[chained]} | {size / raw:.4f} |"


def main() -> None:
    """Measure and print."""
    folder = Path(sys.argv[1])
    all_states = {series: load_series(series, folder) for series in SERIES}
    print(
        "| series | component | effort | alone | difference | encode, MB/s | decode | zstd | copy |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for series, states in all_states.items():
        for component, part in parts(states[4], states[5]):
            for effort in EFFORTS:
                print(component_row(series, component, part, effort), flush=True)
    print("\n| series | | base | bytes over raw |\n|---|---|---|---|")
    for series, states in all_states.items():
        for row in series_rows(series, states):
            print(row, flush=True)


if __name__ == "__main__":
    main()
