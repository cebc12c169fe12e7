"""What goes wrong between here and an S3 server: tried again while it may pass, then typed."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ckpt.core.effects import perform
from ckpt.core.errors import AccessError, CkptError, NotFoundError, SpaceError, StorageError
from ckpt.core.printable import escape

_WAITS = tuple(min(10.0, 0.1 * 2**number) for number in range(9))
_BUDGET = 300.0  # seconds after which nothing is tried again

_PASSING_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_PASSING = frozenset({"SlowDown", "RequestTimeout", "OperationAborted"})
_PASSING |= {"ConditionalRequestConflict"}
_PASSING |= {"BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch"}  # damaged on the way
_DENIED = frozenset({"ExpiredToken", "InvalidToken", "TokenRefreshRequired"})
_OTHER_REGION = frozenset({"PermanentRedirect", "AuthorizationHeaderMalformed"})
_FULL = frozenset({"XMinioStorageFull", "QuotaExceeded"})

T = TypeVar("T")


class RequestError(Exception):
    """A request that did not do what was asked; ``passes`` when it may, asked again."""

    passes = True

    def typed(self, doing: str) -> CkptError:
        """The error for the caller; ``doing`` says what was tried, and where."""
        return StorageError(
            "network",
            f"{escape(str(self), 200)} while {doing}",
            hint="check the endpoint and the network, and run again",
        )


class UnreachableError(RequestError):
    """No answer, or not all of it."""

    def __init__(self, message: str, *, passes: bool = True) -> None:
        super().__init__(message)
        self.passes = passes


class NotAsWrittenError(RequestError):
    """What was written is not there, or is other bytes; ``error`` is what to say if it stays so."""

    def __init__(self, error: CkptError) -> None:
        super().__init__(error.message)
        self.error = error

    def typed(self, doing: str) -> CkptError:
        return self.error


class UnfaithfulError(RequestError):
    """An answer that cannot be true."""

    def typed(self, doing: str) -> CkptError:
        return StorageError(
            "store-unfaithful",
            f"{escape(str(self), 200)} while {doing}",
            hint="run `ckpt doctor`; the server may not keep what S3 promises",
        )


class UnsignedError(RequestError):
    """Nothing to sign a request with."""

    passes = False

    def typed(self, doing: str) -> CkptError:
        return AccessError(
            "s3-denied",
            f"no usable AWS credentials ({self}) while {doing}",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )


class RefusedError(RequestError):
    """An answer that says no; ``date`` is the server's."""

    def __init__(self, status: int, code: str, message: str, date: str) -> None:
        super().__init__(f"{code} ({status})")
        self.status = status
        self.code = code
        self.message = message
        self.date = date
        self.passes = status in _PASSING_STATUS or code in _PASSING

    def typed(self, doing: str) -> CkptError:
        said = escape(str(self), 100)
        if self.code == "NoSuchBucket":
            return NotFoundError(
                "no-bucket",
                f"the bucket does not exist: {doing}",
                hint="make the bucket, or check its name and the endpoint",
            )
        if self.code == "RequestTimeTooSkewed":
            here = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())
            return StorageError(
                "clock-skew",
                f"the clocks differ while {doing}: local {here}, server {escape(self.date, 40)}",
                hint="set the clock of this machine",
            )
        if self.status in (301, 307) or self.code in _OTHER_REGION:
            return StorageError(
                "s3-region", f"{said} while {doing}", hint="check the region of the bucket"
            )
        # What the server says of credentials stays unprinted.
        if self.status in (401, 403) or self.code in _DENIED:
            return AccessError(
                "s3-denied",
                f"{said} while {doing}",
                hint="check the AWS credentials and what they may do in this bucket",
            )
        if self.status == 507 or self.code in _FULL:
            return SpaceError("no-space", f"{said} while {doing}", hint="free some space there")
        return StorageError(
            "s3", f"{said} while {doing}: {escape(self.message, 200)}", hint="run `ckpt doctor`"
        )


def repeat(doing: str, act: Callable[[], T]) -> T:
    """``act()``, again after a while when it fails in a way that may pass.

    Raises:
        CkptError: the last failure, typed.
    """
    deadline = time.monotonic() + _BUDGET
    for number in itertools.count():
        try:
            return act()
        except RequestError as failure:
            last = number == len(_WAITS) or time.monotonic() > deadline
            if last or not failure.passes:
                raise failure.typed(doing) from failure
        # Anything between nothing and the limit, so that many clients do not come back at once.
        perform("s3.wait", time.sleep, random.uniform(0, _WAITS[number]))
    raise AssertionError("counting has no end")
