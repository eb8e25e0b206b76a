"""Metrics of predicted probabilities of a yes or no: discrimination, calibration, decisions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit
from scipy.stats import norm

from biomodel.errors import InputError
from survival.metrics.times import checked_weights

__all__ = [
    "AtThreshold",
    "at_threshold",
    "auprc",
    "auroc",
    "brier",
    "calibration_line",
    "expected_calibration_error",
    "net_benefit",
]


def checked_pair(label: ArrayLike, value: ArrayLike, where: str, both: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Labels (n,) of 0 and 1 and finite values (n,); InputError otherwise, or if `both` classes must be there."""
    try:
        y, p = np.asarray(label, float), np.asarray(value, float)
    except (TypeError, ValueError):
        raise InputError(f"{where}: labels or predictions hold something that is no number.") from None
    if y.ndim != 1 or y.shape != p.shape or not len(y):
        raise InputError(f"{where}: labels have shape {y.shape}, predictions {p.shape}; expected one of each.")
    if not np.isin(y, (0.0, 1.0)).all():
        raise InputError(f"{where}: labels must be 0 or 1, nothing missing.")
    if not np.isfinite(p).all():
        raise InputError(f"{where}: {int((~np.isfinite(p)).sum())} predictions are missing or infinite.")
    if both and len(np.unique(y)) < 2:
        raise InputError(f"{where}: all {len(y)} labels are {y[0]:g}; both classes are needed.")
    return y, p


def checked_probability(label: ArrayLike, value: ArrayLike, where: str) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`checked_pair`, the values in [0, 1]."""
    y, p = checked_pair(label, value, where, both=False)
    if p.min() < 0 or p.max() > 1:
        raise InputError(f"{where}: predictions run from {p.min():g} to {p.max():g}; expected probabilities.")
    return y, p


def _ranked(y: np.ndarray, p: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """True and false positives (k,) at each distinct value as threshold, the largest first."""
    order = np.argsort(-p, kind="stable")
    last = np.append(np.flatnonzero(np.diff(p[order])), len(p) - 1)
    return np.cumsum((w * y)[order])[last], np.cumsum((w * (1 - y))[order])[last]


def auroc(label: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Area under the ROC curve: of the pairs with and without the outcome, the share in which the first has more."""
    y, p = checked_pair(label, value, "auroc")
    true, false = _ranked(y, p, checked_weights(weights, len(y), "auroc"))
    if not (true[-1] and false[-1]):
        raise InputError("auroc: the weights leave one class alone; in a bootstrap draw the classes apart (strata).")
    return float(np.trapezoid(np.append(0, true), np.append(0, false)) / (true[-1] * false[-1]))


