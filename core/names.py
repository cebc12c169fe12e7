"""The grammar of the names that users give: models, aliases, labels, metrics, runs."""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ckpt.core.errors import UsageError
from ckpt.core.printable import escape, is_printable

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")
_NUMBER_LIKE = re.compile(r"v?\d+\Z", re.IGNORECASE)
_KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./-]{0,127}\Z")
_NO_KEY = re.compile(r"[^A-Za-z0-9_./-]")
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul"]
    + [f"{port}{digit}" for port in ("com", "lpt") for digit in range(1, 10)]
)
_MODEL_LIMIT = 255
# Of files that torch.save or pickle writes.
PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle"})
_LABEL_LIMIT = 2000  # bytes: with its key in one entry of an index of PostgreSQL
_NO_TEXT = "it is no text"
_ARTICLES = {"alias": "an"}

NEWEST = "latest"
STEP = "step"


def check_model(name: str) -> str:
    """Return ``name`` if it is a valid model name, e.g. ``vision/resnet``.

    Raises:
        UsageError: ``name-invalid``, with the reason.
    """
    if not isinstance(name, str):
        raise _invalid("model", repr(name), _NO_TEXT)
    if len(name) > _MODEL_LIMIT:
        raise _invalid("model", name, f"it has {len(name)} characters, the limit is {_MODEL_LIMIT}")
    for segment in name.split("/"):
        reason = _segment_fault(segment)
        if reason:
            raise _invalid("model", name, reason)
    return name


def check_alias(name: str) -> str:
    """Return ``name`` if it can be an alias: a single segment, not a number, not ``latest``."""
    reason = _segment_fault(name)
    if reason is None and _NUMBER_LIKE.match(name):
        reason = "it would read as a version number"
    if reason is None and name.lower() == NEWEST:
        reason = f'"{NEWEST}" always means the newest version'
    if reason:
        raise _invalid("alias", name, reason)
    return name


def check_aliases(names: str | Iterable[str]) -> tuple[str, ...]:
    """The aliases of one push, each checked, in order, without repeats."""
    if names is not None and not isinstance(names, Iterable):
        raise _invalid("alias", names, _NO_TEXT)
    given = (names,) if isinstance(names, str) else tuple(names or ())
    return tuple(dict.fromkeys(check_alias(name) for name in given))


def check_run(name: str) -> str:
    """Return ``name`` if it can name a run."""
    reason = _segment_fault(name)
    if reason:
        raise _invalid("run", name, reason)
    return name


def check_step(step: int | None) -> int | None:
    """Return ``step`` if it is a whole number of at least 0, or None."""
    if step is None:
        return None
    try:
        number = -1 if isinstance(step, bool) else operator.index(step)  # also of NumPy's
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        raise UsageError(
            "step-invalid", f"step {step!r} is not a whole number", hint="give an int >= 0"
        )
    return number


