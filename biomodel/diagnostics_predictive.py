"""Posterior predictive checks: could the fitted model, with the stated noise, have made the data it was fitted to?

Data are replicated from draws of the posterior, and a few statistics of the real data are placed among those of the
replicates (Gelman, Meng and Stern 1996, Statistica Sinica 6:733). As the model has seen the data, its p-values tend to
1/2 more than uniform ones would (Bayarri and Berger 2000, doi:10.1080/01621459.2000.10474309): a small one is a
warning, a moderate one no proof.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from biomodel.calibration.fit import Fit
from biomodel.calibration.images import ImageProblem
from biomodel.calibration.volumes import VolumeModel, VolumeNoise, measured
from biomodel.errors import InputError
from biomodel.forecast import forecast
from biomodel.solvers.torch import TorchSolver
from biomodel.tables import html_table

__all__ = ["PredictiveCheck", "posterior_predictive_check"]

MISFIT, WORST = "chi-squared of the residuals", "largest residual"


@dataclass(frozen=True, eq=False)
class PredictiveCheck:
    """Statistics of the data among those of replicates.

    Attributes
    ----------
    names : tuple of str
    units : tuple of str
    observed, replicated : ndarray, shape (statistics, draws)
        Misfits depend on the parameters and so differ from draw to draw; what is measured does not.
    two_sided : tuple of bool
        Whether small values are as surprising as large ones.
    patient : str
        Fingerprint of the patient whose data were compared; "" if not told.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    observed: np.ndarray
    replicated: np.ndarray
    two_sided: tuple[bool, ...]
    patient: str = ""

    @property
    def p(self) -> np.ndarray:
        """Rank of the data among the replicates from above, ties half; doubled to two sides where small is odd too.

        (1 + those above) / (1 + replicates): never 0, and at most as often below a level as the level says.
        """
        ties = 0.5 * (self.replicated == self.observed).sum(1)
        above = 1 + (self.replicated > self.observed).sum(1) + ties
        below = 1 + (self.replicated < self.observed).sum(1) + ties
        count = self.replicated.shape[1] + 1
        return np.where(self.two_sided, np.minimum(1.0, 2 * np.minimum(above, below) / count), above / count)

    def surprising(self, level: float = 0.01) -> tuple[str, ...]:
        """Statistics whose p-value is below `level`."""
        return tuple(n for n, p in zip(self.names, self.p, strict=True) if p < level)

    def table(self) -> list[dict[str, Any]]:
        """One row per statistic: the data's (mean over draws), the central 90 % of the replicates, and the p-value."""
        low, high = np.quantile(self.replicated, [0.05, 0.95], axis=1)
        return [
            {"statistic": n, "units": u, "observed": float(o), "low": float(a), "high": float(b), "p": float(p)}
            for n, u, o, a, b, p in zip(self.names, self.units, self.observed.mean(1), low, high, self.p, strict=True)
        ]

    def _repr_html_(self) -> str:
        rows = [(r["statistic"], f"{r['observed']:.3g}", f"{r['low']:.3g} to {r['high']:.3g}", r["units"],
                 f"{r['p']:.2g}") for r in self.table()]  # fmt: skip
        head = ("statistic", "data", "90 % of replicates", "unit", "p")
        return html_table(head, rows, f"Posterior predictive check, {self.observed.shape[1]} replicates")


def posterior_predictive_check(fit: Fit, draws: int = 200, seed: int = 0) -> PredictiveCheck:
    """Check a fit on the data it was calibrated on.

    Parameters
    ----------
    fit : Fit
        With a posterior (not `MAP`).
    draws : int
        Replicates. For images each takes two or three runs of the model.
    seed : int

    Returns
    -------
    PredictiveCheck
        For volumes: chi-squared of log(V + floor) over its scale, the largest such residual, and the measured volume
        of each visit. For images: the same of voxels with a measured cell fraction after the first visit, in units of
        their noise and that of the first map, and the visible volume of each later visit. Of a fit with a map of the
        growth rate, whose residuals are its own, the volumes alone.

    Raises
    ------
    InputError
        If the fit has no posterior, or draws is less than 20.

    Notes
    -----
    Images: with u0 the measured initial state and e, n fresh noise of the first map and the later ones, a replicate is
    f(z, u0 + e) + n, and residuals of data and replicate alike are taken from f(z, u0). The noise is the stated one,
    whatever the fit's `inflation`. How a reader draws a region is not replicated: the volume of a replicate is that of
    its visible voxels.
    """
    if not fit.sd.any():
        raise InputError("posterior_predictive_check: a MAP fit has no posterior; calibrate with Laplace() or NUTS().")
    if draws < 20:
        raise InputError(f"posterior_predictive_check: draws is {draws}; a p-value needs at least 20.")
    found = _volumes(fit, draws, seed) if fit.patient.domain.well_mixed else _images(fit, draws, seed)
    return replace(found, patient=fit.patient.fingerprint())


