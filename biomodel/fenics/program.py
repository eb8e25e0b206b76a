"""The steps of a run: reaction and diffusion in turn, cut at doses and fractions, with the drugs' levels at each.

Strang splitting: half a step of reaction, a step of diffusion, half a step of reaction; neighbouring halves are joined.
A dose never ends a step of diffusion; the reaction is cut there, so that doses are exact at any hour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from biomodel.errors import SolverError
from biomodel.fenics._worker.replay import replay
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from biomodel.solvers.base import Context
from biomodel.solvers.plan import RESOLUTION
from biomodel.solvers.reaction import TorchOps
from biomodel.tape import Tape
from biomodel.treatments import Jump, Kill

#: Kinds of events, as the worker knows them.
STEP, JUMP, DIFFUSE, OUTPUT = 0, 1, 2, 3
#: Largest rate times step of one Runge-Kutta step of the reaction.
RK4_STEP = 0.25
#: Cell fractions at which the reaction's speed is looked at, and most nodes at which its fields are.
PROBES, SAMPLES = (1e-3, 0.25, 0.5, 1.0), 32


@dataclass(frozen=True)
class StepPlan:
    """Steps of one or more runs.

    Attributes
    ----------
    times : tuple of float
        Requested days, increasing.
    counts : tuple of int
        Number of equal steps in each of the intervals between them (the first begins at the start).
    error : float
        Estimated relative error in time of the result, or NaN where nobody measured it.
    """

    times: tuple[float, ...]
    counts: tuple[int, ...]
    error: float = float("nan")

    @property
    def steps(self) -> int:
        """Number of steps."""
        return sum(self.counts)


class Course:
    """What the treatments do along time: the reaction's pieces, jumps, and tables of levels and exposures."""

    def __init__(self, model: ReactionDiffusion, schedule: Schedule, start: float):
        self.model, self.start = model, start
        #: Days at which a step of diffusion must end: those at which its coefficient jumps with the state.
        self.stops = np.unique([f.day for f in schedule.fractions]) if model.auxiliaries else np.zeros(0)
        self.doses: dict[tuple[str, str], list[tuple[float, float]]] = {}
        self.kills: list[Kill] = []
        self.jumps: list[tuple[Jump, float, float]] = []
        for term in model.treatments:
            if isinstance(term, Jump):
                self.jumps += [(term, f.day, f.gray) for f in schedule.fractions]
                continue
            assert isinstance(term, Kill)
            for agent in term.agents:
                given = [(d.day, term.relative_amount(d.amount, d.units, agent)) for d in schedule.doses
                         if d.agent == agent]  # fmt: skip
                given += [(o.start_day, 1.0) for o in schedule.ongoing if o.agent == agent]
                self.doses[term.name, agent] = given
            if any(self.doses[term.name, agent] for agent in term.agents):
                self.kills.append(term)
        #: (term, agent) of each agent whose level and exposure the tables hold, one after the other.
        self.agents = [(t, a) for t in self.kills for a in t.agents]
        self.columns = [f"{w}.{t.name}.{a}" for t, a in self.agents for w in ("level", "exposure")]
        days = [day for given in self.doses.values() for day, _ in given] + [day for _, day, _ in self.jumps]
        self.breaks = np.unique(np.array(days, float))

    def table(self, values: Mapping[str, torch.Tensor], days: np.ndarray) -> torch.Tensor:
        """Levels and exposures (days, columns); a dose at exactly a day is still to come."""
        found = []
        t = torch.tensor(days)[:, None]
        for term, agent in self.agents:
            p = self.model.of(term, values)
            given = torch.tensor(self.doses[term.name, agent] or [(np.inf, 0.0)], dtype=torch.float64)
            elapsed = t - given[:, 0]
            past = elapsed > RESOLUTION
            level, exposure = term.kinetics(torch.where(past, elapsed, 0.0), p, TorchOps, agent)
            if max(getattr(level, "ndim", 0), getattr(exposure, "ndim", 0)) > 2:
                raise SolverError(f"{term.name}: the kinetics of {agent} depend on a field; they must be the same "
                                  "everywhere. Give numbers for those parameters.")  # fmt: skip
            amount = given[:, 1] * past
            found += [(level * amount).sum(-1), (exposure * amount).sum(-1)]
        return torch.stack(found, -1) if found else torch.zeros(len(days), 0, dtype=torch.float64)

    def survivals(self, values: Mapping[str, torch.Tensor], events: Sequence[int], nodes: int) -> torch.Tensor:
        """Surviving fractions of the jumps that happen: (events,), or (events, nodes) where parameters are fields."""
        found = []
        for index in events:
            term, _, gray = self.jumps[index]
            dose = torch.tensor(gray, dtype=torch.float64)
            found.append(term.survival(self.model.of(term, values), Context(dose=dose), TorchOps))
        if not found:
            return torch.zeros(0, dtype=torch.float64)
        if any(x.ndim for x in found):
            return torch.stack([x.expand(nodes) for x in found])
        return torch.stack(found)

    def events(self, plan: StepPlan, diffuses: bool) -> list[tuple]:
        """(STEP, from, to), (JUMP, index), (DIFFUSE, h) and (OUTPUT,) in their order."""
        found: list[tuple] = []
        now, since = self.start, self.start
        for time, count in zip(plan.times, plan.counts, strict=True):
            if time < now - RESOLUTION:
                raise SolverError(f"times must increase and not lie before day {self.start:g}; found {time:g}.")
            if count:
                for middle, h in self._steps(now, time, count) if diffuses else ():
                    found += [*self._pieces(since, middle), (DIFFUSE, h)]
                    since = middle
                found += self._pieces(since, time)
                now = since = time
            found.append((OUTPUT,))
        return found

    def _steps(self, a: float, b: float, count: int) -> Iterator[tuple[float, float]]:
        """Middle and length of at least that many steps of diffusion between two days."""
        inner = self.stops[(self.stops > a + RESOLUTION) & (self.stops < b - RESOLUTION)]
        knots = [a, *inner.tolist(), b]
        for low, high in zip(knots[:-1], knots[1:], strict=True):
            n = max(1, math.ceil(count * (high - low) / (b - a) - 1e-9))
            for i in range(n):
                yield low + (i + 0.5) * (high - low) / n, (high - low) / n

    def _pieces(self, a: float, b: float) -> list[tuple]:
        inner = self.breaks[(self.breaks > a + RESOLUTION) & (self.breaks < b - RESOLUTION)]
        knots = [a, *inner.tolist(), b]
        found: list[tuple] = []
        for low, high in zip(knots[:-1], knots[1:], strict=True):
            found += [(JUMP, i) for i, (_, day, _) in enumerate(self.jumps) if abs(day - low) <= RESOLUTION]
            found.append((STEP, low, high))
        return found


