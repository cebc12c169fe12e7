"""Loads every hostile document under an audit hook; run as a program.

Prints one JSON object by attack: what came out, and every event that is not allowed.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from typing import Any

from hostile_documents import attacks, base

from ckpt.core.documents import Document, Tensor
from ckpt.core.errors import CkptError
from ckpt.core.printable import escape
from ckpt.loader.classes import describe_class
from ckpt.loader.replay import replay
from ckpt.loader.replica import copied_again, replicate
from ckpt.loader.spaces import MemorySpace
from ckpt.loader.tree import module_tree
from ckpt.loader.trust import Trust
from ckpt.loader.verify import check_structure

# Audit events by which a load could do anything beyond computing.
_WATCHED = (
    "import",
    "exec",
    "compile",
    "open",
    "socket",
    "subprocess",
    "os.",
    "ctypes",
    "pickle",
    "marshal",
    "shutil",
    "code.__new__",
    "function.__new__",
    "pty",
    "syslog",
    "webbrowser",
)


def load(document: Document, known: dict[str, bytes], trust: list[str]) -> None:
    """What a load does, from the bytes that a store would give."""
    allowed = Trust(trust)
    allowed.check(document)
    spaces, probed = _spaces(document.tensors, known), _spaces(document.probe_tensors, known)
    module = replicate(document, spaces, allowed)
    check_structure(document, module)
    if document.probe is not None:
        replay(
            document.probe,
            probed,
            lambda: replicate(document, copied_again(document, spaces), allowed),
            module,
        )


def _spaces(tensors: tuple[Tensor, ...], known: dict[str, bytes]) -> dict[int, MemorySpace]:
    spaces = {}
    for index, entry in enumerate(tensors):
        if entry.has_bytes:
            spaces[index] = MemorySpace(entry)
            body = b"".join(known.get(chunk, b"") for chunk in entry.chunks)
            view = spaces[index].view(0, len(body))
            if view is not None and len(view) == len(body):
                spaces[index].write(0, memoryview(body))
    return spaces


def outcome(act: Callable[[], object]) -> str:
    """``done``, the code of a typed error, or the raw exception."""
    try:
        act()
    except CkptError as error:
        return error.code
    except BaseException as error:  # noqa: BLE001 -- this is what must never happen
        return f"raw {type(error).__name__}: {error}"[:300]
    return "done"


def main() -> None:
    """Load every attack under the hook."""
    warnings.simplefilter("ignore")
    document, known = base()
    load(document, known, [])  # everything that a load needs is imported by now
    module_tree(document)
    for name in ("torch.nn.functional:relu", "subprocess:Popen"):
        describe_class(name)  # reads a source file once
    escape("\n")
    events: list[str] = []
    watching = False
    trusted: list[str] = []

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if watching and event.startswith(_WATCHED):
            said = str(arguments[:1])
            if event == "import" and str(arguments[0]).partition(".")[0] in trusted:
                return
            events.append(f"{event} {said}"[:200])

    sys.addaudithook(hook)
    results = {}
    for name, (edit, trust) in attacks().items():
        hostile = edit(document)
        events.clear()
        trusted[:] = trust
        watching = True
        loaded = outcome(lambda: load(hostile, known, trust))  # noqa: B023 -- called at once
        shown = outcome(lambda: module_tree(hostile))  # noqa: B023 -- called at once
        watching = False
        results[name] = {"load": loaded, "show": shown, "events": list(events)}
    print(json.dumps(results))


if __name__ == "__main__":
    main()
