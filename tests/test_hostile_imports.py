"""A hostile checkpoint ends in one typed line: nothing of it runs, and the importer lives on."""

from __future__ import annotations

import os
import pickle
import random
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hostile_checkpoints import CALLS, DAMAGED, REFUSED, UNSTORABLE
from torch.distributed.checkpoint.state_dict_saver import save as save_shards
from trials import Trials

import ckpt
from ckpt.core.errors import CkptError, IntegrityError, TrustError, UsageError
from ckpt.service import unpickling
from ckpt.service.unpickling import Unpickler

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def unpickler() -> Iterator[Unpickler]:
    """A child that the tests share, with little memory; one that ended is followed by another."""
    usual = unpickling._MEMORY_BYTES
    unpickling._MEMORY_BYTES = 96 << 20
    with Unpickler() as child:
        yield child
    unpickling._MEMORY_BYTES = usual


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """What a payload would make."""
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists()


def good(path: Path) -> Path:
    """A checkpoint with nothing wrong."""
    shared = torch.rand(40)
    torch.save({"a": shared[:30], "b": shared[10:], "list": [1, "x", (2.5, None)]}, path)
    return path


def test_a_child_that_may_have_less_memory_reads_what_fits(tmp_path: Path) -> None:
    path = good(tmp_path / "good.pt")
    with Unpickler() as child:
        first = child.open(path).document
        process = child._process
        assert process is not None
        resource.prlimit(process.pid, resource.RLIMIT_DATA, (800 << 20, 800 << 20))
        assert child.open(path).document == first


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_run_is_refused_by_name(
    kind: str, tmp_path: Path, canary: Path, unpickler: Unpickler
) -> None:
    path = tmp_path / "evil.pt"
    REFUSED[kind](path, f"touch {canary}")
    with pytest.raises(TrustError, match="evil") as error:
        unpickler.open(path)
    assert error.value.code == "pickle-refused"
    assert "\n" not in str(error.value)
    # Not only stopped on its way, by the child's last defence.
    assert kind not in CALLS or "which weights_only=True does not allow" in error.value.message
    assert unpickler.open(good(tmp_path / "good.pt")).nbytes == 160


@pytest.mark.parametrize("kind", DAMAGED)
def test_what_is_damaged_or_too_large_is_refused(
    kind: str, tmp_path: Path, canary: Path, unpickler: Unpickler
) -> None:
    path = tmp_path / "evil.pt"
    DAMAGED[kind](path, f"touch {canary}")
    with pytest.raises(IntegrityError, match="evil") as error:
        unpickler.open(path)
    assert error.value.code == "checkpoint-damaged"
    if kind in ("a huge tensor", "a huge storage", "a huge bytearray"):
        assert "asks for more memory" in error.value.message
    assert unpickler.open(good(tmp_path / "good.pt")).nbytes == 160


@pytest.mark.parametrize("kind", UNSTORABLE)
def test_what_has_no_end_is_refused(kind: str, tmp_path: Path, unpickler: Unpickler) -> None:
    path = tmp_path / "evil.pt"
    UNSTORABLE[kind](path, "")
    with pytest.raises((UsageError, IntegrityError), match="evil"):
        unpickler.open(path)


def test_the_name_of_a_refused_class_and_the_way_out_are_told(
    repo: ckpt.Repository, tmp_path: Path
) -> None:
    torch.save({"net": torch.nn.Linear(2, 2)}, tmp_path / "whole.pt")
    with pytest.raises(TrustError, match=r"torch\.nn\.modules\.linear\.Linear.*repo\.push"):
        repo.import_files(tmp_path / "whole.pt", "net")
    assert repo.models() == []


ACTS = (
    "os.system('touch ' + canary)",
    "subprocess.run(['touch', canary])",
    "open(canary, 'w')",
    "os.open(canary, os.O_CREAT)",
    "os.mkdir(canary)",
    "socket.socket()",
    "os.execv('/bin/touch', ['touch', canary])",
    "os.fork()",
)


