"""What a cohort's patients are like before anything is measured: the prior an operator is trained under.

Patient i of a setting depends on a seed and on i alone, so that any process can make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from biomodel.calibration.gaussnewton import GaussianPrior, prior_of
from biomodel.domain import Domain
from biomodel.errors import ModelError
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from pinn.joint.starts import BoundFoci, Foci

#: Separates the random numbers of patients from those of anything else with the same seed.
STREAM = 61


@dataclass(frozen=True)
class Courses:
    """Random courses of one drug.

    Parameters
    ----------
    agent : str
    amount : float
    units : str
    first : (float, float)
        Earliest and latest day of the first dose; uniform.
    every : sequence of float
        Days between doses, one of these.
    doses : (int, int)
        Fewest and most doses.
    """

    agent: str = "paclitaxel"
    amount: float = 80.0
    units: str = "mg/m^2"
    first: tuple[float, float] = (0.5, 20.0)
    every: tuple[float, ...] = (7.0, 14.0, 21.0)
    doses: tuple[int, int] = (1, 6)

    def __post_init__(self):
        low, high = self.doses
        if not (0 <= low <= high and self.every and min(self.every) > 0 and self.first[0] <= self.first[1]):
            raise ModelError(
                f"Courses({self.agent!r}): first {self.first}, every {self.every}, doses {self.doses}; expected "
                "increasing days, positive gaps and at least as many doses at most as at least."
            )

    def draw(self, rng: np.random.Generator) -> Schedule:
        """One course."""
        first, count = rng.uniform(*self.first), int(rng.integers(self.doses[0], self.doses[1] + 1))
        every = float(rng.choice(self.every))
        return Schedule.weekly(self.agent, float(first), count, self.amount, self.units, every)


@dataclass(frozen=True, eq=False)
class Case:
    """One patient without images.

    Attributes
    ----------
    z : ndarray, shape (p,)
        Transformed coordinates of the parameters, then of the start.
    days : (float, float)
        Of the second visit and of the forecast; the first visit is day 0.
    schedule : Schedule
    noise : float
        Standard deviation of one voxel's cell fraction.
    """

    z: np.ndarray
    days: tuple[float, float]
    schedule: Schedule
    noise: float


@dataclass(frozen=True, eq=False)
class Setting:
    """Model, place, start, visits, treatment and noise of a cohort's patients.

    Parameters
    ----------
    model : ReactionDiffusion
        Its free parameters, drawn from their priors, are what is inferred.
    domain : Domain
        The grid of the scans.
    start : Foci
        One focus, whose position, peak and width are unknown as well; it is the state at the first visit, day 0.
    interval, ahead : (float, float)
        Days from the first visit to the second, and from the second to the forecast; uniform.
    noise : (float, float)
        Least and largest standard deviation of a voxel's cell fraction; log-uniform.
    courses : sequence of Courses

    Raises
    ------
    ModelError
        If the start has several foci, or days and noise have no meaning.
    """

    model: ReactionDiffusion
    domain: Domain
    start: Foci = field(default_factory=Foci)
    interval: tuple[float, float] = (14.0, 35.0)
    ahead: tuple[float, float] = (10.0, 40.0)
    noise: tuple[float, float] = (0.03, 0.08)
    courses: tuple[Courses, ...] = ()

    def __post_init__(self):
        if self.start.count != 1:
            raise ModelError(f"Setting: the start has {self.start.count} foci; an operator is trained for one.")
        if not (0 < self.interval[0] <= self.interval[1] and 0 < self.ahead[0] <= self.ahead[1]):
            raise ModelError(
                f"Setting: interval {self.interval}, ahead {self.ahead}; expected increasing positive days."
            )
        if not 0 < self.noise[0] <= self.noise[1]:
            raise ModelError(f"Setting: noise {self.noise}; expected two increasing positive numbers.")

    def __reduce__(self) -> tuple[Any, ...]:
        m = self.model  # its mappings are read-only views, which cannot be sent to another process
        return _rebuilt, ((m.growth, m.diffusion, m.treatments, dict(m.priors), m.joint), self.domain, self.start,
                          self.interval, self.ahead, self.noise, self.courses)  # fmt: skip

    @cached_property
    def bound(self) -> BoundFoci:
        """The start on the grid."""
        return self.start.on(self.domain)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, then of the start's coordinates."""
        return (*self.model.free, *(n.replace("focus1", "start") for n in self.bound.names))

    @cached_property
    def prior(self) -> GaussianPrior:
        """Of all transformed coordinates."""
        parts = [prior_of({n: self.model.parameters[n] for n in self.model.free}, self.model.joint), self.bound.prior]
        n = [len(p.mean) for p in parts]
        covariance = np.zeros((sum(n), sum(n)))
        covariance[: n[0], : n[0]], covariance[n[0] :, n[0] :] = parts[0].covariance, parts[1].covariance
        return GaussianPrior(np.concatenate([p.mean for p in parts]), covariance)

    @property
    def last(self) -> float:
        """Latest day of a forecast."""
        return self.interval[1] + self.ahead[1]

    def values(self, z: np.ndarray) -> dict[str, float]:
        """The model's free parameters from coordinates (p,)."""
        parameters = self.model.parameters
        return {n: float(parameters[n].prior.to_value(v)) for n, v in zip(self.model.free, z, strict=False)}

    def case(self, seed: int, index: int) -> Case:
        """Patient number `index`.

        The draw is repeated where a parameter would lie outside its bounds or the focus outside the grid.
        """
        rng = np.random.default_rng([seed, STREAM, index])
        prior, bound = self.prior, self.bound
        root = np.linalg.cholesky(prior.covariance)
        p = len(self.model.free)
        while True:
            z = prior.mean + root @ rng.standard_normal(len(prior.mean))
            inside = ((z[p:] > bound.limits[0]) & (z[p:] < bound.limits[1])).all()
            bounds = [self.model.parameters[n].bounds for n in self.model.free]
            if inside and all(a < v < b for v, (a, b) in zip(self.values(z).values(), bounds, strict=True)):
                break
        second = rng.uniform(*self.interval)
        days = (float(second), float(second + rng.uniform(*self.ahead)))
        schedule = sum((c.draw(rng) for c in self.courses), Schedule())
        low, high = np.log(self.noise)
        return Case(z, days, schedule, float(np.exp(rng.uniform(low, high))))

    def cases(self, seed: int, indices: Sequence[int]) -> list[Case]:
        """Several patients."""
        return [self.case(seed, i) for i in indices]


def _rebuilt(model: tuple[Any, ...], *rest: Any) -> Setting:
    return Setting(ReactionDiffusion(*model), *rest)
