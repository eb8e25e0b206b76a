"""From the maximum of a map's posterior to its mean.

Voxels' noise at the first visit and the map are thousands of unknowns that the model amplifies by what its scalars say.
At the joint maximum scalars are off in one direction: where cells grow faster, noise that was fitted is amplified, and
nothing at the maximum tells what that costs (the inconsistency of Neyman and Scott 1948, Econometrica 16:1,
doi:10.2307/1914288). The mean of the best Gaussian has no such bias to leading order: it lies where the gradient
vanishes on average over the Gaussian (Opper and Archambeau 2009, Neural Comput 21:786,
doi:10.1162/neco.2008.08-07-592). Pairs of draws on either side of the mean estimate that average; what is linear cancels
in each pair, so that for a linear model the mean is the maximum, exactly.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.optimize import minimize

from biomodel.calibration.field_problem import FieldProblem
from biomodel.calibration.lowrank import LowRank
from biomodel.errors import ModelError, SolverError

__all__ = ["centred"]

#: The search for the mean ends where a step gains less than this share of what was gained, or of 1 nat.
ENOUGH = 0.02


def centred(
    problem: FieldProblem,
    white: np.ndarray,
    known: LowRank,
    pairs: int,
    evaluations: int = 20,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> np.ndarray:
    """Mean (n,) of the Gaussian with the covariance `known` that is nearest to the posterior.

    Parameters
    ----------
    problem : FieldProblem
    white : ndarray, shape (n,)
        The maximum.
    known : LowRank
        Of the data Hessian there.
    pairs : int
        Pairs of draws; two runs with their adjoints per pair and evaluation.
    evaluations : int
        Most evaluations of the average.
    seed : int
    """
    seeds = np.random.default_rng(np.random.SeedSequence([seed, 3])).integers(2**31, size=pairs)

    def pair(mean: np.ndarray, one: int) -> tuple[float, np.ndarray]:
        offset = known.root(np.random.default_rng(one).standard_normal((1, len(mean))))[0]
        try:
            (above, up), (below, down) = problem.slope(mean + offset), problem.slope(mean - offset)
        except (ModelError, SolverError):  # a draw beyond a bound, or too extreme
            return np.inf, np.zeros_like(mean)
        return (above + below) / 2, (up + down) / 2

    values = {one: pair(white, one)[0] for one in seeds.tolist()}
    usable = [one for one, value in values.items() if np.isfinite(value)]
    if not usable:
        return white
    first = float(np.mean([values[one] for one in usable]))

    def average(v: np.ndarray) -> tuple[float, np.ndarray]:
        """What the mean minimises for a given covariance: the objective's average; v is in posterior sd."""
        mean = white + known.root(v[None])[0]
        total, slope = 0.0, np.zeros_like(mean)
        for one in usable:  # offsets are drawn again each time: many would not fit into memory
            value, gradient = pair(mean, one)
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
