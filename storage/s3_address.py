"""The address of an S3 store and of its server: checked before anything is signed for them.

An address that is refused is not shown: it may carry what somebody took for the place of a
password.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import NoReturn
from urllib.parse import SplitResult, urlsplit

from ckpt.core.errors import UsageError

_FOLDER = r"/[A-Za-z0-9_=+,-][A-Za-z0-9_=+,.-]*"
_ADDRESS = re.compile(rf"s3://([A-Za-z0-9][A-Za-z0-9._-]{{1,62}})((?:{_FOLDER})*)/?\Z")


def parse_address(url: str) -> tuple[str, str]:
    """The bucket and the folders below it, each with its slash in front.

    Raises:
        UsageError: ``uri-refused``.
    """
    found = _ADDRESS.match(url)
    if found is None:
        _refuse("the address of the store is not of the form s3://bucket/prefix")
    return found[1], found[2]


def check_endpoint(endpoint: str) -> None:
    """Refuse what is no plain address of a server.

    Raises:
        UsageError: ``uri-refused``.
    """
    try:
        found = urlsplit(endpoint)
        plain = found.scheme in ("http", "https") and found.hostname and found.port != 0
    except ValueError:
        plain = None
    if not plain or "@" in found.netloc or found.query or found.fragment:
        refuse_endpoint()
    if _is_link_local(found):
        _refuse("the endpoint is where clouds hand out credentials, not a store")


def refuse_endpoint() -> NoReturn:
    """Raise the UsageError ``uri-refused`` for an endpoint that is none."""
    _refuse("the endpoint is not of the form https://host:port")


def _is_link_local(found: SplitResult) -> bool:
    try:
        return ip_address(found.hostname or "").is_link_local
    except ValueError:
        return False


def _refuse(message: str) -> NoReturn:
    hint = "credentials come from the AWS environment or configuration only"
    raise UsageError("uri-refused", message, hint=hint) from None
