"""`report`: a forecast as one page for people to read, on the web and in print.

Everything on it comes from a :class:`~biomodel.results.Results`, so a report can be made again from ``forecast.nc`` and
``summary.json`` without computing anything. Web page and PDF are made from the same sections.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from os import PathLike
from pathlib import Path

from biomodel.errors import OutputError
from biomodel.files import atomic_write
from biomodel.findings import Findings
from biomodel.forecast import Forecast
from biomodel.patient import Patient
from biomodel.report_blocks import Fragment, Page, Picture, Section
from biomodel.results import Results, results

__all__ = ["Page", "Picture", "Report", "report"]

FOOTER = "Made by tumorcast. For research only: not a medical device, no advice on treating a person."


@dataclass(frozen=True, eq=False)
class Report:
    """A report, ready to be shown or saved.

    Attributes
    ----------
    results : Results
        What it is made from.
    pages : sequence of Page
        Further sections, made by other packages.
    """

    results: Results
    pages: tuple[Page, ...] = ()

    @classmethod
    def from_folder(cls, folder: str | PathLike[str], pages: Sequence[Page] = ()) -> Report:
        """Return the report of the results in a folder; nothing is computed again.

        Raises
        ------
        InputError
            If the folder does not hold the results of one forecast.
        """
        return cls(Results.read(folder), tuple(pages))

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """All sections in order; pages of other packages come before the limits of use."""
        # matplotlib is loaded here, so that a program that only computes does without it.
        from biomodel.report_sections import sections

        own = sections(self.results)
        extra = tuple(
            Section(page.title, (Fragment(page.html()), *page.figures), f"page-{place}")
            for place, page in enumerate(self.pages, start=1)
        )
        return (*own[:-2], *extra, *own[-2:])

    @property
    def _heading(self) -> tuple[str, str]:
        from biomodel.report_words import subtitle, title

        return title(self.results.summary), subtitle(self.results.summary)

    def html(self) -> str:
        """Return the report as one HTML page that needs nothing else: no scripts, no other files, no network."""
        import jinja2

        environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
        environment.filters["base64"] = lambda data: base64.b64encode(data).decode("ascii")
        source = files("biomodel").joinpath("templates/report.html").read_text(encoding="utf-8")
        head, where = self._heading
        return environment.from_string(source).render(title=head, where=where, sections=self.sections, footer=FOOTER)

    def pdf(self) -> bytes:
        """Return the report as a PDF (A4)."""
        from biomodel.report_pdf import pdf

        return pdf(*self._heading, self.sections, FOOTER)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the report as ``.html`` or ``.pdf``, by the path's ending.

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
        page = html.escape(self.html(), quote=True)
        return f'<iframe srcdoc="{page}" style="width:100%;height:50rem;border:1px solid #ccc" title="report"></iframe>'


def report(
    forecast: Forecast,
    observed: Patient | None = None,
    what_if: Sequence[tuple[str, Forecast]] = (),
    findings: Findings | None = None,
    pages: Sequence[Page] = (),
) -> Report:
    """Make the report of a forecast.

    Parameters
    ----------
    forecast : Forecast
    observed : Patient, optional
        The whole record, to show and score what was seen after the calibration.
    what_if : sequence of (str, Forecast)
        Label and forecast of the same fit under other schedules.
    findings : Findings, optional
        Of the quality check of the patient's folder (:func:`biomodel.quality.check`).
    pages : sequence of Page
        Further sections.

    Returns
    -------
    Report

    Raises
    ------
    InputError
        If the observed patient is another one, or a what-if forecast does not match.

    Examples
    --------
    >>> report(forecast, observed=patient).save("P014.html")  # doctest: +SKIP
    """
    return Report(results(forecast, observed, what_if, findings), tuple(pages))
