"""Slices of a forecast beside what was seen: observed cell fraction, median, spread, probability of tumour."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke

from biomodel.figures import WIDTH, styled
from biomodel.results import Results

__all__ = ["maps"]

#: Rows in one figure: as many as fit on a printed page.
ROWS = 4
#: Width of organ shown around the tumour, mm.
MARGIN = 8.0
OUTSIDE, UNMEASURED = "#FFFFFF", "#B4B4B4"
OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))
#: For a cut across the grid's z, y or x: its name, the grid axes drawn up and across, and what is up and on the left
#: (radiological convention).
CUTS = (("axial", 1, 2, "A", "R"), ("coronal", 0, 2, "S", "R"), ("sagittal", 0, 1, "S", "A"))


@dataclass(frozen=True, eq=False)
class _Cut:
    """How a slice is laid out on paper: everything that all panels share."""

    normal: int
    name: str
    up: int
    across: int
    extent: tuple[float, float, float, float]
    limits: tuple[tuple[float, float], tuple[float, float]]
    letters: tuple[str, str, str, str]  # left, right, top, bottom


@dataclass(frozen=True, eq=False)
class _Row:
    day: float
    label: str
    observed: np.ndarray | None
    region: np.ndarray | None
    median: np.ndarray
    spread: np.ndarray
    probability: np.ndarray
    mask: np.ndarray


def _cut(results: Results) -> _Cut:
    data, seen = results.data(), results.data("observations")
    shape = tuple(data.sizes[axis] for axis in "zyx")
    # A grid with one flat axis is seen along that axis; anything else from below, as in the clinic.
    flat = [axis for axis in range(3) if shape[axis] == 1]
    normal = flat[0] if flat and 0 not in flat else 0
    name, up, across, top, left = CUTS[normal]
    steps = results.summary["patient"]["grid"]["spacing_mm"]
    places = [data[axis].values for axis in "zyx"]
    edges = [(float(c[0]) - s / 2, float(c[0]) + s * (len(c) - 0.5)) for c, s in zip(places, steps, strict=True)]
    codes = nib.aff2axcodes(data["affine"].values)[::-1]  # growing z, y, x
    shown = np.any(data["probability"].values >= 0.05, axis=0) | seen["region"].values.astype(bool).any(axis=0)
    limits = []
    for axis, wanted, at_end in ((across, left, False), (up, top, True)):
        inside = np.flatnonzero(shown.any(axis=tuple(other for other in range(3) if other != axis)))
        low, high = edges[axis]
        if inside.size:
            low = max(low, float(places[axis][inside[0]]) - steps[axis] / 2 - MARGIN)
            high = min(high, float(places[axis][inside[-1]]) + steps[axis] / 2 + MARGIN)
        # The wanted letter stands where the axis grows to, or the axis is drawn the other way round.
        limits.append((low, high) if (codes[axis] == wanted) == at_end else (high, low))
    letters = []
    for axis, (low, high) in zip((across, up), limits, strict=True):
        grows_to = codes[axis] if high > low else OPPOSITE[codes[axis]]
        letters += [OPPOSITE[grows_to], grows_to]
    return _Cut(normal, name, up, across, (*edges[across], *edges[up]), (limits[0], limits[1]),
                (letters[0], letters[1], letters[3], letters[2]))  # fmt: skip


def _rows(results: Results, cut: _Cut) -> Iterator[_Row]:
    data, seen = results.data(), results.data("observations")
    mask, axis = data["mask"].values.astype(bool), "zyx"[cut.normal]
    last = results.summary["calibration"]["last_day"]
    visits = {round(float(day), 6): index for index, day in enumerate(seen["day"].values)}
    for time, day in enumerate(data["time"].values):
        index = visits.get(round(float(day), 6))
        probability = data["probability"].values[time]
        region = None if index is None else seen["region"].values[index].astype(bool)
        # Through the slice with most tumour: as it was seen, or else as it is expected.
        amount = probability * mask if region is None or not region.any() else region
        place = int(amount.sum(axis=tuple(other for other in range(3) if other != cut.normal)).argmax())
        draws = data["cell_fraction"].isel({"time": time, axis: place}).transpose("draw", ...).values
        low, median, high = np.quantile(draws, [0.05, 0.5, 0.95], axis=0)
        observed = None if index is None else np.take(seen["cell_fraction_observed"].values[index], place, cut.normal)
        if observed is not None and np.isnan(observed).all():
            observed = None
        what = "" if index is None else f"visit {int(seen['visit'].values[index])}, "
        when = "used by the fit" if day <= last + 1e-9 else ("seen later" if index is not None else "not observed")
        yield _Row(
            float(day), f"day {day:g}\n{what}{when}\n{axis} = {float(data[axis].values[place]):.4g} mm", observed,
            None if region is None else np.take(region, place, cut.normal), median, high - low,
            np.take(probability, place, cut.normal), np.take(mask, place, cut.normal),
        )  # fmt: skip


def outline(region: np.ndarray, extent: tuple[float, float, float, float]) -> np.ndarray:
    """Return the edges (n, 2, 2) of the voxels of a region (up, across), in mm: exactly as drawn, not smoothed."""
    filled = np.pad(region, 1)
    rows, columns = region.shape
    x, y = np.linspace(*extent[:2], columns + 1), np.linspace(*extent[2:], rows + 1)
    i, j = np.nonzero(filled[1:-1, 1:] != filled[1:-1, :-1])
    upright = np.stack([np.stack([x[j], y[i]], -1), np.stack([x[j], y[i + 1]], -1)], 1)
    i, j = np.nonzero(filled[1:, 1:-1] != filled[:-1, 1:-1])
    level = np.stack([np.stack([x[j], y[i]], -1), np.stack([x[j + 1], y[i]], -1)], 1)
    return np.concatenate([upright, level])


def _mark(axes: Axes, cut: _Cut) -> None:
    """Scale bar and the letters of the patient's sides."""
    halo = [withStroke(linewidth=1.6, foreground="black")]
    style = {"color": "white", "fontsize": 6.5, "path_effects": halo, "transform": axes.transAxes}
    for letter, x, y, across, up in zip(
        cut.letters, (0.02, 0.98, 0.5, 0.5), (0.5, 0.5, 0.98, 0.02), ("left", "right", "center", "center"),
        ("center", "center", "top", "bottom"), strict=True,
    ):  # fmt: skip
        axes.text(x, y, letter, ha=across, va=up, **style)  # type: ignore[arg-type]
    (start, stop), (bottom, upper) = cut.limits
    width = abs(stop - start)
    length = max((n for n in (1, 2, 5, 10, 20, 50, 100) if n <= 0.4 * width), default=1)
    x, y = start + 0.06 * (stop - start), bottom + 0.07 * (upper - bottom)
    bar = [x, x + np.sign(stop - start) * length]
    axes.plot(bar, [y, y], color="white", linewidth=2.2, solid_capstyle="butt", path_effects=[withStroke(
        linewidth=3.8, foreground="black")])  # fmt: skip
    axes.text(bar[0], y + 0.035 * (upper - bottom), f"{length} mm", ha="left", va="bottom",
              color="white", fontsize=6.5, path_effects=halo)  # fmt: skip


