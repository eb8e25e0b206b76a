"""Is a patient like those that a model was checked on? Distance of a fit's features from those of a reference cohort.

A forecast's checked intervals say nothing of patients unlike the cohort of the check. Features of data and fit (size
and change of the tumour, misfit, where the estimates lie in their prior) are compared by Mahalanobis' distance. None of
them knows what came after the calibration.

The p-value of a distance is its rank: the patient joins the cohort, everyone's distance from all the others is taken,
and p is the share of those as far as the patient or farther. It is right whatever the features' distribution, if the
patient comes from where the cohort does (full conformal prediction: Vovk, Gammerman and Shafer 2005, Algorithmic
Learning in a Random World). It cannot fall below 1 / (n + 1).

Covariances of few patients are shrunk to the identity of standardised features by Ledoit and Wolf's rule (2004, J
Multivar Anal 88:365, doi:10.1016/S0047-259X(03)00096-4).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np

from biomodel.calibration.fit import Fit
from biomodel.diagnostics_predictive import MISFIT, PredictiveCheck
from biomodel.errors import InputError
from biomodel.files import atomic_write
from biomodel.frozen import frozen_array
from biomodel.observation import observe
from biomodel.tables import html_table

__all__ = ["Distance", "Reference", "features", "learn_reference"]

SCHEMA = "tumorcast.reference/1"
#: Fewest patients of a reference: with fewer no p-value could fall below 0.05.
FEWEST = 20


def features(fit: Fit, check: PredictiveCheck) -> dict[str, float]:
    """What data and fit look like, by name.

    Parameters
    ----------
    fit : Fit
    check : PredictiveCheck
        Of the same fit (`posterior_predictive_check`).

    Returns
    -------
    dict of str to float
        Logarithms of the first volume, of its daily change, of the inflation of the noise (images) and of the misfit
        over that of replicates; mean cell fractions of the first and last visit (images); the model's parameters in
        prior standard deviations from the prior's mean.

    Raises
    ------
    InputError
        If there are fewer than two measured volumes.
    """
    patient = fit.patient
    seen = [(v, volume) for v in patient.visits if (volume := patient.volume_of(v)) is not None]
    if len(seen) < 2:
        raise InputError(f"features: patient {patient.id} has {len(seen)} measured volumes; expected two or more.")
    # One voxel, or what the patient's volumes count as their floor: a volume of 0 has no logarithm.
    floor = patient.volumes.floor if patient.volumes else patient.domain.voxel_volume / 1e3
    (first, v1), (last, v2) = seen[0], seen[-1]
    change = float(np.log((v2 + floor) / (v1 + floor)) / (last.day - first.day))
    found = {"log first volume": float(np.log(v1 + floor)), "log change of volume per day": change}
    if MISFIT in check.names:
        k = check.names.index(MISFIT)
        found["log misfit"] = float(np.log(check.observed[k].mean() / check.replicated[k].mean()))
    if not patient.domain.well_mixed:
        if fit.rate_map is None:  # a map's calibration inflates nothing
            found["log inflation"] = float(np.log(fit.inflation))
        for name, visit in (("first", first), ("last", last)):
            view = observe(patient, visit)
            if view is not None and view.fraction is not None:
                inside = view.fraction[view.region]
                found[f"mean cell fraction, {name} visit"] = float(inside.mean()) if inside.size else 0.0
    for name, z, mean, sd in zip(fit.names, fit.z, fit.prior.mean, fit.prior.sd, strict=True):
        if name in fit.model.free:
            found[f"{name}, prior sds"] = float((z - mean) / sd)
    return found


@dataclass(frozen=True)
class Distance:
    """How far a patient lies from a reference cohort.

    Attributes
    ----------
    squared : float
        Mahalanobis' distance, squared.
    p : float
        Share of patients of the reference, the patient counted in, that lie as far or farther.
    apart : mapping of str to float
        Each feature in standard deviations from the cohort's mean, the farthest first.
    cohort : str
    """

    squared: float
    p: float
    apart: Mapping[str, float]
    cohort: str


@dataclass(frozen=True, eq=False)
class Reference:
    """Features of a reference cohort; made by `learn_reference`.

    Attributes
    ----------
    names : tuple of str
    rows : ndarray, shape (n, p)
        Features of each patient.
    cohort : str
    virtual : bool
    """

    names: tuple[str, ...]
    rows: np.ndarray
    cohort: str
    virtual: bool

    @property
    def patients(self) -> int:
        return len(self.rows)

    def distance(self, found: Mapping[str, float]) -> Distance:
        """Distance of a patient by `features`, with its rank among those of the cohort.

        Raises
        ------
        InputError
            If a feature is missing or not finite.
        """
        missing = [n for n in self.names if not np.isfinite(found.get(n, np.nan))]
        if missing:
            raise InputError(
                f"distance from {self.cohort}: no finite value of {', '.join(missing)}; expected the reference's "
                "features. Compare with a cohort of the same model and the same kind of data."
            )
        patient = np.array([found[n] for n in self.names])
        mean, sd, _ = shape_of(self.rows)
        apart, squared = (patient - mean) / sd, _squared(patient, self.rows)
        everyone = np.vstack((self.rows, patient))
        others = [_squared(row, np.delete(everyone, i, 0)) for i, row in enumerate(self.rows)]
        p = (1 + sum(d >= squared for d in others)) / (self.patients + 1)
        order = np.argsort(-np.abs(apart))
        return Distance(squared, float(p), {self.names[i]: float(apart[i]) for i in order}, self.cohort)

    def save(self, path: str | PathLike[str]) -> None:
        """Write as JSON.

        Raises
        ------
        OutputError
            If the file cannot be written.
        """
        content = {"schema": SCHEMA, "cohort": self.cohort, "virtual": self.virtual, "patients": self.patients,
                   "names": self.names, "rows": self.rows.tolist()}  # fmt: skip
        with atomic_write(path) as target:
            target.write_text(json.dumps(content, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Reference:
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
            names = tuple(map(str, content["names"]))
            rows = frozen_array(content["rows"], float)
            if rows.ndim != 2 or rows.shape[1] != len(names) or len(rows) < FEWEST or not np.isfinite(rows).all():
                raise ValueError(f"rows of shape {rows.shape} for {len(names)} features")
            return cls(names, rows, str(content["cohort"]), bool(content["virtual"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not a reference cohort ({type(error).__name__}: {error}); expected JSON of {SCHEMA}, as "
                "Reference.save writes it. Learn it again with learn_reference."
            ) from None

    def _repr_html_(self) -> str:
        mean, sd, _ = shape_of(self.rows)
        rows = [(n, f"{m:.3g}", f"{s:.3g}") for n, m, s in zip(self.names, mean, sd, strict=True)]
        kind = ", virtual" if self.virtual else ""
        return html_table(("feature", "mean", "sd"), rows, f"{self.patients} patients of {self.cohort}{kind}")


def learn_reference(rows: Sequence[Mapping[str, float]], *, cohort: str, virtual: bool) -> Reference:
    """Learn what fits of a reference cohort look like.

    Parameters
    ----------
    rows : sequence of mapping
        `features` of each patient; all must have the same.
    cohort : str
        Name of the cohort, for the reader.
    virtual : bool
        Whether its patients are virtual.

    Returns
    -------
    Reference

    Raises
    ------
    InputError
        If patients differ in their features, one is not finite or alike in all, or patients are fewer than features
        plus 5, or than `FEWEST`.
    """
    names = tuple(rows[0]) if rows else ()
    if not names or any(set(r) != set(names) for r in rows):
        raise InputError("learn_reference: patients have different features, or none; expected the same of all.")
    x = np.array([[r[n] for n in names] for r in rows], float)
    n, p = x.shape
    least = max(p + 5, FEWEST)
    if n < least:
        raise InputError(f"learn_reference: {n} patients for {p} features; expected at least {least}. Gather more.")
    if not np.isfinite(x).all():
        raise InputError("learn_reference: a feature is not finite; leave the patient out.")
    same = [name for name, s in zip(names, x.std(0), strict=True) if not s > 0]
    if same:
        raise InputError(f"learn_reference: {', '.join(same)} is the same in all patients; leave the feature out.")
    return Reference(names, frozen_array(x, float), cohort, bool(virtual))


def _squared(row: np.ndarray, others: np.ndarray) -> float:
    """Squared Mahalanobis distance of features (p,) from those of others (n, p)."""
    mean, sd, correlation = shape_of(others)
    z = (row - mean) / sd
    return float(z @ np.linalg.solve(correlation, z))


def shape_of(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, sd, and correlation shrunk to the identity by Ledoit and Wolf's rule, of features (n, p)."""
    n, p = x.shape
    mean, sd = x.mean(0), x.std(0, ddof=1)
    # A feature that varies in one patient alone has no spread without him.
    sd = np.maximum(sd, 1e-9 * (1 + np.abs(mean)))
    z = (x - mean) / sd
    c = z.T @ z / n
    target = np.trace(c) / p * np.eye(p)
    apart = ((c - target) ** 2).sum()
    noise = (((z**2).T @ (z**2)) / n - c**2).sum() / n
    share = min(noise / apart, 1.0) if apart > 0 else 1.0
    return mean, sd, ((1 - share) * c + share * target) * n / (n - 1)
