"""Figures of a study's page: slices of maps and their errors, shares of reasons, curves with fits, course over visits.

Colours are those of the report's figures: viridis and cividis for maps, Okabe and Ito for lines and bars, which differ
in lightness, dashes and hatches, too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patheffects import withStroke

from biomodel.figure_maps import CUTS, OPPOSITE, OUTSIDE, UNMEASURED, outline
from biomodel.figures import DARK, WIDTH, styled
from biomodel.imaging.voxelfit import Code
from biomodel.quantify.maps import Curve, Map, VisitMaps
from biomodel.quantify.quantities import REASONS, export_units, spoken_units

__all__ = ["Scale", "course", "curves", "reasons", "scales", "shares", "slices", "volume"]

#: Maps beside each other, and slices below each other.
COLUMNS, SLICES = 4, 3
#: Width of organ shown around the tumour, mm.
MARGIN = 12.0
#: Colour and hatch of each reason, from good to worse.
_LOOKS = {
    Code.FITTED: ("#B9D6EA", ""),
    Code.AT_BOUND: ("#E69F00", "//"),
    Code.NOT_CONVERGED: ("#CC79A7", "\\\\"),
    Code.NO_ENHANCEMENT: ("#F0E442", ".."),
    Code.NO_SIGNAL: ("#009E73", "xx"),
    Code.SATURATED: ("#D55E00", "++"),
    Code.NOT_FINITE: ("#444444", ""),
    Code.OUTSIDE: ("#FFFFFF", ""),
}


@dataclass(frozen=True)
class Scale:
    """How the values of one quantity are shown, the same at all visits.

    Attributes
    ----------
    factor : float
        From the map's units to those shown.
    units : str
        As printed.
    low, high, error : float
        Ends of the colours of values, and upper end of those of errors, in the units shown.
    """

    factor: float
    units: str
    low: float
    high: float
    error: float

    def label(self, name: str) -> str:
        """Return name and units."""
        return f"{name} ({self.units})" if self.units else name


def volume(visit: VisitMaps) -> float | None:
    """Return the volume of the visit's tumour, cm³; None where none was looked for."""
    if visit.region is None:
        return None
    return float(np.count_nonzero(visit.region)) * visit.grid.voxel_volume / 1000


def scales(visits: Sequence[VisitMaps]) -> dict[str, Scale]:
    """Return how each quantity is shown: fractions in mL/100 mL, small numbers in thousandths."""
    found = {}
    for name in dict.fromkeys(name for visit in visits for name in visit.maps):
        maps = [(visit, visit.maps[name]) for visit in visits if name in visit.maps]
        units, factor = export_units(name, maps[0][1].units)
        within = [one.values[_bool(visit.organ) & np.isfinite(one.values)] for visit, one in maps]
        tumour = [one.values[_bool(visit.region) & np.isfinite(one.values)] for visit, one in maps
                  if visit.region is not None]  # fmt: skip
        low, high = _ends(_joined(within), _joined(tumour))
        spread = [(visit, one.sd) for visit, one in maps if one.sd is not None]
        every = [sd[_bool(visit.organ) & np.isfinite(sd)] for visit, sd in spread]
        there = [sd[_bool(visit.region) & np.isfinite(sd)] for visit, sd in spread if visit.region is not None]
        error = max(
            (float(np.quantile(part, 0.95)) for part in (_joined(every), _joined(there)) if part.size), default=0.0
        )
        printed = spoken_units(units)
        if 0 < max(abs(low), abs(high)) * factor < 0.05:
            factor, printed = factor * 1000, f"10⁻³ {printed}".strip()
        found[name] = Scale(factor, printed, low * factor, high * factor, (error or 1.0) * factor)
    return found


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([*parts, np.empty(0, np.float32)])


def _bool(mask: np.ndarray | None) -> np.ndarray:
    return np.asarray(mask, bool)


