"""Where registries and stores may be: local paths, or addresses of the schemes that ckpt speaks."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ckpt.core.errors import StorageError, UsageError
from ckpt.core.printable import escape
from ckpt.storage.local import LocalStore
from ckpt.storage.store import Store

Place = Path | str

_PASSWORD = re.compile(r"([?&](?:ssl)?password=)[^&]*", re.IGNORECASE)
_SCHEMES = {
    "registry": ("sqlite", "postgresql", "postgresql+psycopg", "postgres"),
    "store": ("s3",),
    "repository": (),
}


@dataclass(frozen=True, slots=True)
class S3Options:
    """How to reach an S3 server, where the AWS configuration does not say it.

    ``capabilities`` is what ``ckpt init`` saw the server do; None when nobody looked.
    """

    endpoint: str | None = None
    region: str | None = None
    capabilities: tuple[str, ...] | None = None


def as_place(text: str, what: str) -> Place:
    """A path, or an address as text; what is no address that a ``what`` can have is refused.

    Raises:
        UsageError: ``uri-refused``, ``path-invalid``.
    """
    if "\0" in text or not text:
        raise UsageError("path-invalid", f"{escape(text)!r} cannot name a {what}")
    scheme, separator, rest = text.partition("://")
    if not separator:
        return Path(text)
    if scheme not in _SCHEMES[what]:
        allowed = ", ".join(f"{known}://" for known in _SCHEMES[what])
        raise UsageError(
            "uri-refused",
            f'the scheme "{escape(scheme, 20)}" cannot name a {what}',
            hint=f"give a path of a local folder{f', or {allowed}' if allowed else ''}",
        )
    return Path(rest.removeprefix("/")) if scheme == "sqlite" else text


def open_store(place: Place, options: S3Options) -> Store:
    """The store at a place; nothing is asked of it yet."""
    if isinstance(place, Path):
        return LocalStore(place)
    from ckpt.storage.s3 import S3Store
    from ckpt.storage.s3_probe import Capabilities

    seen = None if options.capabilities is None else Capabilities.named(options.capabilities)
    return S3Store(place, endpoint=options.endpoint, region=options.region, capabilities=seen)


def probe_store(place: Place, options: S3Options) -> S3Options:
    """The options with what the server of the store is seen to do.

    Raises:
        StorageError: ``server-unfit`` when it lacks what a store needs.
    """
    if isinstance(place, Path):
        return options
    from ckpt.storage.s3 import S3Store

    store = S3Store(place, endpoint=options.endpoint, region=options.region)
    try:
        seen = store.probe_capabilities()
    finally:
        store.close()
    if seen.missing:
        raise StorageError(
            "server-unfit",
            f"the server of {shown(place)} lacks {' and '.join(seen.missing)}",
            hint="use another server",
        )
    return replace(options, capabilities=seen.names)


def as_address(text: str, what: str) -> str:
    """An address that may be written down: no path, and without a password.

    Raises:
        UsageError: ``uri-refused``, ``password-refused``.
    """
    servers = [known for known in _SCHEMES[what] if known != "sqlite"]
    if text.partition("://")[0] not in servers:
        raise UsageError(
            "uri-refused",
            f'"{escape(text, 80)}" is no address of a {what}',
            hint=f"give {servers[0]}://…, or leave it out: a repository's own folder has what lies "
            "on this machine",
        )
    place = as_place(text, what)
    assert isinstance(place, str)
    if shown(place) != place:
        raise UsageError(
            "password-refused",
            f"the address of the {what} has a password, which would be written down",
            hint="leave it out; use PGPASSWORD or ~/.pgpass, or the AWS configuration",
        )
    return place


def shown(place: Place) -> str:
    """A place as text without its password."""
    if isinstance(place, Path):
        return str(place)
    scheme, _, rest = place.partition("://")
    user, at, host = rest.rpartition("@")
    hidden = _PASSWORD.sub(r"\1***", host)
    return f"{scheme}://{user.partition(':')[0]}{at}{hidden}"
