"""How patients are divided for training and testing, so that no patient is on both sides.

The splitters are scikit-learn's kind: `split(X, y, groups)` yields positions, and they go into searches and
`cross_val_score`. `groups` are patients in :class:`PatientFolds`, sites or vendors in :class:`LeaveOut`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, clone
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from biomodel.errors import InputError
from survival.outcome import checked_follow_up

__all__ = [
    "LeaveOut",
    "PatientFolds",
    "check_split",
    "class_of",
    "duplicates",
    "out_of_fold",
    "overlap",
    "rows_of",
    "temporal",
]

Split = tuple[np.ndarray, np.ndarray]


def class_of(y: Any, where: str) -> np.ndarray:
    """What a split is stratified by, (n,) of 0 and 1: the class, or whether the event was seen.

    Raises
    ------
    InputError
        If `y` is neither, or holds one class alone.
    """
    if getattr(getattr(y, "dtype", None), "names", None):
        return checked_follow_up(y, where, events=1)["event"].astype(int)
    try:
        label = np.asarray(y, float)
    except (TypeError, ValueError):
        raise InputError(f"{where}: y holds something that is no number; expected 0 and 1.") from None
    if label.ndim != 1 or not np.isin(label, (0.0, 1.0)).all():
        raise InputError(f"{where}: y must hold 0 and 1, one for each patient, nothing missing.")
    if len(np.unique(label)) < 2:
        raise InputError(f"{where}: all {len(label)} outcomes are {label[0]:g}; both classes are needed.")
    return label.astype(int)


def rows_of(X: Any, index: np.ndarray) -> Any:
    """Rows of a DataFrame or an array."""
    return X.iloc[index] if hasattr(X, "iloc") else np.asarray(X)[index]


class PatientFolds(BaseEstimator):
    """Repeated folds, stratified by class or event; all rows of a patient stay together.

    Parameters
    ----------
    folds, repeats : int
    seed : int
    """

    def __init__(self, folds: int = 5, repeats: int = 1, seed: int = 0):
        self.folds, self.repeats, self.seed = folds, repeats, seed

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Number of splits."""
        return self.folds * self.repeats

    def split(self, X: Any, y: Any, groups: Any = None) -> Iterator[Split]:
        """Positions of training and test rows, repeat after repeat.

        Parameters
        ----------
        X : table (n, p)
        y : array (n,)
            0 and 1, or a follow-up.
        groups : array-like, shape (n,), optional
            Patient of each row; without it each row is a patient.

        Raises
        ------
        InputError
            If a class, or the events, are fewer than the folds.
        """
        label = class_of(y, "PatientFolds")
        patients = np.arange(len(label)) if groups is None else np.asarray(groups)
        if len(patients) != len(label):
            raise InputError(f"PatientFolds: {len(patients)} patients named for {len(label)} rows.")
        fewest = min(len(np.unique(patients[label == k])) for k in (0, 1) if (label == k).any())
        if fewest < self.folds:
            raise InputError(
                f"PatientFolds: {fewest} patients of one kind for {self.folds} folds; take fewer folds, so that each "
                "has events and patients without."
            )
        for repeat in range(self.repeats):
            kind = StratifiedKFold if groups is None else StratifiedGroupKFold
            splitter = kind(self.folds, shuffle=True, random_state=self.seed + repeat)
            for train, test in splitter.split(np.zeros(len(label)), label, None if groups is None else patients):
                check_split(patients[train], patients[test])
                yield train, test


class LeaveOut(BaseEstimator):
    """Each site (or vendor, or study) in turn is the test part; too small ones stay in training.

    Parameters
    ----------
    fewest : int
        Patients that a site must have of each class, or with and without the event, to be tested on.
    """

    def __init__(self, fewest: int = 3):
        self.fewest = fewest

    def get_n_splits(self, X: Any = None, y: Any = None, groups: Any = None) -> int:
        """Number of sites that are large enough."""
        return len(self.tested(y, groups))

    def tested(self, y: Any, groups: Any) -> list[Any]:
        """Names of the sites that are large enough to be tested on.

        Raises
        ------
        InputError
            If a site is missing, there are fewer than two, or none is large enough.
        """
        label, site = class_of(y, "LeaveOut"), _known(groups, "site")
        if len(site) != len(label):
            raise InputError(f"LeaveOut: {len(site)} sites named for {len(label)} rows.")
        names = list(dict.fromkeys(sorted(site.tolist())))
        if len(names) < 2:
            raise InputError(f"LeaveOut: all patients come from '{names[0]}'; at least two sites are needed.")
        large = [n for n in names if min((site == n)[label == k].sum() for k in (0, 1)) >= self.fewest]
        if not large:
            raise InputError(f"LeaveOut: no site has {self.fewest} patients of each kind; set `fewest` lower.")
        return large

    def split(self, X: Any, y: Any, groups: Any) -> Iterator[Split]:
        """Positions of training and test rows, in the order of :meth:`tested`."""
        site = _known(groups, "site")
        for name in self.tested(y, groups):
            train, test = np.flatnonzero(site != name), np.flatnonzero(site == name)
            class_of(np.asarray(y)[train], f"LeaveOut without '{name}'")
            yield train, test


