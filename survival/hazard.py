"""Models of the time to an event, each an estimator in scikit-learn's manner that also gives survival curves.

`fit(X, y)` takes a table and a :func:`~survival.outcome.follow_up`; `predict(X)` gives risks (larger is worse),
`score` Harrell's C; pipelines, search and cross-validation of scikit-learn work.
:func:`~survival.curves.predict_curves` (or the method of that name) gives :class:`~survival.curves.Curves`, up to the
last time that was seen in training.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pandas as pd
from lifelines import WeibullAFTFitter
from lifelines.exceptions import ConvergenceError, ConvergenceWarning
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.preprocessing import StandardScaler
from sksurv.base import SurvivalAnalysisMixin
from sksurv.ensemble import GradientBoostingSurvivalAnalysis, RandomSurvivalForest
from sksurv.linear_model import CoxnetSurvivalAnalysis, CoxPHSurvivalAnalysis

from biomodel.errors import InputError, ModelError
from survival.curves import Curves, checked_times, steps
from survival.inputs import fitted_table, table_like
from survival.outcome import checked_follow_up

__all__ = ["AFT", "Boosting", "Cox", "DiscreteHazard", "ElasticCox", "Forest", "Head", "coarsened"]


def coarsened(y: np.ndarray, count: int) -> np.ndarray:
    """Follow-up with at most `count` distinct times, which fast models want.

    Times move to the nearest of the quantiles of the times of events, so that late and early moves balance.
    """
    at = np.unique(np.quantile(y["time"][y["event"]], np.linspace(0, 1, count)))
    found = y.copy()
    found["time"] = at[np.abs(y["time"][:, None] - at).argmin(1)] if len(at) < len(np.unique(y["time"])) else y["time"]
    return found


class Head(SurvivalAnalysisMixin, BaseEstimator):
    """What all models of the time to an event share: input is checked, and risks and curves have one form.

    A model of your own defines ``_fit(x, y)`` and ``_curves(x, times)`` with the values (n, T) of the curves. Unless it
    defines ``_risk(x)``, its risks are the probabilities of having had the event by the time of a random event of the
    training data: where curves cross, the risk then asks for what concordance is about.

    Attributes
    ----------
    n_features_in_ : int
    feature_names_in_ : ndarray
        Where the table had names.
    last_time_ : float
        The longest time seen in training; curves end there.
    event_times_ : ndarray
        Up to 99 quantiles of the times of events in training.
    """

    #: Whether curves may be asked for past the last time of training: a parametric model says something there.
    _extrapolates = False

    def fit(self, X: Any, y: np.ndarray) -> Head:
        """Fit to a table (n, p) and a follow-up (n,).

        Raises
        ------
        InputError
            If the table or the follow-up cannot be used: see :mod:`survival.inputs` and :mod:`survival.outcome`.
        """
        y = checked_follow_up(y, f"{type(self).__name__}.fit", events=2)
        x = fitted_table(self, X, len(y))
        self.last_time_ = float(y["time"].max())
        self.event_times_ = np.unique(np.quantile(y["time"][y["event"]], np.arange(0.01, 1.0, 0.01)))
        self._fit(x, y)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Risks (n,): the larger, the earlier the event."""
        return self._risk(table_like(self, X))

    def predict_curves(self, X: Any, times: ArrayLike) -> Curves:
        """Survival curves at times (T,) up to the last one of training."""
        x, t = table_like(self, X), checked_times(times, f"{type(self).__name__}.predict_curves")
        if t[-1] > self.last_time_ and not self._extrapolates:
            raise InputError(
                f"{type(self).__name__}.predict_curves: times reach {t[-1]:g}, the training data end at "
                f"{self.last_time_:g}; nothing is known past that."
            )
        return Curves(t, np.clip(self._curves(x, t), 0.0, 1.0))

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        raise NotImplementedError

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def _risk(self, x: np.ndarray) -> np.ndarray:
        return 1 - self._curves(x, self.event_times_).mean(1)


