"""`study_cohort`: what forecasts of a cohort of patients were worth, as evidence for the next patient's.

Every patient of a cohort whose later scans are known is forecast as if they were not: calibrated on the first visits,
forecast to the next one, and compared with what was then measured. What comes out are the forecasts' coverage, an
adjustment of intervals (:mod:`biomodel.conformal`) and a reference of what the patients look like
(:mod:`biomodel.out_of_distribution`).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
from scipy.stats import binom

from biomodel.calibration.calibrate import Laplace, calibrate
from biomodel.calibration.importance import Importance
from biomodel.calibration.mcmc import NUTS, SMC
from biomodel.conformal import Adjustment, learn_adjustment
from biomodel.conformal_scores import Identity, Scale, fewest, quantile_crps
from biomodel.diagnostics_forecasts import CURVE, LEVELS, Coverage
from biomodel.diagnostics_predictive import posterior_predictive_check
from biomodel.errors import CalibrationError, InputError, TumorcastError
from biomodel.files import atomic_write
from biomodel.forecast import Forecast, forecast
from biomodel.models import ReactionDiffusion
from biomodel.out_of_distribution import Reference, features, learn_reference
from biomodel.patient import Patient
from biomodel.scoring import crps
from biomodel.solvers.base import Solver
from biomodel.solvers.torch import TorchSolver
from biomodel.tables import html_table

__all__ = ["CohortStudy", "Evidence", "study_cohort"]

#: Replicates of the posterior predictive check behind the features.
REPLICATES = 20
#: Fewest draws of a forecast that is adjusted, and the probability of a band.
DRAWS, BAND = 20, 0.95
#: Parts of the cohort of which each is judged by an adjustment learned on the others.
FOLDS = 10
#: About the error of a measured volume, cm³: what is added to the spread of every forecast.
LEAST_SPREAD = 1.0


@dataclass(frozen=True)
class Evidence:
    """How forecasts of a cohort's volumes fared against what was measured.

    Attributes
    ----------
    cohort : str
    virtual : bool
    n : int
        Patients.
    before : Coverage
        Of the forecasts as they are; an interval holds its ends.
    after : Coverage or None
        Of intervals adjusted by the errors of the cohort's other patients; None where these are too few.
    curve : Coverage
        As `before`, at many levels.
    crps_before, crps_after : float
        Mean, cm³; `crps_after` is NaN without adjustment.
    """

    cohort: str
    virtual: bool
    n: int
    before: Coverage
    after: Coverage | None
    curve: Coverage
    crps_before: float
    crps_after: float

    def _repr_html_(self) -> str:
        after = {} if self.after is None else {r["level"]: r for r in self.after.table()}
        rows = []
        for row in self.before.table():
            adjusted = after.get(row["level"])
            rows.append((f"{row['level']:.0%}", f"{row['observed']:.0%}",
                         "–" if adjusted is None else f"{adjusted['observed']:.0%}",
                         f"{row['low']:.0%} to {row['high']:.0%}"))  # fmt: skip
        kind = "virtual patients" if self.virtual else "patients"
        return html_table(("interval", "held", "held, adjusted", "band of right intervals"), rows,
                          f"Forecast volumes of {self.n} {kind} ({self.cohort})")  # fmt: skip


@dataclass(frozen=True, eq=False)
class CohortStudy:
    """Forecasts of a cohort beside what was measured.

    Attributes
    ----------
    name : str
    virtual : bool
        Whether any of its patients is virtual.
    model, method : str
        What was calibrated and how.
    quantity : str
        What was forecast, by its name in a forecast: "measured_volume" where errors of volumes are known, or "volume".
    patients : tuple of str
        Identifiers.
    ahead : ndarray, shape (n,)
        Days from the last calibrated visit to the one forecast.
    draws : ndarray, shape (n, draws)
        Forecast volumes, cm³.
    observed : ndarray, shape (n,)
        Measured ones.
    features : tuple of mapping
        Of each patient, for `reference`.
    failed : mapping of str to str
        Patients without a forecast, and why.
    """

    name: str
    virtual: bool
    model: str
    method: str
    quantity: str
    patients: tuple[str, ...]
    ahead: np.ndarray
    draws: np.ndarray
    observed: np.ndarray
    features: tuple[Mapping[str, float], ...]
    failed: Mapping[str, str]

    def adjustment(self, scale: Scale | None = None, least_spread: float = LEAST_SPREAD) -> Adjustment:
        """Adjustment of volumes learned on the whole cohort; arguments as for `learn_adjustment`."""
        return self._learn(np.arange(len(self.patients)), Identity() if scale is None else scale, least_spread)

    def reference(self) -> Reference:
        """The cohort as a reference of what patients look like."""
        return learn_reference(self.features, cohort=self.name, virtual=self.virtual)

    def evidence(self, scale: Scale | None = None, least_spread: float = LEAST_SPREAD, seed: int = 0) -> Evidence:
        """Coverage and CRPS, as forecast and adjusted.

        Each patient's intervals are adjusted by what was learned on the other tenths of the cohort, so that nobody is
        judged by their own error. The bands are those of independent patients; adjusted intervals of one cohort are
        slightly dependent.

        Parameters
        ----------
        scale, least_spread
            As for `learn_adjustment`.
        seed : int
            Of the parts.
        """
        n = len(self.patients)
        before, curve = (self._coverage(levels, [
            [np.quantile(d, [(1 - a) / 2, (1 + a) / 2]) for a in levels] for d in self.draws
        ]) for levels in (LEVELS, CURVE))  # fmt: skip
        score = np.mean([crps(d, o) for d, o in zip(self.draws, self.observed, strict=True)])
        part = np.random.default_rng(seed).permutation(np.arange(n) % FOLDS)
        smallest = n - math.ceil(n / FOLDS)
        levels = [a for a in LEVELS if fewest(a) <= smallest]
        after, adjusted = None, math.nan
        if levels:
            found, scores = np.zeros((n, len(levels), 2)), np.zeros(n)
            for k in range(min(FOLDS, n)):
                learned = self._learn(np.flatnonzero(part != k), Identity() if scale is None else scale, least_spread)
                for i in np.flatnonzero(part == k):
                    found[i] = [learned.interval(self.draws[i], level) for level in levels]
                    scores[i] = quantile_crps(learned.draws(self.draws[i]), self.observed[i])
            after, adjusted = self._coverage(levels, found), float(scores.mean())
        return Evidence(self.name, self.virtual, n, before, after, curve, float(score), adjusted)

    def _coverage(self, levels: Sequence[float], ends: Sequence | np.ndarray) -> Coverage:
        """How often intervals (n, levels, 2) hold what was measured, their ends counted in; exact binomial bands."""
        at, n = np.asarray(levels, float), len(self.observed)
        low, high = np.moveaxis(np.asarray(ends, float), 2, 0)
        held = (low <= self.observed[:, None]) & (self.observed[:, None] <= high)
        return Coverage(at, held.mean(0), binom.ppf((1 - BAND) / 2, n, at) / n, binom.ppf((1 + BAND) / 2, n, at) / n,
                        n, BAND)  # fmt: skip

    def _learn(self, of: np.ndarray, scale: Scale, least_spread: float) -> Adjustment:
        return learn_adjustment(
            [self.draws[i] for i in of], [self.observed[i] for i in of], quantity=self.quantity, units="cm^3",
            cohort=self.name, virtual=self.virtual, scale=scale, least_spread=least_spread,
        )  # fmt: skip

    def _repr_html_(self) -> str:
        without = f", {len(self.failed)} without a forecast" if self.failed else ""
        kind = "virtual patients" if self.virtual else "patients"
        rows = [(p, f"{np.median(d):.3g}", f"{o:.3g}") for p, d, o in
                zip(self.patients, self.draws, self.observed, strict=True)]  # fmt: skip
        return html_table(("patient", "forecast, cm³", "measured, cm³"), rows,
                          f"{self.name}: {len(self.patients)} {kind}{without}")  # fmt: skip


def study_cohort(
    patients: Iterable[Patient],
    model: ReactionDiffusion,
    *,
    calibrate_on: int,
    name: str,
    solver: Solver | None = None,
    method: Laplace | Importance | NUTS | SMC | None = None,
    draws: int = 100,
    seed: int = 0,
    folder: str | PathLike[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> CohortStudy:
    """Forecast every patient's next visit from the first ones, and keep what was then measured.

    Parameters
    ----------
    patients : iterable of Patient
        Whole records, read one at a time: a `Cohort`, or a generator. None may have been used to choose the model or
        its priors.
    model : ReactionDiffusion
        The one that is used for the next patient.
    calibrate_on : int
        Visits that the calibration sees; the one after it is forecast.
    name : str
        Of the cohort, for the reader.
    solver, method
        As for `calibrate`.
    draws, seed
        As for `forecast`; patient i has seed + i.
    folder : path, optional
        Where each patient's result is kept, so that an interrupted study goes on where it stopped.
    progress : callable, optional
        Told of each patient.

    Returns
    -------
    CohortStudy
        A patient who cannot be calibrated or forecast, or has no measured volume at the visit after `calibrate_on`, is
        listed in `failed`.

    Raises
    ------
    InputError
        If no patient is left, two have the same identifier, draws or `calibrate_on` are no sensible numbers, or the
        method has a checkpoint (which is of one patient).
    """
    for what, value, least in (("draws", draws, DRAWS), ("calibrate_on", calibrate_on, 1)):
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(f"study_cohort: {what} is {value!r}; expected a whole number from {least}.")
    if getattr(method, "checkpoint", None) is not None:
        raise InputError(
            "study_cohort: the method's checkpoint is for the chains of one patient; leave it out. Results of finished "
            "patients are kept in folder=..."
        )
    solver = TorchSolver() if solver is None else solver
    method = Laplace() if method is None else method
    rows: dict[str, dict[str, np.ndarray]] = {}
    failed: dict[str, str] = {}
    virtual = False
    for i, patient in enumerate(patients):
        if patient.id in rows or patient.id in failed:
            raise InputError(f"study_cohort: patient {patient.id} comes twice; expected each once.")
        virtual |= patient.virtual
        visit = patient.visits[calibrate_on] if len(patient.visits) > calibrate_on else None
        seen = None if visit is None else patient.volume_of(visit)
        if seen is None:
            failed[patient.id] = f"no measured volume at visit {calibrate_on + 1} to compare the forecast with"
            continue
        where = None if folder is None else _file(Path(folder), patient, model, solver, method, calibrate_on, draws,
                                                  seed + i)  # fmt: skip
        if progress is not None:
            progress(f"{patient.id} ({i + 1})")
        try:
            if where is not None and (kept := _kept(where, draws)) is not None:
                rows[patient.id] = kept
                continue
            rows[patient.id] = _forecast(patient, model, solver, method, calibrate_on, draws, seed + i) | {
                "observed": np.array(seen)
            }
        except TumorcastError as error:
            failed[patient.id] = str(error)
            continue
        if where is not None:
            with atomic_write(where) as target:
                np.savez_compressed(target, allow_pickle=False, **rows[patient.id])
    if not rows:
        why = f" The first: {next(iter(failed.values()))}" if failed else ""
        raise InputError(f"study_cohort: no forecast of any patient in {name}; expected at least one.{why}")
    told = tuple(dict(zip(r["names"].tolist(), r["features"].tolist(), strict=True)) for r in rows.values())
    quantity = str(next(iter(rows.values()))["quantity"])
    return CohortStudy(
        name, virtual, repr(model), type(method).__name__, quantity, tuple(rows),
        np.array([float(r["ahead"]) for r in rows.values()]), np.stack([r["draws"] for r in rows.values()]),
        np.array([float(r["observed"]) for r in rows.values()]), told, failed,
    )  # fmt: skip


def _forecast(patient, model, solver, method, calibrate_on: int, draws: int, seed: int) -> dict[str, np.ndarray]:
    known = patient.until(visit=calibrate_on)
    fit = calibrate(model, known, solver, method)
    day = patient.visits[calibrate_on].day
    found = forecast(fit, times=[day], draws=draws, seed=seed, curve_step=max(day, 1.0))
    told = features(fit, posterior_predictive_check(fit, REPLICATES, seed))
    # Of patients without images the errors of measured volumes are known, and part of what is seen.
    quantity = forecast_quantity(found)
    volumes = found[quantity].values[:, -1]
    if len(volumes) != draws:
        raise CalibrationError(f"only {len(volumes)} of {draws} draws are finite.")
    return {
        "draws": volumes,
        "quantity": np.array(quantity),
        "ahead": np.array(day - known.visits[-1].day),
        "names": np.array(list(told)),
        "features": np.array(list(told.values())),
    }


def _file(folder: Path, patient: Patient, *settings: object) -> Path:
    """A name that changes with the patient's data and with all settings."""
    text = json.dumps([patient.id, patient.fingerprint(), *map(repr, settings)])
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", patient.id)[:40]
    return folder / f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.npz"


def _kept(path: Path, draws: int) -> dict[str, np.ndarray] | None:
    """A patient's result; None where there is none, or what is there is damaged."""
    try:
        with np.load(path) as content:
            row = dict(content)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile):
        return None
    return (
        row
        if {"quantity", "ahead", "names", "features", "observed"} <= set(row) and row["draws"].shape == (draws,)
        else None
    )


def forecast_quantity(found: Forecast) -> str:
    """What of a forecast is compared with a measured volume: what would be measured, where its errors are known."""
    return "measured_volume" if "measured_volume" in found.data else "volume"
