"""Metrics of predicted times to an event: concordance, Brier score, time-dependent AUC, calibration."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import chi2
from sksurv.nonparametric import CensoringDistributionEstimator, kaplan_meier_estimator

from biomodel.errors import InputError
from survival.curves import Curves, checked_times, steps
from survival.outcome import checked_follow_up

__all__ = [
    "Concordance",
    "brier_by_patient",
    "d_calibration",
    "harrell_c",
    "integrated_brier_score",
    "time_dependent_auc",
    "uno_c",
]

#: Risks nearer than this are tied, as in scikit-survival.
TIED = 1e-8


def checked_risk(risk: ArrayLike, n: int, where: str) -> np.ndarray:
    """Risks (n,), finite; InputError otherwise."""
    r = np.asarray(risk, float)
    if r.shape != (n,) or not np.isfinite(r).all():
        raise InputError(f"{where}: risks have shape {r.shape} or are not finite; expected one number for each of {n}.")
    return r


def checked_weights(weights: ArrayLike | None, n: int, where: str) -> np.ndarray:
    """Weights (n,), not negative; ones if not given."""
    if weights is None:
        return np.ones(n)
    w = np.asarray(weights, float)
    if w.shape != (n,) or not np.isfinite(w).all() or w.min() < 0 or w.sum() == 0:
        raise InputError(f"{where}: weights must be {n} numbers that are not negative, nor all zero.")
    return w


class Concordance:
    """Of the pairs of patients of whom it is known who had the event first, the share that the risks order rightly.

    Pairs are compared once, so that bootstrap samples cost one product of a matrix and a vector each. Who has the event
    at the time at which another is censored came first; tied risks count half.

    Parameters
    ----------
    y : ndarray, shape (n,)
        What :func:`~survival.outcome.follow_up` gives.
    risk : array-like, shape (n,)
        The larger, the earlier.
    train : ndarray, optional
        Follow-up from which the censoring is estimated: then the index is Uno's (2011, doi:10.1002/sim.4154), whose
        weights make it independent of the censoring; without it, Harrell's (1996,
        doi:10.1002/(SICI)1097-0258(19960229)15:4<361::AID-SIM168>3.0.CO;2-4).
    until : float, optional
        Only events before this time count.

    Raises
    ------
    InputError
        If nothing can be compared, or the censoring is not known up to an event that counts.

    Examples
    --------
    >>> from survival.outcome import follow_up
    >>> Concordance(follow_up([1, 2, 3], [1, 1, 0]), [3.0, 1.0, 2.0])()
    0.6666666666666666
    """

    def __init__(self, y: np.ndarray, risk: ArrayLike, train: np.ndarray | None = None, until: float | None = None):
        y = checked_follow_up(y, "concordance")
        r = checked_risk(risk, len(y), "concordance")
        time, event = y["time"], y["event"].copy()
        if until is not None:
            event &= time < until
        self._cases = np.flatnonzero(event)
        weight = np.ones(len(self._cases))
        if train is not None:
            alive = _uncensored(checked_follow_up(train, "concordance"), time[event], "concordance")
            weight = 1 / alive**2
        later = (time[event][:, None] < time) | ((time[event][:, None] == time) & ~y["event"])
        difference = r[event][:, None] - r
        tied = np.abs(difference) <= TIED
        self._compared = later.astype(float) * weight[:, None]
        self._right = np.where(tied, 0.5, difference > 0) * self._compared
        if not self._compared.any():
            raise InputError("concordance: no two patients can be compared: of no one is it known who came first.")

    def __call__(self, weights: ArrayLike | None = None) -> float:
        """The index of all patients, or of a sample in which each occurs so many times."""
        w = checked_weights(weights, self._right.shape[1], "concordance")
        cases = w[self._cases]
        return float(cases @ (self._right @ w) / (cases @ (self._compared @ w)))


def _uncensored(train: np.ndarray, times: np.ndarray, where: str) -> np.ndarray:
    """Probability of not being censored by the times, from a follow-up; InputError where it is not known or 0."""
    if times.size and times.max() > train["time"].max():
        raise InputError(
            f"{where}: a test time of {times.max():g} lies past the last time of the training part, "
            f"{train['time'].max():g}; censoring is not known there. Give an earlier `until` or earlier times."
        )
    found = CensoringDistributionEstimator().fit(train).predict_proba(times)
    if np.any(found <= 0):
        raise InputError(f"{where}: nobody is followed up past {times[found <= 0].min():g}; give an earlier time.")
    return found


def harrell_c(y: np.ndarray, risk: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Harrell's concordance index: see :class:`Concordance`, which holds all pairs: fit for some 10 000 patients."""
    return Concordance(y, risk)(weights)


