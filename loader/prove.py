"""The proof of a first push: the module is rebuilt in another interpreter, or in this one.

``python -m ckpt.loader.prove`` reads one task from its standard input: a line of JSON (the module
search path, the length of the document, whether bytes follow), the document, and the bytes of its
tensors and its probe's, one after the other. It answers with one line of JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import BinaryIO

from msgspec.structs import replace
from torch import nn

from ckpt.core.documents import Document, Probe, Tensor, decode_document, encode_document
from ckpt.core.errors import CkptError, UsageError
from ckpt.core.printable import escape
from ckpt.core.records import Proof
from ckpt.core.tensors import TensorBytes, chunk_spans
from ckpt.loader.capture import Captured
from ckpt.loader.probe import RecordedProbe
from ckpt.loader.replay import replay
from ckpt.loader.replica import FULL_BYTES, Spaces, copied, copied_again, drafted, replicate, share
from ckpt.loader.spaces import MemorySpace, stored_nbytes
from ckpt.loader.trust import Trust
from ckpt.loader.verify import check_structure

_log = logging.getLogger(__name__)

_SECONDS = 300.0


def prove(captured: Captured, recorded: RecordedProbe | None = None) -> Proof:
    """Show that a captured module can be rebuilt, by rebuilding it.

    Another interpreter does it, which has this one's search path and nothing else, as a
    colleague would. Classes of ``__main__``, which it cannot import, and structures of torch's
    own classes alone are proven in this process. Up to ``FULL_BYTES`` the values are compared
    too, and the probe is replayed; what it finds refuses nothing but stands in the reason.

    Raises:
        UsageError: ``rebuild-failed``.
    """
    full = captured.nbytes <= FULL_BYTES
    document = drafted(captured, digests=full)
    own = [name.reference for name in Trust().refused(document)]
    local = [reference for reference in own if reference.startswith("__main__:")]
    if not own:
        return _prove_here(captured, document, "all its classes are of torch.nn")
    if local:
        return _prove_here(captured, document, f"{local[0]} is of the running script")
    sources = list(captured.sources) if full else []
    if full and recorded is not None and recorded.probe.conditions.device == "cpu":
        document = replace(document, probe=_with_chunks(recorded))
        sources += recorded.captured.sources
    _log.debug("proving in another interpreter that the module can be rebuilt")
    try:
        answer = _ask(document, sources)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return _prove_here(captured, document, f"no other interpreter answered: {error}")
    if answer["failed"]:
        raise _failed(answer["failed"])
    return Proof("fresh", answer["reason"])


def _prove_here(captured: Captured, document: Document, reason: str) -> Proof:
    full = captured.nbytes <= FULL_BYTES
    trust = Trust.of_live(document)
    try:
        if full:
            module = replicate(document, copied(captured, document), trust)
        else:
            module = share(captured, document, trust)
        check_structure(document, module, digests=full)
    except CkptError as error:
        raise _failed(error.message) from error
    return Proof("in-process", reason)


def _failed(reason: str) -> UsageError:
    return UsageError(
        "rebuild-failed",
        f"the module cannot be rebuilt, so nothing was pushed: {escape(reason)}",
        hint="define its classes where others can import them, or push net.state_dict()",
    )


def _with_chunks(recorded: RecordedProbe) -> Probe:
    return replace(recorded.probe, tensors=drafted(recorded.captured, digests=True).tensors)


def _ask(document: Document, sources: Sequence[TensorBytes | None]) -> dict[str, str]:
    """What another interpreter answers; whatever else it prints goes nowhere."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise ValueError("this program has none")
    body = encode_document(document)
    path = [entry or os.getcwd() for entry in sys.path]
    head = {"path": path, "document": len(body), "bytes": bool(sources)}
    # Not on the GPUs: the job that pushes may have none of their memory to spare.
    environment = {"PYTHONPATH": os.pathsep.join(path), "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "ckpt.loader.prove"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, **environment},
    ) as process:
        try:
            _send(process, json.dumps(head).encode() + b"\n" + body, sources)
            answer, _ = process.communicate(timeout=_SECONDS)
        except BaseException:
            process.kill()
            raise
    found = json.loads(answer or b"null")
    if not isinstance(found, dict) or found.keys() != {"failed", "reason"}:
        raise ValueError(f"it ended with status {process.returncode}")
    return found


def _send(
    process: subprocess.Popen[bytes], head: bytes, sources: Sequence[TensorBytes | None]
) -> None:
    pipe = process.stdin
    assert pipe is not None
    try:
        pipe.write(head)
        for source in sources:
            if source is not None:
                for span in chunk_spans(source.nbytes):
                    pipe.write(source.read(*span))
        pipe.flush()
    except BrokenPipeError:
        pass  # it ended early; its answer or its status says why


def _answer(stream: BinaryIO) -> dict[str, str]:
    """Do the task in ``stream``: what failed, or what was found beside."""
    head = json.loads(stream.readline())
    sys.path[:] = head["path"]
    document = decode_document(stream.read(head["document"]))
    spaces = _read(document.tensors, stream if head["bytes"] else None)
    probed = _read(document.probe_tensors, stream)
    trust = Trust.of_all(document)

    def copy() -> nn.Module:
        return replicate(document, copied_again(document, spaces), trust, "cpu")

    try:
        module = copy()
        check_structure(document, module, digests=head["bytes"])
    except CkptError as error:
        return {"failed": error.message, "reason": ""}
    if document.probe is None:
        return {"failed": "", "reason": ""}
    try:
        outcome = replay(document.probe, probed, copy, module, "cpu")
    except CkptError as error:
        return {"failed": "", "reason": error.message}
    close = outcome.verdict == "outputs-close"  # below it, the forward cannot be compared at all
    return {"failed": "", "reason": f"outputs-close: {outcome.reason}" if close else ""}


def _read(entries: Sequence[Tensor], stream: BinaryIO | None) -> Spaces:
    """Room for the entries with bytes of their own, filled from ``stream`` if there is one."""
    spaces = {}
    for index, entry in enumerate(entries):
        if entry.has_bytes:
            spaces[index] = MemorySpace(entry)
            if stream is not None:
                for offset, length in chunk_spans(stored_nbytes(entry)):
                    spaces[index].write(offset, memoryview(stream.read(length)))
    return spaces


def main() -> None:
    """Answer one task; whatever user code prints stays out of the answer."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answers.write(json.dumps(_answer(sys.stdin.buffer)))
    answers.flush()
    os._exit(0)  # user code may have left threads and handlers


if __name__ == "__main__":
    main()
