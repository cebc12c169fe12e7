"""Documents that somebody edited to make a load do something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from msgspec.structs import replace
from torch import nn

from ckpt.core.documents import Conditions, Document, Tensor
from ckpt.loader.probe import record_probe
from ckpt.loader.replica import drafted
from ckpt.loader.snapshot import capture_module

Attack = tuple[Callable[[Document], Document], list[str]]


def base() -> tuple[Document, dict[str, bytes]]:
    """A harmless module with tensors of every kind, and the bytes of every chunk."""
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.ReLU())
    net[0].plain = torch.ones(4)
    net[0].view = net[0].plain[1:3]
    net[0].sparse = torch.eye(3).to_sparse()
    net[0].generator = torch.Generator()
    net[0].array = torch.arange(3).numpy()
    net[0].strided = torch.rand(2, 3).t()
    captured = capture_module(net)
    recorded = record_probe(captured, (torch.ones(2, 3),))
    probed = drafted(recorded.captured, digests=True).tensors
    document = replace(
        drafted(captured, digests=True), probe=replace(recorded.probe, tensors=probed)
    )
    known = {}
    sources = (*captured.sources, *recorded.captured.sources)
    for entry, source in zip((*document.tensors, *probed), sources, strict=True):
        if source is not None and source.nbytes:
            known[entry.chunks[0]] = bytes(source.read(0, source.nbytes))
    return document, known


def index_of(document: Document, name: str) -> int:
    return next(n for n, tensor in enumerate(document.tensors) if tensor.name == name)


def with_module(**changes: Any) -> Callable[[Document], Document]:
    """The first Linear described otherwise."""

    def edit(document: Document) -> Document:
        modules = list(document.modules)
        modules[1] = replace(modules[1], **changes)
        return replace(document, modules=tuple(modules))

    return edit


def with_attribute(value: Any, name: str = "extra") -> Callable[[Document], Document]:
    """One more attribute of the first Linear."""

    def edit(document: Document) -> Document:
        attributes = {**document.modules[1].attrs, name: value}
        return with_module(attrs=attributes)(document)

    return edit


def with_tensor(entry: str, **changes: Any) -> Callable[[Document], Document]:
    """One tensor entry described otherwise."""

    def edit(document: Document) -> Document:
        tensors = list(document.tensors)
        place = index_of(document, entry)
        tensors[place] = replace(tensors[place], **changes)
        return replace(document, tensors=tuple(tensors))

    return edit


def with_probe(**changes: Any) -> Callable[[Document], Document]:
    """The probe recorded otherwise."""

    def edit(document: Document) -> Document:
        assert document.probe is not None
        return replace(document, probe=replace(document.probe, **changes))

    return edit


def with_conditions(**changes: Any) -> Callable[[Document], Document]:
    """The probe's conditions recorded otherwise."""

    def edit(document: Document) -> Document:
        assert document.probe is not None
        conditions: Conditions = replace(document.probe.conditions, **changes)
        return with_probe(conditions=conditions)(document)

    return edit


