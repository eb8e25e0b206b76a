"""Dose days and amounts by gradients through the solver, under limits, over the draws of a posterior.

What is minimised is the logarithm of the number of tumour cells on given days, as a model with an uncertain posterior
foresees it: a computation about a model, never advice on treatment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch

from biomodel.calibration.fit import Fit
from biomodel.calibration.images import computing_box, field_maps
from biomodel.calibration.volumes import CAPACITY, VOLUME
from biomodel.decisions import NOT_ADVICE, Decision, check_history, decide
from biomodel.errors import InputError
from biomodel.forecast import _Drawn, _noise, first_day, initial_states
from biomodel.limits import DrugLimits, Limits
from biomodel.movable import with_movable
from biomodel.schedule import Dose, Schedule
from biomodel.solvers.torch import TorchSolver
from biomodel.tables import html_table
from biomodel.treatments import Kill

__all__ = ["DoseResponse", "Expected", "Objective", "OptimisedSchedule", "Quantile", "optimise"]

#: Doses below this share of the reference dose are left out of an optimised schedule.
NEGLIGIBLE = 1e-3
#: Change of the objective (log10 of cells) at which the search ends.
SETTLED = 1e-5
#: Unit of days in the search, so that amounts and days change alike.
WEEK = 7.0


class Objective(Protocol):
    """What is made small: a number from the draws of log10 of the cells."""

    def of(self, log_cells: torch.Tensor) -> torch.Tensor:
        """From (draws,) to a number, differentiable."""


@dataclass(frozen=True)
class Expected:
    """The mean over the posterior."""

    def of(self, log_cells: torch.Tensor) -> torch.Tensor:
        return log_cells.mean()


@dataclass(frozen=True)
class Quantile:
    """A quantile over the posterior; a high one guards against the draws that respond badly.

    Parameters
    ----------
    level : float
        Between 0 and 1.
    """

    level: float = 0.9

    def __post_init__(self):
        if not 0 < self.level < 1:
            raise InputError(f"Quantile: level is {self.level!r}; expected a number between 0 and 1.")

    def of(self, log_cells: torch.Tensor) -> torch.Tensor:
        return torch.quantile(log_cells, self.level)


class DoseResponse:
    """log10 of the tumour's cells on given days, differentiable by days and amounts of doses, over posterior draws.

    The run begins at the last calibrated visit with the states to which the draws have come by then.

    Parameters
    ----------
    fit : Fit
    fixed : Schedule
        Doses that stay as they are; those before the last calibrated visit are among them.
    doses : sequence of Dose
        Doses that may be moved, all after that visit.
    days : sequence of float
        When cells are counted; the mean of the logarithms counts. Without images the volume (cm³) takes their place.
    draws, seed : int
        Of the posterior; draws are the same as those of `forecast` with this seed and number.
    """

    def __init__(self, fit: Fit, fixed: Schedule, doses: Sequence[Dose], days: Sequence[float], draws: int, seed: int):
        if not isinstance(fit.solver, TorchSolver):
            raise InputError(f"optimise: the fit's solver is {type(fit.solver).__name__}; expected a TorchSolver.")
        self.fit, self.fixed, self.doses, self.draws = fit, fixed, tuple(doses), draws
        self._solver = fit.solver
        patient, model = fit.patient, fit.model
        self.begin = float(patient.visits[-1].day)
        self.days = np.unique(np.asarray(days, float))
        if not (len(self.days) and np.isfinite(self.days).all() and self.days[0] > self.begin):
            raise InputError(f"optimise: days {list(days)}; expected finite days after day {self.begin:g}.")
        self.reference = np.array([1 / _relative(model, dose) for dose in self.doses])
        values, first = fit.draw(draws, seed), first_day(patient)
        self._params = {n: torch.tensor(values[n]) for n in model.free if n in values}
        mixed = patient.domain.well_mixed
        if mixed:
            self._domain, self._fields = patient.domain, {}
            capacity = values.get(CAPACITY, np.ones(draws))
            self._scale = torch.tensor(capacity)
            start = torch.tensor((values[VOLUME] / capacity).reshape(-1, 1, 1, 1))
        else:
            box = computing_box(patient, model, float(self.days[-1] - first))
            self._domain = patient.domain.crop(box)
            self._fields = {k: np.asarray(v)[box] for k, v in field_maps(model, patient).items()}
            drawn = _Drawn.of(fit, draws, seed, box)
            change = None if drawn is None else drawn.start
            start = torch.tensor(initial_states(fit, box, self._domain, values, _noise(seed, 2), change))
            if drawn is not None:
                rate = drawn.link.of(values[drawn.name][:, None, None, None], drawn.field)
                self._params[drawn.name] = torch.tensor(rate)
            settings = patient.cellularity
            self._scale = torch.tensor(settings.carrying_capacity(self._domain.voxel_volume) if settings else 1.0)
        with torch.no_grad():
            if self.begin > first:
                before = self._solver.build(model, self._domain, fixed, self._fields, first)
                start = before(self._params, start, [self.begin])[:, 0]
            self._start = start
            after = self._solver.build(model, self._domain, fixed + Schedule(tuple(doses)), self._fields, self.begin)
            outputs = after.plan(self._params, start, self.days).outputs
        # The same steps for every schedule: only the breakpoints inside them move.
        self._counts = np.diff([0, *outputs]).tolist()

    def __call__(self, amounts: torch.Tensor, days: np.ndarray, delays: torch.Tensor | None = None) -> torch.Tensor:
        """Mean over the days of log10 of the cells, by draw.

        Parameters
        ----------
        amounts : Tensor, shape (doses,)
            In reference doses.
        days : ndarray, shape (doses,)
        delays : Tensor, shape (doses,), optional
            Zeros: what is differentiated for derivatives by days.

        Returns
        -------
        Tensor, shape (draws,)
        """
        moved = [replace(dose, day=float(day)) for dose, day in zip(self.doses, days, strict=True)]
        model, schedule, names = with_movable(self.fit.model, self.fixed, moved)
        simulation = self._solver.build(model, self._domain, schedule, self._fields, self.begin)
        params = dict(self._params)
        for n, name in enumerate(names):
            params[name.format("amount")] = amounts[n]
            if delays is not None:
                params[name.format("delay")] = delays[n]
        plan = simulation.fixed_plan(self.days, self._counts)
        u = simulation(params, self._start, self.days, plan=plan)
        cells = u.to(torch.float64).sum((2, 3, 4)) * self._scale.reshape(-1, 1)
        return torch.log10(cells.clamp_min(1e-300)).mean(1)

    def gradient(
        self, objective: Objective, amounts: np.ndarray, days: np.ndarray
    ) -> tuple[float, np.ndarray, np.ndarray]:
        """The objective, and its derivatives by amounts (per reference dose) and by days (1/day)."""
        a = torch.tensor(np.asarray(amounts, float), requires_grad=True)
        delays = torch.zeros(len(a), dtype=torch.float64, requires_grad=True)
        value = objective.of(self(a, days, delays))
        by_amount, by_day = torch.autograd.grad(value, (a, delays))
        return float(value.detach()), by_amount.numpy(), by_day.numpy()

    def value(self, objective: Objective, amounts: np.ndarray, days: np.ndarray) -> float:
        """The objective alone."""
        with torch.no_grad():
            return float(objective.of(self(torch.tensor(np.asarray(amounts, float)), days)))


def _relative(model, dose: Dose) -> float:
    """Reference doses in one unit of the dose's amount."""
    term = next((t for t in model.treatments if isinstance(t, Kill) and dose.agent in t.agents), None)
    if term is None:
        raise InputError(f"optimise: the model has no term for {dose.agent}; calibrate one that has it.")
    return term.relative_amount(1.0, dose.units, dose.agent)


