"""Calibration data of tumours without images: volumes over time on the well-mixed domain.

The state is u = V / capacity. Volumes are compared as y = log(V + floor), where `floor` is the detection floor: above
it the error is a relative one, and a volume of 0 says no more than that the tumour is about the floor or below. Errors
are Student-t with `df` degrees of freedom, so that a single bad segmentation does not move the fit.

Several patients may be laid out together (rows); their parameters are independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.special import gammaln

from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import LogNormal, Parameter
from biomodel.patient import Patient
from biomodel.solvers.reaction import TorchOps
from biomodel.solvers.torch import TorchSolver
from biomodel.terms import Exponential, NoGrowth

VOLUME = "initial.volume"
CAPACITY = "initial.capacity"


def volume_parameters(model: ReactionDiffusion, first: float) -> dict[str, Parameter]:
    """Free parameters of a model on the well-mixed domain; `first` is a typical first volume, cm³."""
    found = {n: model.parameters[n] for n in model.free if not n.startswith("diffusion.")}
    found[VOLUME] = Parameter("volume", "cm^3", LogNormal(max(first, 1e-3), 1.0), (1e-6, 1e5),
                              "weak: around the first measured volume", "volume at the first visit")  # fmt: skip
    if not isinstance(model.growth, (Exponential, NoGrowth)):
        found[CAPACITY] = Parameter("capacity", "cm^3", LogNormal(300.0, 1.0), (1e-2, 1e6),
                                    "weak: volumes at which solid tumours are rarely seen",
                                    "volume at which growth stops")  # fmt: skip
    return found


class VolumeModel:
    """log(V + floor) at given days as a differentiable function of transformed parameters.

    Parameters
    ----------
    days : ndarray, shape (rows, T) or (T,)
        Increasing in each row; the first is the day of the initial volume.
    """

    def __init__(self, model: ReactionDiffusion, parameters: dict[str, Parameter], patients: Sequence[Patient],
                 days: np.ndarray, floor: np.ndarray, solver: TorchSolver):  # fmt: skip
        self.model, self.parameters = model, parameters
        days = np.atleast_2d(np.asarray(days, float))
        schedules = [p.schedule for p in patients]
        if all(s == schedules[0] for s in schedules) and (days == days[0]).all():
            schedules, days = schedules[:1], days[:1]
        self.simulation = solver.build(model, patients[0].domain, schedules, start=list(days[:, 0]))
        self.days = days
        self.plan = self.simulation.fixed_plan(days, [0] + [1] * (days.shape[1] - 1))
        self.floor = torch.tensor(np.asarray(floor, float).reshape(-1, 1))

    def volumes(self, z: torch.Tensor) -> torch.Tensor:
        """Volumes, cm³: (batch, p) to (batch, T)."""
        values = {n: p.prior.to_value(z[:, i], TorchOps) for i, (n, p) in enumerate(self.parameters.items())}
        capacity = values.get(CAPACITY, torch.ones((), dtype=z.dtype)).reshape(-1, 1)
        u0 = (values[VOLUME].reshape(-1, 1) / capacity).reshape(-1, 1, 1, 1)
        params = {n: v for n, v in values.items() if n in self.model.parameters}
        return self.simulation(params, u0, self.days, plan=self.plan)[:, :, 0, 0, 0] * capacity

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """log(V + floor): (batch, p) to (batch, T); the batch is the rows or a multiple of them, rows fastest."""
        v = self.volumes(z)
        return torch.log(v.clamp_min(0.0) + self.floor)

    def jacobian(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values (batch, T) and derivatives (batch, T, p)."""
        x = torch.tensor(z, requires_grad=True)
        y = self(x)
        parts = [torch.autograd.grad(y[:, t].sum(), x, retain_graph=True, allow_unused=True)[0] for t in range(y.shape[1])]
        parts = [torch.zeros_like(x) if g is None else g for g in parts]
        return y.detach().numpy(), torch.stack(parts, 1).numpy()


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

    def __init__(self, model: ReactionDiffusion, patient: Patient, solver: TorchSolver):
        days, volumes = measured(patient)
        if len(days) < 1 or patient.volumes is None:
            raise CalibrationError(f"patient {patient.id}: no visit has a volume; there is nothing to calibrate.")
        if not (volumes > patient.volumes.floor).any():
            raise CalibrationError(
                f"patient {patient.id}: no volume above the detection floor of {patient.volumes.floor:g} cm³; there is "
                "no tumour to calibrate on."
            )
        self.patient, self.model = patient, model
        self.parameters = volume_parameters(model, max(volumes[0], patient.volumes.floor))
        self.names = tuple(self.parameters)
        self.volume_model = VolumeModel(model, self.parameters, [patient], days, np.array([patient.volumes.floor]), solver)
        self.y = np.log(volumes + patient.volumes.floor)
        self.scale, self.df = np.full(len(days), patient.volumes.log_sd), patient.volumes.df
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

    def refine(self, linear: VolumeLinear) -> float:
        """There is no initial field to move."""
        return 0.0


@dataclass(eq=False)
class VolumeLinear:
    """Gauss-Newton quantities of the Student-t likelihood at one point."""

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
