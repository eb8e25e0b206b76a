"""A report as PDF, from the same sections as the web page."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import matplotlib
from fpdf import FPDF
from fpdf.enums import TableBordersLayout, TextEmphasis, XPos, YPos
from fpdf.fonts import FontFace, TextStyle

from biomodel.report_blocks import Block, Fragment, Listing, Picture, Section, Table, Text

__all__ = ["pdf"]

#: A4 with margins, mm.
MARGIN, WIDTH = 14.0, 182.0
FONT = "DejaVu"
#: Tables of more rows may break over pages.
LONG = 20


class _Document(FPDF):
    def __init__(self, footer: str) -> None:
        super().__init__(format="A4")
        self.note = footer

    def footer(self) -> None:
        self.set_y(-11)
        self.set_font(FONT, size=6.5)
        self.set_text_color(90)
        self.cell(0, 4, f"{self.note}   {self.page_no()} / {{nb}}", align="C")
        self.set_text_color(0)


def pdf(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> bytes:
    """Return the sections as an A4 document. The same sections give the same bytes.

    Parameters
    ----------
    title, subtitle : str
    sections : sequence of Section
    footer : str
        At the foot of each page, beside its number.
    """
    document = _Document(footer)
    # The fonts that matplotlib brings: every letter and sign of the report, without any installed on the system.
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    for style, name in (("", ""), ("B", "-Bold"), ("I", "-Oblique"), ("BI", "-BoldOblique")):
        document.add_font(FONT, style, folder / f"DejaVuSans{name}.ttf")
    document.set_creation_date(datetime(2000, 1, 1, tzinfo=UTC))  # a file without the clock in it
    document.set_title(title)
    document.set_lang("en")
    document.set_margin(MARGIN)
    document.set_auto_page_break(True, 15)
    document.add_page()
    _line(document, title, 15, "B")
    _line(document, subtitle, 9)
    for section in sections:
        _keep(document, 14 + (_height(document, section.blocks[0]) if section.blocks else 0.0))
        document.ln(3)
        document.start_section(section.title)
        document.set_draw_color(0)
        document.set_line_width(0.3)
        document.line(MARGIN, document.get_y(), MARGIN + WIDTH, document.get_y())
        document.ln(1)
        _line(document, section.title, 12, "B")
        for block in section.blocks:
            _block(document, block)
    return bytes(document.output())


def _line(document: FPDF, text: str, size: float, style: str = "", indent: float = 0.0, gap: float = 1.2) -> None:
    document.set_font(FONT, style, size)
    document.set_x(MARGIN + indent)
    document.multi_cell(WIDTH - indent, size * 0.48, text, align="L", new_x=XPos.LMARGIN, new_y=YPos.NEXT)
    document.ln(gap)


def _keep(document: FPDF, height: float) -> None:
    """Begin a new page unless `height` mm are left on this one."""
    if document.will_page_break(height):
        document.add_page()


def _block(document: FPDF, block: Block) -> None:
    if isinstance(block, Text):
        _keep(document, 12)
        size = 10.0 if block.style == "lead" else 8.5
        _line(document, block.text, size, "I" if block.style == "note" else "", 4.0 if block.style == "note" else 0.0)
    elif isinstance(block, Listing):
        for item in block.items:
            _keep(document, 9)
            _line(document, f"•  {item}", 8.5, indent=3.0, gap=0.6)
    elif isinstance(block, Table):
        _table(document, block)
    elif isinstance(block, Picture):
        _picture(document, block)
    elif isinstance(block, Fragment):
        document.set_font(FONT, size=8.5)
        heading = {f"h{level}": TextStyle(FONT, "B", 10, t_margin=2, b_margin=1) for level in range(1, 7)}
        document.write_html(block.html, font_family=FONT, tag_styles=heading, li_prefix_color=0)
        document.ln(2)


def _height(document: FPDF, block: Block) -> float:
    """What a block needs on a page (mm), as far as it must not be torn apart."""
    if isinstance(block, Picture):
        return sum(_size(document, block)[1:])
    if isinstance(block, Table):
        return _fitted(document, block)[2]
    return 16.0


def _size(document: FPDF, picture: Picture) -> tuple[float, float, float]:
    """Width and height of a picture on the page, and the height of its caption."""
    # Width and height of a PNG stand in its header.
    across, down = (int.from_bytes(picture.png[at : at + 4], "big") for at in (16, 20))
    caption = 3.7 * (1 + len(picture.caption) // 120) + 4
    width = min(WIDTH, picture.width_in * 25.4, (document.eph - caption - 16) * across / down)
    return width, width * down / across, caption


def _picture(document: FPDF, picture: Picture) -> None:
    width, height, caption = _size(document, picture)
    _keep(document, height + caption)
    document.image(io.BytesIO(picture.png), x=MARGIN, w=width, h=height, alt_text=picture.alt)
    document.set_y(document.get_y() + 1)
    document.set_text_color(70)
    _line(document, picture.caption, 7.5, gap=2.5)
    document.set_text_color(0)


def _fitted(document: FPDF, table: Table) -> tuple[float, list[float], float]:
    """Size of the letters, column widths (mm), and the height that a short table, or the head of a long one, needs."""
    size = 7.5
    widths, needed = _widths(document, table, size)
    while needed > WIDTH and size > 5.0:
        size -= 0.5
        widths, needed = _widths(document, table, size)
    # Words do not fill their lines: 8 % more than their widths add up to.
    lines = [
        max(
            math.ceil(1.08 * document.get_string_width(cell) / max(w - 2, 1))
            for cell, w in zip(row, widths, strict=True)
        )
        for row in (table.columns, *table.rows)[:LONG]
    ]
    return size, widths, 10 + sum(0.55 * size * max(n, 1) + 0.9 for n in lines)


def _widths(document: FPDF, table: Table, size: float) -> tuple[list[float], float]:
    """Column widths (mm) from the texts, and what the table needs at least to break no number and no word."""
    document.set_font(FONT, "B", size)
    least, wanted = [], []
    for index, name in enumerate(table.columns):
        cells = [row[index] for row in table.rows]
        whole = cells if index >= table.texts else [word for cell in cells for word in cell.split()]
        least.append(max([document.get_string_width(w) for w in [*whole, *name.split()]], default=0.0) + 3.0)
        wanted.append(max([document.get_string_width(w) for w in [*cells, name]], default=0.0) + 3.0)
    # What is left over goes to the columns that would otherwise wrap, in proportion to what they lack.
    room = WIDTH - sum(least)
    lack = [w - a for a, w in zip(least, wanted, strict=True)]
    share = min(1.0, max(room, 0.0) / sum(lack)) if sum(lack) > 0 else 0.0
    return [a + share * more for a, more in zip(least, lack, strict=True)], sum(least)


def _table(document: FPDF, table: Table) -> None:
    size, widths, height = _fitted(document, table)
    _keep(document, min(height, document.eph))
    _line(document, table.caption, 8, gap=0.5)
    document.set_font(FONT, size=size)
    document.set_draw_color(170)
    document.set_line_width(0.15)
    align = tuple("LEFT" if index < table.texts else "RIGHT" for index in range(len(table.columns)))
    with document.table(
        align="LEFT", width=min(sum(widths), WIDTH), col_widths=tuple(widths), text_align=align,
        line_height=0.55 * size, padding=(0.4, 1.0), borders_layout=TableBordersLayout.HORIZONTAL_LINES,
        headings_style=FontFace(emphasis=TextEmphasis.B),
    ) as grid:  # fmt: skip
        for cells in (table.columns, *table.rows):
            line = grid.row()
            for cell in cells:
                line.cell(cell)
    document.ln(3)
