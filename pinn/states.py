"""Parameters from measured states: the same Gauss-Newton for a network and for a classical solver.

With the weights w(p) of a network always those that make the residual least, the misfit of its state to the data is a
function of the few physical parameters p alone. Its Jacobian has two parts, of the state by p with the weights held and
by the weights along their tangent dw/dp, and the weights are marginalised exactly in the limit of a small residual: the
posterior covariance is that of p, not of some thousand weights held together by a soft equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from biomodel.calibration.gaussnewton import along_values, limits_of, minimise, prior_of
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.solvers.base import Built


@dataclass(eq=False)
class StateProblem:
    """Voxel averages of the cell fraction at some days, with independent Gaussian noise.

    Parameters
    ----------
    model : ReactionDiffusion
        Its free parameters are inferred.
    simulation : Built
        Of `PinnSolver`, `TorchSolver` or `FenicsSolver`.
    u0 : tensor, shape (1, z, y, x)
        The known start.
    days : sequence of float
    data : ndarray, shape (T, z, y, x)
        NaN where nothing was measured.
    sd : float
        Noise of one voxel.
    """

    model: ReactionDiffusion
    simulation: Built
    u0: torch.Tensor
    days: Sequence[float]
    data: np.ndarray
    sd: float
    plan: object = field(default=None)

    def __post_init__(self):
        self.rows = np.isfinite(self.data)
        shape = (len(self.days), *self.u0.shape[-3:])
        if self.data.shape != shape:
            raise CalibrationError(f"data: shape {self.data.shape}; expected (days, z, y, x) = {shape}.")
        if not self.rows.any() or not self.sd > 0:
            raise CalibrationError("data: no value is measured, or their noise sd is not a positive number.")
        self.parameters = {n: self.model.parameters[n] for n in self.model.free}

    def values(self, z: np.ndarray) -> dict[str, float]:
        """Parameter values by name from transformed coordinates (p,)."""
        return {n: float(p.prior.to_value(v)) for (n, p), v in zip(self.parameters.items(), z, strict=True)}

    def residual(self, z: np.ndarray) -> np.ndarray:
        """Data minus prediction over the noise (n,)."""
        u = self.simulation(self.values(z), self.u0, self.days, plan=self.plan)[0].detach().numpy()
        return (self.data - u)[self.rows] / self.sd

    def linearise(self, z: np.ndarray) -> StateLinear:
        """Residual and its derivative at z."""
        if self.plan is None:
            self.plan = self.simulation.plan(self.values(z), self.u0, self.days)
        u, du = self.simulation.sensitivities(
            self.values(z), self.u0, self.days, list(self.parameters), plan=self.plan, rows=self.rows
        )
        step = 1e-6
        chain = np.array([
            (float(p.prior.to_value(v + step)) - float(p.prior.to_value(v - step))) / (2 * step)
            for p, v in zip(self.parameters.values(), z, strict=True)
        ])  # fmt: skip
        residual = (self.data[self.rows] - u[0].detach().numpy()) / self.sd
        return StateLinear(self, residual, du[:, 0].detach().numpy() * chain[:, None] / self.sd)


@dataclass(eq=False)
class StateLinear:
    """Gauss-Newton quantities at one point: residual (n,) and derivative of the prediction (p, n), over the noise."""

    problem: StateProblem
    residual: np.ndarray
    jacobian: np.ndarray

    def __post_init__(self):
        self.objective = 0.5 * float(self.residual @ self.residual)
        self.gradient = -self.jacobian @ self.residual
        self.hessian = self.jacobian @ self.jacobian.T

    def trial(self, z: np.ndarray) -> float:
        """Objective at another point."""
        r = self.problem.residual(z)
        return 0.5 * float(r @ r)


@dataclass(frozen=True, eq=False)
class Posterior:
    """Gaussian posterior of the parameters' transformed coordinates.

    Attributes
    ----------
    values : dict of str to float
    z, covariance : ndarray, shape (p,) and (p, p)
    jacobian : ndarray, shape (p, n)
        Derivative of the predicted data over their noise.
    converged : bool
    iterations : int
    """

    values: dict[str, float]
    z: np.ndarray
    covariance: np.ndarray
    jacobian: np.ndarray
    converged: bool
    iterations: int

    @property
    def sd(self) -> np.ndarray:
        """Standard deviations (p,)."""
        return np.sqrt(np.diag(self.covariance))

    def displaced(self, error: np.ndarray) -> np.ndarray:
        """How far (posterior sd, (p,)) an error of the prediction, over the noise (n,), has moved the parameters."""
        return self.covariance @ self.jacobian @ error / self.sd


def infer(problem: StateProblem, iterations: int = 40, tolerance: float = 0.02,
          progress: Callable[[str], None] | None = None) -> Posterior:  # fmt: skip
    """The parameters' posterior, by Gauss-Newton from the priors' medians.

    Parameters
    ----------
    tolerance : float
        Stop where the optimum is nearer than this many posterior standard deviations.
    """
    prior = prior_of(problem.parameters, problem.model.joint)
    found = minimise(problem.linearise, prior.mean.copy(), prior, limits_of(problem.parameters), iterations, tolerance,
                     along_values(problem.parameters), progress)  # fmt: skip
    covariance = np.linalg.inv(found.linear.hessian + prior.precision)
    return Posterior(problem.values(found.z), found.z, (covariance + covariance.T) / 2, found.linear.jacobian,
                     found.converged, found.iterations)  # fmt: skip
