"""The numbers of a forecast, as `summary.json` holds them (its schema is in :mod:`biomodel.summary`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
import xarray as xr

from biomodel.calibration.fit import Fit
from biomodel.findings import Findings
from biomodel.forecast import Forecast, _plain
from biomodel.patient import Patient
from biomodel.schedule import Schedule
from biomodel.summary import SCHEMA

__all__ = ["Alternative", "floor_of", "summarise"]

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
QUANTITIES = ("volume", "measured_volume", "cells", "longest_diameter")


@dataclass(frozen=True, eq=False)
class Alternative:
    """A forecast under another schedule, its data brought onto the draws of the main one."""

    label: str
    forecast: Forecast
    data: xr.Dataset
    curves: xr.Dataset


def summarise(
    forecast: Forecast,
    record: Patient,
    observations: list[dict[str, object]],
    scores: list[dict[str, object]],
    alternatives: Sequence[Alternative],
    findings: Findings | None,
) -> dict[str, object]:
    """Gather what fits the schema of `summary.json`."""
    floor = floor_of(forecast.fit.patient)
    more = [f"{one.label}: {note}" for one in alternatives for note in one.forecast.notes if note not in forecast.notes]
    return {
        "schema": SCHEMA,
        "patient": _patient(forecast, record, floor),
        "calibration": _calibration(forecast.fit),
        "forecast": {
            "draws": int(forecast.draws), "seed": int(forecast.seed), "days": [_plain(t) for t in forecast.times],
            "quantities": _quantities(forecast.data, forecast.times),
            "none_detectable": [
                {"day": _plain(day), "probability": _none_detectable(forecast.data.isel(time=place), floor)}
                for place, day in enumerate(forecast.times)
            ],
        },
        "schedule": _treatments(forecast.schedule),
        "observations": observations,
        "scores": scores,
        "what_if": [_alternative(one, forecast, floor) for one in alternatives],
        "findings": None if findings is None else [asdict(item) for item in findings.items],
        "notes": list(dict.fromkeys((*forecast.notes, *_unknown(forecast.fit.patient, record), *more, *record.notes))),
        "provenance": _provenance(forecast.fit),
    }  # fmt: skip


def _unknown(known: Patient, record: Patient) -> Iterator[str]:
    """Say here, where the whole record may be seen, that it tells of treatments the forecast did not know.

    Not in the forecast itself: that something was given later is knowledge of the future.
    """
    last = known.visits[-1].day
    if record.schedule.given_after(last) and not known.schedule.given_after(last):
        yield (
            f"The record holds treatments marked given after day {last:g} beside planned ones. The forecast does not "
            "know them: after that day it assumes what is marked planned, and nothing else."
        )


def floor_of(known: Patient) -> float:
    """Volume under which nothing is seen, cm³: the record's floor, or half a voxel."""
    return known.volumes.floor if known.volumes else known.domain.voxel_volume / 2e3


def _patient(forecast: Forecast, record: Patient, floor: float) -> dict[str, object]:
    domain, data = forecast.fit.patient.domain, forecast.data
    grid = None if domain.well_mixed else {
        "shape": list(domain.shape), "computed": [data.sizes[axis] for axis in "zyx"],
        "spacing_mm": [_plain(step) for step in domain.spacing],
        "visible_fraction": _plain(data.attrs["visible_fraction"]), "cells_per_voxel": _plain(data.attrs["theta"]),
    }  # fmt: skip
    return {
        "id": record.id, "organ": record.organ, "baseline": record.baseline,
        "virtual": record.virtual or forecast.fit.patient.virtual, "grid": grid,
        "detection_floor_cm3": _plain(floor), "clinical": {k: _plain(v) for k, v in record.clinical.items()},
        "outcome": None if record.outcome is None else {k: _plain(v) for k, v in record.outcome.items()},
    }  # fmt: skip


def _calibration(fit: Fit) -> dict[str, object]:
    visits = fit.patient.visits
    return {
        "visits": len(visits), "first_day": _plain(visits[0].day), "last_day": _plain(visits[-1].day),
        "model": fit.model.label,
        "known_parameters": {n: _plain(p.typical) for n, p in fit.model.parameters.items() if p.fixed},
        "method": fit.method, "converged": bool(fit.converged), "iterations": int(fit.iterations),
        "solves": int(fit.solves), "data": int(fit.count), "log_likelihood": _plain(fit.log_likelihood),
        "log_evidence": _plain(fit.log_evidence), "aic": _plain(fit.aic), "bic": _plain(fit.bic),
        "identified": list(fit.identified),
        "parameters": [{k: _plain(v) for k, v in row.items()} for row in fit.table()],
    }  # fmt: skip


def _quantities(data: xr.Dataset, days: np.ndarray) -> dict[str, object]:
    found: dict[str, object] = {}
    for name in QUANTITIES:
        if name not in data or not np.isfinite(data[name].values).any():
            continue
        draws = data[name].transpose("draw", ...).values.reshape(data.sizes["draw"], len(days))
        found[name] = {
            "units": data[name].attrs["units"],
            "quantiles": [
                {"day": _plain(day), **{f"{level:g}": _plain(v) for level, v in zip(LEVELS, column, strict=True)}}
                for day, column in zip(days, np.nanquantile(draws, LEVELS, axis=0).T, strict=True)
            ],
        }
    return found


def _none_detectable(data: xr.Dataset, floor: float) -> object:
    volume = data["volume"].values
    return _plain(float(np.mean(volume[np.isfinite(volume)] < floor)))


def _treatments(schedule: Schedule) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"kind": "chemotherapy", "agent": d.agent, "day": _plain(d.day), "amount": _plain(d.amount), "units": d.units,
         "status": d.status}
        for d in schedule.doses
    ]  # fmt: skip
    rows += [{"kind": "radiotherapy", "agent": None, "day": _plain(f.day), "amount": _plain(f.gray), "units": "Gy",
              "status": f.status} for f in schedule.fractions]  # fmt: skip
    rows += [{"kind": "ongoing", "agent": o.agent, "day": _plain(o.start_day), "amount": None, "units": None,
              "status": o.status} for o in schedule.ongoing]  # fmt: skip
    return rows


def _alternative(one: Alternative, forecast: Forecast, floor: float) -> dict[str, object]:
    data, main, day = one.data, forecast.data.isel(time=-1), forecast.times[-1]
    both = np.isfinite(data["volume"].values)
    difference = (data["volume"].values - main["volume"].values)[both]
    fewer = None
    if "cells" in data and np.isfinite(data["cells"].values).any():
        fewer = _plain(float(np.mean((data["cells"].values < main["cells"].values)[both])))
    return {
        "label": one.label, "day": _plain(day), "schedule": _treatments(one.forecast.schedule),
        "quantities": _quantities(data, forecast.times[-1:]), "none_detectable": _none_detectable(data, floor),
        "less_volume": _plain(float(np.mean(difference < 0))), "same_volume": _plain(float(np.mean(difference == 0))),
        "fewer_cells": fewer,
    }  # fmt: skip


def _provenance(fit: Fit) -> dict[str, object]:
    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    solver = fit.solver
    return {
        "solver": {
            "name": type(solver).__name__, "rtol": solver.rtol, "dtype": str(solver.dtype).removeprefix("torch."),
            "device": torch.device(solver.device).type,
        },
        "patient_sha256": fit.patient.fingerprint(),
        "versions": {n: of(n) for n in ("tumorcast", "torch", "numpy", "scipy", "xarray", "numba")} | solver.versions(),
    }  # fmt: skip
