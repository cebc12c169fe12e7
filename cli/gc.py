"""``ckpt gc`` and ``ckpt du``: free what no version needs, and see what versions cost."""

from __future__ import annotations

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import count, print_json, table
from ckpt.core.sizes import size


@command("gc")
@click.option(
    "--grace",
    default="7d",
    show_default=True,
    metavar="DURATION",
    help="How long to keep what is unneeded: 7d, 12h, 30m (minutes), 0.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Only say what would be freed.")
@click.option(
    "--allow",
    multiple=True,
    type=click.Choice(["empty", "unknown", "much"]),
    help="Overrule this reason to refuse. Repeatable.",
)
@click.option("--repack", is_flag=True, help="Write packs again of which little is needed.")
def gc(settings: Settings, grace: str, dry_run: bool, allow: tuple[str, ...], repack: bool) -> None:
    """Free the bytes that no version needs.

    The grace begins with the first gc that sees that a pack is unneeded: run it regularly. Safe
    beside pushes, pulls and other collectors.
    """
    from ckpt.service.gc import gc_summary

    with settings.open() as repository:
        collected = repository.gc(grace=grace, dry_run=dry_run, allow=allow, repack=repack)
    for warning in collected.warnings:
        settings.say(f"warning: {warning}")
    if settings.as_json:
        print_json(gc_summary(collected))
        return
    verb = "would free" if dry_run else "freed"
    click.echo(f"{verb} {size(collected.freed_bytes)} in {count(len(collected.freed), 'pack')}")
    if collected.repacked:
        done = "would be written" if dry_run else "written"
        settings.say(f"{count(len(collected.repacked), 'mostly dead pack')} {done} again")
    if collected.orphans:
        settings.say(
            f"{verb} {size(collected.orphan_bytes)} in "
            f"{count(len(collected.orphans), 'unfinished pack')} of pushes that ended"
        )
    if collected.finished:
        settings.say(
            f"{verb} {size(collected.finished_bytes)} in {count(len(collected.finished), 'pack')} "
            "that an earlier collection had left"
        )
    if collected.waiting:
        settings.say(
            f"unneeded: {size(collected.waiting_bytes)} in {count(len(collected.waiting), 'pack')} until the end "
            f"of the grace of {grace}; --grace 0 frees it now"
        )
    if collected.unknown:
        settings.say(f"left alone: {count(len(collected.unknown), 'pack')} of unknown pushes")


@command("du", short_help="Show what removing each version would free.")
def du(settings: Settings) -> None:
    """Show what the store holds, and what removing each version would free."""
    with settings.open() as repository:
        usage = repository.du()
    if settings.as_json:
        print_json(
            {
                "stored": usage.stored,
                "reclaimable": usage.reclaimable,
                "versions": [
                    {"reference": one.reference, "unique": one.unique, "shared": one.shared}
                    for one in usage.versions
                ],
            }
        )
        return
    rows = [[one.reference, size(one.unique), size(one.shared)] for one in usage.versions]
    if rows:
        head = ["VERSION", "REMOVING IT FREES", "SHARED"]
        click.echo(table(head, rows, right=["REMOVING IT FREES", "SHARED"]))
    click.echo(f"{size(usage.stored)} stored, {size(usage.reclaimable)} of it unneeded")


COMMANDS = {"gc": gc, "du": du}
