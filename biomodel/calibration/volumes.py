"""Calibration data of tumours without images: volumes over time on the well-mixed domain.

The state is u = V / capacity. Volumes are compared as y = log(V + floor), where `floor` is the detection floor: above
it the error is a relative one, and a volume of 0 says no more than that the tumour is about the floor or below. Errors
are Student-t with `df` degrees of freedom, so that a single bad segmentation does not move the fit.

Several patients may be laid out together (rows); their parameters are independent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.special import gammaln

from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import LogNormal, Parameter
from biomodel.patient import Patient
from biomodel.solvers.plan import TimePlan
from biomodel.solvers.reaction import FLOWS, Course, TorchOps
from biomodel.solvers.torch import TorchSolver
from biomodel.terms import Exponential, NoGrowth
from biomodel.visit import VolumeSettings

VOLUME = "initial.volume"
CAPACITY = "initial.capacity"
#: Most members of one batch: larger ones do not fit the processor's caches and run slower.
BATCH = 8192


def volume_parameters(model: ReactionDiffusion, first: float) -> dict[str, Parameter]:
    """Free parameters of a model on the well-mixed domain; `first` is a typical first volume, cm³."""
    found = {n: model.parameters[n] for n in model.free if not n.startswith(("diffusion.", "mechanics."))}
    found[VOLUME] = Parameter("volume", "cm^3", LogNormal(max(first, 1e-3), 1.0), (1e-6, 1e5),
                              "weak: around the first measured volume", "volume at the first visit")  # fmt: skip
    if not isinstance(model.growth, (Exponential, NoGrowth)):
        found[CAPACITY] = Parameter("capacity", "cm^3", LogNormal(300.0, 1.0), (1e-6, 1e6),
                                    "weak: volumes at which solid tumours are rarely seen",
                                    "volume at which growth stops")  # fmt: skip
    return found


@dataclass(frozen=True)
class VolumeNoise:
    """Errors of log(V + floor): Student-t, with a scale that may change over the visits.

    Attributes
    ----------
    days : tuple of float
        Days since the first visit at which the scale is known, increasing.
    scale : tuple of float
        Scale on these days; its logarithm is interpolated between them and constant outside.
    df : float
        Degrees of freedom.
    """

    days: tuple[float, ...]
    scale: tuple[float, ...]
    df: float

    def __post_init__(self):
        if len(self.days) != len(self.scale) or not self.days or min(self.scale) <= 0 or self.df <= 2:
            raise CalibrationError(
                f"VolumeNoise: days {self.days}, scale {self.scale}, df {self.df}; expected one positive scale per day "
                "and more than 2 degrees of freedom."
            )

    @classmethod
    def of(cls, settings: VolumeSettings) -> VolumeNoise:
        """The noise that a patient's record states."""
        return cls((0.0,), (settings.log_sd,), settings.df)

    def at(self, since: np.ndarray) -> np.ndarray:
        """Scale at days since the first visit, of the same shape."""
        return np.exp(np.interp(since, self.days, np.log(self.scale)))


