"""A run saves in the background what was there at the call, and resumes exactly."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import numpy
import pytest
import torch
from promise_scene import flip
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import ckpt
from ckpt.core.errors import (
    CkptError,
    CkptWarning,
    ConflictError,
    IntegrityError,
    StorageError,
    UsageError,
)
from ckpt.training.saved import Saved
from ckpt.training.writer import Writer

# StatefulDataLoader calls it.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Job:
    """A small training job that draws from every generator there is."""

    def __init__(self, scheduler: str = "", amp: bool = False, loader: str = "") -> None:
        torch.manual_seed(1)
        random.seed(2)
        numpy.random.seed(3)
        self.model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.ReLU(), nn.Linear(16, 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        self.scheduler = None
        if scheduler:
            kind = getattr(torch.optim.lr_scheduler, scheduler)
            self.scheduler = kind(self.optimizer, **SCHEDULERS[scheduler])
            self.parts["scheduler"] = self.scheduler
        self.scaler = torch.amp.GradScaler("cpu") if amp else None
        if self.scaler is not None:
            self.parts["scaler"] = self.scaler
        self.loader: Any = None
        self.batches: Any = None
        data = TensorDataset(torch.rand(12, 8, generator=torch.Generator().manual_seed(5)))
        generator = torch.Generator().manual_seed(4)
        if loader == "shuffled":
            self.loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
            self.parts["order"] = generator
        elif loader:
            of_its_own = None if loader == "stateful" else generator
            self.loader = StatefulDataLoader(data, 4, shuffle=True, generator=of_its_own)
            if loader == "stateful, tracked before":
                self.parts["order"] = generator
            self.parts["loader"] = self.loader
            if loader == "stateful, tracked after":
                self.parts["order"] = generator

    def next_batches(self) -> list[torch.Tensor]:
        """An epoch of a loader without a state, a batch of one with a state, or a random batch."""
        if self.loader is None:
            return [torch.rand(4, 8)]
        if not isinstance(self.loader, StatefulDataLoader):
            return [batch for (batch,) in self.loader]
        while True:
            self.batches = self.batches or iter(self.loader)
            for (batch,) in self.batches:
                return [batch]
            self.batches = None

    def step(self) -> float:
        batches = self.next_batches()
        for batch in batches:
            noise = random.random() + float(numpy.random.rand())
            loss = (self.model(batch) - noise).square().mean()
            self.optimizer.zero_grad()
            if self.scaler is None:
                loss.backward()
                self.optimizer.step()
            else:
                self.scaler.scale(loss).backward()
                self.scaler.step(self.optimizer)
                self.scaler.update()
        if self.scheduler is not None:
            self.scheduler.step()
        return float(loss.detach())

    def fingerprint(self) -> list[torch.Tensor]:
        state = self.optimizer.state_dict()["state"]
        moments = [value for entry in state.values() for value in entry.values()]
        return [*self.model.state_dict().values(), *moments, torch.rand(3)]


SCHEDULERS: dict[str, dict[str, Any]] = {
    "StepLR": {"step_size": 2},
    "CosineAnnealingLR": {"T_max": 7},
    "OneCycleLR": {"max_lr": 0.1, "total_steps": 30},
}
LOADERS = ["", "shuffled", "stateful", "stateful, of its own"]
TRACKED = ["stateful, tracked before", "stateful, tracked after"]
STEPS = 11  # of loaders with a state, three are an epoch


def run(repo: ckpt.Repository, **options: Any) -> ckpt.Run:
    return ckpt.Run(repo, "gpt", quiet=True, **options)


def equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    ("scheduler", "amp", "loader"),
    [
        *itertools.product(["", "OneCycleLR"], [False, True], LOADERS),
        ("StepLR", False, ""),
        ("CosineAnnealingLR", False, ""),
        *itertools.product(["OneCycleLR"], [False], TRACKED),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(
    repo: ckpt.Repository, scheduler: str, amp: bool, loader: str
) -> None:
    job = Job(scheduler, amp, loader)
    with run(repo) as saving:
        assert saving.track(**job.parts).resume() == 0
        for step in range(STEPS):
            loss = job.step()
            if step == 3:
                saving.save(step, {"loss": loss})
    expected = job.fingerprint()

    again = Job(scheduler, amp, loader)
    again.step()
    with run(repo) as resumed:
        assert resumed.track(**again.parts).resume() == 4
        again.batches = None
        for _ in range(4, STEPS):
            again.step()
    assert equal(again.fingerprint(), expected)


def test_what_is_saved_is_the_state_at_the_call(repo: ckpt.Repository) -> None:
    net = nn.Linear(1000, 1000)
    with run(repo) as saving:
        saving.track(model=net)
        saved = []
        for step in range(5):
            with torch.no_grad():
                net.weight.fill_(step)
            saved.append(saving.save(step))
            with torch.no_grad():
                net.weight.fill_(-1)
        versions = [one.version() for one in saved]
    for step, version in enumerate(versions):
        assert version is not None
        assert version.step == step
        assert torch.all(repo.pull(version)["model"]["weight"] == step)


def test_metrics_labels_and_aliases_are_kept(repo: ckpt.Repository) -> None:
    with run(repo) as saving:
        saving.track(model=nn.Linear(2, 2))
        metrics = {"loss": torch.tensor(0.5), "bad": float("nan"), "top": float("inf")}
        saving.save(7, metrics, labels={"who": "me"}, alias="best")
    version = repo.get("gpt:best")
    assert (version.step, version.labels, version.run) == (7, {"who": "me"}, "main")
    assert version.metrics["loss"] == 0.5
    assert repr(version.metrics["bad"]) == "nan"


def test_the_rules_keep_what_they_say_and_what_was_resumed_from(repo: ckpt.Repository) -> None:
    net = nn.Linear(2, 2)

    def train(steps: range, keep: list[Any]) -> None:
        with run(repo, keep=keep) as saving:
            saving.track(model=net).resume()
            for step in steps:
                with torch.no_grad():
                    net.weight.fill_(step)
                saving.save(step, {"loss": abs(step - 4)})

    rules = [ckpt.Latest(2), ckpt.Best("loss", mode="min"), ckpt.Every(steps=5)]
    train(range(9), rules)
    assert [version.step for version in repo.log("gpt")] == [8, 7, 5, 4, 0]
    assert repo.prune("gpt", dry_run=True).rules == ("last:2", "best:loss:min:1", "every:5")
    train(range(9, 13), [ckpt.Latest(1)])
    assert [version.step for version in repo.log("gpt")] == [12, 8]


def test_a_prune_by_an_operator_spares_what_a_live_run_resumed_from(
    repo: ckpt.Repository,
) -> None:
    def left() -> list[int | None]:
        repo.prune("gpt", keep=["last:1"])
        return [version.step for version in repo.log("gpt")]

    with run(repo) as saving:
        saving.track(model=nn.Linear(2, 2)).save(0)
    with run(repo) as saving:
        assert saving.track(model=nn.Linear(2, 2)).resume() == 1
        for step in (1, 2):
            saving.save(step)
        saving.wait()
        assert left() == [2, 0]
        assert saving._held.writer is not None
        saving._held.writer._process.kill()  # as a machine that ends: its lease is left
        saving._held.writer._process.wait()
        saving.save(3)
        saving.wait()
        assert left() == [3, 0]
    assert left() == [3]


def test_what_is_being_resumed_from_is_not_pruned_meanwhile(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    with run(repo) as saving:
        saving.track(model=nn.Linear(2, 2))
        for step in range(2):
            saving.save(step)
    newest = repo.get("gpt")

    def pull(version: Any, **options: Any) -> Any:
        if version == newest:
            raise IntegrityError("object-corrupt", "the newest is damaged")
        repo.prune("gpt", keep=["last:1"])
        return ckpt.Repository.pull(repo, version, **options)

    monkeypatch.setattr(repo, "pull", pull)
    with run(repo) as saving, pytest.warns(CkptWarning, match="not whole"):
        assert saving.track(model=nn.Linear(2, 2)).resume() == 1


def test_versions_of_other_runs_are_left_alone(repo: ckpt.Repository) -> None:
    net = nn.Linear(2, 2)
    for name in ("a", "b"):
        with run(repo, name=name, keep=[ckpt.Latest(1)]) as saving:
            saving.track(model=net)
            for step in range(3):
                saving.save(step, {"of": float(ord(name))})
    assert [(version.run, version.step) for version in repo.log("gpt")] == [("b", 2), ("a", 2)]


def test_a_run_that_saves_what_another_saved_has_a_version_of_its_own(
    repo: ckpt.Repository,
) -> None:
    model = nn.Linear(4, 4)
    state = {"model": model.state_dict()}
    first = repo.push(state, "net", step=1, run="one")
    assert repo.push(state, "net", step=1, run="one").push == first.push
    second = repo.push(state, "net", step=1, run="two")
    assert (second.number, second.run, second.new_bytes) == (2, "two", 0)


def test_a_second_live_run_of_the_same_name_is_a_conflict(
    repo: ckpt.Repository, capfd: pytest.CaptureFixture[str]
) -> None:
    with run(repo) as first:
        with pytest.raises(ConflictError, match="live in this process"):
            run(repo)
        assert capfd.readouterr().err == ""  # its writer ends without a word of its own
        run(repo, name="other").close()
        first.track(model=nn.Linear(1, 1)).save(0)
    run(repo).close()


def test_a_damaged_version_is_told_and_the_one_before_taken(repo: ckpt.Repository) -> None:
    net = nn.Linear(64, 64)
    with run(repo, compress="none") as saving:
        saving.track(model=net)
        for step in range(2):
            with torch.no_grad():
                net.weight.fill_(step)
            saving.save(step)
    push = repo.get("gpt@2").push
    (pack,) = repo.location.store.glob(f"packs/*/{push}*")
    flip(pack)
    with run(repo) as resumed, pytest.warns(CkptWarning, match="gpt@2 is not whole"):
        assert resumed.track(model=net).resume() == 1
    assert torch.all(net.weight == 0)


def test_an_optimizer_of_another_order_is_refused(repo: ckpt.Repository) -> None:
    def parts(turned: bool, kind: torch.dtype = torch.float32) -> dict[str, Any]:
        net = nn.Linear(4, 4).to(kind)
        chosen = list(net.parameters())
        return {"model": net, "opt": torch.optim.Adam(chosen[::-1] if turned else chosen)}

    with run(repo) as saving:
        saving.track(**parts(turned=False)).save(0)
    with run(repo) as other, pytest.raises(IntegrityError, match=r"model\.weight"):
        other.track(**parts(turned=True)).resume()
    with run(repo) as other, pytest.raises(IntegrityError, match="bfloat16"):
        other.track(**parts(turned=False, kind=torch.bfloat16)).resume()
    with run(repo) as other, pytest.raises(IntegrityError, match="tracked are model"):
        other.track(model=nn.Linear(4, 4)).resume()


def test_another_optimizer_is_refused(repo: ckpt.Repository) -> None:
    net = nn.Linear(4, 4)
    with run(repo) as saving:
        saving.track(model=net, opt=torch.optim.Adam(net.parameters())).save(0)
    for other in (torch.optim.SGD, torch.optim.AdamW):
        with run(repo) as resuming, pytest.raises(IntegrityError, match="of Adam, the") as caught:
            resuming.track(model=net, opt=other(net.parameters(), lr=0.1)).resume()
        assert caught.value.code == "optimizer-differs"


def test_an_optimizer_may_keep_what_is_of_no_parameter(repo: ckpt.Repository) -> None:
    def parts(count: int) -> dict[str, Any]:
        net = nn.Linear(2, 2)
        opt = torch.optim.SGD(net.parameters(), momentum=0.9)
        net(torch.rand(1, 2)).sum().backward()
        opt.step()
        state: dict[Any, Any] = opt.state
        state["shared"] = {"count": count}
        state["global"] = count
        return {"model": net, "opt": opt}

    with run(repo) as saving:
        saving.track(**parts(3)).save(0)
    resumed = parts(0)
    with run(repo) as resuming:
        resuming.track(**resumed).resume()
    state = resumed["opt"].state
    assert (state["shared"], state["global"]) == ({"count": 3}, 3)


def compiled(net: nn.Module) -> nn.Module:
    return torch.compile(net)  # type: ignore[return-value]  # a module, called like one


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compiled": compiled,
    "parallel": nn.DataParallel,
    "bare": lambda net: net,
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # by torch.compile itself
@pytest.mark.parametrize(
    ("before", "after"),
    [("compiled", "bare"), ("bare", "compiled"), ("parallel", "bare"), ("bare", "parallel")],
)
def test_a_wrapper_around_the_module_changes_no_names(
    repo: ckpt.Repository, before: str, after: str
) -> None:
    def parts(wrapper: str) -> dict[str, Any]:
        net = nn.Sequential(nn.Linear(2, 2))
        opt = torch.optim.Adam(net.parameters())
        net(torch.rand(1, 2)).sum().backward()
        opt.step()
        return {"model": WRAPPERS[wrapper](net), "opt": opt}

    saved, resumed = parts(before), parts(after)
    with run(repo) as saving:
        saving.track(**saved).save(0)
    with run(repo) as resuming:
        resuming.track(**resumed).resume()
    pairs = zip(resumed["model"].parameters(), saved["model"].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_rules_that_cannot_be_applied_cost_no_save(
    repo: ckpt.Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer, whose registry is locked by others, in this process."""

    def fail(*given: Any, **more: Any) -> NoReturn:
        raise StorageError("registry-busy", "others kept the registry locked")

    monkeypatch.setattr("ckpt.training.writer.prune_model", fail)
    writer = SimpleNamespace(
        _rules=["last:1"],
        _repository=repo,
        _model="gpt",
        _saved_rules=False,
        _run="main",
        _spared=[],
    )
    assert Writer._prune(writer) == "others kept the registry locked"  # type: ignore[arg-type]
    answer: Future[dict[str, Any]] = Future()
    added = {"new": 0, "shared": 0, "by_differences": 0, "by_coding": 0}
    said = {"reference": "gpt@1", "nbytes": 0, "added": added}
    answer.set_result({**said, "not_pruned": "others kept the registry locked"})
    with run(repo) as saving:
        saving._held.pending = Saved(repo, 0, answer, 0.0)
        with pytest.warns(CkptWarning, match="gpt@1 is saved; the rules were not applied: others"):
            saving.wait()


