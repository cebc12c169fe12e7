"""A SeaweedFS to measure on: its own rate, and the clients that are compared, as functions."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import numpy
from boto3.s3.transfer import TransferConfig
from servers import BUCKET, ENVIRONMENT, Server, running_seaweedfs

import ckpt
from benchmarks.states import environment
from ckpt.service.config import Location
from ckpt.service.opening import make_repository
from ckpt.service.places import S3Options

_VOLUMES = 1000
_THREADS = 8
_PART = 16 << 20
# s5cmd and boto3 are measured with the fastest of these: their own settings first.
S = TypeVar("S")

_S5CMD_SETTINGS = ((), ("-c", "16", "-p", "16"), ("-c", "8", "-p", "64"))
_BOTO_SETTINGS = ((10, 8), (16, 16), (8, 64))
_AWS_CONFIG = "[default]\ns3 =\n  max_concurrent_requests = 16\n  multipart_chunksize = 16MB\n"


@dataclass(frozen=True, slots=True)
class Bucket:
    """An empty bucket of a server that runs, reached through the environment."""

    folder: Path
    server: Server

    def repository(self, name: str) -> ckpt.Repository:
        """A new repository with its store in the bucket, as ``ckpt init`` makes it."""
        root = self.folder / name
        options = S3Options(self.server.endpoint)
        place = f"s3://{BUCKET}/{name}"
        return make_repository(Location(root, root / "registry.db", place, False, options))

    def empty(self, prefix: str) -> None:
        """Delete all objects whose keys begin so."""
        pages = self.server.client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=BUCKET, Prefix=prefix):
            for entry in page.get("Contents", ()):
                self.server.client.delete_object(Bucket=BUCKET, Key=entry["Key"])

    def size(self, prefix: str) -> int:
        """Bytes of all objects whose keys begin so."""
        pages = self.server.client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=BUCKET, Prefix=prefix)
        return sum(entry["Size"] for page in found for entry in page.get("Contents", ()))


@contextmanager
def bucket(folder: Path) -> Iterator[Bucket]:
    """A server of its own for one table; credentials and addresses are in the environment."""
    (folder / "server").mkdir()
    with environment(ENVIRONMENT), running_seaweedfs(folder / "server", _VOLUMES) as server:
        addresses = dict.fromkeys(
            ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "S3_ENDPOINT_URL"), server.endpoint
        )
        config = folder / "aws.conf"
        config.write_text(_AWS_CONFIG)
        settings = {
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(config),
            # botocore and the command line of AWS hash bodies a second time otherwise
            "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
            "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
        with environment(addresses | settings):
            yield Bucket(folder, server)


def program(name: str) -> str:
    """A program that is installed beside this Python."""
    return str(Path(sys.executable).with_name(name))


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a program; what it says is told when it fails."""
    done = subprocess.run(command, check=False, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stderr or done.stdout}")


def s5cmd(settings: tuple[str, ...], source: str | Path, target: str | Path) -> None:
    """Copy by s5cmd, one way or the other."""
    run(program("s5cmd"), "cp", *settings, source, target)


def aws(source: str | Path, target: str | Path) -> None:
    """Copy by the command line of AWS."""
    run(program("aws"), "s3", "cp", "--quiet", source, target)


def transfer(settings: tuple[int, int]) -> TransferConfig:
    """boto3's settings for so many threads and so many MiB a part."""
    threads, mebibytes = settings
    return TransferConfig(
        max_concurrency=threads,
        multipart_chunksize=mebibytes << 20,
        preferred_transfer_client="classic",  # the other one ignores the endpoint
    )


def fastest_s5cmd(act: Callable[[tuple[str, ...]], object]) -> tuple[str, ...]:
    """The settings of s5cmd with which ``act`` is fastest."""
    return _fastest(dict.fromkeys(_S5CMD_SETTINGS, act))


def fastest_boto(act: Callable[[tuple[int, int]], object]) -> tuple[int, int]:
    """The threads and MiB a part with which ``act`` is fastest."""
    return _fastest(dict.fromkeys(_BOTO_SETTINGS, act))


def _fastest(acts: Mapping[S, Callable[[S], object]]) -> S:
    seconds = {}
    for settings, act in acts.items():
        start = time.perf_counter()
        act(settings)
        seconds[settings] = time.perf_counter() - start
    return min(seconds, key=seconds.__getitem__)


def put_all(server: Server, data: memoryview, prefix: str) -> None:
    """What the server takes: plain PUTs of 16 MiB by eight threads, nothing hashed."""

    def put(at: int) -> None:
        key = f"{prefix}/{at}"
        _request(server, "put_object", "PUT", key, body=data[at : at + _PART])

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(put, range(0, len(data), _PART)))


def get_all(server: Server, key: str, size: int) -> None:
    """What the server gives: ranged GETs of 16 MiB by eight threads into one buffer."""
    target = numpy.empty(size, numpy.uint8).data

    def get(at: int) -> None:
        _request(server, "get_object", "GET", key, into=target[at : at + _PART], at=at)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(get, range(0, size, _PART)))


def _request(
    server: Server,
    act: str,
    method: str,
    key: str,
    *,
    body: memoryview | None = None,
    into: memoryview | None = None,
    at: int = 0,
) -> None:
    url = urlsplit(server.client.generate_presigned_url(act, {"Bucket": BUCKET, "Key": key}))
    headers = {} if into is None else {"Range": f"bytes={at}-{at + len(into) - 1}"}
    connection = http.client.HTTPConnection(url.netloc)
    connection.request(method, f"{url.path}?{url.query}", body, headers)
    with connection.getresponse() as answer:
        if answer.status not in (200, 206):
            raise OSError(f"the server answered {answer.status}: {answer.read()[:200]!r}")
        while into:
            into = into[answer.readinto(into) :]
    connection.close()


def address(key: str) -> str:
    """The address of an object of the bucket."""
    return f"s3://{BUCKET}/{key}"
