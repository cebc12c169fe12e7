"""``ckpt init``: make a repository."""

from __future__ import annotations

from dataclasses import replace

import click

from ckpt.cli.command import Settings, command
from ckpt.cli.render import print_json
from ckpt.core.errors import UsageError
from ckpt.core.printable import escape


@command("init", short_help="Make a repository, unless there is one.")
@click.argument("folder", type=click.Path(), metavar="[FOLDER]", required=False)
@click.option("--registry", metavar="URL", help="postgresql+psycopg://… in place of a file.")
@click.option("--store", metavar="URL", help="s3://bucket/prefix in place of a folder.")
@click.option("--endpoint", metavar="URL", help="Of an S3 server that is not AWS.")
@click.option("--region", help="Of the bucket; default: the AWS configuration.")
def init(
    settings: Settings,
    folder: str | None,
    registry: str | None,
    store: str | None,
    endpoint: str | None,
    region: str | None,
) -> None:
    """Make a repository in FOLDER/.ckpt (default: here, whatever $CKPT_REPO is), unless there is
    one.

    With the same two addresses, everybody in a team has the same repository. Credentials are
    never written down: the AWS configuration has those of S3, PGPASSWORD or ~/.pgpass the other.
    """
    from ckpt.service.config import locate
    from ckpt.service.opening import make_repository, open_repository
    from ckpt.service.places import S3Options, as_address

    if folder and settings.repo:
        raise UsageError("usage", "FOLDER and --repo both say where", hint="give one of them")
    chosen = folder or settings.repo or "."
    location = locate(chosen)
    existed = location.exists
    if not existed:
        location = replace(
            location,
            registry_place=location.registry_place
            if registry is None
            else as_address(registry, "registry"),
            store_place=location.store_place if store is None else as_address(store, "store"),
            options=S3Options(endpoint, region),
        )
    elif registry or store or endpoint or region:
        raise UsageError(
            "usage", f"{location.root} is a repository already", hint="edit its config.toml"
        )
    with open_repository(chosen) if existed else make_repository(location) as repository:
        root = repository.location.root.resolve()
    if settings.as_json:
        print_json({"repository": str(root), "created": not existed})
    else:
        click.echo(f"{'found' if existed else 'made'} the repository {escape(str(root), 4000)}")


COMMANDS = {"init": init}
