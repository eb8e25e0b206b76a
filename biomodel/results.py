"""`results`: all that a forecast found, as arrays and as plain numbers, in memory and in two files.

`forecast.nc` holds the arrays and `summary.json` the numbers; the report is made from these two alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import numpy as np
import xarray as xr
from pydantic import ValidationError

from biomodel.errors import InputError
from biomodel.files import atomic_write
from biomodel.findings import Findings
from biomodel.forecast import Forecast, _plain
from biomodel.observation import longest_diameter, observe
from biomodel.patient import Patient
from biomodel.scoring import exponential_volume, score
from biomodel.summarise import Alternative, floor_of, summarise
from biomodel.summary import SCHEMA, Summary

__all__ = ["Results", "results"]

#: Bits kept of the 23 in the mantissa of a map's float32: a relative error of 1e-4, far below the spread between draws,
#: and a file of a third of the size.
MANTISSA = 12


@dataclass(frozen=True, eq=False)
class Results:
    """All that a forecast found.

    Attributes
    ----------
    tree : xarray.DataTree
        At the root the predictions on the requested days: ``cell_fraction`` (draw, time, z, y, x), ``probability``,
        ``volume``, ``cells``, ``longest_diameter``. Groups: ``curves`` (volume over time, and the two baselines),
        ``parameters`` (their draws), ``observations`` (what was measured, on the same box), ``scores``, and
        ``what_if/0``, ``what_if/1``, ... (on the last day) with their own ``curves``.
    summary : dict
        The same without the maps, in plain numbers; :class:`~biomodel.summary.Summary` is its schema.
    """

    tree: xr.DataTree
    summary: dict

    def data(self, group: str = "/") -> xr.Dataset:
        """Return one group of the tree with its coordinates.

        Raises
        ------
        KeyError
            If there is none of that name.
        """
        node = self.tree if group == "/" else self.tree[group]
        return node.to_dataset()

    def write(self, folder: str | PathLike[str]) -> None:
        """Write ``forecast.nc`` and ``summary.json`` into a folder; earlier ones are replaced.

        Raises
        ------
        OutputError
            If they cannot be written. What was there before is unchanged then.
        """
        folder = Path(folder)
        text = _text(self.summary)
        tree = self.tree.copy()
        tree.attrs["summary_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        small = {"zlib": True, "complevel": 1, "shuffle": True}
        packed = {node.path: {n: small for n, v in node.data_vars.items() if v.ndim > 2} for node in tree.subtree}
        with ExitStack() as stack:
            # Both are complete before the first is put in place.
            numbers = stack.enter_context(atomic_write(folder / "summary.json"))
            maps = stack.enter_context(atomic_write(folder / "forecast.nc"))
            # In memory first: where a disk fills up, HDF5 cannot close its file any more and ends the process.
            maps.write_bytes(tree.to_netcdf(engine="h5netcdf", encoding=packed))
            numbers.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> Results:
        """Read what :meth:`write` wrote.

        Raises
        ------
        InputError
            If a file is missing, damaged, of another version, or the two are not of the same run.
        """
        folder = Path(folder)
        remedy = "Run 'tumorcast forecast' again."
        for name in ("summary.json", "forecast.nc"):
            if not (folder / name).is_file():
                raise InputError(
                    f"{folder}: no {name} in this folder; expected the results of a forecast. Give the folder that "
                    "'tumorcast forecast --out' wrote."
                )
        try:
            text = (folder / "summary.json").read_text(encoding="utf-8")
            summary = json.loads(text)
            Summary.model_validate(summary)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ", ".join(map(str, first["loc"])) or "top"
            raise InputError(f"{folder}: summary.json, {place}: {first['msg']}; expected {SCHEMA}. {remedy}") from None
        except (ValueError, OSError) as error:
            raise InputError(f"{folder}: summary.json cannot be read ({error}). {remedy}") from None
        try:
            with xr.open_datatree(folder / "forecast.nc", engine="h5netcdf") as tree:
                tree = tree.load()
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"{folder}: forecast.nc cannot be read ({error}). {remedy}") from None
        if tree.attrs.pop("summary_sha256", None) != hashlib.sha256(text.encode()).hexdigest():
            raise InputError(f"{folder}: forecast.nc and summary.json are not of one run or were changed. {remedy}")
        return cls(tree, summary)


def results(
    forecast: Forecast,
    observed: Patient | None = None,
    what_if: Sequence[tuple[str, Forecast]] = (),
    findings: Findings | None = None,
) -> Results:
    """Gather a forecast, what was then seen, and alternatives to the plan.

    Parameters
    ----------
    forecast : Forecast
    observed : Patient, optional
        The whole record. Visits after the calibration that lie on the forecast's days are scored.
    what_if : sequence of (str, Forecast)
        Label and forecast of the same fit, seed and last day under other schedules. As the draws are the same, they
        are compared one by one, on the last day.
    findings : Findings, optional
        Of the quality check of the patient's folder.

    Raises
    ------
    InputError
        If the observed patient is another one, or a what-if forecast does not match.
    """
    known = forecast.fit.patient
    if observed is not None and (observed.id, observed.domain.shape) != (known.id, known.domain.shape):
        raise InputError(
            f"results: the forecast is for patient {known.id} on {known.domain.shape} voxels; the observed one is "
            f"{observed.id} on {observed.domain.shape}. Give the record that the forecast was made from."
        )
    for label, other in what_if:
        same = other.fit is forecast.fit and other.seed == forecast.seed
        if not (same and other.times[-1] == forecast.times[-1]):
            raise InputError(
                f"what-if '{label}': is not of the same fit, seed and last day as the forecast; expected that only the "
                "schedule differs. Forecast it again with the same arguments."
            )
    record = known if observed is None else observed
    observations, seen = _observations(forecast, record)
    scores = [dict(row) for row in score(forecast, record).rows] if _can_score(forecast, record) else []
    alternatives = [Alternative(label, other, *_matched(other, forecast)) for label, other in what_if]
    summary = summarise(forecast, record, observations, scores, alternatives, findings)
    summary = json.loads(_text(Summary.model_validate(summary).model_dump(by_alias=True)))
    return Results(_tree(forecast, seen, scores, alternatives, summary), summary)


def _text(summary: dict) -> str:
    return json.dumps(summary, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def _can_score(forecast: Forecast, record: Patient) -> bool:
    last = forecast.fit.patient.visits[-1].day
    return any(
        visit.day > last and record.volume_of(visit) is not None and np.abs(forecast.times - visit.day).min() < 1e-6
        for visit in record.visits
    )


def _matched(other: Forecast, forecast: Forecast) -> tuple[xr.Dataset, xr.Dataset]:
    """An alternative on its last day, and its curves, on the draws of the main forecast (NaN where it has none)."""
    draws = forecast.data["draw"]
    last = other.data.isel(time=-1).drop_vars(["time", "cell_fraction", "mask", "affine"], errors="ignore")
    return last.reindex(draw=draws), other.curves.reindex(draw=draws)


def _observations(forecast: Forecast, record: Patient) -> tuple[list[dict[str, object]], xr.Dataset]:
    """What every visit measured: one row of numbers each, and the maps on the computing box."""
    known, box, theta = forecast.fit.patient, forecast.box, forecast.data.attrs.get("theta", np.nan)
    rows, regions, fractions = [], [], []
    for visit in record.visits:
        seen = observe(record, visit)
        diameter, cells = visit.longest_diameter, None
        if seen is not None and not known.domain.well_mixed:
            diameter = longest_diameter(seen.region, known.domain.spacing) if diameter is None else diameter
            if seen.fraction is not None:
                cells = _plain(float(np.sum(seen.fraction * seen.region)) * theta)
        rows.append({
            "visit": visit.number, "day": _plain(visit.day),
            "role": "calibration" if visit.number <= len(known.visits) else "later",
            "adc": visit.adc is not None, "region": visit.region is not None,
            "volume_cm3": _plain(record.volume_of(visit)), "longest_diameter_mm": _plain(diameter), "cells": cells,
        })  # fmt: skip
        if box is not None:
            shape = forecast.data["mask"].shape
            region, fraction = np.zeros(shape, bool), np.full(shape, np.nan, np.float32)
            if seen is not None:
                region = seen.region[box]
                if seen.fraction is not None:
                    fraction = np.where(region, seen.fraction[box], 0.0).astype(np.float32)
            regions.append(region)
            fractions.append(fraction)
    numbers = {
        name: ("visit", np.array([np.nan if row[name] is None else row[name] for row in rows], float), {"units": units})
        for name, units in (("day", "days"), ("volume_cm3", "cm^3"), ("longest_diameter_mm", "mm"), ("cells", "1"))
    }
    data = xr.Dataset(numbers, {"visit": [row["visit"] for row in rows]})
    data["calibration"] = ("visit", np.array([row["role"] == "calibration" for row in rows]))
    if box is not None:
        data["region"] = (("visit", "z", "y", "x"), np.array(regions), {"units": "1"})
        data["cell_fraction_observed"] = (("visit", "z", "y", "x"), np.array(fractions), {"units": "1"})
    return rows, data


def _rounded(maps: np.ndarray) -> np.ndarray:
    """float32 rounded to `MANTISSA` bits, which compresses well."""
    drop = 23 - MANTISSA
    bits = np.array(maps, np.float32).view(np.uint32)
    bits += np.uint32(1 << (drop - 1))
    bits &= np.uint32(0xFFFFFFFF >> drop << drop)
    return bits.view(np.float32)


def _curves(forecast: Forecast) -> xr.Dataset:
    known, curves = forecast.fit.patient, forecast.curves.copy()
    past = [(v.day, volume) for v in known.visits if (volume := known.volume_of(v)) is not None]
    days = curves["day"].values
    later = days >= known.visits[-1].day - 1e-9
    if past:
        curves["carry_forward"] = ("day", np.where(later, past[-1][1], np.nan), {"units": "cm^3"})
    if len(past) > 1:
        when, volumes = zip(*past, strict=True)
        line = [exponential_volume(when, volumes, day, floor_of(known)) for day in days]
        curves["exponential_volume"] = ("day", np.where(later, line, np.nan), {"units": "cm^3"})
    return curves


def _table(rows: Sequence[dict[str, object]], dimension: str) -> xr.Dataset:
    """Rows of plain numbers and texts as a dataset; what is missing becomes NaN."""
    data = {}
    for name in dict.fromkeys(n for row in rows for n in row):
        column = [row.get(name) for row in rows]
        text = any(isinstance(value, str) for value in column)
        values = [str(v) for v in column] if text else [np.nan if v is None else float(v) for v in column]  # type: ignore[arg-type]
        data[name] = (dimension, np.array(values, object if text else float))
    return xr.Dataset(data)


def _tree(
    forecast: Forecast,
    seen: xr.Dataset,
    scores: list[dict[str, object]],
    alternatives: list[Alternative],
    summary: dict,
) -> xr.DataTree:
    data = forecast.data.copy()
    if "cell_fraction" in data:
        data["cell_fraction"] = data["cell_fraction"].copy(data=_rounded(data["cell_fraction"].values))
    data.attrs["title"] = f"Forecast of {forecast.fit.patient.id}"
    data.attrs["seed"] = forecast.seed
    data.attrs["provenance"] = json.dumps(summary["provenance"], sort_keys=True)
    kept = data["draw"].values
    values = forecast.fit.draw(int(kept.max()) + 1 if kept.size else 0, forecast.seed)
    parameters = _table(summary["calibration"]["parameters"], "parameter").set_coords("name")
    parameters["draws"] = (("draw", "parameter"), np.stack([values[n][kept] for n in values], 1))
    groups = {"/": data, "/curves": _curves(forecast), "/observations": seen, "/parameters": parameters}
    if scores:
        groups["/scores"] = _table(scores, "entry")
    for number, one in enumerate(alternatives):
        groups[f"/what_if/{number}"] = one.data.assign_attrs(label=one.label, day=float(forecast.times[-1]))
        groups[f"/what_if/{number}/curves"] = one.curves
    return xr.DataTree.from_dict(groups)