def check_count(what: str, count: int) -> int:
    """Return ``count``, such as the limit of a list, if it is a whole number of at least 1.

    Raises:
        UsageError: ``limit-invalid``, or what else is counted.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count < 2**63:
        raise UsageError(
            f"{what}-invalid",
            f'{what} "{escape(str(count), 40)}" is not a whole number of at least 1',
            hint="give an int >= 1",
        )
    return count


def named_metrics(logged: Mapping[str, Any]) -> dict[str, Any]:
    """What a framework logged, under names that metrics may have: another character is a ``_``,
    so that ``acc@1`` is ``acc_1``. The step, and a second one of the same name, are left out."""
    named: dict[str, Any] = {}
    for name, value in logged.items():
        key = _NO_KEY.sub("_", str(name))[:128]
        key = key if _KEY.match(key) else f"_{key[1:]}"
        if key != STEP:
            named.setdefault(key, value)
    return named


def check_metrics(metrics: Mapping[str, float] | None) -> dict[str, float]:
    """The metrics as floats, sorted by name; NaN and infinities are allowed."""
    if metrics is not None and not isinstance(metrics, Mapping):
        raise UsageError("metric-invalid", "metrics are no dict", hint='write {"loss": 0.5}')
    checked = {}
    for key in metrics or {}:
        check_key("metric", key)
        if key == STEP:
            raise UsageError(
                "name-invalid",
                f'"{STEP}" cannot name a metric: in conditions it is the step of a version',
                hint="give the step itself, step=…, or another name",
            )
    for key, value in sorted((metrics or {}).items()):
        try:
            found = value.item() if hasattr(value, "item") else value  # of torch or NumPy
            number = float(found) + 0.0  # no database keeps the sign of -0.0
        except (TypeError, ValueError, OverflowError, RuntimeError):  # the last is torch's
            raise UsageError(
                "metric-invalid",
                f'metric "{key}" is {type(value).__name__}, not a number',
                hint="pass a float, e.g. float(loss)",
            ) from None
        checked[key] = number
    return checked


def check_labels(labels: Mapping[str, str] | None) -> dict[str, str]:
    """The labels, sorted by key; a value is any text up to 2,000 bytes, shown escaped."""
    if labels is not None and not isinstance(labels, Mapping):
        raise UsageError("label-invalid", "labels are no dict", hint='write {"host": "a"}')
    checked = {}
    for key in labels or {}:
        check_key("label", key)
    for key, value in sorted((labels or {}).items()):
        if not isinstance(value, str):
            raise UsageError(
                "label-invalid",
                f'label "{key}" is {type(value).__name__}, not text',
                hint="pass a str",
            )
        size = len(check_text(f'label "{key}"', value).encode())
        if size > _LABEL_LIMIT:
            raise UsageError(
                "label-invalid",
                f'label "{key}" has {size} bytes, the limit is {_LABEL_LIMIT}',
                hint="put long text into the message, or into the state itself",
            )
        checked[key] = value
    return checked


def check_text(what: str, text: str) -> str:
    """Return ``text`` if it can be stored: any characters but NUL, which PostgreSQL has not, and
    halves of surrogate pairs."""
    if not isinstance(text, str):
        raise UsageError("text-invalid", f"{what} is {type(text).__name__}, not text")
    if "\0" in text:
        raise UsageError(
            "text-invalid",
            f'{what} holds a NUL character: "{escape(text, 80)}"',
            hint="leave it out",
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(
            "text-invalid", f'{what} is not UTF-8: "{escape(text, 80)}"', hint="write it in UTF-8"
        ) from None
    return text


def check_key(kind: str, key: str) -> None:
    """Refuse what cannot be the key of a ``kind``, such as a label."""
    if not isinstance(key, str) or not _KEY.match(key):
        raise _invalid(kind, str(key), "letters, digits and _ . / - are allowed, up to 128")


def _segment_fault(segment: str) -> str | None:
    """Why ``segment`` cannot be one part of a name, or None."""
    if not isinstance(segment, str):
        return _NO_TEXT
    if not segment:
        return "a part of it is empty"
    if not is_printable(segment):
        return "it holds hidden characters"
    if segment in (".", ".."):
        return f'"{segment}" is not allowed'
    if len(segment) > 128:
        return f"a part of it has {len(segment)} characters, the limit is 128"
    if segment.endswith("."):
        return "a part of it ends with a dot"
    if segment.split(".")[0].lower() in _DEVICES:
        return f'"{segment}" is a reserved device name'
    if not _SEGMENT.match(segment):
        return "allowed are letters, digits and . _ - , beginning with a letter or a digit"
    return None


def _invalid(kind: str, name: object, reason: str) -> UsageError:
    return UsageError(
        "name-invalid",
        f'"{escape(str(name), 80)}" cannot name {_ARTICLES.get(kind, "a")} {kind}: {reason}',
        hint="use a name like mlp or vision/resnet-50"
        if kind == "model"
        else "use a name like best or val_loss",
    )