@dataclass(frozen=True, eq=False)
class OptimisedSchedule:
    """A schedule that leaves fewer cells than the standard under the same limits, as far as the model knows.

    Attributes
    ----------
    schedule, standard : Schedule
        Both with what was given before.
    before, after : float
        The objective (log10 of cells; of the volume in cm³ without images) under the standard and the optimised one,
        on the draws of the search: an optimistic number. `decide` forecasts again, with fresh draws.
    """

    fit: Fit
    schedule: Schedule
    standard: Schedule
    limits: Limits
    days: tuple[float, ...]
    before: float
    after: float
    seed: int
    iterations: int
    notes: tuple[str, ...] = field(default=())

    def decide(self, draws: int = 400, seed: int | None = None, day: float | None = None) -> Decision:
        """Compare with the standard on draws that the search has not seen.

        Parameters
        ----------
        draws : int
        seed : int, optional
            Another than that of the search; the next one by default.
        day : float, optional
            The last of the days by default.
        """
        seed = self.seed + 1 if seed is None else seed
        if seed == self.seed:
            raise InputError(f"decide: seed {seed} is that of the search; take another for draws it has not seen.")
        both = {"standard": self.standard, "optimised": self.schedule}
        return decide(self.fit, both, self.days[-1] if day is None else day, draws, seed)

    def _repr_html_(self) -> str:
        rows = [(f"{d.day:.1f}", d.agent, f"{d.amount:.3g} {d.units}") for d in self.schedule.doses
                if d.day >= self.limits.first]  # fmt: skip
        return html_table(("day", "drug", "amount"), rows, f"Optimised schedule of {self.fit.patient.id}. {NOT_ADVICE}")


