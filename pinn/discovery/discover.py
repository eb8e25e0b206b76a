"""Growth laws learned from images: a biologically-informed network, and what it found as terms for every solver.

Two networks are trained together (Lagergren et al. 2020, PLoS Comput Biol 16:e1008462,
doi:10.1371/journal.pcbi.1008462): one for the state, u = exp(N(x, t)), positive and without flux through the box's
sides whatever its weights are, and one for growth as a function of u alone, the growth term of the model. They are
bound by the images and by the equation,

    u [N_t - D (lap N + |grad N|²)] = growth(u)

at scattered points of space and time; D is learned with them. Everything is minimised at once by Levenberg-Marquardt,
with the equation's weight raised in stages: at first the state follows the images, in the end the equation. All of it
is a likelihood, so the law comes with a covariance in which the state network's weights are marginalised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from biomodel.domain import Domain
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from pinn.discovery.found import Discovered, Formula
from pinn.discovery.laws import NetworkGrowth, TableGrowth
from pinn.discovery.training import Discovery, Learning

__all__ = ["Discovered", "Discovery", "Formula", "NetworkGrowth", "TableGrowth", "discover"]


def discover(model: ReactionDiffusion, domain: Domain, days: Sequence[float], images: np.ndarray,
             sd: float | Sequence[float], settings: Discovery | None = None,
             progress: Callable[[str], None] | None = None) -> Discovered:  # fmt: skip
    """Learn a growth law, and D with it, from images of the cell fraction.

    Parameters
    ----------
    model : ReactionDiffusion
        Its growth is what is learned, usually a :class:`pinn.discovery.laws.NetworkGrowth`; one diffusivity, no
        treatment.
    domain : Domain
        A box that the organ fills.
    days : sequence of float
        Of the images; two or more, increasing.
    images : ndarray, shape (T, z, y, x)
        Cell fractions, voxel averages; NaN where nothing was measured.
    sd : float or sequence of float
        Noise of a voxel, in all images or in each. A start that is known has a small one.
    settings : Discovery, optional
    progress : callable, optional
        Is told about each stage.

    Raises
    ------
    CalibrationError
        If model, domain or images are not for this; the message names what is.
    """
    settings = settings or Discovery()
    checked, values, sds = _checked(model, domain, days, images, sd)
    return Learning(model, domain, checked, values, sds, settings).run(progress)


def _checked(model, domain: Domain, days, images, sd) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Days (T,), images (T, z, y, x) and noise (T,), after all that can be wrong with them."""
    if not isinstance(model, ReactionDiffusion):
        raise CalibrationError(f"discover: model is a {type(model).__name__}; expected bm.ReactionDiffusion(...).")
    if model.treatments or model.auxiliaries or model.fields or model.diffusion.uniform is None:
        raise CalibrationError(
            f"discover: {model.label} has treatments, fields or a diffusivity that varies; expected "
            "bm.ReactionDiffusion(pinn.NetworkGrowth(), bm.Isotropic()) and images without treatment between them."
        )
    if not [n for n in model.free if n.startswith(f"{model.growth.name}.")]:
        raise CalibrationError(f"discover: {model.growth!r} has no free parameter; use pinn.NetworkGrowth().")
    if max(domain.shape) < 4 or not domain.mask.all():
        raise CalibrationError(
            f"discover: domain of shape {domain.shape} with {int(domain.mask.sum())} voxels in its mask; expected a "
            "box inside the organ, cropped so that the mask is everywhere."
        )
    days, images = np.asarray(days, float), np.asarray(images, float)
    if days.ndim != 1 or len(days) < 2 or not np.isfinite(days).all() or (np.diff(days) <= 0).any():
        raise CalibrationError(f"discover: days {days.tolist()}; expected two or more that increase.")
    if images.shape != (len(days), *domain.shape):
        raise CalibrationError(
            f"discover: images of shape {images.shape}; expected (days, z, y, x) = {(len(days), *domain.shape)}."
        )
    sds = np.broadcast_to(np.asarray(sd, float), days.shape) if np.ndim(sd) == 0 else np.asarray(sd, float)
    if sds.shape != days.shape or not (np.isfinite(sds) & (sds > 0)).all():
        raise CalibrationError(f"discover: sd {sd}; expected a positive number, or one for each of {len(days)} images.")
    empty = [float(d) for d, image in zip(days, images, strict=True) if not np.isfinite(image).any()]
    if empty:
        raise CalibrationError(f"discover: the images of days {empty} have no measured voxel; leave them out.")
    return days, images, sds
