"""The Trainer of Hugging Face trains with the callback, is stopped, and goes on as if it had not been."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

import ckpt
from ckpt.core.errors import CkptError, CkptWarning, NotFoundError, UsageError
from ckpt.training.huggingface import CkptCallback

ROWS = torch.randint(0, 50, (20, 12), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": row, "labels": row[0] % 2} for row in ROWS]


BEST = ("best", "best-other")


class Failing(TrainerCallback):
    """Fails after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == self.step:
            raise RuntimeError("the machine fails")


def trainer(outputs: Path, *callbacks: TrainerCallback, seed: int = 0, **options: Any) -> Trainer:
    """One that trains a BERT with dropout for three epochs of five steps."""
    set_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertForSequenceClassification(BertConfig(vocab_size=50, intermediate_size=16, **sizes))
    arguments: dict[str, Any] = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "save_steps": 4,
    }
    arguments |= {"logging_steps": 1, "eval_strategy": "steps", "eval_steps": 4}
    arguments |= {"metric_for_best_model": "loss", "use_cpu": True}
    arguments |= {"report_to": [], "disable_tqdm": True, **options}
    return Trainer(
        model,
        TrainingArguments(str(outputs), **arguments),
        train_dataset=DATA,
        eval_dataset=DATA[:8],
        callbacks=list(callbacks),
    )


def result(trained: Trainer) -> list[Any]:
    """Losses, weights and moments, and what the generator gives next."""
    assert trained.model is not None
    assert trained.optimizer is not None
    losses = [entry["loss"] for entry in trained.state.log_history if "loss" in entry]
    weights = [value.tolist() for value in trained.model.state_dict().values()]
    moments = [
        value.tolist()
        for one in trained.optimizer.state_dict()["state"].values()
        for value in one.values()
    ]
    return [losses, weights, moments, torch.rand(3).tolist()]


def steps(repo: ckpt.Repository) -> list[int | None]:
    return [version.step for version in reversed(repo.log("bert"))]