def _gathered(rows: list[tuple[str, str, np.ndarray, np.ndarray, bool]]) -> PredictiveCheck:
    names, units, observed, replicated, sides = zip(*rows, strict=True)
    return PredictiveCheck(names, units, np.stack(observed), np.stack(replicated), sides)


def _coordinates(fit: Fit, draws: int, seed: int) -> np.ndarray:
    """Draws of the transformed coordinates, (draws, p)."""
    values = fit.draw(draws, seed)
    return np.stack([np.asarray(p.prior.to_z(values[n]), float) for n, p in fit.parameters.items()], 1)


def _volumes(fit: Fit, draws: int, seed: int) -> PredictiveCheck:
    patient = fit.patient
    assert patient.volumes is not None and isinstance(fit.solver, TorchSolver)
    days, volumes = measured(patient)
    floor = patient.volumes.floor
    noise = VolumeNoise.of(patient.volumes) if fit.noise is None else fit.noise
    course = VolumeModel(fit.model, fit.parameters, [patient], days, np.array([floor]), fit.solver)
    fitted, scale = course.draws(_coordinates(fit, draws, seed)[None])[0], noise.at(days - days[0])
    rng = np.random.default_rng([seed, 11])
    errors = rng.standard_normal(fitted.shape) if np.isinf(noise.df) else rng.standard_t(noise.df, fitted.shape)
    residual = (np.log(volumes + floor) - fitted) / scale
    # A volume of less than nothing is measured as 0, in the replicates as in the data.
    replicated = np.maximum(np.exp(fitted + errors * scale) - floor, 0.0)
    again = (np.log(replicated + floor) - fitted) / scale
    rows = [(MISFIT, "1", (residual**2).sum(1), (again**2).sum(1), False),
            (WORST, "1", np.abs(residual).max(1), np.abs(again).max(1), False)]  # fmt: skip
    numbers = [v.number for v in patient.visits if patient.volume_of(v) is not None]
    for k, number in enumerate(numbers):
        rows.append((f"volume, visit {number}", "cm^3", np.full(draws, volumes[k]), replicated[:, k], True))
    return _gathered(rows)


def _images(fit: Fit, draws: int, seed: int) -> PredictiveCheck:
    rows = []
    if fit.rate_map is None:
        problem = ImageProblem(fit.model, fit.patient, fit.solver)
        counted = problem.sign == 0
        if counted.any():
            rows = _residuals(fit, problem, counted, draws, seed)
    later = [v for v in fit.patient.visits[1:] if fit.patient.volume_of(v) is not None]
    found = forecast(fit, times=[v.day for v in later], draws=draws, seed=seed)
    for visit in later:
        k = int(np.argmin(np.abs(found.times - visit.day)))
        seen = np.full(found.draws, fit.patient.volume_of(visit))
        drawn = found["volume"].values[:, k]
        if rows and len(drawn) < draws:
            # Draws without a finite state are left out of a forecast; the others stand for them.
            drawn, seen = np.resize(drawn, draws), np.resize(seen, draws)
        rows.append((f"volume, visit {visit.number}", "cm^3", seen, drawn, True))
    return _gathered(rows)


def _residuals(fit: Fit, problem: ImageProblem, counted: np.ndarray, draws: int, seed: int) -> list:
    rng = np.random.default_rng([seed, 11])
    problem.replan(fit.z)
    sd, total = np.sqrt(problem.variance[counted]), np.sqrt((problem.variance + problem.spread)[counted])
    first = np.sqrt(problem.initial_variance)
    misfits = []
    for z in _coordinates(fit, draws, seed):
        problem.update = np.zeros(problem.domain.shape)
        residual = problem.residual(z)[counted]
        problem.update = first * rng.standard_normal(first.shape)
        carried = residual - problem.residual(z)[counted]
        again = carried + sd * rng.standard_normal(len(sd))
        misfits.append([(x**2).sum() if square else np.abs(x).max()
                        for square in (True, False) for x in (residual / total, again / total)])  # fmt: skip
    chi, chi_again, worst, worst_again = np.array(misfits).T
    return [(MISFIT, "1", chi, chi_again, False), (WORST, "1", worst, worst_again, False)]
