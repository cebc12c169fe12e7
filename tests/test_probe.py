"""Recorded outputs: how a forward behaves, what a replay proves, and what it does not hide."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from chapter_models import MLP, FixedHiddenMLP
from msgspec.structs import replace
from probed_models import (
    Caching,
    Counting,
    Forgetting,
    Giving,
    Hookless,
    LargestOf,
    MakesTensors,
    Naming,
    Noisy,
    Scaled,
    Tail,
    Timing,
    Unsteady,
    Writing,
    double,
)
from torch import nn

import ckpt
from ckpt.core.documents import Behaviour
from ckpt.core.errors import IntegrityError, UsageError
from ckpt.loader.capture import Captured, capture
from ckpt.loader.forward import run_forward

TRUST = ["probed_models", "chapter_models"]


def behaviour_of(repo: ckpt.Repository, name: str) -> Behaviour:
    probe = repo.document(name).probe
    assert probe is not None
    return probe.behaviour


def spectral() -> nn.Module:
    """Its vectors are those of another weight, so the next power iteration changes them."""
    net = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    nn.init.normal_(net.parametrizations.weight.original)  # type: ignore[union-attr, arg-type]
    return net


class TestBehaviour:
    """A forward is run on copies, and classified."""

    @pytest.mark.parametrize(
        ("net", "wanted"),
        [
            (nn.Linear(3, 3), Behaviour()),
            (nn.Sequential(nn.Linear(3, 3), nn.Dropout()), Behaviour(stochastic=True, random=True)),
            (nn.Dropout().eval(), Behaviour()),
            (nn.BatchNorm1d(3), Behaviour(changes_state=True)),
            (nn.BatchNorm1d(3).eval(), Behaviour()),
            (Counting(), Behaviour(changes_state=True)),
            (Caching(), Behaviour(changes_state=True)),
            (Writing(), Behaviour(changes_inputs=True)),
            (Noisy(), Behaviour(stochastic=True, random=True)),
            (
                spectral(),
                Behaviour(changes_state=True),
            ),
            (nn.Sequential(nn.LazyLinear(4), nn.ReLU()), None),
        ],
        ids=lambda value: type(value).__name__,
    )
    def test_it_is_recorded_and_replayed_exactly(
        self, repo: ckpt.Repository, net: nn.Module, wanted: Behaviour | None
    ) -> None:
        torch.manual_seed(0)
        repo.push(net, "m", inputs=(torch.randn(4, 3),))
        found = behaviour_of(repo, "m")
        if wanted is None:  # a lazy module draws its weights on the first call
            assert found.changes_state
            assert found.stochastic
        else:
            assert found == wanted
        assert repo.verify("m", trust=TRUST).verdict == "outputs-exact"

    def test_a_forward_that_does_not_repeat_itself_is_compared_by_shape(
        self, repo: ckpt.Repository
    ) -> None:
        repo.push(Unsteady(), "m", inputs=(torch.ones(3, 2),))
        assert not behaviour_of(repo, "m").repeats
        report = repo.verify("m", trust=TRUST)
        assert report.verdict == "structure"
        assert "does not repeat itself" in report.reason

    def test_neither_module_nor_inputs_nor_generators_are_touched(
        self, repo: ckpt.Repository
    ) -> None:
        net, x = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(), Writing()), torch.ones(4, 3)
        before = [torch.get_rng_state(), *(value.clone() for value in net.state_dict().values())]
        python, numbers = random.getstate(), numpy.random.random()
        numpy.random.seed(5)
        repo.push(net, "m", inputs=(x,))
        after = [torch.get_rng_state(), *net.state_dict().values()]
        assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
        assert torch.equal(x, torch.ones(4, 3))
        assert random.getstate() == python
        numpy_after = numpy.random.random()
        numpy.random.seed(5)
        assert numpy.random.random() == numpy_after
        assert numbers is not None

    def test_a_load_leaves_the_module_as_it_was_pushed(self, repo: ckpt.Repository) -> None:
        repo.push(Counting(), "m", inputs=(torch.ones(2, 3),))
        loaded: Any = repo.load("m", trust=TRUST)
        assert loaded.calls == 0

    def test_a_known_structure_is_not_run_again_for_what_is_known(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs: list[Any] = []

        def counted(*given: Any) -> Any:
            runs.append(given)
            return run_forward(*given)

        monkeypatch.setattr("ckpt.loader.probe.run_forward", counted)
        for _ in range(2):
            repo.push(nn.Linear(3, 3), "m", inputs=(torch.ones(2, 3),))
            runs.append(None)
        # once, again, other seed, double precision, and the module itself
        assert runs.index(None) == 5
        assert len(runs) - runs.index(None) == 4  # once and in double precision
        assert behaviour_of(repo, "m") == Behaviour()

    @pytest.mark.parametrize("limit", [1 << 20, 16])
    def test_what_the_copy_computes_otherwise_than_the_module_is_refused(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch, limit: int
    ) -> None:
        monkeypatch.setattr("ckpt.loader.probe.FULL_BYTES", limit)
        monkeypatch.setattr("ckpt.loader.prove.FULL_BYTES", limit)
        net = nn.Sequential(nn.Linear(3, 3), Forgetting(), nn.ReLU()).train()
        before = {key: value.clone() for key, value in net.state_dict().items()}
        random_state = torch.get_rng_state()
        with pytest.raises(UsageError, match="a rebuilt copy gives other outputs") as caught:
            repo.push(net, "m", inputs=(torch.ones(4, 3),))
        assert caught.value.code == "rebuild-failed"
        assert "output: is off by" in caught.value.message
        assert (limit == 16) or "first differing child: 1" in caught.value.message
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random_state)
        inner: Any = net[1]
        assert (inner.calls, inner.gain, inner.seen, net.training) == (0, 3.0, {}, True)
        assert all(not one._forward_hooks for one in net.modules())
        assert all(parameter.grad is None for parameter in net.parameters())
        assert repo.models() == []
        inner.gain = 1.0  # what its __setstate__ makes
        repo.push(net, "m", inputs=(torch.ones(4, 3),))
        assert (inner.calls, inner.seen) == (0, {})

    def test_a_buffer_that_repeats_itself_without_end_takes_no_memory(
        self, repo: ckpt.Repository
    ) -> None:
        net: Any = Giving(double)
        net.register_buffer("mask", torch.ones(1, 3).expand(1 << 38, 3))
        repo.push(net, "m", inputs=(torch.rand(2, 3),))
        report = repo.verify("m", trust=TRUST)
        assert report.verdict == "outputs-exact"
        probe = repo.document("m").probe
        assert probe is not None
        assert {tensor.dtype for tensor in probe.tensors} == {"float32", "float64"}

    def test_a_text_that_the_copy_gives_otherwise_is_refused(self, repo: ckpt.Repository) -> None:
        with pytest.raises(UsageError, match=r"output\.label: 'cat' and not 'dog'") as caught:
            repo.push(Naming("dog"), "m", inputs=(torch.ones(2),))
        assert caught.value.code == "rebuild-failed"
        repo.push(Naming("cat"), "m", inputs=(torch.ones(2),))

    def test_a_text_that_is_another_each_time_is_not_compared(self, repo: ckpt.Repository) -> None:
        repo.push(Timing(), "m", inputs=(torch.ones(2),))
        assert behaviour_of(repo, "m") == Behaviour(repeats=False)
        report = repo.verify("m", trust=TRUST)
        assert (report.verdict, report.reason) == (
            "structure",
            "the forward does not repeat itself",
        )

    def test_weights_at_any_address_give_the_outputs_of_their_copy(
        self, repo: ckpt.Repository
    ) -> None:
        torch.manual_seed(0)
        net, memory = nn.Linear(67, 33), torch.zeros(33 * 67 + 1)
        net.weight.data = memory[1:].view(33, 67).copy_(net.weight.detach())
        repo.push(net, "m", inputs=(torch.randn(1, 67),))
        assert repo.verify("m").verdict == "outputs-exact"

    def test_a_module_with_compiled_parts_does_not_run(self, repo: ckpt.Repository) -> None:
        runs: list[int] = []

        def backend(graph: Any, inputs: Any) -> Any:
            runs.append(1)
            return graph

        net, whole = nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3)
        net[0] = torch.compile(net[0], backend=backend)  # type: ignore[assignment]
        whole.compile(backend=backend)
        for one in (net, whole):
            repo.push(one, "m", inputs=(torch.ones(4, 3),))
        assert not runs

    def test_above_256_mib_it_runs_once_and_shares_parameters(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt.loader.probe.FULL_BYTES", 16)
        monkeypatch.setattr("ckpt.loader.prove.FULL_BYTES", 16)
        net: Any = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Counting())
        before = {key: value.clone() for key, value in net.state_dict().items()}
        repo.push(net, "m", inputs=(torch.randn(4, 3),))
        assert behaviour_of(repo, "m") == Behaviour(changes_state=True, once=True)
        assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
        assert net[2].calls == 0
        assert repo.verify("m", trust=TRUST).verdict == "outputs-exact"
        repo.push(Unsteady(), "unsteady", inputs=(torch.ones(3, 2),))
        assert repo.verify("unsteady", trust=TRUST).verdict == "structure"

    def test_above_256_mib_a_forward_that_writes_to_parameters_is_refused(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ckpt.loader.probe.FULL_BYTES", 16)
        net = nn.Embedding(4, 3, max_norm=0.1)
        with pytest.raises(UsageError, match="writes to its parameters"):
            repo.push(net, "m", inputs=(torch.tensor([1, 2]),))


@pytest.mark.usefixtures("proven_here")
class TestInputs:
    """What may be given, and what is refused before anything is stored."""

    def test_keyword_arguments_and_nested_results_are_kept(self, repo: ckpt.Repository) -> None:
        repo.push(LargestOf(), "m", inputs={"x": torch.ones(2, 3), "times": 3})
        report = repo.verify("m", trust=TRUST)
        names = [output.name for output in report.outputs]
        assert sorted(names) == ["output.count", "output.logits.0", "output.logits.1.0"]
        assert report.verdict == "outputs-exact"

    @pytest.mark.parametrize(
        ("inputs", "code"),
        [
            (torch.ones(2, 3), "inputs-invalid"),
            ([torch.ones(2, 3)], "inputs-invalid"),
            ({1: torch.ones(2, 3)}, "inputs-invalid"),
            ((torch.ones(2, 5),), "probe-failed"),
            ((), "probe-failed"),
            ((lambda: 0,), "cannot-store"),
        ],
    )
    def test_what_cannot_be_run_is_refused_and_nothing_is_stored(
        self, repo: ckpt.Repository, inputs: Any, code: str
    ) -> None:
        with pytest.raises(UsageError) as caught:
            repo.push(nn.Linear(3, 3), "m", inputs=inputs)
        assert caught.value.code == code
        assert repo.models() == []
        assert not list(repo.location.store.glob("packs/*/*"))

    def test_only_a_module_has_inputs(self, repo: ckpt.Repository) -> None:
        with pytest.raises(UsageError, match="only a module has inputs"):
            repo.push({"w": torch.ones(2)}, "m", inputs=(1,))

    def test_a_probe_is_added_to_content_that_is_there_already(self, repo: ckpt.Repository) -> None:
        net = nn.Linear(3, 3)
        first = repo.push(net, "m")
        second = repo.push(net, "m", inputs=(torch.ones(2, 3),))
        assert second.digest == first.digest
        assert second.number == 2
        assert repo.push(net, "m", inputs=(torch.ones(2, 3),)).number == 2
        assert repo.push(net, "m").number == 2
        assert repo.push(net, "m", inputs={"input": torch.ones(2, 3)}).number == 3

    def test_its_tensors_lie_in_a_pack_of_their_own(self, repo: ckpt.Repository) -> None:
        version = repo.push(nn.Linear(3, 3), "m", inputs=(torch.ones(2, 3),))
        names = sorted(path.name for path in repo.location.store.glob("packs/*/*"))
        assert names == [f"{version.push}-{n}.safetensors" for n in (0, 1)]
        assert version.nbytes == 4 * (9 + 3)


@pytest.mark.usefixtures("proven_here")
class TestVerdicts:
    """What a replay proves."""

    def test_a_known_structure_that_is_removed_meanwhile_fails_no_push(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = repo.push(nn.Linear(3, 3), "m", inputs=(torch.ones(2, 3),))
        repo.rm(before)
        monkeypatch.setattr(repo._registry.queries, "proven", lambda structure: before)
        repo.push(nn.Linear(3, 3), "m", inputs=(torch.ones(2, 3),))
        assert repo.verify("m").verdict == "outputs-exact"

    def test_a_forward_that_refuses_hooks_is_recorded_without_its_children(
        self, repo: ckpt.Repository
    ) -> None:
        repo.push(Hookless(), "m", inputs=(torch.ones(2, 3),))
        probe = repo.document("m").probe
        assert probe is not None
        assert probe.children == ()
        assert repo.verify("m", trust=TRUST).verdict == "outputs-exact"

    def test_without_inputs_the_structure_is_proven(self, repo: ckpt.Repository) -> None:
        repo.push(MLP(), "m")
        report = repo.verify("m", trust=[MLP])
        assert (report.verdict, report.outputs) == ("structure", ())
        assert "no inputs were recorded" in report.reason

    def test_require_refuses_what_is_below(self, repo: ckpt.Repository) -> None:
        repo.push(MLP(), "m")
        with pytest.raises(IntegrityError, match="proven to structure, outputs-exact was required"):
            repo.load("m", trust=[MLP], require="outputs-exact")
        with pytest.raises(UsageError, match="is no verdict"):
            repo.load("m", trust=[MLP], require="perfect")

    def test_one_ulp_that_no_output_shows_is_caught_by_its_digest(
        self, repo: ckpt.Repository
    ) -> None:
        """Outputs alone prove too little; every byte of every pack counts."""
        torch.manual_seed(3)
        x = torch.rand(2, 8)
        net: Any = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        repo.push(net, "m", inputs=(x,))
        weight = net[0].weight.data
        unseen = None
        for place in range(weight.numel()):
            old, wanted = weight.view(-1)[place].clone(), net(x)
            weight.view(-1)[place] = torch.nextafter(old, torch.tensor(torch.inf))
            if torch.equal(net(x), wanted):
                unseen = old.numpy().tobytes()
            weight.view(-1)[place] = old
        assert unseen is not None
        pack = min(repo.location.store.glob("packs/*/*"))
        body = pack.read_bytes()
        at = body.index(unseen, 4096)
        pack.chmod(0o644)
        pack.write_bytes(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
        with pytest.raises(IntegrityError) as caught:
            repo.load("m")
        assert caught.value.code == "object-corrupt"

    def test_one_ulp_anywhere_in_the_store_is_caught(self, repo: ckpt.Repository) -> None:
        repo.push(nn.Linear(3, 4), "m", inputs=(torch.randn(2, 3),))
        edits = 0
        for pack in repo.location.store.glob("packs/*/*"):
            pack.chmod(0o644)
            body = pack.read_bytes()
            for at in range(4096, len(body), 4):
                pack.write_bytes(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
                with pytest.raises(IntegrityError) as caught:
                    repo.load("m")
                assert caught.value.code == "object-corrupt"
                edits += 1
            pack.write_bytes(body)
        # weights; inputs, outputs and a reference of twice their size
        assert edits == (3 * 4 + 4) + (2 * 3 + 2 * 4 + 2 * 2 * 4)
        assert repo.verify("m").verdict == "outputs-exact"

    def test_changed_code_is_named_by_output_and_by_child(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo.push(Scaled(), "m", inputs=(torch.ones(2, 3),))
        monkeypatch.setattr(Scaled, "factor", 1.01)
        with pytest.raises(
            IntegrityError, match=r"output: .*first differing child: tail"
        ) as caught:
            repo.load("m", trust=TRUST)
        assert caught.value.code == "outputs-differ"

    @pytest.mark.parametrize(
        ("value", "other"), [("a", "b"), ("a", b"a"), (b"a", b"b"), ("a", None), (1 << 70, 1 << 71)]
    )
    def test_plain_values_are_compared_by_type_and_value(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch, value: Any, other: Any
    ) -> None:
        for before, now in ((value, other), (other, value)):
            monkeypatch.setattr(Naming, "extra", before)
            repo.push(Naming("cat"), "m", inputs=(torch.ones(2),))
            assert repo.verify("m", trust=TRUST).verdict == "outputs-exact"
            monkeypatch.setattr(Naming, "extra", now)
            with pytest.raises(IntegrityError, match=r"outputs differ: output\.extra") as caught:
                repo.load("m", trust=TRUST)
            assert caught.value.code == "outputs-differ"

    def test_another_text_on_another_machine_is_named_and_no_failure(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Naming, "extra", "0.1234")
        repo.push(Naming("cat"), "m", inputs=(torch.ones(2),))
        monkeypatch.setattr(Naming, "extra", "0.1235")
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "OTHER")
        report = repo.verify("m", trust=TRUST)
        assert report.verdict == "structure"
        assert report.reason.startswith("output.extra: '0.1235' and not '0.1234'; ")

    def test_a_probe_that_was_recorded_without_plain_values_is_compared_without(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def capture_without(state: Any) -> Captured:
            if "plain" in state:
                state = {key: value for key, value in state.items() if key != "plain"}
            return capture(state)

        monkeypatch.setattr("ckpt.loader.probe.capture", capture_without)
        repo.push(Naming("cat"), "m", inputs=(torch.ones(2),))
        monkeypatch.setattr(Naming, "extra", "other")
        assert repo.verify("m", trust=TRUST).verdict == "outputs-exact"

    def test_a_changed_form_of_the_outputs_is_refused(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo.push(Scaled(), "m", inputs=(torch.ones(2, 3),))
        monkeypatch.setattr(Tail, "forward", lambda self, x: {"y": x})
        with pytest.raises(IntegrityError, match="is on one side only"):
            repo.load("m", trust=TRUST)
        monkeypatch.setattr(Tail, "forward", lambda self, x: x / None)
        with pytest.raises(IntegrityError, match="the forward fails on the recorded inputs"):
            repo.load("m", trust=TRUST)

    def test_another_processor_gives_close_and_not_a_failure(
        self, repo: ckpt.Repository, tmp_path: Path
    ) -> None:
        """The instruction set of the processor is chosen by the environment, in another process."""
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Softmax(-1))
        repo.push(net, "m", inputs=(torch.randn(8, 64),))
        repo.push(FixedHiddenMLP(), "d", inputs=(torch.rand(2, 20),))
        program = [sys.executable, "-c", _VERIFYING, str(tmp_path)]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(sys.path),
            "ATEN_CPU_CAPABILITY": "default",
        }
        found = subprocess.run(program, capture_output=True, text=True, check=True, env=environment)
        verdict, reason, other = found.stdout.splitlines()
        assert verdict == "outputs-close"
        assert "capability" in reason
        assert other in ("outputs-close", "outputs-exact")

    def test_a_stochastic_forward_on_another_processor_is_not_judged(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        repo.push(nn.Sequential(nn.Linear(3, 3), nn.Dropout()), "m", inputs=(torch.ones(9, 3),))
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "OTHER")
        monkeypatch.setattr("ckpt.loader.forward.isolated", _unseeded)
        report = repo.verify("m")
        assert report.verdict == "structure"
        assert "draws random numbers" in report.reason

    def test_flags_are_replayed_as_they_were_and_restored(self, repo: ckpt.Repository) -> None:
        torch.set_num_threads(1)
        torch.set_default_dtype(torch.float64)
        torch.set_float32_matmul_precision("high")
        try:
            repo.push(MakesTensors(), "m", inputs=(torch.ones(2),))
        finally:
            torch.set_num_threads(2)
            torch.set_default_dtype(torch.float32)
            torch.set_float32_matmul_precision("highest")
        assert repo.verify("m", trust=TRUST).verdict == "outputs-exact"
        assert torch.get_num_threads() == 2
        assert torch.get_default_dtype() == torch.float32
        assert torch.get_float32_matmul_precision() == "highest"


def _unseeded(seed: int, devices: Any) -> Any:
    from ckpt.loader.conditions import isolated

    return isolated(seed + 1, devices)


_VERIFYING = """
import sys, warnings, ckpt
with ckpt.open(sys.argv[1], create=False) as repo:
    report = repo.verify("m")
    print(report.verdict, report.reason, sep="\\n")
    print(repo.verify("d", trust=["chapter_models"]).verdict)