def _ends(organ: np.ndarray, tumour: np.ndarray) -> tuple[float, float]:
    """Ends of a colour scale: 1 and 99 % of the organ, widened to 2 and 98 % of the tumour; from 0 where that fits."""
    if not organ.size:
        return 0.0, 1.0
    low, high = (float(end) for end in np.quantile(organ, [0.01, 0.99]))
    if tumour.size:
        a, b = (float(end) for end in np.quantile(tumour, [0.02, 0.98]))
        low, high = min(low, a), max(high, b)
    if 0 <= low < 0.5 * high:
        low = 0.0
    return (low, high) if high > low else (low - 0.5, low + 0.5)


# --- slices -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _View:
    """Which slices are shown and how they lie on paper."""

    normal: int
    name: str
    places: tuple[int, ...]
    extent: tuple[float, float, float, float]
    limits: tuple[tuple[float, float], tuple[float, float]]
    letters: tuple[str, str, str, str]  # left, right, bottom, top

    def of(self, values: np.ndarray, place: int) -> np.ndarray:
        return np.take(values, place, self.normal)


def _view(visit: VisitMaps, around: np.ndarray) -> _View:
    """Slices through the tumour, or through the organ where there is none; cut to what `around` marks."""
    shape, steps = visit.grid.shape, visit.grid.spacing
    flat = [axis for axis in range(3) if shape[axis] == 1]
    normal = flat[0] if flat and 0 not in flat else 0
    name, up, across, top, left = CUTS[normal]
    codes = nib.aff2axcodes(visit.grid.affine)[::-1]  # growing z, y, x
    edges = [(-0.5 * step, (count - 0.5) * step) for count, step in zip(shape, steps, strict=True)]
    limits = []
    for axis, wanted, at_end in ((across, left, False), (up, top, True)):
        inside = np.flatnonzero(around.any(axis=tuple(other for other in range(3) if other != axis)))
        low, high = edges[axis]
        if inside.size:
            low = max(low, (inside[0] - 0.5) * steps[axis] - MARGIN)
            high = min(high, (inside[-1] + 0.5) * steps[axis] + MARGIN)
        # The wanted letter stands where the axis grows to, or the axis is drawn the other way round.
        limits.append((low, high) if (codes[axis] == wanted) == at_end else (high, low))
    letters = []
    for axis, (low, high) in zip((across, up), limits, strict=True):
        grows_to = codes[axis] if high > low else OPPOSITE[codes[axis]]
        letters += [OPPOSITE[grows_to], grows_to]
    region = visit.region if visit.region is not None and np.any(visit.region) else visit.organ
    area = _bool(region).sum(axis=tuple(other for other in range(3) if other != normal))
    share = np.cumsum(area) / max(area.sum(), 1)
    chosen = {int(np.searchsorted(share, wanted)) for wanted in (0.15, 0.85)} | {int(area.argmax())}
    places = tuple(sorted(chosen, reverse=True))[:SLICES]
    return _View(normal, name, places, (*edges[across], *edges[up]), (limits[0], limits[1]), tuple(letters))  # type: ignore[arg-type]


@styled
def slices(visit: VisitMaps, shown: Mapping[str, Scale], around: np.ndarray | None = None) -> list[tuple[Figure, str]]:
    """Draw maps and, below, their errors: some maps to a figure, with the name of the cut.

    Parameters
    ----------
    visit
    shown
        Scale of each map, for its order, too.
    around
        Bool (z, y, x): what must be in the picture; the visit's tumour by default.
    """
    if around is None or not np.any(around):
        around = visit.region if visit.region is not None and np.any(visit.region) else visit.organ
    view = _view(visit, _bool(around))
    names = [name for name in shown if name in visit.maps]
    parts = [names[start : start + COLUMNS] for start in range(0, len(names), COLUMNS)]
    return [(_panels(visit, part, shown, view), view.name) for part in parts]


