"""Start, parameters and noise from few visits at once, by one Gauss-Newton for a network and for a classical solver.

Nothing is known of the start but a prior (:mod:`pinn.joint.starts`), nothing of the noise but one
(:mod:`pinn.joint.observed`). The state's derivatives by parameters and along changes of the start come from the
simulation: by the implicit function theorem on a network's residual, or by a classical solver's forward sensitivities.
A network's weights are eliminated, so the covariance is that of start, parameters and noise.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from biomodel.calibration.gaussnewton import GaussianPrior, limits_of, prior_of
from biomodel.domain import Domain
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import Parameter
from biomodel.schedule import Schedule
from biomodel.solvers.base import Solver
from pinn.joint.observed import Local, Modality, Observation
from pinn.joint.starts import Start
from pinn.solver import PinnSimulation, PinnSolver

#: A classical solver's steps are chosen anew when a parameter's coordinate has moved by more than this.
MOVED = 0.3
#: A fall of the summed cell fractions by this many of its standard deviations, and by this share, is no noise.
FALL, SHARE = 3.0, 0.1
#: A network large enough for a state whose parameters have errors of some per cent.
SMALL = PinnSolver(rtol=5e-3, frequencies=4, hidden=(12, 12))


class DataWarning(UserWarning):
    """Data that do not fit the model's assumptions, or do not inform what is asked of them."""


