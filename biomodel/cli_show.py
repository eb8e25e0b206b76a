"""What the commands show: progress on a terminal, nothing in a pipe."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

__all__ = ["Steps", "console", "steps"]

T = TypeVar("T")


def console() -> Console:
    """Return the console of standard output; in a pipe it has no colours."""
    return Console(highlight=False)


class Steps:
    """The steps of a command, one line on a terminal.

    Parameters
    ----------
    bar
        Where to show them; None shows nothing.
    """

    def __init__(self, bar: Progress | None) -> None:
        self._bar = bar
        self._task = None if bar is None else bar.add_task("", total=None)
        self._text = ""

    def say(self, text: str) -> None:
        """Begin a step of unknown length."""
        self._text = text
        if self._bar is not None and self._task is not None:
            self._bar.reset(self._task, total=None, description=text)

    def detail(self, text: str) -> None:
        """Show how far the step is, in words."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=f"{self._text}: {text}")

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items and count them."""
        held = list(items)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, total=len(held), completed=0)
        for item in held:
            yield item
            if self._bar is not None and self._task is not None:
                self._bar.advance(self._task)


@contextmanager
def steps() -> Iterator[Steps]:
    """Show progress on standard error if that is a terminal."""
    screen = Console(stderr=True)
    if not screen.is_terminal:
        yield Steps(None)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=screen, transient=True) as bar:
        yield Steps(bar)