_NAMES = [
    "os:system",
    "subprocess:Popen",
    "builtins:eval",
    "builtins:exec",
    "importlib:import_module",
    "ctypes:CDLL",
    "torch:load",
    "torch.hub:load",
    "torch.jit:load",
    "pickle:loads",
    "sys:exit",
    "torch.fx.graph_module:GraphModule",
    "torch.nn.modules.linear:Tensor",
    "shutil:rmtree",
    "torch.nn.modules.module:itertools.chain",
    "torch.utils.data:Dataset",
    "antigravity:fly",
    "torch.nn.modules.linear:NoSuch",
    "no_such_package.deep:Net",
    "socket:create_connection",
    "torch._dynamo:reset",
    "webbrowser:open",
    "code:interact",
    "pty:spawn",
    "this:s",
]
_MALFORMED = [
    "",
    ":",
    "torch.nn",
    "torch.nn.modules.linear:__builtins__",
    "os:system()",
    "..os:system",
    "torch.nn.modules.linear:Linear.__init__.__globals__",
    "torch nn:Linear",
    "a" * 70_000 + ":B",
    "torch.nn.modules.linear:L\u0456near",
    "os\n:system",
    "../../etc:passwd",
    "torch/nn:Linear",
]
_TRUSTED = ["os", "subprocess", "builtins", "torch", "shutil", "sys", "pickle", "socket"]
_SHADOWING = [
    "forward",
    "__call__",
    "__class__",
    "__dict__",
    "_parameters",
    "_modules",
    "_forward_hooks",
    "training",
    "state_dict",
    "__setstate__",
    "_call_impl",
]
_VALUES: dict[str, Any] = {
    "unknown tag": {"$code": "x"},
    "two tags": {"$tuple": [], "$set": []},
    "no tag": {},
    "tensor of text": {"$tensor": "0"},
    "tensor beyond": {"$tensor": 10**9},
    "tensor below": {"$tensor": -1},
    "tensor of truth": {"$tensor": True},
    "module beyond": {"$module": 99},
    "module below": {"$module": -1},
    "module of a list": {"$module": [0]},
    "dict of text": {"$dict": "ab"},
    "dict twice": {"$dict": [["a", 1], ["a", 2]]},
    "set of lists": {"$set": [[1]]},
    "hostile dtype": {"$dtype": "__builtins__"},
    "dtype of a module": {"$dtype": "nn"},
    "hostile layout": {"$layout": "load"},
    "hostile device": {"$device": "cuda:-7x"},
    "bad base64": {"$bytes": "!"},
    "bad float": {"$float": "zz"},
    "long path": {"$path": "\0"},
    "numpy objects": {"$npscalar": ["|O", "AAAAAAAAAAA="]},
    "numpy structures": {"$npscalar": ["[('a', '|O')]", ""]},
    "huge range": {"$range": [0, 10**30, 1]},
    "huge size": {"$size": [10**30]},
    "factory": {"$defaultdict": ["eval", []]},
    "deque": {"$deque": ["x", []]},
    "generator": {"$generator": ["cpu", 0]},
    "generator device": {"$generator": ["cuda:99", 0]},
    "partial of nothing": {"$partial": []},
    "partial of text": {"$partial": ["os", [], {}]},
    "enum of a class": {"$enum": ["torch.nn.modules.linear:Linear", "x"]},
    "object of torch": {"$object": ["torch.nn.modules.linear:Linear", {}]},
    "object of text": {"$object": "os:system"},
    "class of a list": {"$class": ["os:system"]},
    "deep": None,
}


def _deep() -> Any:
    value: Any = 1
    for _ in range(3000):
        value = [value]
    return value


_VALUES["deep"] = _deep()


def attacks() -> dict[str, Attack]:
    """Every attack by name: what it edits, and what its loader trusts."""
    found: dict[str, Attack] = {}
    for name in _NAMES:
        found[f"class {name}"] = (with_module(reference=name), [])
        found[f"class {name}, trusted"] = (with_module(reference=name), _TRUSTED)
    for name in _NAMES[:8]:
        found[f"function {name}"] = (with_attribute({"$function": name}), [])
        found[f"class value {name}"] = (with_attribute([{"$class": name}]), [])
        found[f"object {name}"] = (with_attribute({"$object": [name, {}]}), _TRUSTED)
        found[f"enum {name}"] = (with_attribute({"$tuple": [{"$enum": [name, "x"]}]}), _TRUSTED)
        partial = {"$partial": [{"$function": name}, {"$tuple": ["id"]}, {"$dict": []}]}
        found[f"partial {name}"] = (with_attribute({"$dict": [["k", partial]]}), [])
        hook = ("_forward_hooks", {"$object": [name, {}]})
        found[f"hook {name}"] = (with_module(hooks=(hook,)), [])
    for name in _MALFORMED:
        found[f"malformed {name[:40]!r}"] = (with_module(reference=name), _TRUSTED)
    for name in _SHADOWING:
        value = {"$function": "torch.nn.functional:relu"}
        found[f"attribute {name}"] = (with_attribute(value, name), [])
    for name, value in _VALUES.items():
        found[f"value {name}"] = (with_attribute(value), [])
    return found | _structures() | _tensors() | _probes()


def _structures() -> dict[str, Attack]:
    edits: dict[str, Callable[[Document], Document]] = {
        "child cycle": with_module(children=(("again", 0),)),
        "child beyond": with_module(children=(("x", 99),)),
        "child below": with_module(children=(("x", -1),)),
        "parameter beyond": with_module(params=(("weight", 10**6),)),
        "parameter is a buffer": with_module(params=(("weight", 3),)),
        "parametrized without": with_module(parametrized=("forward",)),
        "parametrized dunder": with_module(parametrized=("__class__",)),
        "hook at no place": with_module(hooks=(("__class__", {"$tuple": []}),)),
        "hook is text": with_module(hooks=(("_forward_hooks", "os.system"),)),
        "lazy that is not": with_module(reference="torch.nn.modules.linear:LazyLinear"),
        "another class": with_module(reference="torch.nn.modules.rnn:LSTM"),
        "abstract class": with_module(reference="torch.nn.modules.module:Module"),
        "no modules": lambda document: replace(document, modules=()),
        "root is a list": lambda document: replace(document, root=[1]),
        "root is no module": lambda document: replace(document, root={"$tensor": 0}),
        "root beyond": lambda document: replace(document, root={"$module": 7}),
        "order of nothing": lambda document: replace(document, order=((0, (5, 5)),)),
        "dropped": lambda document: replace(document, dropped=("0.weight", "0.plain")),
    }
    return {f"structure {name}": (edit, []) for name, edit in edits.items()}


