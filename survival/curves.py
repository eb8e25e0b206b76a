"""Survival curves of many patients on one time axis, and what is read from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from biomodel.errors import InputError

__all__ = ["Curves", "checked_times", "predict_curves", "steps"]

ROUNDING = 1e-9


def checked_times(times: ArrayLike, where: str) -> np.ndarray:
    """Times (T,) that rise and lie above 0; InputError otherwise."""
    t = np.atleast_1d(np.asarray(times, float))
    if t.ndim != 1 or not len(t) or not np.isfinite(t).all() or t[0] <= 0 or np.any(np.diff(t) <= 0):
        raise InputError(f"{where}: times must be finite, rise and lie above 0.")
    return t


def steps(x: np.ndarray, y: np.ndarray, at: np.ndarray, before: float) -> np.ndarray:
    """A right-continuous step function (..., T) with jumps at `x` (T,), at places (k,); `before` the first jump."""
    place = np.searchsorted(x, at, side="right") - 1
    return np.where(place < 0, before, np.asarray(y)[..., np.maximum(place, 0)])


@dataclass(frozen=True, eq=False)
class Curves:
    """Probability of being without the event, by patient and time.

    A curve is read as steps: a value holds until the next time. Nothing is said past the last time.

    Attributes
    ----------
    times : ndarray, shape (T,)
        Rising, above 0. At time 0 every curve is 1.
    survival : ndarray, shape (n, T)
        Never rising along a row.

    Raises
    ------
    InputError
        If shapes do not fit, times do not rise, or a curve rises or leaves [0, 1].

    Examples
    --------
    >>> import numpy as np
    >>> curves = Curves(np.array([1.0, 2.0]), np.array([[0.8, 0.4]]))
    >>> curves.at([0.5, 1.5]).tolist(), curves.mean_time(2.0).tolist(), curves.median().tolist()
    ([[1.0, 0.8]], [1.8], [2.0])
    """

    times: np.ndarray
    survival: np.ndarray

    def __post_init__(self) -> None:
        if self.times.ndim != 1 or self.survival.ndim != 2 or self.survival.shape[1] != len(self.times):
            raise InputError(
                f"Curves: times have shape {self.times.shape}, survival {self.survival.shape}; "
                "expected (T,) and (n, T)."
            )
        checked_times(self.times, "Curves")
        s = self.survival
        if not np.isfinite(s).all() or s.min() < -ROUNDING or s.max() > 1 + ROUNDING:
            raise InputError("Curves: a survival curve leaves [0, 1].")
        if np.any(np.diff(s, axis=1) > ROUNDING):
            raise InputError("Curves: a survival curve rises.")

    def at(self, times: ArrayLike) -> np.ndarray:
        """Probabilities (n, k) at other times (k,); InputError past the last time."""
        t = np.atleast_1d(np.asarray(times, float))
        if not np.isfinite(t).all() or t.max() > self.times[-1] or t.min() < 0:
            raise InputError(
                f"Curves.at: times from {t.min():g} to {t.max():g}; the curves hold from 0 to {self.times[-1]:g} and "
                "say nothing past that."
            )
        return steps(self.times, self.survival, t, 1.0)

    def mean_time(self, until: float) -> np.ndarray:
        """Restricted mean time without the event, (n,), from 0 to a time that the curves reach."""
        self.at([until])  # checks
        inside = self.times < until
        edges = np.concatenate(([0.0], self.times[inside], [until]))
        return (self.at(edges[:-1]) * np.diff(edges)).sum(1)

    def median(self) -> np.ndarray:
        """First time at which half of such patients have had the event, (n,); inf where that is not reached."""
        below = self.survival <= 0.5
        return np.where(below.any(1), self.times[below.argmax(1)], np.inf)


def predict_curves(model: Any, X: Any, times: ArrayLike) -> Curves:
    """Survival curves of a fitted model, also of one inside a pipeline or a search.

    Parameters
    ----------
    model
        A head of this package, an estimator of scikit-survival with `predict_survival_function`, or a pipeline or
        search of scikit-learn that ends in one.
    X : DataFrame or array-like, shape (n, p)
    times : array-like, shape (T,)
        Rising, above 0.

    Returns
    -------
    Curves

    Raises
    ------
    InputError
        If the model gives no survival curves, or none at these times.
    """
    t = checked_times(times, "predict_curves")
    model = getattr(model, "best_estimator_", model)
    if hasattr(model, "steps"):
        for _, step in model.steps[:-1]:
            X = X if step in (None, "passthrough") else step.transform(X)
        return predict_curves(model.steps[-1][1], X, t)
    if hasattr(model, "predict_curves"):
        return model.predict_curves(X, t)
    if not hasattr(model, "predict_survival_function"):
        raise InputError(
            f"predict_curves: {type(model).__name__} predicts no survival curves. Take a head of survival."
        )
    found = Curves(model.unique_times_, model.predict_survival_function(X, return_array=True))
    return Curves(t, found.at(t))