def _known(groups: Any, what: str) -> np.ndarray:
    """Names of sites (n,), none of them missing."""
    if groups is None:
        raise InputError(f"LeaveOut: which {what} each patient comes from is missing; give `groups`.")
    named = np.asarray(groups, object)
    unknown = [i for i, g in enumerate(named) if g is None or g != g or str(g).strip() == ""]
    if unknown:
        raise InputError(
            f"LeaveOut: the {what} of {len(unknown)} patients is unknown (the first at position {unknown[0]}). Leave "
            "them out, or name them 'unknown' if they may form a part of their own."
        )
    return named


def temporal(dates: ArrayLike, cut: Any, patients: ArrayLike | None = None) -> Split:
    """Train on what came before a date, test on what came from it on.

    Parameters
    ----------
    dates : array-like, shape (n,)
        Of whatever kind compares: days, years, `datetime64`.
    cut
        First date of the test part.
    patients : array-like, shape (n,), optional
        Patient of each row; rows before the cut of a patient who is also seen after it are left out.

    Returns
    -------
    (ndarray, ndarray)
        Positions of training and test rows.

    Raises
    ------
    InputError
        If a date is missing, or one part would be empty.
    """
    when = np.asarray(dates)
    missing = np.isnat(when) if when.dtype.kind in "mM" else np.array([w is None or w != w for w in when], bool)
    if missing.any():
        raise InputError(f"temporal: {int(missing.sum())} dates are missing; leave these patients out.")
    train, test = np.flatnonzero(when < cut), np.flatnonzero(when >= cut)
    if patients is not None:
        named = np.asarray(patients)
        train = train[~np.isin(named[train], named[test])]
    if not len(train) or not len(test):
        raise InputError(
            f"temporal: the cut {cut} leaves {len(train)} patients for training and {len(test)} for testing; the dates "
            f"run from {when.min()} to {when.max()}."
        )
    return train, test


def overlap(train: ArrayLike, test: ArrayLike) -> list[Any]:
    """Patients who are in both parts; the same name in other case or with other spaces is the same patient."""

    def plain(name: Any) -> str:
        # A table read with missing values turns the patient 1001 into 1001.0.
        whole = isinstance(name, (float, np.floating)) and float(name).is_integer()
        return " ".join(str(int(name) if whole else name).split()).casefold()

    here = {plain(name) for name in np.asarray(train, object)}
    return list(dict.fromkeys(name for name in np.asarray(test, object).tolist() if plain(name) in here))


def duplicates(X: Any) -> list[tuple[int, int]]:
    """Pairs of rows that hold the same numbers: most often one patient under two names.

    Parameters
    ----------
    X : DataFrame or array-like, shape (n, p)
        Covariates with enough of them measured; on few categories alone different patients are alike.

    Returns
    -------
    list of (int, int)
        Position of a first row and of one that repeats it; missing values are alike.
    """
    values = np.asarray(X.to_numpy(object) if hasattr(X, "to_numpy") else X, object)
    first: dict[tuple, int] = {}
    found = []
    for i, row in enumerate(values):
        key = tuple(None if v is None or v != v else v for v in row)
        if key in first:
            found.append((first[key], i))
        else:
            first[key] = i
    return found


def check_split(train: ArrayLike, test: ArrayLike, X_train: Any = None, X_test: Any = None) -> None:
    """Refuse a split in which a patient is on both sides, by name or (with the tables) by the same numbers.

    Parameters
    ----------
    train, test : array-like
        Names of the patients.
    X_train, X_test : DataFrame or array-like, optional
        Their covariates, with the same columns in the same order.

    Returns
    -------
    None

    Raises
    ------
    InputError
        If there is one; it names the first few.
    """
    both = overlap(train, test)
    if both:
        shown = ", ".join(str(name) for name in both[:5]) + (" ..." if len(both) > 5 else "")
        raise InputError(
            f"{len(both)} patients are in training and in test: {shown}. What is tested must not have been seen; split "
            "by patient (PatientFolds with groups)."
        )
    if X_train is None or X_test is None:
        return
    rows = np.concatenate([np.asarray(X_train, object), np.asarray(X_test, object)])
    n = len(np.asarray(X_train, object))
    across = [(a, b - n) for a, b in duplicates(rows) if a < n <= b]
    if across:
        a, b = across[0]
        raise InputError(
            f"{len(across)} rows of the test part repeat rows of training (the first: test {b}, training {a}). If they "
            "are the same patients, drop them from training; cohorts often overlap."
        )


def out_of_fold(
    model: Any, X: Any, y: Any, splitter: Any, predict: Callable[[Any, Any], np.ndarray], groups: Any = None
) -> np.ndarray:
    """Predictions for each row by copies of the model that never saw its patient; with a search as model, nested.

    Parameters
    ----------
    model : estimator
        Pipeline or search; everything that is learned must be inside, or it leaks.
    X : DataFrame or array-like, shape (n, p)
    y : array, shape (n,)
    splitter : PatientFolds
        Or anything with `split`, `folds` and `repeats`.
    predict : callable (fitted model, rows of X) -> ndarray (rows,) or (rows, T)
    groups : array-like, shape (n,), optional
        Patient of each row.

    Returns
    -------
    ndarray, shape (repeats, n) or (repeats, n, T)

    Raises
    ------
    InputError
        If a fold cannot be made: see the splitter.
    """
    found: list[np.ndarray] = []
    for k, (train, test) in enumerate(splitter.split(X, y, groups)):
        made = np.asarray(predict(clone(model).fit(rows_of(X, train), np.asarray(y)[train]), rows_of(X, test)))
        if k % splitter.folds == 0:
            found.append(np.full((len(y), *made.shape[1:]), np.nan))
        found[-1][test] = made
    return np.stack(found)
