"""What a check of data finds, as a table for people and as JSON for scripts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

from biomodel.errors import InputError, TumorcastError

__all__ = ["Finding", "Findings", "from_error"]

Severity = Literal["error", "warning", "info"]
Step = Literal["schema", "geometry", "plausibility", "identification"]

_ORDER = {"error": 0, "warning": 1, "info": 2}
_STYLE = {"error": "bold red", "warning": "yellow", "info": "cyan"}


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Parameters
    ----------
    severity
        ``error``: the folder cannot be used; ``warning``: look at it before trusting a result; ``info``: worth knowing.
    step
        ``schema``, ``geometry``, ``plausibility`` or ``identification``.
    file
        The file in question, relative to the folder checked.
    message
        What was found, and where.
    remedy
        How to mend it.
    """

    severity: Severity
    step: Step
    file: str
    message: str
    remedy: str


@dataclass(frozen=True)
class Findings:
    """What a check found, the gravest first.

    Parameters
    ----------
    folder
        Name of the folder checked.
    items
        The findings.
    patients
        How many patients were checked.
    """

    folder: str
    items: tuple[Finding, ...]
    patients: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "items", tuple(sorted(self.items, key=lambda item: _ORDER[item.severity])))

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return tuple(item for item in self.items if item.severity == severity)

    @property
    def ok(self) -> bool:
        """Whether there is no error (there may be warnings)."""
        return not self.of("error")

    @property
    def exit_code(self) -> int:
        """0, or with errors that of :class:`~biomodel.errors.InputError`."""
        return 0 if self.ok else InputError.exit_code

    def summary(self) -> str:
        """Return one line that counts the findings."""
        counts: Counter[str] = Counter(item.severity for item in self.items)
        parts = [f"{counts[kind]} {kind if counts[kind] == 1 else plural}" for kind, plural in _PLURALS.items()]
        subject = "1 patient" if self.patients == 1 else f"{self.patients} patients"
        return f"{self.folder}: {subject} checked; {', '.join(parts)}."

    def to_dict(self) -> dict[str, object]:
        """Return the findings as plain objects."""
        return {
            "folder": self.folder,
            "patients": self.patients,
            "ok": self.ok,
            "findings": [asdict(item) for item in self.items],
        }

    def to_json(self) -> str:
        """Return the findings as JSON text."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    def __rich__(self) -> Table:
        table = Table(title=self.summary(), title_justify="left", show_lines=True)
        for column in ("severity", "step", "file", "finding", "remedy"):
            table.add_column(column, overflow="fold")
        for item in self.items:
            # Text, not markup: file names and messages may hold square brackets.
            cells = (item.step, item.file, item.message, item.remedy)
            table.add_row(Text(item.severity, style=_STYLE[item.severity]), *map(Text, cells))
        return table

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.items)

    def __str__(self) -> str:
        lines = [f"{item.severity}: {item.message} {item.remedy}".rstrip() for item in self.items]
        return "\n".join([self.summary(), *lines])


_PLURALS = {"error": "errors", "warning": "warnings", "info": "infos"}


def from_error(error: TumorcastError, step: Step, file: str) -> Finding:
    """Return an error's message as a finding, its last sentences as the remedy."""
    what, _, remedy = str(error).partition(". ")
    return Finding("error", step, file, what.rstrip(".") + ".", remedy)
