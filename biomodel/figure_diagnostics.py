"""Figures of checks: ranks of simulation-based calibration, coverage, PIT, replicated data, and shrinkage by group."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from scipy.stats import binom

from biomodel.calibration.hierarchy import Hierarchy
from biomodel.diagnostics_forecasts import Coverage
from biomodel.diagnostics_predictive import PredictiveCheck
from biomodel.diagnostics_ranks import RankStatistics
from biomodel.errors import InputError
from biomodel.figures import BROWN, DARK, GREY, LINES, WIDTH, styled
from biomodel.parameters import LogNormal
from biomodel.report_blocks import pretty_units

__all__ = ["coverage_curves", "pit_histogram", "rank_differences", "replicates", "shrinkage"]

COLUMNS = 4
#: Ratio of largest to smallest value from which an axis is logarithmic.
WIDE = 6.0


@styled
def rank_differences(studies: Mapping[str, RankStatistics], level: float = 0.95) -> Figure:
    """Distribution function of the ranks less the uniform one, with its simultaneous band; a row for each study.

    Parameters
    ----------
    studies : mapping of str to RankStatistics
        By what is to be read beside the row (the method).
    level : float
        Of the band, over all ranks together.

    Notes
    -----
    Right posteriors stay in the band. A rise, then a fall below: posteriors too narrow; first below, then above: too
    wide; all above: draws too high; all below: too low.
    """
    if not studies:
        raise InputError("rank_differences: no studies.")
    columns = max(len(s.names) for s in studies.values())
    figure = Figure(figsize=(max(WIDTH * columns / COLUMNS, 3.5), 1.7 * len(studies) + 0.35), layout="constrained")
    panels = figure.subplots(len(studies), columns, squeeze=False, sharey="row")
    for axes_row, (label, study) in zip(panels, studies.items(), strict=True):
        at = np.concatenate(([0.0], study.at, [1.0]))
        low, high = (np.concatenate(([0.0], b, [1.0])) - at for b in study.band(level))
        for axes, name, curve, p, q in zip(axes_row, study.names, study.ecdf, study.chi_squared, study.ecdf_p,
                                           strict=False):  # fmt: skip
            axes.fill_between(at, low, high, step="mid", color="0.88", lw=0)
            axes.axhline(0, color=GREY, lw=0.6)
            inside = q > 1 - level
            axes.plot(at, np.concatenate(([0.0], curve, [1.0])) - at, drawstyle="steps-mid",
                      color=DARK if inside else BROWN)  # fmt: skip
            axes.set_title(f"{name}\nχ² p {p:.2g}, ECDF p {q:.2g}", fontsize=6.5)
            axes.set_xlim(0, 1)
            axes.set_xticks([0, 0.5, 1], ["0", "½", "1"])
        for axes in axes_row[len(study.names) :]:
            axes.remove()
        axes_row[0].set_ylabel(f"{label}\n{study.replications} × {study.draws} draws\nECDF − uniform", fontsize=7)
    figure.supxlabel("rank of the truth among the draws, as a share", fontsize=7.5)
    return figure


@styled
def coverage_curves(found: Mapping[str, Coverage]) -> Figure:
    """Share of values seen inside central intervals against their nominal level, with exact binomial bands.

    Parameters
    ----------
    found : mapping of str to Coverage
        Best at many levels: ``coverage(pits, biomodel.diagnostics_forecasts.CURVE)``. One band is drawn for each number
        of forecasts.
    """
    figure = Figure(figsize=(3.4, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, lw=0.6)
    drawn: set[int] = set()
    for (label, c), (colour, dashes) in zip(found.items(), LINES, strict=False):
        if c.n not in drawn:
            axes.fill_between(c.levels, c.low, c.high, color="0.85", alpha=0.7, lw=0,
                              label=f"{c.band:.0%} band, n = {c.n}")  # fmt: skip
            drawn.add(c.n)
        axes.plot(c.levels, c.observed, color=colour, ls=dashes, label=label)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1.0))
    axes.set_xlabel("central interval")
    axes.set_ylabel("holds the value seen")
    axes.legend(loc="upper left")
    return figure


@styled
def pit_histogram(pits: np.ndarray, bins: int = 10) -> Figure:
    """PIT values (n,) in bins, with the central 95 % of each bin's count under uniform ones.

    A U tells of forecasts too sure, a hump of ones too wide, a slope of a bias.
    """
    pits = np.asarray(pits, float)
    if not len(pits):
        raise InputError("pit_histogram: no values.")
    figure = Figure(figsize=(3.4, 2.2), layout="constrained")
    axes = figure.subplots()
    low, high = binom.ppf([0.025, 0.975], len(pits), 1 / bins)
    axes.axhspan(low, high, color="0.88", lw=0)
    axes.axhline(len(pits) / bins, color=GREY, lw=0.6)
    axes.hist(pits, np.linspace(0, 1, bins + 1).tolist(), histtype="step", color=DARK, lw=1.4)
    axes.set_xlim(0, 1)
    axes.set_xlabel("forecast's probability of less than was seen (PIT)")
    axes.set_ylabel("forecasts")
    return figure


@styled
def replicates(check: PredictiveCheck) -> Figure:
    """Each statistic of the data (line; its spread over draws where it depends on them) among its replicates (bars)."""
    columns = min(COLUMNS, len(check.names))
    rows = -(-len(check.names) // columns)
    figure = Figure(figsize=(WIDTH * columns / COLUMNS, 1.5 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, name, unit, seen, again, p in zip(panels, check.names, check.units, check.observed, check.replicated,
                                                check.p, strict=False):  # fmt: skip
        axes.hist(again, 30, color=DARK, alpha=0.45)
        axes.axvline(seen.mean(), color=BROWN, lw=1.6)
        if np.ptp(seen) > 0:
            axes.axvspan(*np.quantile(seen, [0.05, 0.95]), color=BROWN, alpha=0.18, lw=0)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        unit = "" if unit == "1" else f", {pretty_units(unit)}"
        axes.set_title(f"{name}{unit}\np = {p:.2g}", fontsize=7)
    for axes in panels[len(check.names) :]:
        axes.remove()
    return figure


@styled
def shrinkage(hierarchy: Hierarchy) -> Figure:
    """Medians of each group by itself (hollow) and partially pooled (filled, with 90 % interval), and over all groups.

    The arrow from one to the other is what the group took from the others; the number at the right is the share of the
    pooled mean that came from them.
    """
    names, groups = hierarchy.names, hierarchy.groups
    columns = min(2, len(names))
    rows = -(-len(names) // columns)
    height = (0.2 * len(groups) + 0.75) * rows + 0.3
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    table = hierarchy.table()
    for axes, name in zip(panels, names, strict=False):
        mine = [r for r in table if r["name"] == name]
        axes.axvline(mine[0]["overall"], color=GREY, lw=0.8, ls="--", label="over all groups")
        for y, r in enumerate(mine):
            axes.plot([r["low"], r["high"]], [y, y], color=DARK, lw=1.2, label="90 % interval" if y == 0 else None)
            axes.annotate("", (r["median"], y), (r["own"], y - 0.28),
                          arrowprops={"arrowstyle": "->", "color": BROWN, "lw": 0.9, "shrinkA": 2, "shrinkB": 2})
            axes.text(1.01, y, f"{r['pooled']:.0%}", transform=axes.get_yaxis_transform(), va="center", fontsize=6.5,
                      color=BROWN)  # fmt: skip
        axes.plot([r["own"] for r in mine], np.arange(len(mine)) - 0.28, "o", mfc="w", mec=BROWN, ms=4.5, ls="none",
                  label="by itself")  # fmt: skip
        axes.plot([r["median"] for r in mine], np.arange(len(mine)), "o", color=DARK, ms=5, ls="none",
                  label="partially pooled")  # fmt: skip
        reach = max(r["high"] for r in mine) / min(r["low"] for r in mine)
        if isinstance(hierarchy.overall.parameters[name].prior, LogNormal) and reach > WIDE:
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(lambda x, _: f"{x:.2g}" if f"{x:e}"[0] in "235" else "")
            axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.tick_params(axis="x", which="minor", labelsize=6.5)
        units = pretty_units(mine[0]["units"])
        axes.set_title(f"{name}{f', {units}' if units and units != '1' else ''}", fontsize=7.5)
        axes.set_yticks(range(len(mine)), [f"{r['group']} ({r['patients']})" for r in mine])
        axes.set_ylim(len(mine) - 0.5, -0.7)
        axes.tick_params(axis="y", length=0)
    for axes in panels[len(names) :]:
        axes.remove()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure
