"""What differs between two versions: every kind of it, from the registry alone."""

from __future__ import annotations

import math
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hostile_documents
import numpy
import pytest
import torch
from safetensors.numpy import save_file
from store_reads import reads
from torch import nn

import ckpt
from ckpt.core.documents import Document
from ckpt.core.errors import CkptError, IntegrityError, NotFoundError, UsageError
from ckpt.service.diff import Diff


def compare(repo: ckpt.Repository, before: Any, after: Any) -> Diff:
    """Two states pushed and compared; the store is not read."""
    repo.push(before, "before")
    repo.push(after, "after")
    with reads() as counted:
        found = repo.diff("before", "after")
    assert counted == []
    return found


def changes(found: Diff) -> dict[str, tuple[str, tuple[str, ...]]]:
    return {one.name: (one.change, one.what) for one in found.tensors}


def told(differences: Any) -> list[tuple[Any, ...]]:
    return [(one.path, one.what, one.change, one.before, one.after) for one in differences]


def test_tensors_are_same_changed_added_or_removed(repo: ckpt.Repository) -> None:
    before = {"a": torch.zeros(4), "b": torch.ones(4), "c": torch.ones(9)}
    found = compare(repo, before, {"a": torch.zeros(4), "b": torch.zeros(4), "d": torch.ones(2)})
    assert changes(found) == {
        "a": ("same", ()),
        "b": ("changed", ("values",)),
        "c": ("removed", ()),
        "d": ("added", ()),
    }
    totals = {change: found.total(change) for change in ("same", "changed", "added", "removed")}
    assert totals == {"same": (1, 16), "changed": (1, 16), "added": (1, 8), "removed": (1, 36)}
    assert not found.identical


FIELDS: dict[str, tuple[Any, Any, set[str]]] = {
    "dtype": (torch.zeros(4), torch.zeros(4, dtype=torch.float64), {"dtype", "values"}),
    "dtype alone": (torch.zeros(4), torch.zeros(4, dtype=torch.int32), {"dtype"}),
    "shape": (torch.ones(2, 3), torch.ones(3, 2), {"shape"}),
    "kind": (torch.ones(2), numpy.ones(2, numpy.float32), {"kind"}),
    "parameter": (torch.ones(2), nn.Parameter(torch.ones(2)), {"kind", "requires_grad"}),
    "strides": (torch.ones(2, 3), torch.ones(3, 2).t(), {"strides"}),
    "layout": (torch.eye(2), torch.eye(2).to_sparse(), {"layout", "details", "parts"}),
    "view": (torch.ones(2), torch.ones(4)[:2], set()),
    "sparse values": (torch.eye(2).to_sparse(), (2 * torch.eye(2)).to_sparse(), {"parts"}),
}


@pytest.mark.parametrize("name", FIELDS)
def test_it_says_in_what_a_tensor_differs(repo: ckpt.Repository, name: str) -> None:
    before, after, what = FIELDS[name]
    found = changes(compare(repo, {"w": before}, {"w": after}))["w"]
    assert found[0] == ("changed" if what else "same")
    assert set(found[1]) == what


def test_views_change_with_the_tensor_that_holds_their_bytes(repo: ckpt.Repository) -> None:
    one, other = torch.zeros(8), torch.ones(8)
    found = compare(repo, {"all": one, "part": one[2:4]}, {"all": other, "part": other[2:4]})
    assert changes(found) == {"all": ("changed", ("values",)), "part": ("changed", ("parts",))}
    assert found.total("changed") == (2, 32)


def test_ties_that_appear_and_vanish_are_told_and_counted_once(repo: ckpt.Repository) -> None:
    a, b, c = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)
    found = compare(
        repo, {"a": a, "b": b, "c": c, "d": c}, {"a": a, "b": a, "c": c, "d": c.clone()}
    )
    assert found.ties_appeared == (("b", "a"),)
    assert found.ties_vanished == (("d", "c"),)
    assert changes(found) == {
        "a": ("same", ()),
        "b": ("changed", ("tie", "values")),
        "c": ("same", ()),
        "d": ("changed", ("tie",)),
    }
    assert sum(found.total(change)[1] for change in ("same", "changed", "added")) == 4 * 8


def small_net() -> Any:
    """A module whose structure a test changes; of torch's own classes, so that it is pushed fast."""
    layers = {
        "first": nn.Linear(3, 4),
        "drop": nn.Dropout(0.1),
        "act": nn.ReLU(),
        "bare": nn.Linear(3, 4, bias=False),
    }
    net: Any = nn.Sequential(OrderedDict(layers))
    net.register_buffer("kept", torch.zeros(2))
    net.scale = 1.0
    return net


