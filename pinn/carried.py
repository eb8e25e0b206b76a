"""The initial state carried on by diffusion alone: an exact solution of the heat equation on a box.

The network multiplies it. So the start and zero flux hold exactly whatever the network says, what is left to learn is
smooth even where the measured start is not, and the far tail, where growth is proportional to the cells, needs only a
constant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.fft import dctn


def coefficients(u0: np.ndarray) -> np.ndarray:
    """Cosine coefficients of the band-limited function whose voxel averages are `u0`.

    Parameters
    ----------
    u0 : ndarray, shape (..., n_1, ..., n_d)
        Averages over equal voxels of the unit box; all axes are transformed.

    Returns
    -------
    ndarray of the same shape
        c with u(x) = sum_k c_k prod_i cos(k_i pi x_i).
    """
    c = dctn(u0, type=2)
    for axis, n in enumerate(u0.shape):
        k = np.arange(n)
        # A voxel's average of cos(k pi x) is its value at the centre times sin(z) / z, z = k pi / (2 n).
        factor = np.where(k == 0, 0.5, 1.0) / n / np.sinc(k / (2 * n))
        c = c * factor.reshape([-1 if i == axis else 1 for i in range(u0.ndim)])
    return np.asarray(c)


@dataclass(frozen=True, eq=False)
class Places:
    """Points of space and time with the cosines there, made once for many evaluations.

    Attributes
    ----------
    cos, sin : list of tensor, shape (n, n_i)
        cos(k pi x_i) and k pi sin(k pi x_i) for all k of axis i.
    rates : list of tensor, shape (n_i,)
        a_i (k pi)²: how fast mode k of axis i decays per unit of diffusion times time.
    tau : tensor, shape (n,)
    """

    cos: list[torch.Tensor]
    sin: list[torch.Tensor]
    rates: list[torch.Tensor]
    tau: torch.Tensor

    @classmethod
    def of(cls, x: torch.Tensor, tau: torch.Tensor, shape: Sequence[int], metric: torch.Tensor) -> Places:
        """Points x (n, d) on the unit box at times tau (n,), for start states of that shape."""
        cos, sin, rates = [], [], []
        for i, n in enumerate(shape):
            k = math.pi * torch.arange(n, dtype=torch.float64)
            cos.append(torch.cos(x[:, i : i + 1] * k))
            sin.append(k * torch.sin(x[:, i : i + 1] * k))
            rates.append(metric[i] * k**2)
        return cls(cos, sin, rates, tau)

    def carried(self, c: torch.Tensor, diffusion: float, slopes: bool = True) -> torch.Tensor:
        """B = sum_k c_k prod_i cos(k_i pi x_i) exp(-diffusion tau a_i (k_i pi)²) and its gradient.

        Parameters
        ----------
        c : tensor, shape (n_1, ..., n_d)
        diffusion : float
            Diffusivity times the length of the time interval.

        Returns
        -------
        tensor, shape (d + 1, n), or (1, n) without `slopes`
        """
        decay = [torch.exp(-diffusion * self.tau[:, None] * r) for r in self.rates]
        along = [a * b for a, b in zip(self.cos, decay, strict=True)]
        found = [_contract(c, along)]
        if slopes:
            for i in range(len(along)):
                changed = [
                    -s * e if j == i else a for j, (a, s, e) in enumerate(zip(along, self.sin, decay, strict=True))
                ]
                found.append(_contract(c, changed))
        return torch.stack(found)

    def laplacian(self, c: torch.Tensor) -> torch.Tensor:
        """Coefficients of sum_i a_i B_ii, of the shape of `c`."""
        total = torch.zeros_like(c)
        for i, r in enumerate(self.rates):
            total = total - c * r.reshape([-1 if j == i else 1 for j in range(c.ndim)])
        return total


def _contract(c: torch.Tensor, along: list[torch.Tensor]) -> torch.Tensor:
    """sum_k c_k prod_i along_i[:, k_i], (n,)."""
    n = along[0].shape[0]
    found = along[0] @ c.reshape(c.shape[0], -1)
    for a in along[1:]:
        found = (a[:, :, None] * found.reshape(n, a.shape[1], -1)).sum(1)
    return found.reshape(n)


def on_grid(c: torch.Tensor, axes: Sequence[torch.Tensor], decay: Sequence[torch.Tensor]) -> torch.Tensor:
    """The same on a grid: cosines (m_i, n_i) of each axis and decay (n_i,), to (m_1, ..., m_d)."""
    found = c
    for cos, e in zip(axes, decay, strict=True):
        found = torch.tensordot(found, cos * e, dims=([0], [1]))
    return found
