"""Import: checkpoints that other programs wrote, one version each."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import msgspec

from ckpt.core.digests import digest_of
from ckpt.core.documents import FORMAT, Document, identity_bytes
from ckpt.core.errors import CkptError, TrustError, UsageError, from_os_error
from ckpt.core.names import check_labels, check_step
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.tensors import chunk_digests
from ckpt.registry.registry import Registry
from ckpt.service.folder import OpenFolder, open_folder
from ckpt.service.push import Described, Said, is_whole
from ckpt.service.safetensors_file import OpenFile, open_file
from ckpt.service.unpickling import Unpickler
from ckpt.storage.store import Store

Kind = Literal["pickle", "dcp", "files"]

_PICKLES = {".pt", ".pth", ".bin", ".ckpt"}
# No step: part of a decimal (0.31), of a grouped number or a list (1_000, 3-1000), 100k, 1e5.
_NUMBER = r"[-_=]?(\d{1,18})(?![^\W_]|\.\d|[-_]\d+(?!\.?\d))"
_STEP = re.compile(rf"(?:step|iter|iteration|checkpoint|ckpt){_NUMBER}", re.IGNORECASE)
_COUNTED = re.compile(r"(?:step|iter|iteration|checkpoint|ckpt)[-_=]?\d", re.IGNORECASE)
_EPOCH = re.compile(rf"epoch{_NUMBER}", re.IGNORECASE)
# Right after a word; after "=" it is what that word says, such as a loss.
_LAST_NUMBER = re.compile(r"(?:^|[^\W\d_](?:\d*[-_]|\.))(\d{1,18})$")
_DATE = re.compile(r"(?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\1(?:0[1-9]|[12]\d|3[01])(?!\d)")
_SHARD = re.compile(r"-\d+-of-\d+\.")
# What only a checkpoint of transformers, peft, diffusers or accelerate has in its folder; and what
# other folders have too, unless the rest of a training state lies beside it.
_WEIGHTS = (
    *("pytorch_model.bin", "pytorch_model-*-of-*.bin", "pytorch_model_fsdp.bin"),
    *("diffusion_pytorch_model*.bin", "*pytorch_model*.bin.index.json", "adapter_model.bin"),
)
_DESCRIBED = ("config.json", "adapter_config.json", "trainer_state.json")
_TRAINED = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scheduler.bin", "rng_state*.pth")
_CONVERT = "load the model and save it with save_pretrained(…, safe_serialization=True)"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file or folder that may be imported, or why it may not. ``notes`` says what of it an import
    leaves out, once it was opened."""

    path: Path
    kind: Kind | None
    nbytes: int
    step: int | None = None
    labels: dict[str, str] = field(default_factory=dict)
    refused: CkptError | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Imported:
    """What became of a checkpoint: a version, ``known`` when it was there before; or why not."""

    checkpoint: Checkpoint
    version: Version | None = None
    known: bool = False


def find_checkpoints(path: Path) -> list[Checkpoint]:
    """The checkpoint at ``path``, or the checkpoints in that folder in the order of the steps
    that their names tell. None is opened.

    Raises:
        UsageError: ``no-checkpoint``, ``not-converted``; TrustError: ``pickle-refused`` for a bare
            pickle.
    """
    try:
        if not stat.S_ISDIR(path.stat().st_mode) or _is_checkpoint(path):
            one = _look(path, alone=True)
            if one.refused is not None:
                raise one.refused
            return [one]
        names = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
        found = [_look(entry, alone=False) for entry in names]
    except OSError as error:
        raise from_os_error(error, f"reading {path}") from error
    if all(one.refused is not None and one.refused.code == "no-checkpoint" for one in found):
        raise UsageError(
            "no-checkpoint",
            f"{escape(str(path))} has no checkpoint in it",
            hint="give a .pt, .pth, .bin or .ckpt file, a DCP or Hugging Face folder, or a folder "
            "of these",
        )
    return sorted(found, key=_place)


def _place(one: Checkpoint) -> tuple[bool, bool, int, int, str]:
    """By step, then by epoch; what has neither comes last."""
    epoch = one.labels.get("epoch")
    numbers = one.step or 0, int(epoch or 0)
    return one.refused is not None, one.step is None and epoch is None, *numbers, one.path.name