def test_a_resumed_training_equals_the_uninterrupted_one(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    whole = trainer(tmp_path / "whole", CkptCallback(repo, "bert"))
    whole.train()
    expected = result(whole)
    assert steps(repo) == [4, 8, 12, 15]
    for version in repo.log("bert")[1:]:  # 4 and 8 lie within an epoch
        again = CkptCallback(repo, "bert", name="again")
        resumed = trainer(tmp_path / "again", again, seed=7)
        resumed.train(resume_from_checkpoint=again.resume(version))
        assert result(resumed) == expected


def test_a_training_that_failed_goes_on_from_its_newest_version(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    whole = trainer(tmp_path / "whole")
    whole.train()
    expected = result(whole)
    first = CkptCallback(repo, "bert")
    failing = trainer(tmp_path / "a", first, Failing(10))
    assert first.resume() is None
    with pytest.raises(RuntimeError, match="the machine fails"):
        failing.train()
    second = CkptCallback(repo, "bert", keep=[ckpt.Latest(1)])
    resumed = trainer(tmp_path / "b", second, seed=7)  # on a machine that has no folders
    start = second.resume()
    assert start is not None
    assert (Path(start) / "optimizer.pt").exists()
    resumed.train(resume_from_checkpoint=start)
    assert result(resumed) == expected
    # What it was resumed from stays, whatever the rules say; so does what an alias names.
    best = repo.get("bert:best").step
    assert {*steps(repo)} == {8, 15, best}
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"checkpoint-12", "checkpoint-15"}


def test_a_version_is_the_folder_with_step_metrics_and_the_best(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    trained = trainer(tmp_path / "a", CkptCallback(repo, "bert"), max_steps=8)
    trained.train()
    version = repo.get("bert")
    assert (version.step, version.state, version.labels) == (8, "files", {"epoch": "1.6"})
    assert {"loss", "eval_loss", "learning_rate"} <= set(version.metrics)
    versions = repo.log("bert")
    best = min(versions, key=lambda one: one.metrics["eval_loss"])
    assert repo.get("bert:best").metrics["eval_loss"] == best.metrics["eval_loss"]
    repo.pull_file("bert", tmp_path / "again")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a/checkpoint-8").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == files
    assert "optimizer.pt" in files
    weights = repo.pull("bert")
    assert trained.model is not None
    for name, value in trained.model.state_dict().items():
        assert torch.equal(weights[name], value)


class Told(Trainer):
    """Has the loss that it was told at each step."""

    told: ClassVar[dict[int, float]] = {}

    def log(self, logs: dict[str, float], *given: Any, **more: Any) -> None:
        if "eval_loss" in logs:
            logs["eval_loss"] = self.told[self.state.global_step]
        super().log(logs, *given, **more)


@pytest.mark.filterwarnings("ignore:.* begins anew")
def test_the_best_stays_the_best_when_another_run_or_a_fresh_training_is_worse(
    repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "Trainer", Told)

    def train(name: str, first: float, second: float) -> None:
        Told.told = {4: first, 8: second}
        callback = CkptCallback(repo, "bert", name=name, keep=[ckpt.Latest(1)])
        trainer(tmp_path / "a", callback, max_steps=8).train()

    train("main", 0.1, 0.5)
    train("main", 0.9, 0.8)
    train("other", 0.7, 0.9)
    best = {alias: repo.get(f"bert:{alias}").metrics["eval_loss"] for alias in BEST}
    assert best == {"best": 0.1, "best-other": 0.7}


@pytest.fixture
def empty(repo: ckpt.Repository) -> Iterator[ckpt.Repository]:
    """A repository in which nothing is to be left by what a test does."""
    yield repo
    with pytest.raises(NotFoundError):
        repo.get("bert")


def test_what_is_no_checkpoint_of_a_trainer_is_refused(
    empty: ckpt.Repository, tmp_path: Path
) -> None:
    empty.push({"w": torch.ones(2)}, "plain")
    callback = CkptCallback(empty, "bert")
    with pytest.raises(UsageError, match="no trainer has this callback yet"):
        callback.resume("plain")
    trainer(tmp_path / "a", callback)
    with pytest.raises(UsageError, match="plain@1 is no checkpoint of a Trainer"):
        callback.resume("plain")
    with pytest.raises(UsageError, match="on_error is 'ignore'"):
        CkptCallback(empty, "bert", on_error="ignore")  # type: ignore[arg-type]


def test_a_push_that_fails_stops_the_training_or_only_warns(
    empty: ckpt.Repository, tmp_path: Path
) -> None:
    (empty.location.store / "packs").write_text("in the way")
    with pytest.raises(CkptError):
        trainer(tmp_path / "a", CkptCallback(empty, "bert"), max_steps=5).train()
    warning = trainer(tmp_path / "b", CkptCallback(empty, "bert", on_error="warn"), max_steps=5)
    with pytest.warns(CkptWarning, match="step [45] was not pushed"):
        warning.train()
    assert warning.state.global_step == 5


def test_a_damaged_version_is_told_and_the_one_before_taken(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    trainer(tmp_path / "a", CkptCallback(repo, "bert", compress="none"), max_steps=8).train()
    push = repo.get("bert@2").push
    for pack in repo.location.store.glob(f"packs/*/{push}*"):
        body = bytearray(pack.read_bytes())
        body[-200] ^= 1
        pack.chmod(0o600)
        pack.write_bytes(body)
    callback = CkptCallback(repo, "bert")
    resumed = trainer(tmp_path / "b", callback, max_steps=8)
    with pytest.warns(CkptWarning, match="bert@2 is not whole"):
        start = callback.resume()
    assert len(list((tmp_path / "b").iterdir())) == 1  # of the damaged one nothing is left
    resumed.train(resume_from_checkpoint=start)
    assert resumed.state.global_step == 8


def test_a_folder_that_a_process_left_which_died_is_removed(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    outputs = tmp_path / "a"
    trainer(outputs, CkptCallback(repo, "bert"), max_steps=4).train()
    program = (
        "import os, sys; from pathlib import Path\n"
        "from ckpt.training.resume_folder import ResumeFolder\n"
        "ResumeFolder(Path(sys.argv[1])); os._exit(0)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(outputs)], check=True)
    (left,) = outputs.glob(".ckpt-*")
    living = CkptCallback(repo, "bert")
    trainer(outputs, living, max_steps=8)
    first = living.resume()
    assert first is not None
    assert not left.exists()
    callback = CkptCallback(repo, "bert")
    trainer(outputs, callback, max_steps=8)
    assert callback.resume() is not None
    assert Path(first).exists()  # somebody lives who has not read it yet


def test_the_best_model_is_loaded_at_the_end_on_whatever_machine(
    repo: ckpt.Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Told.told = {4: 0.1, 8: 0.5, 12: 0.6, 15: 0.7, 16: 0.7}
    options: dict[str, Any] = {"load_best_model_at_end": True, "save_total_limit": 1}
    options |= {"metric_for_best_model": "eval_loss", "greater_is_better": False}

    class Deciding(Told):
        def evaluate(self, *given: Any, **more: Any) -> dict[str, float]:
            measured = super().evaluate(*given, **more)
            return {**measured, "eval_loss": self.told[self.state.global_step]}

    monkeypatch.setattr(sys.modules[__name__], "Trainer", Deciding)
    failing = trainer(tmp_path / "a", CkptCallback(repo, "bert"), Failing(10), **options)
    with pytest.raises(RuntimeError, match="the machine fails"):
        failing.train()
    callback = CkptCallback(repo, "bert")
    resumed = trainer(tmp_path / "b", callback, seed=7, **options)
    resumed.train(resume_from_checkpoint=callback.resume())
    assert resumed.model is not None
    best = repo.pull("bert@1")
    assert all(torch.equal(best[name], one) for name, one in resumed.model.state_dict().items())
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint-4"]
