"""`page`: the maps of a study as one page for people to look at, on the web and in print."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from os import PathLike
from pathlib import Path

from biomodel.errors import InputError, OutputError
from biomodel.files import atomic_write
from biomodel.quantify.maps import VisitMaps
from biomodel.report_blocks import Section

__all__ = ["StudyPage", "page"]

FOOTER = "Made by tumorcast. For research only: not a medical device, no advice on treating a person."


@dataclass(frozen=True, eq=False)
class StudyPage:
    """A page of maps, ready to be shown or saved.

    Attributes
    ----------
    visits : tuple of VisitMaps
        In the order of their days.
    title : str
    """

    visits: tuple[VisitMaps, ...]
    title: str

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """All sections in order."""
        # matplotlib is loaded here, so that a program that only computes does without it.
        from biomodel.quantify.page_sections import sections

        return sections(self.visits)

    @property
    def subtitle(self) -> str:
        """Visits, days and scanners."""
        from biomodel.quantify.page_sections import subtitle

        return subtitle(self.visits)

    def html(self) -> str:
        """Return one HTML page that needs nothing else: no scripts, no other files, no network."""
        import jinja2

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
        source = files("biomodel").joinpath("templates/report.html").read_text(encoding="utf-8")
        template = environment.from_string(source)
        return template.render(title=self.title, where=self.subtitle, sections=self.sections, footer=FOOTER)

    def pdf(self) -> bytes:
        """Return the page as a PDF (A4)."""
        from biomodel.report_pdf import pdf

        return pdf(self.title, self.subtitle, self.sections, FOOTER)

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
        return f'<iframe srcdoc="{text}" style="width:100%;height:50rem;border:1px solid #ccc" title="maps"></iframe>'


def page(visits: Sequence[VisitMaps], title: str = "Quantitative maps") -> StudyPage:
    """Make the page of a quantified study: findings, maps with errors, curves, volumes, methods and limits of use.

    Parameters
    ----------
    visits : sequence of VisitMaps
        In any order.
    title : str
        Heading, as ``Quantitative maps: P014``.

    Returns
    -------
    StudyPage

    Raises
    ------
    InputError
        If there is no visit, or a number occurs twice, or a map has other units at another visit.

    Examples
    --------
    >>> page(visits, "Quantitative maps: P014").save("P014/maps.html")  # doctest: +SKIP
    """
    numbers = [visit.number for visit in visits]
    if not numbers:
        raise InputError("page: no visits; expected the maps of one visit at least.")
    if len(set(numbers)) < len(numbers):
        raise InputError(f"page: visits {', '.join(map(str, numbers))}; expected each once. Number them differently.")
    units: dict[str, str] = {}
    for visit in visits:
        for name, one in visit.maps.items():
            if units.setdefault(name, one.units) != one.units:
                raise InputError(
                    f"page: visit {visit.number}, {name} in {one.units!r}; expected {units[name]!r} like the visits "
                    "before. Bring both to one unit."
                )
    return StudyPage(tuple(sorted(visits, key=lambda visit: (visit.day, visit.number))), title)
