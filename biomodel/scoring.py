"""`score`: a forecast against what was then seen, always beside the two baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomodel.errors import InputError
from biomodel.forecast import Forecast, _plain
from biomodel.observation import longest_diameter, observe
from biomodel.patient import Patient
from biomodel.tables import html_table


def concordance(x: np.ndarray, y: np.ndarray) -> float:
    """Lin's concordance correlation coefficient, 2 cov / (var + var + (mean - mean)²), with population moments.

    Lin 1989, Biometrics 45:255, doi:10.2307/2532051. NaN for fewer than two values or where both are constant.
    """
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.size < 2:
        return float("nan")
    spread = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(2 * np.mean((x - x.mean()) * (y - y.mean())) / spread) if spread > 0 else float("nan")


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson correlation; NaN for fewer than two values or constants."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.size < 2 or x.std() == 0 or y.std() == 0:
        return float("nan")
    return float(np.mean((x - x.mean()) * (y - y.mean())) / (x.std() * y.std()))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """Dice overlap of two boolean arrays; 1 where both are empty."""
    total = np.count_nonzero(a) + np.count_nonzero(b)
    return 2 * np.count_nonzero(a & b) / total if total else 1.0


def crps(draws: np.ndarray, observed: float) -> float:
    """Continuous ranked probability score of a sample, in its fair (unbiased) form; the absolute error for one draw.

    Gneiting and Raftery 2007, J Am Stat Assoc 102:359, doi:10.1198/016214506000001437; fair form: Ferro 2014,
    doi:10.1002/qj.2270.
    """
    x = np.sort(np.asarray(draws, float))
    n = len(x)
    error = float(np.abs(x - observed).mean())
    if n < 2:
        return error
    spread = 2 * float(np.sum((2 * np.arange(1, n + 1) - n - 1) * x)) / (n * (n - 1))
    return error - spread / 2


def covers(draws: np.ndarray, observed: float, level: float) -> bool:
    """Whether the central interval of the draws at `level` holds the observed value."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return bool(low <= observed <= high)


def exponential_volume(days: Sequence[float], volumes: Sequence[float], day: float, floor: float) -> float:
    """Volume at a later day by the straight line through the logarithms of the last two volumes (cm³)."""
    (t1, t2), (v1, v2) = days[-2:], np.maximum(volumes[-2:], floor)
    return float(v2 * np.exp(np.log(v2 / v1) / (t2 - t1) * (day - t2)))


@dataclass(frozen=True)
class Score:
    """Scores of one forecast.

    Attributes
    ----------
    rows : tuple of dict
        One per visit and predictor (`forecast`, `carry-forward`, `exponential volume`), with `day`, `visit`,
        `volume`, `observed_volume` (cm³), `volume_error` (relative, NaN for an observed volume of 0), `crps`,
        `covered_50`, `covered_90`, and for imaged patients `ccc`, `pearson`, `rmse` (cell fraction over the union of
        predicted and observed tumour), `dice`, `cells_error`, `diameter_error` (relative).
    """

    rows: tuple[dict[str, object], ...]

    def of(self, predictor: str) -> tuple[dict[str, object], ...]:
        """The rows of one predictor."""
        return tuple(r for r in self.rows if r["predictor"] == predictor)

    def _repr_html_(self) -> str:
        names = [n for n in self.rows[0] if any(r.get(n) is not None for r in self.rows)] if self.rows else []

        def cell(value: object) -> str:
            if value is None or isinstance(value, bool):
                return {None: "–", True: "yes", False: "no"}[value]
            return f"{value:.3g}" if isinstance(value, float) else str(value)

        return html_table([n.replace("_", " ") for n in names], [[cell(r[n]) for n in names] for r in self.rows])


def _relative(predicted: float, observed: float) -> float:
    return (predicted - observed) / observed if observed > 0 else float("nan")


