"""Calibration of a map: the growth rate as a Gaussian field, with everything else that is unknown, jointly.

The growth rate is a map made of its level k, as elsewhere, and a field m(x) with the prior of
:mod:`biomodel.calibration.field_prior`: k exp(m), or k + m. The voxel noise of the first visit's map is an unknown of
its own: left out, it would pass for growth. All unknowns are whitened by their prior: scalars, then the field, then the
noise of the first map. The maximum of the posterior is found by Gauss-Newton steps solved with conjugate gradients,
whose number depends on what the data know and not on the grid; the posterior about it is Gaussian with the low-rank
update of :mod:`biomodel.calibration.lowrank`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from biomodel.calibration.discrepancy import weights
from biomodel.calibration.field_prior import FieldPrior, Link, Matern, Multiplied
from biomodel.calibration.fit import Fit
from biomodel.calibration.gaussnewton import prior_of
from biomodel.calibration.images import ImageProblem
from biomodel.calibration.lowrank import LowRank, conjugate_gradients, leading
from biomodel.errors import CalibrationError, SolverError
from biomodel.models import ReactionDiffusion
from biomodel.patient import Patient
from biomodel.solvers.simulation import Linearisation, Simulation
from biomodel.solvers.torch import TorchSolver
from biomodel.terms import Flow

__all__ = ["FieldLaplace", "FieldPosterior"]


@dataclass(frozen=True)
class FieldLaplace:
    """The growth rate as a map: maximum of the posterior, and the Gaussian posterior around it.

    Parameters
    ----------
    prior : Matern
        Of the field.
    link : Link
        How level and field make the rate: `Multiplied` or `Added`.
    noise_length : float
        Correlation length of the voxels' noise, mm: smaller voxels do not know more. Their variance is raised by how
        many of them such a length holds in each direction with extent.
    iterations : int
        Most Gauss-Newton steps.
    tolerance : float
        Stop where the gradient has fallen by this factor.
    most : int
        Most Hessian products for the posterior's eigenpairs.
    seed : int
        Of the eigenpairs' start.
    """

    prior: Matern = Matern()
    link: Link = Multiplied()
    noise_length: float = 2.0
    iterations: int = 20
    tolerance: float = 1e-3
    most: int = 600
    seed: int = 0


@dataclass(frozen=True, eq=False)
class FieldPosterior:
    """Posterior of the map, jointly with the scalars of a fit.

    Attributes
    ----------
    box : tuple of slice
        Where the map lies on the patient's grid.
    mode : ndarray, shape (p + n,)
        Whitened maximum: the scalars first.
    lowrank : LowRank
        Of the whitened data Hessian.
    prior : FieldPrior
    link : Link
    scalars : (ndarray (p,), ndarray (p, p))
        Prior mean and root of the prior covariance of the scalars' transformed coordinates.
    noise : ndarray, shape (z, y, x)
        Standard deviation of the first visit's cell fraction in each voxel; 0 where it is not unknown.
    steps : tuple of int
        Conjugate-gradient products of each Gauss-Newton step.
    """

    box: tuple[slice, slice, slice]
    mode: np.ndarray
    lowrank: LowRank
    prior: FieldPrior
    link: Link
    scalars: tuple[np.ndarray, np.ndarray]
    noise: np.ndarray
    steps: tuple[int, ...]

    @property
    def mean(self) -> np.ndarray:
        """The field at the maximum, (z, y, x) on the box."""
        return self._field(self.mode)

    def _field(self, white: np.ndarray) -> np.ndarray:
        p = len(self.scalars[0])
        return np.asarray(self.prior.root(white[None, p : p + self.prior.size])[0])

    def draw(self, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws of the scalars' transformed coordinates, the field, and the change of the initial state.

        Returns
        -------
        ndarray (draws, p), ndarray (draws, z, y, x), ndarray (draws, z, y, x)
        """
        rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
        p = len(self.scalars[0])
        z = np.empty((draws, p))
        fields, starts = np.empty((draws, *self.prior.shape)), np.empty((draws, *self.prior.shape))
        for i in range(draws):  # one at a time: the white noise of many would not fit into memory
            white = self.mode + self.lowrank.root(rng.standard_normal((1, len(self.mode))))[0]
            z[i] = self.scalars[0] + self.scalars[1] @ white[:p]
            fields[i] = self._field(white)
            starts[i] = spread_out(self.noise, white[p + self.prior.size :])
        return z, fields, starts

    def spread(self) -> np.ndarray:
        """Standard deviation of the field in each voxel, (z, y, x).

        The prior's is the same everywhere; the data take from it what the eigenpairs say.
        """
        variance = np.full(self.prior.shape, self.prior.matern.sd**2)
        for value, vector in zip(self.lowrank.values, self.lowrank.vectors, strict=True):
            variance -= value / (1 + value) * self._field(vector) ** 2
        return np.sqrt(np.maximum(variance, 0.0))

    def gain(self) -> np.ndarray:
        """Information gained over the prior in each voxel, nats: log of prior over posterior spread."""
        return np.log(self.prior.matern.sd / np.maximum(self.spread(), 1e-12))

    @property
    def covariance(self) -> np.ndarray:
        """Posterior covariance (p, p) of the scalars' transformed coordinates."""
        mean, root = self.scalars
        p = len(mean)
        known = self.lowrank.vectors[:, :p]
        share = self.lowrank.values / (1 + self.lowrank.values)
        return np.asarray(root @ (np.eye(p) - (known.T * share) @ known) @ root.T)


