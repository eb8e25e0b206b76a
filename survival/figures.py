"""Figures of predictions: calibration, decision curves, survival curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from biomodel.errors import InputError
from biomodel.figures import styled
from survival.curves import Curves
from survival.metrics.binary import AtThreshold, calibration_line, checked_probability, net_benefit

__all__ = ["calibration", "decision_curves", "survival_curves"]


@styled
def calibration(label: ArrayLike, probability: ArrayLike, bins: int = 10) -> Figure:
    """Observed shares against predicted ones, in bins of equally many patients, with their intervals.

    Parameters
    ----------
    label, probability : array-like, shape (n,)
        Of patients whom the model did not see.
    bins : int

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If there are fewer patients than bins, or labels and probabilities cannot be used.
    """
    y, p = checked_probability(label, probability, "calibration")
    if len(y) < bins:
        raise InputError(f"calibration: {len(y)} patients for {bins} bins; take fewer bins.")
    figure = Figure(figsize=(4.5, 4.5), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="perfect")
    parts = [part for part in np.array_split(np.argsort(p, kind="stable"), bins) if len(part)]
    for k, part in enumerate(parts):
        hit = float(y[part].sum())
        low, high = AtThreshold(0.5, hit, 0.0, len(part) - hit, 0.0).interval("sensitivity")
        at = float(p[part].mean())
        ax.plot([at, at], [low, high], color="C0", linewidth=1)
        ax.plot(at, hit / len(part), "o", color="C0", label="observed, 95 % interval" if k == 0 else None)
    slope, _, large = calibration_line(y, p)
    ax.set(
        xlabel="predicted probability", ylabel="observed share", xlim=(0, 1), ylim=(0, 1),
        title=f"slope {slope:.2f}, in the large {large:+.2f}",
    )  # fmt: skip
    ax.legend(loc="upper left", frameon=False)
    return figure


@styled
def decision_curves(label: ArrayLike, models: Mapping[str, ArrayLike], highest: float = 0.8) -> Figure:
    """Net benefit of several models against the threshold, beside acting on everybody and on nobody.

    Parameters
    ----------
    label : array-like, shape (n,)
    models : mapping of name to probabilities (n,)
    highest : float
        Last threshold shown, below 1.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If labels or probabilities cannot be used.
    """
    thresholds = np.linspace(0.02, highest, 100)
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    ax = figure.subplots()
    y = np.asarray(label, float)
    for name, p in models.items():
        ax.plot(thresholds, net_benefit(y, p, thresholds), label=name)
    ax.plot(thresholds, net_benefit(y, np.ones(len(y)), thresholds), "k--", linewidth=1, label="everybody")
    ax.axhline(0.0, color="k", linewidth=0.6, label="nobody")
    ax.set(xlabel="threshold", ylabel="net benefit per patient", ylim=(-0.05, float(y.mean()) * 1.1))
    ax.legend(frameon=False)
    return figure


@styled
def survival_curves(curves: Curves, names: Sequence[str], unit: str) -> Figure:
    """Survival curves of a few patients.

    Parameters
    ----------
    curves : Curves
    names : sequence of str
        One for each curve.
    unit : str
        Of time, for the axis.

    Returns
    -------
    Figure

    Raises
    ------
    InputError
        If the names are not as many as the curves.
    """
    if len(names) != len(curves.survival):
        raise InputError(f"survival_curves: {len(names)} names for {len(curves.survival)} curves.")
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    ax = figure.subplots()
    for name, values in zip(names, curves.survival, strict=True):
        ax.step(np.append(0, curves.times), np.append(1, values), where="post", label=name)
    ax.set(xlabel=f"time ({unit})", ylabel="probability of no event", ylim=(0, 1.02))
    ax.legend(frameon=False)
    return figure
