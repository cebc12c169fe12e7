"""A proxy on loopback between a client and an S3 server that does wrong a share of the requests.

It forwards the ``Host`` that it was asked for, so that signatures stay valid. Which request meets
which fault follows from the seed and the order in which requests arrive.
"""

from __future__ import annotations

import gc
import random
import socket
import struct
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

STALL_SECONDS = 1.0  # longer than the client of the tests waits
SETTLE_SECONDS = 60
_FRESH = 6  # so many of the objects written last may not be found yet
_HOP_BY_HOP = frozenset({"connection", "expect", "keep-alive", "transfer-encoding"})
_ERROR = b"<Error><Code>%s</Code><Message>by the proxy</Message></Error>"
_REFUSALS = ((500, b"InternalError"), (503, b"SlowDown"), (429, b"TooManyRequests"))

# What may happen to a request, by what it asks for. Lists are not flipped: nothing in the protocol
# tells a list that was changed on the way from a true one.
_EVERY = ("refuse", "reset", "lose")
_BODY = ("cut", "flip", "stall")
FAULTS = {
    "get": (*_EVERY, *_BODY, "stale"),
    "head": (*_EVERY, "stale"),
    "list": (*_EVERY, "cut", "stall"),
    "put": (*_EVERY, "flip-sent", "error-200", "done-error-200", "hold"),
    "part": (*_EVERY, "flip-sent", "hold"),
    "begin": _EVERY,
    "complete": (*_EVERY, "error-200", "done-error-200"),
    "abort": _EVERY,
    "delete": (*_EVERY, "hold"),
}


@dataclass
class Request:
    """What a client asks for."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def key(self) -> str:
        """The object, with its bucket."""
        return urlsplit(self.path).path

    @property
    def kind(self) -> str:
        """One of ``FAULTS``."""
        asked = parse_qs(urlsplit(self.path).query, keep_blank_values=True)
        if self.method == "GET":
            return "list" if {"list-type", "uploads"} & asked.keys() else "get"
        if self.method == "POST":
            return "begin" if "uploads" in asked else "complete"
        if self.method == "PUT":
            return "part" if "partNumber" in asked else "put"
        if self.method == "DELETE":
            return "abort" if "uploadId" in asked else "delete"
        return "head"


@dataclass
class Answer:
    """What a server says to it."""

    status: int = 200
    body: bytes = b""
    headers: list[tuple[str, str]] = field(default_factory=list)


class FaultProxy(ThreadingHTTPServer):
    """The proxy; of the requests, ``share`` meet a fault. ``counts`` says which kind met which."""

    daemon_threads = True

    def __init__(self, endpoint: str) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.share = 0.0
        self.requests = 0
        self.counts: Counter[tuple[str, str]] = Counter()
        self.errors: list[BaseException | None] = []
        self.ending = threading.Event()
        self._server = endpoint.removeprefix("http://")
        self._chance = random.Random(0)
        self._lock = threading.Lock()
        self._connections, self._changed = 0, threading.Condition()
        self._fresh: deque[str] = deque(maxlen=_FRESH)
        self._held: deque[Request] = deque()

    def begin(self, seed: int, share: float) -> None:
        """From now on do wrong ``share`` of the requests."""
        self._chance = random.Random(seed)
        self.share = share

    def connect(self) -> HTTPConnection:
        """A connection to the server behind."""
        return HTTPConnection(self._server, timeout=60)

    def choose(self, request: Request) -> str:
        """The fault that a request meets, or nothing."""
        with self._lock:
            self.requests += 1
            if self._chance.random() >= self.share:
                return ""
            fault = self._chance.choice(FAULTS[request.kind])
            if fault == "stale" and request.key not in self._fresh:
                return ""
            self.counts[request.kind, fault] += 1
            return fault

    def pick(self, end: int) -> int:
        """A number below ``end``."""
        with self._lock:
            return self._chance.randrange(end)

    def note_written(self, key: str) -> None:
        """A key that may not be found for a while."""
        with self._lock:
            self._fresh.append(key)

    def hold(self, request: Request) -> None:
        """Keep a request back; a DELETE arrives twice."""
        with self._lock:
            self._held += [request] * (2 if request.method == "DELETE" else 1)

    def deliver(self, *, everything: bool = False) -> None:
        """Let requests that were held back arrive: all, or now and then the oldest one."""
        with self._lock:
            now = len(self._held) if everything else int(self._chance.random() < 0.05)
            due = [self._held.popleft() for _ in range(min(now, len(self._held)))]
        for request in due:
            connection = self.connect()
            forward(connection, request)
            connection.close()

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changed:
            self._connections += 1
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._changed:
            self._connections -= 1
            self._changed.notify_all()

    def settle(self) -> None:
        """Return when no client is connected and nothing that one asked for is under way: after
        its answer, too, a request may let others arrive."""
        gc.collect()  # urllib3 ends the connections of a pool only when it is collected
        with self._changed:
            assert self._changed.wait_for(lambda: not self._connections, SETTLE_SECONDS)

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that gave up is no error; any other is kept for the test to see."""
        error = sys.exception()
        if not isinstance(error, ConnectionError):
            self.errors.append(error)