"""


@pytest.mark.usefixtures("proven_here")
class TestDrift:
    """Code that changed since the push is named; torch's own shims are honoured."""

    @pytest.mark.parametrize("above", ["", "\f\n", "mark = '\x1c\u2028'\n"])
    def test_a_changed_source_is_reported(
        self, repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, above: str
    ) -> None:
        source = tmp_path / "drifting.py"
        text = f"from torch import nn\n{above}class Net(nn.Linear):\n    note = 1\n"
        source.write_text(text)
        monkeypatch.delitem(sys.modules, "drifting", raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
        import drifting  # type: ignore[import-not-found]

        repo.push(drifting.Net(2, 2), "m")
        assert repo.verify("m", trust=["drifting"]).drift == ()
        source.write_text(text.replace("= 1", "= 22"))
        drift = repo.verify("m", trust=["drifting"]).drift
        assert drift == ("drifting:Net: its source changed since the push",)
        assert [one.source for one in repo.describe("m").classes] == ["changed"]
        source.write_text(text.replace("Net", "Renamed"))
        monkeypatch.delitem(sys.modules, "drifting")
        with pytest.raises(ckpt.CkptError, match="drifting has no Net") as caught:
            repo.load("m", trust=["drifting"])
        assert caught.value.code == "class-missing"
        source.unlink()
        monkeypatch.delitem(sys.modules, "drifting")
        with pytest.raises(ckpt.CkptError, match=r"cannot import drifting.*needed by"):
            repo.load("m", trust=["drifting"])

    def test_a_load_names_what_changed_in_classes_and_in_those_they_derive_from(
        self, repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base, derived = tmp_path / "drifting_base.py", tmp_path / "drifting.py"
        base.write_text("class Base:\n    gain = 1\n")
        derived.write_text(
            "from enum import Enum\nfrom torch import nn\nfrom drifting_base import Base\n"
            "class Mode(Enum):\n    FAST = 1\n"
            "class Between(Base, nn.Module):\n    pass\nclass Net(Between):\n    pass\n"
        )
        for name in ("drifting", "drifting_base"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(str(tmp_path))
        import drifting

        net = drifting.Net()
        net.mode = drifting.Mode.FAST
        digest = repo.push(net, "m").digest
        assert [known.reference for known in repo.document("m").classes] == [
            *("drifting:Between", "drifting:Mode", "drifting:Net", "drifting_base:Base"),
        ]
        assert {one.reference for one in repo.describe("m").classes} == {
            *("drifting:Mode", "drifting:Net"),
        }
        trust = [drifting.Net, drifting.Mode]  # and none of what they derive from
        repo.load("m", trust=trust)
        base.write_text("class Base:\n    gain = 100\n")
        with pytest.warns(
            ckpt.CkptWarning, match="changed since the push: drifting_base:Base; .* is structure"
        ):
            repo.load("m", trust=trust)
        report = repo.verify("m", trust=trust)
        assert report.changed == ("drifting_base:Base",)
        sources = {one.reference: one.source for one in repo.describe("m").classes}
        assert sources == {"drifting:Net": "changed", "drifting:Mode": "same"}
        again = repo.push(net, "m", step=1)
        assert again.digest == digest
        assert again.proof is not None
        assert not again.proof.reason.startswith("as ")  # it is proven again

    def test_a_record_of_an_older_class_is_named(
        self, repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A GELU of before ``approximate``: its forward fails, and says on what."""
        repo.push(nn.Sequential(nn.GELU()), "m", inputs=(torch.ones(2),))
        document = repo.document("m")
        modules = tuple(
            replace(module, attrs={name: v for name, v in module.attrs.items() if name == "x"})
            for module in document.modules
        )
        older = replace(document, modules=modules)
        monkeypatch.setattr(repo._registry.queries, "document", lambda version: older)
        with pytest.raises(IntegrityError, match="approximate"):
            repo.load("m")