def _kind(path: Path) -> Kind | None:
    if path.is_dir():
        if (path / ".metadata").is_file():
            return "dcp"
        # The parts of a pipeline of diffusers have folders of their own.
        is_pipeline = (path / "model_index.json").is_file()
        weights = "**/*.safetensors" if is_pipeline else "*.safetensors"
        return "files" if any(path.glob(weights)) else None
    if path.suffix.lower() == ".safetensors":
        return "files"
    return "pickle" if path.suffix.lower() in _PICKLES else None


def _is_checkpoint(path: Path) -> bool:
    """Whether a file or folder is one checkpoint, that may be imported or not."""
    return _kind(path) is not None or _is_unconverted(path)


def _is_unconverted(path: Path) -> bool:
    """Whether a folder is one checkpoint of Hugging Face whose weights are no safetensors."""

    def has(names: Sequence[str]) -> bool:
        return any(any(path.glob(name)) for name in names)

    if not path.is_dir() or _kind(path) is not None:
        return False
    return has(_WEIGHTS) or has(("model_index.json",)) or (has(_DESCRIBED) and has(_TRAINED))


def _look(path: Path, *, alone: bool) -> Checkpoint:
    """What can be told of ``path`` from outside. A number without a word counts as the step only
    among other checkpoints: ``resnet-50.pt`` alone may be no step."""
    kind = _kind(path)
    refused = _refusal(path, kind)
    try:
        nbytes = _size(path)
    except OSError as error:
        nbytes, refused = 0, refused or from_os_error(error, f"reading {path}")
    name = _DATE.sub("", path.name if path.is_dir() else path.stem)
    steps, epochs = _STEP.findall(name), _EPOCH.findall(name)
    if not steps and not epochs and not alone:
        steps = _LAST_NUMBER.findall(name) if not _COUNTED.search(name) else []
    labels = {"epoch": str(int(epochs[-1]))} if epochs else {}
    step = int(steps[-1]) if steps else None
    return Checkpoint(path, None if refused else kind, nbytes, step, labels, refused)


def _refusal(path: Path, kind: Kind | None) -> CkptError | None:
    """Why a file or folder cannot be imported as one checkpoint, as far as its names say it."""
    shown = escape(str(path))
    if path.suffix.lower() in (".pkl", ".pickle"):
        return TrustError(
            "pickle-refused",
            f"{shown} is a bare pickle, which can run code when it is read",
            hint="load it yourself if you trust it, and push what you get: repo.push(state, model)",
        )
    if kind == "pickle" and _SHARD.search(path.name):
        return UsageError("checkpoint-part", f"{shown} is one part of a checkpoint", hint=_CONVERT)
    if kind is not None:
        return None
    if _is_unconverted(path):
        return UsageError(
            "not-converted",
            f"{shown} is one checkpoint, whose weights are no safetensors",
            hint=_CONVERT,
        )
    if inner := _folders_of_checkpoints(path):
        return _nested(path, inner)
    return UsageError(
        "no-checkpoint",
        f"{shown} is no checkpoint",
        hint="give a .pt, .pth, .bin or .ckpt file, a DCP folder or a Hugging Face folder",
    )


def _folders_of_checkpoints(path: Path) -> list[Path]:
    """The folders from ``path`` downwards with checkpoints in them. A ``.bin`` may be anything."""
    found = []
    for place, folders, files in os.walk(path):
        inner = [Path(place) / name for name in sorted(folders) if not name.startswith(".")]
        checkpoints = [folder for folder in inner if _is_checkpoint(folder)]
        folders[:] = [folder.name for folder in inner if folder not in checkpoints]
        suffixes = {Path(name).suffix.lower() for name in files if not name.startswith(".")}
        if checkpoints or suffixes & (_PICKLES - {".bin"}):
            found.append(Path(place))
    return found


def _nested(path: Path, inner: Sequence[Path]) -> UsageError:
    run = "-".join(inner[0].relative_to(path.parent).parts)
    others = f", and the same for the others of its {len(inner)} folders" if len(inner) > 1 else ""
    return UsageError(
        "checkpoints-below",
        f"{escape(str(path))} is no checkpoint but a folder with checkpoints",
        hint=f"run `ckpt import {escape(str(inner[0]))} MODEL --run {escape(run)}`{others}",
    )


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.stat().st_size
    files = (Path(place) / name for place, _, names in os.walk(path) for name in names)
    return sum(file.stat().st_size for file in files)