def optimise(
    fit: Fit,
    standard: Schedule,
    days: Sequence[float],
    limits: Limits | None = None,
    objective: Objective = Expected(),  # noqa: B008
    starts: Sequence[Schedule] = (),
    draws: int = 24,
    seed: int = 0,
    iterations: int = 40,
    progress: Callable[[str], None] | None = None,
) -> OptimisedSchedule:
    """Move and resize doses so that fewer cells are left, within limits.

    Sequential quadratic programming (SLSQP: Kraft 1988, DFVLR-FB 88-28, as in scipy) on days and amounts together,
    with derivatives through the solver; the result is then put exactly inside the limits.

    Parameters
    ----------
    fit : Fit
    standard : Schedule
        Where the search begins, and what its result is compared with. Its doses of drugs with limits, from
        ``limits.first`` to ``limits.last``, may be moved; there are never more than it has.
    days : sequence of float
        Days on which cells are counted; the mean of their logarithms counts. With a single late day a growth law that
        slows in large tumours makes it pay to wait; several days do not let treatment be put off.
    limits : Limits, optional
        By default :meth:`Limits.of` the standard: nothing may be more than in it, from the day after the last
        calibrated visit, or the standard's next dose if that comes sooner, to the last of `days`.
    objective : Objective
        `Expected` or `Quantile`, or any object with their method.
    starts : sequence of Schedule
        Where else to begin, for instance with another order of the drugs: the search goes downhill only, and drugs that
        share a limit cannot pass each other. The best end counts. Doses of each start move as those of the standard.
    draws, seed : int
        Of the posterior.
    iterations : int
        Most of them from each start.
    progress : callable, optional
        Receives a line of text per iteration.

    Returns
    -------
    OptimisedSchedule

    Raises
    ------
    InputError
        If the limits cannot be met (it says which), no dose may be moved, or the history differs from the patient's.
    """
    begin = float(fit.patient.visits[-1].day)
    check_history(fit, {"standard": standard})
    if draws < 1 or iterations < 1:
        raise InputError(f"optimise: {draws} draws, {iterations} iterations; expected at least 1 of each.")
    if limits is None:
        later = [d.day for d in standard.doses if d.day > begin]
        if not later:
            raise InputError(f"optimise: the standard has no dose after day {begin:g}; there is nothing to move.")
        limits = Limits.of(standard, min(begin + 1.0, min(later)), max(days))
    if limits.first < begin:
        raise InputError(
            f"optimise: doses may be moved from day {limits.first:g}, before the last calibrated visit on day "
            f"{begin:g}; set first to {begin:g} or later."
        )
    check_history(fit, {f"start {n}": other for n, other in enumerate(starts, start=1)})
    ends = [_search(fit, begun, days, limits, objective, draws, seed, iterations, progress)
            for begun in (standard, *starts)]  # fmt: skip
    best = min(ends, key=lambda end: end.after)
    notes = [NOT_ADVICE]
    if not best.moved:
        notes.append("The search found nothing better than where it began, put inside the limits.")
    if best.message:
        notes.append(f"The search ended early ({best.message}); a longer one may find better.")
    beyond = limits.violations(standard)
    if beyond:
        notes.append(f"The standard itself is beyond the limits: {'; '.join(beyond)}.")
    return OptimisedSchedule(fit, best.schedule, standard, limits, tuple(sorted({float(d) for d in days})),
                             ends[0].before, best.after, seed, sum(end.iterations for end in ends),
                             tuple(notes))  # fmt: skip