def _tensors() -> dict[str, Attack]:
    edits: dict[str, Callable[[Document], Document]] = {
        "shape beyond its bytes": with_tensor("0.plain", shape=(1 << 40,)),
        "shape overflows": with_tensor("0.plain", shape=(1 << 62, 1 << 62)),
        "negative shape": with_tensor("0.plain", shape=(-4,)),
        "other shape": with_tensor("0.plain", shape=(2, 3)),
        "no chunks": with_tensor("0.plain", chunks=()),
        "many chunks": with_tensor("0.plain", chunks=("0" * 64,) * 100),
        "unknown dtype": with_tensor("0.plain", dtype="__builtins__"),
        "other dtype": with_tensor("0.plain", dtype="complex128"),
        "strides beyond": with_tensor("0.strided", strides=(10**9, 1)),
        "negative strides": with_tensor("0.strided", strides=(-1, 1)),
        "few strides": with_tensor("0.strided", strides=(1,)),
        "view beyond": with_tensor("0.view", offset=10**9),
        "view before": with_tensor("0.view", offset=-4),
        "view strides": with_tensor("0.view", strides=(10**12,)),
        "view of itself": lambda d: with_tensor("0.view", region=index_of(d, "0.view"))(d),
        "view of nothing": with_tensor("0.view", region=10**6),
        "view of a view": lambda d: with_tensor("0.plain", region=index_of(d, "0.view"))(d),
        "odd view": with_tensor("0.view", offset=3),
        "align": with_tensor("0.plain", align=999),
        "sparse cycle": lambda d: with_tensor(
            "0.sparse", components=dict.fromkeys(("indices", "values"), index_of(d, "0.sparse"))
        )(d),
        "sparse without values": with_tensor("0.sparse", components={"indices": 0}),
        "sparse of others": with_tensor("0.sparse", components={"indices": 0, "values": 0}),
        "sparse too small": with_tensor("0.sparse", shape=(1, 1)),
        "unknown layout": with_tensor("0.sparse", layout="load"),
        "quantized": with_tensor("0.sparse", layout="quantized", details={"scheme": "x"}),
        "quantized without": with_tensor("0.sparse", layout="quantized"),
        "array of objects": with_tensor("0.array", details={"numpy": "|O", "shape": [3]}),
        "array of code": with_tensor("0.array", details={"numpy": [["a", "os"]], "shape": [3]}),
        "array shape": with_tensor("0.array", details={"numpy": "|u1", "shape": [-7, 5]}),
        "uninitialized": with_tensor("0.weight", kind="uninitialized-parameter", chunks=()),
        "unknown kind": with_tensor("0.weight", kind="../../etc"),
        "parameter of whole numbers": with_tensor("0.weight", dtype="int32"),
        "hostile device": with_tensor("0.weight", device="cuda:99999"),
        "no device": with_tensor("0.weight", device="; rm -rf /"),
        "short generator": lambda d: with_tensor(
            "0.generator.state", shape=(1,), chunks=d.tensors[0].chunks
        )(d),
        "names twice": with_tensor("0.weight", name="0.bias"),
    }
    return {f"tensor {name}": (edit, []) for name, edit in edits.items()}


def _probes() -> dict[str, Attack]:
    tensor = Tensor(name="x", dtype="float32", shape=(1,), chunks=("0" * 64,))
    edits: dict[str, Callable[[Document], Document]] = {
        "no root": with_probe(root={"$dict": []}),
        "root of text": with_probe(root="os.system"),
        "inputs of text": with_probe(
            root={
                "$dict": [["inputs", "x"], ["outputs", {"$dict": []}], ["reference", {"$dict": []}]]
            }
        ),
        "function as input": with_probe(root={"$tuple": [{"$function": "os:system"}]}),
        "no tensors": with_probe(tensors=()),
        "other tensors": with_probe(tensors=(tensor,) * 3),
        "negative seed": with_probe(seed=-1),
        "huge seed": with_probe(seed=1 << 70),
        "no threads": with_conditions(threads=-5),
        "a million threads": with_conditions(threads=10**6),
        "unknown device": with_conditions(device="nowhere"),
        "absent device": with_conditions(device="cuda:99"),
        "unknown precision": with_conditions(flags={"float32_matmul": "evil"}),
        "unknown dtype": with_conditions(flags={"default_dtype": "__class__"}),
        "whole numbers by default": with_conditions(flags={"default_dtype": "int8"}),
        "unknown flag": with_conditions(flags={"__class__": "x"}),
    }
    return {f"probe {name}": (edit, []) for name, edit in edits.items()}