def auprc(label: ArrayLike, value: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Average precision: the area under the curve of precision over recall, as steps (as scikit-learn's)."""
    y, p = checked_pair(label, value, "auprc")
    true, false = _ranked(y, p, checked_weights(weights, len(y), "auprc"))
    if not true[-1]:
        raise InputError("auprc: the weights leave nobody with the outcome.")
    precision = np.divide(true, true + false, out=np.ones_like(true), where=true + false > 0)
    return float(np.diff(np.append(0, true)) @ precision / true[-1])


def brier(label: ArrayLike, probability: ArrayLike, weights: ArrayLike | None = None) -> float:
    """Mean squared error of the probabilities."""
    y, p = checked_probability(label, probability, "brier")
    w = checked_weights(weights, len(y), "brier")
    return float(w @ (p - y) ** 2 / w.sum())


def expected_calibration_error(
    label: ArrayLike, probability: ArrayLike, bins: int = 10, weights: ArrayLike | None = None
) -> float:
    """Mean distance between predicted and observed shares over bins of equally many patients.

    With few patients it is above 0 even for perfect probabilities; compare it with that of labels drawn from them.
    """
    y, p = checked_probability(label, probability, "expected_calibration_error")
    w = checked_weights(weights, len(y), "expected_calibration_error")
    edges = np.quantile(p, np.linspace(0, 1, bins + 1)[1:-1])
    place = np.searchsorted(edges, p, side="left")
    gap = np.abs(np.bincount(place, w * (p - y), bins))
    return float(gap.sum() / w.sum())


def calibration_line(
    label: ArrayLike, probability: ArrayLike, weights: ArrayLike | None = None
) -> tuple[float, float, float]:
    """Slope and intercept of the logistic regression of the outcome on the logit of the probabilities.

    A slope below 1 says that the probabilities are too extreme, above 1 that they are too timid (Van Calster et al.
    2019, doi:10.1186/s12916-019-1466-7).

    Returns
    -------
    (slope, intercept, in_the_large)
        The third is the intercept with the slope held at 1: above 0, the outcome is more frequent than predicted.

    Raises
    ------
    InputError
        If the probabilities are all the same, or separate the classes completely: then no finite slope exists.
    """
    y, p = checked_probability(label, probability, "calibration_line")
    checked_pair(label, probability, "calibration_line")
    w = checked_weights(weights, len(y), "calibration_line")
    x = np.clip(p, 1e-9, 1 - 1e-9)
    x = np.log(x / (1 - x))
    used = w > 0
    if np.ptp(x[used]) == 0:
        raise InputError("calibration_line: all probabilities are the same; a slope has no meaning.")
    if min(x[used & (y == 1)], default=np.inf) > max(x[used & (y == 0)], default=-np.inf):
        raise InputError("calibration_line: the probabilities separate the classes completely; no finite slope exists.")
    intercept, slope = _newton(np.column_stack((np.ones(len(x)), x)), y, w, np.zeros(len(x)), np.array([0.0, 1.0]))
    (large,) = _newton(np.ones((len(x), 1)), y, w, x, np.zeros(1))
    return float(slope), float(intercept), float(large)


def _newton(a: np.ndarray, y: np.ndarray, w: np.ndarray, offset: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Coefficients of a weighted logistic regression."""

    def loss(b: np.ndarray) -> float:
        z = a @ b + offset
        return float(w @ (np.logaddexp(0, z) - y * z))

    b = start
    for _ in range(100):
        mu = expit(a @ b + offset)
        step = np.linalg.solve((a * (w * mu * (1 - mu))[:, None]).T @ a, a.T @ (w * (y - mu)))
        size, before = 1.0, loss(b)
        while loss(b + size * step) > before + 1e-12 * abs(before) and size > 1e-6:
            size /= 2
        b = b + size * step
        if np.abs(step).max() < 1e-12 * max(1.0, np.abs(b).max()):
            break
    return b


@dataclass(frozen=True)
class AtThreshold:
    """What happens if everybody whose probability reaches a threshold is called positive.

    Attributes
    ----------
    threshold : float
    true_positive, false_positive, false_negative, true_negative : float
        Numbers of patients (or weights).
    """

    threshold: float
    true_positive: float
    false_positive: float
    false_negative: float
    true_negative: float

    @property
    def sensitivity(self) -> float:
        """Share called positive of those with the outcome."""
        return _share(self.true_positive, self.false_negative)

    @property
    def specificity(self) -> float:
        """Share called negative of those without the outcome."""
        return _share(self.true_negative, self.false_positive)

    @property
    def ppv(self) -> float:
        """Share with the outcome of those called positive; nan if nobody is."""
        return _share(self.true_positive, self.false_positive)

    @property
    def npv(self) -> float:
        """Share without the outcome of those called negative; nan if nobody is."""
        return _share(self.true_negative, self.false_negative)

    def interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Wilson's interval of one of the four shares, by its name."""
        pairs = {
            "sensitivity": (self.true_positive, self.false_negative),
            "specificity": (self.true_negative, self.false_positive),
            "ppv": (self.true_positive, self.false_positive),
            "npv": (self.true_negative, self.false_negative),
        }
        if name not in pairs:
            raise InputError(f"interval: '{name}' is not one of {', '.join(pairs)}.")
        hit, missed = pairs[name]
        n = hit + missed
        if n == 0:
            return 0.0, 1.0
        z, share = norm.isf((1 - level) / 2), hit / n
        middle, half = share + z**2 / (2 * n), z * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
        return float((middle - half) / (1 + z**2 / n)), float((middle + half) / (1 + z**2 / n))


def _share(hit: float, missed: float) -> float:
    return hit / (hit + missed) if hit + missed else float("nan")


def at_threshold(
    label: ArrayLike, probability: ArrayLike, threshold: float, weights: ArrayLike | None = None
) -> AtThreshold:
    """Numbers of rightly and wrongly called patients if `probability >= threshold` is called positive."""
    y, p = checked_pair(label, probability, "at_threshold", both=False)
    w = checked_weights(weights, len(y), "at_threshold")
    called = p >= threshold
    return AtThreshold(float(threshold), *(float(w[part].sum()) for part in (
        called & (y == 1), called & (y == 0), ~called & (y == 1), ~called & (y == 0)
    )))  # fmt: skip


def net_benefit(
    label: ArrayLike, probability: ArrayLike, thresholds: ArrayLike, weights: ArrayLike | None = None
) -> np.ndarray:
    """Decision curve: true positives less false positives at the odds of the threshold, per patient (Vickers and Elkin
    2006, doi:10.1177/0272989X06295361).

    Parameters
    ----------
    label, probability : array-like, shape (n,)
        A constant probability of 1 gives the curve of treating everybody; treating nobody gives 0.
    thresholds : array-like, shape (k,)
        Above 0 and below 1.
    weights : array-like, shape (n,), optional

    Returns
    -------
    ndarray, shape (k,)
    """
    y, p = checked_probability(label, probability, "net_benefit")
    w = checked_weights(weights, len(y), "net_benefit")
    t = np.atleast_1d(np.asarray(thresholds, float))
    if not np.isfinite(t).all() or t.min() <= 0 or t.max() >= 1:
        raise InputError("net_benefit: thresholds must lie between 0 and 1, both left out.")
    called = p >= t[:, None]
    return (called @ (w * y) - called @ (w * (1 - y)) * t / (1 - t)) / w.sum()
