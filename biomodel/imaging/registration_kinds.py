"""What a registration is given: images, and what may move in which way."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biomodel.errors import InputError
from biomodel.imaging.registration_bending import Likeness, LocalCorrelation
from biomodel.imaging.registration_search import MutualInformation
from biomodel.imaging.series_grid import Axis, Grid

__all__ = ["Affine", "BSpline", "Image", "Kind", "Rigid"]


@dataclass(frozen=True, eq=False)
class Image:
    """One image of a visit.

    Parameters
    ----------
    values
        (z, y, x), in any units; NaN where not known.
    grid
        Where its voxels lie.
    mask
        bool (z, y, x): where to look, such as the organ and its surface; everywhere without it.
    name
        Names the image in messages.
    """

    values: np.ndarray
    grid: Grid
    mask: np.ndarray | None = None
    name: str = "image"


@dataclass(frozen=True)
class Rigid:
    """Rotation and translation.

    Parameters
    ----------
    metric
        How likeness is measured.
    """

    metric: MutualInformation = MutualInformation()


@dataclass(frozen=True)
class Affine:
    """Rigid, then scales and shears.

    Parameters
    ----------
    metric
        How likeness is measured.
    reach
        How far around the tumour, mm, the transform goes over from rigid to affine.
    """

    metric: MutualInformation = MutualInformation()
    reach: float = 15.0


@dataclass(frozen=True)
class BSpline:
    """Rigid, then a cubic B-spline.

    The defaults were chosen on virtual patients 0 to 2 of the benchmark (``tests/benchmarks/bench_registration.py``),
    where anything from half to twice of each did about as well.

    Parameters
    ----------
    knots
        Distance between knots, mm; the finest bending is about as wide as that.
    stiffness
        Weight of the bending energy (mean squared second derivative of the displacement, 1/mm²), mm².
    likeness
        How likeness is measured: ``LocalCorrelation()`` or ``JointHistogram()``.
    start
        The rigid transform that comes first.
    reach
        How far around the tumour, mm, the transform goes over from rigid to bending.
    along
        Axis of the moving image along which alone points move, as where echo-planar images are distorted along their
        phase encoding; any direction without it.
    """

    knots: float = 25.0
    stiffness: float = 50.0
    likeness: Likeness = LocalCorrelation()
    start: Rigid = Rigid()
    reach: float = 15.0
    along: Axis | None = None

    def __post_init__(self) -> None:
        for name in ("knots", "reach"):
            if not getattr(self, name) > 0:
                raise InputError(f"BSpline: {name} {getattr(self, name)}; expected mm above 0.")
        if not self.stiffness >= 0:
            raise InputError(f"BSpline: stiffness {self.stiffness}; expected mm², 0 or more.")


Kind = Rigid | Affine | BSpline
