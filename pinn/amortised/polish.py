"""A few Gauss-Newton steps on a patient's own scans, from the operator's estimate, with a classical solver.

The likelihood is that of the setting: independent Gaussian noise on the maps of both visits, with parameters and start
unknown. The full fit is the same from the prior's median.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import multivariate_t

from biomodel.calibration.gaussnewton import along_values, limits_of, minimise, prior_of
from biomodel.calibration.samples import Samples
from biomodel.errors import CalibrationError
from biomodel.parameters import Normal, Parameter, Prior
from biomodel.solvers.torch import TorchSolver
from pinn.amortised.operator import Amortised
from pinn.amortised.setting import Case, Setting
from pinn.joint.starts import BoundFoci
from pinn.states import Posterior, StateLinear, infer

#: Degrees of freedom of the proposal around an optimum, and draws simulated at once.
TAILS, AT_ONCE = 6.0, 128
#: Gauss-Newton steps of a polish, at most; it ends where the optimum is nearer than `TOLERANCE` posterior sd.
STEPS, TOLERANCE = 5, 0.05


@dataclass(eq=False)
class ScanProblem:
    """The scans of one patient of a setting, for `pinn.infer` and :func:`polish`.

    Parameters
    ----------
    setting : Setting
    case : Case
        Days, schedule and noise; its `z` is not looked at.
    images : ndarray, shape (2, z, y, x)
        Cell fractions of both visits; NaN where nothing was measured.
    solver : TorchSolver, optional
        Or `FenicsSolver`.
    """

    setting: Setting
    case: Case
    images: np.ndarray
    solver: TorchSolver | None = None

    def __post_init__(self):
        s = self.setting
        self.images = np.asarray(self.images, float)
        if self.images.shape != (expected := (2, *s.domain.shape)):
            raise CalibrationError(f"ScanProblem: images {self.images.shape}; expected (2, z, y, x) = {expected}.")
        self.rows = np.isfinite(self.images)
        if not self.rows.any():
            raise CalibrationError("ScanProblem: no voxel was measured at either visit.")
        self.model, self.start = s.model, s.bound
        free = {n: s.model.parameters[n] for n in s.model.free}
        self.parameters = {**free, **_start_parameters(s.start.peak, s.start.width, self.start)}
        self.days = [self.case.days[0]]
        self.simulation = (self.solver or TorchSolver()).build(s.model, s.domain, self.case.schedule)
        self.plan = None

    def values(self, z: np.ndarray) -> dict[str, float]:
        """Values by name, of the start too, from coordinates (p,)."""
        return {n: float(p.prior.to_value(v)) for (n, p), v in zip(self.parameters.items(), z, strict=True)}

    def residual(self, z: np.ndarray) -> np.ndarray:
        """Data minus prediction over the noise (n,)."""
        u0 = self.start.states(z[len(self.model.free) :])
        u = self.simulation(self.setting.values(z), torch.tensor(u0), self.days, plan=self.plan)[0].detach().numpy()
        return (self.images - np.concatenate((u0, u)))[self.rows] / self.case.noise

    def linearise(self, z: np.ndarray) -> StateLinear:
        """Residual and its derivative at z."""
        m, params = len(self.model.free), self.setting.values(z)
        u0, du0 = self.start.linear(z[m:])
        start = torch.tensor(u0[None])
        if self.plan is None:
            self.plan = self.simulation.plan(params, start, self.days)
        moved = torch.zeros(len(z), 1, *u0.shape, dtype=torch.float64)
        moved[m:, 0] = torch.tensor(du0)
        wrt = [*self.model.free, *[None] * len(du0)]
        u, du = self.simulation.sensitivities(params, start, self.days, wrt, plan=self.plan, du0=moved)
        step, chain = 1e-6, np.ones(len(z))
        for i, name in enumerate(self.model.free):
            prior = self.parameters[name].prior
            chain[i] = (float(prior.to_value(z[i] + step)) - float(prior.to_value(z[i] - step))) / (2 * step)
        later = du[:, 0, 0].detach().numpy() * chain[:, None, None, None]
        predicted = np.stack((u0, u[0, 0].detach().numpy()))
        slopes = np.stack((moved[:, 0].numpy(), later), 1)
        sd = self.case.noise
        return StateLinear(self, (self.images - predicted)[self.rows] / sd, slopes[:, self.rows] / sd)  # type: ignore[arg-type]

    def log_likelihood(self, z: np.ndarray) -> np.ndarray:
        """Log likelihoods (n,) of coordinates (n, p), but for a constant; many are simulated at once."""
        m, found = len(self.model.free), []
        for part in np.split(z, range(AT_ONCE, len(z), AT_ONCE)):
            u0 = self.start.states(part[:, m:])
            each = [self.setting.values(one) for one in part]
            params = {n: torch.tensor([v[n] for v in each]) for n in self.model.free}
            with torch.no_grad():
                u = self.simulation(params, torch.tensor(u0), self.days, plan=self.plan)[:, 0].numpy()
            off = (np.stack((u0, u), 1) - self.images)[:, self.rows] / self.case.noise
            found.append(-0.5 * (off**2).sum(1))
        return np.concatenate(found)

    def forecast(self, z: np.ndarray, day: float) -> np.ndarray:
        """Map (z, y, x) of a day by the classical solver."""
        u0 = torch.tensor(self.start.states(z[len(self.model.free) :]))
        with torch.no_grad():
            return self.simulation(self.setting.values(z), u0, [day])[0, 0].numpy()


def _start_parameters(peak: Prior, width: Prior, start: BoundFoci) -> dict[str, Parameter]:
    """The start's coordinates as parameters."""
    found = {}
    kinds: list[Prior | None] = [*[None] * len(start.axes), peak, width]
    for i, (name, kind) in enumerate(zip(start.names, kinds, strict=True)):
        prior = kind or Normal(float(start.prior.mean[i]), float(start.prior.sd[i]))
        bounds = (float(prior.to_value(start.limits[0][i])), float(prior.to_value(start.limits[1][i])))
        found[name.replace("focus1", "start")] = Parameter(name.split(".")[1], "", prior, bounds)
    return found