def reorder(net: Any) -> None:
    net._modules = dict(reversed(net._modules.items()))


STRUCTURES: dict[str, tuple[Callable[[Any], object], str, tuple[Any, ...]]] = {
    "class": (
        lambda net: setattr(net, "act", nn.GELU()),
        "structure",
        ("act", "class", "changed", "torch.nn.modules.activation:ReLU",
         "torch.nn.modules.activation:GELU"),
    ),
    "training": (lambda net: net.drop.eval(), "structure",
                 ("drop", "training", "changed", True, False)),
    "added": (lambda net: net.add_module("last", nn.Tanh()), "structure",
              ("last", "module", "added", None, "torch.nn.modules.activation:Tanh")),
    "removed": (lambda net: delattr(net, "bare"), "structure",
                ("bare", "module", "removed", "torch.nn.modules.linear:Linear", None)),
    "none": (lambda net: setattr(net, "bare", None), "structure",
             ("", "children", "changed", [("bare", "bare")], [("bare", None)])),
    "shared": (lambda net: net.add_module("again", net.first), "structure",
               ("", "children", "changed", [], [("again", "first")])),
    "order": (
        reorder,
        "structure",
        ("", "children", "changed",
         [("first", "first"), ("drop", "drop"), ("act", "act"), ("bare", "bare")],
         [("bare", "bare"), ("act", "act"), ("drop", "drop"), ("first", "first")]),
    ),
    "parameter of nothing": (lambda net: net.first.register_parameter("bias", None), "structure",
                             ("first", "parameters", "changed", [("bias", True)],
                              [("bias", False)])),
    "persistent": (lambda net: net.register_buffer("kept", torch.zeros(2), persistent=False),
                   "structure",
                   ("", "buffers", "changed", [("kept", True, True)], [("kept", True, False)])),
    "setting": (lambda net: setattr(net.drop, "p", 0.5), "values",
                ("drop.p", "value", "changed", 0.1, 0.5)),
    "attribute": (lambda net: setattr(net, "scale", 2.0), "values", ("scale", "value", "changed", 1.0, 2.0)),
}  # fmt: skip


@pytest.mark.parametrize("name", STRUCTURES)
def test_every_change_of_a_modules_structure_is_told(repo: ckpt.Repository, name: str) -> None:
    torch.manual_seed(0)
    before, after = small_net(), small_net()
    after.load_state_dict(before.state_dict())
    change, where, expected = STRUCTURES[name]
    change(after)
    found = compare(repo, before, after)
    assert expected in told(getattr(found, where))
    assert not found.identical


def test_a_class_whose_source_changed_is_told(
    repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "edited_for_diff.py"
    source.write_text("from torch import nn\nclass Net(nn.Identity):\n    note = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for number in range(2):
        import edited_for_diff  # type: ignore[import-not-found]

        repo.push(edited_for_diff.Net(), f"m{number}")
        source.write_text(source.read_text().replace("1", "22"))
        monkeypatch.delitem(sys.modules, "edited_for_diff")
    found = repo.diff("m0", "m1")
    assert found.identical
    (one,) = found.structure
    assert (one.path, one.what) == ("edited_for_diff:Net", "source")


def test_a_module_and_its_state_dict_have_the_same_tensors(repo: ckpt.Repository) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).requires_grad_(False)
    found = compare(repo, net.state_dict(), net)
    assert {one.change for one in found.tensors if one.what != ("kind",)} <= {"same"}
    assert told(found.structure) == [
        ("", "module", "added", None, "torch.nn.modules.container:Sequential")
    ]


def training_state(rate: float, step: int, moment: float) -> dict[str, Any]:
    net = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["exp_avg"].fill_(moment)
    return {"model": {"w": torch.ones(3)}, "optimizer": state, "step": step, "seen": {"a", "b"}}


def test_a_training_state_is_told_by_nested_names(repo: ckpt.Repository) -> None:
    torch.manual_seed(0)
    before = training_state(0.1, 1, 1.0)
    torch.manual_seed(0)
    after = training_state(0.2, 2, 2.0)
    after["optimizer"]["param_groups"][0]["betas"] = [0.9, 0.999]
    after["best"] = math.nan
    found = compare(repo, before, after)
    differing = [one.name for one in found.tensors if one.change != "same"]
    assert differing == ["optimizer.state.0.exp_avg"]
    assert told(found.values) == [
        ("best", "value", "added", None, {"$float": "nan"}),
        ("optimizer.param_groups.0.betas", "type", "changed", "tuple", "list"),
        ("optimizer.param_groups.0.lr", "value", "changed", 0.1, 0.2),
        ("step", "value", "changed", 1, 2),
    ]


VALUES: dict[str, tuple[Any, Any]] = {
    "true and one": (True, 1),
    "one and one": (1, 1.0),
    "zeros": (0.0, -0.0),
    "nothing": (None, 0),
    "empty": ([], {}),
    "text": ("a", "b"),
    "length": ([1], [1, 2]),
    "maxlen": ({"a": OrderedDict(a=1)}, {"a": {"a": 1}}),
    "generator": (torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)),
    "tensor": (torch.ones(1), 1),
}