def forward(connection: HTTPConnection, request: Request) -> Answer:
    """Ask the server behind, exactly as the client did."""
    connection.putrequest(request.method, request.path, skip_host=True, skip_accept_encoding=True)
    for name, value in request.headers:
        if name.lower() not in _HOP_BY_HOP:
            connection.putheader(name, value)
    connection.endheaders(request.body)
    answer = connection.getresponse()
    return Answer(answer.status, answer.read(), answer.getheaders())


class _Exchange(BaseHTTPRequestHandler):
    """One connection of a client, and what becomes of its requests."""

    protocol_version = "HTTP/1.1"  # which has the 100 that clients wait for before a body
    server: FaultProxy

    def setup(self) -> None:
        super().setup()
        self._behind = self.server.connect()

    def finish(self) -> None:
        self._behind.close()
        with suppress(OSError):
            super().finish()

    def exchange(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = Request(self.command, self.path, list(self.headers.items()), body)
        fault = self.server.choose(request)
        with suppress(ConnectionError, HTTPException):
            getattr(self, f"_do_{fault.replace('-', '_') or 'right'}")(request)
            self.server.deliver()
            return
        self._break_off()

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = exchange  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:
        """Nothing is to be read of it."""

    def _forwarded(self, request: Request) -> Answer:
        answer = forward(self._behind, request)
        if answer.status == 200 and request.kind in ("put", "complete"):
            self.server.note_written(request.key)
        return answer

    def _say(self, answer: Answer, sent: bytes | None = None) -> None:
        """Answer the client; ``sent`` is what it gets in place of the body."""
        self.send_response_only(answer.status)
        sizes = [] if self.command == "HEAD" else [("Content-Length", str(len(answer.body)))]
        for name, value in answer.headers:
            if name.lower() not in _HOP_BY_HOP and not (sizes and name.lower() == "content-length"):
                self.send_header(name, value)
        for name, value in sizes:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body if sent is None else sent)
        self.wfile.flush()

    def _break_off(self) -> None:
        """Reset the connection."""
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def _refuse(self, status: int, code: bytes) -> None:
        body = b"" if self.command == "HEAD" else _ERROR % code
        self._say(Answer(status, body, [("Content-Type", "application/xml")]))

    def _do_right(self, request: Request) -> None:
        self._say(self._forwarded(request))

    def _do_refuse(self, request: Request) -> None:
        self._refuse(*_REFUSALS[self.server.pick(len(_REFUSALS))])

    def _do_reset(self, request: Request) -> None:
        self._break_off()

    def _do_lose(self, request: Request) -> None:
        """The server does it, and nobody hears of it."""
        self._forwarded(request)
        self._break_off()

    def _do_cut(self, request: Request) -> None:
        answer = self._forwarded(request)
        self._say(answer, answer.body[: self.server.pick(len(answer.body) + 1)])
        self._break_off()

    def _do_flip(self, request: Request) -> None:
        answer = self._forwarded(request)
        self._say(answer, self._flipped(answer.body))

    def _do_stall(self, request: Request) -> None:
        answer = self._forwarded(request)
        self._say(answer, answer.body[: len(answer.body) // 2])
        self.server.ending.wait(STALL_SECONDS)
        self._break_off()

    def _do_stale(self, request: Request) -> None:
        self._refuse(404, b"NoSuchKey")

    def _do_flip_sent(self, request: Request) -> None:
        request.body = self._flipped(request.body)
        self._do_right(request)

    def _do_error_200(self, request: Request) -> None:
        self._refuse(200, b"InternalError")

    def _do_done_error_200(self, request: Request) -> None:
        self._forwarded(request)
        self._refuse(200, b"InternalError")

    def _do_hold(self, request: Request) -> None:
        """It arrives much later; a DELETE is said to be done."""
        self.server.hold(request)
        if request.method == "DELETE":
            self._say(Answer(204))
        else:
            self._break_off()

    def _flipped(self, body: bytes) -> bytes:
        if not body:
            return body
        at = self.server.pick(len(body))
        return body[:at] + bytes([body[at] ^ (1 << self.server.pick(8))]) + body[at + 1 :]


@contextmanager
def faulty(endpoint: str) -> Iterator[FaultProxy]:
    """A proxy before the server at ``endpoint``."""
    with FaultProxy(endpoint) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.02,))
        thread.start()
        yield proxy
        proxy.ending.set()
        proxy.shutdown()
        thread.join()
        assert not proxy.errors
