"""Fitted parameters as differentiable functions of the signal."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.func import jacrev, vmap

from biomodel.errors import GeometryError
from biomodel.imaging.voxelfit import Code, VoxelFit

__all__ = ["differentiable_fit"]

Model = Callable[..., Tensor]


def differentiable_fit(fit: VoxelFit, signal: Tensor, b_values: Tensor, model: Model, *, logarithmic: bool) -> Tensor:
    """Parameters of a fit, with the gradient by the signal that follows from the fit's own equations.

    A fit with Gaussian noise solves g(p, s) = 0, so dp/ds = -(dg/dp)⁻¹ dg/ds (implicit function theorem): a search of
    any kind is differentiated through its result alone, exactly, and without keeping its steps.

    Parameters
    ----------
    fit : VoxelFit
        Of :func:`fit_adc`, :func:`fit_ivim` or :func:`fit_kurtosis` with Gaussian noise and without averages.
    signal : Tensor, shape (voxels, samples)
        The signal that was fitted; gradients flow to it.
    b_values : Tensor, shape (samples,)
        s/mm².
    model : callable
        :func:`monoexponential`, :func:`ivim` or :func:`kurtosis`.
    logarithmic : bool
        True for :func:`fit_adc`, which fits log S with iterated weights; False for least squares.

    Returns
    -------
    Tensor, shape (voxels, parameters)
        In the fit's order and units; NaN where it has none. A voxel that is not fully fitted (on a bound, stopped
        early) has its values without a gradient.
    """
    if signal.shape != (len(fit.values), fit.samples) or b_values.shape != (fit.samples,):
        raise GeometryError(
            f"differentiable fit: signal {tuple(signal.shape)} and b-values {tuple(b_values.shape)}; expected "
            f"({len(fit.values)}, {fit.samples}) and ({fit.samples},), those that were fitted."
        )

    def equations(p: Tensor, s: Tensor) -> Tensor:
        # Zero where the fit ends: sum over samples of weight · residual · derivative.
        predicted = model(b_values, *p)
        slopes = jacrev(lambda q: model(b_values, *q))(p)
        residual = (torch.log(s) - torch.log(predicted)) * predicted if logarithmic else s - predicted
        return slopes.T @ residual

    values = torch.as_tensor(fit.values, dtype=signal.dtype)
    good = torch.as_tensor(np.flatnonzero(fit.code == Code.FITTED))
    if len(good) == 0:
        return values
    p, s = values[good], signal[good]
    slope = vmap(jacrev(equations))(p, s.detach())
    # Parameters differ in size by orders of magnitude; unit diagonal before solving.
    size = slope.diagonal(dim1=1, dim2=2).abs().sqrt()
    scaled = slope / (size[:, :, None] * size[:, None, :])
    # g(p, s) is zero here up to rounding: only its derivative by s counts.
    g = vmap(equations)(p, s)
    step = torch.linalg.solve(scaled, (g - g.detach()) / size) / size
    return values.index_put((good,), p - step)
