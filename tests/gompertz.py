"""A virtual tumour that grows by Gompertz's law, imaged three times; solved on cells a quarter as large.

Finite volumes with a fourth-order Runge-Kutta method on the whole right-hand side (`biomodel.truth`): another grid and
another integrator than those of the solvers. A box of 48 x 48 mm, k = 0.06/day, D = 0.3 mm²/day, zero flux; the start,
a Gaussian of height 0.15 and sd 4 mm, is known to 0.004.
"""

import numpy as np
import torch

import biomodel as bm
from biomodel.truth import Hazard, average, integrate

K, D = 0.06, 0.3
N, SPACING, FINER = 32, 1.5, 4
DAYS, LATER = (0.0, 12.0, 24.0, 40.0), 60.0
START_SD = 0.004
#: Prior of the diffusivity: its median is a third of the truth.
SPREAD = bm.LogNormal(0.1, 1.0)


def law(u):
    """The true growth, 1/day."""
    return -K * u * np.log(u)


class Tumour:
    """Truth at all days and at the forecast's, and the domain of the images."""

    def __init__(self, n: int = N, spacing: float = SPACING, finer: int = FINER):
        fine = bm.Domain.box((1, n * finer, n * finer), (spacing, spacing / finer, spacing / finer))
        y, x = np.meshgrid(*(fine.coords[a] - fine.coords[a].mean() for a in "yx"), indexing="ij")
        start = 0.15 * np.exp(-(x**2 + y**2) / (2 * 4.0**2))[None]
        run = integrate(start[None], fine.mask, np.full(fine.shape, D), fine.spacing, K, Hazard.none(),
                        [*DAYS[1:], LATER], gompertz_floor=1e-30, cutoff=-1)  # fmt: skip
        self.domain = bm.Domain.box((1, n, n), (spacing,) * 3)
        self.truth = np.stack([average(u, (1, finer, finer))[0] for u in (start[None], *run)])
        self.u0 = torch.tensor(self.truth[:1])

    def images(self, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Images of all `DAYS` (4, z, y, x) and their noise (4,); `noise` is a share of the largest value."""
        sd = noise * float(self.truth[: len(DAYS)].max())
        sds = np.array([min(START_SD, sd), sd, sd, sd])
        rng = np.random.default_rng(seed)
        return self.truth[:-1] + sds[:, None, None, None] * rng.standard_normal(self.truth[:-1].shape), sds


class Differences:
    """A simulation whose derivatives are central differences, all in one batch.

    For growth laws without a closed form and with many parameters that is several times faster than tangents.
    """

    def __init__(self, simulation, step: float = 1e-4):
        self.simulation, self.step = simulation, step
        self.plan = simulation.plan

    def __call__(self, *arguments, **options):
        return self.simulation(*arguments, **options)

    def sensitivities(self, params, u0, times, wrt, plan=None, du0=None, rows=None):
        """States and derivatives, as of any simulation; parameters are positive."""
        count = len(wrt)
        values = {n: torch.full((2 * count + 1,), float(v), dtype=torch.float64) for n, v in params.items()}
        steps = torch.tensor([self.step * float(params[n]) for n in wrt], dtype=torch.float64)
        for i, n in enumerate(wrt):
            values[n][1 + i] += steps[i]
            values[n][1 + count + i] -= steps[i]
        u = self.simulation(values, u0, times, plan=plan).detach()
        du = (u[1 : 1 + count] - u[1 + count :]) / (2 * steps.reshape(-1, 1, 1, 1, 1))
        u, du = u[:1], du[:, None]
        inside = None if rows is None else torch.as_tensor(rows)
        return (u, du) if inside is None else (u[:, inside], du[:, :, inside])


def misses(growth, low: float, high: float) -> tuple[float, float]:
    """Largest error of a law over [low, high]: relative to the truth's largest value, and relative to the truth."""
    u = np.linspace(low, high, 400)
    error = np.abs(growth(u) - law(u))
    return float(error.max() / law(u).max()), float((error / law(u)).max())
