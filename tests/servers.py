"""Two real S3 servers on loopback, ways to their bytes that do not go through ckpt, and a liar.

PYTEST_DONT_REWRITE: a plugin of the tests that use it, and imported by them before pytest does.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from ckpt.storage.s3 import S3Store
from ckpt.storage.s3_probe import Capabilities
from ckpt.storage.store import Store

BUCKET = "checkpoints"
ACCESS_KEY, SECRET_KEY = "access-key-of-the-tests", "secret-key-of-the-tests"
START_SECONDS, STARTS = 60, 3

ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
    "NO_PROXY": "127.0.0.1",
}


@dataclass
class Server:
    """A server that runs, with one bucket."""

    endpoint: str

    @cached_property
    def client(self) -> Any:
        config = Config(
            retries={"total_max_attempts": 1}, request_checksum_calculation="when_required"
        )
        return boto3.session.Session().client(
            "s3", endpoint_url=self.endpoint, region_name="us-east-1", config=config
        )

    @cached_property
    def capabilities(self) -> Capabilities:
        store = S3Store(f"s3://{BUCKET}/probed", endpoint=self.endpoint)
        try:
            return store.probe_capabilities()
        finally:
            store.close()


class RawS3:
    """A folder of its own in the bucket, reached by boto3 directly."""

    def __init__(self, server: Server, capabilities: Capabilities | None) -> None:
        self.prefix = f"tests/{secrets.token_hex(8)}"
        self.url = f"s3://{BUCKET}/{self.prefix}"
        self.server = server
        self.s3 = S3Store(self.url, endpoint=server.endpoint, capabilities=capabilities)
        self.store: Store = self.s3

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.s3.close()
        self.server.client.close()

    def read(self, key: str) -> bytes:
        answer = self.server.client.get_object(Bucket=BUCKET, Key=f"{self.prefix}/{key}")
        body: bytes = answer["Body"].read()
        return body

    def write(self, key: str, body: bytes) -> None:
        self.server.client.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{key}", Body=body)

    def everything(self) -> set[str]:
        """The keys of all objects, and of all uploads that were not finished."""
        client, found = self.server.client, []
        for page in client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=self.prefix
        ):
            found += page.get("Contents", [])
        uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
        found += [upload for upload in uploads if upload["Key"].startswith(self.prefix)]
        return {entry["Key"].removeprefix(f"{self.prefix}/") for entry in found}


Act = Callable[..., Any]


@dataclass
class Watch:
    """A hook that notes every effect, never waits, and lets ``fault`` stand in for some."""

    fault: Callable[[str, Act, tuple[Any, ...]], Any] = lambda kind, act, args: act(*args)
    kinds: list[str] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    def __call__(self, kind: str, act: Act, args: tuple[Any, ...]) -> Any:
        if kind == "s3.wait":
            self.waits.append(args[0])
            return None
        self.kinds.append(kind)
        if kind == "s3.upload_part":
            self.parts.append(args[1]["PartNumber"])
        return self.fault(kind, act, args)


def publish(store: S3Store, key: str, body: bytes) -> None:
    with store.create(key) as writer:
        for at in range(0, len(body), 8 << 20):
            writer.write(at, body[at : at + (8 << 20)])
        writer.publish(len(body))


@pytest.fixture(scope="session")
def credentials() -> Iterator[None]:
    """What ckpt finds in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
            patch.delenv(name, raising=False)
        yield


@contextmanager
def running_seaweedfs(folder: Path, volumes: int = 100) -> Iterator[Server]:
    """A SeaweedFS of one process, which knows the credentials of the tests only; it has room for
    ``volumes`` of 64 MB, counting what was deleted."""
    keys = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
    allowed = {"name": "tests", "credentials": [keys], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [allowed]}))
    names = ["master.port", "volume.port", "filer.port", "s3.port"]
    names += [f"{name}.grpc" for name in names]

    def command(ports: list[int]) -> list[str]:
        data = folder / secrets.token_hex(4)
        data.mkdir()
        options = {
            "dir": data,
            "ip": "127.0.0.1",
            "ip.bind": "127.0.0.1",
            "master.telemetry": "false",
            "master.volumeSizeLimitMB": 64,
            "volume.max": volumes,
            "filer.localSocket": data / "filer.sock",
            "s3.localSocket": data / "s3.sock",
            "s3.config": folder / "s3.json",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            **dict(zip(names, ports, strict=True)),
        }
        weed = Path(sys.executable).with_name("weed")
        return [
            str(weed),
            "server",
            "-s3",
            *(f"-{name}={value}" for name, value in options.items()),
        ]

    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield _started(stack, folder, command, len(names), names.index("s3.port"))


@pytest.fixture(scope="session")
def seaweedfs(credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A SeaweedFS for all tests."""
    with running_seaweedfs(tmp_path_factory.mktemp("seaweedfs")) as server:
        yield server


@pytest.fixture(scope="session")
def moto(credentials: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server of moto."""
    folder = tmp_path_factory.mktemp("moto")

    def command(ports: list[int]) -> list[str]:
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(ports[0])]

    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        yield _started(stack, folder, command, 1, 0)


@pytest.fixture(params=["seaweedfs", "moto"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each of both."""
    found: Server = request.getfixturevalue(request.param)
    return found


def _started(stack: ExitStack, folder: Path, command: Any, count: int, s3: int) -> Server:
    """A server that answers; started again when another process took one of its ports."""
    log = folder / "log"
    for _ in range(STARTS):
        ports = _free_ports(count)
        with log.open("wb") as output:
            process = subprocess.Popen(command(ports), stdout=output, stderr=output, cwd=folder)
        stack.callback(_stop, process)
        server = Server(f"http://127.0.0.1:{ports[s3]}")
        if _becomes_ready(server, process):
            return server
    raise RuntimeError(f"{command(ports)[0]} did not start:\n{log.read_text()[-3000:]}")


def _becomes_ready(server: Server, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(BotoCoreError, ClientError):
            server.client.create_bucket(Bucket=BUCKET)
            server.client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            server.client.close()
            return True
        time.sleep(0.05)
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()  # what it holds is thrown away; asked to end, SeaweedFS takes ten seconds
    process.wait()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@dataclass
class Reply:
    """An answer of a liar; ``cut`` is how many bytes of the body it really sends."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


class Liar(ThreadingHTTPServer):
    """A server that answers with ``replies``, one after the other, the last one for ever."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _LiarsTongue)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.replies: list[Reply] = []
        self.asked: list[str] = []


class _LiarsTongue(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # which has the 100 that clients wait for before a body

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        assert isinstance(self.server, Liar)
        self.server.asked.append(f"{self.command} {self.path}")
        replies = self.server.replies
        reply = replies.pop(0) if len(replies) > 1 else replies[0]
        self.send_response(reply.status)
        length = {"Content-Length": str(len(reply.body)), "Connection": "close"}
        for name, value in (length | reply.headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.body[: reply.cut])

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is to be read of it."""


@pytest.fixture
def liar(credentials: None) -> Iterator[Liar]:
    """A server that says what a test makes it say."""
    with Liar() as found:
        thread = threading.Thread(target=found.serve_forever, args=(0.02,))
        thread.start()
        yield found
        found.shutdown()
        thread.join()
