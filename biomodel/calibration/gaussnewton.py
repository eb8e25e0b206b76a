"""Levenberg-Marquardt in transformed coordinates with a Gaussian prior, bounds and refused trial points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from biomodel.errors import CalibrationError, SolverError
from biomodel.parameters import LogNormal, Parameter

#: An improvement of the log posterior, in units of the squared tolerance, that changes nothing: a search that gains no
#: more has ended.
NEGLIGIBLE = 5.0


@dataclass(frozen=True, eq=False)
class GaussianPrior:
    """Gaussian over transformed coordinates: mean (p,), covariance and precision (p, p)."""

    mean: np.ndarray
    covariance: np.ndarray

    @property
    def precision(self) -> np.ndarray:
        return np.linalg.inv(self.covariance)

    @property
    def sd(self) -> np.ndarray:
        return np.sqrt(np.diag(self.covariance))


def prior_of(parameters: dict[str, Parameter], joint=None) -> GaussianPrior:
    """Prior over the parameters' transformed coordinates, with a cohort's joint prior where there is one."""
    names = list(parameters)
    mean = np.array([p.prior.location for p in parameters.values()])
    covariance = np.diag(np.array([p.prior.scale**2 for p in parameters.values()]))
    if joint is not None:
        where = [names.index(n) for n in joint.names if n in names]
        keep = [i for i, n in enumerate(joint.names) if n in names]
        mean[where] = joint.mean[keep]
        covariance[np.ix_(where, where)] = joint.covariance[np.ix_(keep, keep)]
    return GaussianPrior(mean, covariance)


def limits_of(parameters: dict[str, Parameter]) -> tuple[np.ndarray, np.ndarray]:
    """Bounds in transformed coordinates."""
    low = [float(p.prior.to_z(np.float64(p.bounds[0]))) for p in parameters.values()]
    high = [float(p.prior.to_z(np.float64(p.bounds[1]))) for p in parameters.values()]
    return np.array(low), np.array(high)


@dataclass(eq=False)
class Optimum:
    """Where a minimisation ended."""

    z: np.ndarray
    objective: float
    linear: Any  # what the problem's `linearise` returns
    iterations: int
    converged: bool


def along_values(parameters: dict[str, Parameter]) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Steps that are straight in the values of log-normal parameters, not in their logarithms.

    Two treatments given together act through the sum of their effects: a straight valley in the values, a strongly
    curved one in the logarithms, along which steps straight in the logarithms crawl.
    """
    log = np.array([isinstance(p.prior, LogNormal) for p in parameters.values()])

    def move(z: np.ndarray, step: np.ndarray) -> np.ndarray:
        return z + np.where(log, np.log1p(np.maximum(step, -0.9)), step)

    return move


def minimise(linearise: Callable, z: np.ndarray, prior: GaussianPrior, limits, iterations: int, tolerance: float,
             move: Callable[[np.ndarray, np.ndarray], np.ndarray],
             progress: Callable[[str], None] | None = None) -> Optimum:  # fmt: skip
    """Minimise data objective + prior by Levenberg-Marquardt.

    Parameters
    ----------
    linearise : callable
        z -> object with `objective`, `gradient`, `hessian` of the data and ``trial(z)``.
    tolerance : float
        Stop where the optimum is nearer than this many posterior standard deviations (Mahalanobis distance).

    move : callable
        (z, step) -> another point at that step, tried before z + step (see `along_values`).

    Notes
    -----
    A trial point whose objective is not finite is refused and the damping raised, as for one that is no improvement.
    The damping is in units of the prior's precision: it shortens steps along directions that only the prior informs,
    where the model is most curved, and leaves alone those that the data fix.
    """
    low, high = limits
    precision = prior.precision

    def penalty(x):
        d = x - prior.mean
        return 0.5 * float(d @ precision @ d)

    z = np.clip(z, low, high)
    try:
        linear = linearise(z)
    except SolverError as error:
        raise CalibrationError(f"the model cannot be evaluated at the starting point: {error}") from error
    damping = 1e-2
    scaling = np.diag(precision)
    for iteration in range(1, iterations + 1):
        gradient = linear.gradient + precision @ (z - prior.mean)
        hessian = linear.hessian + precision
        now = linear.objective + penalty(z)
        # Coordinates held at a bound by the gradient do not move.
        free = ~(((z <= low) & (gradient > 0)) | ((z >= high) & (gradient < 0)))
        newton = np.linalg.solve(hessian[np.ix_(free, free)], gradient[free])
        distance = float(np.sqrt(max(gradient[free] @ newton, 0.0)))
        if progress:
            progress(f"iteration {iteration}: objective {now:.6g}, {distance:.2g} sd from the optimum")
        if distance < tolerance:
            return Optimum(z, now, linear, iteration, True)
        accepted = False
        for _ in range(14):
            matrix = hessian[np.ix_(free, free)] + damping * np.diag(scaling[free])
            step = np.zeros_like(z)
            step[free] = -np.linalg.solve(matrix, gradient[free])
            longest = np.max(np.abs(step) / prior.sd)
            if longest > 3.0:
                step *= 3.0 / longest
            for trial in (np.clip(move(z, step), low, high), np.clip(z + step, low, high)):
                try:
                    value = linear.trial(trial) + penalty(trial)
                except SolverError:
                    value = np.inf
                if np.isfinite(value) and value <= now + 1e-12 * abs(now):
                    accepted = True
                    break
            if accepted:
                break
            damping = max(10 * damping, 1e-2)
        if not accepted:
            return Optimum(z, now, linear, iteration, distance < 1.0)
        trial, value = _interpolated(z, trial, now, value, gradient, low, high, linear, penalty)
        z = trial
        damping = max(damping / 10, 1e-6)
        linear = linearise(z)
        if now - value < NEGLIGIBLE * tolerance**2:
            return Optimum(z, linear.objective + penalty(z), linear, iteration, True)
    return Optimum(z, linear.objective + penalty(z), linear, iterations, False)


def _interpolated(z, trial, now: float, value: float, gradient, low, high, linear, penalty) -> tuple[np.ndarray, float]:
    """The better of an accepted step and the minimum of the parabola through it.

    Where residuals are large, Gauss-Newton's curvature is wrong along some directions, and whole steps overshoot (or
    fall short) by the same factor again and again.
    """
    step = trial - z
    slope = float(gradient @ step)
    bend = value - now - slope
    if slope >= 0 or bend <= 0:
        return trial, value
    factor = min(-slope / (2 * bend), 4.0)
    if 0.75 < factor < 1.5:
        return trial, value
    point = np.clip(z + factor * step, low, high)
    try:
        found = linear.trial(point) + penalty(point)
    except SolverError:
        return trial, value
    return (point, found) if np.isfinite(found) and found < value else (trial, value)