@dataclass(frozen=True, eq=False)
class Program:
    """A run laid out for the worker.

    Attributes
    ----------
    kinds, lengths : ndarray, shape (events,)
    days : ndarray, shape (steps, 3)
        Beginning, middle and end of each Runge-Kutta step of the reaction, in the order of the events.
    jumps : tuple of int
        Which of the course's jumps happen, in order.
    """

    kinds: np.ndarray
    lengths: np.ndarray
    days: np.ndarray
    jumps: tuple[int, ...]


def lay_out(course: Course, plan: StepPlan, diffuses: bool, tapes: tuple[Tape, Tape],
            values: Mapping[str, torch.Tensor], inputs: Mapping[str, float | np.ndarray]) -> Program:  # fmt: skip
    """Cut the reaction into Runge-Kutta steps short enough for its speed.

    Parameters
    ----------
    tapes : (Tape, Tape)
        The reaction's rate, and the same with its derivative by u behind it.
    values : mapping of str to Tensor
        Parameters by global name.
    inputs : mapping of str to float or ndarray (nodes,)
        The tapes' inputs but ``u`` and the tables.
    """
    events = course.events(plan, diffuses)
    pieces = np.array([e[1:] for e in events if e[0] == STEP]).reshape(-1, 2)
    counts = _counts(course, pieces, tapes, values, inputs)
    kinds, lengths, days, jumps, done = [], [], [], [], 0
    for event in events:
        if event[0] == STEP:
            low, high, count = event[1], event[2], counts[done]
            done += 1
            edges = np.linspace(low, high, 2 * count + 1)
            kinds += [STEP] * count
            lengths += [(high - low) / count] * count
            # Right after a dose at the piece's beginning.
            edges[0] += 10 * RESOLUTION
            days.append(np.stack((edges[:-2:2], edges[1::2], edges[2::2]), 1))
        else:
            kinds.append(event[0])
            lengths.append(event[1] if event[0] == DIFFUSE else 0.0)
            if event[0] == JUMP:
                jumps.append(event[1])
    return Program(np.array(kinds, np.int8), np.array(lengths, float),
                   np.concatenate(days) if days else np.zeros((0, 3)), tuple(jumps))  # fmt: skip


def _counts(course, pieces, tapes, values, inputs) -> np.ndarray:
    """Number of Runge-Kutta steps in each piece, a power of two: the same for parameters that hardly differ."""
    if not len(pieces):
        return np.zeros(0, int)
    with torch.no_grad():
        first = course.table(values, pieces[:, 0] + 10 * RESOLUTION).numpy()
        last = course.table(values, pieces[:, 1]).numpy()
    fields = {n: v for n, v in inputs.items() if np.ndim(v)}
    chosen: set[int] = set()
    for v in fields.values():
        chosen |= {int(np.argmin(v)), int(np.argmax(v)), *range(0, len(v), max(1, len(v) // SAMPLES))}
    given = {n: (v[sorted(chosen)] if n in fields else v) for n, v in inputs.items()}
    given["u"] = np.array(PROBES)[:, None]

    def speed(table):
        columns = {n: table[:, i, None, None] for i, n in enumerate(course.columns)}
        found = replay(tapes[1].json(), {**given, **columns})
        shape = (len(table), len(PROBES), max(len(chosen), 1))
        rate, slope = (np.broadcast_to(x, shape) for x in found)
        return rate / given["u"], slope

    per_cell, slope = speed(first)
    alone, alone_slope = speed(np.zeros_like(first))
    fastest = np.maximum(np.abs(alone), np.abs(alone_slope)) + np.abs(per_cell - alone) + np.abs(slope - alone_slope)
    length = pieces[:, 1] - pieces[:, 0]
    # How fast the drugs' levels themselves change.
    with np.errstate(divide="ignore", invalid="ignore"):
        decay = np.abs(np.log(last[:, ::2] / first[:, ::2])) / length[:, None]
    decay = np.where(np.isfinite(decay), decay, 0.0).max(1, initial=0.0)
    needed = np.maximum(fastest.reshape(len(pieces), -1).max(1) + decay, 1e-12) * length / RK4_STEP
    if not np.isfinite(needed).all() or needed.max() > 1e5:
        raise SolverError("the reaction is too fast to be followed; the parameters are too extreme for this model.")
    return (2 ** np.ceil(np.log2(np.maximum(needed, 1.0)))).astype(int)
