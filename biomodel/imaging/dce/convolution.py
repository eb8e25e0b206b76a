"""Exact convolution of a piecewise-linear input with an exponential, differentiable in everything but the knots.

Between two knots the input is a straight line, so over a step h the convolution y(t) = ∫ c(s) exp(-k (t - s)) ds obeys

    y(t + h) = exp(-k h) y(t) + h (φ1 - φ2) c(t) + h φ2 c(t + h),   φ1 = (1 - exp(-x)) / x,   φ2 = (1 - φ1) / x,

with x = k h: no error but that of the straight line itself, for any rate and any step. (Flouri et al. 2016, Magn Reson
Med 76:998, doi:10.1002/mrm.25991, use the same recursion.) Small x, where the quotients cancel, goes by the series of
φ3 = (1/2 - φ2) / x, from which the others follow without loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["convolve", "interpolate"]

_SERIES = [(-1) ** n / math.factorial(n + 3) for n in range(16)]


def _phi(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(-x), φ1(x) and φ2(x) for x >= 0."""
    small = x < 1
    near = torch.where(small, x, torch.zeros_like(x))
    series = torch.full_like(x, _SERIES[-1])
    for coefficient in reversed(_SERIES[:-1]):
        series = series * near + coefficient
    # The other branch never sees a zero, so that its derivative, which is thrown away, is finite.
    far = torch.where(small, torch.ones_like(x), x)
    phi1 = -torch.expm1(-far) / far
    phi2 = torch.where(small, 0.5 - near * series, (1 - phi1) / far)
    phi1 = torch.where(small, 1 - near * phi2, phi1)
    return torch.exp(-x), phi1, phi2


def _columns(values: Tensor) -> Tensor:
    """(m, 1) of a shared input, (m, voxels) of one for each voxel."""
    return values[:, None] if values.ndim == 1 else values.T


def _place(knots: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the last knot that is not later, and the time since it; (n, 1) or (n, voxels)."""
    column = _columns(at)
    index = torch.searchsorted(knots, column.detach().contiguous(), right=True).sub(1).clamp(0, len(knots) - 1)
    return index, (column - knots[index]).clamp(min=0)


def _pick(values: Tensor, index: Tensor) -> Tensor:
    """Rows of (m, 1) or (m, voxels) by an index of (n, 1) or (n, voxels)."""
    if index.shape[1] == 1:
        return values[index[:, 0]]
    return values.expand(-1, index.shape[1]).gather(0, index)


def _between(knots: Tensor, values: Tensor, index: Tensor, since: Tensor) -> Tensor:
    # After the last knot the input stays at its last value.
    after = (index + 1).clamp(max=len(knots) - 1)
    step = (knots[after] - knots[index]).clamp(min=torch.finfo(knots.dtype).tiny)
    low = _pick(values, index)
    return low + (_pick(values, after) - low) * torch.where(after > index, since / step, torch.zeros_like(since))


def interpolate(knots: Tensor, values: Tensor, at: Tensor) -> Tensor:
    """The piecewise-linear input itself: zero before the first knot, constant after the last.

    Parameters
    ----------
    knots : Tensor, shape (m,)
        Increasing times.
    values : Tensor, shape (m,) or (voxels, m)
    at : Tensor, shape (n,) or (voxels, n)

    Returns
    -------
    Tensor, shape (voxels, n), or (1, n) where nothing differs between voxels
    """
    index, since = _place(knots, at)
    found = _between(knots, _columns(values), index, since)
    return torch.where(_columns(at) >= knots[0], found, torch.zeros_like(found)).T


def convolve(rate: Tensor, knots: Tensor, values: Tensor, at: Tensor | None = None) -> Tensor:
    """∫ c(s) exp(-rate (t - s)) ds from the first knot to t, for the piecewise-linear c.

    Parameters
    ----------
    rate : Tensor, shape (voxels,)
        Not negative, in one over the unit of the times.
    knots : Tensor, shape (m,)
        Increasing times, any steps.
    values : Tensor, shape (m,) or (voxels, m)
        The input at the knots, shared or one for each voxel.
    at : Tensor, shape (n,) or (voxels, n), optional
        Times t; by default the knots. The input is zero before the first knot and constant after the last.

    Returns
    -------
    Tensor, shape (voxels, n)
    """
    columns, steps = _columns(values), knots.diff()
    uniform = bool(torch.allclose(steps, steps[:1].expand_as(steps), rtol=1e-9, atol=0.0))
    decay, phi1, phi2 = _phi(rate * (steps[:1, None] if uniform else steps[:, None]))
    gain = steps[:, None] * ((phi1 - phi2) * columns[:-1] + phi2 * columns[1:])
    current = torch.zeros_like(gain[0])
    rows = [current]
    for i in range(len(gain)):
        current = torch.addcmul(gain[i], current, decay[0 if uniform else i])
        rows.append(current)
    found = torch.stack(rows)
    if at is None:
        return found.T
    index, since = _place(knots, at)
    decay, phi1, phi2 = _phi(rate * since)
    low, here = _pick(columns, index), _between(knots, columns, index, since)
    return (_pick(found, index) * decay + since * ((phi1 - phi2) * low + phi2 * here)).T
