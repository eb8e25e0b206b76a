"""The maximum of the posterior, and the Gaussian around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from biomodel.calibration.gaussnewton import Optimum, along_values, limits_of, minimise
from biomodel.errors import CalibrationError

#: How near (posterior sd) the search without the initial state's noise must come before the exact one goes on.
ROUGH = 1.0
#: Most rounds of the rough search, each with the data's weight set by the misfit of the one before, and the relative
#: change of that weight which ends them.
REWEIGHINGS, SETTLED = 6, 0.2
#: Most rounds in which the initial state moves to its posterior mean and the parameters follow.
REFINEMENTS = 5


@dataclass(frozen=True)
class MAP:
    """The maximum of the posterior, by Levenberg-Marquardt in transformed coordinates.

    Parameters
    ----------
    starts : int
        Starting points: the prior's mean, then draws from the prior. All run a few iterations, the best goes on.
    iterations : int
        Most iterations of the final run.
    tolerance : float
        Stop where the optimum is nearer than this many posterior standard deviations.
    seed : int
        For the starting points.
    marginalise : bool
        Carry the voxel noise of the first visit's map through the model and move the initial state to its posterior
        mean. Without it that noise is only added to the later visits', which is what most published calibrations do
        or neglect, at a fraction of the cost on large grids.
    """

    starts: int = 3
    iterations: int = 40
    tolerance: float = 0.1
    seed: int = 0
    marginalise: bool = True
    start_at: Mapping[str, float] | None = None

    def optimise(self, problem, prior, progress: Callable[[str], None] | None = None) -> Optimum:
        """Return the best point found from all starts."""
        limits, move = limits_of(problem.parameters), along_values(problem.parameters)
        rng = np.random.default_rng(self.seed)
        first = prior.mean.copy()
        if self.start_at:
            for name, value in self.start_at.items():
                if name not in problem.names:
                    known = ", ".join(problem.names)
                    raise CalibrationError(f"start_at: {name!r} is not calibrated; there are {known}.")
                first[problem.names.index(name)] = problem.parameters[name].prior.to_z(np.float64(value))
        points = [first]
        # Draws of half the prior's width: enough to leave a wrong basin, without extreme models.
        points += [rng.multivariate_normal(prior.mean, prior.covariance / 4) for _ in range(self.starts - 1)]
        precision = prior.precision

        def search(z: np.ndarray, exact: bool, count: int, tolerance: float) -> Optimum:
            return minimise(
                lambda x: problem.linearise(x, exact), z, prior, limits, count, tolerance, move, progress
            )  # fmt: skip

        problem.replan(first)
        problem.searching = True
        screened: list[Optimum] = []
        for point in points:
            try:
                if not screened:
                    problem.reweigh(problem.linearise(point, False), precision)
                screened.append(search(point, False, 2 if len(points) > 1 else self.iterations, ROUGH))
            except CalibrationError:
                continue
        if not screened:
            raise CalibrationError("the model cannot be evaluated at any starting point; check priors and data.")
        best = min(screened, key=lambda o: o.objective)
        spent = best.iterations
        for turn in range(REWEIGHINGS):
            # Coarse steps only for the long way: near the optimum their error would outweigh the noise.
            problem.searching = turn == 0
            problem.replan(best.z)
            changed = problem.reweigh(best.linear, precision)
            best = search(best.z, False, self.iterations, ROUGH)
            spent += best.iterations
            if turn and changed < SETTLED:
                break
        for _ in range(REFINEMENTS):
            best = search(best.z, self.marginalise, self.iterations, self.tolerance)
            spent += best.iterations
            changed = problem.reweigh(best.linear, precision)
            if problem.refine(best.linear) < 0.1 and changed < SETTLED:
                break
        return replace(best, iterations=spent)


@dataclass(frozen=True)
class Laplace:
    """`MAP` plus the Gaussian posterior with the exact Gauss-Newton covariance, and the evidence."""

    map: MAP = field(default_factory=MAP)
