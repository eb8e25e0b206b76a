"""A smooth picture of where the tumour is, as an input of a network beside position and time."""

from __future__ import annotations

import math

import numpy as np
import torch

from pinn.carried import Places, coefficients

__all__ = ["Guide"]

#: The first image is smoothed by this many voxels, by diffusion before its time.
SMOOTH = 1.5
#: Part of its largest value below which the picture is flat: there noise is.
FLOOR = 0.1


class Guide:
    """The first image carried on by diffusion, B, as the input g = log sqrt(B² + floor²).

    A network of position and time would have to learn the tumour's outline with its weights; g has it already, and its
    level sets are near those of the state at all times.

    Parameters
    ----------
    image : ndarray, shape (n_1, ..., n_d)
        The first image; NaN counts as nothing.
    metric : tensor, shape (d,)
        Weights of the second derivatives in the operator that carries it.
    spread : float
        Diffusivity times the whole time, in units of the box's longest side squared.
    """

    def __init__(self, image: np.ndarray, metric: torch.Tensor, spread: float):
        self.c = torch.tensor(coefficients(np.nan_to_num(image)))
        self.metric, self.spread = metric, spread
        # A Gaussian of sd s is diffusion over s² / 2; lengths are in units of the longest side.
        self.before = (SMOOTH / max(image.shape)) ** 2 / 2 / spread
        self.modes = [math.pi * torch.arange(n, dtype=torch.float64) for n in image.shape]
        centres = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in image.shape]
        grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).reshape(-1, image.ndim)
        self.floor = FLOOR * float(self._carried(grid, torch.zeros(len(grid), dtype=torch.float64), self.c)[0].max())

    def _carried(self, x: torch.Tensor, tau: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return Places.of(x, tau + self.before, self.c.shape, self.metric).carried(c, self.spread)

    def _second(self, metric: torch.Tensor) -> torch.Tensor:
        """Coefficients of sum_i metric_i B_ii."""
        total = torch.zeros_like(self.c)
        for i, (m, k) in enumerate(zip(metric, self.modes, strict=True)):
            total = total - self.c * (m * k**2).reshape([-1 if j == i else 1 for j in range(self.c.ndim)])
        return total

    def at(self, x: torch.Tensor, tau: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """Value, derivative by time, gradient, and sum_i metric_i g_ii, (d + 3, n), at places (n, d) and times (n,)."""
        b = self._carried(x, tau, self.c)
        flow = self.spread * self._carried(x, tau, self._second(self.metric))[0]
        bent = self._carried(x, tau, self._second(metric))[0]
        value, slope = b[0], b[1:]
        size = value**2 + self.floor**2
        steep = (metric[:, None] * slope**2).sum(0)
        return torch.cat((
            0.5 * torch.log(size)[None] - math.log(self.floor),
            (value * flow / size)[None],
            value * slope / size,
            ((value * bent + steep) / size - 2 * value**2 * steep / size**2)[None],
        ))  # fmt: skip
