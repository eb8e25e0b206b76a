"""Figures of a calibrated map of the growth rate: the map, its spread and what the images told about it, by place."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from biomodel.calibration.fit import Fit
from biomodel.errors import InputError
from biomodel.figure_maps import outline
from biomodel.figures import WIDTH, styled

__all__ = ["rate_maps"]

#: Draws behind the spread of the rate.
DRAWS = 100


@styled
def rate_maps(fit: Fit, seed: int = 0) -> Figure:
    """Growth rate, its standard deviation, and the information gained over the prior, in one slice each.

    The slice is the one with most tumour at the first visit, whose outline is drawn. Outside the tumour the images say
    nothing: there the map is its prior, and the gain is 0.

    Parameters
    ----------
    fit : Fit
        By `FieldLaplace`.
    seed : int
        Of the draws behind the standard deviation, which counts level and field.

    Raises
    ------
    InputError
        If the fit has no map.
    """
    found = fit.rate_map
    if found is None:
        raise InputError(f"rate_maps: a fit by {fit.method} has no map of the rate; calibrate by FieldLaplace().")
    name = next(n for n in fit.names if n.startswith("growth."))
    prior = fit.parameters[name].prior
    z, fields, _ = found.draw(DRAWS, seed)
    level = np.asarray(prior.to_value(z[:, fit.names.index(name)]), float)
    rates = found.link.of(level.reshape(-1, 1, 1, 1), fields)
    domain = fit.patient.domain.crop(found.box)
    region = next(v.region for v in fit.patient.visits if v.region is not None)[found.box]
    cut = int(region.sum((1, 2)).argmax())
    dy, dx = domain.spacing[1:]
    extent = (0.0, dx * domain.shape[2], 0.0, dy * domain.shape[1])
    shown = (
        (found.rate(fit.values[name]), "growth rate, 1/day", "cividis"),
        (rates.std(0), "standard deviation, 1/day", "magma"),
        (found.gain(), "information gained, nats", "viridis"),
    )
    figure = Figure(figsize=(WIDTH, 0.38 * WIDTH), layout="constrained")
    for axes, (values, title, colours) in zip(figure.subplots(1, 3), shown, strict=True):
        inside = np.where(domain.mask, values, np.nan)[cut]
        image = axes.imshow(inside, origin="lower", extent=extent, cmap=colours, vmin=min(0.0, np.nanmin(inside)))
        axes.add_collection(LineCollection(list(outline(region[cut], extent)), colors="w", linewidths=1.0))
        axes.set_title(title, fontsize=8)
        axes.set_xticks([])
        axes.set_yticks([])
        figure.colorbar(image, ax=axes, shrink=0.75)
    return figure
