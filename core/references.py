"""References: ``name[:alias | @number | @b3:prefix][~n]``, parsed and printed."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ckpt.core.errors import UsageError
from ckpt.core.names import NEWEST, check_alias, check_model
from ckpt.core.printable import escape

_BACK = re.compile(r"(?P<head>.*?)~(?P<back>[0-9]{0,6})\Z", re.DOTALL)
_NUMBER = re.compile(r"v?(?P<number>[0-9]{1,18})\Z")
_PREFIX = re.compile(r"[0-9a-f]{8,64}\Z")


@dataclass(frozen=True, slots=True)
class Reference:
    """Which version is meant; with no alias, number or digest: the newest of the model."""

    model: str
    alias: str | None = None
    number: int | None = None
    digest: str | None = None
    back: int = 0

    def __str__(self) -> str:
        place = ""
        if self.alias is not None:
            place = f":{self.alias}"
        elif self.number is not None:
            place = f"@{self.number}"
        elif self.digest is not None:
            place = f"@b3:{self.digest}"
        return f"{self.model}{place}{f'~{self.back}' if self.back else ''}"


def parse_reference(text: str) -> Reference:
    """Parse a reference such as ``mlp``, ``mlp:best``, ``mlp@3``, ``mlp@b3:0123abcd``, ``mlp~1``.

    Raises:
        UsageError: ``name-invalid``, ``digest-invalid`` or ``reference-invalid``.
    """
    if not isinstance(text, str):
        raise UsageError("reference-invalid", f"{text!r} is no reference")
    match = _BACK.match(text)
    head, back = (match["head"], int(match["back"] or 1)) if match else (text, 0)
    for mark in "@:":
        name, found, place = head.partition(mark)
        if found and not (mark == ":" and "@" in head):
            return _parse_place(text, check_model(name), mark, place, back)
    return Reference(check_model(head), back=back)


def _parse_place(text: str, model: str, mark: str, place: str, back: int) -> Reference:
    number = _NUMBER.match(place)
    if number:
        return Reference(model, number=int(number["number"]), back=back)
    if mark == ":":
        alias = None if place == NEWEST else check_alias(place)
        return Reference(model, alias=alias, back=back)
    if place.startswith("b3:"):
        return Reference(model, digest=check_prefix(place[3:]), back=back)
    raise UsageError(
        "reference-invalid",
        f'"{escape(text, 80)}" is not a reference',
        hint="write name, name:alias, name@3 or name@b3:0123abcd, each with ~1 for the parent",
    )


def check_prefix(prefix: str) -> str:
    """Return ``prefix`` if it can begin a digest: 8 to 64 lower-case hex digits."""
    if not _PREFIX.match(prefix):
        raise UsageError(
            "digest-invalid",
            f'"{escape(prefix, 80)}" does not begin a digest',
            hint="give 8 to 64 lower-case hex digits",
        )
    return prefix
