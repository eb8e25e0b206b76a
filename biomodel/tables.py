"""Tables as HTML, for results that show themselves in a notebook."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

__all__ = ["html_table"]


def html_table(columns: Sequence[str], rows: Iterable[Sequence[object]], title: str = "") -> str:
    """Return a table with a bold title before it; all text is escaped.

    Parameters
    ----------
    columns
        Headings.
    rows
        Cells of each row, as many as there are columns.
    title
        Left out if empty.

    Raises
    ------
    ValueError
        If a row has more or fewer cells than there are columns.
    """

    def row(cells: Sequence[object], tag: str) -> str:
        if len(cells) != len(columns):
            raise ValueError(f"html_table: a row of {len(cells)} cells, {cells!r}; expected {len(columns)}.")
        return "<tr>" + "".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"

    head, body = row(columns, "th"), "".join(row(cells, "td") for cells in rows)
    before = f"<p><b>{html.escape(title)}</b></p>" if title else ""
    return f"{before}<table><thead>{head}</thead><tbody>{body}</tbody></table>"
