"""Tables of covariates: checked when a model is fitted, and checked against that when it predicts."""

from __future__ import annotations

from typing import Any

import numpy as np

from biomodel.errors import InputError

__all__ = ["fitted_table", "table_like"]


def _numbers(X: Any, where: str, missing: bool) -> tuple[np.ndarray, list[str] | None]:
    """Values (n, p) and names of columns, if there are any."""
    names = list(X.columns) if hasattr(X, "columns") else None
    if names is not None and not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: names of columns must be text; X.columns = X.columns.astype(str) makes them so.")
    if names is not None and len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise InputError(f"{where}: X has columns of the same name: {', '.join(twice)}. Rename or drop them.")
    try:
        x = np.asarray(X, float)
    except (TypeError, ValueError):
        words = [str(n) for n in X.columns if not np.issubdtype(X[n].dtype, np.number)] if names else []
        told = f"columns {', '.join(words)} hold" if words else "X holds"
        raise InputError(f"{where}: {told} something other than numbers; encode categories before.") from None
    if x.ndim != 2 or not x.size:
        raise InputError(f"{where}: X has shape {x.shape}; expected (patients, columns), at least one of each.")
    bad = np.isinf(x) if missing else ~np.isfinite(x)
    if bad.any():
        which = np.flatnonzero(bad.any(0))
        shown = ", ".join(names[j] if names else str(j) for j in which[:5]) + (" ..." if len(which) > 5 else "")
        raise InputError(
            f"{where}: X holds {int(bad.sum())} {'infinite' if missing else 'missing or infinite'} values, in column "
            f"{shown}. Put an imputer before the model (a pipeline), or leave these patients out."
        )
    return x, names


def fitted_table(model: Any, X: Any, n: int, missing: bool = False) -> np.ndarray:
    """Values of a table to fit; the model remembers its columns.

    Parameters
    ----------
    model : estimator
        Gets ``n_features_in_`` and, if the columns have names, ``feature_names_in_``.
    X : DataFrame or array-like, shape (n, p)
    n : int
        Number of outcomes.
    missing : bool
        Whether missing values are allowed.

    Raises
    ------
    InputError
        If something is not a number, is missing or infinite, or the number of rows is not `n`.
    """
    where = f"{type(model).__name__}.fit"
    x, names = _numbers(X, where, missing)
    if len(x) != n:
        raise InputError(f"{where}: X has {len(x)} rows, y {n}; expected one of each for every patient.")
    model.n_features_in_ = x.shape[1]
    if names is not None:
        model.feature_names_in_ = np.array(names, object)
    elif hasattr(model, "feature_names_in_"):
        del model.feature_names_in_
    return x


def table_like(model: Any, X: Any, missing: bool = False) -> np.ndarray:
    """Values of a table to predict from, its columns in the order of the fit.

    Raises
    ------
    InputError
        If the model is not fitted, a column of the fit is absent, a column is unknown, or a value is missing.
    """
    where = f"{type(model).__name__}.predict"
    if not hasattr(model, "n_features_in_"):
        raise InputError(f"{where}: the model is not fitted. Call fit(X, y) first.")
    x, names = _numbers(X, where, missing)
    known = getattr(model, "feature_names_in_", None)
    if names is not None and known is not None:
        absent = [name for name in known if name not in names]
        unknown = [name for name in names if name not in set(known)]
        if absent or unknown:
            told = [f"lacks {', '.join(absent)}"] if absent else []
            told += [f"has {', '.join(unknown)}, which the model was not fitted on"] if unknown else []
            raise InputError(f"{where}: X {'; X '.join(told)}. Give the {len(known)} columns of the fit.")
        return x[:, [names.index(name) for name in known]]
    if x.shape[1] != model.n_features_in_:
        raise InputError(f"{where}: X has {x.shape[1]} columns, the model was fitted on {model.n_features_in_}.")
    return x
