"""Limits of a course of chemotherapy: total and single doses, intervals, and a load on the bone marrow.

They are limits of a computation, not of practice: what a person tolerates is for those who treat them to say.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from biomodel.errors import InputError
from biomodel.schedule import Dose, Schedule
from biomodel.treatments import REFERENCE_DOSES

__all__ = ["RECOVERY", "DrugLimits", "Limits", "marrow_load"]

#: Days in which the load on the marrow falls to 1/e. A working value: somewhat longer than the time that cells need to
#: mature in the marrow (about 4 to 6 days, the mean transit time of Friberg et al. 2002, doi:10.1200/JCO.2002.02.140).
RECOVERY = 7.0


@dataclass(frozen=True)
class DrugLimits:
    """Limits of one drug.

    Parameters
    ----------
    agent : str
    units : str
        Of the amounts below; those of the schedule's doses.
    total : float
        Most over the whole course, what was given before included.
    largest : float
        Most in a single dose.
    interval : float
        Least number of days between two doses.
    load : float
        What a dose puts on the marrow, per unit of amount.
    """

    agent: str
    units: str
    total: float
    largest: float
    interval: float
    load: float = 0.0

    def __post_init__(self):
        for name in ("total", "largest", "interval", "load"):
            value = getattr(self, name)
            low = value > 0 if name in ("total", "largest") else value >= 0
            if not (low and (math.isfinite(value) or name in ("total", "largest"))):
                least = "a positive number" if name in ("total", "largest") else "a finite number from 0"
                raise InputError(f"limits of {self.agent}: {name} is {value!r}; expected {least}.")


@dataclass(frozen=True)
class Limits:
    """What a schedule may hold.

    Parameters
    ----------
    drugs : tuple of DrugLimits
        One for each drug that may be moved.
    first, last : float
        Days between which doses may be moved.
    peak : float
        Most that the load on the marrow may ever be: the sum over the doses so far of load times amount, each fading
        as exp(-time / recovery). A dose-limiting count follows such a load; its size has no unit but that of `load`.
    recovery : float
        Days in which the load falls to 1/e.
    """

    drugs: tuple[DrugLimits, ...]
    first: float
    last: float
    peak: float = math.inf
    recovery: float = RECOVERY

    def __post_init__(self):
        object.__setattr__(self, "drugs", tuple(self.drugs))
        agents = [d.agent for d in self.drugs]
        doubled = sorted({a for a in agents if agents.count(a) > 1})
        if doubled:
            raise InputError(f"limits: {', '.join(doubled)} is named twice; give each drug one entry.")
        if not (math.isfinite(self.first) and math.isfinite(self.last) and self.first <= self.last):
            raise InputError(f"limits: doses from day {self.first} to day {self.last}; expected finite, rising days.")
        if not self.peak > 0:
            raise InputError(f"limits: peak is {self.peak!r}; expected a positive number.")
        if not (math.isfinite(self.recovery) and self.recovery > 0):
            raise InputError(f"limits: recovery is {self.recovery!r}; expected a positive number of days.")

    @classmethod
    def of(cls, standard: Schedule, first: float, last: float, *, loads: Mapping[str, float] | None = None,
           intervals: Mapping[str, float] | None = None, recovery: float = RECOVERY) -> Limits:  # fmt: skip
        """Limits that the standard of care just meets: nothing may be more than in it.

        Parameters
        ----------
        standard : Schedule
        first, last : float
            Days between which doses may be moved.
        loads : mapping of str to float, optional
            Load on the marrow of one reference dose, by agent; 1 for those not named (a working value).
        intervals : mapping of str to float, optional
            Least days between doses, by agent; the least of the standard for those not named.
        recovery : float
        """
        drugs = []
        for agent in dict.fromkeys(d.agent for d in standard.doses if first <= d.day <= last):
            doses = standard.of(agent)
            gaps = np.diff([d.day for d in doses])
            reference, units = REFERENCE_DOSES.get(agent, (0.0, ""))
            unit = reference if units == doses[0].units else float(np.median([d.amount for d in doses]))
            gap = (intervals or {}).get(agent, float(gaps.min()) if len(gaps) else 0.0)
            # Sums of the same doses in another order may differ in the last digit.
            drugs.append(DrugLimits(agent, doses[0].units, sum(d.amount for d in doses), max(d.amount for d in doses),
                                    gap, (loads or {}).get(agent, 1.0) / unit))  # fmt: skip
        found = cls(tuple(drugs), first, last, math.inf, recovery)
        load = marrow_load(standard, found)
        return cls(found.drugs, first, last, float(load.max()) if load.size and load.max() > 0 else math.inf, recovery)

    def of_drug(self, agent: str) -> DrugLimits | None:
        """The limits of one drug."""
        return next((d for d in self.drugs if d.agent == agent), None)

    def violations(self, schedule: Schedule, tolerance: float = 1e-9) -> tuple[str, ...]:
        """What of a schedule is beyond the limits, in words; `tolerance` is relative (for days, in days)."""
        found = []
        for drug in self.drugs:
            doses = schedule.of(drug.agent)
            if not doses:
                continue
            if doses[0].units != drug.units:
                found.append(f"{drug.agent}: doses in {doses[0].units}, limits in {drug.units}")
                continue
            total, largest = sum(d.amount for d in doses), max(d.amount for d in doses)
            if total > drug.total * (1 + tolerance):
                found.append(f"{drug.agent}: total {total:g} {drug.units}, limit {drug.total:g}")
            if largest > drug.largest * (1 + tolerance):
                found.append(f"{drug.agent}: a dose of {largest:g} {drug.units}, limit {drug.largest:g}")
            gaps = np.diff([d.day for d in doses])
            if len(gaps) and gaps.min() < drug.interval - tolerance:
                found.append(f"{drug.agent}: two doses {gaps.min():g} days apart, least interval {drug.interval:g}")
        load = marrow_load(schedule, self)
        if load.size and load.max() > self.peak * (1 + tolerance):
            found.append(f"load on the marrow: {load.max():g}, limit {self.peak:g}")
        return tuple(found)

    def check(self, fixed: Schedule, doses: Sequence[Dose]) -> None:
        """Raise where no choice of days and amounts of `doses` beside the `fixed` ones can meet the limits.

        Raises
        ------
        InputError
            Naming the limit.
        """
        for agent in dict.fromkeys(d.agent for d in doses):
            mine, drug = [d for d in doses if d.agent == agent], self.of_drug(agent)
            if drug is None:
                raise InputError(f"limits: none for {agent}, whose doses are to be moved; add its DrugLimits.")
            if mine[0].units != drug.units:
                raise InputError(f"limits of {agent}: in {drug.units}, but its doses are in {mine[0].units}.")
            before = fixed.of(agent)
            given = sum(d.amount for d in before)
            if given >= drug.total:
                raise InputError(
                    f"limits of {agent}: a total of {drug.total:g} {drug.units}, but {given:g} stand in the schedule "
                    "already and nothing is left to give; raise the total or leave the drug as it is."
                )
            start, end = self.window(fixed, agent)
            needed = (len(mine) - 1) * drug.interval
            if start + needed > end + 1e-9:
                raise InputError(
                    f"limits of {agent}: {len(mine)} doses at least {drug.interval:g} days apart need {needed:g} days, "
                    f"but from day {start:g} to day {end:g} there are {end - start:g}; shorten the interval, take "
                    "fewer doses, or allow other days."
                )
        load = marrow_load(fixed, self)
        if load.size and load.max() >= self.peak:
            raise InputError(
                f"limits: the load on the marrow may be {self.peak:g} at most, but the doses held fixed reach "
                f"{load.max():g}; raise peak."
            )

    def window(self, fixed: Schedule, agent: str) -> tuple[float, float]:
        """First and last day on which a drug may be given, with its interval kept to the fixed doses around."""
        drug, days = self.of_drug(agent), [d.day for d in fixed.of(agent)]
        gap = drug.interval if drug else 0.0
        before, after = [d for d in days if d < self.first], [d for d in days if d > self.last]
        return max([self.first, *(d + gap for d in before)]), min([self.last, *(d - gap for d in after)])


def marrow_load(schedule: Schedule, limits: Limits) -> np.ndarray:
    """Load right after each dose of a drug with limits, in the order of the schedule; it is highest there."""
    loads = {d.agent: d.load for d in limits.drugs}
    doses = [d for d in schedule.doses if d.agent in loads]
    days = np.array([d.day for d in doses])
    size = np.array([loads[d.agent] * d.amount for d in doses])
    since = days[:, None] - days[None, :]
    return (np.where(since >= 0, np.exp(-np.maximum(since, 0.0) / limits.recovery), 0.0) * size).sum(1)
