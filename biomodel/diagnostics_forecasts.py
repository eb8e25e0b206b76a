"""Forecasts of many patients against what was seen: PIT, coverage, CRPS and sharpness.

The aim is to be as sharp as can be while calibrated: Gneiting, Balabdaoui and Raftery 2007, J R Stat Soc B 69:243,
doi:10.1111/j.1467-9868.2007.00587.x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binom

from biomodel.calibration.samples import weighted_crps, weighted_quantile
from biomodel.diagnostics_ranks import POINTS, uniform_p
from biomodel.errors import InputError
from biomodel.scoring import crps
from biomodel.tables import html_table

__all__ = ["Coverage", "ForecastCheck", "check_forecasts", "coverage", "pit"]

LEVELS = (0.5, 0.8, 0.9, 0.95)
#: Levels of a coverage curve.
CURVE = tuple(np.round(np.arange(0.05, 1.0, 0.05), 2).tolist())


def pit(draws: np.ndarray, observed: np.ndarray, weights: np.ndarray | None = None, seed: int = 0) -> np.ndarray:
    """Probability integral transform: the forecast's probability of a value below the one seen.

    Parameters
    ----------
    draws : ndarray, shape (n, draws)
        Of what would be measured, errors included.
    observed : ndarray, shape (n,)
    weights : ndarray, shape (n, draws), optional
        Sum to 1 in each row.
    seed : int
        Where the forecast has an atom at the observed value (a volume of 0, say), the transform is drawn uniformly
        between the probabilities below and up to it (Czado, Gneiting and Held 2009,
        doi:10.1111/j.1541-0420.2009.01191.x); and of S draws the value is one of S + 1 alike.

    Returns
    -------
    ndarray, shape (n,)
        Uniform between 0 and 1 where forecasts are calibrated.
    """
    draws, observed = _checked(draws, observed, weights)
    n, size = draws.shape
    weights = np.full(draws.shape, 1 / size) if weights is None else np.asarray(weights, float)
    # The value seen counts as one more draw, of the weight that the others have in effect.
    one = (weights**2).sum(1)
    below = (weights * (draws < observed[:, None])).sum(1)
    same = (weights * (draws == observed[:, None])).sum(1)
    return (below + np.random.default_rng(seed).random(n) * (same + one)) / (1 + one)


def _checked(draws, observed, weights) -> tuple[np.ndarray, np.ndarray]:
    draws, observed = np.asarray(draws, float), np.asarray(observed, float)
    if draws.ndim != 2 or observed.shape != draws.shape[:1] or not draws.size:
        raise InputError(f"draws {draws.shape}, observed {observed.shape}; expected (n, draws) and (n,).")
    if weights is not None and np.shape(weights) != draws.shape:
        raise InputError(f"weights {np.shape(weights)}; expected those of the draws, {draws.shape}.")
    if not (np.isfinite(draws).all() and np.isfinite(observed).all()):
        raise InputError("a draw or an observed value is not finite; leave out what was not measured.")
    return draws, observed


@dataclass(frozen=True, eq=False)
class Coverage:
    """How often central intervals hold the value seen.

    Attributes
    ----------
    levels, observed : ndarray, shape (k,)
        Nominal probability, and share of forecasts whose interval held the value.
    low, high : ndarray, shape (k,)
        Shares between which the observed one falls with the `band`'s probability if intervals are right: exact
        binomial, level by level.
    n : int
    band : float
    """

    levels: np.ndarray
    observed: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: int
    band: float

    @property
    def inside(self) -> np.ndarray:
        """Whether the observed share lies in its band, (k,)."""
        return (self.observed >= self.low - 1e-12) & (self.observed <= self.high + 1e-12)

    def table(self) -> list[dict[str, object]]:
        return [
            {"level": float(a), "observed": float(b), "low": float(c), "high": float(d), "inside": bool(e)}
            for a, b, c, d, e in zip(self.levels, self.observed, self.low, self.high, self.inside, strict=True)
        ]

    def _repr_html_(self) -> str:
        rows = [(f"{r['level']:.0%}", f"{r['observed']:.1%}", f"{r['low']:.1%} to {r['high']:.1%}",
                 "yes" if r["inside"] else "no") for r in self.table()]  # fmt: skip
        head = ("interval", "covers", f"band at {self.band:.0%}", "inside")
        return html_table(head, rows, f"Coverage of {self.n} forecasts")


def coverage(pits: np.ndarray, levels: Sequence[float] = LEVELS, band: float = 0.95) -> Coverage:
    """Coverage of central intervals, from the forecasts' PIT values (n,): an interval holds what lies in its quantiles.

    Raises
    ------
    InputError
        If there are no values, or levels are not between 0 and 1.
    """
    pits, at = np.asarray(pits, float).ravel(), np.asarray(levels, float)
    if not len(pits) or not ((pits >= 0) & (pits <= 1)).all() or not ((at > 0) & (at < 1)).all() or not 0 < band < 1:
        raise InputError("coverage: expected PIT values from 0 to 1, and levels and band between 0 and 1.")
    n = len(pits)
    held = (np.abs(pits[:, None] - 0.5) <= at / 2).mean(0)
    low, high = binom.ppf((1 - band) / 2, n, at) / n, binom.ppf((1 + band) / 2, n, at) / n
    return Coverage(at, held, low, high, n, band)


@dataclass(frozen=True, eq=False)
class ForecastCheck:
    """Forecasts of n values against what was seen.

    Attributes
    ----------
    pit, crps : ndarray, shape (n,)
    widths : ndarray, shape (n, levels)
        Sharpness: widths of the central intervals at the levels of `coverage`, in the values' unit.
    coverage : Coverage
    uniform_p : float
        p-value of uniform PIT values, by their distribution function (see `uniform_p`).
    """

    pit: np.ndarray
    crps: np.ndarray
    widths: np.ndarray
    coverage: Coverage
    uniform_p: float

    def table(self) -> list[dict[str, object]]:
        """One row per level: coverage with its band, and mean width."""
        return [r | {"width": float(w)} for r, w in zip(self.coverage.table(), self.widths.mean(0), strict=True)]

    def _repr_html_(self) -> str:
        rows = [(f"{r['level']:.0%}", f"{r['observed']:.1%}", f"{r['low']:.1%} to {r['high']:.1%}", f"{r['width']:.3g}")
                for r in self.table()]  # fmt: skip
        title = f"{len(self.pit)} forecasts, CRPS {self.crps.mean():.3g}, p of uniform PIT {self.uniform_p:.2g}"
        return html_table(("interval", "covers", f"band at {self.coverage.band:.0%}", "mean width"), rows, title)


def check_forecasts(
    draws: np.ndarray,
    observed: np.ndarray,
    weights: np.ndarray | None = None,
    levels: Sequence[float] = LEVELS,
    band: float = 0.95,
    seed: int = 0,
) -> ForecastCheck:
    """Judge forecasts of many patients.

    Parameters
    ----------
    draws : ndarray, shape (n, draws)
        Of what would be measured, e.g. ``forecast["measured_volume"]`` of each patient.
    observed : ndarray, shape (n,)
        Independent of each other: one value per patient, or the bands are too narrow.
    weights : ndarray, shape (n, draws), optional
        Sum to 1 in each row.
    levels, band
        As for `coverage`.
    seed : int
        Of the randomised PIT.

    Returns
    -------
    ForecastCheck
    """
    draws, observed = _checked(draws, observed, weights)
    at = np.asarray(levels, float)
    found = pit(draws, observed, weights, seed)
    ends = np.concatenate(((1 - at) / 2, (1 + at) / 2))
    if weights is None:
        score = np.array([crps(x, y) for x, y in zip(draws, observed, strict=True)])
        q = np.quantile(draws, ends, axis=1).T
    else:
        score, q = weighted_crps(draws, weights, observed), weighted_quantile(draws, np.asarray(weights), ends.tolist())
    points = np.arange(1, POINTS + 1) / (POINTS + 1)
    p = uniform_p((found[:, None] < points).sum(0), len(found), points)
    return ForecastCheck(found, score, q[:, len(at) :] - q[:, : len(at)], coverage(found, levels, band), p)
