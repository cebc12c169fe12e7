"""The repository: a registry and a store, and what can be done with them.

What only push or pull needs is imported by them, so that looking something up starts fast.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ckpt.core.errors import NotFoundError, UsageError
from ckpt.core.names import (
    check_alias,
    check_aliases,
    check_labels,
    check_metrics,
    check_model,
    check_run,
    check_step,
    check_text,
)
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.core.references import Reference, parse_reference
from ckpt.registry.changes import Changes, aliased
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import acknowledge_event, copy_pending
from ckpt.service.author import author
from ckpt.service.config import Location
from ckpt.service.exchange import Exchange
from ckpt.service.lookup import Lookup, VersionLike
from ckpt.service.tripwire import check_newest
from ckpt.service.upkeep import Upkeep
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from torch import nn

    from ckpt.loader.devices import DeviceMap
    from ckpt.loader.trust import TrustLike
    from ckpt.loader.verify import Report
    from ckpt.service.push import Described, Said
    from ckpt.service.selection import Patterns
    from ckpt.service.upload import Progress

PathLike = str | os.PathLike[str]


class Repository(Lookup, Exchange, Upkeep):
    """An open repository; also a context manager that closes it.

    Methods may be called from several threads. A version is named by a reference such as
    ``mlp``, ``mlp:best``, ``mlp@3`` or ``mlp@b3:0123abcd``, each with ``~1`` for its parent, or by
    a :class:`Version`.
    """

    def __init__(self, location: Location, registry: Registry, store: Store) -> None:
        self.location = location
        self._registry = registry
        self._store = store
        registry.confirm_by(partial(check_newest, store, registry))

    def push(
        self,
        state: Any,
        model: str,
        *,
        inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        alias: str | Iterable[str] = (),
        message: str | None = None,
        parent: VersionLike | None = None,
        run: str | None = None,
        drop: Iterable[str] = (),
        compress: str = "auto",
        progress: Progress | None = None,
    ) -> Version:
        """Store a state as a new version of ``model``; durable when this returns.

        The newest version is answered instead when its run, content, step, metrics and labels are
        the same. Every tensor is stored once, however often it is pushed.

        Args:
            state: an ``nn.Module``, or any nesting of dict, list, tuple and plain values with
                tensors in it, such as ``{"model": net.state_dict(), "optimizer":
                opt.state_dict(), "step": 100}``.
            inputs: arguments for a module's forward, a tuple or a dict of keyword arguments,
                best with a batch of at least 2. What a copy of the module gives on them is
                recorded, and compared at every load.
            step: training step, a whole number.
            metrics: numbers by name; NaN and infinities are kept, and never compare.
            labels: text by key.
            alias: one or several names that move to this version.
            parent: the version that this one comes from; by default the run's previous one, else
                the model's newest.
            run: the training job, ``main`` by default.
            drop: attributes of a module to leave out, by path, such as ``"encoder.lock"``.
            compress: ``"auto"`` stores the model's first version as it is, so that every reader
                of safetensors opens it, and the next ones as lossless differences where that
                saves 10 % and the base is on this machine; ``"max"`` makes everything as small
                as it can; ``"none"`` stores all as it is.
            progress: called with ``(bytes done, bytes in all)``, also from other threads.

        Raises:
            UsageError: ``cannot-store``, naming everything that cannot be stored;
                ``probe-failed`` when the forward fails; ``rebuild-failed``, see
                ``docs/verification.md``; ``name-invalid``.
            ConflictError: ``name-clash``, ``push-expired``.
            SpaceError, AccessError, StorageError: nothing was committed; run it again.
        """
        if isinstance(state, os.PathLike) or (isinstance(state, str) and os.path.exists(state)):
            raise UsageError(
                "not-a-state",
                f"{escape(str(state), 80)} is a path, not a state",
                hint="push_file(path, model) stores the file or folder",
            )
        from ckpt.service.describe import describe_state

        said = self._said(model, step, metrics, labels, alias, message, parent, run)
        left_out = [drop] if isinstance(drop, str) else list(drop)
        described = describe_state(self._registry, state, inputs, left_out)
        return self._push(described, said, compress, progress)

    def push_file(
        self,
        path: PathLike,
        model: str,
        *,
        step: int | None = None,
        metrics: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        alias: str | Iterable[str] = (),
        message: str | None = None,
        parent: VersionLike | None = None,
        run: str | None = None,
        compress: str = "auto",
        progress: Progress | None = None,
    ) -> Version:
        """Store a ``.safetensors`` file, or a folder with some; without importing torch.

        Pulling it as a file or folder gives the identical bytes; pulling its state gives the
        weights by name. Of a folder, such as ``save_pretrained`` writes, every other file is
        kept as it is; hidden folders are left out. For the other arguments see :meth:`push`.

        Raises:
            IntegrityError: the file's header is damaged or hostile; the message says how.
        """
        from ckpt.service.folder import open_folder
        from ckpt.service.push import Described
        from ckpt.service.safetensors_file import open_file

        said = self._said(model, step, metrics, labels, alias, message, parent, run)
        if os.path.isdir(path):
            with open_folder(Path(path), self.location.local_places) as folder:
                described = Described(
                    state="files",
                    root=folder.root,
                    tensors=folder.tensors,
                    sources=folder.sources,
                    files=folder.files,
                    check=folder.check_unchanged,
                )
                return self._push(described, said, compress, progress)
        with open_file(Path(path)) as file:
            described = Described(
                state="values",
                root=file.root,
                tensors=file.tensors,
                sources=file.sources,
                header=file.header,
                check=file.check_unchanged,
            )
            return self._push(described, said, compress, progress)

    def _push(
        self, described: Described, said: Said, compress: str, progress: Progress | None
    ) -> Version:
        from ckpt.loader.environment import describe_environment
        from ckpt.service.bases import check_compress
        from ckpt.service.push import push_described

        return push_described(
            self._store,
            self._registry,
            described,
            said,
            describe_environment(),
            progress,
            check_compress(compress),
        )[0]

    def _said(
        self,
        model: str,
        step: int | None,
        metrics: Mapping[str, float] | None,
        labels: Mapping[str, str] | None,
        alias: str | Iterable[str],
        message: str | None,
        parent: VersionLike | None,
        run: str | None,
    ) -> Said:
        from ckpt.service.push import Said

        return Said(
            model=check_model(model),
            step=check_step(step),
            metrics=check_metrics(metrics),
            labels=check_labels(labels),
            aliases=check_aliases(alias),
            message=None if message is None else check_text("the message", message),
            parent=None if parent is None else self.get(parent).reference,
            run="main" if run is None else check_run(run),
        )

    def copy(
        self,
        source: Repository,
        ref: VersionLike,
        *,
        model: str | None = None,
        progress: Progress | None = None,
    ) -> Version:
        """Push a version of another repository to this one: the same content, environment and
        facts, but not its number, time and aliases. Chunks that are here already are shared; run
        again, it goes on where it was.

        A version of the model is answered instead when it has the same run, content, step,
        metrics and labels, also one that is not the newest.

        Raises:
            IntegrityError: ``object-corrupt`` when the other one is damaged.
        """
        from ckpt.service.copying import copy_version

        version = source.get(ref)
        name = version.model if model is None else check_model(model)
        here, there = (self._store, self._registry), (source._store, source._registry)
        return copy_version(there, version, here, name, progress)

    def pull(
        self,
        ref: VersionLike,
        *,
        tensors: Patterns | None = None,
        device: DeviceMap = None,
        all: bool = False,
        mmap: bool = False,
        progress: Progress | None = None,
    ) -> Any:
        """The state as it was pushed, every byte checked; of a module, what its ``state_dict()``
        gave, ties as one object.

        Args:
            tensors: a pattern such as ``"encoder.*"``, or several: only these are read, and come
                as a dict by canonical name.
            device: a device, or a mapping from recorded to wanted devices. By default each
                tensor goes where it was; where that device is absent, to the CPU with a
                :class:`CkptWarning`.
            all: of a module, also the tensors that no ``state_dict()`` holds, by canonical name;
                otherwise a :class:`CkptWarning` names them.
            mmap: on a local disk, leave tensors that are stored as they are where they lie,
                checked: they take no memory of their own until they are changed, and changes stay
                here. Their disk space is freed only after them, and a disk that fails under them
                ends the process.

        Raises:
            NotFoundError: ``model-missing``, ``version-missing``, ``tensor-missing``.
            IntegrityError: ``object-missing``, ``object-corrupt``, ``document-damaged``.
        """
        from ckpt.service.pull import pull_state, pull_tensors

        version = self.get(ref)
        if tensors is None:
            return pull_state(self._store, self._registry, version, device, all, progress, mmap)
        return pull_tensors(self._store, self._registry, version, tensors, device, progress, mmap)

    def load(
        self,
        ref: VersionLike,
        *,
        trust: Iterable[TrustLike] = (),
        device: DeviceMap = None,
        require: str | None = None,
    ) -> nn.Module:
        """The module as it was pushed, rebuilt without pickle and proven.

        Every tensor's digest is checked; capturing the rebuilt module must give exactly the
        structure that was pushed: the same tensors, ties, flags and attributes; and where inputs
        were recorded, its outputs on them are compared. ``docs/verification.md`` says what each
        verdict proves.

        Args:
            trust: classes, or names of modules, that may be imported; ``torch.nn`` always is.
            device: as in :meth:`pull`.
            require: the least verdict to accept.

        Raises:
            TrustError: ``class-not-allowed``, naming all classes; nothing was imported.
            IntegrityError: ``structure-differs``, ``class-failed``, ``outputs-differ``,
                ``verdict-too-low``.
            UsageError: ``no-module`` when the version is no module.
        """
        from ckpt.service.load import load_module, warn_of_changes

        version = self.get(ref)
        module, report = load_module(self._store, self._registry, version, trust, device, require)
        warn_of_changes(report)
        return module

    def verify(
        self,
        ref: VersionLike,
        *,
        trust: Iterable[TrustLike] = (),
        device: DeviceMap = None,
        require: str | None = None,
    ) -> Report:
        """Load a version, drop it, and say what was proven; raises where :meth:`load` would."""
        from ckpt.service.load import load_module

        return load_module(self._store, self._registry, self.get(ref), trust, device, require)[1]

    def load_into(self, module: nn.Module, ref: VersionLike) -> Report:
        """Fill a module of yours with a version's weights: strict, without casts, ties kept.

        One common wrapper prefix (``module.``, ``_orig_mod.``) on either side is accepted, and
        reported. Nothing is changed unless everything fits.

        Raises:
            IntegrityError: ``keys-mismatch``, ``shape-mismatch``, ``dtype-mismatch``,
                ``not-writable``, ``ties-differ``.
        """
        from ckpt.service.load import load_into

        return load_into(self._store, self._registry, self.get(ref), module)

    def pull_file(
        self,
        ref: VersionLike,
        destination: PathLike,
        *,
        tensors: Patterns | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Version:
        """Write a version as a ``.safetensors`` file, checked, then named.

        Args:
            tensors: only those whose names match, such as ``"encoder.*"``; only their bytes are
                read.

        Raises:
            UsageError: ``pickle-name`` for the name of a pickle.
            ConflictError: ``exists`` without ``force``; TrustError: ``symlink``.
        """
        from ckpt.service.pull import pull_file, pull_tensors_file

        version, path = self.get(ref), Path(destination)
        ours = self._store, self._registry
        if tensors is None:
            pull_file(*ours, version, path, force=force, progress=progress)
        else:
            pull_tensors_file(*ours, version, path, tensors, force=force, progress=progress)
        return version

    @property
    def _changes(self) -> Changes:
        check_newest(self._store, self._registry)
        return self._registry.changes

    def tag(self, ref: VersionLike, alias: str, expect: str | None = None) -> Version:
        """Make ``alias`` name a version.

        Raises:
            ConflictError: ``alias-moved`` when ``expect`` is given and the alias does not name
                that version now.
        """
        check_alias(alias)
        reference = self._reference(ref)
        expected = None if expect is None else parse_reference(expect)
        event, version = self._changes.tag(reference, alias, expected, author())
        acknowledge_event(self._store, self._registry, event)
        return version

    def untag(self, ref: str) -> None:
        """Remove an alias, given as ``model:alias``."""
        reference = parse_reference(ref)
        if reference.alias is None or reference.back:
            raise UsageError(
                "reference-invalid", f'"{ref}" does not name an alias', hint="write model:alias"
            )
        event = self._changes.untag(reference, author())
        acknowledge_event(self._store, self._registry, event)

    def annotate(
        self,
        ref: VersionLike,
        *,
        metrics: Mapping[str, float] | None = None,
        labels: Mapping[str, str] | None = None,
        remove: str | Iterable[str] = (),
    ) -> Version:
        """Set metrics and labels of a version, and remove some by key."""
        event, version = self._changes.annotate(
            self._reference(ref),
            check_metrics(metrics),
            check_labels(labels),
            sorted({remove} if isinstance(remove, str) else set(remove)),
            author(),
        )
        acknowledge_event(self._store, self._registry, event)
        return version

    def rm(self, ref: VersionLike, *, dry_run: bool = False) -> Version:
        """Remove a version; its bytes go with a later ``gc``. Returns what was removed.

        Args:
            dry_run: only look whether it would be.

        Raises:
            ConflictError: ``aliased`` while an alias names it.
        """
        try:
            version = self.get(ref)
        except NotFoundError:
            # "It is gone" may repeat an rm whose process died before its event was copied.
            copy_pending(self._store, self._registry)
            raise
        changes = self._changes
        if not dry_run:
            event = changes.remove(version.push, author())
            acknowledge_event(self._store, self._registry, event)
        elif version.aliases:
            raise aliased(version.reference, f"{version.model}:{version.aliases[0]}")
        return version

    def _reference(self, ref: VersionLike) -> Reference:
        return parse_reference(ref.reference if isinstance(ref, Version) else ref)

    def close(self) -> None:
        """Close the registry and the store; what is called afterwards is refused with the
        UsageError ``repository-closed``."""
        try:
            self._registry.close()
        finally:
            self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<ckpt.Repository {self.location.root}>"
