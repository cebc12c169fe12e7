"""``ckpt prune`` and ``ckpt events``: remove what no rule keeps, and see who did what."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ckpt.cli.command import Settings, command, complete_models
from ckpt.cli.confirm import confirm
from ckpt.cli.render import count, print_json, table, version_json
from ckpt.core.sizes import size

if TYPE_CHECKING:
    from ckpt.service.retention import Pruned


@command("prune")
@click.argument("model", shell_complete=complete_models)
@click.option("--keep-last", type=click.IntRange(1), metavar="N", help="The newest N.")
@click.option(
    "--keep-best",
    multiple=True,
    metavar="METRIC:min|max:N",
    help="The N best by a metric. Repeatable.",
)
@click.option(
    "--keep-every",
    type=click.IntRange(1),
    metavar="N",
    help="One per N steps: the first saved, and multiples.",
)
@click.option("--keep-within", metavar="7d", help="What is younger: 2w, 7d, 12h, 30m (minutes).")
@click.option("--save-policy", "save", is_flag=True, help="Use these rules the next time too.")
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be removed; save nothing.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
def prune(
    settings: Settings,
    model: str,
    keep_last: int | None,
    keep_best: tuple[str, ...],
    keep_every: int | None,
    keep_within: str | None,
    save: bool,
    dry_run: bool,
    yes: bool,
) -> None:
    """Remove the versions of MODEL that no rule keeps.

    Rules look at each run by itself. Its newest version, every aliased one, and what a live run
    resumed from stay. Without rules, those that were saved are used. The bytes go with the next gc.
    """
    rules = [f"best:{rule}" for rule in keep_best]
    for word, value in (("last", keep_last), ("every", keep_every), ("within", keep_within)):
        rules += [] if value is None else [f"{word}:{value}"]
    with settings.open() as repository:
        foreseen = repository.prune(model, keep=rules, dry_run=True)
        if foreseen.victims and not dry_run:
            victims = f"{count(len(foreseen.victims), 'version')} of {model}"
            confirm(f"Remove {victims} for ever?", victims, yes=yes)
        pruned = foreseen
        if not dry_run:
            pruned = repository.prune(model, keep=rules, save=save)
    _tell(settings, pruned)
    if save and dry_run:
        settings.say("a dry run saves no rules")


def _tell(settings: Settings, pruned: Pruned) -> None:
    if settings.as_json:
        print_json(
            {
                "dry_run": pruned.dry_run,
                "rules": list(pruned.rules),
                "victims": [version_json(version) for version in pruned.victims],
                "kept": {version.reference: list(why) for version, why in pruned.kept},
                "freed_bytes": pruned.freed_bytes,
            }
        )
        return
    verb = "would remove" if pruned.dry_run else "removed"
    if pruned.victims:
        why = f"kept by none of {', '.join(pruned.rules)}"
        rows = [[version.reference, size(version.nbytes), why] for version in pruned.victims]
        click.echo(table([verb.upper(), "SIZE", "WHY"], rows, right=["SIZE"]))
    settings.say(
        f"{verb} {count(len(pruned.victims), 'version')} of {pruned.model}; "
        f"gc frees {size(pruned.freed_bytes)} of it"
    )


@command("events", short_help="List who did what to what.")
@click.option("--since", metavar="WHEN", help="7d, 12h, or a date such as 2026-11-24.")
@click.option(
    "-n",
    "--number",
    "limit",
    type=click.IntRange(1),
    metavar="N",
    default=100,
    show_default=True,
    help="How many.",
)
def events(settings: Settings, since: str | None, limit: int) -> None:
    """List who did what to what, newest first by the clock of the registry."""
    with settings.open() as repository:
        found = repository.events(since=since, limit=limit)
    if settings.as_json:
        print_json(
            [
                {
                    "id": event.id,
                    "kind": event.kind,
                    "model": event.model,
                    "author": event.author,
                    "time": event.time.isoformat(),
                    "said": event.said,
                }
                for event in found
            ]
        )
        return
    rows = [
        [f"{event.time:%Y-%m-%d %H:%M:%S}", event.author, event.kind, event.model or "", event.text]
        for event in found
    ]
    click.echo(table(["TIME (UTC)", "WHO", "WHAT", "MODEL", "SAID"], rows))


COMMANDS = {"prune": prune, "events": events}