class Versioned(nn.Linear):
    """Reads states of its first layout, as torch documents it."""

    _version = 2

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *more: Any
    ) -> None:
        if local_metadata.get("version", 1) < 2:
            state_dict[f"{prefix}weight"] = state_dict[f"{prefix}weight"].t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)


def test_a_module_is_told_the_version_of_its_layout(repo: ckpt.Repository) -> None:
    net, resumed = Versioned(3, 3), Versioned(3, 3)
    with run(repo) as saving:
        saving.track(model=net).save(0)
    with run(repo) as resuming:
        resuming.track(model=resumed).resume()
    assert torch.equal(resumed.weight, net.weight)


def test_what_does_not_fit_changes_no_other_part(repo: ckpt.Repository) -> None:
    with run(repo) as saving:
        saving.track(one=nn.Linear(2, 2), two=nn.Linear(2, 2)).save(0)
    one = nn.Linear(2, 2)
    before = one.weight.detach().clone()
    with run(repo) as resuming, pytest.raises(IntegrityError, match="two: weight saved"):
        resuming.track(one=one, two=nn.Linear(2, 3)).resume()
    assert torch.equal(one.weight, before)


def test_a_version_that_no_run_saved_is_not_resumed(repo: ckpt.Repository) -> None:
    repo.push([1, 2], "gpt")
    with run(repo) as resuming, pytest.raises(IntegrityError, match="saved was a list"):
        resuming.track(model=nn.Linear(2, 2)).resume()