def _show(axes: Axes, values: np.ndarray | None, row: _Row, cut: _Cut, colours: Colormap, top: float):
    axes.set_facecolor(OUTSIDE)
    axes.set_xlim(*cut.limits[0])
    axes.set_ylim(*cut.limits[1])
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.6, color="0.4")
    organ = np.ma.masked_array(np.zeros(row.mask.shape), ~row.mask)
    plain = matplotlib.colors.ListedColormap([UNMEASURED])
    axes.imshow(organ, extent=cut.extent, origin="lower", cmap=plain, interpolation="nearest")
    image = None
    if values is not None:
        image = axes.imshow(np.ma.masked_array(values, ~row.mask | ~np.isfinite(values)), extent=cut.extent,
                            origin="lower", cmap=colours, vmin=0.0, vmax=top, interpolation="nearest")  # fmt: skip
    axes.set_xlim(*cut.limits[0])
    axes.set_ylim(*cut.limits[1])
    if row.region is not None and row.region.any():
        edges = outline(row.region, cut.extent)
        axes.add_collection(LineCollection(list(edges), colors="black", linewidths=2.4, capstyle="round"))
        axes.add_collection(LineCollection(list(edges), colors="white", linewidths=1.0, capstyle="round"))
    return image


def _figure(rows: list[_Row], cut: _Cut, top: float, widest: float) -> Figure:
    (left, right), (bottom, upper) = cut.limits
    ratio = min(max(abs(upper - bottom) / abs(right - left), 0.35), 1.6)
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(WIDTH, len(rows) * (1.58 * ratio + 0.06) + 0.75), layout=layout)
    grid = figure.subplots(len(rows), 4, squeeze=False)
    fraction, narrow = matplotlib.colormaps["viridis"], matplotlib.colormaps["cividis"]
    titles = ("observed", "forecast, median", "spread (90 % interval)", "probability of tumour")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    for panels, row in zip(grid, rows, strict=True):
        observed = None if row.observed is None or row.region is None else np.where(row.region, row.observed, np.nan)
        _show(panels[0], observed, row, cut, fraction, top)
        if row.region is None:
            panels[0].text(0.5, 0.5, "not observed", ha="center", va="center", transform=panels[0].transAxes)
        elif not row.region.any():
            panels[0].text(0.5, 0.5, "no tumour seen", ha="center", va="center", transform=panels[0].transAxes)
        median = _show(panels[1], row.median, row, cut, fraction, top)
        spread = _show(panels[2], row.spread, row, cut, narrow, widest)
        chance = _show(panels[3], row.probability, row, cut, narrow, 1.0)
        panels[0].set_ylabel(row.label, fontsize=7)
        _mark(panels[0], cut)
    for image, axes, label in (
        (median, grid[:, :2], "cell fraction"), (spread, grid[:, 2], "width, cell fraction"),
        (chance, grid[:, 3], "probability"),
    ):  # fmt: skip
        bar = figure.colorbar(image, ax=list(np.ravel(axes)), location="bottom", shrink=0.8, aspect=18, pad=0.02)
        bar.set_label(label, fontsize=7)
        bar.ax.tick_params(labelsize=6.5)
        bar.outline.set_linewidth(0.5)
    return figure


@styled
def maps(results: Results) -> list[tuple[Figure, str]]:
    """Slices at every forecast day, some rows to a figure, with the name of the cut. All share their colour scales."""
    cut = _cut(results)
    rows = list(_rows(results, cut))
    shown = [np.max(row.median) for row in rows]
    shown += [np.max(row.observed[row.region]) for row in rows
              if row.observed is not None and row.region is not None and row.region.any()]  # fmt: skip
    top = float(np.clip(np.ceil(max(shown) * 10) / 10, 0.1, 1.0))
    widest = max(0.05, float(np.ceil(max(row.spread.max() for row in rows) * 20) / 20))
    parts = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    return [(_figure(part, cut, top, widest), cut.name) for part in parts]