class Cox(Head):
    """Proportional hazards with a ridge penalty on standardised columns (Efron's treatment of ties).

    Parameters
    ----------
    alpha : float
        Penalty; 0 for none.

    Raises
    ------
    InputError
        In `fit`, without a penalty: if there are fewer events than columns, or a column is constant.
    """

    def __init__(self, alpha: float = 1.0):
        self.alpha = alpha

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        events, columns = int(y["event"].sum()), x.shape[1]
        if self.alpha == 0 and events < columns:
            raise InputError(
                f"Cox.fit: {events} events for {columns} columns; without a penalty nothing is determined. Set alpha "
                "above 0 or use fewer columns."
            )
        if self.alpha == 0 and np.any(x.std(0) == 0):
            raise InputError("Cox.fit: a column is constant; without a penalty its coefficient is not determined.")
        self.scaler_ = StandardScaler().fit(x)
        self.model_ = CoxPHSurvivalAnalysis(alpha=self.alpha, ties="efron").fit(self.scaler_.transform(x), y)

    @property
    def coef_(self) -> np.ndarray:
        """Log hazard ratio (p,) of one standard deviation of each column."""
        return self.model_.coef_

    def _risk(self, x: np.ndarray) -> np.ndarray:
        return self.model_.predict(self.scaler_.transform(x))

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        base = self.model_.cum_baseline_hazard_
        return np.exp(-np.exp(self._risk(x))[:, None] * steps(base.x, base.y, times, 0.0))


class ElasticCox(Head):
    """Proportional hazards with an elastic-net penalty on standardised columns, which leaves columns out.

    Parameters
    ----------
    alpha : float
        Strength of the penalty.
    mix : float
        Share of the lasso, above 0 to 1.
    """

    def __init__(self, alpha: float = 0.02, mix: float = 0.5):
        self.alpha, self.mix = alpha, mix

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        self.scaler_ = StandardScaler().fit(x)
        model = CoxnetSurvivalAnalysis(alphas=[self.alpha], l1_ratio=self.mix, fit_baseline_model=True)
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="all coefficients are zero")
                self.model_ = model.fit(self.scaler_.transform(x), y)
        except (ValueError, ArithmeticError) as error:
            raise ModelError(f"ElasticCox.fit: {error}. Take another alpha; {self.alpha:g} was asked for.") from None

    @property
    def coef_(self) -> np.ndarray:
        """Log hazard ratio (p,) of one standard deviation of each column."""
        return self.model_.coef_[:, 0]

    def _risk(self, x: np.ndarray) -> np.ndarray:
        return self.model_.predict(self.scaler_.transform(x))

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        found = self.model_.predict_survival_function(self.scaler_.transform(x), return_array=True)
        return steps(self.model_.unique_times_, found, times, 1.0)


class _Trees(Head):
    """What models of scikit-survival that predict curves in steps have in common."""

    def _risk(self, x: np.ndarray) -> np.ndarray:
        return self.model_.predict(x)

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        found = self.model_.predict_survival_function(x, return_array=True)
        return steps(self.model_.unique_times_, found, times, 1.0)


class Forest(_Trees):
    """Random survival forest (Ishwaran et al. 2008, doi:10.1214/08-AOAS169).

    Parameters
    ----------
    trees, leaf : int
        Number of trees; fewest patients in a leaf.
    features : float or str or None
        Columns tried at each split, as `max_features` of scikit-survival.
    times : int
        Distinct times at most.
    seed : int
    """

    def __init__(self, trees: int = 300, leaf: int = 15, features: Any = "sqrt", times: int = 100, seed: int = 0):
        self.trees, self.leaf, self.features, self.times, self.seed = trees, leaf, features, times, seed

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        self.model_ = RandomSurvivalForest(
            self.trees, min_samples_leaf=self.leaf, min_samples_split=2 * self.leaf, max_features=self.features,
            random_state=self.seed,
        ).fit(x, coarsened(y, self.times))  # fmt: skip


class Boosting(_Trees):
    """Gradient boosting of the Cox partial likelihood with regression trees.

    Parameters
    ----------
    trees, depth, leaf : int
        Number of trees, their depth, fewest patients in a leaf.
    rate, subsample : float
        Learning rate; share of the patients that each tree sees.
    times : int
        Distinct times at most.
    seed : int
    """

    def __init__(self, trees: int = 200, depth: int = 3, leaf: int = 20, rate: float = 0.05, subsample: float = 0.5,
                 times: int = 100, seed: int = 0):  # fmt: skip
        self.trees, self.depth, self.leaf, self.times = trees, depth, leaf, times
        self.rate, self.subsample, self.seed = rate, subsample, seed

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        self.model_ = GradientBoostingSurvivalAnalysis(
            n_estimators=self.trees, max_depth=self.depth, min_samples_leaf=self.leaf, learning_rate=self.rate,
            subsample=self.subsample, random_state=self.seed,
        ).fit(x, coarsened(y, self.times))  # fmt: skip