def test_a_save_of_nothing_is_refused(repo: ckpt.Repository) -> None:
    with run(repo) as saving, pytest.raises(UsageError, match="nothing is tracked"):
        saving.save(0)
    assert repo.log("gpt") == []


def test_what_cannot_be_tracked_is_refused(repo: ckpt.Repository) -> None:
    with run(repo) as saving:
        for part in ({"model": 3}, {"step": nn.Linear(1, 1)}):
            with pytest.raises(UsageError):
                saving.track(**part)


def test_steps_may_go_backwards_and_the_newest_save_counts(repo: ckpt.Repository) -> None:
    net = nn.Linear(2, 2)
    with run(repo) as saving:
        saving.track(model=net)
        for step in (5, 9, 3):
            with torch.no_grad():
                net.weight.fill_(step)
            saving.save(step)
    with run(repo) as resumed:
        assert resumed.track(model=net).resume() == 4


@pytest.fixture
def lost_store(repo: ckpt.Repository) -> Callable[[bool], None]:
    """Takes the place of the packs away, and brings it back."""
    packs: Path = repo.location.store / "packs"

    def take(away: bool) -> None:
        if away:
            packs.rename(packs.with_name("away"))
            packs.write_text("in the way")
        else:
            packs.unlink()
            packs.with_name("away").rename(packs)

    return take


