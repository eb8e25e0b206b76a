"""`forecast`: posterior predictive draws of the tumour at any time and under any schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr

from biomodel.calibration.field_prior import Link
from biomodel.calibration.fit import Fit
from biomodel.calibration.images import computing_box, field_maps
from biomodel.calibration.initial_state import InitialState, start_noise
from biomodel.calibration.volumes import VolumeModel, VolumeNoise, measured
from biomodel.errors import InputError, NotFiniteError, SolverError
from biomodel.observation import longest_diameter, observe
from biomodel.patient import Patient
from biomodel.schedule import Schedule
from biomodel.tables import html_table

#: Longest forecast, days: a hundred years.
LONGEST = 36_525.0
#: Most bytes of states held at once while draws are simulated.
BLOCK = 2.5e8


@dataclass(frozen=True, eq=False)
class Forecast:
    """Draws of the tumour's future.

    Attributes
    ----------
    data : xarray.Dataset
        At the requested times: `cell_fraction` (draw, time, z, y, x; float32, on the computing box), `volume` (draw,
        time; cm³), `cells` (in visible tumour, as an observation counts them), `longest_diameter` (mm), and
        `probability` (time, z, y, x) that a voxel is visible tumour.
        A patient without images has `volume` and `measured_volume` (with the measurement's noise) only.
    curves : xarray.Dataset
        `volume` and `cells` (draw, day) on a finer time axis.
    fit : Fit
    schedule : Schedule
        The treatments assumed, which need not be those of the patient.
    box : tuple of slice or None
        Where the maps lie on the patient's grid.
    """

    data: xr.Dataset
    curves: xr.Dataset
    fit: Fit
    schedule: Schedule
    seed: int
    box: tuple[slice, slice, slice] | None
    notes: tuple[str, ...] = field(default=())

    def __getitem__(self, name: str) -> xr.DataArray:
        return self.data[name]

    @property
    def times(self) -> np.ndarray:
        """Requested days."""
        return self.data["time"].values

    @property
    def draws(self) -> int:
        """Number of draws, without those that gave no finite state."""
        return self.data.sizes["draw"]

    def _repr_html_(self) -> str:
        q = self.data["volume"].quantile([0.05, 0.5, 0.95], "draw").values
        rows = [(f"{t:g}", f"{q[1, i]:.3g}", f"{q[0, i]:.3g} to {q[2, i]:.3g}") for i, t in enumerate(self.times)]
        title = f"Forecast of {self.fit.patient.id}, {self.draws} draws"
        return html_table(("day", "volume, cm³ (median)", "90 % interval"), rows, title)


def _plain(value):
    """Numbers for JSON: 8 significant digits are more than any of them is worth."""
    if isinstance(value, (bool, np.bool_, str)) or value is None:
        return value
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.8g}") if math.isfinite(value) else None
    if isinstance(value, (int, np.integer)):
        return int(value)
    return value


def forecast(
    fit: Fit,
    until: float | None = None,
    draws: int = 200,
    seed: int = 0,
    times: Sequence[float] | None = None,
    schedule: Schedule | None = None,
    curve_step: float = 1.0,
    progress: Callable[[Iterable], Iterable] | None = None,
) -> Forecast:
    """Forecast the tumour.

    Parameters
    ----------
    fit : Fit
    until : float, optional
        Last day; needed unless `times` are given.
    draws : int
        Draws from the posterior of the parameters and the initial state.
    seed : int
    times : sequence of float, optional
        Days at which maps are wanted; by default the last calibrated visit and `until`.
    schedule : Schedule, optional
        Another schedule than the patient's (what-if). What was given before the last calibrated visit should stay in
        it, as the calibration assumed it.
    curve_step : float
        Days between points of `curves`.
    progress : callable, optional
        Wraps the iteration over blocks of draws, for a progress bar.

    Returns
    -------
    Forecast

    Raises
    ------
    InputError
        If times lie before the first visit, or draws is not positive.
    SolverError
        If more than one draw in ten gives a state that is not finite.
    """
    patient = fit.patient
    first, last = first_day(patient), patient.visits[-1].day
    if times is None:
        if until is None:
            raise InputError("forecast: give the last day as until=..., or the days as times=[...].")
        times = [last, until] if until > last else [until]
    asked = np.unique(np.array([*times, *([until] if until is not None else [])], float))
    # The model's state begins at the first visit where tumour was measured; nothing is said of days before it.
    days = asked[(asked >= first) | ~np.isfinite(asked) | (asked < patient.visits[0].day)]
    if not np.isfinite(days).all() or days[0] < first:
        raise InputError(
            f"forecast: times {days.tolist()} must be finite and not before the first visit, day {first:g}."
        )
    if days[-1] - first > LONGEST:
        raise InputError(f"forecast: day {days[-1]:g} lies more than {LONGEST:g} days after the first visit.")
    if isinstance(seed, bool) or seed != int(seed) or seed < 0:
        raise InputError(f"forecast: seed is {seed!r}; expected a whole number from 0.")
    if not curve_step > 0:
        raise InputError(f"forecast: curve_step is {curve_step}; expected a positive number of days.")
    if draws < 1:
        raise InputError(f"forecast: draws is {draws}; expected at least 1.")
    schedule = patient.schedule if schedule is None else schedule
    fit.model.check_schedule(schedule)
    curve_step = max(curve_step, (days[-1] - first) / 1000)
    curve = np.unique(np.concatenate((np.arange(first, days[-1], curve_step), days)))
    run = _volumes if patient.domain.well_mixed else _images
    data, curves, box, notes = run(fit, days, curve, draws, seed, schedule, progress)
    for axis in (data["time"], curves["day"]):
        axis.attrs.update(units="days", baseline=patient.baseline or "day 0 of the record")
    data.attrs.update(patient=patient.id, baseline=patient.baseline or "", calibrated_until=float(last))
    return Forecast(data, curves, fit, schedule, seed, box, (*fit.notes, *notes))


def first_day(patient: Patient) -> float:
    """Day of the first visit where tumour was measured, at which the model's state begins."""
    if patient.domain.well_mixed:
        return float(measured(patient)[0][0])
    return next(s.day for s in (observe(patient, v) for v in patient.visits) if s is not None)


def _noise(seed: int, purpose: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence([seed, purpose]))


def initial_states(
    fit: Fit, box, domain, values: dict[str, np.ndarray], rng: np.random.Generator | None,
    change: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Initial cell fractions (draw, z, y, x) on a box: measured, moved by the fit, with the voxels' own noise.

    With a change (draw, z, y, x) that was drawn with the fit, that in place of noise.
    """
    patient = fit.patient
    seen = next(s for s in (observe(patient, v) for v in patient.visits) if s is not None)
    crop = seen.crop(box)
    settings = patient.cellularity
    initial = InitialState.of(crop, settings.visible_fraction if settings else 0.15,
                              settings.repeatability_cv if settings else 0.0, domain, settings)  # fmt: skip
    u0 = initial.state(values)
    if fit.initial_update is not None:
        full = np.zeros(patient.domain.shape)
        full[fit.box] = fit.initial_update
        u0 = u0 + full[box]
    if change is not None:
        u0 = u0 + change
    elif rng is not None and crop.sd is not None:
        noise = start_noise(initial.seen, domain, settings)
        if noise is None:
            u0 = u0 + rng.standard_normal(u0.shape) * (initial.seen.sd * crop.region)
        else:
            u0 = u0 + np.stack([noise.root(rng.standard_normal(noise.size)) for _ in u0])
    if crop.fraction is not None:
        # A voxel of the region was seen as tumour: what a draw takes below the visible fraction is reflected there.
        low = initial.sure(values) & (u0 < initial.visible)
        u0 = np.where(low, 2 * initial.visible - u0, u0)
    return np.maximum(u0, 0.0) * domain.mask


def _images(fit, days, curve, draws, seed, schedule, progress):
    patient, model = fit.patient, fit.model
    first = first_day(patient)
    box = computing_box(patient, model, float(days[-1] - first))
    domain = patient.domain.crop(box)
    fields = {k: np.asarray(v)[box] for k, v in field_maps(model, patient).items()}
    simulation = fit.solver.build(model, domain, schedule, fields, start=first)
    settings = patient.cellularity
    visible = settings.visible_fraction if settings else 0.15
    theta = settings.carrying_capacity(domain.voxel_volume) if settings else math.nan
    values = fit.draw(draws, seed)
    drawn = _Drawn.of(fit, draws, seed, box)
    rng = _noise(seed, 2)
    at = np.searchsorted(curve, days)
    n_voxels = int(np.prod(domain.shape))
    block = max(1, min(draws, int(BLOCK / (n_voxels * 8 * (len(curve) + 6)))))
    maps = np.zeros((draws, len(days), *domain.shape), np.float32)
    volume, cells = np.zeros((draws, len(curve))), np.zeros((draws, len(curve)))
    diameter = np.zeros((draws, len(days)))
    plan, reached = None, 0.0
    failed: list[int] = []
    starts = list(range(0, draws, block))
    faces = _outer_faces(domain, patient.domain, box)
    for start in progress(starts) if progress else starts:
        part = slice(start, min(start + block, draws))
        here = {n: v[part] for n, v in values.items()}
        u0 = initial_states(fit, box, domain, here, rng, None if drawn is None else drawn.start[part])
        params = {n: torch.tensor(here[n]) for n in model.free}
        if drawn is not None:
            params[drawn.name] = torch.tensor(drawn.link.of(here[drawn.name][:, None, None, None], drawn.field[part]))
        if plan is None:
            # One plan for all draws, made at the extremes of the posterior.
            extreme = {n: torch.tensor(np.quantile(values[n], [0.5, 0.95])) for n in model.free}
            if drawn is not None:
                extreme[drawn.name] = params[drawn.name][:1]
            plan = simulation.plan(extreme, torch.tensor(u0[:1]), curve)
        u, bad = _run(simulation, params, torch.tensor(u0), curve, plan)
        failed.extend(part.start + i for i in bad)
        visible_now = u >= visible
        volume[part] = visible_now.sum((2, 3, 4)) * domain.voxel_volume / 1e3
        cells[part] = (u * visible_now).sum((2, 3, 4)) * theta
        maps[part] = u[:, at]
        reached = max(reached, float(u[..., faces].max()) if faces.any() else 0.0)
        for i in range(part.stop - part.start):
            for t, c in enumerate(at):
                diameter[part.start + i, t] = longest_diameter(visible_now[i, c], domain.spacing)
    notes = []
    if failed:
        if len(failed) > draws / 10:
            raise SolverError(
                f"forecast: {len(failed)} of {draws} draws gave no finite state; the posterior is too wide."
            )
        notes.append(f"{len(failed)} of {draws} draws gave no finite state and were left out.")
    if reached > visible / 4:
        notes.append(f"The tumour reaches the edge of the computing box (cell fraction {reached:.2f} there).")
    keep = np.setdiff1d(np.arange(draws), failed)
    if failed:
        maps = maps[keep]
    coords = {"draw": keep, "time": days, **{k: ("zyx"["zyx".index(k)], v) for k, v in domain.coords.items()}}
    data = xr.Dataset(
        {
            "cell_fraction": (("draw", "time", "z", "y", "x"), maps),
            "probability": (("time", "z", "y", "x"), _share(maps, visible)),
            "volume": (("draw", "time"), volume[keep][:, at]),
            "cells": (("draw", "time"), cells[keep][:, at]),
            "longest_diameter": (("draw", "time"), diameter[keep]),
            "mask": (("z", "y", "x"), domain.mask),
            "affine": (("row", "column"), np.asarray(domain.affine)),
        },
        coords=coords,
        attrs={"visible_fraction": visible, "theta": theta},
    )
    curves = xr.Dataset(
        {"volume": (("draw", "day"), volume[keep]), "cells": (("draw", "day"), cells[keep])},
        coords={"draw": keep, "day": curve},
    )
    _units(data)
    _units(curves)
    return data, curves, box, notes


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Draws of a fit with a map of the growth rate, on a box: the field and the change of the initial state.

    Beyond what was calibrated both are 0. Both are (draws, z, y, x).
    """

    name: str
    link: Link
    field: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, fit: Fit, draws: int, seed: int, box) -> _Drawn | None:
        found = fit.rate_map
        if found is None:
            return None
        _, fields, starts = found.draw(draws, seed)

        def placed(values: np.ndarray) -> np.ndarray:
            whole = np.zeros((draws, *fit.patient.domain.shape), np.float32)
            whole[(slice(None), *found.box)] = values
            return whole[(slice(None), *box)].astype(float)

        name = f"growth.{fit.model.growth.parameters[0].name}"
        return cls(name, found.link, placed(fields), placed(starts))


def _run(simulation, params, u0, curve, plan) -> tuple[np.ndarray, list[int]]:
    """States of a block of draws, and which of them are not finite (left at zero)."""
    try:
        return simulation(params, u0, curve, plan=plan).cpu().numpy(), []
    except NotFiniteError:
        if len(u0) == 1:
            return np.zeros((1, len(curve), *u0.shape[1:])), [0]
    parts, bad = [], []
    for i in range(len(u0)):
        one, failed = _run(simulation, {n: v[i : i + 1] for n, v in params.items()}, u0[i : i + 1], curve, plan)
        parts.append(one)
        bad += [i] * len(failed)
    return np.concatenate(parts), bad


def _share(maps: np.ndarray, visible: float) -> np.ndarray:
    """Share of draws at or above the visible fraction, time by time to spare memory."""
    return np.stack([(maps[:, t] >= visible).mean(0) for t in range(maps.shape[1])]).astype(np.float32)


def _outer_faces(domain, whole, box) -> np.ndarray:
    """Voxels of the mask on sides of the box where the organ goes on."""
    found = np.zeros(domain.shape, bool)
    for axis, (s, n) in enumerate(zip(box, whole.shape, strict=True)):
        index: list = [slice(None)] * 3
        for position, cut in ((0, s.start > 0), (-1, s.stop < n)):
            if cut:
                index[axis] = position
                found[tuple(index)] = True
    return found & domain.mask


def _units(data: xr.Dataset) -> None:
    units = {"volume": "cm^3", "measured_volume": "cm^3", "cells": "1", "longest_diameter": "mm", "cell_fraction": "1",
             "probability": "1", "mask": "1", "affine": "mm"}  # fmt: skip
    for name, unit in units.items():
        if name in data:
            data[name].attrs["units"] = unit
    for axis in "zyx":
        if axis in data.coords:
            data[axis].attrs["units"] = "mm"


def _volumes(fit, days, curve, draws, seed, schedule, progress):
    patient = fit.patient
    settings = patient.volumes
    values = fit.draw(draws, seed)
    first = float(measured(patient)[0][0])
    days_all = np.unique(np.concatenate(([first], curve[curve >= first])))
    course = VolumeModel(fit.model, dict(fit.parameters), [patient.replace_schedule(schedule)], days_all,
                         np.array([settings.floor]), fit.solver)  # fmt: skip
    z = np.stack([p.prior.to_z(values[n]) for n, p in fit.parameters.items()], 1)
    with torch.no_grad():
        volume = course.volumes(torch.tensor(z)).numpy()
    rng = _noise(seed, 2)
    errors = VolumeNoise.of(settings) if fit.noise is None else fit.noise
    noise = rng.standard_t(errors.df, (draws, len(days))) * errors.at(days - first)
    at = np.searchsorted(days_all, days)
    seen = np.maximum(np.exp(np.log(volume[:, at] + settings.floor) + noise) - settings.floor, 0.0)
    data = xr.Dataset(
        {"volume": (("draw", "time"), volume[:, at]), "measured_volume": (("draw", "time"), seen)},
        coords={"draw": np.arange(draws), "time": days},
    )
    curves = xr.Dataset({"volume": (("draw", "day"), volume)}, coords={"draw": np.arange(draws), "day": days_all})
    _units(data)
    _units(curves)
    return data, curves, None, []
