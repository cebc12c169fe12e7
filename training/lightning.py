"""A callback for Lightning, in place of its ``ModelCheckpoint``: saves as a run, resumes exactly."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from torch.distributed.checkpoint.stateful import Stateful

from ckpt.core.errors import CkptError, IntegrityError, UsageError
from ckpt.core.names import check_model, check_run, named_metrics
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.service.lookup import VersionLike
from ckpt.service.repository import Repository
from ckpt.training.best import best_alias, is_best, named_best
from ckpt.training.newest import newest_whole
from ckpt.training.randomness import restore_random_states
from ckpt.training.ranks import Ranks
from ckpt.training.run import Run
from ckpt.training.saved import Saved
from ckpt.training.tracking import (
    RESERVED,
    check_class,
    check_parameters,
    described_parameters,
    parameter_names,
)

_KEY = "CkptCheckpoint"  # among the states of callbacks
_SHARDING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)


class CkptCheckpoint(Checkpoint):
    """Saves what Lightning's own checkpoint holds, and every random state, in the background::

        checkpoint = CkptCheckpoint(repo, "gpt", monitor="val_loss", keep=[ckpt.Latest(3)])
        trainer = Trainer(callbacks=[checkpoint])
        trainer.fit(model, ckpt_path=checkpoint.resume())

    While it is among a trainer's callbacks, ``ckpt_path`` may also be a reference such as
    ``"gpt:best"``. A save that is due where validation follows, or the epoch ends, is made after
    that. A version has the trainer's ``global_step`` as its step, all logged metrics, and its
    epoch as a label.

    Args:
        repo: an open repository.
        model: the model that the versions are of.
        every_n_train_steps: save when this many optimizer steps were made.
        every_n_epochs: save at the end of every n-th epoch; of each, when nothing is said.
        monitor: a logged metric; the version that is best by it gets the alias ``best``, that of a
            run which is not ``main`` the alias ``best-<run>``. It is what ``ckpt_path="best"``
            means, and stays the best when the run is trained anew.
        mode: whether the least or the greatest is best.
        run: more of what :class:`ckpt.Run` takes: ``name``, ``keep``, ``compress``, ``on_error``,
            ``drain_seconds``, ``quiet``.
    """

    def __init__(
        self,
        repo: Repository,
        model: str,
        *,
        every_n_train_steps: int | None = None,
        every_n_epochs: int | None = None,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        **run: Any,
    ) -> None:
        if mode not in ("min", "max"):
            raise UsageError("usage", f"mode is {mode!r}", hint="write min or max")
        for every in (every_n_train_steps, every_n_epochs):
            if every is not None and every < 1:
                raise UsageError("usage", f"{every} is no interval", hint="write 1 or more")
        if every_n_train_steps is None and every_n_epochs is None:
            every_n_epochs = 1
        self.monitor = monitor
        self._repo = repo
        self._model = check_model(model)
        self._name = check_run(run.get("name", "main"))
        self._alias = best_alias(self._name)
        self._steps, self._epochs, self._mode = every_n_train_steps, every_n_epochs, mode
        self._options = run
        self._run: Run | None = None
        self._ready: tuple[Version, Any] | None = None  # read by resume, for load_checkpoint
        self._loaded: dict[str, Any] = {}  # of a version, what Lightning does not restore
        self._noted: dict[str, Any] = {}  # what is saved beside what Lightning saves
        self._last: Saved | None = None
        self._seen = 0
        self._due = self._validated = False

    def resume(self, ref: VersionLike | None = None) -> str | None:
        """What to give to ``trainer.fit(ckpt_path=…)``: the version that ``ref`` means, by default
        the run's newest that is whole; None when there is none yet. It is read here.

        Raises:
            NotFoundError: ``model-missing``, ``version-missing``.
            IntegrityError: ``none-whole``; ``object-corrupt`` and others of a ``ref``.
        """
        if ref is None:
            self._ready = newest_whole(self._repo, self._model, self._name, self._pull)
        else:
            version = self._repo.get(ref)
            self._ready = version, self._pull(version)
        return None if self._ready is None else self._ready[0].reference

    def _pull(self, version: Version) -> Any:
        return self._repo.pull(version, device="cpu")

    @property
    def best_model_path(self) -> str:
        """The reference of the best version, or nothing."""
        monitored = self.monitor is not None
        found = monitored and named_best(self._repo, self._model, self._alias) is not None
        return f"{self._model}:{self._alias}" if found else ""

    # --- the life of a fit ---------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        strategy = trainer.strategy
        if isinstance(strategy, _SHARDING):
            raise UsageError(
                "strategy-shards",
                f"{type(strategy).__name__} saves shard by shard, which no callback can take over",
                hint="use another strategy, or a loop of your own with ckpt.dcp_writer",
            )
        strategy.checkpoint_io = _References(strategy.checkpoint_io, trainer)
        if stage == "fit" and not getattr(trainer, "fast_dev_run", False):
            self._due, self._validated, self._loaded = False, False, {}
            self._run = Run(self._repo, self._model, **self._options)
            if self._last is not None and trainer.global_step >= self._last.step:
                self._run._spare([])  # what this trainer trained before goes on

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        run = self._left(trainer)
        if run is not None:
            run.close()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        run = self._left(trainer)
        if run is not None:
            run.__exit__(type(exception), exception, exception.__traceback__)

    def _left(self, trainer: Trainer) -> Run | None:
        """The run that is to be ended, now that the trainer is as it was before."""
        files = trainer.strategy.checkpoint_io
        if isinstance(files, _References):
            trainer.strategy.checkpoint_io = files.others
        run, self._run, self._ready = self._run, None, None
        return run

    # --- saving --------------------------------------------------------------------------------

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if trainer.global_step != self._seen:  # batches are accumulated otherwise
            self._seen = trainer.global_step
            self._due |= self._steps is not None and self._seen % self._steps == 0
        if self._due and not trainer.is_last_batch and not _validates(trainer, batch_idx):
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._run is None or trainer.sanity_checking:
            return
        self._validated = True
        if self._due and not trainer.is_last_batch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._validated or not trainer.enable_validation:
            self._check_monitor(trainer.callback_metrics)
        self._due |= self._epochs is not None and (trainer.current_epoch + 1) % self._epochs == 0
        if self._due:
            self._save(trainer)
        # By the last of several, when all have saved.
        if trainer.fit_loop.restarting and _callbacks_of(trainer)[-1] is self:
            _step_plateaus(trainer, trainer.current_epoch + 1)

    def _check_monitor(self, metrics: Mapping[str, Any]) -> None:
        if self.monitor is not None and self.monitor not in metrics:
            raise UsageError(
                "monitor-missing",
                f'nothing is logged as "{escape(self.monitor, 80)}"; '
                f"logged are: {escape(' '.join(sorted(metrics)), 200) or 'nothing'}",
                hint="monitor one of these, or log it by self.log",
            )

    def _save(self, trainer: Trainer) -> None:
        self._due = False
        if self._run is None:
            return
        metrics = dict(trainer.callback_metrics)
        names = parameter_names({"model": trainer.lightning_module})
        self._noted = {
            "metrics": metrics,
            "parameters": [described_parameters(one, names) for one in trainer.optimizers],
            "classes": [type(one).__qualname__ for one in trainer.optimizers],
        }
        taken: dict[str, Any] = {}
        try:
            trainer.save_checkpoint(self._model, storage_options=_Taken(taken))
        finally:
            self._noted = {}
        self._run._parts.clear()  # one that an earlier checkpoint had may be absent from this one
        self._run.track(**{key: _Value(value) for key, value in taken.items()})
        self._last = self._run.save(
            trainer.global_step,
            named_metrics(metrics),
            labels={"epoch": str(trainer.current_epoch)},
            alias=self._alias if trainer.is_global_zero and self._is_best(metrics) else (),
        )

    def _is_best(self, metrics: Mapping[str, Any]) -> bool:
        if self.monitor is None or self.monitor not in metrics:
            return False
        if self._last is not None and self._run is not None:
            with suppress(CkptError):  # the save waits too, and tells it; now the alias has moved
                self._last.awaited(None, self._run._say)
        greater, value = self._mode == "max", float(metrics[self.monitor])
        alias = self._alias
        return is_best(self._repo, self._model, alias, self.monitor, value, greater=greater)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._noted:  # not by ``state_dict``: of several callbacks, each would add its own
            checkpoint["callbacks"][_KEY] = self._noted

    # --- resuming ------------------------------------------------------------------------------

    def has_read(self, ref: str) -> bool:
        """Whether :meth:`resume` gave this reference."""
        return self._ready is not None and self._ready[0].reference == ref

    def load(self, ref: str, callbacks: Sequence[CkptCheckpoint]) -> dict[str, Any]:
        """What Lightning restores of a version; the rest waits until it has. All ``callbacks`` of
        the trainer go on from it."""
        if self._ready is not None and self.has_read(ref):
            version, state = self._ready
        else:
            version = self._repo.get(ref)
            state = self._pull(version)
        self._ready = None
        if not isinstance(state, dict) or not {"state_dict", "loops"} <= set(state):
            raise UsageError(
                "not-lightning",
                f"{version.reference} is no checkpoint of Lightning",
                hint="resume one that CkptCheckpoint saved; `ckpt show` says what a version is",
            )
        for one in callbacks:
            if one._run is not None:
                one._run.spare(version)
        noted = state.get("callbacks", {}).pop(_KEY, None)
        if self._run is not None and noted is not None and "random" in state:
            state = Ranks().own(state)
            loaders = state["loops"]["fit_loop"]["state_dict"].get("combined_loader", [])
            self._loaded = {**noted, "random": state["random"], "loaders": loaders}
        return {key: value for key, value in state.items() if key not in RESERVED}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Between the restoring of the module and that of the optimizers."""
        if not self._loaded:
            return
        for kind, optimizer in zip(self._loaded["classes"], trainer.optimizers, strict=False):
            check_class("optimizer", optimizer, kind)
        names = parameter_names({"model": pl_module})
        for saved, optimizer in zip(self._loaded["parameters"], trainer.optimizers, strict=False):
            check_parameters(saved, described_parameters(optimizer, names))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Bring back what Lightning leaves out, after all that draws random numbers by itself."""
        self._seen = trainer.global_step
        loaded, self._loaded = self._loaded, {}
        if not loaded:
            return
        trainer.callback_metrics.update(loaded["metrics"])
        if trainer.fit_loop.restarting:
            restore_random_states(loaded["random"])
        else:
            _step_plateaus(trainer, trainer.current_epoch)
            self._begin_epoch(trainer, loaded)

    def _begin_epoch(self, trainer: Trainer, loaded: Mapping[str, Any]) -> None:
        """Begin the epoch after one that ended, as if there had been no break. Lightning has begun
        it already, with other random numbers, and gives loaders their states back only within an
        epoch. An order is drawn when a loader is begun, so the one that ended is begun first."""
        combined, fetcher = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
        assert combined is not None
        assert fetcher is not None
        loaders = [loader for loader in combined.flattened if isinstance(loader, Stateful)]
        states = loaded["loaders"]
        if len(states) != len(loaders):
            raise IntegrityError(
                "parts-differ",
                f"saved were the states of {len(states)} loaders; {len(loaders)} have one here",
                hint="train with the same loaders",
            )
        for loader, state in zip(loaders, states, strict=True):
            loader.load_state_dict(state)
            iter(loader)  # type: ignore[call-overload]
        restore_random_states(loaded["random"])
        iter(fetcher)


class _Taken:
    """Where a checkpoint is left for the callback that asked for it."""

    def __init__(self, into: dict[str, Any]) -> None:
        self.into = into


class _Value:
    """A part of a checkpoint, as a run tracks it."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def state_dict(self) -> Any:
        return self._value

    def load_state_dict(self, state: Any) -> None:
        self._value = state