def _panels(visit: VisitMaps, names: Sequence[str], shown: Mapping[str, Scale], view: _View) -> Figure:
    (left, right), (bottom, top) = view.limits
    ratio = min(max(abs(top - bottom) / abs(right - left), 0.35), 1.4)
    errors = any(visit[name].sd is not None for name in names)
    rows, width = len(view.places) + errors, WIDTH / COLUMNS
    size = (WIDTH, rows * (width * 0.93 * ratio + 0.05) + (1.15 if errors else 0.65))
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=size, layout=layout)
    # Where there are fewer maps, columns stay empty: all panels of a page have one size.
    grid = figure.subplots(rows, COLUMNS, squeeze=False)
    for axes in grid[:, len(names) :].ravel():
        axes.axis("off")
    middle = view.places[len(view.places) // 2]
    for column, name in enumerate(names):
        one, scale = visit[name], shown[name]
        panels = grid[:, column]
        panels[0].set_title(name, fontsize=8.5)
        values = matplotlib.colormaps["viridis"]
        for axes, place in zip(panels, view.places, strict=False):
            image = _draw(axes, one.values, visit, view, place, values, scale, (scale.low, scale.high))
            if column == 0:
                axes.set_ylabel(f"slice {place + 1} of {visit.grid.shape[view.normal]}", fontsize=7)
        _bar(
            figure, image, panels[: len(view.places)], scale.label(name), one.values[_bool(visit.organ)] * scale.factor
        )
        if not errors:
            continue
        if one.sd is None:
            panels[-1].axis("off")
            panels[-1].text(0.5, 0.5, "no error\nknown", ha="center", va="center", transform=panels[-1].transAxes)
            continue
        narrow = matplotlib.colormaps["cividis"]
        image = _draw(panels[-1], one.sd, visit, view, middle, narrow, scale, (0.0, scale.error))
        if column == 0:
            panels[-1].set_ylabel(f"error (sd),\nslice {middle + 1}", fontsize=7)
        _bar(figure, image, panels[-1:], f"sd, {scale.units}" if scale.units else "sd",
             one.sd[_bool(visit.organ)] * scale.factor)  # fmt: skip
    _mark(grid[0, 0], view)
    return figure


def _draw(
    axes: Axes, values: np.ndarray, visit: VisitMaps, view: _View, place: int, colours: Colormap, scale: Scale,
    ends: tuple[float, float],
) -> AxesImage:  # fmt: skip
    axes.set_facecolor(OUTSIDE)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(visible=True, linewidth=0.6, color="0.4")
    organ = view.of(_bool(visit.organ), place)
    plain = matplotlib.colors.ListedColormap([UNMEASURED])
    layers = {"extent": view.extent, "origin": "lower", "interpolation": "nearest"}
    axes.imshow(np.ma.masked_array(np.zeros(organ.shape), ~organ), cmap=plain, **layers)  # type: ignore[arg-type]
    part = view.of(values, place) * scale.factor
    shown = np.ma.masked_array(part, ~np.isfinite(part))
    image = axes.imshow(shown, cmap=colours, vmin=ends[0], vmax=ends[1], **layers)  # type: ignore[arg-type]
    axes.set_xlim(*view.limits[0])
    axes.set_ylim(*view.limits[1])
    if visit.region is not None:
        region = view.of(_bool(visit.region), place)
        if region.any():
            edges = list(outline(region, view.extent))
            axes.add_collection(LineCollection(edges, colors="black", linewidths=2.2, capstyle="round"))
            axes.add_collection(LineCollection(edges, colors="white", linewidths=0.9, capstyle="round"))
    return image


def _bar(figure: Figure, image: AxesImage, panels: np.ndarray, label: str, values: np.ndarray) -> None:
    """A colour bar below panels, pointed at an end that values lie beyond."""
    low, high = image.get_clim()
    finite = values[np.isfinite(values)]
    under, over = bool((finite < low).any()), bool((finite > high).any())
    extend = "both" if under and over else ("min" if under else ("max" if over else "neither"))
    bar = figure.colorbar(image, ax=list(panels), location="bottom", shrink=0.86, aspect=14, pad=0.02, extend=extend)
    bar.set_label(label, fontsize=7, labelpad=1.5)
    bar.ax.tick_params(labelsize=6.5, pad=1.5)
    bar.ax.locator_params(nbins=4)
    bar.outline.set_linewidth(0.5)


def _mark(axes: Axes, view: _View) -> None:
    """Scale bar and the letters of the patient's sides."""
    halo = [withStroke(linewidth=1.6, foreground="black")]
    corners = ((0.03, 0.5, "left", "center"), (0.97, 0.5, "right", "center"), (0.5, 0.02, "center", "bottom"),
               (0.5, 0.98, "center", "top"))  # fmt: skip
    for text, (x, y, across, up) in zip(view.letters, corners, strict=True):
        axes.text(x, y, text, ha=across, va=up, color="white", fontsize=6.5, path_effects=halo,
                  transform=axes.transAxes)  # fmt: skip
    (start, stop), (bottom, top) = view.limits
    length = max((n for n in (1, 2, 5, 10, 20, 50, 100) if n <= 0.4 * abs(stop - start)), default=1)
    x, y = start + 0.07 * (stop - start), bottom + 0.07 * (top - bottom)
    wide = [withStroke(linewidth=3.8, foreground="black")]
    ends = [x, x + np.sign(stop - start) * length]
    axes.plot(ends, [y, y], color="white", linewidth=2.2, solid_capstyle="butt", path_effects=wide)
    axes.text(x, y + 0.04 * (top - bottom), f"{length} mm", ha="left", va="bottom", color="white", fontsize=6.5,
              path_effects=halo)  # fmt: skip


# --- reasons ----------------------------------------------------------------------------------------------------------


def shares(one: Map, mask: np.ndarray) -> dict[Code, float]:
    """Return the share of each reason among the voxels of a mask."""
    if one.code is None or not mask.any():
        return {}
    found, count = np.unique(one.code[mask], return_counts=True)
    return {Code(int(c)): float(n / mask.sum()) for c, n in zip(found, count, strict=True)}


@styled
def reasons(visits: Sequence[VisitMaps]) -> Figure | None:
    """Draw the shares of reasons in organ and tumour as bars; None where no map has reasons."""
    told = [visit for visit in visits if any(one.code is not None for one in visit.maps.values())]
    if not told:
        return None
    lines = [sum(one.code is not None for one in visit.maps.values()) for visit in told]
    figure = Figure(figsize=(WIDTH, 0.2 * sum(lines) + 0.42 * len(told) + 0.75), layout="constrained")
    grid = figure.subplots(len(told), 2, squeeze=False, sharex=True, height_ratios=lines)
    used: set[Code] = set()
    for row, visit in zip(grid, told, strict=True):
        names = [name for name, one in visit.maps.items() if one.code is not None]
        for axes, (where, mask) in zip(row, (("organ", visit.organ), ("tumour", visit.region)), strict=True):
            axes.set_title(f"visit {visit.number}, {where}", loc="left")
            axes.set_xlim(0, 100)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names if where == "organ" else [""] * len(names))
            axes.tick_params(axis="y", length=0)
            if mask is None or not np.any(mask):
                axes.text(50, (len(names) - 1) / 2, "no tumour", ha="center", va="center")
                continue
            for height, name in enumerate(names):
                found, start = shares(visit[name], _bool(mask)), 0.0
                for code in (code for code in _LOOKS if code in found):
                    colour, hatch = _LOOKS[code]
                    axes.barh(height, 100 * found[code], left=start, height=0.72, color=colour, hatch=hatch,
                              edgecolor="0.25", linewidth=0.5)  # fmt: skip
                    start += 100 * found[code]
                    used.add(code)
    for axes in grid[-1]:
        axes.set_xlabel("share of voxels (%)")
    keys = [
        matplotlib.patches.Patch(facecolor=colour, hatch=hatch, edgecolor="0.25", linewidth=0.5, label=REASONS[code])
        for code, (colour, hatch) in _LOOKS.items()
        if code in used
    ]
    figure.legend(handles=keys, loc="outside lower center", ncols=1 if len(keys) < 3 else 2)
    return figure


