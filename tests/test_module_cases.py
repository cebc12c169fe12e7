"""Modules that keep more than parameters, and every refusal that a push may end with."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import types
import warnings
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from kept_models import (
    Backward,
    Calling,
    Defaulting,
    Delegating,
    Fresh,
    Keeping,
    Listing,
    Locking,
    LockingAgain,
    NeedsArguments,
    OwnPartial,
    Passing,
    Shared,
    Strange,
    double,
)
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import ckpt
from ckpt.core.errors import IntegrityError, UsageError

TRUST = ["kept_models"]


def pruned(twice: bool) -> nn.Module:
    linear = nn.Linear(4, 5)
    prune.l1_unstructured(linear, "weight", 0.5)  # type: ignore[no-untyped-call]
    if twice:  # makes a container of both
        prune.random_unstructured(linear, "weight", 0.2)  # type: ignore[no-untyped-call]
    return linear


def old(norm: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, of its older norms
        return norm(nn.Linear(4, 5))  # type: ignore[no-any-return]


class Bagged(nn.Module):
    """Dictionaries of modules and of parameters, names with blanks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"x y": nn.Linear(4, 4)})
        self.values = nn.ParameterDict({"a b": nn.Parameter(torch.ones(4))})
        self.more = nn.ParameterList([nn.Parameter(torch.zeros(4))])


class Slotted(nn.Module):
    """Keeps a value where no module's dict has it."""

    __slots__ = ("scale",)


X, TOKENS = torch.rand(3, 2, 4), torch.tensor([[1, 2, 3], [0, 1, 1]])
LIBRARY: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "LSTM": (lambda: nn.LSTM(4, 4, 2), (X,)),
    "GRU": (lambda: nn.GRU(4, 4, bidirectional=True), (X,)),
    "encoder": (lambda: nn.TransformerEncoderLayer(4, 2, 8).eval(), (X,)),
    "transformer": (lambda: nn.Transformer(4, 2, 1, 1, 8, batch_first=True).eval(), (X, X)),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (X, X, X)),
    "norm": (lambda: nn.BatchNorm1d(2), (X,)),
    "instance": (lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), (X,)),
    "embedding bag": (lambda: nn.EmbeddingBag(4, 3), (TOKENS,)),
    "adaptive": (
        lambda: nn.AdaptiveLogSoftmaxWithLoss(4, 8, [2, 5], div_value=2.0),
        (X[:, 0], TOKENS[0]),
    ),
    "bilinear": (lambda: nn.Bilinear(4, 4, 2), (X, X)),
    "convolution": (lambda: nn.Conv1d(2, 3, 2, padding="same", padding_mode="circular"), (X,)),
    "lazy convolution": (lambda: nn.Sequential(nn.LazyConv1d(3, 2), nn.LazyBatchNorm1d()), (X,)),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), (X,)),
    "spectral norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 5)), (X,)),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (X,)),
    "old weight norm": (lambda: old(weight_norm), (X,)),
    "old spectral norm": (lambda: old(spectral_norm).eval(), (X,)),
    "pruned": (lambda: pruned(False), (X,)),
    "pruned twice": (lambda: pruned(True), (X,)),
    "averaged": (lambda: torch.optim.swa_utils.AveragedModel(nn.Linear(4, 4)), (X,)),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_a_module_of_torch_comes_back_with_equal_outputs(repo: ckpt.Repository, name: str) -> None:
    make, inputs = LIBRARY[name]
    torch.manual_seed(0)
    repo.push(make(), "m", inputs=inputs)
    trust = ["torch.optim.swa_utils"] if name == "averaged" else []
    assert repo.verify("m", trust=trust).verdict == "outputs-exact"


def test_every_kind_of_attribute_is_kept(repo: ckpt.Repository) -> None:
    net = Keeping()
    repo.push(net, "m", inputs=(torch.rand(3, 2),))
    loaded: Any = repo.load("m", trust=TRUST, require="outputs-exact")
    assert loaded.mode is net.mode
    assert loaded.settings.width == 3
    assert loaded.function is net.function
    assert loaded.numbers == net.numbers
    assert loaded.floats == net.floats
    assert loaded.array.dtype == net.array.dtype
    assert list(loaded.ordered) == ["b", "a"]
    assert loaded.same is loaded.linear.weight
    assert loaded.view.data_ptr() == loaded.linear.weight.data_ptr()
    assert loaded.missing is None
    assert "absent" in loaded._parameters
    assert torch.rand(1, generator=loaded.generator) == torch.rand(1, generator=net.generator)


