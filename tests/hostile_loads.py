"""Hostile documents for ``hostile_driver``: names in odd places, impossible modules and values."""

from __future__ import annotations

import struct
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn
from torch.nn.utils import prune

from ckpt.core.digests import digest_of
from ckpt.core.documents import Document, ModelClass, Module, Tensor
from ckpt.loader.probe import record_probe
from ckpt.loader.snapshot import capture_module

# Every chunk that a document names, by digest; all of them are in the repository.
CHUNKS: dict[str, bytes] = {}
FOUR = struct.pack("<4f", 1, 2, 3, 4)
SYSTEM = {"$function": "os:system"}
HARMLESS = {"$function": "math:exp"}


def stored(body: bytes) -> tuple[str, ...]:
    """The chunks of these bytes, which the repository will have."""
    if not body:
        return ()
    CHUNKS[digest_of(body)] = body
    return (digest_of(body),)


def entry(body: bytes = b"", **fields: Any) -> Tensor:
    given = {"name": "x", "dtype": "float32", "shape": (len(body) // 4,), "chunks": stored(body)}
    return Tensor(**{**given, **fields})


def described(net: nn.Module, inputs: Any = None) -> Document:
    captured = capture_module(net)
    probe = None
    if inputs is not None:
        recorded = record_probe(captured, inputs)
        probe = replace(recorded.probe, tensors=_filled(recorded.captured))
    return Document(
        format=1,
        state="module",
        root=captured.root,
        tensors=_filled(captured),
        environment="",
        modules=captured.modules,
        order=captured.order,
        probe=probe,
    )


def _filled(captured: Any) -> tuple[Tensor, ...]:
    pairs = zip(captured.tensors, captured.sources, strict=True)
    return tuple(
        one if source is None else replace(one, chunks=stored(bytes(source.read(0, source.nbytes))))
        for one, source in pairs
    )


with torch.random.fork_rng():  # other tests draw from the same generator
    torch.manual_seed(0)
    RELU = described(nn.ReLU())
    LINEAR = described(nn.Linear(2, 2))
    NESTED = described(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    PROBED = described(nn.Sequential(nn.Identity()), (torch.ones(1, 2),))
    RECURRENT = described(nn.LSTM(2, 2), (torch.ones(1, 1, 2),))
    CONVOLUTION = described(nn.Conv2d(1, 1, 1))
    PRUNED = described(prune.identity(nn.Linear(2, 2), "weight"))  # type: ignore[no-untyped-call]


def first(document: Document = RELU, **changes: Any) -> Document:
    """The first module described otherwise."""
    return replace(
        document, modules=(replace(document.modules[0], **changes), *document.modules[1:])
    )


def holding(value: Any, name: str = "x", document: Document = RELU, **changes: Any) -> Document:
    """With one attribute more."""
    attributes = {**document.modules[0].attrs, name: value}
    return replace(first(document, attrs=attributes), **changes)


def of_tensors(*tensors: Tensor, value: Any = None) -> Document:
    return holding({"$tensor": 0} if value is None else value, tensors=tensors)


# Where a name can stand, beside the value of an attribute.
_INSIDE: dict[str, Any] = {
    "key of a dict": {"$dict": [[SYSTEM, 1]]},
    "key of an odict": {"$odict": [[{"$tuple": [SYSTEM]}, 1]]},
    "set": {"$set": [SYSTEM]},
    "frozenset in a tuple": {"$tuple": [{"$frozenset": [SYSTEM]}]},
    "defaultdict": {"$defaultdict": [None, [["a", SYSTEM]]]},
    "factory": {"$defaultdict": [SYSTEM, []]},
    "deque": {"$deque": [None, [SYSTEM]]},
    "slice": {"$slice": [SYSTEM, None, None]},
    "partial": {"$partial": [HARMLESS, {"$tuple": [SYSTEM]}, {"$dict": []}]},
    "keyword": {"$partial": [HARMLESS, {"$tuple": []}, {"$dict": [["a", SYSTEM]]}]},
    "object": {"$object": ["torch.nn.utils.prune:Identity", {"a": [SYSTEM]}]},
    "second key": {"$tuple": [], "$function": "os:system"},
    "unknown tag": {"$code": {"a": SYSTEM}},
}
# Forms in which a reader might find a name, and a check of names not.
_FORMS: dict[str, Any] = {
    "object as a dict": {"$object": {"this:X": {}, "zz": {}}},
    "object of four": {"$object": ["this:X", {}, 1, 1]},
    "object with a name for a number": {"$object": ["this:X", {}, "os:system"]},
    "same as nothing": {"$same": 7},
    "same as a list": {"$same": [7]},
    "same as what it is in": {"$object": ["torch.nn.utils.prune:Identity", {"a": {"$same": 0}}, 0]},
    "two of one number": {"$tuple": [{"$object": ["torch.nn.utils.prune:Identity", {}, 0]}] * 2},
    "enum as text": {"$enum": "smtplib"},
    "enum as a dict": {"$enum": {"this:X": 1}},
    "enum alone": {"$enum": ["this:X"]},
    "class as a list": {"$class": ["this:X"]},
    "function as an object": {"$function": {"this:X": 1}},
    "function as null": {"$function": None},
}
# What a name may lead to, and what the loader trusts.
_MODULES: dict[str, Any] = {
    "torch.nn.modules.module:torch._inductor.X": ("class-origin", ()),
    "torch.nn.modules.module:torch.onnx.X": ("class-origin", ()),
    "torch.nn.modules.module:Module.forward": ("class-origin", ()),
    "torch.nn.modules.module:_IncompatibleKeys": ("class-type", ()),
    "torch.nn.modules.nowhere:X": ("class-missing", ()),
    "torch.nn.modules_evil:X": ("class-not-allowed", ()),
    "torch.nn.utils.parametrize_evil:X": ("class-not-allowed", ()),
    "chapter_models_evil:MLP": ("class-not-allowed", ("chapter_models",)),
    "__main__:Net": ("class-not-allowed", ("torch",)),
    "torch.fx.graph_module:GraphModule": ("class-type", ("torch",)),
    "torch.jit._script:ScriptModule": ("class-type", ("torch",)),
    "torch.nn.parallel.data_parallel:DataParallel": ("class-type", ("torch",)),
    "torch.nn:Linear": ("class-origin", ("torch",)),
    "builtins:object": ("class-type", ("builtins",)),
}


def names() -> dict[str, Any]:
    """Names in places where nobody looks for them, and what a name may lead to."""
    found: dict[str, Any] = {
        f"name in {place}": (holding(value), "class-not-allowed")
        for place, value in _INSIDE.items()
    }
    found["name in root"] = (replace(RELU, root=SYSTEM), "class-not-allowed")
    found["name in hook"] = (first(hooks=(("_forward_hooks", SYSTEM),)), "class-not-allowed")
    for form, value in _FORMS.items():
        found[form] = (holding(value), "document-damaged")
    for unused in ("os:system", "", "..:x", "xml.etree.nope:x", "/etc/passwd:x", "a\0b:x"):
        classes = (ModelClass(reference=unused, version="1", source_digest="0" * 64),)
        found[f"unused class {unused!r}"] = (replace(RELU, classes=classes), "document-damaged")
    for strange in ("", "..:x", "/etc/passwd:x", "a\0b:x"):
        used = ModelClass(reference=RELU.modules[0].reference, bases=(strange,))
        found[f"base {strange!r}"] = (replace(RELU, classes=(used,)), "document-damaged")
    for name, (code, trust) in _MODULES.items():
        found[f"module {name}"] = (first(reference=name), code, trust)
    return found


def damaged(found: dict[str, Document]) -> dict[str, Any]:
    return {name: (document, "document-damaged") for name, document in found.items()}


def structures() -> dict[str, Any]:
    """Modules that nobody could have made."""
    empty = {"$object": ["torch.nn.utils.prune:Identity", {}]}
    shadow = {"$object": ["torch.nn.utils.prune:Identity", {"apply_mask": HARMLESS}]}
    no_end = {"$range": [0, 3 * 10**8, 1]}
    return damaged(
        {
            "hook is a function": first(hooks=(("_forward_hooks", HARMLESS),)),
            "hook is the module": first(hooks=(("_forward_hooks", {"$module": 0}),)),
            "hook of no place": first(hooks=(("nonsense", empty),)),
            "hook at the backward": first(hooks=(("_backward_hooks", empty),)),
            "hook replaces its method": first(PRUNED, hooks=(("_forward_pre_hooks", shadow),)),
            "object replaces its method": holding(shadow),
            "root is true": replace(NESTED, root={"$module": True}),
            "root is a float": replace(RELU, root={"$module": 0.0}),
            "partial of a range": holding({"$partial": [HARMLESS, no_end, {"$dict": []}]}),
            "partial of no keywords": holding({"$partial": [HARMLESS, {"$tuple": []}, [1]]}),
            "weights of a billion layers": holding(10**9, "num_layers", RECURRENT),
            "weights of another size": holding(10**6, "hidden_size", RECURRENT),
            "weights of another mode": holding("GRU", "mode", RECURRENT),
            "weights of the other direction": holding(True, "bidirectional", RECURRENT),
            "names of weights are numbers": holding([[1]], "_all_weights", RECURRENT),
            "old names of weights are numbers": holding([[1]], "all_weights", RECURRENT),
            "no weights": holding([], "_flat_weights", RECURRENT),
            "weights are numbers": holding([5] * 4, "_flat_weights", RECURRENT),
            "attribute __dict__": holding(1, "__dict__"),
        }
    ) | {"padding of any length": (holding(no_end, "padding", CONVOLUTION), "done")}


def parametrized() -> dict[str, Any]:
    """Names that would become properties of the class."""
    coded: dict[str, Any] = {}
    listed = Module(path="", reference="torch.nn.modules.container:ModuleDict")
    for name, code in {
        "forward": "class-failed",
        "__del__": "document-damaged",
        "__bool__": "document-damaged",
        "nothing": "structure-differs",
    }.items():
        coded[f"parametrized {name}"] = (first(parametrized=(name,)), "document-damaged")
        whole = first(parametrized=(name,), children=(("parametrizations", 1),)).modules[0]
        child = replace(listed, children=((name, 2),))
        document = replace(RELU, modules=(whole, child, RELU.modules[0]))
        coded[f"parametrized by a module {name}"] = (document, code)
    return coded


def trees() -> dict[str, Any]:
    """Trees too deep or too wide, and names that are taken."""
    chain = [first(NESTED, children=(("0", n + 1),)).modules[0] for n in range(3000)]
    doubling = [
        first(NESTED, path=".".join("0" * n), children=(("0", n + 1), ("1", n + 1))).modules[0]
        for n in range(40)
    ]
    last = first(path=".".join("0" * 40)).modules[0]
    forward = first(LINEAR, params=(("forward", 0), ("bias", 1)))
    return {
        "chain": (replace(RELU, modules=(*chain, RELU.modules[0])), "class-failed"),
        "doubling": (replace(RELU, modules=(*doubling, last)), "done"),
        "parameter twice": (first(LINEAR, params=(("a", 0), ("a", 1))), "structure-differs"),
        "parameter named forward": (forward, "structure-differs"),
    }


_VALUES: dict[str, Any] = {
    "numpy subarray": {"$npscalar": ["(2,3)f4", "AAAAAAAAAAA="]},
    "numpy structure": {"$npscalar": ["f4,f4", "AAAAAAAAAAA="]},
    "numpy dict": {"$npscalar": [{"names": ["a"], "formats": ["O"]}, "AAAAAAAAAAA="]},
    "numpy null": {"$npscalar": [None, "AAAAAAAAAAA="]},
    "numpy code": {"$npscalar": ["__import__('os').system('true')", "AA=="]},
    "numpy huge": {"$npscalar": ["|V2147483647", "AAAAAA=="]},
    "numpy long double": {"$npscalar": ["<f16", "AAAAAAAAAAAAAAAAAAAAAA=="]},
    "lazy name of torch": {"$dtype": "_inductor"},
    "escapes in a device": {"$device": "\x1b]0;x\x07"},
    "device null": {"$device": None},
    "deque without end": {"$deque": [2**80, []]},
    "complex of too much": {"$complex": [10**400, 1]},
    "size of a number": {"$size": 10**10},
    "bytes of a number": {"$bytearray": 10**10},
    "bytes with blanks": {"$bytes": "YW Jj"},
    "keys that are equal": {"$dict": [[1, 1], [True, 2]]},
    "keys that cannot be": {"$dict": [[[], 1]]},
    "float by its bits": {"$float": "3ff0000000000000"},
    "generator of a number": {"$generator": [5, 5]},
    "tensor of a list": {"$tensor": [[]]},
    "path of a list": {"$path": ["a"]},
    "text that needs no base64": {"$str": "YWJj"},
}


def values() -> dict[str, Any]:
    """Values that numpy, torch or Python would read by more than a decoder."""
    coded = damaged({f"value {name}": holding(one) for name, one in _VALUES.items()})
    pairs = {"$dict": [["a", 1], ["b", 2]]}
    for permutation in ((0,), (-1, 0), (0, 2**70), (0, 1, 2)):
        document = holding(pairs, order=((0, permutation),))
        coded[f"order {permutation}"] = (document, "document-damaged")
    coded["value a whole number of any size"] = (holding(10**4000), "cannot-store")
    return coded
