"""Figures of a report, from its :class:`~biomodel.results.Results` alone.

Colours are those of Okabe and Ito, viridis and cividis, which differ in lightness too, so that they can be told apart
in greyscale and by colour-blind readers; lines differ in their dashes as well.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from biomodel.report_blocks import number
from biomodel.results import Results

__all__ = ["letter", "styled", "time_course", "what_if"]

WIDTH = 7.2
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8.0, "axes.linewidth": 0.7, "axes.spines.top": False,
    "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 7.5, "axes.titlesize": 8.5,
    "xtick.labelsize": 7.5, "ytick.labelsize": 7.5, "lines.linewidth": 1.4, "svg.hashsalt": "tumorcast",
}  # fmt: skip
DARK, BROWN, GREY = "#003F66", "#7A2E00", "#3F3F3F"
LINES = (
    ("#000000", "-"), ("#D55E00", "--"), ("#009E73", "-."), ("#CC79A7", ":"), ("#56B4E9", (0, (5, 1, 1, 1, 1, 1))),
    ("#8A6D00", (0, (8, 2))),
)  # fmt: skip

Draw = TypeVar("Draw", bound=Callable)


def styled(draw: Draw) -> Draw:
    """Draw with the style of this module, whatever the user's own matplotlib settings."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def treatment_rows(schedule: Sequence[dict], first: float, last: float) -> list[tuple[str, list[dict]]]:
    """Return what a schedule holds from `first` to `last`, one row for each agent, by the day of its first entry."""
    rows: dict[str, list[dict]] = {}
    for entry in sorted(schedule, key=lambda one: one["day"]):
        if entry["day"] <= last and (entry["kind"] == "ongoing" or entry["day"] >= first):
            rows.setdefault(entry["agent"] or "radiotherapy", []).append(entry)
    return list(rows.items())


def _draw_treatments(axes: Axes, rows: list[tuple[str, list[dict]]], first: float, last: float) -> None:
    for height, (_, entries) in enumerate(rows):
        for entry in entries:
            given = entry["status"] == "given"
            if entry["kind"] == "ongoing":
                axes.plot([max(entry["day"], first), last], [height, height], color="black",
                          linewidth=3.0 if given else 1.5, solid_capstyle="butt")  # fmt: skip
            else:
                half = 0.38 if entry["kind"] == "chemotherapy" else 0.22
                axes.plot([entry["day"]] * 2, [height - half, height + half], color="black",
                          linewidth=1.8 if given else 0.9)  # fmt: skip
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)


def _panels(rows: int, columns: int = 1) -> tuple[Figure, np.ndarray, Axes | None]:
    """A figure with the panels of a time course and, below the first, room for rows of treatments."""
    strip = 0.17 * rows + 0.12 if rows else 0.0
    figure = Figure(figsize=(WIDTH, 3.3 + strip + (0.1 if rows else 0)), layout="constrained")
    widths = [1.0] if columns == 1 else [3.0, 1.0]
    grid = figure.add_gridspec(2 if rows else 1, columns, height_ratios=[3.3, strip] if rows else [1],
                               width_ratios=widths)  # fmt: skip
    top = [figure.add_subplot(grid[0, 0])]
    top += [figure.add_subplot(grid[0, 1], sharey=top[0])] if columns > 1 else []
    below = figure.add_subplot(grid[1, 0], sharex=top[0]) if rows else None
    return figure, np.array(top), below


def _finish_days(top: Axes, below: Axes | None, first: float, last: float) -> None:
    margin = 0.015 * max(last - first, 1.0)
    top.set_xlim(first - margin, last + margin)
    lowest = top if below is None else below
    lowest.set_xlabel("day")
    if below is not None:
        top.tick_params(axis="x", labelbottom=False)


