"""Hostile checkpoints, by what is wrong with them. Whoever unpickled one of the first kind in
earnest would run the command that it is given.
"""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch


def archive(path: Path, body: bytes, *, data: bytes = b"\0" * 64, **how: Any) -> None:
    """A file as ``torch.save`` lays it out, around any pickle."""
    with zipfile.ZipFile(path, "w", **how) as made:
        made.writestr("archive/data.pkl", body)
        made.writestr("archive/byteorder", "little")
        made.writestr("archive/data/0", data)
        made.writestr("archive/version", "3\n")


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def call(module: str, name: str, argument: bytes) -> bytes:
    """A pickle that calls a function with one argument."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."


def long(value: int) -> bytes:
    """The opcode that pushes a whole number."""
    return b"\x8a\x08" + struct.pack("<q", value)


def storage(count: int, key: str = "0") -> bytes:
    """A persistent id of a storage of floats."""
    kind = b"ctorch\nFloatStorage\n"
    return b"(" + text("storage") + kind + text(key) + text("cpu") + long(count) + b"tQ"


def tensor(count: int, offset: int, sizes: tuple[int, ...], steps: tuple[int, ...]) -> bytes:
    """A pickle of a tensor that lies in its storage as it is told."""
    parts = [b"(" + b"".join(map(long, numbers)) + b"t" for numbers in (sizes, steps)]
    hooks = b"ccollections\nOrderedDict\n)R"
    made = b"(" + storage(count) + long(offset) + b"".join(parts) + b"\x89" + hooks + b"t"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + made + b"R."


def laughs(levels: int) -> bytes:
    """Lists of the one list before, twice: few bytes, many values."""
    body = b"\x80\x02]q\x00"
    for level in range(levels):
        known = b"h" + bytes([level])
        body += b"](" + known + known + b"eq" + bytes([level + 1])
    return body + b"."


def built(path: Path, body: bytes) -> None:
    archive(path, body)


def calling(names: tuple[str, str], path: Path, command: str) -> None:
    archive(path, call(*names, text(command)))


def deflated(path: Path) -> None:
    archive(
        path,
        b"\x80\x02X" + struct.pack("<I", 1 << 28) + b"a" * (1 << 28) + b".",
        compression=zipfile.ZIP_DEFLATED,
        compresslevel=1,
    )


def overlapping(path: Path) -> None:
    """A central directory that names one record many times."""
    archive(path, b"\x80\x02}.", data=b"\1" * 4096)
    body = path.read_bytes()
    end = body.rindex(b"PK\5\6")
    start = int.from_bytes(body[end + 16 : end + 20], "little")
    first = body.index(b"PK\1\2", body.index(b"PK\1\2", body.index(b"PK\1\2") + 4) + 4)
    entry = body[first : body.index(b"PK\1\2", first + 4)]
    directory = body[start:end] + entry * 400
    count = struct.pack("<HH", 404, 404)
    tail = body[end : end + 8] + count + struct.pack("<II", len(directory), start) + b"\0\0"
    path.write_bytes(body[:start] + directory + tail)


def legacy(path: Path, command: str) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (command,)

    torch.save({"w": Evil()}, path, _use_new_zipfile_serialization=False)


def script(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02}.")
        made.writestr("archive/constants.pkl", b"\x80\x02).")
        made.writestr("archive/version", "3\n")


Builder = Callable[[Path, str], object]
CALLS = {
    "os.system": ("posix", "system"),
    "os.system by its other name": ("os", "system"),
    "os.popen": ("os", "popen"),
    "eval": ("builtins", "eval"),
    "eval of Python 2": ("__builtin__", "eval"),
    "exec": ("builtins", "exec"),
    "import": ("importlib", "import_module"),
    "subprocess": ("subprocess", "getoutput"),
    "a dotted name": ("torch", "serialization.os.system"),
    "torch.load": ("torch.serialization", "load"),
    "a function of torch": ("torch.hub", "load"),
    "a class of ours": ("ckpt.service.repository", "Repository"),
    "a class that torch itself allows": ("torch.distributed._mesh_layout", "_MeshLayout"),
    "getattr": ("builtins", "getattr"),
    "numpy": ("numpy", "load"),
}
REFUSED: dict[str, Builder] = {
    **{kind: partial(calling, names) for kind, names in CALLS.items()},
    "a legacy file": legacy,
    "a zip bomb": lambda path, _: deflated(path),
    "TorchScript": lambda path, _: script(path),
    "a tar file": lambda path, _: path.write_bytes(b"data.pkl".ljust(257, b"\0") + b"ustar\0" * 99),
    "no magic": lambda path, _: path.write_bytes(b"\x93NUMPY" + b"\0" * 100),
    "an empty file": lambda path, _: path.write_bytes(b""),
}
DAMAGED: dict[str, Builder] = {
    "a huge tensor": lambda path, _: built(path, call("torch", "Tensor", long(1 << 33))),
    "a huge storage": lambda path, _: built(
        path, call("torch.storage", "UntypedStorage", long(1 << 33))
    ),
    "a huge bytearray": lambda path, _: built(path, call("builtins", "bytearray", long(1 << 33))),
    "a huge text": lambda path, _: built(
        path, b"\x80\x02X" + struct.pack("<I", (1 << 32) - 1) + b"a."
    ),
    "a huge memo": lambda path, _: built(
        path, b"\x80\x02]r" + struct.pack("<I", (1 << 32) - 1) + b"h\0."
    ),
    "a storage beyond the file": lambda path, _: built(path, tensor(1 << 40, 0, (1 << 40,), (1,))),
    "a tensor beyond its storage": lambda path, _: built(path, tensor(4, 0, (1 << 30,), (1,))),
    "a tensor before its storage": lambda path, _: built(path, tensor(4, -(1 << 20), (4,), (1,))),
    "a tensor that overlaps itself": lambda path, _: archive(
        path, tensor(1 << 11, 0, (1 << 10, 1 << 10), (1, 1)), data=b"\0" * (1 << 13)
    ),
    "a billion laughs": lambda path, _: built(path, laughs(90)),
    "no stop": lambda path, _: built(path, b"\x80\x02}"),
    "an unknown opcode": lambda path, _: built(path, b"\x80\x02\xff."),
    "an empty pickle": lambda path, _: built(path, b""),
    "records over each other": lambda path, _: overlapping(path),
    "a magic and no more": lambda path, _: path.write_bytes(b"PK\3\4"),
    "no data": lambda path, _: built(path, b"\x80\x02" + storage(4, "9") + b"."),
}
UNSTORABLE: dict[str, Builder] = {
    "a list in itself": lambda path, _: built(path, b"\x80\x02]q\0h\0a."),
    "deep nesting": lambda path, _: built(
        path, b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
    ),
}
