"""From file to file a command takes 256 MiB in all, whatever the size and however it is stored;
a call takes 128 MiB beside its state; and no call keeps a state longer than its caller does."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from servers import BUCKET, Server
from torch import nn

import ckpt

pytest_plugins = ("servers",)

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
_MOST = 256  # MiB
# The peak as the process itself knows it: what a parent is told counts from before it began.
_PEAK = """
import sys
from pathlib import Path
from ckpt.cli.main import main
try:
    main()
finally:
    lines = Path("/proc/self/status").read_text().splitlines()
    print(next(line.split()[1] for line in lines if line.startswith("VmHWM:")), file=sys.stderr)
"""


def peaks_of(folder: Path, compress: str, *store: str) -> list[float]:
    """MiB of two pushes from files and a pull to one, of more chunks than are in hand at once."""
    torch.manual_seed(0)
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    state = {f"w{number}": torch.randn(8 << 20) for number in range(5)}
    save_file(state, first)
    save_file({name: one + 1e-6 for name, one in state.items()}, second)
    environment = {**os.environ, "CKPT_REPO": str(folder / "repository")}

    def peak(*command: str) -> float:
        program = [sys.executable, "-c", _PEAK, *command]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
        return int(done.stderr.split()[-1]) / 1024

    peak("init", environment["CKPT_REPO"], *store)
    peaks = [peak("push", str(path), "m", "--compress", compress) for path in (first, second)]
    pulled = folder / "pulled.safetensors"
    peaks.append(peak("pull", "m", str(pulled)))
    assert pulled.read_bytes() == second.read_bytes()
    return peaks


@linux
@pytest.mark.parametrize("compress", ["none", "auto", "max"])
def test_a_large_file_goes_in_and_out_in_little_memory(tmp_path: Path, compress: str) -> None:
    """On any number of processors."""
    assert max(peaks_of(tmp_path, compress)) <= _MOST


@linux
@pytest.mark.parametrize("compress", ["none", "auto", "max"])
def test_a_large_file_goes_to_a_server_and_back_in_little_memory(
    tmp_path: Path, compress: str, seaweedfs: Server
) -> None:
    store = f"s3://{BUCKET}/memory-{compress}"
    peaks = peaks_of(tmp_path, compress, "--store", store, "--endpoint", seaweedfs.endpoint)
    assert max(peaks) <= _MOST


_BESIDE = 128  # MiB
_PEAK_BESIDE = """
import sys
from pathlib import Path
import torch
import ckpt

def memory(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))

def peak(act):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = memory("VmRSS")
    kept = act()
    print(memory("VmHWM") - before, file=sys.stderr)

state = {f"w{number}": torch.randn(8 << 20) for number in range(6)}
with ckpt.open(sys.argv[1]) as repo:
    repo.push({"w": torch.ones(10)}, "first")  # what is imported is not of the next push
    peak(lambda: repo.push(state, "m", compress=sys.argv[2]))
    for tensor in state.values():
        tensor.add_(torch.randn(8 << 20), alpha=1e-5)
    peak(lambda: repo.push(state, "m", compress=sys.argv[2]))
    peak(lambda: repo.pull("m"))
"""


@linux
@pytest.mark.parametrize("store", ["local", "S3"])
@pytest.mark.parametrize("compress", ["none", "auto", "max"])
def test_a_call_takes_little_memory_beside_its_state(
    tmp_path: Path, store: str, compress: str, request: pytest.FixtureRequest
) -> None:
    """The first push, one that changes everything, and a pull."""
    folder, size = tmp_path / "repository", 192
    if store == "S3":
        server: Server = request.getfixturevalue("seaweedfs")
        place = ("--store", f"s3://{BUCKET}/beside-{compress}", "--endpoint", server.endpoint)
        command = Path(sys.executable).with_name("ckpt")
        subprocess.run([command, "init", folder, *place], capture_output=True, check=True)
    program = [sys.executable, "-c", _PEAK_BESIDE, str(folder), compress]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    first, second, pull = map(float, done.stderr.split())
    assert max(first, second, pull - size) <= _BESIDE


@pytest.fixture
def without_collector() -> Iterator[None]:
    """A cycle would then keep a state for good; else until Python looks for cycles, which may be
    after the next gigabyte."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU())


INPUTS = (torch.ones(1, 4),)
CALLS: dict[str, Callable[[ckpt.Repository], Any]] = {
    "push": lambda repo: pushed(repo, {"w": torch.rand(9)}),
    "push of a module": lambda repo: pushed(repo, net()),
    "push of a module with inputs": lambda repo: pushed(repo, net(), inputs=INPUTS),
    "pull": lambda repo: repo.pull("m"),
    "pull of some": lambda repo: repo.pull("m", tensors="0.*"),
    "load": lambda repo: repo.load("m"),
    "load_into": lambda repo: filled(repo, net()),
}


def pushed(repo: ckpt.Repository, state: Any, **options: Any) -> Any:
    repo.push(state, "new", **options)
    return state


def filled(repo: ckpt.Repository, module: nn.Module) -> nn.Module:
    repo.load_into(module, "m")
    return module


def tensor_of(state: Any) -> torch.Tensor:
    values = state.state_dict() if isinstance(state, nn.Module) else state
    found: torch.Tensor = next(iter(values.values()))
    return found


@pytest.mark.usefixtures("without_collector")
@pytest.mark.parametrize("call", CALLS)
def test_a_state_goes_when_its_caller_lets_go_of_it(call: str, repo: ckpt.Repository) -> None:
    repo.push(net(), "m", inputs=INPUTS)
    state = CALLS[call](repo)
    memory = weakref.ref(tensor_of(state).untyped_storage())
    assert memory() is not None
    del state
    assert memory() is None
