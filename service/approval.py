"""Which configurations a person approved to name remote places."""

from __future__ import annotations

from pathlib import Path

from ckpt.core.digests import digest_of
from ckpt.core.effects import perform
from ckpt.core.errors import from_os_error


def approve(config: Path) -> None:
    """Remember that a configuration, as it is now, may name remote places."""
    known = _approvals()
    try:
        perform("mkdir", known.parent.mkdir, parents=True, exist_ok=True)
        with known.open("a", encoding="ascii") as file:
            perform("write_text", file.write, f"{_mark(config)}\n")
    except OSError as error:
        raise from_os_error(error, f"writing {known}") from error


def is_approved(config: Path) -> bool:
    """Whether exactly this file with exactly this content was approved by this user."""
    try:
        return _mark(config) in _approvals().read_text(encoding="ascii").split()
    except OSError:
        return False


def _mark(config: Path) -> str:
    return digest_of(str(config.resolve()).encode() + b"\0" + config.read_bytes())


def _approvals() -> Path:
    import platformdirs

    return Path(platformdirs.user_config_dir("ckpt")) / "approved"
