"""How sure a number is, and whether two differ: bootstrap, DeLong, tests for cross-validation and for many at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import norm, rankdata
from scipy.stats import t as student

from biomodel.errors import InputError
from survival.metrics.binary import checked_pair

__all__ = ["Interval", "bootstrap", "bootstrap_draws", "corrected_t_test", "delong", "delong_paired", "holm"]


@dataclass(frozen=True)
class Interval:
    """A number with its interval and, where it is a difference, the probability of one as large by chance.

    Attributes
    ----------
    value, low, high : float
    p : float
        Two-sided; nan if nothing is tested.
    """

    value: float
    low: float
    high: float
    p: float = float("nan")

    def __str__(self) -> str:
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


def bootstrap_draws(
    statistic: Callable[[np.ndarray], float],
    n: int,
    draws: int = 1000,
    seed: int = 0,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
) -> np.ndarray:
    """A statistic of samples of the patients, drawn with replacement.

    Parameters
    ----------
    statistic : callable
        Takes counts (n,): how often each patient is in the sample. For a difference of two models compute both from the
        same counts, so that the draws are paired.
    n : int
        Number of patients.
    draws, seed : int
    groups : array-like, shape (n,), optional
        What is drawn as a whole: a patient with several rows, or a site.
    strata : array-like, shape (n,), optional
        Drawn from separately, so that each keeps its number (classes, when they are few).

    Returns
    -------
    ndarray, shape (draws,)

    Raises
    ------
    InputError
        If there are fewer than two groups, or both groups and strata are given.
    """
    if groups is not None and strata is not None:
        raise InputError("bootstrap: give groups or strata, not both.")
    rng = np.random.default_rng(seed)
    member = np.arange(n) if groups is None else np.unique(np.asarray(groups), return_inverse=True)[1]
    if len(member) != n or (strata is not None and len(np.asarray(strata)) != n):
        raise InputError(f"bootstrap: groups or strata do not name each of the {n} patients.")
    count = int(member.max()) + 1 if n else 0
    if count < 2:
        raise InputError("bootstrap: at least two patients (or groups) are needed.")
    parts = [np.arange(count)] if strata is None else [
        np.flatnonzero(np.asarray(strata) == s) for s in np.unique(np.asarray(strata))
    ]  # fmt: skip
    found = np.empty(draws)
    for k in range(draws):
        drawn = np.concatenate([rng.choice(part, len(part)) for part in parts])
        found[k] = statistic(np.bincount(drawn, minlength=count)[member].astype(float))
    return found


def bootstrap(
    statistic: Callable[[np.ndarray], float],
    n: int,
    draws: int = 1000,
    level: float = 0.95,
    seed: int = 0,
    groups: ArrayLike | None = None,
    strata: ArrayLike | None = None,
    null: float | None = None,
) -> Interval:
    """Percentile interval of a statistic over samples of the patients: see :func:`bootstrap_draws`.

    Parameters
    ----------
    statistic, n, draws, seed, groups, strata
        As :func:`bootstrap_draws`.
    level : float
        Of the interval.
    null : float, optional
        Value of the statistic if there is nothing to find (0 for a difference): then `p` is twice the share of draws
        on its other side, at least 2 / (draws + 1).

    Returns
    -------
    Interval
    """
    found = bootstrap_draws(statistic, n, draws, seed, groups, strata)
    low, high = np.quantile(found, ((1 - level) / 2, (1 + level) / 2))
    p = float("nan")
    if null is not None:
        tail = min((found <= null).sum(), (found >= null).sum()) + 1
        p = min(1.0, 2 * float(tail) / (draws + 1))
    return Interval(float(statistic(np.ones(n))), float(low), float(high), p)


def _components(y: np.ndarray, p: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUROC, and the share of the other class that each positive and each negative patient beats."""
    one, none = p[y == 1], p[y == 0]
    every = rankdata(p)
    with_outcome = (every[y == 1] - rankdata(one)) / len(none)
    without = 1 - (every[y == 0] - rankdata(none)) / len(one)
    return float(with_outcome.mean()), with_outcome, without


