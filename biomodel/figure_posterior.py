"""Figures of a posterior: what the data made of each prior, and which parameters they cannot tell apart."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, Locator, MaxNLocator
from scipy.special import ndtri

from biomodel.calibration.fit import Fit
from biomodel.errors import InputError
from biomodel.figures import DARK, GREY, WIDTH, styled
from biomodel.parameters import LogNormal
from biomodel.report_blocks import pretty_units

__all__ = ["correlations", "marginals"]

#: Draws behind a picture, and places at which a density is drawn.
DRAWS, POINTS = 4000, 200
#: Histogram bars of a posterior.
BARS = 30
#: What lies beyond these quantiles of the prior is not drawn, unless the posterior lies there.
TAIL = 0.002


def _densities(fit: Fit, name: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places on the drawn axis (log10 for log-normal priors), and the prior's density there."""
    index, prior = fit.names.index(name), fit.parameters[name].prior
    mean, sd = float(fit.prior.mean[index]), float(fit.prior.sd[index])
    ends = np.array(prior.to_value(mean + sd * ndtri([TAIL, 1 - TAIL])), float)
    low, high = min(ends[0], values.min()), max(ends[1], values.max())
    if isinstance(prior, LogNormal):
        at = np.linspace(np.log10(low), np.log10(high), POINTS)
        z = np.asarray(prior.to_z(10**at), float)
    else:
        at = np.linspace(low, high, POINTS)
        # Ends of a bounded parameter have no finite coordinate.
        with np.errstate(divide="ignore"):
            z = np.asarray(prior.to_z(at), float)
    density = np.exp(-0.5 * ((z - mean) / sd) ** 2)
    slope = np.gradient(np.where(np.isfinite(z), z, np.nan), at)
    return at, np.nan_to_num(density * slope / (np.sqrt(2 * np.pi) * sd))


@styled
def marginals(fit: Fit, seed: int = 0) -> Figure:
    """Prior (line) and posterior (bars) of each calibrated parameter.

    Parameters
    ----------
    fit : Fit
    seed : int
        Of the posterior's draws.

    Raises
    ------
    InputError
        If the fit has no posterior (`MAP`).
    """
    if not fit.sd.any():
        raise InputError("marginals: a MAP fit has no posterior to draw; calibrate with Laplace() or NUTS().")
    drawn = fit.draw(DRAWS, seed)
    columns = 4
    rows = -(-len(fit.names) // columns)
    figure = Figure(figsize=(WIDTH, 1.35 * rows + 0.35), layout="constrained")
    for axes, name in zip(figure.subplots(rows, columns, squeeze=False).flat, fit.names, strict=False):
        values, log = drawn[name], isinstance(fit.parameters[name].prior, LogNormal)
        at, density = _densities(fit, name, values)
        axes.hist(np.log10(values) if log else values, BARS, density=True, color=DARK, alpha=0.45, label="posterior")
        axes.plot(at, density, color=GREY, ls="--", lw=1.2, label="prior")
        axes.set_xlim(at[0], at[-1])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        units = pretty_units(fit.parameters[name].units)
        axes.set_title(f"{name}, {units}" if units else name, fontsize=7)
        if log:
            axes.xaxis.set_major_locator(_decades(at[0], at[-1]))
            axes.xaxis.set_major_formatter(lambda x, _: f"{10**x:.2g}")
    for axes in figure.axes[len(fit.names) :]:
        axes.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2)
    return figure


def _decades(low: float, high: float) -> Locator:
    """Ticks at 1 and 3 times powers of ten on an axis of log10."""
    ticks = [p + np.log10(m) for p in range(int(np.floor(low)), int(np.ceil(high))) for m in (1, 3)]
    inside = [t for t in ticks if low <= t <= high]
    return FixedLocator(inside) if 2 <= len(inside) <= 5 else MaxNLocator(3)


@styled
def correlations(fit: Fit, seed: int = 0) -> Figure:
    """Posterior correlation of each pair of parameters, in their transformed coordinates.

    Two parameters at 1 or -1 cannot be told apart: only what they do together is known.

    Raises
    ------
    InputError
        If the fit has no posterior (`MAP`).
    """
    if not fit.sd.any():
        raise InputError("correlations: a MAP fit has no posterior to draw; calibrate with Laplace() or NUTS().")
    drawn = fit.draw(DRAWS, seed)
    z = np.stack([np.asarray(p.prior.to_z(drawn[n]), float) for n, p in fit.parameters.items()])
    table = np.corrcoef(z)
    n = len(table)
    figure = Figure(figsize=(min(WIDTH, 1.9 + 0.42 * n), min(WIDTH, 1.2 + 0.38 * n)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="PuOr_r", vmin=-1, vmax=1)
    axes.set_xticks(range(n), fit.names, rotation=60, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(n), fit.names)
    for i, j in np.ndindex(n, n):
        if i != j and abs(table[i, j]) >= 0.3:
            axes.text(j, i, f"{table[i, j]:.1f}".replace("-", "−"), ha="center", va="center", fontsize=6.5,
                      color="w" if abs(table[i, j]) > 0.7 else "k")  # fmt: skip
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="posterior correlation", shrink=0.8)
    return figure
