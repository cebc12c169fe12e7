"""``ckpt``: finds the command, runs it, and turns every failure into one line and an exit code."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import traceback
import warnings
from functools import partial
from types import FrameType
from typing import NoReturn

import click

from ckpt.cli.command import Settings, common_options
from ckpt.core.errors import CkptError, CkptWarning, from_os_error
from ckpt.core.printable import escape

# Command -> the module in ckpt.cli that has it.
COMMANDS = {
    "init": "init",
    "push": "push",
    "pull": "pull",
    "ls": "listing",
    "log": "log",
    "show": "show",
    "inspect": "show",
    "diff": "diff",
    "copy": "copy",
    "import": "import_",
    "export": "export",
    "verify": "verify",
    "tag": "names",
    "untag": "names",
    "label": "names",
    "rm": "rm",
    "fsck": "fsck",
    "prune": "prune",
    "gc": "gc",
    "du": "gc",
    "events": "prune",
    "doctor": "doctor",
    "db": "db",
    "registry": "registry",
    "completion": "completion",
}
_HIDDEN = {"inspect"}
_SAFE = "nothing is left half-done, it is safe to run it again"


class _Commands(click.Group):
    """Commands that are imported when they are asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if name not in _HIDDEN]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            import difflib

            near = difflib.get_close_matches(cmd_name, COMMANDS, 1)
            if not near or ctx.resilient_parsing:
                return None
            ctx.fail(f"No such command {cmd_name!r}. Did you mean {near[0]!r}?")
        module = importlib.import_module(f"ckpt.cli.{COMMANDS[cmd_name]}")
        found = module.COMMANDS[cmd_name]
        assert isinstance(found, click.Command)
        return found


def _print_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        click.echo(f"ckpt {version('ckpt-registry')}")
        context.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_version,
    help="Show the version and exit.",
)
@common_options
def ckpt() -> None:
    """Store PyTorch checkpoints once, find them again, and get back exactly what you stored.

    Begin with: ckpt push model.safetensors net
    """


class _Terminated(BaseException):
    """SIGTERM arrived; an exception, so that everything is cleaned up on the way out."""


def _on_terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise _Terminated


def main() -> None:
    """The entry point of the command ``ckpt``."""
    signal.signal(signal.SIGTERM, _on_terminate)
    _open_closed_streams()
    settings = Settings()
    warnings.showwarning = partial(_warn, settings)
    try:
        status = _run(settings)
        sys.stdout.flush()
    except BrokenPipeError:
        _discard_output()
        status = 141
    except (KeyboardInterrupt, click.Abort):
        status = _fail("interrupted", f"stopped by you; {_SAFE}", 130)
    except _Terminated:
        status = _fail("terminated", f"stopped; {_SAFE}", 143)
    except click.ClickException as error:
        status = _usage(error)
    except CkptError as error:
        status = _ckpt_error(error, settings)
    except OSError as error:
        # Every call on a path is typed where it is made; what is left is the output.
        _discard_output()
        status = _ckpt_error(from_os_error(error, "writing the output"), settings)
    except Exception as error:  # noqa: BLE001  the last resort: a bug, told in one line
        if settings.debug:
            traceback.print_exc()
        said = escape(f"{type(error).__name__}: {error}")
        status = _fail("bug", f"{said}; please report it, with the output of --debug", 70)
    sys.exit(status)


def _warn(settings: Settings, message: Warning | str, category: type[Warning], *_: object) -> None:
    """A warning of ckpt in one line; those of libraries are for who debugs."""
    if settings.debug or issubclass(category, CkptWarning):
        settings.say(f"warning: {message}")


def _discard_output() -> None:
    """Python would complain once more when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _open_closed_streams() -> None:
    """Give streams that were closed (``>&-``) to the null device, before a file of the store gets
    their number and with it what somebody prints."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  open until the end


def _run(settings: Settings) -> int:
    """Run the command. Not by click's own ``main``, which has its own words for signals and
    closed pipes; only completion is left to it."""
    if "_CKPT_COMPLETE" in os.environ:
        ckpt.main(prog_name="ckpt")
    try:
        with ckpt.make_context("ckpt", sys.argv[1:], obj=settings) as context:
            ckpt.invoke(context)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.exceptions.Exit as stop:
        return stop.exit_code
    return 0


def _usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "ckpt"
    said = escape(" ".join(error.format_message().split())).rstrip(".")
    see = " See" if said.endswith("?") else "; see"
    return _fail("usage", f"{said}{see} `{path} --help`", 2)


def _ckpt_error(error: CkptError, settings: Settings) -> int:
    if settings.debug:
        traceback.print_exc()
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return _fail(error.code, escape(f"{error}{notes}", limit=4000), error.exit_code)


def _fail(code: str, message: str, status: int) -> int:
    click.echo(f"error[{code}]: {message}", err=True)
    return status
