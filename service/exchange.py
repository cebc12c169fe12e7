"""What a repository takes from the checkpoints of other programs, and what it gives them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ckpt.core.errors import CkptError, CkptWarning, UsageError
from ckpt.core.names import check_aliases
from ckpt.core.printable import escape
from ckpt.core.records import Version
from ckpt.registry.registry import Registry
from ckpt.service.acknowledge import acknowledge_push
from ckpt.service.config import Location
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.service.exporting import Exported, ExportFormat
    from ckpt.service.importing import Checkpoint, Imported
    from ckpt.service.push import Described, Said
    from ckpt.service.unpickling import Unpickler
    from ckpt.service.upload import Progress


class Exchange:
    """The part of a :class:`~ckpt.Repository` that imports and exports."""

    location: Location
    _registry: Registry
    _store: Store

    if TYPE_CHECKING:
        # The repository's own.
        def get(self, ref: str | Version) -> Version: ...
        def tag(self, ref: str | Version, alias: str, expect: str | None = None) -> Version: ...
        def _push(
            self, described: Described, said: Said, compress: str, progress: Progress | None
        ) -> Version: ...
        def _said(
            self,
            model: str,
            step: int | None,
            metrics: Mapping[str, float] | None,
            labels: Mapping[str, str] | None,
            alias: str | Iterable[str],
            message: str | None,
            parent: str | Version | None,
            run: str | None,
        ) -> Said: ...

    def import_files(
        self,
        path: str | os.PathLike[str],
        model: str,
        *,
        step: int | None = None,
        labels: Mapping[str, str] | None = None,
        alias: str | Iterable[str] = (),
        message: str | None = None,
        run: str | None = None,
        dry_run: bool = False,
        progress: Progress | None = None,
    ) -> list[Imported]:
        """Store a checkpoint that another program wrote as a new version of ``model``, or each
        checkpoint in a folder as one, in the order of their steps.

        A checkpoint is a ``.pt``, ``.pth``, ``.bin`` or ``.ckpt`` file of ``torch.save``, a folder
        of ``torch.distributed.checkpoint``, a folder such as ``save_pretrained`` writes, or a
        ``.safetensors`` file. What needs unpickling is read by another process, with
        ``weights_only=True`` and nothing wider. What the run has already, with these labels, is
        answered, so that an import may be run again. Of several checkpoints, one that is refused
        does not hold up the others; its record says why.

        Args:
            step: of a single checkpoint; otherwise what Lightning wrote in it, or its name says.
            alias: moves to the last of the versions.
            message: ``imported from <name>`` by default.
            dry_run: only say what would be imported.

        Raises:
            TrustError: ``pickle-refused``, naming the class that would be needed.
            IntegrityError: ``checkpoint-damaged``; UsageError: ``no-checkpoint``,
                ``cannot-store``. For the rest see :meth:`push`.
        """
        from ckpt.service.importing import Imported, find_checkpoints, look_inside
        from ckpt.service.unpickling import Unpickler

        said = self._said(model, step, None, labels, (), message, None, run)
        aliases = check_aliases(alias)
        found = find_checkpoints(Path(path))
        alone = found[0].path == Path(path)
        if step is not None and not alone:
            raise UsageError(
                "usage", "several checkpoints have no single step", hint="leave it out"
            )
        done = []
        with Unpickler() as unpickler:
            if dry_run or not alone:
                # The steps within decide the order, and so which version is the newest.
                found = look_inside(found, unpickler, self.location.local_places)
            if dry_run:
                return [Imported(one) for one in found]
            for one in found:
                done.append(self._import(one, unpickler, said, progress))
                if alone and (refused := done[0].checkpoint.refused) is not None:
                    raise refused
        last = next((one.version for one in reversed(done) if one.version is not None), None)
        if last is not None:
            for name in aliases:
                self.tag(last, name)
        return done

    def export_file(
        self,
        ref: str | Version,
        destination: str | os.PathLike[str],
        *,
        format: ExportFormat | None = None,
        force: bool = False,
        progress: Progress | None = None,
    ) -> Exported:
        """Write a version for other programs, and read it back before it gets its name.

        Args:
            format: ``pt`` is one file of ``torch.save`` that loads with ``weights_only=True``,
                ``safetensors`` the tensors alone, ``dcp`` a folder of
                ``torch.distributed.checkpoint``, ``hf`` the folder that was pushed. By default
                what the suffix of ``destination`` says.
            force: replace a file; folders are never replaced.

        Raises:
            UsageError: ``cannot-export`` when the format cannot carry the state.
            ConflictError: ``exists``; IntegrityError: ``export-differs``.
        """
        from ckpt.service.exporting import export_version

        version, path = self.get(ref), Path(destination)
        return export_version(
            self._store, self._registry, version, path, format, force=force, progress=progress
        )

    def _import(
        self, one: Checkpoint, unpickler: Unpickler, said: Said, progress: Progress | None
    ) -> Imported:
        from ckpt.service.importing import Imported, known_version, opened

        if one.refused is not None:
            return Imported(one)
        with ExitStack() as stack:
            try:
                opening = opened(one, unpickler, self.location.local_places)
                described, one = stack.enter_context(opening)
            except CkptError as error:
                return Imported(replace(one, refused=error))
            for note in one.notes:
                said_of = f"{escape(one.path.name, 80)}: {note}"
                warnings.warn(said_of, CkptWarning, stacklevel=3)
            step = one.step if said.step is None else said.step
            one = replace(one, step=step, labels={**one.labels, **said.labels})
            message = said.message or f"imported from {escape(one.path.name, 200)}"
            own = replace(said, step=step, labels=one.labels, message=message)
            known = known_version(self._store, self._registry, own, described)
            if known is not None:
                acknowledge_push(self._store, self._registry, known.push)
                return Imported(one, known, known=True)
            return Imported(one, self._push(described, own, "auto", progress))
