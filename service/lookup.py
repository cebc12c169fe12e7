"""What can be asked of a repository; the registry alone answers, but for statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckpt.core.comparisons import check_order, parse_comparisons
from ckpt.core.errors import NotFoundError
from ckpt.core.names import check_count, check_model
from ckpt.core.records import ClassUse, Environment, Model, Version
from ckpt.core.references import parse_reference
from ckpt.registry.registry import Registry
from ckpt.storage.store import Store

if TYPE_CHECKING:
    from ckpt.core.documents import Document
    from ckpt.service.diff import Diff
    from ckpt.service.inspect import ModuleDescription
    from ckpt.service.upload import Progress

VersionLike = str | Version


class Lookup:
    """The part of a :class:`~ckpt.Repository` that answers questions."""

    _registry: Registry
    _store: Store

    def get(self, ref: VersionLike) -> Version:
        """The version that a reference means; NotFoundError when there is none."""
        if isinstance(ref, Version):
            found = self._registry.queries.by_push(ref.push)
            if found is None:
                raise NotFoundError("version-missing", f"{ref.reference} was removed")
            return found
        return self._registry.queries.get(parse_reference(ref))

    def find(
        self,
        model: str,
        where: str = "",
        *,
        order_by: str | None = None,
        limit: int = 100,
    ) -> list[Version]:
        """Versions of a model that match, such as ``where="val_loss < 0.3 and step >= 1000"``.

        Args:
            where: comparisons of metrics, or ``step``, with numbers, joined by ``and``; what a
                version lacks, or is not finite, never matches.
            order_by: a metric or ``step``, descending after a ``-`` (``"-accuracy"``), versions
                that lack it left out; by default the newest come first.

        Raises:
            UsageError: ``where-invalid``, ``name-invalid``, ``limit-invalid``.
            NotFoundError: ``model-missing``.
        """
        order = None if order_by is None else check_order(order_by)
        comparisons = parse_comparisons(where)
        most = check_count("limit", limit)
        return self._registry.queries.find(check_model(model), comparisons, order, most)

    def log(self, model: str, *, before: int | None = None, limit: int = 100) -> list[Version]:
        """Versions of a model, newest first; ``before`` a number for the next page.

        Raises:
            UsageError: ``name-invalid``, ``before-invalid``, ``limit-invalid``.
            NotFoundError: ``model-missing``.
        """
        first = None if before is None else check_count("before", before)
        return self._registry.queries.log(check_model(model), first, check_count("limit", limit))

    def models(self) -> list[Model]:
        """All models by name, each with its newest version."""
        return self._registry.queries.models()

    def document(self, ref: VersionLike) -> Document:
        """The document of a version, which describes all of it but the bytes."""
        return self._registry.queries.document(self.get(ref))

    def describe(self, ref: VersionLike) -> ModuleDescription:
        """The module tree of a version and the classes that it names, importing none of them.

        Raises:
            UsageError: ``no-module`` when the version is no module.
        """
        from ckpt.service.inspect import describe_module
        from ckpt.service.load import module_document

        return describe_module(module_document(self._registry, self.get(ref)))

    def classes(self, model: str | None = None) -> list[ClassUse]:
        """Every class that versions name, of one model or of all, and which versions do."""
        return self._registry.queries.classes(None if model is None else check_model(model))

    def environment(self, ref: VersionLike) -> Environment:
        """What a version was pushed on: devices, library versions, flags, host."""
        return self._registry.queries.environment(self.get(ref))

    def diff(
        self,
        before: VersionLike,
        after: VersionLike,
        *,
        stats: bool = False,
        progress: Progress | None = None,
    ) -> Diff:
        """What differs between two versions, also of different models: tensors, ties, modules,
        plain values, metrics and labels. The registry alone says so; no tensor is read.

        Args:
            stats: read the tensors whose values changed, a few chunks at a time, and say how far
                they lie apart.

        Raises:
            UsageError: ``no-weights`` when one is a folder of files.
            IntegrityError: ``document-damaged``; with ``stats`` also ``object-missing``,
                ``object-corrupt``.
        """
        from ckpt.service.diff import compare

        pair = self.get(before), self.get(after)
        return compare(self._store, self._registry, *pair, statistics=stats, progress=progress)

    def unnamed_values(self, ref: VersionLike) -> int:
        """How many plain values of a version a ``.safetensors`` file would not carry."""
        from ckpt.service.pull import unnamed_values

        return unnamed_values(self.document(ref))
