"""Which repository is meant, and where its registry and its store are."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from ckpt.core.effects import perform
from ckpt.core.errors import (
    LOST_HINT,
    IntegrityError,
    NotFoundError,
    StorageError,
    TrustError,
    UsageError,
    from_os_error,
)
from ckpt.core.printable import escape
from ckpt.service.approval import approve, is_approved
from ckpt.service.places import Place, S3Options, as_place, shown
from ckpt.storage.local import sync_folder

FOLDER = ".ckpt"
CONFIG = "config.toml"
VARIABLE = "CKPT_REPO"


@dataclass(frozen=True, slots=True)
class Location:
    """Where a repository is. ``exists`` is false while it has no ``config.toml``."""

    root: Path
    registry_place: Place
    store_place: Place
    exists: bool
    options: S3Options = field(default_factory=S3Options)

    @property
    def registry(self) -> Path:
        """The file of a registry on this machine; UsageError ``remote`` for another."""
        return _local(self.registry_place, "registry")

    @property
    def store(self) -> Path:
        """The folder of a store on this machine; UsageError ``remote`` for another."""
        return _local(self.store_place, "store")

    @property
    def local_places(self) -> list[Path]:
        """Those of the two that are on this machine."""
        places = (self.registry_place, self.store_place)
        return [place for place in places if isinstance(place, Path)]


def _local(place: Place, what: str) -> Path:
    if isinstance(place, Path):
        return place
    raise UsageError("remote", f"the {what} {shown(place)} is no path", hint="ask its server")


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
        if _is_file(root / "registry.db"):  # what is meant is here, and not further up
            raise IntegrityError(
                "config-damaged",
                f"{root / CONFIG} is missing",
                hint=f"run `ckpt init` in {folder} with the same addresses as before",
            )
    return read_config(_user_folder(), inside=False)


def _given(text: str) -> Location:
    path = as_place(text, "repository")
    assert isinstance(path, Path)  # a repository has no address of its own
    path = Path(os.path.abspath(path))  # the program may go elsewhere while it is open
    if any(_is_file(path / name) for name in (CONFIG, "registry.db", "store/FORMAT")):
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
    unknown = sorted(set(values) - {"registry", "store", "endpoint", "region", "capabilities"})
    if unknown:
        raise _damaged(config, f'it has the unknown key "{escape(unknown[0])}"')
    return Location(
        root,
        _place(config, values, "registry", "registry.db", inside),
        _place(config, values, "store", "store", inside),
        exists=True,
        options=S3Options(
            _text(config, values, "endpoint"),
            _text(config, values, "region"),
            _texts(config, values, "capabilities"),
        ),
    )


def _text(config: Path, values: dict[str, object], key: str) -> str | None:
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise _damaged(config, f"{key} is not text")
    return value


def _texts(config: Path, values: dict[str, object], key: str) -> tuple[str, ...] | None:
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
        raise _damaged(config, f"{key} is no list of texts")
    return tuple(value)


def _place(config: Path, values: dict[str, object], key: str, usual: str, inside: bool) -> Place:
    said = _text(config, values, key)
    try:
        place = as_place(usual if said is None else said, key)
    except UsageError as error:
        error.message = f"{config}: {error.message}"
        raise
    if not isinstance(place, Path):
        if inside and not is_approved(config):
            raise TrustError(
                "config-remote",
                f"{config} was found by walking up and names {escape(shown(place), 200)}",
                hint=f"if you trust it, name it: --repo {config.parent}, or run `ckpt init` there",
            )
        return place
    path = config.parent / place
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


def _user_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_data_dir("ckpt")) / "repository"


def prepare(location: Location) -> None:
    """Make the folder of a new repository; what it holds is never for git."""
    try:
        missing = [folder for folder in location.root.parents if not folder.exists()]
        perform("mkdir", location.root.mkdir, parents=True, exist_ok=True)
        # Also what was there: another process may have made it a moment ago.
        for folder in (location.root, *missing):
            sync_folder(folder.parent)
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
            perform("write_text", temporary.write_text, _config_text(location), encoding="utf-8")
            with temporary.open("rb") as file:
                perform("fsync", os.fsync, file.fileno())
            perform("rename", temporary.replace, config)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        sync_folder(location.root)
        if len(location.local_places) < 2:
            approve(config)
    except OSError as error:
        raise from_os_error(error, f"making the repository {location.root}") from error


def _config_text(location: Location) -> str:
    """What makes the folder a repository; what is usual is said relative to it."""
    registry, store = location.registry_place, location.store_place
    places = {
        "registry": "registry.db" if registry == location.root / "registry.db" else str(registry),
        "store": "store" if store == location.root / "store" else str(store),
        "endpoint": location.options.endpoint,
        "region": location.options.region,
        "capabilities": location.options.capabilities,
    }
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in places.items()
        if value is not None
    ]
    return "# A ckpt repository. Paths are relative to this folder.\n" + "\n".join(lines) + "\n"


def no_repository(location: Location) -> NotFoundError:
    """The error for a repository that is not there and may not be made now."""
    return NotFoundError(
        "no-repository",
        f"there is no repository at {location.root}",
        hint=f"run `ckpt init {location.root.parent}`, or name one with --repo"
        if location.root.name == FOLDER
        else "run `ckpt init`, or name one with --repo",
    )


def store_missing(location: Location) -> StorageError:
    """The error for a repository whose store is not where its configuration says."""
    return StorageError(
        "store-missing",
        f"the store {shown(location.store_place)} is missing, or its file FORMAT",
        hint="put it back, or correct config.toml",
    )


def registry_missing(location: Location) -> StorageError:
    """The error for a store that has versions, and a place without a registry."""
    place, hint = location.registry_place, "put it back, or make it anew: `ckpt registry rebuild`"
    if not isinstance(place, Path):
        hint = LOST_HINT
    return StorageError(
        "registry-missing",
        f"the store {shown(location.store_place)} has versions, and the registry {shown(place)} is "
        "missing",
        hint=hint,
    )


def _damaged(config: Path, reason: str) -> IntegrityError:
    return IntegrityError(
        "config-damaged",
        f"{config} cannot be read: {reason}",
        hint="correct it, or remove it and run `ckpt init` with the same addresses",
    )
