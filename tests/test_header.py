"""The strict header parser: every bad input its error, and never laxer than the library."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from trials import Trials

from ckpt.core.dtypes import CODES, ITEM_SIZES
from ckpt.core.errors import IntegrityError
from ckpt.core.printable import is_printable
from ckpt.storage.header import HEADER_LIMIT, Header, header_length, parse_header

INPUTS_PER_SEED = 10_000

View = dict[str, tuple[str, list[int], bytes]]  # by name: code, shape, the tensor's bytes
deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize


def file_of(text: str | bytes, nbytes: int = 0) -> bytes:
    """A file with this header, and data in which no two tensors look alike."""
    encoded = text.encode() if isinstance(text, str) else text
    return len(encoded).to_bytes(8, "little") + encoded + (bytes(range(256)) * 16)[:nbytes]


def tensor(name: str, shape: object, offsets: object, code: str = "U8") -> str:
    """A member of a header; whatever is given is written as it is."""
    return f'"{name}":{{"dtype":"{code}","shape":{shape},"data_offsets":{offsets}}}'


def of(*members: str) -> str:
    return f"{{{','.join(members)}}}"


def one(shape: object, offsets: object, code: str = "U8") -> str:
    return of(tensor("w", shape, offsets, code))


def metadata(value: str) -> str:
    return of(f'"__metadata__":{value}')


W = tensor("w", [2], [0, 2])


def with_field(text: str) -> str:
    return of(f"{W[:-1]},{text}}}")


def parse(file: bytes) -> Header:
    length = header_length(file[:8], len(file))
    return parse_header(file[8 : 8 + length], len(file))


def our_view(file: bytes) -> View:
    header = parse(file)
    data = file[header.data_start :]
    return {e.name: (e.code, list(e.shape), data[e.start : e.end]) for e in header.entries}


def library_view(file: bytes) -> View:
    return {name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in deserialize(file)}


def refusal(file: bytes) -> IntegrityError:
    with pytest.raises(IntegrityError) as caught:
        parse(file)
    error = caught.value
    assert error.exit_code == 4
    assert error.hint
    assert is_printable(str(error))
    return error


A = tensor("a", [16], [0, 16])
B_AT_8, B_AT_24 = tensor("b", [8], [8, 16]), tensor("b", [8], [24, 32])
F32_MISMATCH = '"w" F32 [2,3] = 24 bytes|range is 20'
SUPPORTED = f"supported: {', '.join(CODES)}"
# By row of the table of bad inputs: the file, the code, words that the message must have.
ROWS = [
    ("1", b"", "header-short", "0 bytes|at least 8"),
    ("2", b"\0" * 7, "header-short", "7 bytes|at least 8"),
    ("3", (1 << 63).to_bytes(8, "little"), "header-too-large", f"declares {1 << 63}|16777216"),
    ("4", file_of(" " * 504)[:300], "truncated", "header needs 512 bytes|file has 300"),
    ("4 by a byte", file_of("{}")[:9], "truncated", "header needs 10 bytes|file has 9"),
    ("5", file_of(b" " * 41 + b"\xff"), "header-encoding", "invalid byte at offset 41"),
    ("6", file_of("[]"), "header-type", "expected object, got array"),
    ("7", file_of(of(W, W), 2), "duplicate-key", '"w" appears twice'),
    ("8", file_of("{}\0\0"), "header-padding", "byte 0x00 after|only spaces allowed"),
    ("9", file_of(of(A, B_AT_8), 16), "offset-overlap", '"b" starts at 8|previous ends at 16'),
    ("10", file_of(of(A, B_AT_24), 32), "offset-gap", "bytes 16-24 belong to no tensor"),
    ("11", file_of(of(W), 122), "trailing-data", "120 bytes after the last tensor"),
    ("12", file_of(one([4096], [0, 4096]), 1000), "truncated", '"w" needs 4096|1000 present|fetch'),
    ("13", file_of(one([2, 3], [0, 20], "F32"), 20), "size-mismatch", F32_MISMATCH),
    ("14", file_of(one([1 << 40, 1 << 40], [0, 0])), "shape-overflow", '"w"|2^63 elements'),
    ("15", file_of(one([0, 1 << 62, 8], [0, 0])), "shape-overflow", '"w"|limit although empty'),
    ("16 negative", file_of(one([-1], [0, 2]), 2), "shape-invalid", "-1 is not a size"),
    ("16 float", file_of(one([2.0], [0, 2]), 2), "shape-invalid", "2.0 is not a size"),
    ("16 boolean", file_of(one("[true]", [0, 1]), 1), "shape-invalid", "true is not a size"),
    ("17", file_of(one([1], [0, 16], "F128"), 16), "dtype-unknown", f'"w"|"F128"|{SUPPORTED}'),
    ("18", file_of(one([1] * 70, [0, 1]), 1), "rank-limit", '"w"|70 > 64'),
    # Ten million whole entries take 500 MB: so many fit under the limit only when they are hollow.
    ("19", file_of("{" + '"a":{},' * 2_000_000), "tensor-limit", "> 1000000"),
    ("20 objects", file_of('{"a":' * 10_000), "header-depth", "nested more than 4 deep"),
    ("20 arrays", file_of("[" * 10_000 + "]" * 10_000), "header-depth", "nested more than 4 deep"),
    ("21", file_of(metadata('{"step":7}')), "metadata-type", '__metadata__|key "step" is a number'),
    ("22 newline", file_of(of(W.replace("w", "a\\nb")), 2), "name-invalid", 'control|"a\\nb"'),
    ("22 bidi", file_of(of(W.replace("w", "\u202e")), 2), "name-invalid", 'bidi|"\\u202e"'),
    ("25 pickle", b"\x80\x02}q\0X\1\0\0\0wq", "not-safetensors", "begins like a pickle"),
    ("25 zip", b"PK\3\4\0\0\x08\x08" + b"\0" * 50, "not-safetensors", "begins like a|zip"),
]


@pytest.mark.parametrize(("row", "file", "code", "words"), ROWS, ids=[row[0] for row in ROWS])
def test_every_bad_input_has_its_error(row: str, file: bytes, code: str, words: str) -> None:
    error = refusal(file)
    assert error.code == code
    for word in words.split("|"):
        assert word in str(error)


# What an attacker may try, refused by the library too: header, bytes of data, our code.
HOSTILE = [
    *[(v, 0, "header-json") for v in ("", "\ufeff{}", "\0{}")],
    *[(v, 0, "header-padding") for v in ("{}\ufeff", "{} {}", "{}" + "}" * 9 + "{" * 9)],
    *[(of(v), 2, "header-json") for v in (f"{W},", f"\u00a0{W}", f"\x0c{W}")],
    (of('"w":null'), 0, "header-type"),
    (of('"w":{"shape":[2],"data_offsets":[0,2]}'), 2, "header-type"),
    (with_field('"dtype":"U8"'), 2, "duplicate-key"),
    (of('"__metadata__":{}', '"__metadata__":{}'), 0, "duplicate-key"),
    *[(metadata(v), 0, "metadata-type") for v in ("[]", "1", '""', "true")],
    *[(metadata(f'{{"a":{v}}}'), 0, "metadata-type") for v in ("null", "[]", "1e2", "{}")],
    *[(metadata(f'{{"{v}":""}}'), 0, "header-encoding") for v in ("\\ud800", "\\udc00\\ud83d")],
    *[(metadata(f'{{"a":"{v}"}}'), 0, "header-encoding") for v in ("\\ud800\\ud800", "\\udfff")],
    *[(metadata(f'{{"a":"{v}"}}'), 0, "header-json") for v in ("\t", "\\x41", "\\u 41", "\\")],
    *[(of(W.replace("w", v)), 2, "name-invalid") for v in ("\\ud800", "\\ude00\\ud83d")],
    *[(one([2], v), 2, "header-type") for v in ("[0,2,2]", "[0]", "[]", "null", '{"0":0,"1":2}')],
    *[(one([2], v), 2, "header-type") for v in ("[0.0,2]", "[0,2e0]", "[-0,2]", "[0,true]")],
    *[(one([2], f"[{v},2]"), 2, "header-json") for v in ("00", "+0", "NaN", "\u0660", "0x0", ".0")],
    *[(one(v, [0, 2]), 2, "header-type") for v in ("2", "null", "{}", '"2"')],
    *[(one(f"[{v}]", [0, 2]), 2, "shape-invalid") for v in ("-0", "2e0", "1e400", "null", "[2]")],
    *[(one(f"[{v}]", [0, 2]), 2, "header-json") for v in ("02", "2.", "9" * 5000, "Infinity")],
    *[(of(W.replace('"U8"', v)), 2, "header-type") for v in ("null", "1", '["U8"]')],
    *[(one([2], [0, 2], v), 2, "dtype-unknown") for v in ("u8", "U8 ", "", "\\ud800")],
    (one([2], [2, 0]), 2, "size-mismatch"),
    (one([1 << 62, 8, 0], [0, 0]), 0, "shape-overflow"),
    (one([1 << 61], [0, 1 << 64], "F64"), 0, "truncated"),
    (of(W, tensor("z", [0], [1, 1])), 2, "offset-overlap"),
    *[(of(W, tensor("z", [0], [v, v])), 2, "offset-gap") for v in (3, 1 << 63, 1 << 64)],
]


@pytest.mark.parametrize(("text", "nbytes", "code"), HOSTILE)
def test_what_the_library_refuses_too(text: str, nbytes: int, code: str) -> None:
    file = file_of(text, nbytes)
    assert refusal(file).code == code
    with pytest.raises(SafetensorError):
        deserialize(file)


# What we refuse although the library accepts it: a new line here is a decision, not an accident.
HIDDEN = ["\\u0000", "\x7f", "\\u202e", "\u200d", "\u2028", "\ue000", "\U0010ffff"]
STRICTER = [
    ("blank before the JSON", " {}", 0, "header-json"),
    ("newline after the JSON", "{}\n", 0, "header-padding"),
    ("tab after the JSON", "{}\t", 0, "header-padding"),
    ("duplicate tensor", of(W, W), 2, "duplicate-key"),
    ("duplicate tensor, escaped", of(W, W.replace("w", "\\u0077")), 2, "duplicate-key"),
    ("duplicate in metadata", metadata('{"a":"","a":""}'), 0, "duplicate-key"),
    ("metadata null", metadata("null"), 0, "metadata-type"),
    ("tensor as array", of('"w":["U8",[2],[0,2]]'), 2, "header-type"),
    ("dtype as object", of(W.replace('"U8"', '{"U8":null}')), 2, "header-type"),
    ("unknown field", with_field('"x":1'), 2, "header-type"),
    ("unknown deep field", with_field('"x":[[[]]]'), 2, "header-depth"),
    ("long number", with_field(f'"x":{"9" * 101}'), 2, "header-json"),
    ("dtype of half a byte", one([4], [0, 2], "F4"), 2, "dtype-unknown"),
    ("65 dimensions", one([1] * 65, [0, 1]), 1, "rank-limit"),
    ("empty but huge", one([0, 1 << 62, 8], [0, 0]), 0, "shape-overflow"),
    ("empty but huge in bytes", one([0, 1 << 60], [0, 0], "F64"), 0, "shape-overflow"),
    *[(f"name {n!a}", of(W.replace("w", n)), 2, "name-invalid") for n in HIDDEN],
]


@pytest.mark.parametrize(("why", "text", "nbytes", "code"), STRICTER, ids=[c[0] for c in STRICTER])
def test_where_we_are_stricter_on_purpose(why: str, text: str, nbytes: int, code: str) -> None:
    file = file_of(text, nbytes)
    deserialize(file)
    assert refusal(file).code == code


def test_a_dtype_that_torch_packs_in_pairs_is_refused_with_a_way_in() -> None:
    error = refusal(file_of(one([4], [0, 2], "F4"), 2))
    assert error.code == "dtype-unknown"
    assert "repo.push(state, model)" in str(error)


ODD = [
    ("{}" + " " * 99, 0),
    (f"{{\n\t{W}\r}}", 2),
    (of('"w":{"data_offsets":[0,2],"shape":[2],"dtype":"\\u00558"}'), 2),
    *[(of(W.replace("w", v)), 2) for v in ("", "[[[[[", '\\"[[[[[', "\\\\", "\\ud83d\\ude00")],
    (metadata('{"a":"\\"]]]][[[[[","\\u0000\\n":"\\ud83d\\ude00","dtype":"U8"}'), 0),
    (of(W, tensor("z", [0], [0, 0])), 2),
    (of(tensor("z", [3, 0], [2, 2]), W), 2),
    (one([1] * 64, [0, 1]), 1),
    (one([0, (1 << 63) - 1], [0, 0]), 0),
]


@pytest.mark.parametrize(("text", "nbytes"), ODD)
def test_what_is_odd_but_allowed(text: str, nbytes: int) -> None:
    file = file_of(text, nbytes)
    assert our_view(file) == library_view(file)


def check_saved(file: bytes, path: Path) -> Header:
    header = parse(file)
    assert our_view(file) == library_view(file)
    path.write_bytes(file)
    with safe_open(path, "np") as opened:
        assert header.metadata == (opened.metadata() or {})
    assert header.entries == tuple(sorted(header.entries, key=lambda entry: entry.start))
    return header


def test_what_safetensors_numpy_saves(tmp_path: Path) -> None:
    names = ("bool", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8")
    arrays: dict[str, NDArray[Any]] = {n: numpy.arange(6).reshape(2, 3).astype(n) for n in names}
    arrays |= {f"{name}.scalar": numpy.array(1).astype(name) for name in names}
    arrays |= {f"{name}.empty": numpy.empty((2, 0, 3)).astype(name) for name in names}
    header = check_saved(safetensors.numpy.save(arrays, {"é": '"\n'}), tmp_path / "numpy")
    assert len(header.entries) == 3 * len(names)


def test_what_safetensors_torch_saves(tmp_path: Path) -> None:
    tensors = {
        name: torch.ones(6 * ITEM_SIZES[name], dtype=torch.uint8).view(getattr(torch, name))
        for name in CODES.values()
    }
    header = check_saved(safetensors.torch.save(tensors, {"format": "pt"}), tmp_path / "torch")
    assert {entry.name: entry.dtype for entry in header.entries} == {name: name for name in tensors}
    assert {entry.code for entry in header.entries} == set(CODES)
    assert check_saved(safetensors.torch.save({}), tmp_path / "nothing").entries == ()


TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]|[^\s"{}\[\]:,]+|\s+')
MEMBER = re.compile(r'"[^"]*":\{[^{}]*\}')
OFFSETS = re.compile(r"(?<=offsets\":)\[(\d{1,20}), (\d{1,20})\]")
NUMBERS = ["-0", "-1", "00", "01", "0", "1", "2", "3", "4", "8", "1.0", "2e0", "1e2", "true"]
NUMBERS += ["null", '"1"', "[0]", "{}", "NaN", "1e999", "9" * 30, "9" * 5000]
NUMBERS += [str(1 << 62), str((1 << 63) - 1), str(1 << 63), str(1 << 64)]
TEXTS = ["\\ud800", "\\ud83d\\ude00", "\\u0000", "\\n", "\\/", "\\x", "\t", "\u202e", "é", "[{["]
BLANKS = [" ", "  ", "\n", "\r\t", "\0", "\u00a0", "\x0b"]
SEEDS = [
    (of(W), 2),
    (of('"__metadata__":{"format":"pt","a":"b"}', W), 2),
    (one([2, 3], [0, 24], "F32"), 24),
    (one([], [0, 8], "C64"), 8),
    (of(tensor("z", [0, 3], [2, 2], "BF16"), W, tensor("y", [0], [0, 0])), 2),
    (of(tensor("b", [4], [2, 10], "F16"), W, tensor("c", [2, 1, 3], [10, 16])), 16),
    (of(*[tensor(f"t{i}", [1, 2], [4 * i, 4 * i + 4], "I16") for i in range(5)]), 20),
]


def mutate_token(rng: random.Random, tokens: list[str]) -> None:
    numbers = [at for at, token in enumerate(tokens) if token.isdigit()]
    at = rng.choice(numbers if numbers and rng.random() < 0.5 else range(len(tokens)))
    token = tokens[at]
    if token.isdigit():
        near = str(int(token[:20]) + rng.choice((-2, -1, 1, 2, 4)))
        tokens[at] = rng.choice((near, rng.choice(NUMBERS), rng.choice(NUMBERS)))
    elif token.startswith('"') and len(token) > 2:
        inside = rng.randrange(1, len(token) - 1)
        escaped = f"{token[:inside]}\\u{ord(token[inside]):04x}{token[inside + 1 :]}"
        odd = f"{token[:inside]}{rng.choice(TEXTS)}{token[inside:]}"
        tokens[at] = rng.choice((escaped, escaped, odd, f'"{rng.choice([*CODES, "F4", "x"])}"'))
    else:
        tokens[at] = rng.choice(("", token * 2, *"{}[]:,", f"[{token}", f"{token}]"))


def mutate_structure(rng: random.Random, text: str) -> str:
    tokens, members = TOKEN.findall(text), MEMBER.findall(text)
    kind = rng.randrange(9)
    if kind == 0 and members:
        rng.shuffle(members)
        return of(*members[rng.random() < 0.2 :])
    if kind == 1 and members:
        return of(*members, rng.choice(members))
    if kind == 2 and tokens:
        at, other = rng.choices(range(len(tokens)), k=2)
        tokens[at], tokens[other] = tokens[other], tokens[at]
    elif kind == 3:
        tokens.insert(rng.randrange(len(tokens) + 1), rng.choice(BLANKS))
    elif kind == 4:
        by = rng.choice((-2, -1, 1, 2, 8))
        return OFFSETS.sub(lambda m: f"[{int(m[1]) + by}, {int(m[2]) + by}]", text, count=1)
    elif kind == 5:
        tokens.append(rng.choice(BLANKS) * rng.randrange(1, 9))
    elif tokens:
        mutate_token(rng, tokens)
    return "".join(tokens)


def mutant(rng: random.Random) -> bytes:
    text, nbytes = rng.choice(SEEDS)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        text = mutate_structure(rng, text)
    file = bytearray(file_of(text, nbytes))
    kind = rng.randrange(40)
    if kind == 0:
        del file[rng.randrange(len(file)) :]
    elif kind == 1:
        file += bytes(rng.randrange(1, 9))
    elif kind < 8:  # the declared length of the header included
        file[rng.randrange(len(file))] ^= 1 << rng.randrange(8)
    return bytes(file)


def attempt(view: Callable[[bytes], View], file: bytes) -> View | str:
    try:
        return view(file)
    except SafetensorError:
        return "refused"
    except IntegrityError as error:
        return error.code


@pytest.mark.torture("T20", unit="inputs")
def test_the_parser_never_accepts_what_the_library_rejects(trials: Trials) -> None:
    verdicts: Counter[str] = Counter()
    for seed in trials.seeds(100_000 // INPUTS_PER_SEED):
        rng = random.Random(seed)
        for _ in range(INPUTS_PER_SEED):
            file = mutant(rng)
            ours, theirs = attempt(our_view, file), attempt(library_view, file)
            if isinstance(ours, str):
                verdicts.update([ours, "refused by both" if theirs == "refused" else "stricter"])
            else:
                verdicts["accepted by both"] += 1
                assert ours == theirs, file
        trials.count(INPUTS_PER_SEED)
    assert verdicts["accepted by both"] > 0.12 * trials.counted
    assert verdicts["refused by both"] > 0.6 * trials.counted
    assert verdicts["stricter"] > 0.05 * trials.counted
    rare = {"not-safetensors", "rank-limit", "tensor-limit"}  # no small change leads to them
    for code in {row[2] for row in ROWS} - rare:
        assert verdicts[code] >= trials.counted // 20_000, code


NAMES = st.text(max_size=12).filter(lambda name: is_printable(name) and name != "__metadata__")
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ENTRIES = st.tuples(st.sampled_from(sorted(CODES)), st.lists(st.integers(0, 3), max_size=4))


@given(
    shapes=st.dictionaries(NAMES, ENTRIES, max_size=6),
    about=st.none() | st.dictionaries(TEXT, TEXT, max_size=3),
    style=st.randoms(use_true_random=False),
)
def test_valid_headers_look_as_the_library_sees_them(
    shapes: dict[str, tuple[str, list[int]]], about: dict[str, str] | None, style: random.Random
) -> None:
    members: list[tuple[str, object]] = [] if about is None else [("__metadata__", about)]
    end = 0
    for name, (code, shape) in shapes.items():
        start, end = end, end + int(numpy.prod(shape)) * ITEM_SIZES[CODES[code]]
        members.append((name, {"dtype": code, "shape": shape, "data_offsets": [start, end]}))
    style.shuffle(members)
    indent, ascii_only = style.choice([None, 0, 1]), style.choice([False, True])
    text = json.dumps(dict(members), indent=indent, ensure_ascii=ascii_only)
    text += " " * style.randrange(9)
    file = file_of(text, end)
    assert our_view(file) == library_view(file)
    assert parse(file).metadata == (about or {})


def test_the_limits_of_the_declared_length() -> None:
    assert header_length(HEADER_LIMIT.to_bytes(8, "little"), HEADER_LIMIT + 8) == HEADER_LIMIT
    assert header_length(b"\x80\x04\0\0\0\0\0\0", 2000) == 1152  # begins like a pickle, is none
    with pytest.raises(IntegrityError, match="declares 16777217, limit 16777216"):
        header_length((HEADER_LIMIT + 1).to_bytes(8, "little"), 1 << 40)


@pytest.mark.parametrize("unit", ["[", "}", '"', "\\", '"\\', "1,", "[],", "{", '"":{},', "é"])
@pytest.mark.parametrize("before", ["", "{", '{"', '{"w":[', '{"__metadata__":{"a":"'])
def test_a_large_hostile_header_is_refused_typed(before: str, unit: str) -> None:
    refusal(file_of(before + unit * (1_000_000 // len(unit.encode()))))


def test_a_header_of_100_000_tensors_is_read_fast() -> None:
    members = [tensor(f"layers.{i}.weight", [2, 3], [6 * i, 6 * i + 6]) for i in range(100_000)]
    text = of(*members).encode()
    began = time.process_time()
    assert len(parse_header(text, 8 + len(text) + 600_000).entries) == 100_000
    assert time.process_time() - began < 5  # about 1 s here; a quadratic step would take minutes