def polish(problem: ScanProblem, z: np.ndarray, steps: int = STEPS,
           progress: Callable[[str], None] | None = None) -> Posterior:  # fmt: skip
    """Posterior by a few Gauss-Newton steps from an estimate z (p,), such as the operator's mean."""
    prior = prior_of(problem.parameters, problem.model.joint)
    found = minimise(problem.linearise, np.asarray(z, float), prior, limits_of(problem.parameters), steps, TOLERANCE,
                     along_values(problem.parameters), progress)  # fmt: skip
    covariance = np.linalg.inv(found.linear.hessian + prior.precision)
    return Posterior(problem.values(found.z), found.z, (covariance + covariance.T) / 2, found.linear.jacobian,
                     found.converged, found.iterations)  # fmt: skip


def full_fit(problem: ScanProblem) -> Posterior:
    """The same posterior from the priors' medians, until it has converged."""
    return infer(problem)  # type: ignore[arg-type]


def weighed(problem: ScanProblem, polished: Posterior, amortised: Amortised | None = None, draws: int = 768,
            seed: int = 0) -> Samples:  # fmt: skip
    """Weighted draws of the exact posterior, where a Gaussian at the optimum is not enough.

    Importance sampling: half of the draws come from a Student distribution at the polished optimum, half from the
    operator's density (all from the former without one), and weights are exact for their mixture; so neither has to be
    right, and `Samples.ess` tells how far they were.

    Parameters
    ----------
    amortised : Amortised, optional
        Of this one patient (`Amortised.patient`).
    """
    rng = np.random.default_rng([seed, 65])
    prior, (low, high) = prior_of(problem.parameters, problem.model.joint), limits_of(problem.parameters)
    first = draws if amortised is None else draws - draws // 2
    student = multivariate_t(polished.z, polished.covariance, TAILS, seed=rng)
    z = np.atleast_2d(student.rvs(first))
    if amortised is not None:
        z = np.concatenate((z, amortised.draw(draws - first, seed)[0]))
    inside = ((z > low) & (z < high)).all(1)
    z = z[inside]
    log = student.logpdf(z)
    if amortised is not None:
        log = np.logaddexp(log + np.log(first / draws), amortised.log_density(z) + np.log(1 - first / draws))
    off = z - prior.mean
    log = problem.log_likelihood(z) - 0.5 * np.einsum("ni,ij,nj->n", off, prior.precision, off) - log
    weights = np.exp(log - log.max())
    return Samples(z, weights / weights.sum())
