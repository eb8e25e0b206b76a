"""The parts of a report, the same for the web page and for print: text, lists, tables and pictures in sections."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Block",
    "Fragment",
    "Listing",
    "Page",
    "Picture",
    "Section",
    "Table",
    "Text",
    "interval",
    "number",
    "percent",
    "pretty_units",
    "relative_error",
    "short",
]

#: Dots per inch of a picture: sharp in print at a page's width, and small enough to embed.
DPI = 180


@dataclass(frozen=True)
class Text:
    """A paragraph of plain text; `lead` marks the summary at the top, `note` a remark."""

    text: str
    style: str = "plain"
    kind: str = "text"


@dataclass(frozen=True)
class Listing:
    """A bulleted list of plain texts."""

    items: tuple[str, ...]
    kind: str = "listing"


@dataclass(frozen=True)
class Table:
    """A table of plain texts.

    Attributes
    ----------
    texts : int
        How many of the first columns hold texts; the others are numbers and set to the right.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: int = 1
    kind: str = "table"

    def without_empty(self) -> Table:
        """Return the table without the columns in which nothing stands."""
        kept = [i for i in range(len(self.columns)) if i < self.texts or any(row[i] != "–" for row in self.rows)]
        return replace(
            self,
            columns=tuple(self.columns[i] for i in kept),
            rows=tuple(tuple(row[i] for i in kept) for row in self.rows),
        )


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption, and a text that tells what it shows to those who cannot see it."""

    png: bytes
    caption: str
    alt: str
    width_in: float = 7.2
    kind: str = "picture"

    @classmethod
    def of(cls, figure: Figure, caption: str, alt: str) -> Picture:
        """Return a matplotlib figure as a picture. The same figure gives the same bytes."""
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
        return cls(buffer.getvalue(), caption, alt, float(figure.get_figwidth()))


@dataclass(frozen=True)
class Fragment:
    """HTML as a page of another package gave it."""

    html: str
    kind: str = "fragment"


Block = Text | Listing | Table | Picture | Fragment


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it."""

    title: str
    blocks: tuple[Block, ...]
    anchor: str = ""


@runtime_checkable
class Page(Protocol):
    """A further page of a report, as other modules and packages hand it in.

    Attributes
    ----------
    title : str
        The section's heading, plain text.
    blocks : sequence of Block
        What stands below it. Texts are plain and escaped where they are shown; only a `Fragment` is taken as it is, so
        whatever comes from data must be escaped in it already: p, ul, ol, table, b, i, sub, sup; no scripts, nothing
        external.
    """

    title: str
    blocks: tuple[Block, ...]


# --- numbers as text --------------------------------------------------------------------------------------------------

_RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")


def number(value: float | int | None, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, powers of ten written out, and – for none.

    Examples
    --------
    >>> number(0.48812), number(136361800.0), number(-0.5), number(None)
    ('0.488', '1.36 × 10⁸', '−0.500', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:.{places}f}"
    else:
        head, power = f"{value:.{digits - 1}e}".split("e")
        text = f"{head} × 10{str(int(power)).translate(_RAISED)}"
    return text.replace("-", "−")


def short(value: float | int | None) -> str:
    """Return a number that somebody chose (a day, a dose, a setting) as it was written.

    Examples
    --------
    >>> short(80.0), short(1.4), short(-0.001)
    ('80', '1.4', '−0.001')
    """
    return "–" if value is None else f"{value:.6g}".replace("-", "−")


def interval(low: float | None, high: float | None) -> str:
    """Return an interval in words."""
    return f"{number(low)} to {number(high)}"


def percent(share: float | None) -> str:
    """Return a probability in per cent, without claiming 0 or 100 for what is only rare."""
    if share is None:
        return "–"
    if 0 < share < 0.01:
        return "< 1 %"
    if 0.99 < share < 1:
        return "> 99 %"
    return f"{100 * share:.0f} %"


def relative_error(share: float | None) -> str:
    """Return a relative error in per cent with its sign, or as a multiple where per cent says nothing.

    Examples
    --------
    >>> relative_error(-0.257), relative_error(349.0)
    ('−26 %', '× 350')
    """
    if share is None:
        return "–"
    return f"× {number(1 + share)}" if share >= 9.995 else f"{100 * share:+.0f} %".replace("-", "−")


def pretty_units(units: str | None) -> str:
    """Return a unit as it is printed: mm²/day for mm^2/day, nothing for a pure number."""
    if units in (None, "", "1"):
        return ""
    return str(units).replace("^2", "²").replace("^3", "³").replace("*", "·")
