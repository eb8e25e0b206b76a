"""Figure of the stages behind a forecast's uncertainty."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from biomodel.figures import DARK, GREY, WIDTH, styled
from biomodel.stages import LABELS, TITLES, Stages

__all__ = ["stages_figure"]


@styled
def stages_figure(stages: Stages, quantity: str = "volume") -> Figure:
    """Share of the forecast's variance by stage, with 90 % intervals, from the scanner down to the forecast.

    Bars are contributions; the tick is what would go if that stage's error alone became known. Stages without an error
    are named below, with the reason.

    Raises
    ------
    InputError
        If the quantity does not exist or does not vary.
    """
    rows = stages.table(quantity)
    total, low, high = stages.sum(quantity)
    absent = [f"{LABELS[n]}: {why}" for n, why in stages.absent.items()]
    figure = Figure(figsize=(WIDTH, 1.0 + 0.29 * len(rows) + 0.15 * len(absent)), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(rows))[::-1]
    share = np.array([r.contribution for r in rows])
    reach = np.abs(np.array([[r.contribution - r.low, r.high - r.contribution] for r in rows])).T
    axes.barh(at, np.maximum(share, 0.0), height=0.62, color=DARK, alpha=0.55, label="contribution, 90 % interval")
    axes.errorbar(share, at, xerr=reach, fmt="none", ecolor=GREY, elinewidth=1.0, capsize=2.5)
    axes.plot([r.first for r in rows], at, "|", ms=11, mew=1.8, color="k", label="goes if this error alone is known")
    right = max(1.02 * max(r.high for r in rows), 0.1)
    for y, row in zip(at, rows, strict=True):
        label = f"{round(row.contribution, 2) + 0.0:.0%}".replace("-", "−")
        axes.text(right * 1.02, y, label, va="center", ha="left", fontsize=7.5)
    axes.set_yticks(at, [r.label for r in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(min(0.0, 1.05 * min(r.low for r in rows)), right * 1.1)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}".replace("-", "−"))
    axes.axvline(0, color=GREY, lw=0.7)
    axes.set_xlabel(
        f"share of the variance of the {TITLES[quantity]} on day {stages.day:g}\n"
        f"(sum {total:.0%}, 90 % interval {low:.0%} to {high:.0%})"
    )
    figure.legend(loc="outside upper right", ncols=2)
    if absent:
        figure.supxlabel("Without an error of their own: " + "\n".join(absent), fontsize=7, x=0.02, ha="left")
    return figure