class AFT(Head):
    """Accelerated failure time, a parametric model of lifelines; its curves go past the last time of training.

    Parameters
    ----------
    fitter : lifelines AFT fitter, optional
        `WeibullAFTFitter`, `LogNormalAFTFitter`, `LogLogisticAFTFitter`, ...; Weibull with a penalty of 0.01 if not
        given. It is copied, never fitted itself. Columns are standardised before.
    """

    _extrapolates = True

    def __init__(self, fitter: Any = None):
        self.fitter = fitter

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        self.scaler_ = StandardScaler().fit(x)
        self.model_ = copy.deepcopy(self.fitter) if self.fitter is not None else WeibullAFTFitter(penalizer=0.01)
        events, columns = int(y["event"].sum()), x.shape[1]
        if np.all(np.asarray(self.model_.penalizer) == 0) and events < columns + 2:
            raise InputError(
                f"AFT.fit: {events} events for {columns + 2} parameters; without a penalty nothing is determined. Give "
                "a fitter with a penalizer above 0, or fewer columns."
            )
        table = self._table(x)
        table["time"], table["event"] = y["time"], y["event"]
        try:
            with warnings.catch_warnings():
                # A column that nearly tells the time is the user's to judge; a fit that fails says so.
                warnings.filterwarnings("ignore", category=ConvergenceWarning)
                self.model_.fit(table, "time", "event")
        except (ConvergenceError, ValueError) as error:
            told = str(error).strip().splitlines()[0]
            raise ModelError(f"AFT.fit: {told} Give a fitter with a larger penalizer, or fewer columns.") from None

    def _table(self, x: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(self.scaler_.transform(x), columns=[f"x{j}" for j in range(x.shape[1])])

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        return self.model_.predict_survival_function(self._table(x), times=times).to_numpy().T


class DiscreteHazard(Head):
    """Any classifier of scikit-learn as a model of the hazard in intervals of time; hazards need not be proportional.

    Each patient gives one row for each interval at risk, with the interval's number as a further column; the
    classifier learns whether the event falls there (Singer and Willett 1993, doi:10.3102/10769986018002155). Within an
    interval the hazard is constant. Who is censored past the middle of an interval counts as at risk in it, who is
    censored before does not.

    Parameters
    ----------
    classifier : estimator with `predict_proba`, optional
        Gradient boosting by histograms if not given.
    intervals : int
        Number of intervals, between quantiles of the times of events.
    """

    def __init__(self, classifier: Any = None, intervals: int = 20):
        self.classifier, self.intervals = classifier, intervals

    def _fit(self, x: np.ndarray, y: np.ndarray) -> None:
        self.edges_ = interval_edges(y, self.intervals)
        rows, columns, event = person_periods(y, self.edges_)
        if len(np.unique(event)) < 2:
            raise InputError(
                "DiscreteHazard.fit: every patient has the event in the first interval; take more intervals."
            )
        model = clone(self.classifier) if self.classifier is not None else HistGradientBoostingClassifier(
            learning_rate=0.05, max_iter=100, max_leaf_nodes=8, min_samples_leaf=100, l2_regularization=1.0
        )  # fmt: skip
        self.model_ = model.fit(np.column_stack((x[rows], columns)), event)

    def _curves(self, x: np.ndarray, times: np.ndarray) -> np.ndarray:
        count = len(self.edges_) - 1
        table = np.column_stack((np.repeat(x, count, axis=0), np.tile(np.arange(count), len(x))))
        hazard = self.model_.predict_proba(table)[:, 1].reshape(len(x), count)
        return curve_from_hazards(hazard, self.edges_, times)


def interval_edges(y: np.ndarray, count: int) -> np.ndarray:
    """Edges (K + 1,) of at most `count` intervals with equally many events, from 0 to the last time of all."""
    inner = np.quantile(y["time"][y["event"]], np.linspace(0, 1, count + 1)[1:-1])
    return np.unique(np.concatenate(([0.0], inner, [y["time"].max()])))


def person_periods(y: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Patient, interval and whether the event fell there, for each interval at risk: three arrays (rows,)."""
    place = np.searchsorted(edges, y["time"], side="left") - 1  # (edge, next edge]
    middle = (edges[place] + edges[place + 1]) / 2
    length = np.where(y["event"] | (y["time"] > middle), place + 1, place)
    rows = np.repeat(np.arange(len(y)), length)
    columns = np.arange(len(rows)) - np.repeat(np.cumsum(length) - length, length)
    return rows, columns, (y["event"][rows] & (columns == place[rows])).astype(int)


def curve_from_hazards(hazard: np.ndarray, edges: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Curves (n, T) at times from the probabilities (n, K) of the event in each interval, given that it is reached."""
    total = np.concatenate((np.zeros((len(hazard), 1)), np.cumsum(-np.log1p(-np.clip(hazard, 0, 1 - 1e-9)), 1)), 1)
    place = np.clip(np.searchsorted(edges, times, side="right") - 1, 0, len(edges) - 2)
    share = (times - edges[place]) / (edges[place + 1] - edges[place])
    return np.exp(-(total[:, place] * (1 - share) + total[:, place + 1] * share))
