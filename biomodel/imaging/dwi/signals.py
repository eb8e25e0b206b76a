"""Signals of diffusion-weighted images as differentiable torch functions of tissue parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ivim", "kurtosis", "monoexponential", "rician_mean"]


def monoexponential(b: Tensor, s0: Tensor, adc: Tensor) -> Tensor:
    """Signal S0 exp(-b ADC) (Stejskal and Tanner 1965, J Chem Phys 42:288).

    Parameters
    ----------
    b : Tensor, shape (samples,)
        s/mm².
    s0 : Tensor, shape (...)
    adc : Tensor, shape (...)
        mm²/s.

    Returns
    -------
    Tensor, shape (..., samples)
    """
    return s0[..., None] * torch.exp(-b * adc[..., None])


def ivim(b: Tensor, s0: Tensor, d: Tensor, f: Tensor, d_star: Tensor) -> Tensor:
    """Signal of intravoxel incoherent motion, S0 [(1 - f) exp(-b D) + f exp(-b D*)].

    Le Bihan et al. 1988, Radiology 168:497. Here D* is the whole coefficient of the perfused part, not what it has
    beyond D.

    Parameters
    ----------
    b : Tensor, shape (samples,)
        s/mm².
    s0, d, f, d_star : Tensor, shape (...)
        Signal without weighting; diffusion and pseudo-diffusion (mm²/s); perfused fraction.

    Returns
    -------
    Tensor, shape (..., samples)
    """
    slow, fast = torch.exp(-b * d[..., None]), torch.exp(-b * d_star[..., None])
    return s0[..., None] * ((1 - f[..., None]) * slow + f[..., None] * fast)


def kurtosis(b: Tensor, s0: Tensor, d: Tensor, k: Tensor) -> Tensor:
    """Signal of non-Gaussian diffusion, S0 exp(-b D + b² D² K / 6) (Jensen et al. 2005, doi:10.1002/mrm.20508).

    The expansion ends at b²: beyond b = 3 / (D K) the signal would grow again, and the model says nothing.

    Parameters
    ----------
    b : Tensor, shape (samples,)
        s/mm².
    s0, d, k : Tensor, shape (...)
        Signal without weighting; diffusion at b = 0 (mm²/s); kurtosis.

    Returns
    -------
    Tensor, shape (..., samples)
    """
    bd = b * d[..., None]
    return s0[..., None] * torch.exp(-bd + bd * bd * k[..., None] / 6)


def rician_mean(signal: Tensor, sigma: Tensor) -> Tensor:
    """Mean of the magnitude of a complex signal with noise `sigma` in its real and imaginary part.

    sqrt(π/2) σ L(-A²/2σ²) with the Laguerre function L of order 1/2 (Rice 1944; Gudbjartsson and Patz 1995, Magn Reson
    Med 34:910). It ends at sqrt(π/2) σ = 1.25 σ where there is no signal: what raises the tail of a decay.

    Parameters
    ----------
    signal, sigma : Tensor
        Broadcast against each other.
    """
    x = (signal / sigma) ** 2 / 4
    scaled = (1 + 2 * x) * torch.special.i0e(x) + 2 * x * torch.special.i1e(x)
    return math.sqrt(math.pi / 2) * sigma * scaled