def test_every_kind_of_tensor_is_kept(repo: ckpt.Repository) -> None:
    net: Any = Strange()
    repo.push(net, "m", inputs=(torch.rand(2, 3),))
    loaded: Any = repo.load("m", trust=TRUST, require="outputs-exact")
    for name in ("whole", "row", "transposed", "expanded", "channels", "empty", "scalar"):
        before, after = getattr(net, name), getattr(loaded, name)
        assert torch.equal(before, after), name
        assert before.stride() == after.stride(), name
    loaded.whole[1, 0] = 77
    assert loaded.row[0] == 77
    loaded.shared[0][1] = 5
    assert loaded.shared[1][0] == 5


def test_a_child_that_knows_its_parent_comes_back(repo: ckpt.Repository) -> None:
    repo.push(Backward(), "m")
    loaded: Any = repo.load("m", trust=TRUST)
    assert loaded.child.owner[0] is loaded


class TestLeftOut:
    """``drop`` leaves attributes out, and says so at the push and at the load."""

    def test_what_cannot_be_stored_is_named_with_the_way_out(self, repo: ckpt.Repository) -> None:
        with pytest.raises(UsageError, match=r'lock: cannot store _thread\.lock.*drop=\["lock"\]'):
            repo.push(Locking(), "m")

    def test_a_dropped_attribute_is_not_there_and_named(self, repo: ckpt.Repository) -> None:
        repo.push(nn.Sequential(Locking()), "m", drop=["0.lock"], inputs=(torch.ones(2, 2),))
        with pytest.warns(ckpt.CkptWarning, match=r"left out at the push: 0\.lock"):
            loaded: Any = repo.load("m", trust=TRUST, require="outputs-exact")
        assert not hasattr(loaded[0], "lock")

    def test_a_class_may_make_it_again(self, repo: ckpt.Repository) -> None:
        repo.push(LockingAgain(), "m", drop="lock")
        with pytest.warns(ckpt.CkptWarning, match="left out"):
            loaded: Any = repo.load("m", trust=TRUST)
        assert loaded.lock.acquire(blocking=False)

    @pytest.mark.parametrize("state", [nn.Linear(1, 1), {"w": torch.ones(1)}])
    def test_a_name_that_is_not_there_is_refused(self, repo: ckpt.Repository, state: Any) -> None:
        with pytest.raises(UsageError, match="cannot leave out locks"):
            repo.push(state, "m", drop=["locks"])


def local_class() -> nn.Module:
    class Net(nn.Module):
        pass

    return Net()


def with_attribute(value: Any) -> nn.Module:
    net = nn.Linear(2, 2)
    net.extra = value
    return net


def with_hook(place: str) -> nn.Module:
    net = nn.Sequential(nn.Linear(2, 2))
    getattr(net[0], f"register_{place}")(lambda *given: None)
    return net


