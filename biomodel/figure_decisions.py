"""Figures of a decision: the regimens' doses, what each leaves, and how sure the model is of each comparison."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from biomodel.decisions import Decision
from biomodel.figures import DARK, GREY, LINES, WIDTH, letter, styled
from biomodel.report_blocks import percent, pretty_units

__all__ = ["regimens"]

#: Height of one regimen in the calendar and in the intervals, inches.
ROW = 0.42
#: Names longer than this are broken at a blank.
LONG = 22


def _broken(label: str) -> str:
    """The label on two lines where it is long; a dollar is a dollar."""
    label = label.replace("$", r"\$")
    if len(label) <= LONG or " " not in label:
        return label
    blanks = [n for n, sign in enumerate(label) if sign == " "]
    middle = min(blanks, key=lambda n: abs(n - len(label) / 2))
    return f"{label[:middle]}\n{label[middle + 1 :]}"


def _names(decision: Decision) -> list[str]:
    """The regimens with their letters."""
    return [_broken(f"{letter(k)}: {label}") for k, label in enumerate(decision.labels, start=1)]


@styled
def regimens(decision: Decision) -> Figure:
    """Doses of each regimen, cells and volume left with their intervals, and the probability of each comparison.

    Parameters
    ----------
    decision : Decision

    Returns
    -------
    Figure
    """
    n = len(decision.labels)
    figure = Figure(figsize=(WIDTH, 2 * ROW * n + 1.9), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[1.55, 1.0])
    _calendar(figure.add_subplot(grid[0, :]), decision)
    _left(figure.add_subplot(grid[1, 0]), decision)
    _comparisons(figure.add_subplot(grid[1, 1]), decision)
    return figure


def _calendar(axes: Axes, decision: Decision) -> None:
    """Doses by day; the height of a bar is its amount against the drug's largest in any regimen."""
    begin = decision.fit.patient.visits[-1].day
    agents = list(dict.fromkeys(d.agent for s in decision.schedules.values() for d in s.doses))
    largest = {a: max(d.amount for s in decision.schedules.values() for d in s.of(a)) for a in agents}
    width = 0.9 / max(len(agents), 3)
    span = max(decision.day, begin + 1.0)
    for row, schedule in enumerate(decision.schedules.values()):
        axes.axhline(row + 0.4, color="0.8", lw=0.6)
        for dose in schedule.doses:
            if dose.day <= span:
                place = agents.index(dose.agent)
                # Drugs of the same day stand side by side.
                shift = (place - (len(agents) - 1) / 2) * width * span / 90
                colour = LINES[(place + 1) % len(LINES)][0]
                height = 0.75 * dose.amount / largest[dose.agent]
                axes.bar(dose.day + shift, -height, width * span / 90, bottom=row + 0.4, color=colour,
                         alpha=1.0 if dose.day >= begin else 0.35)  # fmt: skip
    axes.axvline(begin, color="0.35", lw=0.8, ls=(0, (1, 2)))
    axes.annotate(" last visit used", (begin, 1.0), xycoords=("data", "axes fraction"), va="bottom", fontsize=7,
                  color="0.3")  # fmt: skip
    axes.set_yticks(range(len(decision.labels)), _names(decision))
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(decision.labels) - 0.45, -0.5), xlim=(-1, span + 1), xlabel="day")
    axes.spines["left"].set_visible(False)
    handles = [Patch(color=LINES[(k + 1) % len(LINES)][0], label=agent) for k, agent in enumerate(agents)]
    axes.legend(handles=handles, ncols=len(agents), loc="lower right", bbox_to_anchor=(1.0, 1.0), handlelength=1.0)
    axes.set_title("doses", loc="left")


def _left(axes: Axes, decision: Decision) -> None:
    """Median, 50 % and 90 % intervals of what each regimen leaves, and the probability that nothing can be seen."""
    name = decision.quantity
    values = [decision.values(label) for label in decision.labels]
    positive = all((v > 0).all() for v in values)
    gone = decision.gone()
    for row, (label, v) in enumerate(zip(decision.labels, values, strict=True)):
        low, lower, middle, upper, high = np.quantile(v, [0.05, 0.25, 0.5, 0.75, 0.95])
        axes.plot([low, high], [row, row], color=DARK, lw=1.2, solid_capstyle="butt")
        axes.plot([lower, upper], [row, row], color=DARK, lw=4.5, solid_capstyle="butt")
        axes.plot(middle, row, "o", color=DARK, markerfacecolor="white", ms=5, zorder=5)
        axes.annotate(f"{percent(gone[label])}", (1.02, row), xycoords=("axes fraction", "data"), va="center",
                      fontsize=7.5, annotation_clip=False)  # fmt: skip
    axes.annotate("none\nvisible", (1.02, 1.02), xycoords="axes fraction", va="bottom", fontsize=7, color=GREY)
    if positive:
        axes.set_xscale("log")
        low, high = np.log10(axes.get_xlim())
        leads = (1.0,) if high - low > 3 else (1.0, 3.0) if high - low > 1 else (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
        places = [(lead, power) for power in range(int(np.floor(low)), int(np.ceil(high))) for lead in leads]
        places = [(lead, power) for lead, power in places if low <= np.log10(lead) + power <= high]
        large = high > 5
        words = [f"${lead:g} \\times 10^{{{power}}}$" if large else f"{lead * 10.0**power:g}" for lead, power in places]
        axes.set_xticks([lead * 10.0**power for lead, power in places], words)
        axes.set_xticks([], minor=True)
    units = pretty_units(decision.data[name].attrs["units"])
    axes.set_yticks(range(len(values)), _names(decision))
    axes.tick_params(axis="y", length=0)
    axes.set(ylim=(len(values) - 0.5, -0.5), xlabel="tumour cells" if name == "cells" else f"volume, {units}")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y", color="0.9", lw=0.6)
    axes.set_title(f"left on day {decision.day:g}: median, 50 %, 90 %", loc="left")


def _comparisons(axes: Axes, decision: Decision) -> None:
    """Probability that the row leaves less than the column."""
    n = len(decision.labels)
    table = np.full((n, n), np.nan)
    for i, first in enumerate(decision.labels):
        for j, second in enumerate(decision.labels):
            if i != j:
                table[i, j] = decision.pair(first, second).probability
    axes.imshow(table, cmap="PuOr_r", vmin=0, vmax=1, aspect="auto")
    for i, j in np.ndindex(n, n):
        if i != j:
            axes.text(j, i, percent(float(table[i, j])), ha="center", va="center", fontsize=8,
                      color="w" if abs(table[i, j] - 0.5) > 0.35 else "k")  # fmt: skip
    letters = [letter(k + 1) for k in range(n)]
    axes.set_xticks(range(n), letters)
    axes.set_yticks(range(n), letters)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("row leaves less than column", loc="left")
