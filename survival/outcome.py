"""Outcomes: times to an event, checked once and laid out as scikit-survival expects them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from biomodel.errors import InputError

__all__ = ["checked_follow_up", "follow_up"]

DTYPE = np.dtype([("event", bool), ("time", float)])


def follow_up(time: ArrayLike, event: ArrayLike) -> np.ndarray:
    """Times to an event or to the end of follow-up, as a structured array.

    Parameters
    ----------
    time : array-like, shape (n,)
        Any unit, but one; above 0.
    event : array-like, shape (n,)
        1 or True where the event was seen at that time, 0 or False where follow-up ended without it.

    Returns
    -------
    ndarray, shape (n,)
        Fields ``event`` (bool) and ``time`` (float): what scikit-survival's estimators and metrics take.

    Raises
    ------
    InputError
        If shapes differ, a value is missing, a time is not above 0, or an event is neither 0 nor 1.

    Examples
    --------
    >>> follow_up([2.0, 5.5], [1, 0])["event"].tolist()
    [True, False]
    """
    try:
        t = np.asarray(time, float)
    except (TypeError, ValueError):
        raise InputError("follow_up: time holds something that is no number; expected one number each.") from None
    e = np.asarray(event)
    if t.ndim != 1 or t.shape != e.shape or not len(t):
        raise InputError(
            f"follow_up: time has shape {t.shape}, event {e.shape}; expected one number each for every patient."
        )
    try:
        e = e.astype(float)
    except (TypeError, ValueError):
        raise InputError(f"follow_up: event holds '{e.ravel()[0]}'; expected 1 (seen) or 0 (censored).") from None
    bad = ~np.isfinite(t) | (t <= 0)
    if bad.any():
        first = int(np.flatnonzero(bad)[0])
        raise InputError(
            f"follow_up: {int(bad.sum())} of {len(t)} times are missing, zero or negative (the first at position "
            f"{first}: {t[first]:g}). Leave patients without follow-up out; where an event on day 0 is real, decide on "
            "a time above 0 and say so."
        )
    odd = ~np.isin(e, (0.0, 1.0))
    if odd.any():
        first = int(np.flatnonzero(odd)[0])
        raise InputError(
            f"follow_up: event at position {first} is {e[first]:g}; expected 1 (seen) or 0 (censored). Competing "
            "events need a model that knows them."
        )
    y = np.empty(len(t), DTYPE)
    y["event"], y["time"] = e == 1, t
    return y


def checked_follow_up(y: Any, where: str, events: int = 0) -> np.ndarray:
    """The same outcome, checked anew: whoever made the array, nothing impossible reaches a model or a metric.

    Parameters
    ----------
    y : ndarray, shape (n,)
        What :func:`follow_up` or scikit-survival's ``Surv`` gives: one boolean field, then one of numbers.
    where : str
        Who asks, for the message.
    events : int
        Fewest events that are needed.

    Returns
    -------
    ndarray, shape (n,)
        Fields ``event`` and ``time``.

    Raises
    ------
    InputError
        As :func:`follow_up`; also if `y` is laid out otherwise, or holds fewer events than needed.
    """
    fields = getattr(getattr(y, "dtype", None), "fields", None) or {}
    names = list(fields)
    if len(names) != 2 or fields[names[0]][0] != np.dtype(bool):
        found = getattr(y, "dtype", type(y).__name__)
        raise InputError(f"{where}: y is {found}; make it with survival.follow_up(time, event).")
    checked = follow_up(y[names[1]], y[names[0]])
    seen = int(checked["event"].sum())
    if seen < events:
        told = f"all {len(y)} patients are censored" if not seen else f"only {seen} of {len(y)} patients had the event"
        raise InputError(
            f"{where}: {told}; at least {events} event{'s are' if events > 1 else ' is'} needed. Give more patients, "
            "or a longer follow-up; in cross-validation take fewer folds, stratified by the event."
        )
    return checked
