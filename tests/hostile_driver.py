"""Hostile tensors, probes and bytes, and the program that loads every hostile document.

It loads each from a real repository under an audit hook, and prints one line of JSON by attack:
what came out, what it cost, and every event that is not allowed.
"""

from __future__ import annotations

import json
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import hostile_loads
import torch
from hostile_loads import (
    CHUNKS,
    CONVOLUTION,
    FOUR,
    LINEAR,
    NESTED,
    PROBED,
    PRUNED,
    RECURRENT,
    RELU,
    damaged,
    entry,
    holding,
    of_tensors,
    stored,
)
from msgspec.structs import replace

import ckpt
from ckpt.core.documents import Document, Tensor, decode_document, encode_document
from ckpt.core.errors import CkptError
from ckpt.core.printable import is_printable
from ckpt.loader.tree import module_tree

# Audit events by which a load could do anything beyond computing.
_WATCHED = (
    *("import", "exec", "compile", "open", "code.__new__", "function.__new__", "marshal", "pickle"),
    *("os.", "subprocess", "socket", "ctypes", "shutil", "mmap", "glob", "tempfile", "pty"),
    *("webbrowser", "urllib", "http", "ftplib", "smtplib", "sqlite3", "syslog", "cpython"),
)


_REGION = entry(FOUR, name="r", kind="region", dtype="uint8", shape=(16,))
_AFFINE = {"scheme": "per_tensor_affine", "scale": 1.0, "zero_point": 0}


def quantized(shape: tuple[int, ...], integers: Tensor, details: dict[str, Any]) -> list[Tensor]:
    """A quantised entry, its integers, and two scales and zero points that it may refer to."""
    roles = {"integers": 1}
    if "axis" in details:
        roles |= {"scales": 2, "zero_points": 3}
    return [
        Tensor(
            name="x",
            dtype="quint8",
            layout="quantized",
            shape=shape,
            components=roles,
            details=details,
        ),
        integers,
        entry(struct.pack("<2d", 1, 1), name="s", dtype="float64", shape=(2,)),
        entry(bytes(16), name="z", dtype="int64", shape=(2,)),
    ]


def of_one_byte() -> dict[str, list[Tensor]]:
    """Entries that would take any room or time, of one element that is stored."""
    byte = entry(FOUR[:1], name="i", dtype="uint8", shape=(2**33,), strides=(0,))
    pair = {"indices": 1, "values": 2}
    index = entry(bytes(8), name="i", dtype="int64", shape=(1, 2**40), strides=(1, 0))
    return {
        "quantised of one byte": quantized((2**33,), byte, _AFFINE),
        "sparse of one index": [
            entry(shape=(4,), layout="sparse_coo", details={"coalesced": False}, components=pair),
            index,
            entry(FOUR[:4], name="v", shape=(2**40,), strides=(0,)),
        ],
        "array of one byte": [
            replace(byte, kind="ndarray", details={"numpy": "|V1", "shape": [2**33]})
        ],
        "region repeated": [
            entry(region=1, shape=(4,)),
            replace(_REGION, shape=(2**40,), strides=(0,), chunks=stored(b"\0")),
        ],
        "50,000 dimensions": [entry(shape=(2**62,) * 50_000)],
        "50,000 dimensions of a view": [entry(region=1, shape=(2**62,) * 50_000), _REGION],
        "repeated beyond counting": [entry(FOUR[:4], shape=(2**62, 2**62), strides=(0, 0))],
        "no room": [entry(shape=(0, 2**70))],
    }


def contradictory() -> dict[str, list[Tensor]]:
    """Entries whose bytes, shapes and parts contradict each other."""
    code = {"numpy": "(2,2)f4", "shape": [1]}
    four = entry(FOUR[:4], name="i", dtype="uint8", shape=(2, 2))
    found = {
        "strides of any size": [entry(FOUR, shape=(4, 1), strides=(1, 2**70))],
        "strides that overlap": [entry(FOUR, shape=(2, 2), strides=(1, 1))],
        "strides with gaps": [entry(FOUR, strides=(5,))],
        "quantised without a scale": [entry(FOUR, dtype="quint8", shape=(16,))],
        "array by code": [entry(FOUR, dtype="uint8", shape=(16,), kind="ndarray", details=code)],
        "region by strides": [
            entry(region=1, shape=(2,)),
            replace(_REGION, align=4, strides=(1,)),
        ],
        "region of whole words": [entry(FOUR, kind="region", align=4)],
        "region of nothing": [entry(region=1, shape=(2,)), entry(region=0, name="y", shape=(2,))],
    }
    for axis in (-1, 2, 2**40):
        details = {"scheme": "per_channel_affine", "axis": axis}
        found[f"axis {axis}"] = quantized((2, 2), four, details)
    details = {"scheme": "per_channel_affine", "axis": 1}
    found["scales of another length"] = quantized((1, 4), replace(four, shape=(1, 4)), details)
    return found


