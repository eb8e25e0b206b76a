"""`page`: the maps of a study as one page for people to look at, on the web and in print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from biomodel.document import Document
from biomodel.errors import InputError
from biomodel.quantify.maps import VisitMaps
from biomodel.report_blocks import Section

__all__ = ["StudyPage", "page"]

@dataclass(frozen=True, eq=False)
class StudyPage(Document):
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
    def heading(self) -> tuple[str, str]:
        """Title, and visits, days and scanners below it."""
        from biomodel.quantify.page_sections import subtitle

        return self.title, subtitle(self.visits)

    @property
    def content(self) -> tuple[Section, ...]:
        """All sections in order."""
        return self.sections


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
