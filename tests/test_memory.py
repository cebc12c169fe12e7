"""From file to file a command takes 256 MiB in all, whatever the size and however it is stored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc")
@pytest.mark.parametrize("compress", ["none", "auto", "max"])
def test_a_large_file_goes_in_and_out_in_little_memory(tmp_path: Path, compress: str) -> None:
    """Of more chunks than are in hand at once, on any number of processors."""
    torch.manual_seed(0)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    state = {f"w{number}": torch.randn(8 << 20) for number in range(5)}
    save_file(state, first)
    save_file({name: one + 1e-6 for name, one in state.items()}, second)
    environment = {**os.environ, "CKPT_REPO": str(tmp_path / "repository")}

    def peak(*command: str) -> float:
        program = [sys.executable, "-c", _PEAK, *command]
        done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
        return int(done.stderr.split()[-1]) / 1024

    peak("init", environment["CKPT_REPO"])
    peaks = [peak("push", str(path), "m", "--compress", compress) for path in (first, second)]
    pulled = tmp_path / "pulled.safetensors"
    peaks.append(peak("pull", "m", str(pulled)))
    assert max(peaks) <= _MOST
    assert pulled.read_bytes() == second.read_bytes()