def test_a_failure_in_the_background_is_told_at_the_next_call(
    repo: ckpt.Repository, lost_store: Callable[[bool], None]
) -> None:
    net = nn.Linear(2, 2)
    with run(repo) as saving:
        saving.track(model=net).save(0).version()
        lost_store(True)
        with torch.no_grad():
            net.weight.fill_(9)
        saving.save(1)
        with pytest.raises(CkptError):
            saving.wait()
        lost_store(False)
        version = saving.save(2).version()
        assert version is not None
        assert version.step == 2
    assert [version.step for version in repo.log("gpt")] == [2, 0]


def test_with_warn_the_loop_goes_on(
    repo: ckpt.Repository, lost_store: Callable[[bool], None]
) -> None:
    net = nn.Linear(2, 2)
    with run(repo, on_error="warn") as saving:
        saving.track(model=net).save(0).version()
        lost_store(True)
        with torch.no_grad():
            net.weight.fill_(9)
        saving.save(1)
        with pytest.warns(CkptWarning, match="step 1 was not saved"):
            saving.wait()
        lost_store(False)
        saving.save(2)
    assert [version.step for version in repo.log("gpt")] == [2, 0]


def test_a_writer_that_was_killed_is_replaced(repo: ckpt.Repository) -> None:
    net = nn.Linear(2, 2)
    with run(repo) as saving:
        saving.track(model=net).save(0).version()
        assert saving._held.writer is not None
        saving._held.writer._process.kill()
        saving._held.writer._process.wait()
        with torch.no_grad():
            net.weight.fill_(9)
        version = saving.save(1).version()
    assert version is not None
    assert version.step == 1


def test_a_version_of_a_run_can_be_exported(repo: ckpt.Repository, tmp_path: Path) -> None:
    job = Job("OneCycleLR", amp=True, loader="stateful")
    with run(repo) as saving:
        saving.track(**job.parts).save(0)
    repo.export_file("gpt", tmp_path / "out.pt")
    exported = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(exported) == {*job.parts, "random", "step"}
