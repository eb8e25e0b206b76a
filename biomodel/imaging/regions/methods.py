"""Ways to a region and to tissue fractions, each an object with its settings: what a quantification is handed.

A way of one's own is any object with the same method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.network_tissue import TissueNetwork
from biomodel.imaging.regions.network_tumour import SMALLEST, TumourNetwork
from biomodel.imaging.regions.tissue import Tissues, tissues
from biomodel.imaging.regions.tumour import Thresholds, find_tumour

__all__ = [
    "FoundRegion",
    "FuzzyClusters",
    "NetworkRegions",
    "NetworkTissues",
    "RegionMethod",
    "ThresholdRegions",
    "TissueMethod",
]


@dataclass(frozen=True, eq=False)
class FoundRegion:
    """A region, whichever way it came.

    Attributes
    ----------
    mask : ndarray of bool, shape (z, y, x)
        Empty where nothing was found.
    notes : tuple of str
        What was done, with numbers.
    method : str
        In a few words.
    probability, entropy : ndarray, shape (z, y, x), optional
        That a voxel is tumour, and how unsure that is, 0 to 1 bit; NaN outside of the organ. None from a way that gives
        no probabilities.
    edge : float
        Share of tumour from which a voxel belongs to the region; 1 where it has to look wholly like tumour.
    """

    mask: np.ndarray
    notes: tuple[str, ...]
    method: str
    probability: np.ndarray | None = None
    entropy: np.ndarray | None = None
    edge: float = 1.0


class RegionMethod(Protocol):
    """A way to the tumour's region."""

    def region(self, exam: Exam, organ: np.ndarray, tissue: Tissues | None) -> FoundRegion:
        """Find the tumour of an exam inside of an organ, bool (z, y, x); tissues where they are known."""
        ...


class TissueMethod(Protocol):
    """A way to tissue fractions."""

    def tissues(self, exam: Exam, organ: np.ndarray, *, fat_suppressed: bool) -> Tissues:
        """Split an organ, bool (z, y, x), into fibroglandular and adipose tissue."""
        ...


@dataclass(frozen=True)
class ThresholdRegions:
    """Thresholds and growing (:func:`find_tumour`): needs no weights.

    Parameters
    ----------
    thresholds : Thresholds
    """

    thresholds: Thresholds = Thresholds()

    def region(self, exam: Exam, organ: np.ndarray, tissue: Tissues | None) -> FoundRegion:
        """Find the tumour; see :func:`find_tumour` for what is raised."""
        found = find_tumour(exam, organ, self.thresholds, tissue=tissue)
        note = f"Tumour: {found.volume:.2f} cm³ in {found.foci} part(s)."
        return FoundRegion(
            np.asarray(found.mask, bool), (note, *found.steps), "thresholds of enhancement and growing",
            edge=self.thresholds.edge,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class NetworkRegions:
    """A trained network, with its uncertainty in each voxel.

    Parameters
    ----------
    network : TumourNetwork
        As from ``TumourNetwork.load("tumour.pt")``.
    augment : bool
        Ask eight times, mirrored along every axis.
    smallest : float
        Parts with less than this volume, cm³, are left out.
    """

    network: TumourNetwork
    augment: bool = True
    smallest: float = SMALLEST

    def region(self, exam: Exam, organ: np.ndarray, tissue: Tissues | None) -> FoundRegion:
        """Find the tumour; see :meth:`TumourNetwork.find` for what is raised."""
        found = self.network.find(exam, organ, augment=self.augment, smallest=self.smallest)
        whole, least, most = found.volume
        notes = (
            f"Tumour: {whole:.2f} cm³ ({least:.2f} to {most:.2f} cm³ among the network's views).",
            *found.steps,
            _told(self.network),
        )
        inside = np.asarray(organ, bool) & exam.sound
        probability, entropy = (np.where(inside, one, np.nan) for one in (found.probability, found.entropy))
        return FoundRegion(found.mask, notes, f"network {self.network.digest[:12]}", probability, entropy)


@dataclass(frozen=True)
class FuzzyClusters:
    """Fuzzy c-means of the signal before contrast (:func:`biomodel.imaging.regions.tissues`): needs no weights.

    Parameters
    ----------
    enhancement : float
        What enhances early by more than this fraction is left out of the clustering, as it may be tumour: 0.70 in I-SPY
        (Hylton et al. 2012, doi:10.1148/radiol.12110748).
    fuzziness : float
        See :func:`fuzzy_c_means`.
    """

    enhancement: float = 0.70
    fuzziness: float = 2.0

    def tissues(self, exam: Exam, organ: np.ndarray, *, fat_suppressed: bool) -> Tissues:
        """Split an organ; see :func:`biomodel.imaging.regions.tissues` for what is raised."""
        inside = exam.mask(organ, "fuzzy c-means: organ")
        with np.errstate(invalid="ignore", divide="ignore"):
            enhances = np.nan_to_num((exam.early - exam.before) / exam.before) > self.enhancement
        return tissues(
            np.nan_to_num(exam.before), inside, exam.spacing, fat_suppressed=fat_suppressed,
            without=enhances & inside, fuzziness=self.fuzziness,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class NetworkTissues:
    """A trained network, with the spread between its views.

    Parameters
    ----------
    network : TissueNetwork
        As from ``TissueNetwork.load("tissue.pt")``.
    augment : bool
        Ask eight times, mirrored along every axis.
    """

    network: TissueNetwork
    augment: bool = True

    def tissues(self, exam: Exam, organ: np.ndarray, *, fat_suppressed: bool) -> Tissues:
        """Split an organ; see :meth:`TissueNetwork.split` for what is raised."""
        found = self.network.split(exam, organ, fat_suppressed=fat_suppressed, augment=self.augment)
        return Tissues(
            found.fibroglandular, found.adipose, found.bias, None, (*found.notes, _told(self.network)), found.spread
        )


def _told(network: TumourNetwork | TissueNetwork) -> str:
    """Where a network comes from, in a sentence."""
    known = network.provenance
    sites = known.get("sites")
    where = ", ".join(str(site) for site in sites if site) if isinstance(sites, list) else ""
    return (
        f"Network for {network.SUBJECT} {network.digest[:12]}, trained on {known.get('cases', '?')} exams of "
        f"{known.get('patients', '?')} patients" + (f" at {where}." if where else ".")
    )
