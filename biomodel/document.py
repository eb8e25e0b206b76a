"""A page of sections, shown in a notebook or saved as HTML or PDF: what the report and the page of maps share."""

from __future__ import annotations

import base64
import html
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from biomodel.errors import OutputError
from biomodel.files import atomic_write

if TYPE_CHECKING:
    from biomodel.report_blocks import Section

__all__ = ["Document"]

FOOTER = "Made by tumorcast. For research only: not a medical device, no advice on treating a person."


class Document:
    """Sections under a heading; a kind of page says where both come from."""

    @property
    def heading(self) -> tuple[str, str]:
        """Title, and the line below it."""
        raise NotImplementedError

    @property
    def content(self) -> tuple[Section, ...]:
        """All sections in order."""
        raise NotImplementedError

    def html(self) -> str:
        """Return one HTML page that needs nothing else: no scripts, no other files, no network."""
        import jinja2

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
        source = files("biomodel").joinpath("templates/report.html").read_text(encoding="utf-8")
        title, where = self.heading
        return environment.from_string(source).render(title=title, where=where, sections=self.content, footer=FOOTER)

    def pdf(self) -> bytes:
        """Return the page as a PDF (A4)."""
        from biomodel.report_pdf import pdf

        return pdf(*self.heading, self.content, FOOTER)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the page as ``.html`` or ``.pdf``, by the path's ending.

        Raises
        ------
        OutputError
            If the ending is another one, or the file cannot be written. What was there before is unchanged then.
        """
        path = Path(path)
        ending = path.suffix.lower()
        if ending not in (".html", ".htm", ".pdf"):
            raise OutputError(f"{path}: found the ending {ending!r}; expected .html or .pdf. Choose one of them.")
        data = self.pdf() if ending == ".pdf" else self.html().encode("utf-8")
        with atomic_write(path) as temporary:
            temporary.write_bytes(data)

    def _repr_html_(self) -> str:
        # A page of its own inside a notebook: its styles must not leak into the notebook.
        text = html.escape(self.html(), quote=True)
        style = "width:100%;height:50rem;border:1px solid #ccc"
        return f'<iframe srcdoc="{text}" style="{style}" title="{html.escape(self.heading[0], quote=True)}"></iframe>'