def uno_c(
    train: np.ndarray, y: np.ndarray, risk: ArrayLike, until: float | None = None, weights: ArrayLike | None = None
) -> float:
    """Uno's concordance index, the censoring estimated from `train`: see :class:`Concordance`."""
    return Concordance(y, risk, train, until)(weights)


def brier_by_patient(train: np.ndarray, y: np.ndarray, curves: Curves) -> np.ndarray:
    """Squared errors (n, T) of survival curves, weighted for censoring; their mean over patients is the Brier score.

    Who is censored before a time counts through those like them who are not (Graf et al. 1999,
    doi:10.1002/(SICI)1097-0258(19990915/30)18:17/18<2529::AID-SIM274>3.0.CO;2-5).

    Parameters
    ----------
    train : ndarray
        Follow-up from which the censoring is estimated.
    y : ndarray, shape (n,)
    curves : Curves
        Of these patients, at times within their follow-up.

    Raises
    ------
    InputError
        If shapes do not fit, or a time lies outside the follow-up.
    """
    y, train = checked_follow_up(y, "brier"), checked_follow_up(train, "brier")
    times, s = curves.times, curves.survival
    if len(s) != len(y):
        raise InputError(f"brier: {len(s)} curves for {len(y)} patients.")
    if times[0] < y["time"].min() or times[-1] >= y["time"].max():
        raise InputError(
            f"brier: times from {times[0]:g} to {times[-1]:g}; expected within the follow-up of the patients, "
            f"{y['time'].min():g} to {y['time'].max():g}."
        )
    weight_then = 1 / _uncensored(train, times, "brier")
    case = y["event"][:, None] & (y["time"][:, None] <= times)
    counted = y["event"] & (y["time"] <= times[-1])
    weight_event = np.zeros(len(y))
    weight_event[counted] = 1 / _uncensored(train, y["time"][counted], "brier")
    control = y["time"][:, None] > times
    return s**2 * case * weight_event[:, None] + (1 - s) ** 2 * control * weight_then


def integrated_brier_score(train: np.ndarray, y: np.ndarray, curves: Curves, weights: ArrayLike | None = None) -> float:
    """Mean over time of the Brier score (trapezoid rule over the times of the curves): see :func:`brier_by_patient`."""
    if len(curves.times) < 2:
        raise InputError("integrated_brier_score: at least two times are needed.")
    w = checked_weights(weights, len(curves.survival), "integrated_brier_score")
    score = w @ brier_by_patient(train, y, curves) / w.sum()
    return float(np.trapezoid(score, curves.times) / np.ptp(curves.times))


