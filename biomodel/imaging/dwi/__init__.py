"""Diffusion-weighted series: apparent diffusion coefficient, IVIM and kurtosis with errors, and cell fractions."""

from biomodel.imaging.dwi.adc import fit_adc
from biomodel.imaging.dwi.bvalues import TraceSeries, check_b_values, trace_series
from biomodel.imaging.dwi.cellularity import CellFraction, cell_fraction_with_sd
from biomodel.imaging.dwi.differentiable import differentiable_fit
from biomodel.imaging.dwi.ivim import IvimBounds, fit_ivim
from biomodel.imaging.dwi.kurtosis import KurtosisBounds, fit_kurtosis
from biomodel.imaging.dwi.noise import Gaussian, Rician, background_noise, residual_noise
from biomodel.imaging.dwi.signals import ivim, kurtosis, monoexponential, rician_mean

__all__ = [
    "CellFraction",
    "Gaussian",
    "IvimBounds",
    "KurtosisBounds",
    "Rician",
    "TraceSeries",
    "background_noise",
    "cell_fraction_with_sd",
    "check_b_values",
    "differentiable_fit",
    "fit_adc",
    "fit_ivim",
    "fit_kurtosis",
    "ivim",
    "kurtosis",
    "monoexponential",
    "residual_noise",
    "rician_mean",
    "trace_series",
]
