"""Several models of the time to an event mixed into one, with weights learned on patients they were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.base import clone
from sklearn.model_selection import StratifiedKFold
from sksurv.nonparametric import CensoringDistributionEstimator

from biomodel.errors import InputError
from survival.curves import predict_curves
from survival.hazard import Head

__all__ = ["Stacked", "out_of_fold_curves", "simplex_weights"]


class Stacked(Head):
    """A mixture of survival curves whose weights minimise the integrated Brier score out of fold.

    The weights are not negative and sum to one; the Brier score is quadratic in them, so they are unique up to models
    that predict the same (Wey, Connett and Rudser 2015, doi:10.1093/biostatistics/kxv001).

    Parameters
    ----------
    heads : sequence of (name, estimator)
        Heads, or pipelines that end in one.
    folds : int
        Folds of the training patients, stratified by the event.
    points : int
        Times at which the score is summed, between the 5th and 90th percentile of the times.
    seed : int

    Attributes
    ----------
    weights_ : dict
        Weight of each head, by name.
    grid_ : ndarray, shape (points,)
        Times at which the score was summed.
    out_of_fold_ : ndarray, shape (heads, n, points)
        Curves of the training patients by each head that was fitted without them: what the weights were learned from.
    """

    def __init__(self, heads: Sequence[tuple[str, Any]] = (), folds: int = 5, points: int = 60, seed: int = 0):
        self.heads, self.folds, self.points, self.seed = heads, folds, points, seed

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        if not self.heads:
            raise InputError("Stacked.fit: no heads; give at least one (name, estimator).")
        first, last = np.quantile(y["time"], (0.05, 0.9))
        self.grid_ = np.linspace(first, last, self.points)
        self.out_of_fold_ = np.stack(
            [out_of_fold_curves(head, x, y, self.grid_, self.folds, self.seed) for _, head in self.heads]
        )
        weights = simplex_weights(self.out_of_fold_, y, self.grid_)
        self.weights_ = {name: float(w) for (name, _), w in zip(self.heads, weights, strict=True)}
        self.models_ = [
            (w, clone(head).fit(x, y)) for (_, head), w in zip(self.heads, weights, strict=True) if w > 1e-6
        ]

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        total = sum(w for w, _ in self.models_)
        return sum(w / total * predict_curves(model, x, times).survival for w, model in self.models_)


def out_of_fold_curves(
    head: Any, x: np.ndarray, y: np.ndarray, times: np.ndarray, folds: int = 5, seed: int = 0
) -> np.ndarray:
    """Curves (n, T) of each patient by a copy of the model that was fitted to the other folds."""
    if y["event"].sum() < folds:
        raise InputError(f"{int(y['event'].sum())} events for {folds} folds; take fewer folds.")
    found = np.empty((len(y), len(times)))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y["event"])
    for train, test in split:
        found[test] = predict_curves(clone(head).fit(x[train], y[train]), x[test], times).survival
    return found


def simplex_weights(curves: np.ndarray, y: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Weights (m,) of the mixture of curves (m, n, T) with the least Brier score over the times.

    Who is censored before a time counts through those like him who are not (weights of Graf et al. 1999,
    doi:10.1002/(SICI)1097-0258(19990915/30)18:17/18<2529::AID-SIM274>3.0.CO;2-5).
    """
    censoring = CensoringDistributionEstimator().fit(y)
    alive = y["time"][:, None] > times
    at_event = np.where(y["event"], censoring.predict_proba(y["time"]), np.inf)
    weight = np.where(
        alive, 1 / np.maximum(censoring.predict_proba(times), 1e-9), 1 / np.maximum(at_event, 1e-9)[:, None]
    )
    m = len(curves)
    flat, w, truth = curves.reshape(m, -1), weight.ravel() / weight.size, alive.ravel().astype(float)
    a, b = (flat * w) @ flat.T, (flat * w) @ truth
    found = minimize(
        lambda v: v @ a @ v - 2 * b @ v,
        np.full(m, 1 / m),
        jac=lambda v: 2 * (a @ v - b),
        bounds=[(0, 1)] * m,
        constraints={"type": "eq", "fun": lambda v: v.sum() - 1, "jac": lambda v: np.ones(m)},
        method="SLSQP",
        options={"ftol": 1e-12, "maxiter": 500},
    )
    v = np.clip(found.x, 0, None)
    return v / v.sum()