def look_inside(
    found: Sequence[Checkpoint], unpickler: Unpickler, kept: Sequence[Path]
) -> list[Checkpoint]:
    """Each checkpoint as an import would take it, or with what refuses it, in the order of the
    steps that are written in them; every one is opened, none is read."""
    inside = []
    for one in found:
        try:
            if one.refused is None:
                with opened(one, unpickler, kept) as (_, one):
                    pass
        except CkptError as error:
            one = replace(one, refused=error)
        inside.append(one)
    return sorted(inside, key=_place)


@contextmanager
def opened(
    one: Checkpoint, unpickler: Unpickler, kept: Sequence[Path]
) -> Iterator[tuple[Described, Checkpoint]]:
    """What would be pushed of a checkpoint, and the step and labels that are written in it.

    Raises:
        TrustError: ``pickle-refused``; IntegrityError: ``checkpoint-damaged``; UsageError:
            ``cannot-store``.
    """
    if one.kind == "files" and one.path.is_dir():
        with open_folder(one.path, kept) as folder:
            yield _of_files(folder, files=folder.files), one
    elif one.kind == "files":
        with open_file(one.path) as file:
            yield _of_files(file, header=file.header), one
    else:
        state = unpickler.open(one.path)
        described = Described(
            state="values",
            root=state.document.root,
            tensors=state.document.tensors,
            sources=state.sources,
            order=state.document.order,
            check=state.check_unchanged,
        )
        yield described, replace(_as_lightning(one, state.document.root), notes=state.notes)


def _of_files(opened: OpenFolder | OpenFile, **more: Any) -> Described:
    """As ``push`` takes a ``.safetensors`` file, or a folder with some."""
    return Described(
        state="files" if isinstance(opened, OpenFolder) else "values",
        root=opened.root,
        tensors=opened.tensors,
        sources=opened.sources,
        check=opened.check_unchanged,
        **more,
    )


def _as_lightning(one: Checkpoint, root: Any) -> Checkpoint:
    """With the step and epoch that Lightning writes into its checkpoints."""
    pairs = root.get("$dict", []) if isinstance(root, dict) else []
    values = {key: value for key, value in pairs if isinstance(key, str)}
    if "pytorch-lightning_version" not in values:
        return one
    step, epoch = values.get("global_step"), values.get("epoch")
    if type(step) is int:
        one = replace(one, step=check_step(step))
    if type(epoch) is int:
        one = replace(one, labels={**one.labels, **check_labels({"epoch": str(epoch)})})
    return one


def known_version(
    store: Store, registry: Registry, said: Said, described: Described
) -> Version | None:
    """The version of the same content, step and run that has every label which is asked for, so
    that an import can be run again. The bytes are read for it only when one has their number."""
    nbytes = sum(source.nbytes for source in described.sources if source is not None)
    wanted: Document | None = None
    outside = said.step, said.run, nbytes, described.state
    for version in _versions(registry, said.model):
        if (version.step, version.run, version.nbytes, version.state) != outside:
            continue
        if not said.labels.items() <= version.labels.items():
            continue
        wanted = wanted or _drafted(described)
        if version.digest != digest_of(identity_bytes(wanted)):
            continue
        known = registry.queries.document(version)
        same = (known.safetensors, known.files) == (wanted.safetensors, wanted.files)
        if same and is_whole(store, registry, version, wanted):
            described.check()
            return version
    return None


def _versions(registry: Registry, model: str) -> Iterator[Version]:
    """All versions of a model, newest first; none when there is no such model."""
    if registry.queries.taken_name(model) != model:
        return
    before: int | None = None
    while page := registry.queries.log(model, before, 100):
        yield from page
        before = page[-1].number


def _drafted(described: Described) -> Document:
    tensors = tuple(
        entry
        if source is None
        else msgspec.structs.replace(
            entry,
            chunks=chunk_digests(source),
        )
        for entry, source in zip(described.tensors, described.sources, strict=True)
    )
    return Document(
        format=FORMAT,
        state=described.state,
        root=described.root,
        tensors=tensors,
        environment="",
        order=described.order,
        safetensors=described.header,
        files=dict(described.files),
    )
