"""Documents have one encoding; what is not exactly that is refused."""

from __future__ import annotations

import json
import random

import pytest
from trials import Trials

from ckpt.core.digests import digest_of
from ckpt.core.documents import (
    Document,
    File,
    ModelClass,
    Module,
    Part,
    SafetensorsFile,
    Tensor,
    decode_document,
    encode_document,
    identity_bytes,
    join_document,
    split_document,
)
from ckpt.core.errors import IntegrityError

DIGEST = "ab" * 32
INPUTS_PER_SEED = 10_000
GOLDEN = (
    b'{"environment":"e","format":1,"order":[[0,[1,0]]],'
    b'"root":{"$dict":[["w",{"$tensor":0}],["x",1.5]]},"safetensors":{"header":"aGk="},'
    b'"state":"values","tensors":[{"chunks":["' + DIGEST.encode() + b'"],"device":"cuda:0",'
    b'"dtype":"float32","kind":"parameter","name":"w","requires_grad":true,"shape":[2,3],'
    b'"strides":[1,2]}]}'
)


def document(device: str = "cuda:0") -> Document:
    tensor = Tensor(
        name="w",
        dtype="float32",
        shape=(2, 3),
        kind="parameter",
        device=device,
        requires_grad=True,
        strides=(1, 2),
        chunks=(DIGEST,),
    )
    return Document(
        format=1,
        state="values",
        root={"$dict": [["w", {"$tensor": 0}], ["x", 1.5]]},
        tensors=(tensor,),
        environment="e",
        order=((0, (1, 0)),),
        safetensors=SafetensorsFile(header=b"hi"),
    )


def test_the_bytes_of_a_document_are_golden() -> None:
    assert encode_document(document()) == GOLDEN
    assert decode_document(GOLDEN) == document()


def test_the_digest_of_a_version_is_golden_and_knows_no_device() -> None:
    wanted = "5792860c"
    assert digest_of(identity_bytes(document()))[:8] == wanted
    assert digest_of(identity_bytes(document("cpu")))[:8] == wanted


def test_a_default_is_left_out_whatever_string_says_it() -> None:
    plain = encode_document(document("cpu"))
    assert encode_document(document("xcpu"[1:])) == plain
    assert b"device" not in plain


def test_splitting_and_joining_gives_the_same_document() -> None:
    structure, chunks = split_document(document())
    assert DIGEST.encode() not in structure
    assert join_document(structure, chunks) == document()


@pytest.mark.parametrize("varying", [b"[]", b"{}", b'[[["\xff"]],[],[]]', b"[" * 100_000])
def test_digests_that_cannot_be_read_are_refused(varying: bytes) -> None:
    structure, _ = split_document(document())
    with pytest.raises(IntegrityError) as caught:
        join_document(structure, varying)
    assert caught.value.code == "document-damaged"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"\xff",
        GOLDEN[:-1],
        GOLDEN + b" ",
        GOLDEN.replace(b'"format":1,', b""),
        GOLDEN.replace(b'"format":1', b'"format":1.0'),
        GOLDEN.replace(b'"state":"values"', b'"state":"pickle"'),
        GOLDEN.replace(b'"environment"', b'"trust":["os"],"environment"'),
        GOLDEN.replace(b'"name":"w"', b'"name":"w","unknown":1'),
        GOLDEN.replace(b'"name":"w"', b'"name":"w","name":"w"'),
        GOLDEN.replace(b'"device":"cuda:0"', b'"device":"cpu"'),
        GOLDEN.replace(b"1.5", b"1.50"),
        GOLDEN.replace(b"1.5", b"NaN"),
        GOLDEN.replace(b"aGk=", b"a"),
        b'{"root":' + b"[" * 100_000,
    ],
)
def test_what_is_not_canonical_is_refused(body: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        decode_document(body)
    assert caught.value.code == "document-damaged"


def test_a_newer_format_is_named() -> None:
    with pytest.raises(IntegrityError) as caught:
        decode_document(GOLDEN.replace(b'"format":1', b'"format":2'))
    assert caught.value.code == "document-format"
    with pytest.raises(IntegrityError) as caught:  # what is new there, nobody here knows
        decode_document(GOLDEN.replace(b'"format":1', b'"format":2,"new":[]'))
    assert caught.value.code == "document-format"


# Documents with every kind of member, to be changed; pieces of one come into another.
BASES = [
    GOLDEN,
    encode_document(document("cpu")),
    encode_document(
        Document(
            format=1,
            state="module",
            root={"$module": 0},
            tensors=(
                Tensor(
                    name="a", dtype="int8", shape=(), parts=(Part(offset=(), shape=(), chunks=0),)
                ),
                Tensor(name="b", dtype="bool", shape=(0,), region=0, offset=1, align=8, layout="x"),
                Tensor(name="c", dtype="u", shape=(9,), components={"i": 0}, details={"n": [1.5]}),
            ),
            environment="e",
            modules=(
                Module(
                    path="",
                    reference="torch.nn:Linear",
                    training=False,
                    params=(("weight", 0), ("bias", None)),
                    buffers=(("b", 1, False),),
                    children=(("c", 0), ("d", None)),
                    attrs={"n": {"$float": "nan"}},
                ),
            ),
            classes=(ModelClass(reference="torch.nn:Linear", package="torch", version="2"),),
            wrappers={"w": ("x",)},
            files={"f": File(tensors=(0, 1), header=b"hi")},
            dropped=("lock",),
        )
    ),
]
MARKS = [b"{", b"}", b"[", b"]", b",", b":", b'"', b"0", b"1", b"-", b"1e5", b"null", b"true", b" "]


def changed(chance: random.Random) -> bytes:
    """A document with a change or a few: a bit, a mark, or a piece that is gone, twice there, in
    another place, or of another document."""
    body = chance.choice(BASES)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        at, kind = chance.randrange(len(body) + 1), chance.randrange(5)
        end = min(len(body), at + chance.choice((1, 1, 2, 8, 30)))
        piece = b""
        if kind == 0 and at < len(body):
            piece, end = bytes([body[at] ^ 1 << chance.randrange(8)]), at + 1
        elif kind == 1:
            piece = chance.choice(MARKS)
        elif kind == 2:
            piece = body[at:end] * 2
        elif kind == 3:
            other = chance.choice(BASES)
            start = chance.randrange(len(other))
            piece = other[start : start + chance.choice((1, 8, 60))]
        body = body[:at] + piece + body[end:]
    return body


@pytest.mark.torture("T20", unit="inputs")
def test_a_changed_document_is_refused_or_means_exactly_itself(trials: Trials) -> None:
    accepted = 0
    for seed in trials.seeds(100_000 // INPUTS_PER_SEED):
        chance = random.Random(seed)
        for _ in range(INPUTS_PER_SEED):
            body = changed(chance)
            try:
                decoded = decode_document(body)
            except IntegrityError:
                continue
            accepted += 1
            assert encode_document(decoded) == body
            assert json.loads(body) is not None
            assert join_document(*split_document(decoded)) == decoded
        trials.count(INPUTS_PER_SEED)
    assert 0.02 * trials.counted < accepted < 0.5 * trials.counted
