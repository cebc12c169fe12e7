"""The document: the JSON description of a version, its canonical bytes and their checks.

The fields are explained in ``docs/format.md``; ``root`` is a value of the value codec.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

import msgspec
from msgspec import Struct, field
from msgspec.structs import force_setattr

from ckpt.core.errors import IntegrityError

FORMAT = 1

_TENSOR, _CPU, _STRIDED = map(sys.intern, ("tensor", "cpu", "strided"))

State = Literal["module", "values", "files"]


class Part(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """A box out of a tensor that several processes pushed: its values in C order are so many of
    the entry's chunks, after those of the parts before it."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    chunks: int


class Tensor(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """One tensor entry. Exactly one of these says where its bytes are: ``chunks`` (none for an
    empty tensor), ``region`` (a view into the bytes of another entry), ``components``. With
    ``parts`` the chunks are those of its parts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str = "tensor"
    device: str = "cpu"
    requires_grad: bool = False
    strides: tuple[int, ...] | None = None
    chunks: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()
    region: int | None = None
    offset: int = 0
    align: int = 0
    layout: str = "strided"
    components: dict[str, int] | None = None
    details: dict[str, Any] | None = None

    @property
    def has_bytes(self) -> bool:
        """Whether the entry has chunks of its own (none, for an empty tensor)."""
        return (
            self.region is None and self.components is None and not self.kind.startswith("uninit")
        )

    @property
    def has_values(self) -> bool:
        """Whether the entry is a tensor of the state, and not a part or a place of others."""
        return self.kind not in ("region", "component", "file") and not self.kind.startswith(
            "uninit"
        )

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the values in the chunks: a dimension of stride 0 is stored once."""
        if self.strides is None:
            return self.shape
        pairs = zip(self.shape, self.strides, strict=True)
        return tuple(1 if step == 0 and size > 1 else size for size, step in pairs)

    def pieces(self) -> Iterator[tuple[Part, tuple[str, ...]]]:
        """Each part with its chunks; of a tensor without parts, all of it as one."""
        whole = Part(offset=(0,) * len(self.shape), shape=self.shape, chunks=len(self.chunks))
        first = 0
        for part in self.parts or (whole,):
            yield part, self.chunks[first : first + part.chunks]
            first += part.chunks

    def __post_init__(self) -> None:
        # msgspec leaves a default out only if it is the same object, and "cpu" from outside is not.
        if not (self.kind is _TENSOR and self.device is _CPU and self.layout is _STRIDED):
            for name in ("kind", "device", "layout"):
                force_setattr(self, name, sys.intern(getattr(self, name)))


class Module(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """One module of the tree; others refer to it by its index.

    ``params`` and ``buffers`` name tensor entries, ``children`` other modules; None is an entry
    that the module registered as None. A buffer's third item says whether it is persistent.
    """

    path: str
    reference: str = field(name="class")
    training: bool = True
    params: tuple[tuple[str, int | None], ...] = ()
    buffers: tuple[tuple[str, int | None, bool], ...] = ()
    children: tuple[tuple[str, int | None], ...] = ()
    attrs: dict[str, Any] = {}
    hooks: tuple[tuple[str, Any], ...] = ()
    parametrized: tuple[str, ...] = ()


class ModelClass(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """A class or function that a document names, or a base of one, as it was when it was pushed.
    ``bases`` has those that are neither of torch nor of the standard library, by reference."""

    reference: str
    package: str | None = None
    version: str | None = None
    source_digest: str | None = None
    bases: tuple[str, ...] = ()


class SafetensorsFile(
    Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True
):
    """What a pushed ``.safetensors`` file had beside its tensors: its first bytes, as base64."""

    header: bytes


class File(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a pushed folder: a ``.safetensors`` file as its first bytes and its tensors, any
    other as one tensor entry of its bytes."""

    tensors: tuple[int, ...]
    header: bytes | None = None


class Conditions(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """What a forward was computed under: what another machine has, and what can be set again."""

    device: str
    name: str
    capability: str
    torch: str
    build: str
    threads: int
    flags: dict[str, bool | str]


class Behaviour(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """How a forward behaves: whether it gives the same again, asks for random numbers, and what
    it writes to. ``once`` says that it ran only once, so that the first two are not known."""

    repeats: bool = True
    stochastic: bool = False
    random: bool = False
    changes_state: bool = False
    changes_inputs: bool = False
    once: bool = False


class Probe(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """Recorded inputs and outputs of a module.

    ``root`` is a value of ``{"inputs": …, "outputs": …, "reference": …}`` over the probe's own
    tensors. ``children`` has, in the order in which they finished, each submodule's path, the
    digest of its first output and that output's root mean square, or -1.
    """

    root: Any
    tensors: tuple[Tensor, ...]
    seed: int
    conditions: Conditions
    behaviour: Behaviour
    order: tuple[tuple[int, tuple[int, ...]], ...] = ()
    children: tuple[tuple[str, str, float], ...] = ()


class Document(Struct, frozen=True, omit_defaults=True, kw_only=True, forbid_unknown_fields=True):
    """Everything about a version but the bytes of its tensors and the facts of its push."""

    format: int
    state: State
    root: Any
    tensors: tuple[Tensor, ...]
    environment: str
    modules: tuple[Module, ...] = ()
    classes: tuple[ModelClass, ...] = ()
    wrappers: dict[str, tuple[str, ...]] = {}
    order: tuple[tuple[int, tuple[int, ...]], ...] = ()
    safetensors: SafetensorsFile | None = None
    files: dict[str, File] = {}
    dropped: tuple[str, ...] = ()
    probe: Probe | None = None

    @property
    def probe_tensors(self) -> tuple[Tensor, ...]:
        """The entries of the probe, whose chunks the version needs too."""
        return () if self.probe is None else self.probe.tensors


class _OfSomeFormat(Struct):
    format: int


_Digests = tuple[tuple[str, ...], ...]
_decoder = msgspec.json.Decoder(Document)
_format_decoder = msgspec.json.Decoder(_OfSomeFormat)
_varying_decoder = msgspec.json.Decoder(
    tuple[_Digests, _Digests, tuple[tuple[str, str, float], ...]]
)


def canonical(value: Any) -> bytes:
    """The one JSON encoding of a value: sorted keys, no blanks, UTF-8, no NaN literals."""
    return msgspec.json.encode(value, order="sorted")


def encode_document(document: Document) -> bytes:
    """The canonical bytes of ``document``."""
    return canonical(document)


def decode_document(body: bytes) -> Document:
    """The document in ``body``, refused unless ``body`` is its canonical encoding.

    Raises:
        IntegrityError: ``document-format`` for a newer format, else ``document-damaged``.
    """
    try:
        document = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        with suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            _check_format(_format_decoder.decode(body).format)  # which may have other fields
        raise _damaged(str(error)) from None
    _check_format(document.format)
    if encode_document(document) != body:
        raise _damaged("it is not in canonical form, or has fields that this ckpt does not know")
    return document


def _check_format(found: int) -> None:
    if found != FORMAT:
        raise IntegrityError(
            "document-format",
            f"the document has format {found}, this ckpt reads {FORMAT}",
            hint="install a newer ckpt",
        )


def identity_bytes(document: Document) -> bytes:
    """What a version's digest is taken of: root, modules and tensors, without the devices."""
    tensors = [msgspec.structs.replace(tensor, device="cpu") for tensor in document.tensors]
    return canonical({"root": document.root, "modules": document.modules, "tensors": tensors})


def structure_bytes(document: Document) -> bytes:
    """What two versions share when the same code rebuilds them: all but values and devices."""
    tensors = [
        msgspec.structs.replace(tensor, device="cpu", chunks=()) for tensor in document.tensors
    ]
    return canonical(
        {
            "root": document.root,
            "modules": document.modules,
            "tensors": tensors,
            "classes": document.classes,
            "dropped": document.dropped,
        }
    )


def split_document(document: Document) -> tuple[bytes, bytes]:
    """``(shared, varying)``: the part that successive versions share, and the digests."""
    probe = document.probe
    shared = msgspec.structs.replace(
        document,
        tensors=_with_digests(document.tensors, [()] * len(document.tensors)),
        probe=probe
        and msgspec.structs.replace(
            probe, tensors=_with_digests(probe.tensors, [()] * len(probe.tensors)), children=()
        ),
    )
    varying = (
        [tensor.chunks for tensor in document.tensors],
        [tensor.chunks for tensor in document.probe_tensors],
        () if probe is None else probe.children,
    )
    return encode_document(shared), canonical(varying)


def join_document(shared: bytes, varying: bytes) -> Document:
    """The inverse of :func:`split_document`."""
    bare = decode_document(shared)
    try:
        own, probed, children = _varying_decoder.decode(varying)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _damaged(str(error)) from None
    if (len(own), len(probed)) != (len(bare.tensors), len(bare.probe_tensors)):
        raise _damaged("its tensors and its digests do not match")
    probe = bare.probe and msgspec.structs.replace(
        bare.probe, tensors=_with_digests(bare.probe.tensors, probed), children=children
    )
    return msgspec.structs.replace(bare, tensors=_with_digests(bare.tensors, own), probe=probe)


def _with_digests(
    tensors: tuple[Tensor, ...], digests: Sequence[tuple[str, ...]]
) -> tuple[Tensor, ...]:
    pairs = zip(tensors, digests, strict=True)
    return tuple(msgspec.structs.replace(tensor, chunks=own) for tensor, own in pairs)


def _damaged(reason: str) -> IntegrityError:
    return IntegrityError(
        "document-damaged",
        f"a document cannot be read: {reason}",
        hint="run `ckpt registry rebuild`, which reads the copies in the store",
    )