@dataclass(frozen=True, eq=False)
class _End:
    """Where a search ended: the schedule, the objective before and after, and the words of one that ended early."""

    schedule: Schedule
    before: float
    after: float
    iterations: int
    moved: bool
    message: str


def _search(fit: Fit, start: Schedule, days: Sequence[float], limits: Limits, objective: Objective, draws: int,
            seed: int, iterations: int, progress: Callable[[str], None] | None) -> _End:  # fmt: skip
    """Go downhill from one schedule."""
    from scipy.optimize import minimize

    bounded = {d.agent for d in limits.drugs}
    moving = [d for d in start.doses if d.agent in bounded and limits.first <= d.day <= limits.last]
    if not moving:
        raise InputError(
            f"optimise: no dose of {', '.join(sorted(bounded)) or 'any drug'} from day {limits.first:g} to day "
            f"{limits.last:g} in the schedule; there is nothing to move."
        )
    fixed = replace(start, doses=tuple(d for d in start.doses if d not in moving))
    limits.check(fixed, moving)
    response = DoseResponse(fit, fixed, moving, days, draws, seed)
    space = _Space(fixed, moving, limits, response.reference)
    given = space.pack(np.array([d.amount for d in moving]), np.array([d.day for d in moving]))
    first = space.inside(given)
    turns = [0]

    def function(x: np.ndarray) -> tuple[float, np.ndarray]:
        value, by_amount, by_day = response.gradient(objective, *space.relative(x))
        return value, np.concatenate((by_amount, by_day * WEEK))

    def note(x: np.ndarray) -> None:
        turns[0] += 1
        if progress:
            progress(f"schedule, iteration {turns[0]}")

    found = minimize(function, first, jac=True, method="SLSQP", bounds=space.bounds, constraints=space.constraints(),
                     options={"maxiter": iterations, "ftol": SETTLED}, callback=note)  # fmt: skip
    last = space.inside(found.x)
    at = [response.value(objective, *space.relative(x)) for x in (given, first, last)]
    moved = at[2] < at[1]
    end = last if moved else first
    return _End(Schedule(doses=space.doses(end)) + fixed, at[0], min(at[1:]), turns[0], moved,
                "" if found.success else str(found.message))  # fmt: skip


