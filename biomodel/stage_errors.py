"""Errors that the record of a patient does not state: of the drug map, and of the treatment to come."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import gaussian_filter

from biomodel.errors import InputError
from biomodel.schedule import Dose, Fraction, Schedule

__all__ = ["DrugMapError", "TreatmentError"]


def _check(what: str, value: float, low: float, high: float) -> None:
    if not (isinstance(value, (int, float)) and math.isfinite(value) and low <= value <= high):
        raise InputError(f"{what} is {value!r}; expected a number from {low:g} to {high:g}.")


@dataclass(frozen=True)
class DrugMapError:
    """Error of a drug map, which comes from T1, the arterial input and the fit of the uptake.

    Parameters
    ----------
    cv : float
        Coefficient of variation of the supply of one place. 0.2 is a working value, not a published repeatability:
        state what repeated scans, or the map's own standard deviation, say.
    length_mm : float
        Distance over which the error is alike (correlation exp(-r²/4w²) of this integral); 4 mm, a working value. An
        error alike everywhere, such as most of that of the arterial input, cancels in a map relative to the tumour's
        mean (:func:`biomodel.imaging.drugmap.drug_map`), and a calibrated efficacy takes up what is left.
    """

    cv: float = 0.2
    length_mm: float = 4.0

    def __post_init__(self) -> None:
        _check("DrugMapError: cv", self.cv, 0, 1)
        _check("DrugMapError: length_mm", self.length_mm, 0, 50)

    def draw(self, supply: np.ndarray, region: np.ndarray, spacing: tuple[float, float, float],
             rng: np.random.Generator) -> np.ndarray:  # fmt: skip
        """A map as it may truly be, (z, y, x): log-normal around `supply`, of the same mean in the region."""
        width = [self.length_mm / (2 * math.sqrt(math.pi)) / s if n > 1 else 0.0
                 for s, n in zip(spacing, supply.shape, strict=True)]  # fmt: skip
        noise = gaussian_filter(rng.standard_normal(supply.shape), width, mode="wrap")
        noise /= max(float(noise.std()), 1e-12)
        drawn = supply * np.exp(math.sqrt(math.log1p(self.cv**2)) * noise)
        before, after = float(supply[region].mean()), float(drawn[region].mean())
        return np.asarray(drawn * (before / after) if after > 0 else supply)


@dataclass(frozen=True)
class TreatmentError:
    """How treatment after the last calibrated visit may differ from the plan.

    What lies before is taken as recorded. All defaults are working values; a ward's own records say more.

    Parameters
    ----------
    intensity_cv : float
        Coefficient of variation (log-normal) of one factor on all further doses of each drug: reductions, body surface.
    missed : float
        Probability that a planned dose or fraction is not given.
    delay_sd : float
        Standard deviation of how far each day of treatment moves, days; none moves before the last calibrated visit.
    """

    intensity_cv: float = 0.1
    missed: float = 0.05
    delay_sd: float = 2.0

    def __post_init__(self) -> None:
        _check("TreatmentError: intensity_cv", self.intensity_cv, 0, 1)
        _check("TreatmentError: missed", self.missed, 0, 0.99)
        _check("TreatmentError: delay_sd", self.delay_sd, 0, 60)

    def draw(self, schedule: Schedule, day: float, rng: np.random.Generator) -> Schedule:
        """A course that may come of the plan; what lies on `day` or before, and continuing therapy, stays."""
        sigma = math.sqrt(math.log1p(self.intensity_cv**2))
        factor = {a: math.exp(sigma * rng.standard_normal() - sigma**2 / 2) for a in schedule.agents}
        to_come: list[Dose | Fraction] = [d for d in schedule.doses if d.day > day]
        to_come += [f for f in schedule.fractions if f.day > day]
        # Drugs and fractions of one day move together.
        moves = {d: self.delay_sd * rng.standard_normal() for d in sorted({e.day for e in to_come})}
        doses = [d for d in schedule.doses if d.day <= day]
        fractions = [f for f in schedule.fractions if f.day <= day]
        for entry in to_come:
            if rng.random() < self.missed:
                continue
            moved = max(entry.day + moves[entry.day], day + 1e-3)
            if isinstance(entry, Dose):
                doses.append(replace(entry, day=moved, amount=entry.amount * factor[entry.agent]))
            else:
                fractions.append(replace(entry, day=moved))
        return Schedule(tuple(doses), tuple(fractions), schedule.ongoing)
