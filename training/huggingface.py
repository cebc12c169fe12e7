"""A callback for the ``Trainer`` of Hugging Face: its checkpoints as versions, and back again."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from torch import distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ckpt.core.errors import CkptError, CkptWarning, UsageError
from ckpt.core.names import check_model, check_run, named_metrics
from ckpt.core.records import Version
from ckpt.core.rules import Rule
from ckpt.service.bases import check_compress
from ckpt.service.lookup import VersionLike
from ckpt.service.repository import Repository
from ckpt.service.retention import check_rules, prune_model
from ckpt.training.best import best_alias, is_best
from ckpt.training.newest import begun_over, newest_whole, versions_of
from ckpt.training.resume_folder import ResumeFolder, remove_stale
from ckpt.training.run import warns


class CkptCallback(TrainerCallback):
    """Pushes every checkpoint that a ``Trainer`` saves, whole: weights, optimizer, scheduler,
    random states, and the trainer's own::

        checkpoint = CkptCallback(repo, "bert", keep=[ckpt.Latest(3)])
        trainer = Trainer(model, arguments, callbacks=[checkpoint], …)
        trainer.train(resume_from_checkpoint=checkpoint.resume())

    A version is the checkpoint's folder, byte for byte, and durable when the trainer goes on. It
    has the trainer's step, what was logged at that step as metrics, and the alias ``best``
    (``best-<name>`` of a run that is not ``main``) when it is the best by
    ``metric_for_best_model``, also of those that were trained before under this name. ``save_total_limit=1`` keeps the trainer's own
    folders few. Under ``torch.distributed`` rank 0 pushes for all.

    Args:
        repo: an open repository.
        model: the model that the versions are of.
        name: of the run, ``main`` by default.
        keep: rules such as ``ckpt.Latest(3)``, as in :class:`ckpt.Run`.
        compress: as in :meth:`Repository.push`.
        on_error: ``"warn"`` lets training go on when a push fails; its folder is still there.
    """

    def __init__(
        self,
        repo: Repository,
        model: str,
        *,
        name: str = "main",
        keep: Sequence[Rule | str] = (),
        compress: str = "auto",
        on_error: Literal["raise", "warn"] = "raise",
    ) -> None:
        self._repo = repo
        self._model = check_model(model)
        self._name = check_run(name)
        self._alias = best_alias(self._name)
        self._keep = check_rules(keep)
        self._compress = check_compress(compress)
        self._warns = warns(on_error)
        self._outputs: Path | None = None
        self._loads_best = False
        self._folder: ResumeFolder | None = None  # until it has been read
        self._spared: list[str] | None = None  # not known, until it is resumed or begins anew

    def resume(self, ref: VersionLike | None = None) -> str | None:
        """What to give to ``trainer.train(resume_from_checkpoint=…)``: the version that ``ref``
        means, by default the run's newest that is whole, as a folder below the trainer's
        ``output_dir`` that goes after the first step; None when there is none yet. With
        ``load_best_model_at_end`` the best checkpoint that it names is written below
        ``output_dir`` too, where it is not there.

        Raises:
            UsageError: ``no-trainer`` before a ``Trainer`` has this callback; ``not-trainer`` when
                the version is no checkpoint of one.
            NotFoundError: ``model-missing``, ``version-missing``.
            IntegrityError: ``none-whole``; ``object-corrupt`` and others of a ``ref``.
        """
        if self._outputs is None:
            raise UsageError(
                "no-trainer",
                "no trainer has this callback yet",
                hint="make Trainer(callbacks=[…]) first, then resume",
            )
        self._clear()
        remove_stale(self._outputs)
        if ref is None:
            found = newest_whole(self._repo, self._model, self._name, self._pull)
        else:
            version = self._repo.get(ref)
            found = version, self._pull(version)
        if found is None:
            self._spared = []
            return None
        self._spared = [found[0].push]
        if self._loads_best:
            self._bring_best(found[0], found[1] / "trainer_state.json")
        return str(found[1])

    def _bring_best(self, version: Version, state: Path) -> None:
        """Have the best checkpoint of a trainer's state where the trainer looks for it."""
        assert self._outputs is not None
        assert self._folder is not None
        said = json.loads(state.read_bytes())
        step = said.get("best_global_step")
        if step is None:
            return
        place = self._outputs / f"checkpoint-{step}"
        reason = "no version of this step is left"
        try:
            if not place.exists():
                versions = versions_of(self._repo, version.model, version.run or self._name)
                best = next(one for one in versions if one.step == step)
                self._repo.pull_file(best, self._folder.path / "best")
                (self._folder.path / "best").rename(place)
        except StopIteration:
            pass
        except (CkptError, OSError) as error:
            reason = str(error)
        if not place.exists():  # else another rank may have been first
            warnings.warn(
                f"the best checkpoint, of step {step}, cannot be loaded at the end: {reason}",
                CkptWarning,
                stacklevel=3,
            )
            return
        state.write_text(json.dumps({**said, "best_model_checkpoint": str(place)}))

    def _pull(self, version: Version) -> Path:
        if "trainer_state.json" not in self._repo.document(version).files:
            raise UsageError(
                "not-trainer",
                f"{version.reference} is no checkpoint of a Trainer",
                hint="resume one that CkptCallback pushed; `ckpt show` says what a version is",
            )
        assert self._outputs is not None
        self._folder = ResumeFolder(self._outputs)
        try:
            self._repo.pull_file(version, self._folder.path / "checkpoint")
        except BaseException:
            self._clear()
            raise
        return self._folder.path / "checkpoint"

    def _clear(self) -> None:
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.remove()

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,
    ) -> None:
        self._outputs, self._loads_best = _outputs(args), args.load_best_model_at_end

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,
    ) -> None:
        self._clear()

    on_train_end = on_step_end  # where no step was left to make

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **more: Any,
    ) -> None:
        if distributed.is_available() and distributed.is_initialized():
            distributed.barrier()  # each rank writes a file of its own into the folder
        if not state.is_world_process_zero:
            return
        try:
            self._push(args, state)
        except CkptError as error:
            if not self._warns:
                raise
            said = f"step {state.global_step} was not pushed: {error}"
            warnings.warn(said, CkptWarning, stacklevel=2)

    def _push(self, args: TrainingArguments, state: TrainerState) -> None:
        if self._spared is None:
            self._spared = begun_over(self._repo, self._model, self._name)
        metrics = _metrics(state)
        self._repo.push_file(
            _outputs(args) / f"checkpoint-{state.global_step}",
            self._model,
            step=state.global_step,
            metrics=metrics,
            labels={} if state.epoch is None else {"epoch": f"{state.epoch:g}"},
            alias=self._alias if self._is_best(args, metrics) else (),
            run=self._name,
            compress=self._compress,
        )
        if self._keep:
            self._prune()

    def _is_best(self, args: TrainingArguments, metrics: dict[str, float]) -> bool:
        name = args.metric_for_best_model
        if name is None:
            return False
        (key,) = named_metrics({name if name.startswith("eval_") else f"eval_{name}": 0.0})
        value, greater = metrics.get(key, math.nan), bool(args.greater_is_better)
        return is_best(self._repo, self._model, self._alias, key, value, greater=greater)

    def _prune(self) -> None:
        """Apply the rules. That it fails costs no version: the next save tries again."""
        try:
            prune_model(
                self._repo._store,
                self._repo._registry,
                self._model,
                self._keep,
                save=True,
                run=self._name,
                spared=self._spared or (),
            )
        except CkptError as error:
            said = f"the rules of {self._model} were not applied: {error}"
            warnings.warn(said, CkptWarning, stacklevel=2)


def _outputs(args: TrainingArguments) -> Path:
    assert args.output_dir is not None  # TrainingArguments gives a default
    return Path(args.output_dir)


def _metrics(state: TrainerState) -> dict[str, float]:
    """The numbers that were logged at this step."""
    logged = {
        name: float(value)
        for entry in state.log_history
        if entry["step"] == state.global_step
        for name, value in entry.items()
        if name != "epoch" and isinstance(value, (int, float))
    }
    return named_metrics(logged)
