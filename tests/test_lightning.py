"""Lightning trains with the callback, is stopped, and goes on as if it had not been."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

import ckpt
from ckpt.core.errors import (
    CkptError,
    CkptWarning,
    ConflictError,
    IntegrityError,
    NotFoundError,
    UsageError,
)
from ckpt.training.lightning import CkptCheckpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning"),
]


class Net(LightningModule):
    """Draws from the generators of torch and Python, and notes what it was given."""

    def __init__(self, scheduler: str = "", turned: bool = False, **given: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 1))
        self.seen: list[Any] = []
        self.fails_at = -1

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == self.fails_at:
            raise RuntimeError("the machine fails")
        (rows,) = batch
        self.seen.append((self.trainer.current_epoch, batch_idx, rows.tolist()))
        loss: torch.Tensor = (self.net(rows) - torch.rand(1) - random.random()).square().mean()
        self.log("loss", loss)
        self.log("step", float(self.global_step))  # which some loggers plot over
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        (rows,) = batch
        self.log("val/loss", self.net(rows).square().mean())

    def configure_optimizers(self) -> Any:
        chosen = list(self.parameters())
        kind = getattr(torch.optim, self.hparams.get("kind", "AdamW"))
        optimizer = kind(chosen[::-1] if self.hparams["turned"] else chosen, lr=0.01)
        kinds = torch.optim.lr_scheduler
        if self.hparams["scheduler"] == "step":
            return [optimizer], [
                {"scheduler": kinds.OneCycleLR(optimizer, 0.1, 40), "interval": "step"}
            ]
        if self.hparams["scheduler"] == "epoch":
            return [optimizer], [kinds.StepLR(optimizer, 1)]
        if self.hparams["scheduler"] == "plateau":
            plateau = kinds.ReduceLROnPlateau(optimizer, factor=0.9, patience=0, threshold=1.0)
            return {
                "optimizer": optimizer,
                "lr_scheduler": {"scheduler": plateau, "monitor": "val/loss"},
            }
        return optimizer


def rows(count: int, seed: int) -> TensorDataset:
    return TensorDataset(torch.rand(count, 4, generator=torch.Generator().manual_seed(seed)))


def trained(
    checkpoint: CkptCheckpoint | None,
    net: Net,
    ckpt_path: str | None = None,
    *,
    loader: type[DataLoader[Any]] = DataLoader,
    others: tuple[Callback, ...] = (),
    **options: Any,
) -> Trainer:
    """Train for three epochs of five batches."""
    trainer = Trainer(
        **{"max_epochs": 3, **options},
        callbacks=[*others, *([] if checkpoint is None else [checkpoint])],
        enable_checkpointing=bool(others) or checkpoint is not None,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    train = loader(rows(20, 1), batch_size=4, shuffle=True)
    trainer.fit(net, train, DataLoader(rows(4, 2), batch_size=2), ckpt_path=ckpt_path)
    return trainer


def seeded(scheduler: str = "", seed: int = 0, **given: Any) -> Net:
    torch.manual_seed(seed)
    random.seed(seed)
    return Net(scheduler, **given)


def result(trainer: Trainer) -> list[Any]:
    """Weights, moments, learning rates, and what the generators give next."""
    optimizer = trainer.optimizers[0].state_dict()
    moments = [value.tolist() for one in optimizer["state"].values() for value in one.values()]
    weights = [value.tolist() for value in trainer.lightning_module.state_dict().values()]
    rates = [group["lr"] for group in optimizer["param_groups"]]
    return [weights, moments, rates, torch.rand(3).tolist(), random.random()]


def steps(repo: ckpt.Repository) -> list[int | None]:
    return [version.step for version in reversed(repo.log("gpt"))]


@pytest.mark.parametrize(
    ("scheduler", "every", "options"),
    [
        ("", 5, {}),
        ("step", 5, {"max_epochs": -1, "max_steps": 15}),
        ("epoch", 5, {"val_check_interval": 2}),
        ("plateau", 5, {}),
        ("", 4, {"loader": StatefulDataLoader, "val_check_interval": 2}),
        ("step", 5, {"loader": StatefulDataLoader}),
        ("epoch", 3, {"loader": StatefulDataLoader, "accumulate_grad_batches": 2}),
        ("plateau", 4, {"loader": StatefulDataLoader, "max_epochs": -1, "max_steps": 15}),
        ("plateau", 4, {"loader": StatefulDataLoader, "precision": "bf16-mixed"}),
    ],
    ids=str,
)
def test_a_resumed_training_equals_the_uninterrupted_one(
    repo: ckpt.Repository, scheduler: str, every: int, options: dict[str, Any]
) -> None:
    checkpoint = CkptCheckpoint(repo, "gpt", every_n_train_steps=every, quiet=True)
    net = seeded(scheduler)
    whole = trained(checkpoint, net, **options)
    expected = result(whole)
    saved = [version for version in repo.log("gpt") if (version.step or 0) < whole.global_step]
    assert len(saved) >= 2
    for version in saved:
        other = CkptCheckpoint(repo, "gpt", every_n_train_steps=99, name="again", quiet=True)
        again = seeded(scheduler, seed=7)
        resumed = trained(other, again, version.reference, **options)
        assert again.seen == net.seen[-len(again.seen) :]
        assert result(resumed) == expected


def test_a_training_that_failed_goes_on_from_its_newest_version(repo: ckpt.Repository) -> None:
    expected = result(trained(None, seeded(), loader=StatefulDataLoader))
    checkpoint = CkptCheckpoint(repo, "gpt", every_n_train_steps=2, quiet=True)
    assert checkpoint.resume() is None
    net = seeded()
    net.fails_at = 7
    with pytest.raises(RuntimeError, match="the machine fails"):
        trained(checkpoint, net, loader=StatefulDataLoader)
    assert steps(repo) == [2, 4, 6]
    again = CkptCheckpoint(repo, "gpt", every_n_train_steps=2, keep=[ckpt.Latest(1)], quiet=True)
    start = again.resume()
    assert start == "gpt@3"
    trainer = trained(again, seeded(seed=7), start, loader=StatefulDataLoader)
    assert result(trainer) == expected
    assert steps(repo) == [6, 14]  # what it was resumed from stays, whatever the rules say


class Counting(Callback):
    """A callback with a state."""

    def __init__(self) -> None:
        self.batches = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.batches += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.batches = state_dict["batches"]


class Data(LightningDataModule):
    """Data with a state."""

    def __init__(self) -> None:
        super().__init__()
        self.word = "new"

    def train_dataloader(self) -> Any:
        return DataLoader(rows(20, 1), batch_size=4)

    def state_dict(self) -> dict[str, Any]:
        return {"word": self.word}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.word = state_dict["word"]


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")
@pytest.mark.filterwarnings("ignore:.* begins anew")
def test_all_that_lightning_itself_saves_is_saved(repo: ckpt.Repository, tmp_path: Path) -> None:
    counting, data = Counting(), Data()
    data.word = "seen"
    files = ModelCheckpoint(tmp_path / "files", filename="its", save_on_train_epoch_end=True)
    checkpoint = CkptCheckpoint(repo, "gpt", quiet=True)
    options: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "logger": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(callbacks=[counting, files, checkpoint], limit_val_batches=0, **options)
    trainer.fit(seeded("step"), datamodule=data)
    its = torch.load(tmp_path / "files" / "its.ckpt", weights_only=False)
    ours = repo.pull("gpt")
    assert {"step", "random"} == set(ours) - set(its)
    assert set(its) <= set(ours)
    for key in set(its) - {"callbacks"}:
        assert str(ours[key]) == str(its[key]), key
    assert ours["callbacks"]["Counting"] == {"batches": 5}

    later, later_data = Counting(), Data()
    options["max_epochs"] = 2
    trainer = Trainer(
        callbacks=[later, CkptCheckpoint(repo, "gpt", quiet=True)], limit_val_batches=0, **options
    )
    trainer.fit(seeded("step"), datamodule=later_data, ckpt_path="gpt")
    assert (later.batches, later_data.word) == (10, "seen")
    trainer.fit(seeded("step"), datamodule=later_data, ckpt_path=tmp_path / "files" / "its.ckpt")
    repo.export_file("gpt", tmp_path / "out.ckpt")
    loaded = Net.load_from_checkpoint(tmp_path / "out.ckpt", weights_only=True)
    assert loaded.hparams["scheduler"] == "step"


def test_metrics_epochs_and_the_best_are_noted(repo: ckpt.Repository) -> None:
    checkpoint = CkptCheckpoint(
        repo, "gpt", monitor="val/loss", keep=["best:val/loss:min:1"], quiet=True
    )
    assert checkpoint.best_model_path == ""
    net = seeded()
    trainer = trained(checkpoint, net)
    versions = repo.log("gpt")
    assert versions[0].labels == {"epoch": "2"}
    assert set(versions[0].metrics) == {"loss", "val/loss"}
    best = min(versions, key=lambda version: version.metrics["val/loss"])
    assert repo.get("gpt:best").number == best.number
    assert {version.number for version in versions} == {3, best.number}
    tested = trainer.validate(net, DataLoader(rows(4, 2), batch_size=2), ckpt_path="best")
    assert tested[0]["val/loss"] == pytest.approx(best.metrics["val/loss"])


@pytest.mark.filterwarnings("ignore:.* begins anew")  # the run that was not resumed from
def test_two_callbacks_of_one_trainer_save_each_as_it_was_told(repo: ckpt.Repository) -> None:
    def both() -> list[CkptCheckpoint]:
        often = CkptCheckpoint(repo, "gpt", name="often", every_n_train_steps=4, quiet=True)
        return [often, CkptCheckpoint(repo, "gpt", quiet=True)]

    whole = seeded()
    expected = result(trained(None, whole, others=(*both(),)))
    saved = {(version.run, version.step) for version in repo.log("gpt")}
    assert saved == {
        ("main", 5),
        ("main", 10),
        ("main", 15),
        ("often", 4),
        ("often", 8),
        ("often", 12),
    }
    (middle,) = (version for version in repo.log("gpt") if version.step == 10)
    again = seeded(seed=7)
    assert result(trained(None, again, middle.reference, others=(*both(),))) == expected
    assert again.seen == whole.seen[10:]


def test_two_callbacks_of_equal_settings_save_to_two_runs_and_two_repositories(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    with ckpt.open(tmp_path / "other") as other:

        def all_three() -> list[CkptCheckpoint]:
            spare = CkptCheckpoint(repo, "gpt", name="spare", quiet=True)
            return [CkptCheckpoint(repo, "gpt", quiet=True), spare, CkptCheckpoint(other, "gpt")]

        whole = seeded("plateau")
        expected = result(trained(None, whole, others=(*all_three(),)))
        assert steps(other) == [5, 10, 15]
        assert sorted(map(str, steps(repo))) == ["10", "10", "15", "15", "5", "5"]
        again = all_three()
        # Of the repository of this one, though another comes last, whose gpt@3 is the end.
        start = again[0].resume("gpt@3")
        assert start is not None
        assert repo.get(start).step == 10
        net = seeded("plateau", seed=7)
        assert result(trained(None, net, start, others=(*again,))) == expected
        assert net.seen == whole.seen[10:]


def test_a_callback_that_joins_a_resumed_training_does_not_begin_anew(
    repo: ckpt.Repository, recwarn: pytest.WarningsRecorder
) -> None:
    def both() -> list[CkptCheckpoint]:
        often = CkptCheckpoint(repo, "gpt", name="often", every_n_train_steps=4, quiet=True)
        return [often, CkptCheckpoint(repo, "gpt", quiet=True)]

    trained(None, seeded(), others=(*both(),), max_epochs=1)
    for first in (0, 1):
        callbacks = both()
        start = callbacks[first].resume()
        trained(None, seeded(), start, others=(*callbacks,), max_epochs=2 + first)
    assert not [one for one in recwarn if one.category is CkptWarning]


def test_a_training_that_goes_on_in_the_same_trainer_does_not_begin_anew(
    repo: ckpt.Repository,
) -> None:
    checkpoint = CkptCheckpoint(repo, "gpt", every_n_train_steps=2, quiet=True)
    trainer = trained(checkpoint, seeded(), max_epochs=1)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(trainer.lightning_module, DataLoader(rows(20, 1), batch_size=4))
    assert steps(repo) == [2, 4, 6, 8, 10]
    with pytest.warns(CkptWarning, match="begins anew"):
        trained(checkpoint, seeded(), max_epochs=1)


def test_a_plateau_is_stepped_once_whatever_the_number_of_callbacks(repo: ckpt.Repository) -> None:
    def both() -> list[CkptCheckpoint]:
        often = CkptCheckpoint(repo, "gpt", name="often", every_n_train_steps=4, quiet=True)
        return [often, CkptCheckpoint(repo, "gpt", every_n_epochs=9, quiet=True)]

    options: dict[str, Any] = {"loader": StatefulDataLoader}
    expected = result(trained(None, seeded("plateau"), others=(*both(),), **options))
    again = both()
    start = again[0].resume("gpt@2")
    assert result(trained(None, seeded("plateau", seed=7), start, others=(*again,), **options)) == (
        expected
    )


class Told(Net):
    """Logs the values that it was told, one at each validation."""

    def __init__(self, *values: float) -> None:
        super().__init__()
        self.values = [*values]

    def on_validation_epoch_end(self) -> None:
        if not self.trainer.sanity_checking:
            self.log("told", self.values.pop(0))


def told(repo: ckpt.Repository, *values: float, **options: Any) -> CkptCheckpoint:
    """Train for an epoch for each value."""
    others = options.pop("others", ())
    checkpoint = CkptCheckpoint(repo, "gpt", monitor="told", quiet=True, **options)
    for other in others:
        other.checkpoint = checkpoint
    trained(checkpoint, Told(*values), max_epochs=len(values), others=others)
    return checkpoint


def best_by(repo: ckpt.Repository, alias: str) -> float:
    return round(repo.get(f"gpt:{alias}").metrics["told"], 2)


@pytest.mark.filterwarnings("ignore:.* begins anew")
def test_the_best_stays_the_best_when_another_run_or_a_fresh_training_is_worse(
    repo: ckpt.Repository,
) -> None:
    rules = [ckpt.Latest(1)]
    told(repo, 0.1, 0.5, keep=rules)
    told(repo, 0.9, 0.8, keep=rules)
    assert best_by(repo, "best") == 0.1
    other = told(repo, 0.7, 0.9, name="other", keep=rules)
    assert (best_by(repo, "best"), best_by(repo, "best-other")) == (0.1, 0.7)
    assert other.best_model_path == "gpt:best-other"
    told(repo, 0.05, keep=rules)
    assert best_by(repo, "best") == 0.05


class Losing(Callback):
    """The store is away during the second epoch and its save."""

    def __init__(self, packs: Path) -> None:
        self.packs = packs
        self.checkpoint: Any = None

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        away = self.packs.with_name("away")
        if trainer.current_epoch == 1:
            self.checkpoint._run.wait()
            self.packs.rename(away)
            self.packs.write_text("in the way")
        if trainer.current_epoch == 2:
            with pytest.warns(CkptWarning, match="was not saved"):
                self.checkpoint._run.wait()
            self.packs.unlink()
            away.rename(self.packs)


def test_a_best_that_could_not_be_saved_is_not_in_the_way_of_the_next_best(
    repo: ckpt.Repository,
) -> None:
    losing = Losing(repo.location.store / "packs")
    told(repo, 0.9, 0.1, 0.4, 0.5, on_error="warn", others=(losing,))
    assert best_by(repo, "best") == 0.4


@pytest.fixture
def refused(repo: ckpt.Repository) -> Iterator[ckpt.Repository]:
    """A repository in which nothing is to be left by what a test does."""
    yield repo
    with pytest.raises(NotFoundError):
        repo.get("gpt")


def test_what_cannot_be_stored_is_refused_with_its_path(refused: ckpt.Repository) -> None:
    checkpoint = CkptCheckpoint(refused, "gpt", quiet=True)
    with pytest.raises(
        UsageError, match=r"hyper_parameters\.act: cannot store the class .*ReLU"
    ) as caught:
        trained(checkpoint, seeded(act=nn.ReLU), max_epochs=1)
    assert caught.value.code == "cannot-store"


def test_a_metric_that_is_never_logged_is_told(refused: ckpt.Repository) -> None:
    checkpoint = CkptCheckpoint(refused, "gpt", monitor="val_los", quiet=True)
    with pytest.raises(UsageError, match='"val_los"; logged are: loss step val/loss') as caught:
        trained(checkpoint, seeded(), max_epochs=1)
    assert caught.value.code == "monitor-missing"


def test_bad_arguments_are_refused(refused: ckpt.Repository) -> None:
    bad: dict[str, Any]
    for bad in ({"mode": "least"}, {"every_n_epochs": 0}, {"every_n_train_steps": -1}):
        with pytest.raises(UsageError):
            CkptCheckpoint(refused, "gpt", **bad)
    trainer: Any = SimpleNamespace(strategy=ModelParallelStrategy())
    with pytest.raises(UsageError, match="ModelParallelStrategy saves shard by shard"):
        CkptCheckpoint(refused, "gpt").setup(trainer, Net(), "fit")


def test_a_trial_run_saves_nothing(refused: ckpt.Repository) -> None:
    trained(CkptCheckpoint(refused, "gpt", every_n_train_steps=1), seeded(), fast_dev_run=True)


def test_another_optimizer_and_another_state_are_refused(repo: ckpt.Repository) -> None:
    trained(CkptCheckpoint(repo, "gpt", quiet=True), seeded(), max_epochs=1)
    with pytest.raises(IntegrityError, match=r"model\.net\.0\.weight"):
        trained(CkptCheckpoint(repo, "gpt", quiet=True), seeded(turned=True), "gpt")
    with pytest.raises(IntegrityError, match="state of AdamW, the optimizer there is Adam"):
        trained(CkptCheckpoint(repo, "gpt", quiet=True), seeded(kind="Adam"), "gpt")
    with pytest.raises(IntegrityError, match="states of 0 loaders; 1 have one here"):
        trained(CkptCheckpoint(repo, "gpt", quiet=True), seeded(), "gpt", loader=StatefulDataLoader)
    repo.push({"w": torch.ones(2)}, "plain")
    with pytest.raises(UsageError, match="plain@1 is no checkpoint of Lightning"):
        trained(CkptCheckpoint(repo, "gpt", quiet=True), seeded(), "plain")


def test_a_second_live_training_of_the_same_run_is_a_conflict(repo: ckpt.Repository) -> None:
    with ckpt.Run(repo, "gpt", quiet=True), pytest.raises(ConflictError, match="live"):
        trained(CkptCheckpoint(repo, "gpt", quiet=True), seeded())


def test_a_save_that_fails_at_the_end_is_told(repo: ckpt.Repository) -> None:
    (repo.location.store / "packs").write_text("in the way")
    with pytest.raises(CkptError):
        trained(CkptCheckpoint(repo, "gpt", quiet=True), seeded(), max_epochs=1)


def ddp(*arguments: object) -> dict[str, str]:
    """What each rank of the program prints."""
    program = str(Path(__file__).with_name("lightning_ddp.py"))
    command = [sys.executable, program, *map(str, arguments)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.partition(" ") for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 ")]
    assert len(lines) == 2, done.stdout + done.stderr
    return {rank: said for rank, _, said in lines}


def test_two_processes_go_on_with_the_random_numbers_of_each(tmp_path: Path) -> None:
    whole = ddp(tmp_path, "main", 10)
    assert whole["0"] != whole["1"]
    assert ddp(tmp_path, "again", 20, "gpt@1") == whole
    with ckpt.open(tmp_path) as repo:
        assert steps(repo) == [4, 8, 8]
        first, second = (version.digest for version in repo.log("gpt", limit=2))
        assert first == second  # bit for bit
        with pytest.raises(IntegrityError, match="saved by 2 processes, resumed by 1"):
            trained(CkptCheckpoint(repo, "gpt", quiet=True), seeded(), "gpt")
