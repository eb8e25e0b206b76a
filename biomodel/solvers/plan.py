"""Time plans: the steps between outputs, and the pieces between doses inside each step.

A dose never ends a step: its effect enters the reaction's closed-form coefficients, which are integrated piece by
piece between the breakpoints (doses and fractions), so the dose is exact at any hour and any step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomodel.errors import SolverError
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from biomodel.treatments import Kill

#: Times closer than this (days) are the same time.
RESOLUTION = 1e-9


@dataclass(frozen=True, eq=False)
class TimePlan:
    """Steps of one simulation; rows of the arrays are patients (one row when all share a schedule).

    Attributes
    ----------
    edges : ndarray, shape (rows, n + 1)
        Step boundaries, day.
    outputs : tuple of int
        For each requested time, the number of steps done before it.
    start, length : ndarray, shape (rows, m)
        Pieces between breakpoints, each inside one step (padded with length 0).
    step : ndarray of int, shape (rows, m)
        The step to which a piece belongs.
    """

    edges: np.ndarray
    outputs: tuple[int, ...]
    start: np.ndarray
    length: np.ndarray
    step: np.ndarray

    @property
    def steps(self) -> int:
        return self.edges.shape[1] - 1

    @property
    def diffusion(self) -> list[tuple[np.ndarray, int]]:
        """Strang splitting with neighbouring half steps merged: (duration per row, reaction step or -1).

        Each entry diffuses for its duration, then does the reaction of the given step.
        """
        h = np.diff(self.edges, axis=1)
        ends = set(self.outputs)
        found = []
        for i in range(self.steps):
            opening = i == 0 or i in ends
            found.append((h[:, i] / 2 if opening else (h[:, i - 1] + h[:, i]) / 2, i))
            if i + 1 in ends:
                found.append((h[:, i] / 2, -1))
        return found


def breakpoints(model: ReactionDiffusion, schedule: Schedule) -> np.ndarray:
    """Days at which the treatment changes abruptly, sorted."""
    agents = {a for t in model.treatments if isinstance(t, Kill) for a in t.agents}
    days = [d.day for d in schedule.doses if d.agent in agents]
    days += [o.start_day for o in schedule.ongoing if o.agent in agents]
    return np.unique(np.array(days + [f.day for f in schedule.fractions], float))


def make_plan(
    starts: Sequence[float], times: np.ndarray, counts: Sequence[int], breaks: Sequence[np.ndarray]
) -> TimePlan:
    """Lay out the steps.

    Parameters
    ----------
    starts : sequence of float
        First day, by row.
    times : ndarray, shape (rows, T)
        Requested days, increasing in each row and not before the start.
    counts : sequence of int
        Number of equal steps in each of the T intervals.
    breaks : sequence of ndarray
        Breakpoints, by row.
    """
    rows, n_times = times.shape
    lines, outputs = [], []
    for row in range(rows):
        line = [float(starts[row])]
        for t, count in zip(times[row], counts, strict=True):
            if t < line[-1] - RESOLUTION:
                raise SolverError(f"times must increase and not lie before day {starts[row]:g}; found {t:g}.")
            line.extend(np.linspace(line[-1], t, count + 1)[1:] if count else [])
        lines.append(line)
    done = 0
    for count in counts:
        done += count
        outputs.append(done)
    edges = np.array(lines)
    pieces = []
    for row in range(rows):
        inner = breaks[row]
        here: list[tuple[int, float, float]] = []
        for i in range(edges.shape[1] - 1):
            a, b = edges[row, i], edges[row, i + 1]
            cuts = inner[(inner > a + RESOLUTION) & (inner < b - RESOLUTION)]
            knots = np.concatenate(([a], cuts, [b]))
            here.extend((i, lo, hi - lo) for lo, hi in zip(knots[:-1], knots[1:], strict=True))
        pieces.append(here)
    width = max((len(p) for p in pieces), default=0)
    step = np.zeros((rows, width), int)
    start, length = np.zeros((rows, width)), np.zeros((rows, width))
    for row, here in enumerate(pieces):
        for m, (i, lo, size) in enumerate(here):
            step[row, m], start[row, m], length[row, m] = i, lo, size
        start[row, len(here) :] = edges[row, 0]
    return TimePlan(edges, tuple(outputs), start, length, step)
