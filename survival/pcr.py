"""Probability of a pathological complete response (or of any yes or no), calibrated and fused from several sources.

All are classifiers of scikit-learn: `fit(X, y)`, `predict_proba(X)`; pipelines, search and cross-validation work. What
is learned for fusion and calibration is learned on patients that the inner models did not see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import minimize
from scipy.special import expit, logit
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from biomodel.errors import InputError
from survival.calibration import Calibration, ConformalSets
from survival.inputs import fitted_table, table_like
from survival.splits import class_of, rows_of

__all__ = ["Calibrated", "LateFusion", "Mixture", "elastic_net", "ridge"]

EDGE = 1e-4


def ridge(C: float = 0.05) -> Pipeline:
    """Logistic regression with a ridge penalty on standardised columns; a larger `C` shrinks less.

    Parameters
    ----------
    C : float

    Returns
    -------
    Pipeline
        Steps `standardscaler` and `logisticregression`.
    """
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=5000))


def elastic_net(C: float = 0.1, mix: float = 0.5) -> Pipeline:
    """Logistic regression with an elastic-net penalty on standardised columns, which leaves columns out.

    Parameters
    ----------
    C, mix : float
        Inverse strength; share of the lasso.

    Returns
    -------
    Pipeline
    """
    model = LogisticRegression(C=C, l1_ratio=mix, solver="saga", max_iter=5000, tol=1e-3, random_state=0)
    return make_pipeline(StandardScaler(), model)


class _Response(ClassifierMixin, BaseEstimator):
    """Input checked, and probabilities in scikit-learn's form.

    Attributes
    ----------
    out_of_fold_ : ndarray, shape (n,)
        Probability of each training patient by models that did not see him or her.
    """

    #: Whether missing values are allowed.
    _missing = False

    def fit(self, X: Any, y: Any) -> _Response:
        """Fit to a table (n, p) and outcomes (n,) of 0 and 1.

        Raises
        ------
        InputError
            If there is one class alone, or fewer patients of one class than folds, or the table cannot be used.
        """
        where = f"{type(self).__name__}.fit"
        label = class_of(y, where)
        fitted_table(self, X, len(label), self._missing)
        folds: int = self.get_params()["folds"]
        fewest = min(label.sum(), (1 - label).sum())
        if fewest < folds:
            raise InputError(f"{where}: {int(fewest)} patients of one class for {folds} folds; take fewer folds.")
        self.classes_ = np.array([0, 1])
        self._fit(X, label)
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (n, 2) of no and of yes."""
        x = table_like(self, X, self._missing)
        if hasattr(self, "feature_names_in_"):
            p = self._probability(pd.DataFrame(x, columns=self.feature_names_in_))
        else:
            p = self._probability(x)
        return np.column_stack((1 - p, p))

    def predict(self, X: Any) -> np.ndarray:
        """Whether yes is the more probable, (n,)."""
        return (self.predict_proba(X)[:, 1] >= 0.5).astype(int)

    def sets(self, X: Any, coverage: float = 0.9) -> np.ndarray:
        """Conformal sets (n, 2): whether each class is in it; see :class:`~survival.calibration.ConformalSets`.

        The scores are those of the training patients out of fold (as in cross-conformal prediction), by models fitted
        to fewer patients than the one that predicts: the coverage holds nearly, not exactly.
        """
        return ConformalSets(coverage).learn(self.label_, self.out_of_fold_).sets(self.predict_proba(X)[:, 1])

    def _fit(self, X: Any, label: np.ndarray) -> None:
        raise NotImplementedError

    def _probability(self, X: Any) -> np.ndarray:
        raise NotImplementedError


