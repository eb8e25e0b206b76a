"""Where the calibration of a map begins: of two maxima, the one with the greater evidence.

A map is thousands of unknowns, and a model can have two kinds of maxima: an ordinary one near that without a map, and
one far off, where growth and drugs work so fast against each other that hardly any map is needed to follow the noise of
every voxel. There the density is higher, and the mass far less: nearly every direction is pinned down. The evidence
counts that, the density does not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from biomodel.calibration.field_problem import FieldLinear, FieldProblem, Maximum, maximise
from biomodel.calibration.images import ImageProblem
from biomodel.calibration.laplace import MAP
from biomodel.calibration.lowrank import LowRank, leading, remainder
from biomodel.solvers.torch import TorchSolver

__all__ = ["begin", "log_evidence"]

#: Prior standard deviations of a parameter that a map may move it from its value without one, unquestioned.
APART = 1.0


def log_evidence(linear: FieldLinear, lowrank: LowRank, seed: int) -> tuple[float, float]:
    """Log-likelihood where a problem is linearised, and Laplace's approximation of the log evidence there."""
    problem, white = linear.problem, linear.white
    rest = remainder(linear.hessian, lowrank, problem.size, seed=seed)
    measured = problem.base.measured[problem.base.rows]
    spread = problem.variance[measured] / problem.trust[measured]
    misfit = float((linear.residual**2 * linear.precision).sum())
    likelihood = -0.5 * (misfit + float(np.log(2 * np.pi * spread).sum()))
    return likelihood, likelihood - 0.5 * float(white @ white) - lowrank.information - rest


def begin(
    problem: FieldProblem,
    solver: TorchSolver,
    iterations: int,
    tolerance: float,
    most: int,
    seed: int,
    progress: Callable[[str], None] | None = None,
) -> tuple[Maximum, np.ndarray]:
    """First maximum, and the model's parameters (indices) that stay where they are without a map.

    These are none where the joint maximum has them within `APART` of their values without a map, or has the greater
    evidence. Held ones are only held in the search: the posterior counts their uncertainty, and its centre moves them.

    Parameters
    ----------
    problem : FieldProblem
    solver : TorchSolver
    iterations, tolerance, progress
        As for `maximise`.
    most, seed
        As for `leading`.

    Raises
    ------
    CalibrationError
        If the model cannot be evaluated at its prior.
    """
    free = maximise(problem, np.zeros(problem.size), iterations, tolerance, progress)
    none, base = np.zeros(0, int), problem.base
    plain = MAP().optimise(ImageProblem(base.model, base.patient, solver), problem.gaussian)
    white = np.zeros(problem.size)
    white[: problem.p] = np.linalg.solve(problem.root, plain.z - problem.gaussian.mean)
    own = np.array([i for i, n in enumerate(base.names) if n in base.model.free])
    if np.abs(free.white - white)[own].max() < APART:
        return free, none
    found, trust = [], []
    for candidate in (free, maximise(problem, white, iterations, tolerance, progress, held=own)):
        problem.replan(candidate.white)
        linear = problem.linearise(candidate.white)
        problem.reweigh(linear)
        linear = problem.linearise(candidate.white)
        lowrank = leading(linear.hessian, problem.size, most=most, seed=seed)
        found.append((log_evidence(linear, lowrank, seed)[1], candidate))
        trust.append(problem.trust)
    if progress:
        progress(f"log evidence {found[0][0]:.4g} with all free, {found[1][0]:.4g} near the fit without a map")
    best = int(found[1][0] > found[0][0])
    problem.trust = trust[best]
    problem.replan(found[best][1].white)
    return found[best][1], own if best else none