@styled
def time_course(results: Results) -> Figure:
    """Volume over time: bands, observations, baselines, and the treatments below."""
    summary, curves = results.summary, results.data("curves")
    days = curves["day"].values
    first, last = float(days[0]), float(days[-1])
    known = summary["calibration"]["last_day"]
    rows = treatment_rows(summary["schedule"], first, last)
    figure, (axes,), below = _panels(len(rows))
    q = np.nanquantile(curves["volume"].transpose("draw", "day").values, [0.05, 0.25, 0.5, 0.75, 0.95], axis=0)
    axes.fill_between(days, q[0], q[4], color="#B9D6EA", linewidth=0, label="forecast, 90 % interval")
    axes.fill_between(days, q[1], q[3], color="#6BA8D3", linewidth=0, label="forecast, 50 % interval")
    axes.plot(days, q[2], color=DARK, linewidth=1.6, label="forecast, median")
    top = [float(q[4].max())]
    if "carry_forward" in curves:
        axes.plot(days, curves["carry_forward"], color=GREY, linewidth=1.0, linestyle="--", label="carry-forward")
        top.append(float(np.nanmax(curves["carry_forward"])))
    if "exponential_volume" in curves:
        axes.plot(days, curves["exponential_volume"], color=BROWN, linewidth=1.1, linestyle="-.",
                  label="exponential volume")  # fmt: skip
    measured = summary["forecast"]["quantities"].get("measured_volume")
    if measured:
        at = measured["quantiles"]
        middle = np.array([row["0.5"] for row in at])
        reach = np.array([[row["0.5"] - row["0.05"] for row in at], [row["0.95"] - row["0.5"] for row in at]])
        axes.errorbar([row["day"] for row in at], middle, reach, fmt="none", ecolor=DARK, elinewidth=0.8,
                      capsize=3, label="a measurement, 90 % interval")  # fmt: skip
        top.append(float((middle + reach[1]).max()))
    looks = (("calibration", "observed, used by the fit", "black"), ("later", "observed later", "white"))
    for role, label, fill in looks:
        seen = [(row["day"], row["volume_cm3"]) for row in summary["observations"]
                if row["role"] == role and row["volume_cm3"] is not None and row["day"] <= last + 1e-6]  # fmt: skip
        if seen:
            x, y = zip(*seen, strict=True)
            axes.plot(x, y, "o", color="black", markerfacecolor=fill, markersize=6, markeredgewidth=1.3, label=label,
                      linestyle="none", zorder=5, clip_on=False)  # fmt: skip
            top.append(max(y))
    axes.axvline(known, color="0.35", linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate(" forecast begins", (known, 1.0), xycoords=("data", "axes fraction"), va="top", fontsize=7,
                  color="0.3")  # fmt: skip
    _scale_volumes(axes, max(top), summary)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    if below is not None:
        _draw_treatments(below, rows, first, last)
        below.axvline(known, color="0.35", linewidth=0.8, linestyle=(0, (1, 2)))
    _finish_days(axes, below, first, last)
    return figure


def _scale_volumes(axes: Axes, top: float, summary: dict) -> None:
    """From 0 to `top`; logarithmic above the detection floor where the observed volumes would be squashed."""
    floor = summary["patient"]["detection_floor_cm3"]
    seen = max([row["volume_cm3"] or 0.0 for row in summary["observations"]], default=0.0)
    if top > 8 * max(seen, floor):
        axes.set_yscale("symlog", linthresh=floor, linscale=0.4)
        ticks = [lead * 10.0**power for power in range(-6, 7) for lead in (1, 3)]
        ticks = [0.0, *(value for value in ticks if 1.5 * floor <= value <= 1.3 * top)]
        axes.set_yticks(ticks, [f"{value:g}" for value in ticks])
        axes.set_yticks([], minor=True)
        axes.set_ylim(0, 1.3 * top)
        axes.set_ylabel("tumour volume (cm³), logarithmic")
    else:
        axes.set_ylim(0, 1.08 * max(top, floor))
        axes.set_ylabel("tumour volume (cm³)")


def letter(place: int) -> str:
    """Return the letter of an alternative, counted from 1."""
    return chr(64 + place) if place <= 26 else str(place)


@styled
def what_if(results: Results) -> Figure:
    """Volume under the plan and under other schedules: medians over time, intervals on the last day."""
    summary = results.summary
    plans = [("the plan", results.data("curves"), summary["forecast"]["quantities"]["volume"]["quantiles"][-1])]
    for index, row in enumerate(summary["what_if"]):
        last = row["quantities"]["volume"]["quantiles"][-1]
        plans.append((row["label"], results.data(f"what_if/{index}/curves"), last))
    days = plans[0][1]["day"].values
    known = summary["calibration"]["last_day"]
    figure, (axes, end), _ = _panels(0, columns=2)
    top, names = [1e-6], []
    for place, (label, curves, q) in enumerate(plans):
        colour, dashes = LINES[place % len(LINES)]
        values, when = curves["volume"].transpose("draw", "day").values, curves["day"].values
        if place == 0:
            low, high = np.nanquantile(values, [0.05, 0.95], axis=0)
            axes.fill_between(when, low, high, color="0.88", linewidth=0, label="the plan, 90 % interval")
        middle = np.nanmedian(values, axis=0)
        name = "plan" if place == 0 else letter(place)
        names.append(name)
        axes.plot(when, middle, color=colour, linestyle=dashes, label=label if place == 0 else f"{name}: {label}")
        end.plot([place] * 2, [q["0.05"], q["0.95"]], color=colour, linewidth=1.2, solid_capstyle="butt")
        end.plot([place] * 2, [q["0.25"], q["0.75"]], color=colour, linewidth=4.5, solid_capstyle="butt")
        end.plot(place, q["0.5"], "o", color=colour, markerfacecolor="white", markersize=5, clip_on=False,
                 zorder=5)  # fmt: skip
        end.annotate(number(q["0.5"]), (place, q["0.5"]), xytext=(6, 0), textcoords="offset points", fontsize=6.5,
                     va="center")  # fmt: skip
        top += [float(np.nanmax(middle)), q["0.95"]]
    seen = [(r["day"], r["volume_cm3"]) for r in summary["observations"] if r["role"] == "calibration"]
    axes.plot(*zip(*[(d, v) for d, v in seen if v is not None] or [(np.nan, np.nan)], strict=True), "o", color="black",
              markersize=5, label="observed, used by the fit", linestyle="none")  # fmt: skip
    axes.axvline(known, color="0.35", linewidth=0.8, linestyle=(0, (1, 2)))
    _scale_volumes(axes, max(top), summary)
    axes.set_title("median over time", loc="left")
    end.set_title(f"day {days[-1]:g}", loc="left")
    end.set_xlim(-0.6, len(plans) - 0.2)
    end.set_xticks(range(len(plans)), names)
    end.tick_params(axis="x", length=0)
    end.tick_params(axis="y", labelleft=False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
    _finish_days(axes, None, float(days[0]), float(days[-1]))
    return figure
