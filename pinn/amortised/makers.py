"""Who makes training samples: the classical solvers, on patients of a setting.

A maker's sample i depends on the seed and on i, and through the time steps that a chunk shares on the chunk, which
depends on i as well: whichever process makes it, it is the same.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from biomodel.fenics.pool import pool
from biomodel.fenics.solver import FenicsSolver
from biomodel.solvers.plan import breakpoints, make_plan
from biomodel.solvers.reaction import Course
from biomodel.solvers.torch import TorchSolver
from pinn.amortised.setting import Case, Setting

#: Days of one step of the classical solvers: with growth rates around 0.06 1/day its error is of the order of 1e-3 of
#: the state, far below the noise of a scan (a test measures it).
STEP = 3.0

Arrays = dict[str, np.ndarray]


class Maker(Protocol):
    """Makes training samples by their numbers."""

    @property
    def name(self) -> str:
        """For messages and tables."""

    def warm(self) -> None:
        """Do what is slow the first time (compiling, starting a solver's own process)."""

    def make(self, seed: int, indices: Sequence[int]) -> Arrays:
        """Arrays whose first axis are the samples."""

    def seconds(self) -> float:
        """CPU-seconds so far of processes beside the one that calls."""


def dose_tables(setting: Setting, cases: Sequence[Case]) -> Arrays:
    """Days and relative amounts of all doses, (n, agents, most) each; what is padded never comes (day inf)."""
    schedules = [c.schedule for c in cases]
    breaks = [breakpoints(setting.model, s) for s in schedules]
    plan = make_plan([0.0] * len(cases), np.array([c.days for c in cases]), [1, 1], breaks)
    tables = list(Course(setting.model, schedules, plan).doses.values())
    most = max([int(t.shape[1]) for t, _ in tables], default=0)
    most = max(most, sum(c.doses[1] for c in setting.courses), 1)
    days, amounts = np.full((len(cases), len(tables), most), np.inf), np.zeros((len(cases), len(tables), most))
    for j, (day, amount) in enumerate(tables):
        days[:, j, : day.shape[1]], amounts[:, j, : day.shape[1]] = day, amount
    return {"dose_days": days, "dose_amounts": amounts}


def sample(setting: Setting, cases: Sequence[Case], states: np.ndarray) -> Arrays:
    """What a chunk is handed over as.

    Parameters
    ----------
    states : ndarray, shape (n, 3, z, y, x)
        Cell fractions without noise at both visits and at the forecast's day.
    """
    return {
        "z": np.stack([c.z for c in cases]), "days": np.array([c.days for c in cases]),
        "noise": np.array([c.noise for c in cases]), "states": states, **dose_tables(setting, cases),
    }  # fmt: skip


@dataclass(frozen=True, eq=False)
class TorchMaker:
    """Samples by `TorchSolver`, a chunk at once as one batch.

    Parameters
    ----------
    setting : Setting
    solver : TorchSolver
    step : float
        Longest step, days.
    """

    setting: Setting
    solver: TorchSolver = field(default_factory=TorchSolver)
    step: float = STEP

    @property
    def name(self) -> str:
        """The solver's name."""
        return "TorchSolver"

    def warm(self) -> None:
        """Compile the solver's kernels."""
        self.make(0, [0, 1])

    def seconds(self) -> float:
        """None: all is done in the process that calls."""
        return 0.0

    def make(self, seed: int, indices: Sequence[int]) -> Arrays:
        """Samples of these numbers."""
        s, cases = self.setting, self.setting.cases(seed, indices)
        z, p = np.stack([c.z for c in cases]), len(s.model.free)
        start = s.bound.states(z[:, p:])
        simulation = self.solver.build(s.model, [s.domain] * len(cases), [c.schedule for c in cases])
        days = np.array([c.days for c in cases])
        counts = [math.ceil(gap / self.step) for gap in (days[:, 0].max(), (days[:, 1] - days[:, 0]).max())]
        each = [s.values(one) for one in z]
        params = {n: torch.tensor([v[n] for v in each]) for n in s.model.free}
        with torch.no_grad():
            later = simulation(params, torch.tensor(start), days, plan=simulation.fixed_plan(days, counts))
        return sample(s, cases, np.concatenate((start[:, None], later.cpu().numpy()), 1))


@dataclass(frozen=True, eq=False)
class FenicsMaker:
    """Samples by `FenicsSolver`, one after the other, in a FEniCS process that stays.

    Parameters
    ----------
    setting : Setting
    solver : FenicsSolver
    step : float
        Longest step, days.
    """

    setting: Setting
    solver: FenicsSolver = field(default_factory=FenicsSolver)
    step: float = STEP

    @property
    def name(self) -> str:
        """The solver's name."""
        return "FenicsSolver"

    def warm(self) -> None:
        """Start the FEniCS process and compile its forms."""
        self.make(0, [0])

    def seconds(self) -> float:
        """CPU-seconds of the FEniCS process (where the system does not tell: seconds that it has computed)."""
        with pool(self.solver.ranks).worker() as worker:
            try:
                fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
                return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            except (OSError, IndexError, ValueError):
                return worker.seconds

    def make(self, seed: int, indices: Sequence[int]) -> Arrays:
        """Samples of these numbers."""
        s, cases, found = self.setting, self.setting.cases(seed, indices), []
        p = len(s.model.free)
        for case in cases:
            start = s.bound.states(case.z[p:])
            simulation = self.solver.build(s.model, s.domain, case.schedule)
            gaps = (case.days[0], case.days[1] - case.days[0])
            plan = simulation.fixed_plan(case.days, [math.ceil(g / self.step) for g in gaps])
            with torch.no_grad():
                later = simulation(s.values(case.z), torch.tensor(start), case.days, plan=plan)[0]
            found.append(np.concatenate((start, later.numpy())))
        return sample(s, cases, np.stack(found))
