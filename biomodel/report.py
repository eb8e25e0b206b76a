"""`report`: a forecast as one page for people to read, on the web and in print.

Everything on it comes from a :class:`~biomodel.results.Results`, so a report can be made again from ``forecast.nc`` and
``summary.json`` without computing anything. Web page and PDF are made from the same sections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike

from biomodel.document import Document
from biomodel.findings import Findings
from biomodel.forecast import Forecast
from biomodel.patient import Patient
from biomodel.report_blocks import Page, Picture, Section
from biomodel.results import Results, results

__all__ = ["Page", "Picture", "Report", "report"]


@dataclass(frozen=True, eq=False)
class Report(Document):
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
            Section(page.title, tuple(page.blocks), f"page-{place}")
            for place, page in enumerate(self.pages, start=1)
        )
        return (*own[:-2], *extra, *own[-2:])

    @property
    def heading(self) -> tuple[str, str]:
        """Title, and the line below it."""
        from biomodel.report_words import subtitle, title

        return title(self.results.summary), subtitle(self.results.summary)

    @property
    def content(self) -> tuple[Section, ...]:
        """All sections in order."""
        return self.sections


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