class _References(CheckpointIO):
    """Takes what a callback saves, loads what a reference means, leaves files to others."""

    def __init__(self, others: CheckpointIO, trainer: Trainer) -> None:
        self.others = others
        self._trainer = trainer

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if isinstance(storage_options, _Taken):
            storage_options.into.update(checkpoint)
        else:
            self.others.save_checkpoint(checkpoint, path, storage_options)

    def load_checkpoint(self, path: Any, *args: Any, **options: Any) -> dict[str, Any]:
        if os.path.exists(path):
            return self.others.load_checkpoint(path, *args, **options)
        ref, callbacks = str(path), _callbacks_of(self._trainer)
        reader = next((one for one in callbacks if one.has_read(ref)), callbacks[-1])
        return reader.load(ref, callbacks)

    def remove_checkpoint(self, path: Any) -> None:
        self.others.remove_checkpoint(path)

    def teardown(self) -> None:
        self.others.teardown()


def _callbacks_of(trainer: Trainer) -> list[CkptCheckpoint]:
    """All that save here, in the order in which they are called."""
    # Lightning sets the attribute from another object, where mypy does not see it.
    return [one for one in trainer.callbacks if isinstance(one, CkptCheckpoint)]  # type: ignore[attr-defined]


def _validates(trainer: Trainer, batch: int) -> bool:
    """Whether validation follows this batch, which the epoch goes on after."""
    every, each = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or not each or not math.isfinite(each):
        return False
    if every is None:
        return bool((trainer.fit_loop.total_batch_idx + 1) % each == 0)
    return (trainer.current_epoch + 1) % every == 0 and bool((batch + 1) % each == 0)


def _step_plateaus(trainer: Trainer, epochs: int) -> None:
    """What Lightning does for ReduceLROnPlateau after so many epochs, unless it resumed within the
    last one, or from its end: its own checkpoints lack the metrics."""
    for config in trainer.lr_scheduler_configs:
        value = trainer.callback_metrics.get(str(config.monitor))
        ends = config.interval == "epoch" and epochs % config.frequency == 0
        if config.reduce_on_plateau and ends and value is not None:
            trainer.lightning_module.lr_scheduler_step(config.scheduler, value)
