"""From the maximum of a map's posterior to its mean.

Voxels' noise at the first visit and the map are thousands of unknowns that the model amplifies by what its scalars say.
At the joint maximum scalars are off in one direction: where cells grow faster, noise that was fitted is amplified, and
nothing at the maximum tells what that costs (the inconsistency of Neyman and Scott 1948, Econometrica 16:1,
doi:10.2307/1914288). The mean of the best Gaussian has no such bias to leading order: it lies where the gradient
vanishes on average over the Gaussian (Opper and Archambeau 2009, Neural Comput 21:786,
doi:10.1162/neco.2008.08-07-592). Pairs of draws on either side of the mean estimate that average; what is linear
cancels in each pair, so that for a linear model the mean is the maximum, exactly.

The draws have the whole covariance (I + H)^-1: a low-rank one is too wide by up to a factor of 1.4 in each of
thousands of directions that the data hardly inform, and together these would count twice. A draw is the answer to
perturbed data (Bardsley, Solonen, Haario and Laine 2014, SIAM J Sci Comput 36:A1895, doi:10.1137/140964023), by few
conjugate-gradient steps where the leading eigenpairs are known.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from biomodel.calibration.field_problem import FieldLinear
from biomodel.calibration.lowrank import LowRank, conjugate_gradients
from biomodel.errors import ModelError, SolverError

__all__ = ["centred"]

#: The search for the mean ends where a step gains less than this share of what was gained, or of 1 nat.
ENOUGH = 0.02


def centred(
    linear: FieldLinear,
    known: LowRank,
    pairs: int,
    evaluations: int = 20,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Mean (n,) of the Gaussian that is nearest to the posterior, among those with the covariance (I + H)^-1.

    Parameters
    ----------
    linear : FieldLinear
        At the maximum; H is its data Hessian.
    known : LowRank
        Leading eigenpairs of H.
    pairs : int
        Pairs of draws; two runs with their adjoints per pair and evaluation.
    evaluations : int
        Most evaluations of the average.
    seed : int
    """
    problem, white = linear.problem, linear.white
    rng = np.random.default_rng(np.random.SeedSequence([seed, 3]))
    root = np.sqrt(linear.precision)
    offsets = []
    for _ in range(pairs):
        right = rng.standard_normal(len(white)) + linear.back(root * rng.standard_normal(len(root)))
        offsets.append(conjugate_gradients(linear.hessian, right, 0.02, known=known)[0])

    def pair(mean: np.ndarray, offset: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            (above, up), (below, down) = problem.slope(mean + offset), problem.slope(mean - offset)
        except (ModelError, SolverError):  # a draw beyond a bound, or too extreme
            return np.inf, np.zeros_like(mean)
        return (above + below) / 2, (up + down) / 2

    values = [pair(white, offset)[0] for offset in offsets]
    usable = [offset for offset, value in zip(offsets, values, strict=True) if np.isfinite(value)]
    if not usable:
        return white
    first = float(np.mean([value for value in values if np.isfinite(value)]))

    def average(v: np.ndarray) -> tuple[float, np.ndarray]:
        """What the mean minimises for a given covariance: the objective's average; v is in posterior sd."""
        mean = white + known.root(v[None])[0]
        total, slope = 0.0, np.zeros_like(mean)
        for offset in usable:
            value, gradient = pair(mean, offset)
            if not np.isfinite(value):
                return 1e6, np.zeros_like(v)
            total += value / len(usable)
            slope += gradient / len(usable)
        if progress:
            progress(f"mean: {total - first:+.3g} nats, {np.linalg.norm(v):.3g} sd from the maximum")
        return total - first, known.root(slope[None])[0]

    found = minimize(average, np.zeros_like(white), jac=True, method="L-BFGS-B",
                     options={"maxfun": evaluations, "ftol": ENOUGH, "maxcor": 8})  # fmt: skip
    return white + known.root(found.x[None])[0] if found.fun < 0 else white