class _Space:
    """Coordinates of the search, (amounts in reference doses, days from the first in weeks), and the limits in them."""

    def __init__(self, fixed: Schedule, doses: Sequence[Dose], limits: Limits, reference: np.ndarray):
        self.fixed, self.limits, self.reference = fixed, limits, reference
        self.moving = list(doses)
        self.agents = list(dict.fromkeys(d.agent for d in self.moving))
        # Doses of a drug stay in their order.
        self.index = {a: np.array([n for n, d in enumerate(self.moving) if d.agent == a]) for a in self.agents}
        loads = {d.agent: d.load for d in limits.drugs}
        self._own = np.array([loads[d.agent] for d in self.moving])
        others = [d for d in fixed.doses if d.agent in loads]
        self._days = np.array([d.day for d in others])
        self._sizes = np.array([loads[d.agent] * d.amount for d in others])

    def drug(self, agent: str) -> DrugLimits:
        found = self.limits.of_drug(agent)
        assert found is not None  # only doses of drugs with limits move
        return found

    def pack(self, amounts: np.ndarray, days: np.ndarray) -> np.ndarray:
        return np.concatenate((amounts / self.reference, (days - self.limits.first) / WEEK))

    def unpack(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Amounts in the drugs' units, and days."""
        n = len(self.moving)
        return x[:n] * self.reference, self.limits.first + x[n:] * WEEK

    def relative(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Amounts in reference doses, and days."""
        return x[: len(self.moving)], self.unpack(x)[1]

    def left(self, agent: str) -> float:
        """What may still be given of a drug."""
        return self.drug(agent).total - sum(d.amount for d in self.fixed.of(agent))

    @property
    def bounds(self) -> list[tuple[float, float]]:
        amounts = [min(self.drug(d.agent).largest, self.left(d.agent)) / r
                   for d, r in zip(self.moving, self.reference, strict=True)]  # fmt: skip
        windows = [self.limits.window(self.fixed, d.agent) for d in self.moving]
        first = self.limits.first
        return [(0.0, a) for a in amounts] + [((a - first) / WEEK, (b - first) / WEEK) for a, b in windows]

    def constraints(self) -> list[dict]:
        """For SLSQP: each a vector that must not be negative, with its Jacobian."""
        n = len(self.moving)
        rows, ends = [], []
        for agent in self.agents:
            mine, left = self.index[agent], self.left(agent)
            if np.isfinite(left):
                row = np.zeros(2 * n)
                row[mine] = -self.reference[mine] / left
                rows.append(row)
                ends.append(1.0)
            for a, b in zip(mine[:-1], mine[1:], strict=True):
                row = np.zeros(2 * n)
                row[n + a], row[n + b] = -1.0, 1.0
                rows.append(row)
                ends.append(-self.drug(agent).interval / WEEK)
        matrix, offset = np.array(rows).reshape(-1, 2 * n), np.array(ends)
        found: list[dict] = []
        if len(rows):
            found.append({"type": "ineq", "fun": lambda x: matrix @ x + offset, "jac": lambda x: matrix})
        if math.isfinite(self.limits.peak) and self._own.any():
            found.append({"type": "ineq", "fun": lambda x: 1 - self.load(x)[0] / self.limits.peak,
                          "jac": lambda x: -self.load(x)[1] / self.limits.peak})  # fmt: skip
        return found

    def load(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Load on the marrow after each dose, by day, and its Jacobian (doses, coordinates)."""
        n, tau = len(self.moving), self.limits.recovery
        amounts, days = self.unpack(x)
        when = np.concatenate((days, self._days))
        size = np.concatenate((self._own * amounts, self._sizes))
        order = np.argsort(when, kind="stable")
        since = when[order][:, None] - when[order][None, :]
        fading = np.tril(np.exp(-np.maximum(since, 0.0) / tau))
        part = fading * size[order]
        value = part.sum(1)
        by_size, by_day = np.zeros((len(when), len(when))), np.zeros((len(when), len(when)))
        by_size[:, order] = fading
        inner = part / tau
        inner[np.diag_indices(len(when))] -= inner.sum(1)
        by_day[:, order] = inner
        jacobian = np.zeros((len(when), 2 * n))
        jacobian[:, :n] = by_size[:, :n] * self._own * self.reference
        jacobian[:, n:] = by_day[:, :n] * WEEK
        return value, jacobian

    def inside(self, x: np.ndarray) -> np.ndarray:
        """A point that meets every limit, near x: days pushed apart, then amounts cut back."""
        amounts, days = (v.copy() for v in self.unpack(x))
        for agent in self.agents:
            mine, drug = self.index[agent], self.drug(agent)
            low, high = self.limits.window(self.fixed, agent)
            for place, n in enumerate(mine):
                if place:
                    low = days[mine[place - 1]] + drug.interval
                days[n] = min(max(days[n], low), high - (len(mine) - 1 - place) * drug.interval)
            amounts[mine] = np.clip(amounts[mine], 0.0, drug.largest)
            total, left = amounts[mine].sum(), self.left(agent)
            if total > left:
                amounts[mine] *= left / total
        if math.isfinite(self.limits.peak) and self._own.any():
            # The load is linear in the amounts; what the fixed doses leave is shared out in one step.
            full = self.load(self.pack(amounts, days))[0]
            fixed = self.load(self.pack(np.zeros_like(amounts), days))[0]
            own = full - fixed
            over = full > self.limits.peak
            if over.any():
                amounts *= float(((self.limits.peak - fixed[over]) / own[over]).min())
        return self.pack(amounts, days)

    def doses(self, x: np.ndarray) -> tuple[Dose, ...]:
        """The doses at a point; negligible ones are left out."""
        amounts, days = self.unpack(x)
        return tuple(
            replace(dose, day=float(day), amount=float(amount), status="planned")
            for dose, day, amount, reference in zip(self.moving, days, amounts, self.reference, strict=True)
            if amount > NEGLIGIBLE * reference
        )
