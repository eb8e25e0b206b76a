"""`average`: one forecast from several models, each with as many draws as the data leave it (Bayesian model averaging).

Hoeting et al. 1999, Stat Sci 14:382, doi:10.1214/ss/1009212519: the predictive distribution is the mixture of the
models' own, weighted by their posterior probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from biomodel.errors import InputError
from biomodel.forecast import Forecast

__all__ = ["average"]


def average(forecasts: Sequence[Forecast], weights: Sequence[float] | np.ndarray, seed: int = 0) -> Forecast:
    """Mix the draws of several models' forecasts.

    Parameters
    ----------
    forecasts : sequence of Forecast
        Of the same patient, days and treatment, one for each model.
    weights : sequence of float
        Probability of each model, for instance ``compare(...).evidence_weights``; they are scaled to a sum of 1.
    seed : int
        For the choice of the draws.

    Returns
    -------
    Forecast
        With as many draws as the smallest of the forecasts. Each model gives its share of them, without repeats; the
        variable ``model`` (draw) says which. `fit` is that of the likeliest model, and a note names all.

    Raises
    ------
    InputError
        If numbers of forecasts and weights differ, weights are no probabilities, or the forecasts are of different
        patients, days or treatments.

    Examples
    --------
    >>> import numpy as np
    >>> average([], [])
    Traceback (most recent call last):
    ...
    biomodel.errors.InputError: average: 0 forecasts and 0 weights; expected one weight for each of at least one.
    """
    shares = np.asarray(weights, float)
    if not forecasts or shares.shape != (len(forecasts),):
        raise InputError(
            f"average: {len(forecasts)} forecasts and {shares.size} weights; expected one weight for each of at least "
            "one."
        )
    if not np.isfinite(shares).all() or (shares < 0).any() or shares.sum() <= 0:
        raise InputError(f"average: weights are {shares.tolist()}; expected numbers from 0 up that are not all 0.")
    shares = shares / shares.sum()
    _check(forecasts)
    count = min(f.draws for f in forecasts)
    rng = np.random.default_rng(np.random.SeedSequence([int(seed), 29]))
    # Each model's expected number of draws, the rest by chance: the mixture is unbiased, with less noise than draws
    # by chance alone.
    numbers = np.floor(shares * count).astype(int)
    rest = shares * count - numbers
    if (missing := count - numbers.sum()) > 0:
        numbers += np.bincount(rng.choice(len(shares), missing, p=rest / rest.sum()), minlength=len(shares))
    chosen = [np.sort(rng.choice(f.draws, n, replace=False)) for f, n in zip(forecasts, numbers, strict=True)]
    likeliest = forecasts[int(np.argmax(shares))]
    data, box = _joined([f.data.isel(draw=i) for f, i in zip(forecasts, chosen, strict=True)], forecasts)
    data["model"] = ("draw", np.repeat(np.arange(len(forecasts)), numbers))
    curves = [f.curves.isel(draw=i).drop_vars("draw") for f, i in zip(forecasts, chosen, strict=True)]
    joined = xr.concat(curves, "draw").assign_coords(draw=np.arange(count))
    for name in joined.data_vars:
        joined[name].attrs = dict(forecasts[0].curves[name].attrs)
    joined["day"].attrs = dict(forecasts[0].curves["day"].attrs)
    parts = ", ".join(f"{f.fit.model.label} ({w:.0%})" for f, w in zip(forecasts, shares, strict=True))
    notes = dict.fromkeys((f"Average of {len(forecasts)} models by their weights: {parts}.",
                           *(n for f, k in zip(forecasts, numbers, strict=True) if k for n in f.notes)))  # fmt: skip
    return Forecast(data, joined, likeliest.fit, likeliest.schedule, int(seed), box, tuple(notes))


def _check(forecasts: Sequence[Forecast]) -> None:
    first = forecasts[0]
    for other in forecasts[1:]:
        if other.fit.patient.fingerprint() != first.fit.patient.fingerprint():
            raise InputError("average: the forecasts are of different patients, or of different visits of one.")
        if other.schedule != first.schedule:
            raise InputError("average: the forecasts are under different treatments; forecast all under one.")
        days = (first.times, other.times), (first.curves["day"].values, other.curves["day"].values)
        if any(a.shape != b.shape or not np.array_equal(a, b) for a, b in days):
            raise InputError(
                f"average: the forecasts are for days {first.times.tolist()} and {other.times.tolist()}; forecast all "
                "for the same days, with the same curve_step."
            )


def _joined(parts: list[xr.Dataset], forecasts: Sequence[Forecast]) -> tuple[xr.Dataset, tuple | None]:
    """The chosen draws in one data set; maps on the smallest box that holds all models' boxes."""
    first = parts[0]
    if forecasts[0].box is None:
        found = xr.concat([p.drop_vars("draw") for p in parts], "draw", combine_attrs="override")
        box: tuple[slice, slice, slice] | None = None
    else:
        boxes = [f.box for f in forecasts if f.box is not None]
        z, y, x = (slice(min(b[a].start for b in boxes), max(b[a].stop for b in boxes)) for a in range(3))
        box = (z, y, x)
        domain = forecasts[0].fit.patient.domain.crop(box)
        maps = []
        for part, own in zip(parts, boxes, strict=True):
            values = part["cell_fraction"].values
            whole = np.zeros((*values.shape[:2], *domain.shape), np.float32)
            at = tuple(slice(o.start - b.start, o.stop - b.start) for o, b in zip(own, box, strict=True))
            whole[(slice(None), slice(None), *at)] = values
            maps.append(whole)
        cells = np.concatenate(maps)
        visible = float(first.attrs["visible_fraction"])
        share = np.stack([(cells[:, t] >= visible).mean(0) for t in range(cells.shape[1])]).astype(np.float32)
        found = xr.Dataset(
            {"cell_fraction": (("draw", "time", "z", "y", "x"), cells),
             "probability": (("time", "z", "y", "x"), share),
             **{n: (("draw", "time"), np.concatenate([p[n].values for p in parts]))
                for n in ("volume", "cells", "longest_diameter")},
             "mask": (("z", "y", "x"), domain.mask),
             "affine": (("row", "column"), np.asarray(domain.affine))},
            coords={"time": first["time"], **{k: (k, v) for k, v in domain.coords.items()}},
        )  # fmt: skip
    found = found.assign_coords(draw=np.arange(found.sizes["draw"]))
    found.attrs = dict(first.attrs)
    for name in found.variables:
        if name in first.variables:
            found[name].attrs = dict(first[name].attrs)
    return found, box