def test_the_child_ends_itself_before_it_does_what_reading_never_needs(canary: Path) -> None:
    code = """
import os, socket, subprocess, sys
import ckpt.loader.unpickle as child
canary, *acts = sys.argv[1:]
for act in acts:
    pid = os.fork()
    if not pid:
        sys.addaudithook(child._forbid)
        eval(act)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, str(canary), *ACTS],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["9"] * len(ACTS)
    assert done.stderr.count("forbidden: ") == len(ACTS)


def test_the_child_has_no_secret_of_its_parent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PGPASSWORD", "secret")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with Unpickler() as child:
        child.open(good(tmp_path / "good.pt"))
        assert child._process is not None
        environment = Path(f"/proc/{child._process.pid}/environ").read_bytes()
    assert b"PGPASSWORD" not in environment
    assert b"WEIGHTS_ONLY" not in environment


def test_a_file_that_shrinks_while_it_is_read_ends_in_an_error(
    tmp_path: Path, unpickler: Unpickler
) -> None:
    path = tmp_path / "shrinking.pt"
    torch.save({"w": torch.rand(1 << 18)}, path)
    opened = unpickler.open(path)
    os.truncate(path, 4096)
    with pytest.raises(IntegrityError, match="ended with status"):
        opened.with_digests()
    with pytest.raises(CkptError, match="changed while it was read"):
        opened.check_unchanged()


@pytest.mark.torture("T23", unit="files")
def test_any_bytes_of_a_checkpoint_changed_end_in_a_typed_error_or_a_state(
    trials: Trials, tmp_path: Path, unpickler: Unpickler
) -> None:
    whole = good(tmp_path / "good.pt").read_bytes()
    path = tmp_path / "changed.pt"
    for seed in trials.seeds(3):
        chance = random.Random(seed)
        for _ in range(40):
            end = chance.choice([len(whole), chance.randrange(len(whole))])
            path.write_bytes(_flipped(whole[:end], chance))
            try:
                unpickler.open(path).with_digests()
            except (TrustError, IntegrityError, UsageError) as error:
                assert "changed.pt" in error.message  # noqa: PT017  any of three
            trials.count()


def _flipped(body: bytes, chance: random.Random) -> bytes:
    changed = bytearray(body)
    for _ in range(chance.randrange(1, 6) if changed else 0):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DCP folder with nothing wrong."""
    folder = tmp_path_factory.mktemp("dcp") / "good"
    save_shards({"w": torch.rand(4, 3), "step": 5}, checkpoint_id=folder, no_dist=True)
    return folder


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def rewrite(folder: Path, change: Any) -> None:
    """Change the metadata of a DCP folder."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _place(**values: Any) -> Any:
    """Change where all values lie."""
    return lambda m: [vars(info).update(values) for info in m.storage_data.values()]


def _tiles(size: tuple[int, ...], *places: tuple[int, ...]) -> Any:
    """Change the shape of the tensor, and lay its one piece, of 4 rows of 3, at these places."""

    def change(metadata: Any) -> None:
        entry = metadata.state_dict_metadata["w"]
        piece = type(entry.chunks[0])
        entry.size = torch.Size(size)
        entry.chunks = [piece(torch.Size(place), torch.Size((4, 3))) for place in places]
        ((index, info),) = [pair for pair in metadata.storage_data.items() if pair[0].fqn == "w"]
        for place in places:
            metadata.storage_data[type(index)("w", place)] = info

    return change


@pytest.mark.parametrize(
    "change",
    [
        _place(relative_path="../secret"),
        _place(relative_path="/etc/passwd"),
        _place(relative_path="missing.distcp"),
        _place(offset=1 << 40),
        _place(offset=-1),
        _place(length=10),
        _place(transform_descriptors=["zstd"]),
        _tiles((1 << 30, 1 << 30), (0, 0)),
        _tiles((8, 3), (0, 0)),
        _tiles((8, 3), (0, 0), (2, 0)),
        _tiles((4, 3), (1, 0)),
        _tiles((2, 6), (0, 0)),
        lambda metadata: metadata.storage_data.clear(),
        lambda metadata: setattr(metadata, "planner_data", {"w": (), "step": ()}),
        lambda metadata: setattr(metadata, "state_dict_metadata", [1, 2]),
    ],
)
def test_dcp_metadata_that_lies_is_refused(
    change: Any, shards: Path, tmp_path: Path, unpickler: Unpickler
) -> None:
    folder = copy(shards, tmp_path / "lies")
    rewrite(folder, change)
    with pytest.raises((IntegrityError, UsageError), match="lies"):
        unpickler.open(folder)


@pytest.mark.parametrize("where", ["metadata", "value", "tensor"])
def test_dcp_pickles_that_would_run_are_refused_by_name(
    where: str, shards: Path, tmp_path: Path, canary: Path, unpickler: Unpickler
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {canary}",)

    folder = copy(shards, tmp_path / "evil")
    if where == "metadata":
        rewrite(folder, lambda metadata: setattr(metadata, "planner_data", Evil()))
    else:
        _put(folder, "step" if where == "value" else "w", Evil())
    with pytest.raises(TrustError, match=r"posix\.system") as error:
        unpickler.open(folder)
    assert error.value.code == "pickle-refused"


def _put(folder: Path, name: str, value: Any) -> None:
    """Let a name of the metadata point to another pickle."""
    torch.save(value, folder / "evil.distcp")
    place = {"relative_path": "evil.distcp", "offset": 0}
    place["length"] = (folder / "evil.distcp").stat().st_size

    def change(metadata: Any) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == name:
                vars(info).update(place)

    rewrite(folder, change)


@pytest.mark.torture("T23", unit="folders")
def test_any_bytes_of_dcp_metadata_changed_end_in_a_typed_error_or_a_state(
    trials: Trials, shards: Path, tmp_path: Path, unpickler: Unpickler
) -> None:
    folder = copy(shards, tmp_path / "changed")
    whole = (folder / ".metadata").read_bytes()
    for seed in trials.seeds(3):
        chance = random.Random(seed)
        for _ in range(40):
            (folder / ".metadata").write_bytes(_flipped(whole, chance))
            try:
                unpickler.open(folder).with_digests()
            except (TrustError, IntegrityError, UsageError) as error:
                assert "changed" in error.message  # noqa: PT017  any of three
            trials.count()