@dataclass(eq=False)
class JointProblem:
    """What was seen at some days of a tumour whose start is unknown.

    Parameters
    ----------
    model : ReactionDiffusion
        Its free parameters are inferred.
    domain : Domain
    schedule : Schedule or None
        None says that nothing is known of treatments; a model with treatments refuses it.
    start : Foci or FreeStart
    start_day : float
        Day of the start: that of the first observation, or before it.
    observations : sequence of Observation
        Any modalities at any days.
    solver : PinnSolver, TorchSolver or FenicsSolver
    fields : mapping of str to ndarray, optional
        Spatial fields that terms declare beyond the domain's tissues.
    offset : ndarray, optional
        Added to the predictions (n,); see `by`.
    scaled_time : bool
        The days are in a unit of their own, the time since the start being unknown: a single visit then has a meaning,
        and only what no unit of time enters is asked of the posterior, such as D / k.

    Raises
    ------
    CalibrationError
        If an observation lies before the start, shapes differ, treatments are unknown to a model that has them, or the
        observations cannot tell the free parameters.
    """

    model: ReactionDiffusion
    domain: Domain
    schedule: Schedule | None
    start: Start
    start_day: float
    observations: Sequence[Observation]
    solver: Solver = SMALL
    fields: Mapping[str, np.ndarray] | None = None
    offset: np.ndarray | None = field(default=None, repr=False)
    scaled_time: bool = False

    def __post_init__(self):
        self.observations = sorted(self.observations, key=lambda o: (o.day, o.modality.name))
        self.parameters = {n: self.model.parameters[n] for n in self.model.free}
        _check(self)
        self.bound = self.start.on(self.domain)
        self.modalities: dict[str, Modality] = {o.modality.name: o.modality for o in self.observations}
        self.unknowns: dict[str, Parameter] = {
            f"{name}.{p.name}": p for name, m in self.modalities.items() for p in m.parameters if not p.fixed
        }
        self.days = sorted({o.day for o in self.observations})
        self.rows = np.zeros((len(self.days), *self.domain.shape), bool)
        for o in self.observations:
            self.rows[self.days.index(o.day)] |= o.seen & self.domain.mask
        order = np.full(self.rows.shape, -1)
        order[self.rows] = np.arange(self.rows.sum())
        self.parts = []
        for o in self.observations:
            inside = o.seen & self.domain.mask
            self.parts.append((o.modality, order[self.days.index(o.day)][inside], o.values[inside]))
        first, middle = len(self.parameters), len(self.bound.names)
        self.cut = (slice(0, first), slice(first, first + middle), slice(first + middle, None))
        self.names = (*self.parameters, *self.bound.names, *self.unknowns)
        own = prior_of(self.parameters, self.model.joint)
        noise = prior_of(self.unknowns)
        mean = np.concatenate((own.mean, self.bound.prior.mean, noise.mean))
        covariance = np.zeros((len(mean), len(mean)))
        for part, prior in zip(self.cut, (own, self.bound.prior, noise), strict=True):
            covariance[part, part] = prior.covariance
        self.prior = GaussianPrior(mean, covariance)
        self.limits = tuple(
            np.concatenate(three)
            for three in zip(limits_of(self.parameters), self.bound.limits, limits_of(self.unknowns), strict=True)
        )
        self.simulation = self.solver.build(
            self.model, self.domain, self.schedule or Schedule(), self.fields, start=self.start_day
        )
        self._plan: tuple[np.ndarray, Any] | None = None

    def by(self, solver: Solver, offset: np.ndarray | None = None) -> JointProblem:
        """The same problem by another solver, whose predictions (n,) are shifted by `offset`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)  # said when the first was made
            return replace(self, solver=solver, offset=offset)

    # Coordinates ------------------------------------------------------------------------------------------------------

    def physical(self, z: np.ndarray) -> dict[str, Any]:
        """The model's parameters by name from coordinates (..., p): numbers, or arrays of draws."""
        found = {n: p.prior.to_value(z[..., i]) for i, (n, p) in enumerate(self.parameters.items())}
        return {n: float(v) for n, v in found.items()} if z.ndim == 1 else found

    def own(self, modality: Modality, z: np.ndarray) -> dict[str, Any]:
        """A modality's unknowns by short name, from coordinates (..., p)."""
        at = self.cut[2].start
        names = list(self.unknowns)
        found: dict[str, Any] = {}
        for p in modality.parameters:
            name = f"{modality.name}.{p.name}"
            found[p.name] = p.prior.to_value(z[..., at + names.index(name)]) if name in names else p.typical
        return {n: float(v) for n, v in found.items()} if z.ndim == 1 else found

    def values(self, z: np.ndarray) -> dict[str, float]:
        """All values by name; coordinates of a free start stay as they are."""
        found = self.physical(z)
        inner = getattr(self.bound, "values", None)
        start = z[self.cut[1]]
        found |= inner(start) if inner else dict(zip(self.bound.names, start.tolist(), strict=True))
        ends = zip(self.unknowns.items(), z[self.cut[2]], strict=True)
        return found | {n: float(p.prior.to_value(v)) for (n, p), v in ends}

    def u0(self, z: np.ndarray) -> torch.Tensor:
        """Initial states (draws, z, y, x) of coordinates (p,) or (draws, p)."""
        return torch.tensor(self.bound.states(np.atleast_2d(z)[:, self.cut[1]]))

    # Likelihood -------------------------------------------------------------------------------------------------------

    def steps(self, z: np.ndarray) -> Any:
        """Time steps of a classical solver near these coordinates; None for a network."""
        if isinstance(self.simulation, PinnSimulation):
            return None
        here = z[self.cut[0]]
        if self._plan is None or np.abs(here - self._plan[0]).max(initial=0.0) > MOVED:
            self._plan = (here.copy(), self.simulation.plan(self.physical(z), self.u0(z), self.days))
        return self._plan[1]

    def predicted(self, z: np.ndarray) -> np.ndarray:
        """Cell fractions (n,) where something was measured."""
        u = self.simulation(self.physical(z), self.u0(z), self.days, plan=self.steps(z))[0].detach().numpy()[self.rows]
        return u if self.offset is None else u + self.offset

    def loss(self, u: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Negative log likelihoods (draws,) of predictions (draws, n) at coordinates (draws, p)."""
        total = np.zeros(len(u))
        for modality, where, seen in self.parts:
            total += modality.loss(u[:, where], seen, self.own(modality, z))
        return total

    def objective(self, z: np.ndarray) -> float:
        """Negative log likelihood at coordinates (p,)."""
        return float(self.loss(self.predicted(z)[None], z[None])[0])

    def linearise(self, z: np.ndarray) -> JointLinear:
        """Likelihood and its Gauss-Newton quantities at coordinates (p,)."""
        u0, by_start = self.bound.linear(z[self.cut[1]])
        p, shape = len(self.parameters), self.domain.shape
        directions = torch.tensor(np.concatenate((np.zeros((p, *shape)), by_start)))[:, None]
        plan = self.steps(z)
        u, du = self.simulation.sensitivities(
            self.physical(z), torch.tensor(u0)[None], self.days, [*self.parameters, *[None] * len(by_start)],
            plan=plan, du0=directions, rows=self.rows,
        )  # fmt: skip
        by = du[:, 0].detach().numpy().copy()
        by[:p] *= _slopes(self.parameters, z[self.cut[0]])[:, None]
        states = u[0].detach().numpy()
        return JointLinear(self, z, states if self.offset is None else states + self.offset, by)


@dataclass(eq=False)
class JointLinear:
    """Gauss-Newton quantities at one point: predictions (n,), derivatives by parameters and start (p + s, n)."""

    problem: JointProblem
    z: np.ndarray
    u: np.ndarray
    jacobian: np.ndarray

    def __post_init__(self):
        problem, k = self.problem, self.jacobian.shape[0]
        size = len(self.z)
        self.objective, self.gradient, self.hessian = 0.0, np.zeros(size), np.zeros((size, size))
        names = list(problem.unknowns)
        chain = _slopes(problem.unknowns, self.z[problem.cut[2]])
        for modality, where, seen in problem.parts:
            local: Local = modality.local(self.u[where], seen, problem.own(modality, self.z))
            mine = [(i, names.index(n)) for i, p in enumerate(modality.parameters)
                    if (n := f"{modality.name}.{p.name}") in names]  # fmt: skip
            self.objective += local.value
            by = self.jacobian[:, where]
            self.gradient[:k] += by @ local.by_cells
            for i, j in mine:
                self.gradient[k + j] += chain[j] * local.by_unknowns[i]
            for a, b in local.rows:
                g = np.zeros((size, len(where)))
                g[:k] = by * a
                for i, j in mine:
                    g[k + j] = chain[j] * b[i]
                self.hessian += g @ g.T

    def trial(self, z: np.ndarray) -> float:
        """Objective at another point."""
        return self.problem.objective(z)


def _slopes(parameters: Mapping[str, Parameter], z: np.ndarray) -> np.ndarray:
    """Derivatives of values by their coordinates."""
    h = 1e-6
    return np.array([
        (float(p.prior.to_value(v + h)) - float(p.prior.to_value(v - h))) / (2 * h)
        for p, v in zip(parameters.values(), z, strict=True)
    ])  # fmt: skip


# Checks ---------------------------------------------------------------------------------------------------------------


def _check(problem: JointProblem) -> None:
    """Refuse what cannot be inferred, and warn of what hardly can."""
    observations, shape = problem.observations, problem.domain.shape
    if not observations:
        raise CalibrationError("observations: none; give at least one Observation(day, values, modality).")
    for o in observations:
        where = f"{o.modality.name} of day {o.day:g}"
        if o.values.shape != shape:
            raise CalibrationError(f"{where}: shape {o.values.shape}; expected that of the domain (z, y, x) = {shape}.")
        if o.day < problem.start_day:
            raise CalibrationError(
                f"{where}: it lies before the start of day {problem.start_day:g}, and the model does not run "
                "backwards. Put start_day at or before the first observation, or leave this one out."
            )
        if not (o.seen & problem.domain.mask).any():
            raise CalibrationError(f"{where}: nothing was measured inside the domain's mask; leave it out.")
        same = [m for m in (q.modality for q in observations) if m.name == o.modality.name and m != o.modality]
        if same:
            raise CalibrationError(f"two different modalities are called {o.modality.name!r}; give each its own name.")
    days = sorted({o.day for o in observations})
    free = list(problem.parameters)
    if days == [problem.start_day] and free:
        raise CalibrationError(
            f"all observations are of day {days[0]:g}, that of the start: nothing of {', '.join(free)} can be known. "
            "Put start_day before it, or give a later visit."
        )
    if len(days) == 1 and len(free) > 1 and not problem.scaled_time:
        raise CalibrationError(
            f"all observations are of day {days[0]:g}: a single visit tells how far cells spread for what they "
            f"grow (D / k), not each of {', '.join(free)}. Fix all but one (bm.Fixed) to set the time scale, give a "
            "further visit, or ask for ratios alone (scaled_time)."
        )
    _check_treatments(problem, days)


def _check_treatments(problem: JointProblem, days: Sequence[float]) -> None:
    """Treatments that the model has and the schedule lacks, or the data show and neither has."""
    schedule, treatments = problem.schedule, problem.model.treatments
    if treatments and schedule is None:
        raise CalibrationError(
            f"schedule: none, but the model has treatments ({', '.join(t.name for t in treatments)}), and states jump "
            "at doses. Give the bm.Schedule; an untreated patient has the empty one."
        )
    given: list[float] = []
    if schedule is not None:
        given = [d.day for d in schedule.doses] + [f.day for f in schedule.fractions]
        given += [t.start_day for t in schedule.ongoing]
    if treatments and not given:
        text = "the schedule is empty: the data tell nothing of the model's treatments, whose posterior is their prior."
        warnings.warn(text, DataWarning, stacklevel=5)
    for name in {o.modality.name for o in problem.observations}:
        mine = [o for o in problem.observations if o.modality.name == name]
        for before, after in zip(mine[:-1], mine[1:], strict=True):
            if any(day < after.day for day in given):
                continue
            both = before.seen & after.seen & problem.domain.mask
            one, two = before.values[both], after.values[both]
            # Of changes that are noise alone the sum is as large as the root of their squares' sum.
            fall, noise = float(one.sum() - two.sum()), float(np.linalg.norm(two - one))
            if fall > FALL * noise and fall > SHARE * one.sum():
                text = (
                    f"{name} falls by {fall / one.sum():.0%} between days {before.day:g} and {after.day:g}, but the "
                    "schedule knows no treatment before; growth alone cannot explain it. Give the doses."
                )
                warnings.warn(text, DataWarning, stacklevel=5)