def delong(label: ArrayLike, value: ArrayLike, level: float = 0.95) -> Interval:
    """AUROC with the interval of DeLong et al. (1988, doi:10.2307/2531595), on the logit scale to stay in [0, 1].

    Raises
    ------
    InputError
        If a class has fewer than two patients.
    """
    y, p = checked_pair(label, value, "delong")
    _enough(y, "delong")
    area, one, none = _components(y, p)
    sd = float(np.sqrt(one.var(ddof=1) / len(one) + none.var(ddof=1) / len(none)))
    if sd == 0 or area in (0.0, 1.0):
        return Interval(area, area, area)
    half = norm.isf((1 - level) / 2) * sd / (area * (1 - area))
    middle = np.log(area / (1 - area))
    low, high = (1 / (1 + np.exp(-(middle + side * half))) for side in (-1, 1))
    return Interval(area, float(low), float(high))


def delong_paired(label: ArrayLike, first: ArrayLike, second: ArrayLike, level: float = 0.95) -> Interval:
    """Difference of the AUROC of two predictions for the same patients (first less second), with interval and p value.

    For models fitted to the patients themselves, or nested in each other, the test is not valid; for those tested on
    patients who were not used it is (Demler et al. 2012, doi:10.1002/sim.5328).
    """
    y, p = checked_pair(label, first, "delong_paired")
    _, q = checked_pair(label, second, "delong_paired")
    _enough(y, "delong_paired")
    (area, one, none), (other, one_other, none_other) = _components(y, p), _components(y, q)
    variance = (one - one_other).var(ddof=1) / len(one) + (none - none_other).var(ddof=1) / len(none)
    difference, sd = area - other, float(np.sqrt(variance))
    half = norm.isf((1 - level) / 2) * sd
    p_value = 2 * float(norm.sf(abs(difference) / sd)) if sd > 0 else float(difference == 0)
    return Interval(difference, difference - half, difference + half, p_value)


def _enough(y: np.ndarray, where: str) -> None:
    if min(y.sum(), (1 - y).sum()) < 2:
        raise InputError(f"{where}: at least two patients of each class are needed.")


def corrected_t_test(differences: ArrayLike, test_share: float, level: float = 0.95) -> Interval:
    """Mean difference over the folds of a repeated cross-validation, its variance corrected for shared patients.

    The folds overlap in training, so that plain tests find differences where there are none (Nadeau and Bengio 2003,
    doi:10.1023/A:1024068626366).

    Parameters
    ----------
    differences : array-like, shape (k,)
        Of two models in each fold of each repeat.
    test_share : float
        Test patients for each training patient, 0.25 in five folds.
    level : float

    Returns
    -------
    Interval
    """
    d = np.asarray(differences, float).ravel()
    if len(d) < 2 or not np.isfinite(d).all() or test_share <= 0:
        raise InputError("corrected_t_test: at least two finite differences and a share above 0 are needed.")
    sd = float(np.sqrt(d.var(ddof=1) * (1 / len(d) + test_share)))
    mean = float(d.mean())
    half = float(student.isf((1 - level) / 2, len(d) - 1)) * sd
    p = 2 * float(student.sf(abs(mean) / sd, len(d) - 1)) if sd > 0 else float(mean == 0)
    return Interval(mean, mean - half, mean + half, p)


def holm(p_values: ArrayLike) -> np.ndarray:
    """p values (k,) corrected for there being several tests (Holm 1979, Scand J Stat 6:65-70)."""
    p = np.asarray(p_values, float)
    if p.ndim != 1 or not len(p) or not np.isfinite(p).all() or p.min() < 0 or p.max() > 1:
        raise InputError("holm: p values must be a row of numbers in [0, 1].")
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    found = np.empty(len(p))
    found[order] = np.minimum(stepped, 1.0)
    return found
