"""``ckpt ls``: models, or the classes that their modules name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from itertools import pairwise
from typing import TYPE_CHECKING

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import age, print_json, table, version_json
from ckpt.core.sizes import size

if TYPE_CHECKING:
    from ckpt.core.records import ClassUse


@command("ls", short_help="List the models.")
@click.option("--classes", is_flag=True, help="List the classes that modules are made of.")
def ls(settings: Settings, classes: bool) -> None:
    """List the models, each with its newest version, or the classes that their modules name."""
    with settings.open() as repository:
        if classes:
            _list_classes(settings, repository.classes())
            return
        models = repository.models()
    if settings.as_json:
        print_json(
            [
                {
                    "name": model.name,
                    "versions": model.versions,
                    "newest": model.newest and version_json(model.newest),
                }
                for model in models
            ]
        )
        return
    rows = []
    for model in models:
        newest = model.newest
        cells = [model.name, str(model.versions)]
        if newest is None:
            cells += ["", "", "", ""]
        else:
            cells += [newest.reference, size(newest.nbytes), age(newest.created_at)]
            cells.append(" ".join(newest.aliases))
        rows.append(cells)
    if rows:
        head = ["MODEL", "VERSIONS", "NEWEST", "SIZE", "CREATED", "ALIASES"]
        click.echo(table(head, rows, right=["VERSIONS", "SIZE"]))
    else:
        settings.say("no models yet; begin with `ckpt push model.safetensors NAME`")


def _list_classes(settings: Settings, classes: list[ClassUse]) -> None:
    """One row for every source that a class had, in the order of first use."""
    if settings.as_json:
        print_json([{**asdict(one), "versions": list(one.versions)} for one in classes])
        return
    rows = []
    for before, one in pairwise([None, *classes]):
        assert one is not None
        changed = before is not None and before.reference == one.reference
        source = (one.source_digest or "")[:8]
        if changed and before is not None and before.source_digest != one.source_digest:
            source += ", changed"
        package = " ".join(part for part in (one.package, one.version) if part)
        rows.append([one.reference, package, source, _spans(one.versions)])
    if rows:
        click.echo(table(["CLASS", "FROM", "SOURCE", "VERSIONS"], rows))
    else:
        settings.say("no modules yet; push one from Python: repo.push(net, NAME)")


def _spans(references: Iterable[str]) -> str:
    """``mlp@1-3 mlp@7``: neighbouring numbers of a model as one span."""
    spans: list[tuple[str, int, int]] = []
    for reference in references:
        model, _, number = reference.rpartition("@")
        value = int(number)
        if spans and spans[-1][0] == model and spans[-1][2] == value - 1:
            spans[-1] = (model, spans[-1][1], value)
        else:
            spans.append((model, value, value))
    return " ".join(
        f"{model}@{low}" if low == high else f"{model}@{low}-{high}" for model, low, high in spans
    )


COMMANDS = {"ls": ls}
