"""What every command of ``tumorcast`` shares: how errors are told, and commands that other packages add.

A package adds commands through the entry-point group ``tumorcast.commands``: the entry's name is the command, its
object a Typer application or a function. It is imported when the command is used, so that ``tumorcast --help`` stays
fast and never breaks; where the package misses something, the command shows how to install it.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from types import FrameType
from typing import Any

import typer
import typer.core
import typer.main

from biomodel.errors import OutputError, SolverError, TumorcastError

__all__ = ["CommandGroup", "run"]

GROUP = "tumorcast.commands"
#: Set it to anything to see where an error comes from.
DEBUG = "TUMORCAST_DEBUG"
INTERRUPTED, TERMINATED, UNEXPECTED = 130, 143, 1


class CommandGroup(typer.core.TyperGroup):
    """Commands whose errors end in a message and an exit code, with those of other packages at the end."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the own commands, then of those of other packages."""
        own = super().list_commands(ctx)
        return [*own, *sorted(name for name in _extensions() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Return a command; one of another package is not imported yet."""
        own = super().get_command(ctx, cmd_name)
        entry = None if own is not None else _extensions().get(cmd_name)
        return own if entry is None else _Extension(entry)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; what goes wrong in it becomes a message and an exit code."""
        try:
            return super().invoke(ctx)
        except BaseException as error:
            code = _tell(error)
            if code is None:
                raise
            raise typer.Exit(code) from None


class _Extension(typer.core.TyperCommand):
    """A command of another package, imported when used."""

    def __init__(self, entry: EntryPoint) -> None:
        package = entry.module.partition(".")[0]
        super().__init__(
            entry.name, help=f"A command of the package {package}.", rich_help_panel="Commands of other packages"
        )
        self._entry = entry

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Import the command and let it read its arguments."""
        try:
            found = self._entry.load()
        except ImportError as error:
            wanted = bool({"-h", "--help"} & set(args))
            typer.echo(_missing(self._entry, error), err=not wanted)
            raise typer.Exit(0 if wanted else SolverError.exit_code) from None
        if not isinstance(found, typer.Typer):
            application = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
            application.command(self._entry.name)(found)
            found = application
        return typer.main.get_command(found).make_context(info_name, args, parent=parent, **extra)


def _extensions() -> dict[str, EntryPoint]:
    return {entry.name: entry for entry in entry_points(group=GROUP)}


def _missing(entry: EntryPoint, error: ImportError) -> str:
    extra = entry.extras[0] if entry.extras else entry.module.partition(".")[0]
    what = f"package '{error.name}' is missing" if error.name else str(error)
    return f"tumorcast {entry.name}: {what}. Install what it needs with: pip install 'tumorcast[{extra}]'"


def _tell(error: BaseException) -> int | None:
    """Print the message for an error and return its exit code; None for what is no error of ours to tell."""
    if _told_by_typer(error) or isinstance(error, (SystemExit, GeneratorExit, BrokenPipeError)):
        return None
    if os.environ.get(DEBUG):
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt) or _signal is not None:
        # An interruption inside compiled code may come out as another error.
        typer.echo("interrupted; nothing was written", err=True)
        return TERMINATED if _signal == signal.SIGTERM else INTERRUPTED
    if isinstance(error, TumorcastError):
        typer.echo(f"Error: {error}", err=True)
        return error.exit_code
    if isinstance(error, MemoryError):
        typer.echo("Error: not enough memory. Use fewer --draws or a coarser grid, or free some memory.", err=True)
        return SolverError.exit_code
    if isinstance(error, OSError) and error.filename is None and error.errno in (errno.ENOSPC, errno.EIO, errno.EFBIG):
        typer.echo(f"Error: cannot write ({error.strerror}). Free some space or choose another place.", err=True)
        return OutputError.exit_code
    first = next(iter(str(error).splitlines()), "")
    typer.echo(
        f"Unexpected {type(error).__name__}: {first[:300]}\nThis is a bug: please report it, with the traceback that "
        f"appears when you run the command again with {DEBUG}=1 set.",
        err=True,
    )
    return UNEXPECTED


def _told_by_typer(error: BaseException) -> bool:
    # Errors of the command line itself know how to show themselves; their class lives in click or in typer,
    # depending on the version.
    return isinstance(error, (typer.Exit, typer.Abort)) or hasattr(error, "format_message")


_signal: int | None = None


def _stop(number: int, frame: FrameType | None) -> None:
    global _signal
    _signal = number
    raise KeyboardInterrupt


def run(application: Callable[..., Any]) -> None:
    """Run the application as a program: Ctrl-C and a request to terminate both remove what is half-written."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        application(prog_name="tumorcast")
    except KeyboardInterrupt as error:  # before or after the command itself
        sys.exit(_tell(error))
    finally:
        _close_output()


def _close_output() -> None:
    """Without this, Python complains about a full or closed standard output once more when it exits."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)