def _out_of_fold(model: Any, X: Any, label: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Probability of yes (n,) by copies that did not see the patient."""
    found = np.empty(len(label))
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(np.zeros(len(label)), label):
        found[test] = clone(model).fit(rows_of(X, train), label[train]).predict_proba(rows_of(X, test))[:, 1]
    return found


def _logits(p: np.ndarray) -> np.ndarray:
    return logit(np.clip(p, EDGE, 1 - EDGE))


class Calibrated(_Response):
    """A classifier whose probabilities are calibrated on those of the training patients out of fold.

    Parameters
    ----------
    model : classifier
        Fitted to all patients in the end.
    calibration : Calibration
        :class:`~survival.calibration.Temperature`, `Isotonic` or `VennAbers`.
    folds, seed : int
    """

    def __init__(self, model: Any, calibration: Calibration, folds: int = 5, seed: int = 0):
        self.model, self.calibration, self.folds, self.seed = model, calibration, folds, seed

    def _fit(self, X: Any, label: np.ndarray) -> None:
        self.label_ = label
        raw = _out_of_fold(self.model, X, label, self.folds, self.seed)
        self.calibration_ = _copy(self.calibration).learn(label, raw)
        self.out_of_fold_ = self.calibration_.apply(raw)
        self.model_ = clone(self.model).fit(X, label)

    def _probability(self, X: Any) -> np.ndarray:
        return self.calibration_.apply(self.model_.predict_proba(X)[:, 1])


def _copy(calibration: Calibration) -> Any:
    """An unlearned copy."""
    fresh = object.__new__(type(calibration))
    fresh.__dict__.update({k: v for k, v in vars(calibration).items() if not k.endswith("_")})
    return fresh


class Mixture(_Response):
    """Several classifiers in one: the mean of their logits, with weights and a scale learned out of fold.

    The weights are not negative and shrink towards equal ones, since a few hundred patients do not tell similar models
    apart; the scale calibrates (a temperature with a shift).

    Parameters
    ----------
    models : sequence of (name, classifier)
    shrink : float
        How strongly weights are drawn towards equal ones, in patients.
    folds, seed : int

    Attributes
    ----------
    weights_ : dict
        By name; their sum is the inverse of the temperature.
    """

    def __init__(self, models: Sequence[tuple[str, Any]], shrink: float = 50.0, folds: int = 5, seed: int = 0):
        self.models, self.shrink, self.folds, self.seed = models, shrink, folds, seed

    def _fit(self, X: Any, label: np.ndarray) -> None:
        if not self.models:
            raise InputError("Mixture.fit: no models; give at least one (name, classifier).")
        self.label_ = label
        z = np.column_stack([_logits(_out_of_fold(m, X, label, self.folds, self.seed)) for _, m in self.models])
        self.combine_ = positive_logistic(z, label, self.shrink)
        self.out_of_fold_ = expit(z @ self.combine_[1:] + self.combine_[0])
        self.weights_ = {name: float(w) for (name, _), w in zip(self.models, self.combine_[1:], strict=True)}
        self.models_ = [clone(model).fit(X, label) for _, model in self.models]

    def _probability(self, X: Any) -> np.ndarray:
        z = np.column_stack([_logits(model.predict_proba(X)[:, 1]) for model in self.models_])
        return expit(z @ self.combine_[1:] + self.combine_[0])


def positive_logistic(z: np.ndarray, label: np.ndarray, shrink: float) -> np.ndarray:
    """Shift and weights (1 + m,) of a logistic regression on logits (n, m), weights not negative, drawn together."""
    n, m = z.shape

    def loss(b: np.ndarray) -> tuple[float, np.ndarray]:
        t = z @ b[1:] + b[0]
        apart = b[1:] - b[1:].mean()
        value = np.sum(np.logaddexp(0, t) - label * t) + shrink / 2 * apart @ apart
        slope = expit(t) - label
        return float(value) / n, np.concatenate(([slope.sum()], z.T @ slope + shrink * apart)) / n

    start = np.concatenate(([0.0], np.full(m, 1 / m)))
    bounds = [(None, None), *[(0, None)] * m]
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-13, "maxiter": 500}).x


class LateFusion(_Response):
    """One model for each source (clinical record, volumes, image features, ...), their logits put together in the end.

    A source all of whose columns are missing for a patient is left out for that patient, in training and in prediction:
    the weights of what is left are learned for that pattern, from all patients who have at least these sources.

    Parameters
    ----------
    sources : mapping of name to list of columns
    model : classifier
        Copied for each source.
    shrink : float
        As in :class:`Mixture`.
    folds, seed : int
    """

    _missing = True

    def __init__(self, sources: Mapping[str, Sequence[Any]], model: Any, shrink: float = 10.0, folds: int = 5,
                 seed: int = 0):  # fmt: skip
        self.sources, self.model, self.shrink, self.folds, self.seed = sources, model, shrink, folds, seed

    def _fit(self, X: Any, label: np.ndarray) -> None:
        if not self.sources:
            raise InputError("LateFusion.fit: no sources; give a name and columns for each.")
        unknown = [str(c) for columns in self.sources.values() for c in columns if c not in getattr(X, "columns", ())]
        if unknown:
            raise InputError(
                f"LateFusion.fit: X has no column {', '.join(unknown)}; expected a table with these names."
            )
        self.label_ = label
        self.models_, logits = {}, []
        for name, columns in self.sources.items():
            here = self._present(X, columns, name)
            if min(label[here].sum(), (1 - label[here]).sum()) < self.folds:
                raise InputError(f"LateFusion.fit: too few patients of one class have the source '{name}'.")
            part = X.loc[here, list(columns)]
            found = np.full(len(label), np.nan)
            found[here] = _logits(_out_of_fold(self.model, part, label[here], self.folds, self.seed))
            logits.append(found)
            self.models_[name] = clone(self.model).fit(part, label[here])
        self.logits_ = np.column_stack(logits)
        self.combine_: dict[tuple[bool, ...], np.ndarray] = {}
        self.out_of_fold_ = self._fuse(self.logits_)

    def _present(self, X: pd.DataFrame, columns: Sequence[Any], name: str) -> np.ndarray:
        """Who has the source, (n,)."""
        missing = X[list(columns)].isna()
        some = missing.any(axis=1) & ~missing.all(axis=1)
        if some.any():
            raise InputError(
                f"LateFusion: {int(some.sum())} patients have a part of the source '{name}' alone; impute the rest "
                "before, or give the model an imputer."
            )
        return ~missing.all(axis=1).to_numpy()

    def _probability(self, X: Any) -> np.ndarray:
        logits = np.full((len(X), len(self.sources)), np.nan)
        for j, (name, columns) in enumerate(self.sources.items()):
            here = self._present(X, columns, name)
            if here.any():
                logits[here, j] = _logits(self.models_[name].predict_proba(X.loc[here, list(columns)])[:, 1])
        return self._fuse(logits)

    def _fuse(self, logits: np.ndarray) -> np.ndarray:
        present = np.isfinite(logits)
        found = np.empty(len(logits))
        for pattern in np.unique(present, axis=0):
            who = (present == pattern).all(1)
            if not pattern.any():
                found[who] = self.label_.mean()
                continue
            key = tuple(bool(v) for v in pattern)
            if key not in self.combine_:
                have = np.isfinite(self.logits_[:, pattern]).all(1)
                if min(self.label_[have].sum(), (1 - self.label_[have]).sum()) < 2:
                    names = [n for n, v in zip(self.sources, pattern, strict=True) if v]
                    raise InputError(f"LateFusion: no training patients have the sources {', '.join(names)} together.")
                self.combine_[key] = positive_logistic(self.logits_[have][:, pattern], self.label_[have], self.shrink)
            b = self.combine_[key]
            found[who] = expit(logits[who][:, pattern] @ b[1:] + b[0])
        return found
