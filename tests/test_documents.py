"""Documents have one encoding; what is not exactly that is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckpt.core.digests import digest_of, tensor_digest
from ckpt.core.documents import (
    Document,
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


def test_a_tensors_digest_is_its_chunks_or_the_blake3_of_all_of_them() -> None:
    one, two = digest_of(b"1"), digest_of(b"2")
    assert tensor_digest([one]) == one
    assert tensor_digest([one, two]) == digest_of(bytes.fromhex(one + two))
    assert tensor_digest([]) == digest_of(b"")


def test_a_default_is_left_out_whatever_string_says_it() -> None:
    plain = encode_document(document("cpu"))
    assert encode_document(document("xcpu"[1:])) == plain
    assert b"device" not in plain


def test_splitting_and_joining_gives_the_same_document() -> None:
    structure, chunks = split_document(document())
    assert DIGEST.encode() not in structure
    assert join_document(structure, chunks) == document()
    with pytest.raises(IntegrityError):
        join_document(structure, b"[]")
    with pytest.raises(IntegrityError):
        join_document(structure, b"{}")


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


@given(st.binary(max_size=40), st.integers(0, len(GOLDEN)), st.integers(0, 20))
def test_a_mutated_document_is_refused_or_means_exactly_itself(
    patch: bytes, at: int, cut: int
) -> None:
    body = GOLDEN[:at] + patch + GOLDEN[at + cut :]
    try:
        decoded = decode_document(body)
    except IntegrityError:
        return
    assert encode_document(decoded) == body
    assert msgspec.json.decode(body) is not None
