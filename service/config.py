"""Which repository is meant, and where its registry and its store are."""

from __future__ import annotations

import os
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path

from ckpt.core.effects import perform
from ckpt.core.errors import IntegrityError, NotFoundError, TrustError, UsageError, from_os_error
from ckpt.core.printable import escape

FOLDER = ".ckpt"
CONFIG = "config.toml"
VARIABLE = "CKPT_REPO"
_CONFIG_TEXT = """# A ckpt repository. Paths are relative to this folder.
registry = "registry.db"
store = "store"
"""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a repository is. ``exists`` is false while it has no ``config.toml``."""

    root: Path
    registry: Path
    store: Path
    exists: bool


def locate(repo: str | os.PathLike[str] | None) -> Location:
    """The repository that is meant: ``repo``, else ``CKPT_REPO``, else the nearest ``.ckpt/``
    upwards from the working directory, else the user's own.

    Raises:
        TrustError: ``config-outside``, ``config-owner`` for one found by walking up.
        UsageError: ``uri-refused``; IntegrityError: ``config-damaged``.
    """
    given = repo if repo is not None else os.environ.get(VARIABLE) or None
    if given is not None:
        return _given(os.fspath(given))
    try:
        start = Path.cwd()
    except OSError as error:
        raise from_os_error(error, "looking for a repository from here upwards") from error
    for folder in (start, *start.parents):
        root = folder / FOLDER
        if _is_file(root / CONFIG):
            _check_owner(root, root / CONFIG)
            return read_config(root, inside=True)
    return read_config(_user_folder(), inside=False)


def _given(text: str) -> Location:
    path = local_path(text, "repository")
    if _is_file(path / CONFIG):
        return read_config(path, inside=False)
    return read_config(path / FOLDER, inside=False)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error


def read_config(root: Path, *, inside: bool) -> Location:
    """The location that ``root/config.toml`` names, or the usual one when there is none."""
    config = root / CONFIG
    try:
        text = config.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return Location(root, root / "registry.db", root / "store", exists=False)
    except OSError as error:
        raise from_os_error(error, f"reading {config}") from error
    except UnicodeDecodeError as error:
        raise _damaged(config, str(error)) from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise _damaged(config, str(error)) from None
    unknown = sorted(set(values) - {"registry", "store"})
    if unknown:
        raise _damaged(config, f'it has the unknown key "{escape(unknown[0])}"')
    return Location(
        root,
        _path(config, values, "registry", "registry.db", inside),
        _path(config, values, "store", "store", inside),
        exists=True,
    )


def _path(config: Path, values: dict[str, object], key: str, usual: str, inside: bool) -> Path:
    value = values.get(key, usual)
    if not isinstance(value, str):
        raise _damaged(config, f"{key} is not text")
    try:
        path = config.parent / local_path(value, key)
    except UsageError as error:
        error.message = f"{config}: {error.message}"
        raise
    if inside and not path.resolve().is_relative_to(config.parent.resolve()):
        raise TrustError(
            "config-outside",
            f"{config} was found by walking up and names {path}, outside its folder",
            hint=f"if you trust it, name it: --repo {config.parent}",
        )
    return path


def _check_owner(root: Path, config: Path) -> None:
    # The folder too, and a link by its own owner: into a folder of theirs, others can link ours.
    owners = {root.stat().st_uid, config.stat().st_uid, config.lstat().st_uid}
    if owners != {os.geteuid()}:
        raise TrustError(
            "config-owner",
            f"{config} was found by walking up and belongs to another user",
            hint=f"if you trust it, name it: --repo {config.parent}",
        )


def local_path(text: str, what: str) -> Path:
    """``text`` as a path; anything that looks like a URL is refused."""
    if "://" in text:
        scheme = text.partition("://")[0]
        raise UsageError(
            "uri-refused",
            f'the scheme "{escape(scheme, 20)}" cannot name a {what}',
            hint="give a path of a local folder",
        )
    if "\0" in text or not text:
        raise UsageError("path-invalid", f"{escape(text)!r} cannot name a {what}")
    return Path(text)


def _user_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("ckpt")) / "repository"


def prepare(location: Location) -> None:
    """Make the folder of a new repository; what it holds is never for git."""
    try:
        perform("mkdir", location.root.mkdir, parents=True, exist_ok=True)
        ignore = location.root / ".gitignore"
        if not ignore.exists():
            perform("write_text", ignore.write_text, "*\n")
    except OSError as error:
        raise from_os_error(error, f"making the repository {location.root}") from error


def complete(location: Location) -> None:
    """Write ``config.toml``, last of all: from now on the folder is a repository."""
    config = location.root / CONFIG
    temporary = config.with_name(f"{CONFIG}.{os.getpid()}.tmp")
    try:
        try:
            perform("write_text", temporary.write_text, _CONFIG_TEXT)
            _sync(temporary)
            perform("rename", temporary.replace, config)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync(location.root)
    except OSError as error:
        raise from_os_error(error, f"making the repository {location.root}") from error


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        perform("fsync", os.fsync, handle)
    finally:
        os.close(handle)


def no_repository(location: Location) -> NotFoundError:
    """The error for a repository that is not there and may not be made now."""
    return NotFoundError(
        "no-repository",
        f"there is no repository at {location.root}",
        hint="run `ckpt init`, or name one with --repo",
    )


def _damaged(config: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        "config-damaged", f"{config} cannot be read: {reason}", hint="correct or remove it"
    )
