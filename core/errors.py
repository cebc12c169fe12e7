"""The errors of ckpt: one base, a stable code, an exit code, and what to do next."""

from __future__ import annotations

import errno
from functools import partial
from typing import ClassVar

from ckpt.core.sizes import size


class CkptError(Exception):
    """Base of every error that ckpt raises on purpose.

    Args:
        code: stable, lower-case, hyphenated name, e.g. ``"no-space"``.
        message: what happened and where, in one line, printable as it is.
        hint: what to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, code: str, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        """Errors pass between the processes of one job."""
        return partial(type(self), hint=self.hint), (self.code, self.message)


class UsageError(CkptError):
    """What was asked cannot be asked like this."""

    exit_code = 2


class NotFoundError(CkptError):
    """A repository, model, version, alias or object is not there."""

    exit_code = 3


class IntegrityError(CkptError):
    """Bytes are not what they should be."""

    exit_code = 4


class ConflictError(CkptError):
    """What was asked contradicts something that is already there."""

    exit_code = 5


class StorageError(CkptError):
    """The store, the registry or the way to them failed."""

    exit_code = 6


class AccessError(CkptError):
    """The system refused permission."""

    exit_code = 7


class SpaceError(CkptError):
    """There is no room left."""

    exit_code = 8


class TrustError(CkptError):
    """Going on would run or follow something that the caller did not allow."""

    exit_code = 9


class CkptWarning(UserWarning):
    """Something that was done is not quite what was recorded."""


# What to do where an address has no registry.
LOST_HINT = (
    "check its address first: a registry that goes on elsewhere is cut off by a rebuild; if it is "
    "lost for good, run `ckpt registry rebuild --lost`"
)


def no_room(folder: str, nbytes: int, free: int) -> SpaceError:
    """The error for ``nbytes`` more that surely do not fit into what is ``free``."""
    return SpaceError(
        "no-space",
        f"{folder} needs {size(nbytes)} more and has {size(free)} free",
        hint="free some space and run again; what was stored already is used then",
    )


def from_os_error(error: OSError, doing: str) -> CkptError:
    """The typed error for a failed system call; ``doing`` says what was tried, and where."""
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return SpaceError(
            "no-space", f"no room left while {doing}", hint="free some space and run again"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return AccessError(
            "permission",
            f"not permitted: {doing} ({reason})",
            hint="check the owner and the mode of that path",
        )
    if error.errno == errno.ENOENT:
        return NotFoundError("not-found", f"no such file while {doing}", hint="check the path")
    return StorageError("io", f"{reason} while {doing}", hint="check the disk and run again")