def time_dependent_auc(
    train: np.ndarray, y: np.ndarray, risk: ArrayLike, times: ArrayLike, weights: ArrayLike | None = None
) -> tuple[np.ndarray, float]:
    """AUC of who has had the event by a time against who has not (Uno et al. 2007, doi:10.1198/016214507000000149).

    Parameters
    ----------
    train : ndarray
        Follow-up from which the censoring is estimated.
    y : ndarray, shape (n,)
    risk : array-like, shape (n,) or (n, T)
        One for all times, or one for each.
    times : array-like, shape (T,)
    weights : array-like, shape (n,), optional

    Returns
    -------
    (ndarray, float)
        The AUC (T,), and its mean over time, weighted by how many have the event when (Lambert and Chevret 2016,
        doi:10.1177/0962280213515571).

    Raises
    ------
    InputError
        If a time lies outside the follow-up, or nobody has had the event by the first one.
    """
    y, train = checked_follow_up(y, "time_dependent_auc"), checked_follow_up(train, "time_dependent_auc")
    t = checked_times(times, "time_dependent_auc")
    w = checked_weights(weights, len(y), "time_dependent_auc")
    r = np.asarray(risk, float)
    r = np.tile(r[:, None], len(t)) if r.ndim == 1 else r
    if r.shape != (len(y), len(t)) or not np.isfinite(r).all():
        raise InputError(f"time_dependent_auc: risks {r.shape}; expected ({len(y)},) or ({len(y)}, {len(t)}), finite.")
    if t[0] < y["time"].min() or t[-1] >= y["time"].max():
        raise InputError("time_dependent_auc: times must lie within the follow-up of the patients.")
    counted = y["event"] & (y["time"] <= t[-1])
    weight = np.zeros(len(y))
    weight[counted] = 1 / _uncensored(train, y["time"][counted], "time_dependent_auc")
    found = np.empty(len(t))
    for j, now in enumerate(t):
        case, control = counted & (y["time"] <= now), y["time"] > now
        if not (w[case].sum() and w[control].sum()):
            raise InputError(f"time_dependent_auc: by {now:g} nobody, or everybody, has had the event.")
        found[j] = _ordered(r[case, j], (w * weight)[case], r[control, j], w[control])
    if len(t) == 1:
        return found, float(found[0])
    at, alive = kaplan_meier_estimator(y["event"], y["time"]) if weights is None else _kaplan(y, w)
    s = steps(at, alive, t, 1.0)
    share = -np.diff(np.concatenate(([1.0], s)))
    return found, float(found @ share / (1 - s[-1]))


def _kaplan(y: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kaplan-Meier curve of weighted patients."""
    at = np.unique(y["time"])
    risk = np.array([w[y["time"] >= t].sum() for t in at])
    gone = np.array([w[(y["time"] == t) & y["event"]].sum() for t in at])
    return at, np.cumprod(1 - gone / np.maximum(risk, 1e-300))


def _ordered(high: np.ndarray, weight_high: np.ndarray, low: np.ndarray, weight_low: np.ndarray) -> float:
    """Weighted share of pairs in which the first is larger; ties count half."""
    difference = high[:, None] - low
    right = np.where(np.abs(difference) <= TIED, 0.5, difference > 0)
    return float(weight_high @ right @ weight_low / (weight_high.sum() * weight_low.sum()))


@dataclass(frozen=True, eq=False)
class DCalibration:
    """Whether predicted probabilities at the times of events are uniform.

    Attributes
    ----------
    share : ndarray, shape (bins,)
        Of the patients in each bin of the survival probability, from 0 up; all 1 / bins if calibrated.
    statistic, p : float
        Chi-squared with bins - 1 degrees of freedom.
    """

    share: np.ndarray
    statistic: float
    p: float


def d_calibration(y: np.ndarray, at_end: ArrayLike, bins: int = 10) -> DCalibration:
    """Test of distribution calibration (Haider et al. 2020, JMLR 21:1-63).

    Parameters
    ----------
    y : ndarray, shape (n,)
    at_end : array-like, shape (n,)
        Predicted survival probability of each patient at his or her own time of event or censoring. A censored patient
        is spread evenly over the bins below that probability.
    bins : int

    Returns
    -------
    DCalibration

    Raises
    ------
    InputError
        If a probability leaves [0, 1].
    """
    y = checked_follow_up(y, "d_calibration")
    s = checked_risk(at_end, len(y), "d_calibration")
    if s.min() < 0 or s.max() > 1:
        raise InputError("d_calibration: survival probabilities must lie in [0, 1].")
    place = np.minimum((s * bins).astype(int), bins - 1)
    count = np.bincount(place[y["event"]], minlength=bins).astype(float)
    edges = np.arange(bins) / bins
    c = s[~y["event"]]
    inside = np.clip(c[:, None] - edges, 0, 1 / bins)
    count += np.where(c[:, None] > 0, inside / np.maximum(c[:, None], 1e-300), edges == 0).sum(0)
    expected = len(y) / bins
    statistic = float(((count - expected) ** 2 / expected).sum())
    return DCalibration(count / len(y), statistic, float(chi2.sf(statistic, bins - 1)))
