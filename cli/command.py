"""What every command shares: its common options, the settings they make, opening the repository."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckpt.core.errors import CkptError
from ckpt.core.printable import escape

if TYPE_CHECKING:
    from ckpt.service.repository import Repository

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Settings:
    """What the common options say, wherever on the line they stand."""

    repo: str | None = None
    as_json: bool = False
    quiet: bool = False
    debug: bool = False

    def open(self, *, create: bool = False) -> Repository:
        """Open the repository that is meant."""
        from ckpt.service.opening import open_repository

        return open_repository(self.repo, create=create)

    def say(self, text: str) -> None:
        """Tell the person something on stderr; stdout is for results."""
        if not self.quiet:
            click.echo(escape(text, limit=4000), err=True)


def _setter(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def set_value(context: click.Context, _: click.Parameter, value: Any) -> None:
        if value not in (None, False):
            setattr(context.ensure_object(Settings), name, value)

    return set_value


def _tell_steps(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from ckpt.cli.steps import tell_steps

        tell_steps()


def _option(name: str, *declarations: str, **attributes: Any) -> Callable[[F], F]:
    return click.option(*declarations, expose_value=False, callback=_setter(name), **attributes)


def common_options(function: F) -> F:
    """Add the options that every command takes."""
    repo = "The repository: a folder. Default: $CKPT_REPO, the nearest .ckpt/, or your own."
    function = _option("debug", "--debug", is_flag=True, help="Show tracebacks.")(function)
    function = click.option(
        "-v",
        "--verbose",
        is_flag=True,
        expose_value=False,
        callback=_tell_steps,
        help="Tell each step, with the seconds.",
    )(function)
    function = _option("quiet", "-q", "--quiet", is_flag=True, help="Say only results.")(function)
    function = _option("as_json", "--json", is_flag=True, help="Print JSON.")(function)
    return _option("repo", "-r", "--repo", type=click.Path(), metavar="DIR", help=repo)(function)


def paths_option(help_text: str) -> Callable[[F], F]:
    """The option ``--path``, for folders that are no part of ``sys.path``."""
    return click.option(
        "--path", "paths", type=click.Path(), multiple=True, metavar="DIR", help=help_text
    )


def complete_models(context: click.Context, _: click.Parameter, begun: str) -> list[str]:
    """The names of models that begin so, for a shell; none where there is no repository."""
    settings = context.find_object(Settings) or Settings()
    try:
        with settings.open() as repository:
            return [one.name for one in repository.models() if one.name.startswith(begun)]
    except CkptError:
        return []


def command(name: str, **attributes: Any) -> Callable[[Callable[..., Any]], click.Command]:
    """A command whose function gets the settings first."""

    def wrap(function: Callable[..., Any]) -> click.Command:
        make: Callable[[Callable[..., Any]], click.Command] = click.command(name, **attributes)
        return make(common_options(click.pass_obj(function)))

    return wrap