def tensors() -> dict[str, Any]:
    """Every hostile entry, as an attribute; states of generators; devices that are not here."""
    found = of_one_byte() | contradictory()
    coded = damaged({f"tensor {name}": of_tensors(*one) for name, one in found.items()})
    state = torch.Generator().get_state().numpy().tobytes()
    for word, body in {"zeros": bytes(5056), "ones": b"\xff" * 5056, "more": state + b"\0"}.items():
        given = entry(body, dtype="uint8", shape=(len(body),))
        document = of_tensors(given, value={"$generator": ["cpu", 0]})
        coded[f"generator of {word}"] = (document, "document-damaged")
    many = entry(FOUR[:4], shape=(1,) * 5000)
    coded["tensor of 5000 dimensions"] = (of_tensors(many), "done")
    escapes = of_tensors(entry(FOUR, dtype="\x1b[31m"))
    coded["tensor escapes in a dtype"] = (escapes, "dtype-unknown")
    for device in ("meta", "mkldnn", "xla", "mps", "privateuseone", "cuda:127"):
        coded[f"tensor on {device}"] = (of_tensors(entry(FOUR, device=device)), "done")
    return coded


def probes() -> dict[str, Any]:
    """Recorded outputs that no forward gives, and conditions that would import."""
    probe = PROBED.probe
    assert probe is not None
    count = len(probe.tensors)
    pairs = dict(probe.root["$dict"])

    def of(outputs: Any, *more: Tensor, **changes: Any) -> Document:
        values = {**pairs, "outputs": {"$dict": outputs}, "reference": {"$dict": []}}
        root = {"$dict": sorted(values.items())}
        changed = replace(probe, root=root, tensors=(*probe.tensors, *more), **changes)
        return replace(PROBED, probe=changed)

    new = [["output", {"$tensor": count}]]
    coded: dict[str, Any] = {
        "outputs by number": (of([[5, {"$tensor": count}]], entry(FOUR)), "document-damaged"),
        "output without values": (
            of(new, entry(shape=(), kind="uninitialized-parameter")),
            "document-damaged",
        ),
        "output of half bytes": (
            of(new, entry(FOUR[:2], dtype="float4_e2m1fn_x2", shape=(1, 2))),
            "outputs-differ",
        ),
    }
    for dtype in ("_inductor", "int64", "quint8", "float8_e5m2", "__class__"):
        conditions = replace(probe.conditions, flags={"default_dtype": dtype})
        document = replace(PROBED, probe=replace(probe, conditions=conditions))
        coded[f"default dtype {dtype}"] = (document, "document-damaged")
    conditions = replace(probe.conditions, name="\x1b]0;x\x07\n", build="\u202e")
    coded["escapes in the conditions"] = (
        of(new, entry(FOUR[:8], shape=(1, 2)), conditions=conditions),
        "outputs-differ",
    )
    return coded


def nested_lists(depth: int) -> bytes:
    whole = encode_document(holding("@"))
    return whole.replace(b'"@"', b"[" * depth + b"1" + b"]" * depth)


# In the bytes of a harmless document: what is replaced by what.
_EDITS = {
    "a key twice": (b'"format":1', b'"format":1,"format":1'),
    "an attribute twice": (b"false", b'false,"inplace":true'),
    "an unknown field": (b'"format":1', b'"format":1,"zzz":1'),
    "a default": (b'"path":""', b'"path":"","training":true'),
    "blanks": (b'":', b'": '),
    "not a number": (b"false", b"NaN"),
    "beyond any float": (b"false", b"1e999"),
    "minus zero": (b"false", b"-0"),
    "5000 digits": (b"false", b"1" * 5000),
    "an exponent of 5000 digits": (b"false", b"1e" + b"9" * 5000),
    "an escape": (b"false", b'"\\u0041"'),
    "half a surrogate": (b"false", b'"\\ud800"'),
    "a raw nul": (b"false", b'"\0"'),
    "no utf-8": (b"inplace", b"inpl\xffce"),
    "a format with a point": (b'"format":1', b'"format":1.0'),
    "a state of its own": (b'"module"', b'"pickle"'),
    "a class that is an object": (
        b'"torch.nn.modules.activation:ReLU"',
        b'{"$class":"os:system"}',
    ),
    "attributes in a list": (b'{"inplace":false}', b'[["inplace",false]]'),
}


