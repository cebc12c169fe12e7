"""The program that saves for a trainer: ``python -m ckpt.training.writer``, without torch.

It reads frames from its standard input: a line of JSON, and after a ``save`` the document whose
length the line says; tensors lie in the arena, whose descriptor the first line names. It answers
each frame with one line of JSON. When its input ends, its trainer has, whose process id is the
argument: what is being saved may take ``LAST_SECONDS`` more. So it ends when the trainer is gone
and a child of it, such as a worker of a DataLoader, still holds the pipe.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from ckpt.core.documents import Document, Tensor, decode_document
from ckpt.core.errors import CkptError
from ckpt.service.bases import check_compress, keep_bases
from ckpt.service.config import Location
from ckpt.service.opening import reopen
from ckpt.service.places import S3Options
from ckpt.service.push import Described, Said, push_described
from ckpt.service.retention import prune_model
from ckpt.training.arena import Arena, ArenaTensor

LAST_SECONDS = 8.0
WATCH_SECONDS = 1.0
LEASE_SECONDS = 60.0

_Frame = tuple[Mapping[str, Any], bytes]


class Writer:
    """One run's repository, opened once, and the arena that its states come through."""

    def __init__(self, setup: Mapping[str, Any]) -> None:
        self._model, self._run = setup["model"], setup["run"]
        self._holder, self._rules = setup["holder"], setup["keep"]
        self._compress = check_compress(setup["compress"])
        self._spared: list[str] = setup["spared"]
        self._saved_rules = False
        self._kept: dict[str, memoryview] = {}
        self._holding = threading.Lock()
        self.closed = threading.Event()
        self._arena = Arena(setup["arena"])
        self._repository = reopen(location_of(setup["location"]))
        self._hold()

    def _hold(self) -> None:
        self._repository._registry.runs.hold(
            self._model, self._run, self._holder, LEASE_SECONDS, self._spared
        )

    def answer(self, frame: _Frame) -> dict[str, Any]:
        """Do what a frame asks."""
        head, body = frame
        with self._holding:  # or what keeps the lease could write down what was spared before
            self._spared = head.get("pushes", self._spared)
            self._hold()
        return {} if head["act"] == "spare" else self._save(head, decode_document(body))

    def _save(self, head: Mapping[str, Any], document: Document) -> dict[str, Any]:
        repository = self._repository
        places = head["places"]
        room = self._arena.room(max((sum(place) for place in places if place), default=0))
        sources = [
            None if place is None else _source(room, tensor, *place)
            for tensor, place in zip(document.tensors, places, strict=True)
        ]
        described = Described(
            state=document.state,
            root=document.root,
            tensors=document.tensors,
            sources=sources,
            order=document.order,
        )
        said = Said(
            model=self._model,
            step=head["step"],
            metrics={name: float(value) for name, value in head["metrics"].items()},
            labels=head["labels"],
            aliases=tuple(head["aliases"]),
            run=self._run,
        )
        version, added = push_described(
            repository._store,
            repository._registry,
            described,
            said,
            head["environment"],
            compress=self._compress,
            kept=self._kept,
        )
        # A store on this machine has them at hand, and "max" fetches them.
        if self._compress == "auto" and not repository._store.is_near:
            with contextlib.suppress(CkptError):  # it is saved; the next one is stored whole
                keep_bases(repository._registry, version, sources, self._kept)
        return {
            "push": version.push,
            "reference": version.reference,
            "nbytes": version.nbytes,
            "added": asdict(added),
            "not_pruned": self._prune(),
        }

    def _prune(self) -> str | None:
        """Apply the rules; why that failed, which costs no save: the next one tries again."""
        if not self._rules:
            return None
        try:
            prune_model(
                self._repository._store,
                self._repository._registry,
                self._model,
                self._rules,
                save=not self._saved_rules,
                run=self._run,
                spared=self._spared,
            )
        except CkptError as error:
            return str(error)
        self._saved_rules = True
        return None

    def keep(self) -> None:
        """Renew the lease, from a thread of its own."""
        with self._holding, contextlib.suppress(CkptError):  # told with the next save
            if not self.closed.is_set():
                self._hold()

    def close(self) -> None:
        """Give the run up."""
        with self._holding, contextlib.suppress(CkptError):
            self.closed.set()
            self._repository._registry.runs.release(self._model, self._run, self._holder)
        with contextlib.suppress(CkptError):  # the repository itself may be gone
            self._repository.close()


