"""The tumour by a network: a probability and an uncertainty in each voxel, and the region made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from scipy import ndimage

from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.regions.network import Network, entropy_of

__all__ = ["NetworkRegion", "TumourNetwork"]

#: Volume of the smallest part that counts, cm³.
SMALLEST = 0.05


@dataclass(frozen=True, eq=False)
class NetworkRegion:
    """What a network says about the tumour of an exam.

    Attributes
    ----------
    mask : ndarray of bool, shape (z, y, x)
        Probability of a half or more, without parts that are too small.
    probability : ndarray, shape (z, y, x)
        Mean over the augmented views.
    spread : ndarray, shape (z, y, x)
        Standard deviation of the probability between the views.
    entropy : ndarray, shape (z, y, x)
        Of the mean probability, 0 (sure) to 1 bit: the uncertainty of each voxel (Wang et al. 2019,
        doi:10.1016/j.neucom.2019.01.103).
    volume : (float, float, float)
        cm³: of the mask, and the least and the largest among the views.
    steps : tuple of str
        What was done.
    """

    mask: np.ndarray
    probability: np.ndarray
    spread: np.ndarray
    entropy: np.ndarray
    volume: tuple[float, float, float]
    steps: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class TumourNetwork(Network):
    """A network trained to find tumours, by :func:`biomodel.imaging.regions.train`.

    Examples
    --------
    >>> network = TumourNetwork.load("tumour.pt")  # doctest: +SKIP
    >>> network.find(exam, organ).volume  # doctest: +SKIP
    """

    FORMAT: ClassVar[str] = "tumorcast tumour network 1"
    SUBJECT: ClassVar[str] = "tumours"

    def find(self, exam: Exam, organ: np.ndarray, *, augment: bool = True, smallest: float = SMALLEST) -> NetworkRegion:
        """Find the tumour of an exam.

        Parameters
        ----------
        exam : Exam
        organ : ndarray of bool, shape (z, y, x)
            Nothing outside is tumour.
        augment
            Ask eight times, mirrored along every axis, instead of once.
        smallest
            Parts with less than this volume, cm³, are left out.

        Raises
        ------
        InputError
            If the organ has no signal or the network needs an ADC map that is missing.
        """
        views = self.views(exam, organ, augment=augment)
        mean = views.mean(0)
        labels, count = ndimage.label(mean >= 0.5, np.ones((3, 3, 3)))
        sizes = np.bincount(labels.ravel(), minlength=count + 1) * exam.voxel_volume / 1000
        kept = sizes >= smallest
        kept[0] = False
        mask = kept[labels]
        volumes = [float((v >= 0.5).sum()) * exam.voxel_volume / 1000 for v in views]
        steps = (
            f"Network of {self.provenance.get('cases', '?')} training exams, {len(views)} views.",
            f"{int(kept.sum())} of {count} parts reach {smallest:g} cm³.",
        )
        volume = (float(mask.sum()) * exam.voxel_volume / 1000, min(volumes), max(volumes))
        return NetworkRegion(mask, mean, views.std(0), entropy_of(mean), volume, steps)
