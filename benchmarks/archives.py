"""Ways to keep a series of checkpoints small: ckpt and its peers behind one interface."""

from __future__ import annotations

import importlib
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy
import torch
import zstandard
from blake3 import blake3
from safetensors.torch import load_file, save_file

import ckpt
from benchmarks.states import State, files_below, sync
from ckpt.loader.sources import as_bytes

_Z4AI_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_ZIPNN_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
_LEVEL = 3


class Archive(Protocol):
    """Keeps checkpoints, each a dict of tensors, in the order of a training."""

    def save(self, state: State) -> None:
        """Keep the next one."""

    def load(self) -> Mapping[str, Any]:
        """Read the newest one back."""

    def nbytes(self) -> int:
        """Bytes of all that was kept."""


class Ckpt:
    """A repository on the local disk; durable, every digest checked."""

    def __init__(self, folder: Path, compress: str) -> None:
        self._repo = ckpt.open(folder)
        self._compress = compress

    def save(self, state: State) -> None:
        self._repo.push(state, "series", compress=self._compress)

    def load(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._repo.pull("series")
        return state

    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in files_below(self._repo.location.store))


class Raw:
    """What the disk gives: files as they are, durable; read and hashed by one thread."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._count = 0

    def save(self, state: State) -> None:
        self._count += 1
        path = self._newest()
        save_file(state, path)
        sync(path)

    def load(self) -> Mapping[str, Any]:
        state = load_file(self._newest())
        for tensor in state.values():
            blake3(as_bytes(tensor)).digest()
        return state

    def _newest(self) -> Path:
        return self._folder / f"{self._count}.safetensors"

    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in files_below(self._folder))


class Moonclip:
    """moonclip with its own settings, durable too: its level 9 gives 1 % less at half the speed."""

    def __init__(self, folder: Path) -> None:
        moonclip = importlib.import_module("moonclip")
        folder.mkdir()
        self._folder = folder
        self._manager = moonclip.MoonclipManager(
            str(folder), compression_level=_LEVEL, async_save=False
        )
        self._count = 0
        self._newest = ""

    def save(self, state: State) -> None:
        self._newest = self._manager.save_tensors(self._count, state)
        self._count += 1

    def load(self) -> Mapping[str, Any]:
        state: Mapping[str, Any] = self._manager.load(self._newest)
        return state

    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in files_below(self._folder))


class Codec:
    """A codec of buffers, in memory: of each tensor the bytes that ``encode`` gives for it and the
    one before it, or the first one unless ``chained``; tensors whose names begin with ``alone`` are given
    no other."""

    def __init__(
        self,
        encode: Callable[[torch.Tensor, torch.Tensor | None], bytes],
        decode: Callable[[bytes, torch.Tensor, torch.Tensor | None], Any],
        alone: str | None = None,
        chained: bool = True,
    ) -> None:
        self._encode, self._decode, self._alone = encode, decode, alone
        self._chained = chained
        self._base: State = {}
        self._newest: State = {}
        self._bodies: dict[str, bytes] = {}
        self._sum = 0

    def save(self, state: State) -> None:
        if self._chained or not self._base:
            self._base = self._newest
        self._newest = state
        if self._alone is not None:
            self._base = {n: t for n, t in self._base.items() if not n.startswith(self._alone)}
        self._bodies = {
            name: self._encode(tensor, self._base.get(name)) for name, tensor in state.items()
        }
        self._sum += sum(map(len, self._bodies.values()))

    def load(self) -> Mapping[str, Any]:
        return {
            name: self._decode(body, self._newest[name], self._base.get(name))
            for name, body in self._bodies.items()
        }

    def nbytes(self) -> int:
        return self._sum


def z4ai_delta() -> Codec:
    """z4ai: a delta to the one before; ``exp_avg`` alone, which is shorter."""
    z4ai: Any = importlib.import_module("z4ai")

    def encode(tensor: torch.Tensor, base: torch.Tensor | None) -> bytes:
        raw, dtype = bytes(as_bytes(tensor)), _Z4AI_NAMES[tensor.dtype]
        body: bytes
        if base is None:
            body = z4ai.compress(raw, dtype=dtype)
        else:
            body = z4ai.compress_delta(raw, bytes(as_bytes(base)), dtype=dtype)
        return body

    def decode(body: bytes, tensor: torch.Tensor, base: torch.Tensor | None) -> Any:
        if base is None:
            return z4ai.decompress(body)
        return z4ai.decompress_delta(body, bytes(as_bytes(base)))

    return Codec(encode, decode, alone="exp_avg/")


def zipnn() -> Codec:
    """ZipNN, each tensor alone; what it cannot shorten counts as it is."""
    module: Any = importlib.import_module("zipnn")
    codecs = {
        dtype: module.ZipNN(input_format="byte", bytearray_dtype=name)
        for dtype, name in _ZIPNN_NAMES.items()
    }

    def encode(tensor: torch.Tensor, base: torch.Tensor | None) -> bytes:
        return bytes(codecs[tensor.dtype].compress(bytearray(as_bytes(tensor))))

    def decode(body: bytes, tensor: torch.Tensor, base: torch.Tensor | None) -> Any:
        return codecs[tensor.dtype].decompress(body)

    return Codec(encode, decode)


def xor_zstd(*, chained: bool) -> Codec:
    """XOR with the one before or the first, bytes of equal weight together, zstd, two threads."""

    def encode(tensor: torch.Tensor, base: torch.Tensor | None) -> bytes:
        bits = numpy.frombuffer(as_bytes(tensor), numpy.uint8)
        if base is not None:
            bits = bits ^ numpy.frombuffer(as_bytes(base), numpy.uint8)
        planes = bits.reshape(-1, tensor.element_size()).T
        return zstandard.ZstdCompressor(level=_LEVEL, threads=2).compress(planes.tobytes())

    def decode(body: bytes, tensor: torch.Tensor, base: torch.Tensor | None) -> Any:
        planes = numpy.frombuffer(zstandard.ZstdDecompressor().decompress(body), numpy.uint8)
        bits = planes.reshape(tensor.element_size(), -1).T.copy()
        if base is not None:
            bits ^= numpy.frombuffer(as_bytes(base), numpy.uint8).reshape(bits.shape)
        return bits

    return Codec(encode, decode, chained=chained)


def restic_version() -> str | None:
    """The release of the program restic; None where it is not installed."""
    program = shutil.which("restic")
    if program is None:
        return None
    said = subprocess.run([program, "version"], capture_output=True, text=True, check=True)
    return said.stdout.split()[1]


class Restic:
    """restic's repository with its strongest compression, of ``.safetensors`` files."""

    def __init__(self, folder: Path) -> None:
        self._repository, self._file = folder / "repository", folder / "state.safetensors"
        self._back = folder / "back"
        password = folder / "password"
        password.write_text("benchmark")
        self._command = ["restic", "-q", "-r", str(self._repository), "-p", str(password)]
        self._command += ["--no-cache", "--compression", "max"]
        self._run("init", "--repository-version", "2")

    def _run(self, *arguments: str) -> None:
        subprocess.run([*self._command, *arguments], check=True, capture_output=True)

    def save(self, state: State) -> None:
        save_file(state, self._file)
        sync(self._file)
        self._run("backup", str(self._file))

    def load(self) -> Mapping[str, Any]:
        self._run("restore", "latest", "--target", str(self._back))
        return load_file(self._back / self._file.relative_to("/"))

    def nbytes(self) -> int:
        return sum(path.stat().st_size for path in files_below(self._repository))