def quantized_view() -> list[torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the end of these types
        whole = torch.quantize_per_tensor(torch.rand(4), 0.1, 0, torch.qint8)
    return [whole, whole[1:]]


def forward_by_class() -> nn.Module:
    net: Any = nn.Linear(2, 2)
    vars(net)["forward"] = nn.ReLU
    return net  # type: ignore[no-any-return]


def marked() -> Any:
    made = functools.partial(double)
    made.note = 1  # type: ignore[attr-defined]
    return made


def itself() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


def nested() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that their API may change
        return torch.nested.nested_tensor([torch.ones(1), torch.ones(2)])


REFUSED: dict[str, tuple[Any, str]] = {
    "lambda": (lambda: with_attribute(lambda x: x), "extra: a lambda has no import path; use a"),
    "local": (local_class, "<root>: .*Net is defined inside a function.*move the class"),
    "method": (lambda: with_attribute([].append), "extra: "),
    "bound": (lambda: with_attribute(nn.Linear(1, 1).forward), "extra: a bound method"),
    "hook": (lambda: with_hook("forward_hook"), "0: forward hook .*lambda.*cannot be stored"),
    "pre-hook": (lambda: with_hook("forward_pre_hook"), "0: forward pre-hook"),
    "backward": (lambda: with_hook("full_backward_hook"), "0: backward hook"),
    "nested": (lambda: with_attribute(nested()), "extra: a nested tensor; keep its parts"),
    "meta": (lambda: nn.Linear(2, 2, device="meta"), "weight: on device meta"),
    "script": (lambda: nn.Sequential(torch.jit.script(nn.ReLU())), "carries generated code"),
    "graph": (lambda: torch.fx.symbolic_trace(nn.ReLU()), "GraphModule carries generated code"),
    "cycle": (lambda: with_attribute(itself()), "extra.0: it contains itself"),
    "file": (lambda: with_attribute(sys.stdout), "extra: cannot store"),
    "arguments": (lambda: NeedsArguments(3), "cannot be rebuilt.*__new__"),
    "quantized view": (
        lambda: with_attribute(quantized_view()),
        "extra.1: shares quantized memory with extra.0",
    ),
    "operator": (lambda: with_attribute(torch.ops.aten.relu), "1 value .* extra: an operator of"),
    "overload": (lambda: with_attribute(torch.ops.aten.relu.default), "extra: an operator of"),
    "method by a class": (forward_by_class, 'forward: attribute "forward" would replace a method'),
    "own partial": (lambda: with_attribute(OwnPartial(double)), "extra: a partial with a class"),
    "marked partial": (lambda: with_attribute(marked()), "extra: a partial with .*attributes"),
    "list": (Listing, "<root>: Listing is a list too, whose items are not in its dict; keep them"),
    "compiled function": (
        lambda: with_attribute(torch.compile(double)),
        "extra: a wrapped kept_models.double, .* wrap it where it is defined",
    ),
    "slots": (Slotted, "<root>: Slotted has __slots__"),
    "flags": (
        lambda: with_attribute([re.IGNORECASE | re.MULTILINE]),
        "extra.0: a combination of flags",
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit's own
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_stored_is_refused_with_its_path(repo: ckpt.Repository, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(UsageError, match=message):
        repo.push(make(), "m")
    assert repo.models() == []
    assert not list(repo.location.store.glob("packs/*/*"))


def test_an_object_that_several_modules_share_is_one_again(repo: ckpt.Repository) -> None:
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    shared, alone = Shared(width=3), Shared(width=3)
    net[0].settings = net[1][0].settings = net.settings = shared
    net[2].settings = [alone, Shared(inner=shared)]
    repo.push(net, "m", inputs=(torch.rand(1, 2),))
    loaded: Any = repo.load("m", trust=TRUST, require="outputs-exact")
    assert loaded[0].settings is loaded[1][0].settings is loaded.settings
    assert loaded[2].settings[1].inner is loaded.settings
    assert loaded[2].settings[0] is not loaded.settings
    assert (loaded.settings.width, loaded[2].settings[0].width) == (3, 3)
    net[0].settings = Shared(width=3)  # other values nowhere, and another structure
    assert repo.push(net, "m").number == 2


def test_a_method_of_a_module_in_it_is_one_of_the_loaded_module(repo: ckpt.Repository) -> None:
    net = Calling()
    repo.push(net, "m", inputs=(torch.rand(1, 2),))
    loaded: Any = repo.load("m", trust=TRUST, require="outputs-exact")
    assert loaded.step == loaded.inner.forward
    assert loaded.steps[0] == loaded.scale
    assert isinstance(loaded.steps[1], functools.partial)
    classes: list[Any] = [Calling, Delegating, double]
    methods: list[Any] = [Calling.scale, Delegating.forward]
    with pytest.raises(ckpt.CkptError, match=r"2 classes .*: kept_models:Calling\.scale, "):
        repo.load("m", trust=classes)
    repo.load("m", trust=[*classes, *methods])


def test_a_bound_method_of_another_function_or_module_is_refused(repo: ckpt.Repository) -> None:
    for value in (Calling().scale, types.MethodType(double, torch.ones(1)), Calling.register):
        with pytest.raises(UsageError, match="extra: a bound method"):
            repo.push(with_attribute(value), "m")
    net: Any = with_attribute(None)
    net.extra = types.MethodType(double, net)
    with pytest.raises(UsageError, match="extra: a bound method"):
        repo.push(net, "m")


def test_a_generator_that_several_modules_hold_is_one_again(repo: ckpt.Repository) -> None:
    net: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].draws = net[1].draws = net.draws = torch.Generator().manual_seed(3)
    net[0].own = torch.Generator().manual_seed(3)
    repo.push(net, "m")
    loaded: Any = repo.load("m")
    assert loaded[0].draws is loaded[1].draws is loaded.draws
    assert loaded[0].own is not loaded.draws
    assert repo.push(loaded, "m").number == 1


def test_objects_that_live_only_while_they_are_described_are_not_taken_for_one(
    repo: ckpt.Repository,
) -> None:
    repo.push(nn.Sequential(*map(Fresh, range(20))), "m")
    loaded: Any = repo.load("m", trust=TRUST)
    assert [one.made.number for one in loaded] == list(range(20))


def test_modules_that_live_only_while_they_are_described_are_not_taken_for_one(
    repo: ckpt.Repository,
) -> None:
    repo.push(nn.Sequential(*(Passing(float(number)) for number in range(20))), "m")
    loaded: Any = repo.load("m", trust=TRUST)
    assert [one.linear.weight.item() for one in loaded] == list(range(20))


def test_modules_nested_deeper_than_the_interpreter_goes_are_refused(
    repo: ckpt.Repository,
) -> None:
    net: nn.Module = nn.Linear(2, 2)
    for _ in range(200):
        net = nn.Sequential(net)
    with pytest.raises(UsageError, match="nested too deeply") as caught:
        repo.push(net, "m")
    assert caught.value.code == "cannot-store"


def test_hooks_of_state_dict_are_named_and_refuse_nothing(repo: ckpt.Repository) -> None:
    net = nn.Sequential(nn.Linear(2, 2))
    child: Any = net[0]
    child.register_state_dict_post_hook(lambda *given: None)
    with pytest.warns(ckpt.CkptWarning, match="0: state_dict hook .*lambda.* is not stored"):
        repo.push(net, "m")


def test_what_hangs_on_a_parameter_is_named_and_refuses_nothing(repo: ckpt.Repository) -> None:
    net: Any = nn.Sequential(nn.Linear(2, 2))
    net[0].weight._no_weight_decay = True
    net[0].bias.register_hook(lambda gradient: gradient)
    with pytest.warns(ckpt.CkptWarning) as said:
        repo.push(net, "m")
    assert [str(one.message) for one in said] == [
        "0.weight: its attribute _no_weight_decay is not stored",
        "0.bias: its hooks are not stored",
    ]


def test_what_was_computed_with_gradients_is_named_and_comes_back_detached(
    repo: ckpt.Repository,
) -> None:
    net: Any = nn.Sequential(nn.Linear(2, 2))
    net[0].back = net[0].weight.t()
    net[0].cache = [net[0].weight * 2, net[0].weight.detach(), torch.ones(1, requires_grad=True)]
    with pytest.warns(ckpt.CkptWarning) as said:
        repo.push(net, "m")
    (note,) = [str(one.message) for one in said]
    assert note.startswith("0.back, 0.cache.0 are results of other tensors")
    assert note.endswith("they come back detached")
    assert not repo.load("m").get_submodule("0").back.requires_grad
    with pytest.warns(ckpt.CkptWarning, match="loss is a result of other tensors"):
        repo.push({"loss": net(torch.ones(2)).sum()}, "values")


@pytest.mark.parametrize("norm", [nn.RMSNorm, functools.partial(nn.RMSNorm, eps=0.5)])
def test_a_class_that_stands_in_a_class_by_default_gives_way_to_another(
    repo: ckpt.Repository, norm: Any
) -> None:
    repo.push(Defaulting(norm), "m", inputs=(torch.rand(1, 2),))
    loaded: Any = repo.load("m", trust=TRUST, require="outputs-exact")
    assert repr(loaded.norm) == repr(norm)
    assert type(loaded.layer) is nn.RMSNorm


def test_a_default_class_gives_way_to_nothing_but_a_class(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push(Defaulting(nn.RMSNorm), "m")
    document = repo.document("m")
    first, *rest = document.modules
    attrs = {**first.attrs, "norm": {"$function": "torch:relu"}}
    edited = msgspec.structs.replace(
        document, modules=(msgspec.structs.replace(first, attrs=attrs), *rest)
    )
    monkeypatch.setattr(repo._registry.queries, "document", lambda version: edited)
    with pytest.raises(IntegrityError, match='"norm" would replace a method'):
        repo.load("m", trust=TRUST)


@pytest.mark.parametrize("function", [torch.sign, abs])
def test_a_function_that_is_given_is_trusted_alone(repo: ckpt.Repository, function: Any) -> None:
    repo.push(with_attribute(function), "m")
    assert repo.load("m", trust=[function]).extra is function
    with pytest.raises(ckpt.CkptError) as caught:
        repo.load("m")
    assert caught.value.code == "class-not-allowed"
    assert "builtins" not in (caught.value.hint or "")


@pytest.mark.filterwarnings("ignore")  # torch's own, of older norms and of where weights lie
@pytest.mark.parametrize("norm", [None, weight_norm, spectral_norm, parametrizations.weight_norm])
def test_what_a_stored_hook_computes_again_is_not_named(repo: ckpt.Repository, norm: Any) -> None:
    net = nn.ModuleList([nn.Linear(4, 4), nn.LSTM(4, 4)])
    for module, name in ((net[0], "weight"), (net[1], "weight_hh_l0"), (net[1], "weight_ih_l0")):
        if norm is None:
            prune.l1_unstructured(module, name, 1)  # type: ignore[no-untyped-call]
        else:
            norm(module, name)
        module(torch.ones(2, 4))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", ckpt.CkptWarning)
        repo.push(net, "m")
    assert not [one for one in said if one.category is ckpt.CkptWarning]


@pytest.mark.parametrize(
    "function",
    [torch.relu, torch.softmax, torch.exp, functional.relu, functional.gelu, functional.logsigmoid],
)
def test_a_function_of_torch_is_stored_by_name_and_trusted(
    repo: ckpt.Repository, function: Any
) -> None:
    repo.push(with_attribute(function), "m")
    assert repo.load("m").extra is function


_SCRIPT = """
import sys, warnings, torch, ckpt
from torch import nn
warnings.simplefilter("error")
class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(2, 2)
    def forward(self, x):
        return self.out(x)
with ckpt.open(sys.argv[1]) as repo:
    if sys.argv[2] == "push":
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            version = repo.push(MLP(), "mlp", inputs=(torch.ones(2, 2),))
        print(said[0].message)
        print(version.proof.kind, version.proof.reason)
    else:
        try:
            repo.load("mlp")
        except ckpt.CkptError as error:
            print(error)
        print(repo.verify("mlp", trust=[MLP]).verdict)
"""


def test_a_class_of_a_script_is_proven_there_and_loaded_by_another_script(tmp_path: Path) -> None:
    outputs = []
    for name, verb in (("train.py", "push"), ("serve.py", "load")):
        script = tmp_path / name
        script.write_text(_SCRIPT)
        command = [sys.executable, str(script), str(tmp_path), verb]
        outputs.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert "__main__:MLP was defined in this script; to load, give trust=[MLP]" in outputs[0]
    assert "in-process __main__:MLP is of the running script" in outputs[0]
    assert "__main__:MLP; nothing was imported" in outputs[1]
    assert outputs[1].endswith("outputs-exact\n")


def test_a_class_of_a_script_that_moved_to_a_module_is_loaded_by_giving_it(tmp_path: Path) -> None:
    text = (
        "import ckpt, sys, warnings\nfrom torch import nn\nfrom enum import Enum\n"
        "class Mode(Enum):\n    FAST = 1\n"
        "class MLP(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.kind, self.modes = MLP, [{'mode': Mode.FAST}]\n"
        "        self.out = nn.Linear(2, 2)\n"
    )
    pushing = "warnings.simplefilter('ignore')\nckpt.open(sys.argv[1]).push(MLP(), 'mlp')\n"
    loading = (
        "import ckpt, sys, moved\nnet = ckpt.open(sys.argv[1]).load('mlp', "
        "trust=[moved.MLP, moved.Mode])\nprint(type(net), net.kind, net.modes)\n"
    )
    (tmp_path / "moved.py").write_text(text)
    for name, script in (("train.py", text + pushing), ("serve.py", loading)):
        (tmp_path / name).write_text(script)
        command = [sys.executable, str(tmp_path / name), str(tmp_path)]
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found == ("<class 'moved.MLP'> <class 'moved.MLP'> [{'mode': <Mode.FAST: 1>}]\n")


def test_a_class_of_a_script_may_have_the_name_of_one_of_torch(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(
        "import ckpt, sys, torch, warnings\nfrom torch import nn\n"
        "class Linear(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.inner = nn.Linear(2, 2)\n"
        "    def forward(self, x):\n        return self.inner(x)\n"
        "warnings.simplefilter('ignore')\nrepo = ckpt.open(sys.argv[1])\n"
        "repo.push(Linear(), 'm', inputs=(torch.ones(1, 2),))\n"
        "net = repo.load('m', trust=[Linear], require='outputs-exact')\n"
        "print(type(net), type(net.inner).__module__)\n"
    )
    command = [sys.executable, str(script), str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found == "<class '__main__.Linear'> torch.nn.modules.linear\n"


_NOTEBOOK = """
import linecache, sys, warnings, torch, ckpt
from torch import nn
warnings.simplefilter("ignore")
def run_cell(text, number):
    name = f"<cell {number}>"
    linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
    exec(compile(text, name, "exec"), globals())
cell = "class MLP(nn.Module):\\n    def forward(self, x):\\n        return x + 1\\n"
with ckpt.open(sys.argv[1]) as repo:
    run_cell(cell, 1)
    net = MLP()
    run_cell(cell, 2)
    print(repo.push(net, "mlp", inputs=(torch.ones(2),)))
    print(repo.document("mlp").classes[0].source_digest is not None)
    run_cell(cell.replace("1", "2"), 3)
    print(repo.describe("mlp").classes[0].source)
    try:
        repo.push(net, "mlp")
    except ckpt.CkptError as error:
        print(error)
"""


def test_a_cell_that_was_run_again_is_the_same_class_and_an_edited_one_is_not(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-c", _NOTEBOOK, str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert found.splitlines()[:3] == ["mlp@1", "True", "changed"]
    assert "__main__.MLP now names a different object" in found


class TestDevices:
    """Recorded devices: a machine with a GPU is told by its document alone."""

    def elsewhere(self, repo: ckpt.Repository, monkeypatch: Any, *devices: str) -> None:
        """Push a module as if its tensors had been on these devices, one after the other."""
        from msgspec.structs import replace

        from ckpt.loader.snapshot import capture_module

        def recorded(state: nn.Module, drop: Any) -> Any:
            import dataclasses

            captured = capture_module(state, drop)
            names = [devices[place % len(devices)] for place in range(len(captured.tensors))]
            tensors = tuple(
                replace(one, device=name) for one, name in zip(captured.tensors, names, strict=True)
            )
            return dataclasses.replace(captured, tensors=tensors)

        monkeypatch.setattr("ckpt.service.describe.capture_state", recorded)
        net = nn.Linear(2, 2)
        net.plain = torch.ones(2)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ckpt.CkptWarning)  # the proof has no such device
            repo.push(net, "m")

    def test_an_absent_device_is_named_and_the_cpu_taken(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.elsewhere(repo, monkeypatch, "cuda:99")
        assert {tensor.device for tensor in repo.document("m").tensors} == {"cuda:99"}
        with pytest.warns(ckpt.CkptWarning, match="cuda:99 is not available here; loaded on cpu"):
            loaded: Any = repo.load("m")
        assert loaded.plain.device.type == "cpu"

    def test_plain_tensors_move_with_the_module(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.elsewhere(repo, monkeypatch, "cuda:7")
        loaded: Any = repo.load("m", device="cpu")
        assert {str(one.device) for one in (loaded.weight, loaded.bias, loaded.plain)} == {"cpu"}

    def test_several_devices_ask_for_a_mapping(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.elsewhere(repo, monkeypatch, "cuda:6", "cuda:7")
        with pytest.raises(UsageError, match=r'was on cuda:6 and cuda:7.*device={"cuda:6": …'):
            repo.load("m", device="cpu")
        assert repo.load("m", device={"cuda:6": "cpu", "cuda:7": "cpu"}) is not None


def test_a_broken_proof_refuses_the_load_and_says_where_the_weights_are(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push(Keeping(), "m")
    monkeypatch.setattr(Keeping, "__setstate__", lambda self, state: 1 / 0)
    with pytest.raises(IntegrityError, match=r"ZeroDivisionError.*get the weights with pull"):
        repo.load("m", trust=TRUST)
