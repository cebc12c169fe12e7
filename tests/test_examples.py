"""Each example runs, and when it is started again it goes on where it was."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from servers import BUCKET, Server

import ckpt

EXAMPLES = Path(__file__).parent.parent / "examples"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]

pytest_plugins = ("servers", "postgres_server")


def example(name: str, *arguments: object, processes: int = 0) -> str:
    """What an example prints."""
    launcher = [*TORCHRUN, str(processes)] if processes else []
    command = [sys.executable, *launcher, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def steps_of(folder: Path, model: str) -> set[int | None]:
    with ckpt.open(folder) as repo:
        return {version.step for version in repo.log(model)}


def test_the_plain_loop_in_a_folder(tmp_path: Path) -> None:
    assert example("training_loop.py", tmp_path, 41).startswith("steps 0 to 40")
    assert example("training_loop.py", tmp_path, 61).startswith("steps 41 to 60")
    assert {0, 40, 60} <= steps_of(tmp_path, "adder")


def test_the_plain_loop_in_postgresql_and_s3(
    tmp_path: Path, postgres_url: str, seaweedfs: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    program = Path(sys.executable).with_name("ckpt")
    places = ["--registry", postgres_url.replace("postgresql:", "postgresql+psycopg:")]
    places += ["--store", f"s3://{BUCKET}/loop", "--endpoint", seaweedfs.endpoint]
    subprocess.run([program, "init", tmp_path, *places], check=True, capture_output=True)
    assert example("training_loop.py", tmp_path, 41).startswith("steps 0 to 40")
    assert example("training_loop.py", tmp_path, 61).startswith("steps 41 to 60")
    assert {0, 40, 60} <= steps_of(tmp_path, "adder")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_ddp(tmp_path: Path) -> None:
    first = example("ddp.py", tmp_path, 21, processes=2)
    assert first == "steps 0 to 20, world size 2\n"
    second = example("ddp.py", tmp_path, 41, processes=2)
    assert second == "steps 21 to 40, world size 2\n"
    assert steps_of(tmp_path, "ddp") == {40, 20, 0}


def test_fsdp2_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    first = example("fsdp2_dcp.py", tmp_path, 21, processes=2)
    assert first == "steps 0 to 20, world size 2\n"
    second = example("fsdp2_dcp.py", tmp_path, 41, processes=1)
    assert second == "steps 21 to 40, world size 1\n"
    assert steps_of(tmp_path, "sharded") == {0, 20, 40}


def test_lightning(tmp_path: Path) -> None:
    assert "begins\n2 epochs; best is adder-lightning@" in example(
        "lightning_trainer.py", tmp_path, 2
    )
    second = example("lightning_trainer.py", tmp_path, 3)
    assert "goes on from adder-lightning@2\n3 epochs" in second
    assert steps_of(tmp_path, "adder-lightning") == {14, 28, 42}


def test_hugging_face(tmp_path: Path) -> None:
    assert "began; tiny-bert@1 has step 10\n" in example("huggingface_trainer.py", tmp_path, 10)
    assert "went on; tiny-bert@2 has step 20\n" in example("huggingface_trainer.py", tmp_path, 20)
