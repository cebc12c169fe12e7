"""The trainer's end of the writer process: states are staged, handed over, and answered later."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from ckpt.core import errors
from ckpt.core.documents import Document, encode_document
from ckpt.core.errors import CkptError, StorageError
from ckpt.core.printable import escape
from ckpt.core.tensors import TensorBytes
from ckpt.service.config import Location
from ckpt.training.arena import Arena
from ckpt.training.gpu_copies import Wait
from ckpt.training.staging import Stage

_END_SECONDS = 10.0  # in which the writer ends itself, unless it is frozen
_PIPE_BYTES = 1 << 20  # a save's description fits, so that the loop does not wait for its reader
_SET_PIPE_SIZE = getattr(fcntl, "F_SETPIPE_SZ", 1031)


class Background:
    """One writer process and the arena that it shares; not for several threads at once.

    Raises:
        CkptError: what the writer said when it could not begin, such as ``run-live``.
        StorageError: ``writer-not-started``.
    """

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._arena, self._process = _start()
        self._stage = Stage(self._arena)
        self._waiting: deque[Future[dict[str, Any]]] = deque()
        self._saving: Future[dict[str, Any]] | None = None
        self._copying: threading.Thread | None = None
        self._is_over = False
        self._lock = threading.Lock()
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # there may be no more for this user
            fcntl.fcntl(self._process.stdin, _SET_PIPE_SIZE, _PIPE_BYTES)
        self._reader = threading.Thread(target=self._read, name="ckpt-answers", daemon=True)
        self._reader.start()
        try:
            self._ask({**setup, "arena": self._arena.handle}).result()
        except BaseException:
            self.close()
            raise

    def save(
        self,
        document: Document,
        sources: Sequence[TensorBytes | None],
        said: Mapping[str, Any],
    ) -> Future[dict[str, Any]]:
        """Stage a state as it is now, and have it saved. The one before must be answered.

        What GPUs still copy is handed over by a thread, when they have.
        """
        if self._saving is not None:  # the writer reads the arena: whoever lost its answer waits
            wait([self._saving])
        staged = [source for source in sources if source is not None]
        try:
            found, copied = self._stage.copy(staged)
        except (RuntimeError, OSError, MemoryError) as error:
            return failed(_copy_failed(error))
        starts = iter(found)
        places = [None if source is None else (next(starts), source.nbytes) for source in sources]
        head = {"act": "save", "places": places, **said}
        return self._ask(head, encode_document(document), copied)

    def spare(self, pushes: Sequence[str]) -> None:
        """Let no rule remove the versions of these pushes while the run is live."""
        self._ask({"act": "spare", "pushes": list(pushes)}).result()

    def _ask(
        self, head: Mapping[str, Any], body: bytes = b"", copied: Wait | None = None
    ) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()
        frame = msgspec.json.encode({**head, "document": len(body)}) + b"\n" + body
        self._end_copying()
        try:
            with self._lock:
                self._waiting.append(answer)
            if head.get("act") == "save":
                self._saving = answer
            if copied is None:
                self._write(frame)
            else:
                self._write_later(frame, copied, answer)
        except BaseException:  # Ctrl-C: nobody knows how much of the frame the writer has
            self._process.kill()
            self._process.wait()
            raise
        return answer

    def _write(self, frame: bytes) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(frame)
            pipe.flush()
        except (OSError, ValueError):  # it has ended; if not, nobody knows what it has of the frame
            self._process.kill()
            self._end_all()

    def _write_later(self, frame: bytes, copied: Wait, answer: Future[dict[str, Any]]) -> None:
        given = (frame, copied, answer)
        # A GPU that hangs does not keep the interpreter from its end.
        thread = threading.Thread(
            target=self._write_copied, args=given, name="ckpt-copies", daemon=True
        )
        try:
            thread.start()
        except RuntimeError:  # there are no more threads: the loop waits
            self._write_copied(*given)
        else:
            self._copying = thread

    def _write_copied(self, frame: bytes, copied: Wait, answer: Future[dict[str, Any]]) -> None:
        try:
            copied()
        except Exception as error:  # noqa: BLE001  whatever it is, somebody waits for the answer
            with self._lock:
                is_ours = answer in self._waiting
                if is_ours:
                    self._waiting.remove(answer)
            if is_ours:
                answer.set_exception(_copy_failed(error))
            return
        self._write(frame)

    def _end_copying(self, timeout: float | None = None) -> bool:
        """Frames are answered in the order of their futures: wait for one that is not written.
        Returns whether that is over."""
        if self._copying is not None:
            self._copying.join(timeout)
            if self._copying.is_alive():
                return False
            self._copying = None
        return True

    def _read(self) -> None:
        pipe = self._process.stdout
        assert pipe is not None
        for line in pipe:
            with self._lock:
                answer = self._waiting.popleft()
            said = msgspec.json.decode(line)
            if "error" in said:
                answer.set_exception(_error(said))
            else:
                answer.set_result(said)
        self._end_all()

    def _end_all(self) -> None:
        self._is_over = True  # before anybody is told: the process is seen to end a little later
        with self._lock:
            left = list(self._waiting)
            self._waiting.clear()
        for answer in left:
            answer.set_exception(
                StorageError(
                    "writer-ended",
                    "the process that saves in the background has ended",
                    hint="the next save starts another one; look for what killed it",
                )
            )

    @property
    def reads_here(self) -> bool:
        """Whether this is the thread that brings the answers."""
        return threading.current_thread() is self._reader

    @property
    def is_alive(self) -> bool:
        """Whether the writer can be asked."""
        return not self._is_over and self._process.poll() is None

    @property
    def was_killed(self) -> bool:
        """Whether the writer, which is closed, could not give the run up."""
        return self._process.returncode != 0

    def close(self, timeout: float | None = None) -> None:
        """End the writer; what it has not begun to save is not saved, nor what GPUs have not
        copied after ``timeout`` seconds."""
        assert self._process.stdin is not None
        copied = self._end_copying(timeout)
        with contextlib.suppress(BrokenPipeError, ValueError):  # it has ended already
            # A child of the trainer, such as a worker of a DataLoader, may hold the pipe open.
            self._process.stdin.write(b'{"act": "end"}\n')
            self._process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if copied:  # else the thread keeps the arena, which a GPU may still write into
            self._stage.close()
            self._arena.close()


def _start() -> tuple[Arena, subprocess.Popen[bytes]]:
    """A writer, and the arena that it shares."""
    try:
        with ExitStack() as undone:
            arena = Arena()
            undone.callback(arena.close)
            # In a session of its own, so that Ctrl-C in the terminal is for the trainer alone.
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "ckpt.training.writer", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                pass_fds=[arena.handle],
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # of numpy, which would only wait
                start_new_session=True,
            )
            undone.pop_all()
    except OSError as error:
        raise StorageError(
            "writer-not-started",
            f"no process can be started that saves in the background ({error.strerror})",
            hint="look at the limits of processes, open files and memory",
        ) from error
    return arena, process


def location_of(location: Location) -> dict[str, Any]:
    """Where a repository is, for the writer."""
    options = location.options
    return {
        "root": str(location.root),
        "places": [
            [str(place.absolute()) if isinstance(place, Path) else place, isinstance(place, Path)]
            for place in (location.registry_place, location.store_place)
        ],
        "options": [options.endpoint, options.region, options.capabilities],
    }


def failed(error: CkptError) -> Future[dict[str, Any]]:
    """The answer to a save that was not made."""
    answer: Future[dict[str, Any]] = Future()
    answer.set_exception(error)
    return answer


def _copy_failed(error: Exception) -> StorageError:
    said = escape(" ".join(str(error).split())) or type(error).__name__
    return StorageError(
        "copy-failed", f"the state could not be copied ({said})", hint="the step is not saved"
    )


def _error(said: Mapping[str, Any]) -> CkptError:
    kind = getattr(errors, said["kind"], CkptError)
    found: CkptError = kind(said["error"], said["message"], hint=said.get("hint"))
    return found
