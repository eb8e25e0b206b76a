"""The whitened problem behind a map of the growth rate: residuals, their derivatives, and the maximum.

Unknowns are whitened by their prior: scalars first, then the field, then the state at the first visit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from biomodel.calibration.discrepancy import weights
from biomodel.calibration.field_noise import HALO_SHARE, LEAST, StartNoise
from biomodel.calibration.field_prior import FieldPrior, Link, Matern
from biomodel.calibration.gaussnewton import prior_of
from biomodel.calibration.images import ImageProblem
from biomodel.calibration.lowrank import conjugate_gradients
from biomodel.errors import CalibrationError, ModelError, SolverError
from biomodel.models import ReactionDiffusion
from biomodel.patient import Patient
from biomodel.solvers.simulation import Linearisation, Simulation
from biomodel.solvers.torch import TorchSolver
from biomodel.terms import Flow

__all__ = ["FieldLinear", "FieldProblem", "Maximum", "maximise"]

#: Share of the grid's error that no common factor explains: with the true start, the change from halving the voxels,
#: times one number, leaves 0.02 to 0.5 of itself (virtual patients, 24³).
GRID_SHARE = 0.3


class FieldProblem:
    """Residuals of an imaged patient as a function of whitened scalars, a whitened field and the start's noise.

    Parameters
    ----------
    model, patient, solver
    matern : Matern
        Prior of the field; see `exchange`.
    link : Link
    noise_length : float
        Correlation length of the voxels' noise, mm.
    padding : float, optional
        See :class:`biomodel.calibration.field_prior.FieldPrior`.

    Raises
    ------
    CalibrationError
        If the growth law has no single rate, no voxel of a later visit was measured, or the field's length is shorter
        than a voxel.
    """

    def __init__(
        self,
        model: ReactionDiffusion,
        patient: Patient,
        solver: TorchSolver,
        matern: Matern,
        link: Link,
        noise_length: float = 2.0,
        padding: float | None = None,
    ):
        names = [p.name for p in model.growth.parameters]
        self.rate = f"growth.{names[0]}" if len(names) == 1 else ""
        if model.growth.flow is not Flow.BERNOULLI or self.rate not in model.free or model.growth.fields:
            raise CalibrationError(
                f"FieldLaplace: {type(model.growth).__name__} has no growth rate to map; use Logistic or Exponential "
                "with a rate that is calibrated (not Fixed)."
            )
        self.base = ImageProblem(model, patient, solver)
        self.base.require_plain("FieldLaplace")
        if not self.base.count:
            raise CalibrationError(
                f"patient {patient.id}: no later visit has a measured cell fraction (an ADC map inside a region); a "
                "map of the growth rate would rest on outlines alone. Calibrate one rate for all: Laplace()."
            )
        self.gaussian = prior_of(self.base.parameters, model.joint)
        self.root = np.linalg.cholesky(self.gaussian.covariance)
        self.link, self.padding = link, padding
        domain = self.base.domain
        self.field = FieldPrior(matern, domain.shape, domain.spacing, padding)
        self.p = len(self.base.names)
        unseen = self.base.initial.state({n: np.array([v]) for n, v in self._at_prior().items()})[0]
        unseen = np.where(self.base.initial.seen.region | (unseen < LEAST), 0.0, HALO_SHARE * unseen)
        sd = np.where(self.base.initial.seen.region, np.sqrt(self.base.initial_variance), unseen)
        self.noise = StartNoise(sd, domain.spacing, noise_length)
        self.size = self.p + self.field.size + self.noise.size
        extents = zip(domain.spacing, domain.shape, strict=True)
        #: Voxels' worth of noise that vary as one.
        self.together = float(np.prod([max(1.0, noise_length / s) for s, n in extents if n > 1]))
        self.variance = self.base.variance * self.together
        self.trust = np.ones(len(self.variance))

    def _at_prior(self) -> dict[str, float]:
        return self.base.values(self.gaussian.mean)

    def parts(self, white: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Whitened scalars, field and noise of the start."""
        p, n = self.p, self.field.size
        return white[:p], white[p : p + n], white[p + n :]

    def exchange(self, white: np.ndarray, matern: Matern) -> np.ndarray:
        """Give the field another prior on the same padded box; the same unknowns in its coordinates."""
        old = self.field
        self.field = FieldPrior(matern, self.base.domain.shape, self.base.domain.spacing, self.padding)
        if self.field.size != old.size:
            raise CalibrationError("FieldProblem.exchange: the padded boxes differ; give both priors one padding.")
        scalars, field, start = self.parts(white)
        return np.concatenate((scalars, field * (old.root_spectrum / self.field.root_spectrum).ravel(), start))

    def decode(self, white: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Transformed coordinates (p,) and field (z, y, x)."""
        scalars, field, _ = self.parts(white)
        return self.gaussian.mean + self.root @ scalars, self.field.root(field[None])[0]

    def start(self, white: np.ndarray) -> np.ndarray:
        """Change of the initial state, (z, y, x)."""
        return self.noise.root(self.parts(white)[2])

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
            self.base.solves += 9
            self.variance = self.base.variance * self.together + (GRID_SHARE * self.base.grid_error) ** 2

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

    def slope(self, white: np.ndarray) -> tuple[float, np.ndarray]:
        """The objective and its gradient (n,), by one run and its adjoint."""
        values, params, u0, times = self._run(white)
        base, (z, field) = self.base, self.decode(white)
        live = {n: torch.as_tensor(v, dtype=torch.float64).requires_grad_() for n, v in params.items()}
        u0.requires_grad_()
        u = base.simulation(live, u0, times, plan=base.plan)
        base.solves += 3
        residual, _ = self._residual(u.detach(), values)
        weighted = residual / self.variance * self.trust
        cotangent = np.zeros(base.rows.shape)
        cotangent[base.rows] = weighted
        found = torch.autograd.grad((u[0] * torch.tensor(cotangent)).sum(), [*live.values(), u0])
        *pulled, start = (g.numpy() for g in found)
        start = start.reshape(base.domain.shape)
        by = dict(zip(live, pulled, strict=True))
        by_field, by_level = self.link.slopes(values[self.rate], field)
        scalars = base.shifts(np.arange(len(weighted))) @ weighted
        for i, name in enumerate(base.names):
            if name == self.rate:
                scalars[i] += float((by[name] * by_level).sum())
            elif name in by:
                scalars[i] += float(by[name])
            elif name == "grid.error":
                scalars[i] += float(base.grid_error @ weighted)
        for name, derivative in zip(base.initial.names, base.initial.derivatives(values), strict=True):
            scalars[base.names.index(name)] += float((start * derivative).sum())
        parts = (
            self.root.T @ (scalars * base.chain(z)),
            self.field.transpose((by_field * by[self.rate])[None])[0],
            self.noise.transpose(start),
        )
        value = 0.5 * float((residual**2 / self.variance * self.trust).sum() + white @ white)
        return value, white - np.concatenate(parts)

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

    def forward(self, white: np.ndarray) -> np.ndarray:
        """Change of the predicted rows that count, (rows,), for a change of the unknowns (n,)."""
        base = self.problem.base
        scalars, field, start = self.problem.parts(white)
        rate = self.by_field * torch.tensor(self.problem.field.root(field[None])[0])
        pushed = self.run.push(torch.tensor(self.problem.noise.root(start))[None, None], rate[None, None])
        base.solves += 1
        return pushed[0, 0].cpu().numpy()[base.rows][self.active] + scalars @ self.scalars

    def back(self, rows: np.ndarray) -> np.ndarray:
        """Transpose of `forward`."""
        base = self.problem.base
        full = np.zeros(len(base.variance))
        full[self.active] = rows
        cotangent = np.zeros(base.rows.shape)
        cotangent[base.rows] = full
        start, change = self.run.pull_rate(torch.tensor(cotangent)[None, None])
        base.solves += 1
        field = self.problem.field.transpose((self.by_field * change[0, 0]).cpu().numpy()[None])[0]
        return np.concatenate((self.scalars @ rows, field, self.problem.noise.transpose(start[0, 0].cpu().numpy())))

    def hessian(self, white: np.ndarray) -> np.ndarray:
        """Product with the data's Gauss-Newton Hessian, (n,)."""
        return self.back(self.precision * self.forward(white))

    def pulled(self) -> np.ndarray:
        """Minus the gradient of the data's misfit by the whitened unknowns, (n,)."""
        return self.back(self.precision * self.residual)

    def gradient(self) -> np.ndarray:
        """Of minus the log posterior by the whitened unknowns, (n,)."""
        return self.white - self.pulled()


@dataclass(frozen=True, eq=False)
class Maximum:
    """Where a search ended: unknowns, conjugate-gradient products of each step, and whether the gradient is small."""

    white: np.ndarray
    steps: tuple[int, ...]
    converged: bool
    largest: float


def maximise(
    problem: FieldProblem,
    white: np.ndarray,
    iterations: int,
    tolerance: float,
    progress: Callable[[str], None] | None = None,
    largest: float = 0.0,
    held: Sequence[int] | np.ndarray = (),
) -> Maximum:
    """Maximum of the posterior by Gauss-Newton steps, each solved with conjugate gradients.

    It ends where the gradient has fallen to `tolerance` times its largest so far, which starts from `largest`. Unknowns
    that are `held` stay where they start.

    Raises
    ------
    CalibrationError
        If the model cannot be evaluated at the start.
    """
    try:
        problem.replan(white)
        problem.objective(white)
    except SolverError as error:
        raise CalibrationError(f"the model cannot be evaluated where the search starts: {error}") from error
    first, index = largest, np.asarray(held, int)
    steps: list[int] = []
    for turn in range(iterations):
        linear = problem.linearise(white)
        problem.reweigh(linear)
        linear = replace(linear)  # with the new weights
        value = problem.objective(white)
        gradient = linear.gradient()
        gradient[index] = 0.0
        size = float(np.linalg.norm(gradient))
        first = max(first, size)
        if progress:
            progress(f"iteration {turn + 1}: objective {value:.6g}, gradient {size / max(first, 1e-300):.2g} of its "
                     "largest")  # fmt: skip
        if size <= tolerance * first:
            return Maximum(white, tuple(steps), True, first)

        def product(x: np.ndarray, linear: FieldLinear = linear) -> np.ndarray:
            found = linear.hessian(x)
            found[index] = 0.0
            return found

        step, products = conjugate_gradients(product, -gradient, min(0.1, np.sqrt(size / first)))
        steps.append(products)
        # Far from the optimum no unknown moves by more than three prior standard deviations at once.
        step *= min(1.0, 3.0 / max(float(np.abs(step[: problem.p]).max()), 1e-12))
        length = 1.0
        while True:
            try:
                new = problem.objective(white + length * step)
            except (ModelError, SolverError):  # beyond a parameter's bounds, or too extreme
                new = np.inf
            if new <= value + 1e-4 * length * float(gradient @ step):
                white = white + length * step
                break
            length /= 2
            if length < 1e-4:
                return Maximum(white, tuple(steps), False, first)
        if turn < 3:
            with suppress(SolverError):  # the old steps still serve
                problem.replan(white)
    return Maximum(white, tuple(steps), False, first)