# --- curves -----------------------------------------------------------------------------------------------------------


@styled
def curves(shown: Sequence[Curve]) -> Figure:
    """Draw measured and fitted curves of voxels, with their residuals below."""
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(
        figsize=(WIDTH * columns / 3 + (0.4 if columns < 3 else 0), 2.35 * rows + 0.35), layout="constrained"
    )
    grid = figure.add_gridspec(2 * rows, columns, height_ratios=[3, 1] * rows)
    for place, curve in enumerate(shown):
        row, column = divmod(place, columns)
        top = figure.add_subplot(grid[2 * row, column])
        below = figure.add_subplot(grid[2 * row + 1, column], sharex=top)
        order = np.argsort(curve.x, kind="stable")
        top.plot(curve.x, curve.measured, "o", color="black", markersize=2.6, markerfacecolor="white",
                 markeredgewidth=0.8, label="measured")  # fmt: skip
        top.plot(curve.x[order], curve.fitted[order], color="#D55E00", label="fit")
        z, y, x = curve.voxel
        top.set_title(f"{curve.title}\nvoxel x {x + 1}, y {y + 1}, z {z + 1}", fontsize=7.5, loc="left")
        top.set_ylabel(curve.y_label, fontsize=7)
        top.tick_params(axis="x", labelbottom=False)
        residual = curve.measured - curve.fitted
        below.axhline(0, color="0.5", linewidth=0.7)
        below.vlines(curve.x, 0, residual, color=DARK, linewidth=1.0)
        reach = float(np.nanmax(np.abs(residual), initial=0.0)) * 1.15 or 1.0
        below.set_ylim(-reach, reach)
        below.set_ylabel("residual", fontsize=7)
        below.set_xlabel(curve.x_label, fontsize=7)
        for axes in (top, below):
            axes.tick_params(labelsize=6.5)
        if place == 0:
            figure.legend(*top.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


# --- course -----------------------------------------------------------------------------------------------------------


@styled
def course(visits: Sequence[VisitMaps], shown: Mapping[str, Scale]) -> Figure:
    """Draw the tumour's volume and each quantity's median and quartiles in it, over the days of the visits."""
    names = [
        name for name in shown
        if any(name in visit.maps and visit.region is not None and np.any(visit.region) for visit in visits)
    ]  # fmt: skip
    columns = min(COLUMNS, len(names) + 1)
    rows = -(-(len(names) + 1) // columns)
    figure = Figure(figsize=(WIDTH, 1.55 * rows + 0.1), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    days = [visit.day for visit in visits]
    panels = list(grid.ravel())
    sizes = [(visit.day, volume(visit)) for visit in visits]
    known = [(day, size) for day, size in sizes if size is not None]
    panels[0].plot(*zip(*known, strict=True) if known else ([], []), "o-", color="black", markersize=4)
    panels[0].set_ylim(0, 1.15 * max([size for _, size in known] + [1e-3]))
    panels[0].set_title("tumour volume (cm³)")
    for axes, name in zip(panels[1:], names, strict=False):
        for visit in visits:
            if name not in visit.maps or visit.region is None:
                continue
            values = visit[name].values[_bool(visit.region)]
            values = values[np.isfinite(values)] * shown[name].factor
            if values.size:
                low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
                axes.plot([visit.day] * 2, [low, high], color=DARK, linewidth=2.4, solid_capstyle="butt")
                axes.plot(visit.day, middle, "o", color=DARK, markerfacecolor="white", markersize=4.5)
        axes.set_title(shown[name].label(name))
    for axes in panels[len(names) + 1 :]:
        axes.axis("off")
    margin = 0.12 * max(max(days) - min(days), 1.0)
    for axes in panels[: len(names) + 1]:
        axes.set_xlim(min(days) - margin, max(days) + margin)
        axes.set_xticks(days, [f"{day:g}" for day in days])
        axes.set_xlabel("day", fontsize=7)
    return figure
