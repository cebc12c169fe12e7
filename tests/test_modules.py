"""Modules in, the same modules out, in another interpreter; the chapter's models, case by case."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from chapter_models import MLP, FixedHiddenMLP, OldSequential, cases, shared_layer, tied
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

import ckpt
from ckpt.core.documents import Document
from ckpt.core.errors import CkptError, IntegrityError, TrustError, UsageError
from ckpt.loader.restore import Restorer
from ckpt.loader.snapshot import capture_module
from ckpt.loader.verify import check_structure

HERE = Path(__file__).parent
TRUST = ["chapter_models"]


class Meddling(nn.Linear):
    """A class that changes a weight in place when it is restored, by as much as is said."""

    by = 0.0

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.weight.data[0, 0] += self.by


class AlwaysMeddling(Meddling):
    """Cannot be rebuilt as it was."""

    by = 1.0


# What the other interpreter does: load everything, compute, and tell.
LOADING = """
import sys, torch, ckpt
from safetensors.torch import load_file, save_file
folder, trusted, *names = sys.argv[1:]
inputs = load_file(f"{folder}/inputs.safetensors")
outputs = {}
with ckpt.open(folder, create=False) as repo:
    for name in names:
        net = repo.load(name, trust=[trusted], require="outputs-exact")
        outputs[name] = net(inputs[name]).detach().clone()
