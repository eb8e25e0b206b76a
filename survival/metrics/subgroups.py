"""Whether a model serves all alike, and what so many patients can show."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm

from biomodel.errors import InputError
from survival.metrics.binary import at_threshold, checked_probability
from survival.metrics.compare import Interval, bootstrap, delong

__all__ = ["Subgroup", "auroc_standard_error", "detectable_difference", "gaps", "subgroups"]


@dataclass(frozen=True)
class Subgroup:
    """How a model does in one group of patients.

    Attributes
    ----------
    name : str
    patients, outcomes : int
        Number of patients, and of those with the outcome.
    auroc : Interval
        nan with fewer than two patients of a class.
    excess : Interval
        Mean of outcome less probability: above 0, the outcome is more frequent than predicted.
    called, sensitivity, specificity : Interval
        Share called positive at the threshold, of all, of those with and without the outcome (Wilson's intervals).
    """

    name: str
    patients: int
    outcomes: int
    auroc: Interval
    excess: Interval
    called: Interval
    sensitivity: Interval
    specificity: Interval


def _wilson(hit: float, missed: float) -> Interval:
    found = at_threshold([1.0, 1.0], [1.0, 0.0], 0.5, [hit, missed]) if hit + missed else None
    if found is None:
        return Interval(float("nan"), 0.0, 1.0)
    return Interval(found.sensitivity, *found.interval("sensitivity"))


def _named(groups: ArrayLike, n: int, where: str) -> np.ndarray:
    named = np.asarray(groups, object)
    if named.shape != (n,):
        raise InputError(f"{where}: {len(named)} groups named for {n} patients.")
    if any(g is None or g != g for g in named):
        raise InputError(f"{where}: the group of a patient is missing; name it 'unknown' if it is to be shown.")
    return np.array([str(g) for g in named])


def subgroups(label: ArrayLike, probability: ArrayLike, groups: ArrayLike, threshold: float) -> list[Subgroup]:
    """A table by group (age, ethnicity, receptors, vendor, field strength), the whole cohort first.

    Parameters
    ----------
    label, probability : array-like, shape (n,)
        The probabilities of patients whom the model did not see.
    groups : array-like, shape (n,)
        Name of each patient's group.
    threshold : float
        At and above which a patient is called positive.

    Returns
    -------
    list of Subgroup

    Raises
    ------
    InputError
        If a group is missing, or labels and probabilities cannot be used.
    """
    y, p = checked_probability(label, probability, "subgroups")
    named = _named(groups, len(y), "subgroups")
    parts = [("all", np.ones(len(y), bool))] + [(name, named == name) for name in sorted(set(named))]
    found = []
    for name, who in parts:
        a, b = y[who], p[who]
        called = at_threshold(a, b, threshold)
        area = delong(a, b) if min(a.sum(), (1 - a).sum()) >= 2 else Interval(float("nan"), 0.0, 1.0)
        sd = float((a - b).std(ddof=1) / np.sqrt(len(a))) if len(a) > 1 else float("inf")
        mean = float((a - b).mean())
        positive = called.true_positive + called.false_positive
        found.append(
            Subgroup(
                name, len(a), int(a.sum()), area, Interval(mean, mean - 1.96 * sd, mean + 1.96 * sd),
                _wilson(positive, len(a) - positive), _wilson(called.true_positive, called.false_negative),
                _wilson(called.true_negative, called.false_positive),
            )
        )  # fmt: skip
    return found


def gaps(
    label: ArrayLike,
    probability: ArrayLike,
    groups: ArrayLike,
    threshold: float,
    draws: int = 500,
    seed: int = 0,
    fewest: int = 10,
) -> dict[str, Interval]:
    """Largest differences between groups, with bootstrap intervals.

    A largest difference is above 0 by chance alone, more so with many small groups: an interval far above 0 is needed
    before it means anything.

    Parameters
    ----------
    label, probability, groups, threshold
        As :func:`subgroups`.
    draws, seed : int
        Of the bootstrap within groups and classes.
    fewest : int
        Groups with fewer patients of a class are left out.

    Returns
    -------
    dict
        ``demographic parity`` (share called positive), ``sensitivity`` and ``specificity`` (together: equalised odds)
        and ``calibration`` (outcome less probability).

    Raises
    ------
    InputError
        If fewer than two groups are large enough.
    """
    y, p = checked_probability(label, probability, "gaps")
    named = _named(groups, len(y), "gaps")
    names = [g for g in sorted(set(named)) if min((y[named == g] == k).sum() for k in (0, 1)) >= fewest]
    if len(names) < 2:
        raise InputError(f"gaps: {len(names)} groups have {fewest} patients of each class; two are needed.")
    kept = np.isin(named, names)
    y, p, named = y[kept], p[kept], named[kept]
    member = np.stack([named == g for g in names]).astype(float)
    called = (p >= threshold).astype(float)
    measures = {
        "demographic parity": (called, np.ones(len(y))),
        "sensitivity": (called * y, y),
        "specificity": ((1 - called) * (1 - y), 1 - y),
        "calibration": (y - p, np.ones(len(y))),
    }
    strata = np.char.add(named, np.where(y == 1, " 1", " 0"))

    def largest(top: np.ndarray, bottom: np.ndarray, w: np.ndarray) -> float:
        return float(np.ptp((member @ (w * top)) / (member @ (w * bottom))))

    return {
        name: bootstrap(lambda w, t=top, b=bottom: largest(t, b, w), len(y), draws, seed=seed, strata=strata)  # type: ignore[misc]
        for name, (top, bottom) in measures.items()
    }


def auroc_standard_error(area: float, with_outcome: int, without: int) -> float:
    """Standard error of an AUROC from so many patients (Hanley, McNeil 1982, doi:10.1148/radiology.143.1.7063747)."""
    if not 0.5 <= area < 1 or min(with_outcome, without) < 2:
        raise InputError("auroc_standard_error: an area from 0.5 to below 1 and two patients of each class are needed.")
    one, two = area / (2 - area), 2 * area**2 / (1 + area)
    variance = area * (1 - area) + (with_outcome - 1) * (one - area**2) + (without - 1) * (two - area**2)
    return float(np.sqrt(variance / (with_outcome * without)))


def detectable_difference(
    area: float, with_outcome: int, without: int, correlation: float = 0.0, power: float = 0.8, level: float = 0.95
) -> float:
    """Smallest gain in AUROC over a model with a given one that so many patients would show.

    Parameters
    ----------
    area : float
        AUROC of the model to be beaten.
    with_outcome, without : int
        Number of patients with and without the outcome.
    correlation : float
        Of the two AUROC over samples, 0 for other patients; for models of the same patients often 0.5 to 0.9.
    power, level : float
        Probability to find the gain, and of the interval that must exclude 0.

    Returns
    -------
    float
        inf if no gain up to an AUROC of 1 would be found.
    """
    if not 0 <= correlation < 1:
        raise InputError("detectable_difference: the correlation must be from 0 to below 1.")
    z = float(norm.isf((1 - level) / 2) + norm.ppf(power))
    se = auroc_standard_error(area, with_outcome, without)
    for gain in np.arange(0.0005, 1 - area - 0.0004, 0.0005):
        other = auroc_standard_error(area + gain, with_outcome, without)
        if gain >= z * np.sqrt(se**2 + other**2 - 2 * correlation * se * other):
            return float(gain)
    return float("inf")
