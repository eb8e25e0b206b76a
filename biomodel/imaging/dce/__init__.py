"""Contrast agent in tissue over time: models, fits and what is read off the curve without a model."""

from biomodel.imaging.dce.fitting import choose, fit, fit_volume
from biomodel.imaging.dce.models import (
    ExtendedTofts,
    Model,
    Patlak,
    Tofts,
    TwoCompartmentExchange,
    TwoCompartmentUptake,
    tissue_signal,
)
from biomodel.imaging.dce.semiquantitative import (
    Enhancement,
    enhancement,
    functional_tumour,
    functional_tumour_volume,
)

__all__ = [
    "Enhancement",
    "ExtendedTofts",
    "Model",
    "Patlak",
    "Tofts",
    "TwoCompartmentExchange",
    "TwoCompartmentUptake",
    "choose",
    "enhancement",
    "fit",
    "fit_volume",
    "functional_tumour",
    "functional_tumour_volume",
    "tissue_signal",
]