save_file(outputs, f"{folder}/outputs.safetensors")
"""

CASES = list(cases())


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """All models pushed here, loaded and run in one other interpreter."""
    folder = tmp_path_factory.mktemp("chapter")
    torch.manual_seed(1)
    models = cases()
    with ckpt.open(folder) as repo:
        for name, (net, x) in models.items():
            repo.push(net, name, inputs=(x,))
        save_file(
            {name: x.clone() for name, (_, x) in models.items()}, folder / "inputs.safetensors"
        )
        path = os.pathsep.join([str(HERE), *sys.path])
        command = [sys.executable, "-c", LOADING, str(folder), "chapter_models", *models]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": path})
        outputs = load_file(folder / "outputs.safetensors")
        yield {"repo": repo, "models": models, "outputs": outputs}


@pytest.mark.parametrize("case", CASES)
def test_the_chapters_model_gives_the_same_outputs_elsewhere(
    pushed: dict[str, Any], case: str
) -> None:
    net, x = pushed["models"][case]
    assert torch.equal(net(x), pushed["outputs"][case])


@pytest.mark.parametrize("case", CASES)
def test_its_outputs_are_proven_to_be_equal(pushed: dict[str, Any], case: str) -> None:
    report = pushed["repo"].verify(case, trust=TRUST)
    assert report.verdict == "outputs-exact"
    assert all(output.equal for output in report.outputs)


@pytest.mark.parametrize("case", CASES)
def test_pull_gives_what_its_state_dict_gave(pushed: dict[str, Any], case: str) -> None:
    net, _ = pushed["models"][case]
    wanted = net.state_dict()
    if any("rand_weight" in tensor.name for tensor in pushed["repo"].document(case).tensors):
        with pytest.warns(ckpt.CkptWarning, match="rand_weight"):
            pulled = pushed["repo"].pull(case)
    else:
        pulled = pushed["repo"].pull(case)
    assert list(pulled) == list(wanted)
    assert all(torch.equal(pulled[key], wanted[key]) for key in wanted)


def test_a_plain_tensor_that_no_state_dict_holds_is_kept(pushed: dict[str, Any]) -> None:
    net, x = pushed["models"]["d"]
    loaded = pushed["repo"].load("d", trust=TRUST)
    assert torch.equal(loaded.rand_weight, net.rand_weight)
    pulled = pushed["repo"].pull("d", all=True)
    assert torch.equal(pulled["rand_weight"], net.rand_weight)
    # What other tools do here: the keys match, and the outputs are others.
    other = FixedHiddenMLP()
    other.load_state_dict(net.state_dict())
    assert not torch.equal(other(x), net(x))


def test_modules_as_keys_are_refused_with_the_fix(repo: ckpt.Repository) -> None:
    with pytest.raises(UsageError, match=r"child key of type Linear.*add_module"):
        repo.push(OldSequential(nn.Linear(2, 2)), "old")
    assert repo.models() == []


def test_a_shared_layer_is_stored_once_and_is_one_object_after(pushed: dict[str, Any]) -> None:
    loaded = pushed["repo"].load("g-shared")
    assert loaded[2] is loaded[4]
    assert len(pushed["repo"].document("g-shared").tensors) == 6


@pytest.mark.parametrize("make", [shared_layer, tied], ids=["shared", "tied"])
def test_ties_hold_through_two_optimizer_steps(repo: ckpt.Repository, make: Any) -> None:
    net = make()
    repo.push(net, "m")
    loaded = repo.load("m")
    x = torch.tensor([[1, 2]]) if make is tied else torch.rand(2, 4)
    for one in (net, loaded):
        optimizer = torch.optim.SGD(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            one(x).sum().backward()
            optimizer.step()
    assert all(
        torch.equal(a, b) for a, b in zip(net.parameters(), loaded.parameters(), strict=True)
    )


def test_an_untied_rebuild_fails_although_its_outputs_are_equal() -> None:
    net = tied()
    captured = capture_module(net)
    document = Document(
        format=1,
        state="module",
        root=captured.root,
        tensors=captured.tensors,
        environment="",
        modules=captured.modules,
    )
    untied: Any = tied()
    untied[1].weight = nn.Parameter(net.state_dict()["0.weight"].clone())
    untied[0].load_state_dict(net[0].state_dict())
    x = torch.tensor([[1, 2]])
    assert torch.equal(untied(x), net(x))
    with pytest.raises(IntegrityError, match=r"0\.weight and 1\.weight were one tensor") as caught:
        check_structure(document, untied)
    assert caught.value.code == "structure-differs"


def test_a_lazy_module_stays_lazy_and_materialises_on_use(repo: ckpt.Repository) -> None:
    lazy = nn.Sequential(nn.LazyLinear(5), nn.LazyBatchNorm1d())
    repo.push(lazy, "lazy")
    loaded: Any = repo.load("lazy")
    assert type(loaded[0]) is nn.LazyLinear
    x = torch.rand(3, 4)
    torch.manual_seed(7)
    wanted = lazy(x)
    torch.manual_seed(7)
    assert torch.equal(loaded(x), wanted)
    assert type(loaded[0]) is nn.Linear


def test_a_lazy_module_comes_out_as_a_file_without_what_has_no_values(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    repo.push(nn.Sequential(nn.LazyLinear(5), nn.Linear(2, 1)), "lazy")
    repo.pull_file("lazy", tmp_path / "lazy.safetensors")
    assert set(load_file(tmp_path / "lazy.safetensors")) == {"1.weight", "1.bias"}


def test_a_class_whose_own_code_changes_a_weight_is_refused_at_the_push(
    repo: ckpt.Repository,
) -> None:
    with pytest.raises(UsageError, match='digest of "weight"') as caught:
        repo.push(AlwaysMeddling(2, 2), "m")
    assert caught.value.code == "rebuild-failed"
    assert repo.models() == []


def test_a_class_whose_code_changes_a_weight_since_fails_the_proof(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push(Meddling(2, 2), "m")
    monkeypatch.setattr(Meddling, "by", 1.0)
    with pytest.raises(IntegrityError, match='digest of "weight"') as caught:
        repo.load("m", trust=[Meddling])
    assert caught.value.code == "structure-differs"


def test_names_with_spaces_survive(pushed: dict[str, Any]) -> None:
    names = [tensor.name for tensor in pushed["repo"].document("f").tensors]
    assert "0.block 0.0.weight" in names


class TestTrust:
    """Nothing is imported that the caller did not allow."""

    def test_an_untrusted_class_is_refused_by_name(self, repo: ckpt.Repository) -> None:
        repo.push(MLP(), "mlp")
        for trust in ([], ["chapter"], ["chapter_models_evil"], [FixedHiddenMLP]):
            with pytest.raises(TrustError) as caught:
                repo.load("mlp", trust=trust)
            assert caught.value.code == "class-not-allowed"
            assert "chapter_models:MLP" in str(caught.value)
        assert repo.load("mlp", trust=[MLP]) is not None
        assert repo.load("mlp", trust="chapter_models") is not None

    def test_a_refused_package_is_not_imported(
        self, repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        marker = tmp_path / "imported"
        (tmp_path / "marking.py").write_text(
            f"import pathlib, torch\npathlib.Path({str(marker)!r}).touch()\n"
            "class Net(torch.nn.Module):\n    pass\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        import marking  # type: ignore[import-not-found]

        repo.push(marking.Net(), "m")
        marker.unlink()
        monkeypatch.delitem(sys.modules, "marking")
        with pytest.raises(TrustError):
            repo.load("m", trust=["torch"])
        assert not marker.exists()
        assert "marking" not in sys.modules
        repo.load("m", trust=["marking"])
        assert marker.exists()

    def test_a_class_may_have_any_name_that_python_takes(
        self, repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        names = ("Größe", "__Hidden", "網")
        classes = "".join(f"class {name}(nn.Linear): ...\n" for name in names)
        (tmp_path / "größen.py").write_text(f"from torch import nn\n{classes}", encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        module = importlib.import_module("größen")
        for number, name in enumerate(names):
            kind = getattr(module, name)
            repo.push(kind(2, 2), f"m{number}")
            with pytest.raises(TrustError):
                repo.load(f"m{number}", trust=["gr"])
            assert type(repo.load(f"m{number}", trust=["größen"])) is kind

    @pytest.mark.parametrize("name", ["a-b", "__call__", "\uff2eet", "a.b"])
    def test_a_class_whose_name_no_load_imports_is_refused_with_its_path(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        kind = type(name, (nn.Linear,), {"__module__": __name__})
        monkeypatch.setitem(globals(), name, kind)
        with pytest.raises(UsageError, match="1 value cannot be stored: 0: ") as caught:
            repo.push(nn.Sequential(kind(2, 2)), "m")
        assert caught.value.code == "cannot-store"

    @pytest.mark.parametrize(
        ("reference", "code"),
        [
            ("os:system", "class-origin"),
            ("subprocess:Popen", "class-type"),
            ("torch.nn.modules.linear:Tensor", "class-origin"),
            ("torch.nn.modules.module:itertools.chain", "class-origin"),
            ("torch.nn.modules.linear:NoSuch", "class-missing"),
            ("no_such_package:Net", "class-missing"),
            ("torch.nn.modules.linear:__builtins__", "document-damaged"),
            ("torch.nn.modules.linear:__", "document-damaged"),
            ("torch.nn.modules.linear:Linear.__init__", "document-damaged"),
            ("torch.nn.modules.linear:\uff2cinear", "document-damaged"),
            ("\uff4fs:system", "document-damaged"),
            ("torch.nn.modules.linear", "document-damaged"),
            ("os:system()", "document-damaged"),
        ],
    )
    def test_a_hostile_name_is_refused_even_where_its_module_is_trusted(
        self, reference: str, code: str
    ) -> None:
        from ckpt.loader.rebuild import rebuild
        from ckpt.loader.trust import Trust

        captured = capture_module(nn.ReLU())
        (module,) = captured.modules
        from msgspec.structs import replace

        document = Document(
            format=1,
            state="module",
            root=captured.root,
            tensors=(),
            environment="",
            modules=(replace(module, reference=reference),),
        )
        trust = Trust(["os", "subprocess", "torch", "no_such_package"])
        with pytest.raises(CkptError) as caught:
            rebuild(document, Restorer(document, {}), trust)
        assert caught.value.code == code

    def test_an_attribute_that_would_replace_a_method_is_refused(
        self, repo: ckpt.Repository
    ) -> None:
        net = nn.Linear(2, 2)
        net.forward = torch.relu  # type: ignore[method-assign]
        with pytest.raises(UsageError, match='attribute "forward" would replace a method'):
            repo.push(net, "m")


def pruned(linear: Any) -> nn.Module:
    prune.l1_unstructured(linear, "weight", 0.5)  # type: ignore[no-untyped-call]
    return linear  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.compile's own
class TestLibrary:
    """Modules of torch.nn that keep more than parameters."""

    @pytest.mark.parametrize(
        "make",
        [
            lambda: nn.LSTM(4, 4, 2),
            lambda: nn.GRU(4, 4, bidirectional=True),
            lambda: nn.TransformerEncoderLayer(4, 2, 8).eval(),
            lambda: nn.BatchNorm1d(2),
            lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
            lambda: parametrizations.spectral_norm(nn.Linear(4, 5)),
            lambda: parametrizations.orthogonal(nn.Linear(4, 4)),
            lambda: pruned(nn.Linear(4, 5)),
            lambda: torch.compile(nn.Sequential(nn.Linear(4, 4), nn.GELU())),
            lambda: nn.DataParallel(nn.Linear(4, 4)),
        ],
        ids=[
            "LSTM",
            "GRU",
            "encoder",
            "norm",
            "weight_norm",
            "spectral",
            "orthogonal",
            "prune",
            "compile",
            "parallel",
        ],
    )
    def test_it_comes_back(self, repo: ckpt.Repository, make: Any) -> None:
        torch.manual_seed(0)
        net = make()
        repo.push(net, "m")
        loaded = repo.load("m")
        net = getattr(net, "_orig_mod", net)
        x = torch.rand(3, 2, 4)
        wanted, got = net(x), loaded(x)
        if isinstance(wanted, tuple):
            wanted, got = wanted[0], got[0]
        assert torch.equal(wanted, got)

    def test_wrappers_are_unwrapped_and_recorded(self, repo: ckpt.Repository) -> None:
        repo.push(torch.compile(nn.Sequential(nn.DataParallel(nn.Linear(2, 2)))), "m")
        report = repo.verify("m")
        assert report.wrappers == {"": ("compile",), "0": ("DataParallel",)}

    def test_flags_buffers_and_plain_children_are_kept(self, repo: ckpt.Repository) -> None:
        net: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
        net[0].weight.requires_grad_(False)
        net[1].eval()
        net[0].register_buffer("transient", torch.ones(3), persistent=False)
        net[0].register_buffer("none", None)
        net[0].hidden = [nn.Linear(1, 1)]
        repo.push(net, "m")
        loaded: Any = repo.load("m")
        assert not loaded[0].weight.requires_grad
        assert [module.training for module in loaded] == [True, False, True]
        assert torch.equal(loaded[0].transient, torch.ones(3))
        assert "transient" not in loaded[0].state_dict()
        assert "none" in loaded[0]._buffers
        assert torch.equal(loaded[0].hidden[0].weight, net[0].hidden[0].weight)

    def test_everything_that_cannot_be_stored_is_named_at_once(self, repo: ckpt.Repository) -> None:
        net: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        net[0].register_forward_hook(lambda *given: None)
        net[1].act = lambda x: x
        net[1].file = sys.stdout
        with pytest.raises(UsageError) as caught:
            repo.push(net, "m")
        for part in ("3 values", "0: forward hook", "1.act: a lambda has no import path", "1.file"):
            assert part in str(caught.value)
        assert not list(repo.location.store.glob("packs/*/*"))


class TestLoadInto:
    """Filling a module of one's own."""

    def test_it_is_filled_in_place_and_ties_stay(self, repo: ckpt.Repository) -> None:
        net, target = tied(), tied()
        repo.push(net, "m")
        weight = target[0].weight
        assert repo.load_into(target, "m").verdict == "weights"
        assert target[0].weight is weight is target[1].weight
        assert torch.equal(weight, net[0].weight)  # type: ignore[arg-type]

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
    def test_one_wrapper_prefix_on_either_side_is_accepted(
        self, repo: ckpt.Repository, prefix: str
    ) -> None:
        net = nn.Linear(2, 2)
        repo.push({prefix + key: value for key, value in net.state_dict().items()}, "with")
        repo.push(net.state_dict(), "without")
        target = nn.Linear(2, 2)
        assert repo.load_into(target, "with").renamed == prefix
        wrapped = nn.Sequential()
        wrapped.add_module(prefix.rstrip("."), nn.Linear(2, 2))
        assert repo.load_into(wrapped, "without").renamed == prefix
        assert torch.equal(target.weight, net.weight)
        assert torch.equal(wrapped[0].weight, net.weight)  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        ("target", "code"),
        [
            (nn.Linear(2, 3), "shape-mismatch"),
            (nn.Linear(2, 2, bias=False), "keys-mismatch"),
            (nn.Linear(2, 2).double(), "dtype-mismatch"),
            (nn.LazyLinear(2), "shape-mismatch"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_changes_nothing(
        self, repo: ckpt.Repository, target: nn.Module, code: str
    ) -> None:
        repo.push(nn.Linear(2, 2), "m")
        before = {
            key: value.clone()
            for key, value in target.state_dict().items()
            if not nn.parameter.is_lazy(value)
        }
        with pytest.raises(IntegrityError) as caught:
            repo.load_into(target, "m")
        assert caught.value.code == code
        assert all(torch.equal(target.state_dict()[key], before[key]) for key in before)


def test_the_command_line_verifies_and_names_what_it_needs(
    pushed: dict[str, Any], tmp_path: Path
) -> None:
    program = Path(sys.executable).with_name("ckpt")
    command = [program, "-r", pushed["repo"].location.root, "verify", "e"]
    untrusted = subprocess.run(command, capture_output=True, text=True, check=False)
    assert untrusted.returncode == 9
    assert "error[class-not-allowed]" in untrusted.stderr
    command += ["--trust", "chapter_models", "--path", HERE]
    verified = subprocess.run(command, capture_output=True, text=True, check=False)
    assert verified.stdout == "e@1: outputs-exact\n", verified.stderr