@pytest.mark.parametrize("name", VALUES)
def test_no_difference_of_content_goes_untold(repo: ckpt.Repository, name: str) -> None:
    before, after = VALUES[name]
    found = compare(repo, {"x": before}, {"x": after})
    assert not found.identical
    assert found.values or [one for one in found.tensors if one.change != "same"]


def test_equal_content_has_no_differences_whatever_was_said_about_it(
    repo: ckpt.Repository,
) -> None:
    repo.push({"a": torch.ones(2), "b": 1}, "m", step=1, metrics={"x": math.nan, "y": 1.0})
    repo.push({"b": 1, "a": torch.ones(2)}, "n", step=2, metrics={"x": math.nan, "y": 2.0},
              labels={"k": "v"})  # fmt: skip
    found = repo.diff("m", "n")
    assert found.identical
    assert {one.change for one in found.tensors} == {"same"}
    assert (found.values, found.structure, found.ties_appeared) == ((), (), ())
    assert told(found.facts) == [
        ("step", "step", "changed", 1, 2),
        ("y", "metric", "changed", 1.0, 2.0),
        ("k", "label", "added", None, "v"),
    ]


def test_layers_are_taken_together_where_there_are_too_many(repo: ckpt.Repository) -> None:
    state = {f"l{n}": {part: {"w": torch.ones(1)} for part in "abc"} for n in range(4)}
    found = compare(repo, state, state)
    assert len(found.layers()) == 12
    assert [layer.name for layer in found.layers(5)] == ["l0", "l1", "l2", "l3"]
    assert {layer.nbytes for layer in found.layers(5)} == {12}


def test_unknown_references_folders_and_lost_packs_are_typed(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    repo.push({"w": torch.ones(3)}, "m")
    repo.push({"w": torch.zeros(3)}, "m")
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"w": numpy.ones(3, numpy.float32)}, folder / "model.safetensors")
    repo.push_file(folder, "folder")
    for wrong in ("nobody", "m@9", "m:best"):
        with pytest.raises(NotFoundError):
            repo.diff("m", wrong)
    with pytest.raises(UsageError, match="folder@1 is a folder of files"):
        repo.diff("m", "folder")
    shutil.rmtree(repo.location.store / "packs")
    assert changes(repo.diff("m@1", "m@2")) == {"w": ("changed", ("values",))}
    with pytest.raises(IntegrityError) as caught:
        repo.diff("m@1", "m@2", stats=True)
    assert caught.value.code == "object-missing"


def test_damaged_packs_are_named(repo: ckpt.Repository) -> None:
    for number in range(2):
        repo.push({"w": torch.full((3000,), float(number))}, "m", compress="none")
    for pack in repo.location.store.glob("packs/*/*"):
        pack.chmod(0o600)
        pack.write_bytes(pack.read_bytes()[:-100] + bytes(range(100)))
    with pytest.raises(IntegrityError, match=r'm@1, tensor "w".*expected') as caught:
        repo.diff("m@1", "m@2", stats=True)
    assert caught.value.code == "object-corrupt"


def test_documents_that_somebody_edited_end_in_a_typed_error_or_in_differences(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo.push({"w": torch.ones(1)}, "a")
    repo.push({"w": torch.zeros(1)}, "b")
    harmless = hostile_documents.base()[0]
    documents: dict[str, Document] = {"a": harmless}
    monkeypatch.setattr(
        repo._registry.queries, "document", lambda version: documents[version.model]
    )
    outcomes = set()
    for edit, _ in hostile_documents.attacks().values():
        documents["b"] = edit(harmless)
        for pair in (("a", "b"), ("b", "a")):
            try:
                repo.diff(*pair)
                outcomes.add("compared")
            except CkptError as error:
                outcomes.add(error.code)
    assert outcomes == {"compared", "document-damaged"}
