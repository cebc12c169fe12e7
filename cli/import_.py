"""``ckpt import``: checkpoints that other programs wrote, one version each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.push import pairs
from ckpt.cli.render import count, print_json, progress, table, version_json
from ckpt.core.errors import CkptError
from ckpt.core.names import check_aliases, check_model, check_text
from ckpt.core.printable import escape
from ckpt.core.sizes import size

if TYPE_CHECKING:
    from ckpt.service.importing import Checkpoint, Imported


@command("import", short_help="Store checkpoints of other programs.")
@click.argument("path", type=click.Path(), metavar="PATH")
@click.argument("model", shell_complete=complete_models, metavar="MODEL[:ALIAS]")
@click.option("--step", type=int, help="Training step of a single checkpoint.")
@click.option("-m", "--message", help="What these versions are.")
@click.option("--label", "labels", multiple=True, metavar="KEY=TEXT", help="Repeatable.")
@click.option("--run", help="Training job. Default: main.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be imported.")
def import_(
    settings: Settings,
    path: str,
    model: str,
    step: int | None,
    message: str | None,
    labels: tuple[str, ...],
    run: str | None,
    dry_run: bool,
) -> None:
    """Store the checkpoint PATH as a version of MODEL: a .pt, .pth, .bin or .ckpt file, a folder
    of torch.distributed.checkpoint or of save_pretrained; or a folder of these as one version
    each, in the order of their steps.

    Pickles are read by another process with weights_only=True. What the run has already, with
    these labels, is answered, so that it may be run again. Prints the references on stdout, one
    a line.
    """
    name, colon, alias = model.partition(":")
    check_model(name)
    aliases = check_aliases(alias) if colon else ()
    if dry_run:
        _foresee(settings, Path(path), name)
        return
    _look(Path(path))
    with settings.open(create=True) as repository, progress(settings, "import") as meter:
        done = repository.import_files(
            path,
            name,
            step=step,
            labels=dict(pairs(labels, "--label")),
            alias=aliases,
            message=message and check_text("the message", message),
            run=run,
            progress=meter,
        )
    for one in done:
        settings.say(_said(one))
    if settings.as_json:
        print_json({"dry_run": False, "checkpoints": [_as_json(one) for one in done]})
    else:
        for version in [one.version for one in done if one.version is not None]:
            click.echo(version.reference)
    _end(done)


def _look(path: Path) -> None:
    """Refuse what is no checkpoint before a repository is made for it."""
    from ckpt.service.importing import find_checkpoints

    find_checkpoints(path)


def _foresee(settings: Settings, path: Path, model: str) -> None:
    """Say what would be imported; makes no repository."""
    from ckpt.service.importing import Imported, find_checkpoints, look_inside
    from ckpt.service.unpickling import Unpickler

    with Unpickler() as unpickler:
        found = look_inside(find_checkpoints(path), unpickler, kept=())
    if settings.as_json:
        foreseen = [_as_json(Imported(one)) for one in found]
        print_json({"dry_run": True, "checkpoints": foreseen})
        return
    rows = [_row(one) for one in found]
    click.echo(table(("FILE", "STEP", "SIZE", "NOTE"), rows, right=("STEP", "SIZE")))
    fit = sum(one.refused is None for one in found)
    settings.say(f"would import {count(fit, 'checkpoint')} into {model}; nothing was changed")


def _row(one: Checkpoint) -> tuple[str, ...]:
    note = "" if one.refused is None else f"not importable: {one.refused}"
    step = "-" if one.step is None else str(one.step)
    return one.path.name, step, size(one.nbytes), note


def _said(one: Imported) -> str:
    name = one.checkpoint.path.name
    if one.version is None:
        return f"{name}: not imported: {one.checkpoint.refused}"
    verb = "was there already as" if one.known else "is"
    return f"{name}: {verb} {one.version.reference}"


def _as_json(one: Imported) -> dict[str, Any]:
    checkpoint = one.checkpoint
    refused = checkpoint.refused
    return {
        "path": escape(str(checkpoint.path), limit=4096),
        "step": checkpoint.step,
        "labels": checkpoint.labels,
        "nbytes": checkpoint.nbytes,
        "refused": None if refused is None else {"code": refused.code, "message": str(refused)},
        "known": one.known,
        "version": None if one.version is None else version_json(one.version),
    }


def _end(done: Sequence[Imported]) -> None:
    """Fail when a checkpoint was refused; what is no checkpoint at all may lie beside them."""
    refused = [one.checkpoint.refused for one in done]
    failed = [error for error in refused if error is not None and error.code != "no-checkpoint"]
    if failed:
        raise CkptError(
            "import-incomplete",
            f"{count(len(failed), 'checkpoint')} could not be imported",
            hint=f"see above why; {count(sum(one.version is not None for one in done), 'other')} "
            "came in",
        )


COMMANDS = {"import": import_}
