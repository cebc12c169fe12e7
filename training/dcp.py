"""``torch.distributed.checkpoint`` into a repository: every rank stores its shards, one commits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItemType
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from ckpt.core.errors import UsageError
from ckpt.core.records import Version
from ckpt.loader.environment import describe_environment
from ckpt.service.lookup import VersionLike
from ckpt.service.repository import Repository
from ckpt.service.sharded import JointPush, environment_digest, joint_push
from ckpt.training.dcp_plan import RankState, Report, assemble


def dcp_writer(
    repo: Repository,
    model: str,
    *,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    alias: str | Iterable[str] = (),
    message: str | None = None,
    parent: VersionLike | None = None,
    run: str | None = None,
    compress: str = "auto",
) -> DcpWriter:
    """A writer for ``dcp.save(state, storage_writer=…)`` and ``dcp.async_save``, of one version.

    Every rank makes one, with the same arguments, on a repository that all of them reach. Each
    stores its own shards; when all have, the coordinator makes the version, which is then its
    ``writer.version``. For the arguments see :meth:`Repository.push`.

    What cannot be stored is refused by its name, as in a push, inside the ``CheckpointException``
    by which DCP tells a failure to every rank. Where a rank dies there is no version; saving
    again uses what the others had stored.
    """
    push = joint_push(
        repo,
        model,
        step=step,
        metrics=metrics,
        labels=labels,
        alias=alias,
        message=message,
        parent=parent,
        run=run,
        compress=compress,
    )
    return DcpWriter(push)


@dataclasses.dataclass(frozen=True, slots=True)
class _Member:
    """What the coordinator tells a rank: the push, and the rank's number in it."""

    push: str
    number: int


class DcpWriter(StorageWriter):
    """Stores what DCP plans; made by :func:`dcp_writer`. ``version`` is the version that the last
    save made, on the coordinator."""

    def __init__(self, joint: JointPush) -> None:
        self.version: Version | None = None
        self._joint = joint
        self._push: str | None = None
        self._written: str | None = None  # the push that this process began to write

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            raise UsageError(
                "usage", "a version has no checkpoint_id", hint="name the model in dcp_writer"
            )
        self.version = None

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if not kwargs.get("use_collectives", True):
            raise UsageError(
                "usage", "one version of all ranks needs collectives", hint="use_collectives=True"
            )

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Open the push, which each rank's plan then names."""
        if not all(plan.usable for plan in plans):
            raise UsageError(
                "plan-cached",
                "a cached plan cannot name a new push",
                hint="use DefaultSavePlanner() without enable_plan_caching",
            )
        # One that failed before anything was written is over, though nobody ended it.
        if (
            self._push is not None
            and self._push == self._written
            and self._joint.is_open(self._push)
        ):
            raise UsageError(
                "usage",
                "this dcp_writer is still saving",
                hint="wait for that save, or make another dcp_writer",
            )
        self._push = self._joint.open()
        return [
            dataclasses.replace(plan, storage_data=_Member(self._push, number))
            for number, plan in enumerate(plans)
        ]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        member: _Member = plan.storage_data
        self._written = member.push
        try:
            report = self._write(member, plan, planner)
        except BaseException as error:
            self._joint.abort(member.push, error)
            raise
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(MetadataIndex(""), report.written.new_bytes, report)])
        return done

    def _write(self, member: _Member, plan: SavePlan, planner: SavePlanner) -> Report:
        state = RankState()
        for item in plan.items:
            name = item.index.fqn
            if item.type == WriteItemType.BYTE_IO:
                state.add_value(name, _value(planner, item.index))
            else:
                assert item.tensor_data is not None
                tensor: Any = planner.resolve_data(item)
                state.add_tensor(name, item.tensor_data.chunk.offsets, tensor)
        shards, captured = state.shards()
        return state.report(captured, self._joint.write(member.push, member.number, shards))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Make the version of all reports."""
        assert self._push is not None
        environment = describe_environment()
        reports: list[Report] = [found.storage_data for some in results for found in some]
        try:
            document = assemble(metadata, reports, environment_digest(environment))
            written = [report.written for report in reports]
            self.version = self._joint.commit(self._push, document, environment, written)
        except BaseException as error:
            self._joint.abort(self._push, error)
            raise

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            "usage",
            "an open repository cannot move to another process",
            hint="use async_save with AsyncCheckpointerType.THREAD",
        )


def _value(planner: SavePlanner, index: MetadataIndex) -> Any:
    """A value as the state has it: DCP would give it pickled, which is not what is stored."""
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise UsageError(
            "cannot-store",
            f"{index.fqn}: a {type(planner).__name__} gives this value only pickled",
            hint="use a planner made from DefaultSavePlanner",
        )
    return lookup(index)
