"""Markov chains for a posterior with many coordinates, as of a free start.

Where there are too few cells to see, the logit of a free start has a posterior that is the prior cut off from above.
Its Gaussian at the optimum reaches far beyond, and forecasts from it are too large. Chains that propose along this
Gaussian, z' = m + sqrt(1 - b²) (z - m) + b xi, need only the ratio of the posterior to it (Rudolf and Sprungk 2018,
Found Comput Math 18:309, doi:10.1007/s10208-016-9340-x): in directions where the Gaussian is right nothing is ever
refused. Many chains run side by side on the classical solver, which steps them together.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from biomodel.calibration.samples import Samples
from biomodel.solvers.base import Solver
from pinn.joint.posterior import ROUGH, JointPosterior, classical_of, log_posterior

#: Acceptance aimed at, and where the chains start: at the optimum with this share of the Gaussian's sd.
WANTED, NARROW = 0.3, 0.4
#: Between-chain over within-chain sd of the log density beyond which a note says so.
MIXED = 1.3


def chained(posterior: JointPosterior, chains: int = 32, steps: int = 120, kept: int = 8, seed: int = 0,
            solver: Solver = ROUGH) -> JointPosterior:  # fmt: skip
    """The posterior by Markov chains around its Gaussian.

    Parameters
    ----------
    chains, steps : int
        The first half of the steps tunes and is dropped.
    kept : int
        Draws of each chain that are kept, evenly spaced over the second half.
    solver : Solver
        Classical.

    Returns
    -------
    JointPosterior
        With `samples` of equal weight; with a note where the chains have not mixed.
    """
    classical = classical_of(posterior, solver)
    rng = np.random.default_rng([seed, 13])
    root = np.linalg.cholesky(posterior.covariance)
    low, high = classical.limits

    def log_ratio(z):
        """Log posterior less the log of the Gaussian (chains,)."""
        white = np.linalg.solve(root, (z - posterior.z).T)
        return log_posterior(classical, z) + 0.5 * (white**2).sum(0)

    def moved(z, by):
        fresh = rng.standard_normal(z.shape) @ root.T
        return posterior.z + np.sqrt(1 - by**2) * (z - posterior.z) + by * fresh

    z = np.clip(posterior.z + NARROW * rng.standard_normal((chains, len(posterior.z))) @ root.T, low, high)
    now, by = log_ratio(z), 0.3
    found, levels = [], []
    half = steps // 2
    for step in range(steps):
        trial = moved(z, by)
        value = log_ratio(trial)
        taken = np.log(rng.random(chains)) < value - now
        z, now = np.where(taken[:, None], trial, z), np.where(taken, value, now)
        if step < half:
            by = float(np.clip(by * np.exp(0.5 * (taken.mean() - WANTED)), 1e-3, 1.0))
            continue
        levels.append(now - 0.5 * (np.linalg.solve(root, (z - posterior.z).T) ** 2).sum(0))
        if (step - half + 1) % max(1, (steps - half) // kept) == 0:
            found.append(z.copy())
    draws = np.concatenate(found)
    level = np.array(levels)
    within = level.var(0, ddof=1).mean()
    between = level.mean(0).var(ddof=1)
    ratio = float(np.sqrt(1 + between / max(within, 1e-12)))
    notes = posterior.notes
    if ratio > MIXED:
        notes = (*notes, f"Markov chains have not mixed (R-hat of the density {ratio:.2f}); raise steps")
    return replace(posterior, samples=Samples(draws, np.full(len(draws), 1 / len(draws))), notes=notes)
