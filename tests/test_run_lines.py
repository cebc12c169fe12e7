"""A run prints one line per save: what is new, and what was saved by what."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch

import ckpt
from ckpt.core.records import Added
from ckpt.core.sizes import size
from ckpt.service.bases import COMPRESS, Compress

KEPT, TRAINED = 600_000, 200_000  # elements


class Weights:
    """Some that are trained, beside three times as many that are not."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.kept = torch.randn(KEPT, generator=generator)
        self.trained = torch.randn(TRAINED, generator=generator)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"kept": self.kept, "trained": self.trained}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self.kept, self.trained = state["kept"], state["trained"]


@pytest.fixture
def save(
    repo: ckpt.Repository, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[str, ckpt.Version]]:
    """Saves once in a run of its own; gives the line without its stall, and the version."""

    def act(weights: Weights, step: int, **options: Any) -> tuple[str, ckpt.Version]:
        with ckpt.Run(repo, "gpt", **options) as saving:
            saving.track(weights=weights).save(step)
        (line,) = capsys.readouterr().err.splitlines()
        told, stalled = line.rsplit(", stalled ", 1)
        assert re.fullmatch(r"\d+\.\d{3} s", stalled)
        return told, repo.get("gpt")

    return act


class Late(Future[dict[str, Any]]):
    """An answer that is there when it was waited for so many times."""

    def __init__(self, answer: dict[str, Any], times: int) -> None:
        super().__init__()
        self.set_result(answer)
        self.times = times
        self.waits: list[float | None] = []

    def result(self, timeout: float | None = None) -> dict[str, Any]:
        self.waits.append(timeout)
        if len(self.waits) <= self.times:
            raise TimeoutError
        return super().result(timeout)


def test_a_save_that_waits_for_the_one_before_says_so_every_half_minute(
    repo: ckpt.Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    with ckpt.Run(repo, "gpt") as job:
        pending = job.track(weights=Weights()).save(100)
        late = pending.answer = Late(pending.answer.result(), times=2)
        job.save(200)
        job.wait()
    assert late.waits == [30.0] * 3
    first, second, durable, _ = capsys.readouterr().err.splitlines()
    assert first == "ckpt: waiting for step 100 to be stored, 30 s so far"
    assert second == "ckpt: waiting for step 100 to be stored, 60 s so far"
    assert durable.startswith("ckpt: gpt@1 step 100: ")


def test_a_wait_that_says_so_is_as_long_as_it_was_told(repo: ckpt.Repository) -> None:
    with ckpt.Run(repo, "gpt", quiet=True) as job:
        pending = job.track(weights=Weights()).save(100)
        late = pending.answer = Late(pending.answer.result(), times=3)
        with pytest.raises(TimeoutError):
            job.wait(75)
    assert late.waits[:3] == [30.0, 30.0, 15.0]


@pytest.mark.filterwarnings("ignore:.* begins anew")
def test_a_line_says_what_is_new_shared_and_saved(
    repo: ckpt.Repository, save: Callable[..., tuple[str, ckpt.Version]]
) -> None:
    weights = Weights()
    told, first = save(weights, 0)
    total = size(first.nbytes)
    assert told == (
        f"ckpt: gpt@1 step 0: {total}, {size(first.new_bytes)} new, "
        "0 B shared, 0 B saved by differences"
    )
    assert first.nbytes < first.new_bytes < first.nbytes + 20_000

    weights.trained[:100] += 1
    told, second = save(weights, 1)
    (trained,) = (row for row in chunks_of(repo, second) if row.base is not None)
    assert trained.raw_length == 4 * TRAINED
    saved = trained.raw_length - trained.length
    assert saved > 700_000
    assert told == (
        f"ckpt: gpt@2 step 1: {total}, {size(second.new_bytes)} new, "
        f"{size(4 * KEPT)} shared, {size(saved)} saved by differences"
    )


def chunks_of(repo: ckpt.Repository, version: ckpt.Version) -> list[Any]:
    """Where the chunks of a version lie."""
    _, rows = repo._registry.books.read_plan(version.push)
    return [row for places in rows.values() for row in places]


@pytest.mark.filterwarnings("ignore:.* begins anew")
def test_of_the_same_content_nothing_is_new_and_all_is_shared(
    save: Callable[..., tuple[str, ckpt.Version]],
) -> None:
    weights = Weights()
    _, first = save(weights, 0)
    total = size(first.nbytes)
    for step, reference in ((1, "gpt@2"), (1, "gpt@2")):  # a new version, and the same again
        told, _ = save(weights, step)
        assert told == (
            f"ckpt: {reference} step {step}: {total}, 0 B new, "
            f"{total} shared, 0 B saved by differences"
        )


def test_what_coding_alone_saves_is_not_told_as_differences(
    save: Callable[..., tuple[str, ckpt.Version]],
) -> None:
    weights = Weights()
    weights.kept.zero_()
    told, _ = save(weights, 0, compress="max")
    found = re.search(r"0 B saved by differences, (\d+\.\d) MiB by coding$", told)
    assert found is not None
    assert float(found[1]) >= 2.2


def test_a_quiet_run_prints_nothing(
    repo: ckpt.Repository, capsys: pytest.CaptureFixture[str]
) -> None:
    with ckpt.Run(repo, "gpt", quiet=True) as saving:
        saving.track(weights=Weights()).save(0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("compress", COMPRESS)
def test_the_parts_of_a_push_add_up_to_its_tensors(
    repo: ckpt.Repository, compress: Compress
) -> None:
    from ckpt.service.describe import describe_state
    from ckpt.service.push import push_described

    generator = torch.Generator().manual_seed(2)
    big, small = torch.randn(300_000, generator=generator), torch.ones(100)
    state = {"big": big, "again": big.clone(), "small": small, "empty": torch.ones(0)}
    nbytes = 4 * (2 * 300_000 + 100)
    for change in range(3):
        big[change] += change  # equal to the other one at first
        state["small"] = torch.full((100,), float(change))
        described = describe_state(repo._registry, state, None, [])
        said = repo._said("m", None, None, None, (), None, None, None)
        version, added = push_described(
            repo._store, repo._registry, described, said, {}, compress=compress
        )
        written = [row for row in chunks_of(repo, version) if row.pack.startswith(version.push)]
        raw = sum(row.raw_length for row in written)
        by_differences = sum(row.raw_length - row.length for row in written if row.base)
        by_coding = sum(row.raw_length - row.length for row in written if not row.base)
        assert added == Added(version.new_bytes, nbytes - raw, by_differences, by_coding)
        assert added.shared >= 4 * 300_000  # one of the two equal tensors, at least
