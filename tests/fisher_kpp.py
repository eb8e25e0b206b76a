"""The Fisher-KPP problem of the tests of `pinn`, with a reference solver of another kind than any of the package's.

Cosine pseudo-spectral in space, integrating-factor Runge-Kutta of fourth order in time (Trefethen 2000, Spectral
Methods in MATLAB, chapter 10; doi:10.1137/1.9780898719598). D = 0.01 and rho = 4 on the unit box over unit time, zero
flux, start 0.5 exp(-|x - 0.5|² / 0.01), in a box of 10 mm over 40 days.
"""

import numpy as np
import torch
from scipy.fft import dctn, idctn

import biomodel as bm

D, RHO = 0.01, 4.0
LENGTH, SPAN = 10.0, 40.0
VISITS, END = (0.3, 0.6), 1.0


def start(n: int, dimensions: int) -> np.ndarray:
    """The start at the centres of n cells per axis."""
    x = (np.arange(n) + 0.5) / n - 0.5
    return 0.5 * np.exp(-sum(g**2 for g in np.meshgrid(*[x] * dimensions, indexing="ij")) / 0.01)


def solve(u0: np.ndarray, diffusion: float, rho: float, times, step: float) -> np.ndarray:
    """States (T, n, ...) at cell centres."""
    squares = sum(np.meshgrid(*[(np.pi * np.arange(n)) ** 2 for n in u0.shape], indexing="ij"))

    def slope(c):
        u = idctn(c)
        return dctn(rho * u * (1 - u))

    c, now, found = dctn(u0), 0.0, []
    for time in times:
        count = max(1, round((time - now) / step))
        h = (time - now) / count
        half = np.exp(-diffusion * squares * h / 2)
        for _ in range(count):
            k1 = slope(c)
            k2 = slope(half * (c + h / 2 * k1))
            k3 = slope(half * c + h / 2 * k2)
            k4 = slope(half * (half * c + h * k3))
            c = half * (half * (c + h / 6 * k1) + h / 3 * (k2 + k3)) + h / 6 * k4
        now = time
        found.append(idctn(c))
    return np.array(found)


def average(u: np.ndarray, factor: int) -> np.ndarray:
    """Averages of `factor` cells per axis of (T, n, ...)."""
    for axis in range(1, u.ndim):
        shape = u.shape
        u = u.reshape(*shape[:axis], shape[axis] // factor, factor, *shape[axis + 1 :]).mean(axis + 1)
    return u


class Problem:
    """Voxel averages of the truth, from a grid eight (1D) or four (2D) times finer than the data's."""

    def __init__(self, dimensions: int):
        self.dimensions = dimensions
        self.n, self.finer = {1: (128, 8), 2: (32, 4)}[dimensions]
        fine = start(self.n * self.finer, dimensions)
        self.truth = average(solve(fine, D, RHO, (*VISITS, END), 1e-3), self.finer)
        self.shape = (1,) * (3 - dimensions) + (self.n,) * dimensions
        self.u0 = torch.tensor(average(fine[None], self.finer).reshape(1, *self.shape))
        self.domain = bm.Domain.box(self.shape, (LENGTH / self.n,) * 3)
        self.days = np.array([*VISITS, END]) * SPAN
        # The start guess of the fits, D = 0.03 and rho = 1, as the median of weak priors.
        self.model = bm.ReactionDiffusion(
            bm.Logistic(k=bm.LogNormal(1 / SPAN, 1.5)), bm.Isotropic(D=bm.LogNormal(0.03 * LENGTH**2 / SPAN, 1.5))
        )
        self.values = {"growth.k": RHO / SPAN, "diffusion.D": D * LENGTH**2 / SPAN}

    def noisy(self, noise: float, seed: int) -> tuple[np.ndarray, float]:
        """Measured states at both visits (2, z, y, x) and the noise's sd, a share of the largest value."""
        seen = self.truth[:2].reshape(2, *self.shape)
        sd = noise * float(seen.max())
        return seen + sd * np.random.default_rng(seed).standard_normal(seen.shape), sd

    def errors(self, u) -> np.ndarray:
        """Relative L2 error of states (T, z, y, x) at the first T of `days`."""
        u = np.asarray(u).reshape(-1, *self.truth.shape[1:])
        truth = self.truth[: len(u)]
        axes = tuple(range(1, truth.ndim))
        return np.sqrt(((u - truth) ** 2).sum(axes) / (truth**2).sum(axes))

    def predicted(self, log_k: float, log_d: float) -> np.ndarray:
        """Data (2, z, y, x) at parameters of the model, by the reference solver on cells half as large."""
        diffusion, rho = np.exp(log_d) * SPAN / LENGTH**2, np.exp(log_k) * SPAN
        u = solve(start(self.n * 2, self.dimensions), diffusion, rho, VISITS, 1e-2)
        return average(u, 2).reshape(2, *self.shape)