def spread_out(noise: np.ndarray, white: np.ndarray) -> np.ndarray:
    """White values of the voxels with noise, times it, on the grid (z, y, x)."""
    found = np.zeros(noise.shape)
    found[noise > 0] = noise[noise > 0] * white
    return found


class FieldProblem:
    """Residuals of an imaged patient as a function of whitened scalars and a whitened field.

    Raises
    ------
    CalibrationError
        If the growth law has no single rate, or treatments differ by place.
    """

    def __init__(self, model: ReactionDiffusion, patient: Patient, solver: TorchSolver, method: FieldLaplace):
        names = [p.name for p in model.growth.parameters]
        self.rate = f"growth.{names[0]}" if len(names) == 1 else ""
        if model.growth.flow is not Flow.BERNOULLI or self.rate not in model.free or model.growth.fields:
            raise CalibrationError(
                f"FieldLaplace: {type(model.growth).__name__} has no growth rate to map; use Logistic or Exponential "
                "with a rate that is calibrated (not Fixed)."
            )
        if any(getattr(t, "map", None) for t in model.treatments):
            raise CalibrationError(
                "FieldLaplace: a drug map and a map of the growth rate cannot be calibrated together; give the "
                "treatments without a map."
            )
        self.base = ImageProblem(model, patient, solver)
        self.gaussian = prior_of(self.base.parameters, model.joint)
        self.root = np.linalg.cholesky(self.gaussian.covariance)
        self.link = method.link
        self.field = FieldPrior(method.prior, self.base.domain.shape, self.base.domain.spacing)
        self.p = len(self.base.names)
        self.noise = np.sqrt(self.base.initial_variance)
        self.size = self.p + self.field.size + int((self.noise > 0).sum())
        spacing, shape = self.base.domain.spacing, self.base.domain.shape
        together = np.prod([max(1.0, method.noise_length / s) for s, n in zip(spacing, shape, strict=True) if n > 1])
        self.variance = self.base.variance * float(together)
        self.trust = np.ones(len(self.variance))

    def decode(self, white: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Transformed coordinates (p,) and field (z, y, x)."""
        field = white[None, self.p : self.p + self.field.size]
        return self.gaussian.mean + self.root @ white[: self.p], self.field.root(field)[0]

    def start(self, white: np.ndarray) -> np.ndarray:
        """Change of the measured initial state, (z, y, x)."""
        return spread_out(self.noise, white[self.p + self.field.size :])

    def _params(self, values: dict, field: np.ndarray) -> dict:
        params = {n: values[n] for n in self.base.model.free}
        return params | {self.rate: torch.tensor(self.link.of(values[self.rate], field))}

    def _run(self, white: np.ndarray) -> tuple[dict, dict, torch.Tensor, np.ndarray]:
        z, field = self.decode(white)
        values = self.base.values(z)
        _, u0, times = self.base._arguments(values)
        return values, self._params(values, field), u0 + torch.tensor(self.start(white)), times

    def replan(self, white: np.ndarray) -> None:
        """Choose the time steps anew, and the estimate of the grid's error."""
        values, params, u0, times = self._run(white)
        self.base.fine_plan = self.base.simulation.plan(params, u0, times)
        self.base.searching = False
        if "grid.error" in self.base.names:
            plain = {n: values[n] for n in self.base.model.free}
            error = self.base.simulation.grid_error(plain, u0, times, plan=self.base.fine_plan)
            self.base.grid_error = error.cpu().numpy()[self.base.rows]

    def _residual(self, u: torch.Tensor, values: dict) -> tuple[np.ndarray, np.ndarray]:
        predicted = u[0].cpu().numpy()[self.base.rows] + values.get("grid.error", 0.0) * self.base.grid_error
        return self.base._residual(predicted, values)

    def objective(self, white: np.ndarray) -> float:
        """Minus log posterior, up to a constant, with the present weights."""
        values, params, u0, times = self._run(white)
        u = self.base.simulation(params, u0, times, plan=self.base.plan)
        self.base.solves += 1
        residual, _ = self._residual(u, values)
        return 0.5 * float((residual**2 / self.variance * self.trust).sum() + white @ white)

    def reweigh(self, linear: FieldLinear) -> None:
        """Weigh outliers anew; see :func:`biomodel.calibration.discrepancy.weights`."""
        residual = np.zeros(len(self.variance))
        residual[linear.active] = linear.residual
        self.trust = weights(residual, self.variance, self.base.groups)

    def linearise(self, white: np.ndarray) -> FieldLinear:
        """Residuals with their derivatives."""
        values, params, u0, times = self._run(white)
        base, (z, field) = self.base, self.decode(white)
        simulation = base.simulation
        assert isinstance(simulation, Simulation)
        run = simulation.linearise(params, u0, times, plan=base.plan, rate=True)
        residual, active = self._residual(run.outputs, values)
        du0 = np.zeros((self.p, 1, *base.domain.shape))
        for name, derivative in zip(base.initial.names, base.initial.derivatives(values), strict=True):
            du0[base.names.index(name), 0] = derivative
        moving = [i for i, n in enumerate(base.names) if n in (base.acting | set(base.initial.names)) - {self.rate}]
        wrt: list[str | None] = [base.names[i] if base.names[i] in base.model.free else None for i in moving]
        jacobian = np.zeros((self.p, len(base.variance)))
        if moving:
            _, du = base.simulation.sensitivities(
                params, u0, times, wrt, plan=base.plan, du0=torch.tensor(du0[moving]), rows=base.rows
            )
            jacobian[moving] = du[:, 0].cpu().numpy()
        by_field, by_level = (torch.tensor(s) for s in self.link.slopes(values[self.rate], field))
        level = run.push(torch.zeros(1, 1, *base.domain.shape, dtype=torch.float64), by_level[None, None])
        jacobian[base.names.index(self.rate)] = level[0, 0].cpu().numpy()[base.rows]
        if "grid.error" in base.names:
            jacobian[base.names.index("grid.error")] = base.grid_error
        base.solves += 2 + len(moving)
        jacobian = (jacobian[:, active] + base.shifts(active)) * base.chain(z)[:, None]
        return FieldLinear(self, run, by_field, residual[active], active, self.root.T @ jacobian, white)


@dataclass(eq=False)
class FieldLinear:
    """Residuals of the rows that count, and the derivative of their predictions by the whitened unknowns."""

    problem: FieldProblem
    run: Linearisation
    by_field: torch.Tensor
    residual: np.ndarray
    active: np.ndarray
    scalars: np.ndarray
    white: np.ndarray

    def __post_init__(self) -> None:
        self.precision = (self.problem.trust / self.problem.variance)[self.active]

    def _forward(self, white: np.ndarray) -> np.ndarray:
        p, base = self.problem.p, self.problem.base
        field = self.problem.field.root(white[None, p : p + self.problem.field.size])[0]
        start = torch.tensor(self.problem.start(white))
        pushed = self.run.push(start[None, None], (self.by_field * torch.tensor(field))[None, None])
        base.solves += 1
        return pushed[0, 0].cpu().numpy()[base.rows][self.active] + white[:p] @ self.scalars

    def _back(self, rows: np.ndarray) -> np.ndarray:
        base = self.problem.base
        full = np.zeros(len(base.variance))
        full[self.active] = rows
        cotangent = np.zeros(base.rows.shape)
        cotangent[base.rows] = full
        start, change = self.run.pull_rate(torch.tensor(cotangent)[None, None])
        base.solves += 1
        field = self.problem.field.transpose((self.by_field * change[0, 0]).cpu().numpy()[None])[0]
        noise = self.problem.noise
        return np.concatenate((self.scalars @ rows, field, (start[0, 0].cpu().numpy() * noise)[noise > 0]))

    def hessian(self, white: np.ndarray) -> np.ndarray:
        """Product with the data's Gauss-Newton Hessian, (n,)."""
        return self._back(self.precision * self._forward(white))

    def gradient(self) -> np.ndarray:
        """Of minus the log posterior by the whitened unknowns, (n,)."""
        return self.white - self._back(self.precision * self.residual)


def calibrate_field(
    model: ReactionDiffusion,
    patient: Patient,
    solver: TorchSolver,
    method: FieldLaplace,
    progress: Callable[[str], None] | None = None,
) -> Fit:
    """Calibrate the growth rate as a map; see :func:`biomodel.calibrate`."""
    problem = FieldProblem(model, patient, solver, method)
    white = np.zeros(problem.size)
    try:
        problem.replan(white)
        value = problem.objective(white)
    except SolverError as error:
        raise CalibrationError(f"the model cannot be evaluated at the prior's mean: {error}") from error
    first, converged, steps = 0.0, False, []
    for turn in range(method.iterations):
        linear = problem.linearise(white)
        problem.reweigh(linear)
        linear = replace(linear)  # with the new weights
        value = problem.objective(white)
        gradient = linear.gradient()
        size = float(np.linalg.norm(gradient))
        first = max(first, size)
        if progress:
            progress(f"iteration {turn + 1}: objective {value:.6g}, gradient {size / first:.2g} of its largest")
        if size <= method.tolerance * first:
            converged = True
            break
        step, products = conjugate_gradients(linear.hessian, -gradient, min(0.1, np.sqrt(size / first)))
        steps.append(products)
        # Far from the optimum no unknown moves by more than three prior standard deviations at once.
        step *= min(1.0, 3.0 / max(float(np.abs(step[: problem.p]).max()), 1e-12))
        length = 1.0
        while True:
            try:
                new = problem.objective(white + length * step)
            except SolverError:
                new = np.inf
            if new <= value + 1e-4 * length * float(gradient @ step):
                white = white + length * step
                break
            length /= 2
            if length < 1e-4:
                break
        if length < 1e-4:
            break
        if turn < 3:
            problem.replan(white)
    linear = problem.linearise(white)
    lowrank = leading(linear.hessian, problem.size, most=method.most, seed=method.seed)
    scalars = (problem.gaussian.mean, problem.root)
    posterior = FieldPosterior(
        problem.base.box, white, lowrank, problem.field, method.link, scalars, problem.noise, tuple(steps)
    )
    notes = list(patient.notes)
    if not converged:
        notes.append(f"The calibration stopped after {len(steps)} steps without converging.")
    if lowrank.products >= method.most:
        notes.append(
            f"The posterior's eigenpairs were cut off at {lowrank.products} products; the largest left out is about "
            f"{lowrank.next_value:.2g}. Raise most."
        )
    misfit = float((linear.residual**2 * linear.precision).sum())
    measured = problem.base.measured[problem.base.rows]
    log_likelihood = -0.5 * (misfit + float(np.log(2 * np.pi * problem.variance[measured]).sum()))
    return Fit(
        model=model,
        patient=patient,
        solver=solver,
        method=type(method).__name__,
        parameters=problem.base.parameters,
        prior=problem.gaussian,
        z=problem.decode(white)[0],
        covariance=posterior.covariance,
        log_likelihood=log_likelihood,
        log_evidence=log_likelihood - 0.5 * float(white @ white) - lowrank.information,
        count=problem.base.count,
        iterations=len(steps),
        solves=problem.base.solves,
        converged=converged,
        box=problem.base.box,
        notes=tuple(notes),
        rate_map=posterior,
    )
