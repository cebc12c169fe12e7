"""The tutorial, word by word: its files are written, its commands typed, its answers compared."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"
_BLOCK = re.compile(r"^```(console|python (\S+))\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def typed(block: str) -> list[tuple[str, str]]:
    """Each command of a console block, and what is shown below it."""
    parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert not parts[0]
    return list(zip(parts[1::2], parts[2::2], strict=True))


def squeezed(text: str) -> list[str]:
    """Lines with blanks as one; how wide a column is depends on what stands in it."""
    return [" ".join(line.split()) for line in text.splitlines()]


def matches(shown: str, answered: str) -> bool:
    """Whether an answer is what the page shows; a line ``...`` stands for any lines."""
    pattern = ""
    for line in squeezed(shown):
        if line == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*".join(re.escape(part) for part in line.split("...")) + r"\n"
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in squeezed(answered))) is not None


def test_everything_that_the_tutorial_shows_is_what_happens(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "CKPT_REPO"}
    commands = 0
    for kind, name, body in _BLOCK.findall(PAGE.read_text()):
        if kind != "console":
            (tmp_path / name).write_text(body)
            continue
        for command, shown in typed(body):
            found = subprocess.run(
                command,
                shell=True,
                cwd=tmp_path,
                env={**environment, "PATH": path},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert matches(shown, found.stdout), f"$ {command}\n{found.stdout}\n--- not\n{shown}"
            commands += 1
    assert commands == 20