class VolumeModel:
    """log(V + floor) at given days as a differentiable function of transformed parameters.

    Parameters
    ----------
    days : ndarray, shape (rows, T) or (T,)
        Not decreasing in each row; the first is the day of the initial volume.
    floor : ndarray, shape (rows,) or (1,)
        Detection floor, cm³.
    """

    def __init__(self, model: ReactionDiffusion, parameters: Mapping[str, Parameter], patients: Sequence[Patient],
                 days: np.ndarray, floor: np.ndarray, solver: TorchSolver):  # fmt: skip
        self.model, self.parameters, self.solver = model, dict(parameters), solver
        days = np.atleast_2d(np.asarray(days, float))
        schedules = [p.schedule for p in patients]
        if (days == days[0]).all() and all(s is schedules[0] or s == schedules[0] for s in schedules):
            # Who shares visits and treatments shares one row: nothing is computed twice.
            schedules, days = schedules[:1], days[:1]
        self.simulation = solver.build(model, patients[0].domain, schedules, start=list(days[:, 0]))
        self.schedules, self.days = schedules, days
        self.plan = self.simulation.fixed_plan(days, [0] + [1] * (days.shape[1] - 1))
        floor = np.broadcast_to(np.asarray(floor, float).reshape(-1), (len(patients),))
        self.floor = torch.tensor(floor[:1] if (floor == floor[0]).all() else floor)[:, None]
        self._courses: dict[int, Course] = {}

    @property
    def rows(self) -> int:
        """Patients that differ in visits or treatments; 1 where all share them."""
        return len(self.schedules)

    def _course(self, times: int) -> Course:
        """Treatment courses of all rows, repeated."""
        if times not in self._courses:
            p = self.plan
            tiled = [np.tile(x, (times, 1)) for x in (p.edges, p.start, p.length, p.step)]
            plan = TimePlan(tiled[0], p.outputs, *tiled[1:])
            self._courses[times] = Course(self.model, self.schedules * times, plan)
        return self._courses[times]

    def volumes(self, z: torch.Tensor) -> torch.Tensor:
        """Volumes, cm³: (batch, p) to (batch, T); the batch is the rows or a multiple of them, rows fastest."""
        block = BATCH if self.rows == 1 else self.rows * max(1, BATCH // self.rows)
        parts = [self._block(part) for part in z.split(block)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _block(self, z: torch.Tensor) -> torch.Tensor:
        values = {}
        for i, (n, p) in enumerate(self.parameters.items()):
            # Bounds are far in the tails; a draw beyond one is set onto it.
            values[n] = p.prior.to_value(z[:, i], TorchOps).clamp(*p.bounds)
        capacity = values.get(CAPACITY, torch.ones(1, dtype=z.dtype))[:, None]
        u = values[VOLUME][:, None] / capacity
        params = {n: v for n, v in values.items() if n in self.model.parameters}
        flow = self.model.growth.flow
        if flow is None or self.simulation.maps:
            # Without a closed form the simulation takes its steps, for one draw of all rows at a time.
            parts = z.shape[0] // self.rows if self.rows > 1 else 1
            runs = []
            for k in range(parts):
                at = slice(k * self.rows, (k + 1) * self.rows) if self.rows > 1 else slice(None)
                start = u[at].reshape(-1, 1, 1, 1)
                here = {n: v[at] for n, v in params.items()}
                runs.append(self.simulation(here, start, self.days, plan=self.plan)[:, :, 0, 0, 0])
            return torch.cat(runs) * capacity
        complete = self.model.complete(params)
        complete = {n: torch.as_tensor(v, dtype=torch.float64).reshape(-1) for n, v in complete.items()}
        a, b = self._course(z.shape[0] // self.rows if self.rows > 1 else 1).coefficients(complete)
        states = [u]
        for i in range(self.plan.steps):
            states.append(FLOWS[flow](states[-1], a[:, i : i + 1], b[:, i : i + 1]))
        return torch.cat([states[k] for k in self.plan.outputs], 1) * capacity

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """log(V + floor), shaped as `volumes`."""
        v = self.volumes(z)
        floor = self.floor if self.floor.shape[0] == 1 else self.floor.repeat(z.shape[0] // self.floor.shape[0], 1)
        return torch.log(v.clamp_min(0.0) + floor)

    def draws(self, z: np.ndarray) -> np.ndarray:
        """log(V + floor) of many draws: (patients, draws, p) to (patients, draws, T); not finite where V is not."""
        n, s, p = z.shape
        with torch.no_grad():
            y = self(torch.tensor(z.transpose(1, 0, 2).reshape(s * n, p)))
        return y.reshape(s, n, -1).numpy().transpose(1, 0, 2)

    def jacobian(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (batch, T) and derivatives (batch, T, p)."""
        x = torch.tensor(z, requires_grad=True)
        y = self(x)
        # A product with the transpose is linear in its cotangent: differentiated by it, it gives a column of the
        # Jacobian, so that the passes are as many as parameters, however many times there are.
        cotangent = torch.zeros_like(y, requires_grad=True)
        (pulled,) = torch.autograd.grad(y, x, cotangent, create_graph=True)
        columns = []
        for k in range(z.shape[1]):
            (column,) = torch.autograd.grad(pulled[:, k].sum(), cotangent, retain_graph=True, allow_unused=True)
            columns.append(torch.zeros_like(y) if column is None else column)
        return y.detach().numpy(), torch.stack(columns, -1).detach().numpy()


def t_weights(residual: np.ndarray, scale: np.ndarray, df: float) -> tuple[np.ndarray, np.ndarray]:
    """Student-t: minus the log density without its constant, and Gauss-Newton weights, elementwise."""
    x = (residual / scale) ** 2
    if not np.isfinite(df):
        return 0.5 * x, 1 / scale**2 * np.ones_like(x)
    return (df + 1) / 2 * np.log1p(x / df), (df + 1) / (df + x) / scale**2


def t_constant(scale: np.ndarray, df: float) -> np.ndarray:
    """Log of the density's constant."""
    if not np.isfinite(df):
        return -np.log(scale) - 0.5 * np.log(2 * np.pi)
    return gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * np.log(df * np.pi) - np.log(scale)


def measured(patient: Patient) -> tuple[np.ndarray, np.ndarray]:
    """Days and volumes of the visits that have one (NaN-free)."""
    pairs = [(v.day, patient.volume_of(v)) for v in patient.visits]
    pairs = [(d, v) for d, v in pairs if v is not None]
    return np.array([d for d, _ in pairs], float), np.array([v for _, v in pairs], float)


class VolumeProblem:
    """Residuals and sensitivities of one patient without images, for `calibrate`."""

    box = None
    update = None
    searching = False

    def __init__(self, model: ReactionDiffusion, patient: Patient, solver: TorchSolver,
                 parameters: Mapping[str, Parameter] | None = None, noise: VolumeNoise | None = None):  # fmt: skip
        days, volumes = measured(patient)
        if len(days) < 1:
            raise CalibrationError(f"patient {patient.id}: no visit has a volume; there is nothing to calibrate.")
        if patient.volumes is None:
            raise CalibrationError(
                f"patient {patient.id}: visits have volumes, but their noise is not told; add 'volumes' with cv and "
                "floor to the manifest, or take patient.without_images(cv=..., floor=...)."
            )
        if not (volumes > patient.volumes.floor).any():
            raise CalibrationError(
                f"patient {patient.id}: no volume above the detection floor of {patient.volumes.floor:g} cm³; there is "
                "no tumour to calibrate on."
            )
        self.patient, self.model = patient, model
        self.parameters = dict(parameters or volume_parameters(model, max(volumes[0], patient.volumes.floor)))
        self.names = tuple(self.parameters)
        floor = np.array([patient.volumes.floor])
        self.volume_model = VolumeModel(model, self.parameters, [patient], days, floor, solver)
        self.y = np.log(volumes + patient.volumes.floor)
        self.noise = VolumeNoise.of(patient.volumes) if noise is None else noise
        self.scale, self.df = self.noise.at(days - days[0]), self.noise.df
        self.solves = 0

    @property
    def count(self) -> int:
        return len(self.y)

    def replan(self, z: np.ndarray) -> None:
        """Nothing to choose: the flow is exact over any step."""

    def linearise(self, z: np.ndarray, exact: bool) -> VolumeLinear:
        self.solves += 1
        y, jacobian = self.volume_model.jacobian(z[None])
        return VolumeLinear(self, self.y - y[0], jacobian[0])

    def residual(self, z: np.ndarray) -> np.ndarray:
        self.solves += 1
        with torch.no_grad():
            return self.y - self.volume_model(torch.tensor(z[None])).numpy()[0]

    def reweigh(self, linear: VolumeLinear, precision: np.ndarray) -> float:
        """The errors have heavy tails already, and each patient has a few volumes only."""
        return 0.0

    def refine(self, linear: VolumeLinear) -> float:
        """There is no initial field to move."""
        return 0.0


@dataclass(eq=False)
class VolumeLinear:
    """Gauss-Newton quantities of the Student-t likelihood at one point."""

    inflation: ClassVar[float] = 1.0  # its heavy tails take up what is not noise
    problem: VolumeProblem
    residual: np.ndarray
    jacobian: np.ndarray

    def __post_init__(self):
        loss, weight = t_weights(self.residual, self.problem.scale, self.problem.df)
        self.objective = float(loss.sum())
        self.gradient = -self.jacobian.T @ (weight * self.residual)
        self.hessian = (self.jacobian.T * weight) @ self.jacobian

    def trial(self, z: np.ndarray) -> float:
        return float(t_weights(self.problem.residual(z), self.problem.scale, self.problem.df)[0].sum())

    def log_likelihood(self) -> float:
        return -self.objective + float(t_constant(self.problem.scale, self.problem.df).sum())