def location_of(said: Mapping[str, Any]) -> Location:
    """Where the trainer's repository is."""
    endpoint, region, capabilities = said["options"]
    seen = None if capabilities is None else tuple(capabilities)
    registry, store = (Path(place) if is_path else place for place, is_path in said["places"])
    options = S3Options(endpoint, region, seen)
    return Location(Path(said["root"]), registry, store, exists=True, options=options)


def _source(room: memoryview, tensor: Tensor, start: int, nbytes: int) -> ArenaTensor:
    data = room[start : start + nbytes]
    return ArenaTensor(tensor.name, tensor.dtype, tensor.stored_shape, data)


def _read(stream: BinaryIO, frames: queue.Queue[_Frame | None]) -> None:
    """Bring frames in until the trainer closes its end, or is gone."""
    with contextlib.suppress(ValueError, OSError, msgspec.MsgspecError):
        while line := stream.readline():
            head = msgspec.json.decode(line)
            if head.get("act") == "end":
                break
            frames.put((head, stream.read(head.get("document", 0))))
    _begin_end(frames)


def _watch(trainer: int, frames: queue.Queue[_Frame | None]) -> None:
    """Wait until the trainer is gone."""
    while os.getppid() == trainer:
        time.sleep(WATCH_SECONDS)
    _begin_end(frames)


def _begin_end(frames: queue.Queue[_Frame | None]) -> None:
    """Let what was asked be done, if that does not take too long."""
    frames.put(None)
    last = threading.Timer(LAST_SECONDS, os._exit, (1,))
    last.daemon = True
    last.start()


def main() -> None:
    """Answer until the input ends. Signals of the terminal and of a scheduler are for the trainer,
    which ends this by ending."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(os, "SCHED_BATCH"):  # the loop that hands a state over is not interrupted for it
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    frames: queue.Queue[_Frame | None] = queue.Queue()
    # Not sys.stdin, which Python locks when it ends, while that thread still waits in it.
    asked = os.fdopen(os.dup(0), "rb")
    threading.Thread(target=_read, args=(asked, frames), daemon=True).start()
    threading.Thread(target=_watch, args=(int(sys.argv[1]), frames), daemon=True).start()
    first = frames.get()
    if first is None:
        return
    writer = None
    try:
        writer = Writer(first[0])
        _say(answers, {})
        threading.Thread(target=_hold_on, args=(writer,), daemon=True).start()
        while (frame := frames.get()) is not None:
            _say(answers, _tried(writer, frame))
    except CkptError as error:
        _say(answers, _failed(error))
    finally:
        if writer is not None:
            writer.close()


def _hold_on(writer: Writer) -> None:
    """Keep the run, also while a save takes longer than its lease."""
    while not writer.closed.wait(LEASE_SECONDS / 3):
        writer.keep()


def _tried(writer: Writer, frame: _Frame) -> dict[str, Any]:
    try:
        return writer.answer(frame)
    except CkptError as error:
        return _failed(error)
    except Exception as error:  # noqa: BLE001  the trainer tells it; this goes on
        return {"error": "bug", "kind": "CkptError", "message": f"{type(error).__name__}: {error}"}


def _failed(error: CkptError) -> dict[str, Any]:
    said = {"error": error.code, "kind": type(error).__name__, "message": error.message}
    return {**said, "hint": error.hint}


def _say(stream: Any, answer: Mapping[str, Any]) -> None:
    with contextlib.suppress(BrokenPipeError):
        stream.write(msgspec.json.encode(answer) + b"\n")


if __name__ == "__main__":
    main()