def score(forecast: Forecast, patient: Patient) -> Score:
    """Score a forecast on the visits that came after its calibration.

    Parameters
    ----------
    forecast : Forecast
    patient : Patient
        The whole record. Only visits after the last calibrated one, at days that the forecast holds, are scored.

    Returns
    -------
    Score

    Raises
    ------
    InputError
        If the patient is another one, or no such visit exists.
    """
    fit = forecast.fit
    known = fit.patient
    if known.id != patient.id:
        raise InputError(f"score: the forecast is for patient {known.id}, the record for {patient.id}.")
    last = known.visits[-1].day
    rows: list[dict[str, object]] = []
    past = [(v.day, volume) for v in known.visits if (volume := known.volume_of(v)) is not None]
    for visit in patient.visits:
        index = np.flatnonzero(np.abs(forecast.times - visit.day) < 1e-6)
        observed = patient.volume_of(visit)
        if visit.day <= last or not len(index) or observed is None:
            continue
        name = "measured_volume" if "measured_volume" in forecast.data else "volume"
        draws = forecast.data[name].values[:, index[0]]
        median = float(np.median(draws))
        row: dict[str, object] = {
            "visit": visit.number, "day": visit.day, "predictor": "forecast", "volume": median,
            "observed_volume": observed, "volume_error": _relative(median, observed), "crps": crps(draws, observed),
            "covered_50": covers(draws, observed, 0.5), "covered_90": covers(draws, observed, 0.9),
        }  # fmt: skip
        if not known.domain.well_mixed:
            row |= _maps(forecast, patient, visit, index[0])
        rows.append(row)
        floor = known.volumes.floor if known.volumes else known.domain.voxel_volume / 2e3
        simple = {"carry-forward": past[-1][1]}
        if len(past) > 1:
            times, volumes = zip(*past, strict=True)
            simple["exponential volume"] = exponential_volume(times, volumes, visit.day, floor)
        for predictor, value in simple.items():
            other: dict[str, object] = {
                "visit": visit.number, "day": visit.day, "predictor": predictor, "volume": float(value),
                "observed_volume": observed, "volume_error": _relative(value, observed),
                "crps": abs(value - observed), "covered_50": None, "covered_90": None,
            }  # fmt: skip
            if predictor == "carry-forward" and not known.domain.well_mixed:
                other |= _carried(forecast, patient, visit)
            rows.append(other)
    if not rows:
        days = ", ".join(f"{v.day:g}" for v in patient.visits)
        raise InputError(
            f"score: no visit after day {last:g} at one of the forecast's days {forecast.times.tolist()}; the record "
            f"has visits on days {days}. Forecast with times=[day of the visit]."
        )
    names = list(dict.fromkeys(n for r in rows for n in r))
    return Score(tuple({n: _plain(r.get(n)) for n in names} for r in rows))


def _compare_maps(predicted: np.ndarray, tumour: np.ndarray, seen, domain) -> dict[str, object]:
    union = (tumour | seen.region) & domain.mask
    row: dict[str, object] = {"dice": dice(tumour, seen.region)}
    if seen.fraction is not None and union.any():
        x, y = predicted[union], np.where(seen.region, seen.fraction, 0.0)[union]
        row |= {"ccc": concordance(x, y), "pearson": pearson(x, y), "rmse": float(np.sqrt(np.mean((x - y) ** 2)))}
    return row


def _cells(seen) -> float:
    """Cells seen, in units of a full voxel."""
    return float(np.sum(seen.fraction * seen.region))


def _maps(forecast: Forecast, patient: Patient, visit, index: int) -> dict[str, object]:
    seen = observe(patient, visit)
    if seen is None:
        return {}
    box, theta = forecast.box, forecast.data.attrs["theta"]
    whole = patient.domain
    mean = np.zeros(whole.shape)
    mean[box] = forecast.data["cell_fraction"].isel(time=index).mean("draw").values
    tumour = np.zeros(whole.shape, bool)
    tumour[box] = forecast.data["probability"].isel(time=index).values >= 0.5
    row = _compare_maps(mean, tumour, seen, whole)
    observed = visit.longest_diameter or longest_diameter(seen.region, whole.spacing)
    if seen.fraction is not None:
        predicted = float(forecast.data["cells"].isel(time=index).median())
        row["cells_error"] = _relative(predicted, _cells(seen) * theta)
    row["diameter_error"] = _relative(float(forecast.data["longest_diameter"].isel(time=index).median()), observed)
    return row


def _carried(forecast: Forecast, patient: Patient, visit) -> dict[str, object]:
    known, seen = forecast.fit.patient, observe(patient, visit)
    before = next((s for s in (observe(known, v) for v in reversed(known.visits)) if s is not None), None)
    if seen is None or before is None:
        return {}
    fraction = np.where(before.region, 0.0 if before.fraction is None else before.fraction, 0.0)
    row = _compare_maps(fraction, before.region, seen, patient.domain)
    if before.fraction is None and before.region.any():
        # A region without a map says nothing of the cell fraction inside it.
        row = {"dice": row["dice"]}
    if before.fraction is not None and seen.fraction is not None:
        row["cells_error"] = _relative(_cells(before), _cells(seen))
    diameters = [longest_diameter(s.region, patient.domain.spacing) for s in (before, seen)]
    row["diameter_error"] = _relative(diameters[0], visit.longest_diameter or diameters[1])
    return row
