"""Conformal adjustment: forecast intervals that hold what is then seen as often as they say, learned from a cohort.

The forecasts of a calibration cohort are compared with what was then measured. Each value seen becomes a *score*: where
it lies in its own forecast, as a normal quantile (0 in the middle, 0.67 at the upper quartile, and beyond that one more
for every spread of the forecast). The distribution of the scores over the cohort then takes the place of the normal
one: an adjusted quantile at level q is where a new forecast has the score that a share q of the cohort had at most.
This is a split conformal predictive system (Vovk, Petej, Nouretdinov, Manokhin and Gammerman 2020, Neurocomputing
397:292, doi:10.1016/j.neucom.2019.10.110).

Patients, not voxels, are exchangeable. Of maps each patient counts once, by the share of voxels at or below a score,
and intervals are chosen by conformal risk control (Angelopoulos, Bates, Fisch, Lei and Schuster 2024, ICLR,
arXiv:2208.02814), of which split conformal is the case of one value for each patient.

What is guaranteed: if the new patient and those of the cohort are exchangeable (same model, same way of measuring, same
visits, same kind of patient), then an interval at level a holds the value seen with probability at least a, on average
over cohorts and new patients; of a map, the share of voxels held is at least a on average. By group (Mondrian; Vovk,
Gammerman and Shafer 2005, Algorithmic Learning in a Random World), the same within every group.

What is not: coverage for one patient given all that is known of him; coverage in a kind of patient that is not a group;
anything on patients unlike the cohort (see :mod:`biomodel.triage`), on other days or under other treatments; that all
voxels of a patient are held together. What was learned on virtual patients holds for virtual patients alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from biomodel.conformal_scores import (
    SCALES,
    CubeRoot,
    GroupScores,
    Identity,
    Logarithm,
    Scale,
    fewest,
    map_coverage,
    quantile_crps,
    score_ends,
    scores,
    values_at,
)
from biomodel.errors import InputError
from biomodel.files import atomic_write
from biomodel.forecast import Forecast
from biomodel.frozen import FrozenDict
from biomodel.observation import observe, shift_response
from biomodel.tables import html_table
from biomodel.visit import CellularitySettings

__all__ = [
    "Adjustment",
    "CubeRoot",
    "GroupScores",
    "Identity",
    "Logarithm",
    "as_measured",
    "draws_of",
    "fewest",
    "known_region",
    "learn_adjustment",
    "map_coverage",
    "quantile_crps",
    "score_ends",
    "scores",
]

SCHEMA = "tumorcast.conformal/1"
#: Name of the one group of an adjustment without groups.
EVERYONE = "all patients"


@dataclass(frozen=True)
class Adjustment:
    """What a cohort taught of its forecasts' errors; made by `learn_adjustment`.

    Attributes
    ----------
    quantity, units : str
        Variable of a forecast's `data`, and its unit.
    scale : Scale
    least_spread : float
        Added to the spread of every forecast (as variances add), on the scale.
    cohort : str
        Name of the calibration cohort.
    virtual : bool
        Whether its patients are virtual.
    groups : mapping of str to GroupScores
    """

    quantity: str
    units: str
    scale: Scale
    least_spread: float
    cohort: str
    virtual: bool
    groups: Mapping[str, GroupScores]

    @property
    def patients(self) -> int:
        """Patients of the calibration cohort."""
        return sum(g.patients for g in self.groups.values())

    def group(self, name: str | None) -> GroupScores:
        """Scores of a group; None where there is one alone.

        Raises
        ------
        InputError
            If the adjustment knows no such group, or one must be named.
        """
        if name is None and len(self.groups) == 1:
            return next(iter(self.groups.values()))
        if name is None or name not in self.groups:
            known = ", ".join(self.groups)
            raise InputError(
                f"conformal adjustment of {self.quantity} from {self.cohort}: group {name!r}; expected one of {known}."
            )
        return self.groups[name]

    def interval(self, draws: np.ndarray, level: float, group: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Adjusted central interval.

        Parameters
        ----------
        draws : ndarray, shape (draws, ...)
            A forecast of the quantity: see `draws_of`.
        level : float
        group : str, optional
            Of the patient.

        Returns
        -------
        low, high : ndarray, shape (...)

        Raises
        ------
        InputError
            If the cohort (or group) is too small for the level, or the group is unknown.
        """
        at = np.array(self.group(group).interval(level))
        low, high = self._at(draws, at)
        return low, high

    def quantile(self, draws: np.ndarray, levels: Sequence[float], group: str | None = None) -> np.ndarray:
        """Adjusted quantiles (levels, ...) of draws (draws, ...), without the correction for few patients."""
        return self._at(draws, self.group(group).quantile(np.asarray(levels, float)))

    def draws(self, draws: np.ndarray, group: str | None = None) -> np.ndarray:
        """Adjusted draws, shape (draws, ...): the draw of rank k becomes the adjusted quantile at (k - 1/2) / S.

        Each keeps its rank, so that draws of several days, voxels or patients still belong together (ensemble copula
        coupling: Schefzik, Thorarinsdottir and Gneiting 2013, doi:10.1214/13-STS443). They are equally spaced in
        probability, not independent: their CRPS is that of a distribution, `quantile_crps`, not the fair one of a
        sample.
        """
        x = np.asarray(draws, float)
        levels = (np.arange(len(x)) + 0.5) / len(x)
        found = self.quantile(x, levels.tolist(), group)
        rank = np.argsort(np.argsort(x, axis=0, kind="stable"), axis=0, kind="stable")
        return np.take_along_axis(found, rank, 0)

    def pit(self, draws: np.ndarray, observed: np.ndarray, group: str | None = None, seed: int = 0) -> np.ndarray:
        """Levels (...) of values seen (...) in adjusted forecasts (draws, ...): uniform if the adjustment is right."""
        x, y = _finite(draws, f"forecast of {self.quantity}"), np.asarray(observed, float)
        found = scores(x.reshape(len(x), -1), y.ravel(), self.scale, self.least_spread, seed)
        return self.group(group).level(found).reshape(y.shape)

    def _at(self, draws: np.ndarray, at: np.ndarray) -> np.ndarray:
        x = _finite(draws, f"forecast of {self.quantity}")
        flat = x.reshape(len(x), -1)
        return values_at(flat, at, self.scale, self.least_spread).reshape(len(at), *x.shape[1:])

    def adjust(self, forecast: Forecast, group: str | None = None) -> Forecast:
        """Adjust a forecast's draws of the quantity on the days after the calibration.

        Parameters
        ----------
        forecast : Forecast
        group : str, optional

        Returns
        -------
        Forecast
            With adjusted draws of the quantity, and a note that says from whom. Maps become those of what would be
            *measured* (see `as_measured`); the other quantities and the curves stay as they are.

        Raises
        ------
        InputError
            If the forecast lacks the quantity, or the group is unknown.
        """
        later = np.flatnonzero(forecast.times > forecast.fit.patient.visits[-1].day + 1e-9)
        data = forecast.data.copy()
        if self.quantity not in data:
            raise InputError(f"conformal adjustment: the forecast has no {self.quantity}; expected one that has.")
        values = np.array(data[self.quantity].values)
        # Elsewhere than in tumour seen so far nothing was learned of voxels.
        place = known_region(forecast) if self.quantity == "cell_fraction" else ...
        for k in later:
            now = draws_of(forecast, self.quantity, float(forecast.times[k]))
            now[:, place] = self.draws(now[:, place], group)
            values[:, k] = now
        data[self.quantity] = data[self.quantity].copy(data=values)
        kind = "virtual patients" if self.virtual else "patients"
        note = (
            f"The draws of {self.quantity.replace('_', ' ')} were adjusted by the errors of forecasts for "
            f"{self.group(group).patients} {kind} ({self.cohort}{f', {group}' if group else ''}): intervals hold what "
            "is measured as often as they say for patients like those, on average over them."
        )
        return replace(forecast, data=data, notes=(*forecast.notes, note))

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        content = {
            "schema": SCHEMA, "quantity": self.quantity, "units": self.units,
            "scale": {"name": type(self.scale).__name__, **vars(self.scale)}, "least_spread": self.least_spread,
            "cohort": self.cohort, "virtual": self.virtual, "patients": self.patients,
            "groups": {n: vars(g) for n, g in self.groups.items()},
        }  # fmt: skip
        with atomic_write(path) as target:
            target.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Adjustment:
        """Read what `save` wrote.

        Raises
        ------
        InputError
            If the file is missing, damaged or of another version.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["schema"] != SCHEMA:
                raise ValueError(f"schema {content['schema']!r}")
            scale = dict(content["scale"])
            groups = {str(n): _group(g) for n, g in content["groups"].items()}
            if not groups:
                raise ValueError("no groups")
            return cls(
                str(content["quantity"]), str(content["units"]), SCALES[scale.pop("name")](**scale),
                float(content["least_spread"]), str(content["cohort"]), bool(content["virtual"]), FrozenDict(groups),
            )  # fmt: skip
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path}: not a conformal adjustment ({type(error).__name__}: {error}); expected JSON of {SCHEMA}, as "
                "Adjustment.save writes it. Learn it again with learn_adjustment."
            ) from None

    def _repr_html_(self) -> str:
        rows = []
        for name, g in self.groups.items():
            ends = [
                f"{a:.2f} to {b:.2f}" if g.patients >= fewest(level) else "too few patients"
                for level in (0.5, 0.9)
                for a, b in [g.interval(level) if g.patients >= fewest(level) else (0, 0)]
            ]
            rows.append((name, str(g.patients), *ends))  # fmt: skip
        head = ("group", "patients", "scores, 50 % (right: -0.67 to 0.67)", "90 % (right: -1.64 to 1.64)")
        kind = ", virtual" if self.virtual else ""
        return html_table(head, rows, f"Conformal adjustment of {self.quantity}, from {self.cohort}{kind}")


def learn_adjustment(
    draws: Sequence[np.ndarray],
    observed: Sequence[np.ndarray | float],
    *,
    quantity: str,
    units: str,
    cohort: str,
    virtual: bool,
    scale: Scale,
    least_spread: float,
    groups: Sequence[str] | None = None,
    seed: int = 0,
) -> Adjustment:
    """Learn the errors of forecasts from a calibration cohort that neither model nor forecast has seen.

    Parameters
    ----------
    draws : sequence of ndarray, shape (draws,) or (draws, voxels)
        One forecast for each patient; see `draws_of`.
    observed : sequence of float or ndarray, shape (voxels,)
        What was then measured. Voxels must be chosen by what was known before.
    quantity, units : str
        Variable of a forecast's `data`, e.g. "volume" in cm^3.
    cohort : str
        Name of the cohort, for the reader.
    virtual : bool
        Whether its patients are virtual.
    scale : Scale
        Of errors that are alike for all patients. On `Identity()` outliers cost least; on `CubeRoot()` and
        `Logarithm()` intervals grow with the volume, and those of a cohort with failed forecasts explode.
    least_spread : float
        Added to the spread of every forecast (as variances add), on the scale: about the error of a measurement, e.g.
        1 cm^3 of volume or a cell fraction of 0.05.
    groups : sequence of str, optional
        Group of each patient (Mondrian), known before the outcome: subtype, centre, triage.
    seed : int
        Of the scores drawn at atoms (a volume of 0), on which adjusted draws rest; intervals do not.

    Returns
    -------
    Adjustment

    Raises
    ------
    InputError
        If lengths differ, a value is not finite, or there are fewer than 3 patients in a group.
    """
    n = len(draws)
    names = [EVERYONE] * n if groups is None else [str(g) for g in groups]
    if not (n and len(observed) == n and len(names) == n):
        raise InputError(
            f"learn_adjustment: {n} forecasts, {len(observed)} values seen, {len(names)} groups; expected as many."
        )
    if not (least_spread > 0 and math.isfinite(least_spread)):
        raise InputError(f"learn_adjustment: least_spread is {least_spread}; expected more than 0.")
    found: dict[str, list[tuple[tuple[np.ndarray, np.ndarray], np.ndarray]]] = {}
    for i, (x, y, name) in enumerate(zip(draws, observed, names, strict=True)):
        x, y = _finite(x, f"learn_adjustment: patient {i + 1}"), np.atleast_1d(np.asarray(y, float))
        flat = x.reshape(len(x), -1)
        if flat.shape[1:] != y.shape or not y.size or not np.isfinite(y).all():
            raise InputError(
                f"learn_adjustment: patient {i + 1} has draws {x.shape} and values seen {y.shape}; expected (draws,) "
                "and a number, or (draws, voxels) and (voxels,), all finite. Leave out what was not measured."
            )
        found.setdefault(name, []).append(
            (score_ends(flat, y, scale, least_spread), scores(flat, y, scale, least_spread, seed + i))
        )
    few = [f"{g} ({len(f)})" for g, f in found.items() if len(f) < fewest(0.5)]
    if few:
        raise InputError(
            f"learn_adjustment: too few patients in {', '.join(few)}; expected at least {fewest(0.5)} for a 50 % "
            f"interval ({fewest(0.9)} for 90 %). Gather more, or merge groups."
        )
    return Adjustment(
        quantity, units, scale, float(least_spread), cohort, bool(virtual),
        FrozenDict({g: GroupScores.of(*zip(*found[g], strict=True)) for g in sorted(found)}),
    )  # fmt: skip


def _group(content: Mapping[str, Any]) -> GroupScores:
    """A group from its file.

    Raises
    ------
    ValueError, KeyError
        If a column is missing, empty, or of another length than its partner.
    """
    pairs = [("values", "levels"), ("lows", "below"), ("highs", "above")]
    if any(not len(content[a]) == len(content[b]) > 0 for a, b in pairs):
        raise ValueError("columns that are empty or of different lengths")
    columns = (tuple(float(v) for v in content[name]) for pair in pairs for name in pair)
    return GroupScores(int(content["patients"]), *columns)


def _finite(draws: np.ndarray, where: str) -> np.ndarray:
    x = np.asarray(draws, float)
    if x.ndim < 1 or len(x) < 20 or not np.isfinite(x).all():
        raise InputError(f"{where}: draws {x.shape}; expected at least 20 along the first axis, all finite.")
    return x


def as_measured(maps: np.ndarray, settings: CellularitySettings, seed: int) -> np.ndarray:
    """Maps (draws, ...) of cell fractions as a visit would measure them: with ADC's noise, and 0 where not visible.

    One error for all voxels of a draw (the repeatability), one for each voxel.
    """
    rng = np.random.default_rng([seed, 31])
    u = np.asarray(maps, float)
    response = shift_response(settings.adc_w - (settings.adc_w - settings.adc_min) * u, settings)
    shared = settings.repeatability_cv * rng.standard_normal((len(u), *[1] * (u.ndim - 1)))
    noisy = u + response * (shared + settings.voxel_cv * rng.standard_normal(u.shape))
    return np.where(u >= settings.visible_fraction, np.maximum(noisy, 0.0), 0.0)


def draws_of(forecast: Forecast, quantity: str, day: float) -> np.ndarray:
    """A forecast's draws (draws, ...) of a quantity on one of its days, as comparable with what is measured then.

    Raises
    ------
    InputError
        If the forecast lacks the quantity or the day.
    """
    index = np.flatnonzero(np.abs(forecast.times - day) < 1e-6)
    if quantity not in forecast.data or not len(index):
        raise InputError(
            f"draws_of: {quantity} on day {day:g}; the forecast has {', '.join(map(str, forecast.data.data_vars))} on "
            f"days {forecast.times.tolist()}."
        )
    # A copy: what is done to the draws must not reach the forecast.
    values = np.array(forecast.data[quantity].isel(time=int(index[0])).values, float)
    settings = forecast.fit.patient.cellularity
    if quantity == "cell_fraction" and settings is not None:
        return as_measured(values, settings, forecast.seed)
    return values


def known_region(forecast: Forecast) -> np.ndarray:
    """Voxels (z, y, x) on the forecast's box that were tumour at any calibrated visit: those that an adjustment counts.

    Raises
    ------
    InputError
        If the forecast has no maps.
    """
    patient = forecast.fit.patient
    if forecast.box is None:
        raise InputError(f"known_region: the forecast of {patient.id} has no maps; expected a patient with images.")
    seen = [s.region for s in (observe(patient, v) for v in patient.visits) if s is not None]
    return (np.any(seen, axis=0) & patient.domain.mask)[forecast.box]