def texts() -> dict[str, Any]:
    """Bytes that are not the canonical JSON of any document."""
    body, tensor = encode_document(RELU), encode_document(of_tensors(entry(FOUR)))
    linear = encode_document(LINEAR)
    backwards = dict(reversed(json.loads(body).items()))
    found = {name: body.replace(old, new) for name, (old, new) in _EDITS.items()} | {
        "another order": json.dumps(backwards, separators=(",", ":")).encode(),
        "utf-16": body.decode().encode("utf-16"),
        "a mark": b"\xef\xbb\xbf" + body,
        "a line after it": body + b"\n",
        "another after it": body + body,
        "cut short": body[:-5],
        "nothing": b"",
        "null": b"null",
        "a list": b"[]",
        "a true dimension": tensor.replace(b'"shape":[4]', b'"shape":[true]'),
        "a long dimension": tensor.replace(b'"shape":[4]', b'"shape":[' + b"9" * 5000 + b"]"),
        "a false parameter": linear.replace(b'["weight",0]', b'["weight",false]'),
        "a parameter with a point": linear.replace(b'["weight",0]', b'["weight",0.0]'),
        "10,000 deep": nested_lists(10_000),
        "a million deep": nested_lists(10**6),
    }
    newer = body.replace(b'"format":1', b'"format":2')
    coded: dict[str, Any] = {
        f"bytes: {name}": (one, "document-damaged") for name, one in found.items()
    }
    coded["bytes: 300 deep"] = (nested_lists(300), "cannot-store")
    coded["bytes: a newer format"] = (newer, "document-format")
    return coded


def attacks() -> dict[str, tuple[Any, str, tuple[str, ...]]]:
    """By name: the document or its bytes, the code that its load ends with, what is trusted."""
    found = hostile_loads.names() | hostile_loads.structures() | hostile_loads.parametrized()
    found |= hostile_loads.trees() | hostile_loads.values() | tensors() | probes() | texts()
    return {name: (one[0], one[1], one[2] if one[2:] else ()) for name, one in found.items()}


class Watch:
    """What happened beyond computing while it was on."""

    def __init__(self, folder: str) -> None:
        self.events: list[str] = []
        self.trusted: tuple[str, ...] = ()
        self.on = False
        self._folder = folder
        sys.addaudithook(self._note)

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on or not event.startswith(_WATCHED):
            return
        first = str(arguments[0]) if arguments else ""
        # The repository itself, and torch's own modules, found missing or not.
        if event in ("open", "sqlite3.connect") and first.startswith(self._folder):
            return
        if event == "import" and first.startswith("torch.nn.modules."):
            return
        self.events.append(f"{event} {first}"[:200])

    def outcome(self, act: Callable[[], object]) -> dict[str, Any]:
        """``done``, the code of a typed error, or the raw exception; and what it cost."""
        memory, clock = _memory(), time.monotonic()
        code, said = "done", ""
        self.on = True
        try:
            act()
        except CkptError as error:
            code, said = error.code, str(error)
        except BaseException as error:  # noqa: BLE001 -- this is what must never happen
            code = f"raw {type(error).__name__}: {error}"[:300]
        finally:
            self.on = False
        return {
            "code": code,
            "printable": is_printable(said),
            "seconds": time.monotonic() - clock,
            "mebibytes": _memory() - memory,
        }


def _memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main() -> None:
    """Load every attack under the hook."""
    warnings.simplefilter("ignore")
    given = attacks()
    with tempfile.TemporaryDirectory() as folder, ckpt.open(folder) as repo:
        bodies = {
            digest: torch.frombuffer(bytearray(chunk), dtype=torch.uint8)
            for digest, chunk in CHUNKS.items()
        }
        repo.push(bodies, "carrier")
        queries: Any = repo._registry.queries
        watch = Watch(folder)

        def try_out(name: str, document: Any, trust: tuple[str, ...]) -> None:
            body = document if isinstance(document, bytes) else encode_document(document)
            queries.document = lambda version: decode_document(body)
            watch.events.clear()
            load = watch.outcome(lambda: repo.load("carrier", trust=trust))
            show = watch.outcome(lambda: module_tree(decode_document(body)))
            events = list(watch.events)
            print(json.dumps({"name": name, "load": load, "show": show, "events": events}))
            sys.stdout.flush()

        # Everything that a load needs is imported by now, and every source was read.
        for document in (RELU, NESTED, PROBED, RECURRENT, CONVOLUTION, PRUNED, PROBED):
            try_out("harmless", document, ())
        for name, (document, _, trust) in given.items():
            try_out(name, document, trust)


if __name__ == "__main__":
    main()
