"""A fit's draws in ArviZ's layout."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING

import numpy as np

from biomodel.calibration.bayes import library
from biomodel.calibration.volumes import measured
from biomodel.errors import CalibrationError

if TYPE_CHECKING:
    import arviz

    from biomodel.calibration.fit import Fit

__all__ = ["inference_data"]


def inference_data(fit: Fit) -> arviz.InferenceData:
    """The posterior of a sampled fit as ``arviz.InferenceData``.

    Groups: ``posterior`` (each parameter by name, in its unit), ``unconstrained_posterior`` (the transformed
    coordinates, in which priors are Gaussian), ``sample_stats``, ``observed_data`` (volumes on the days of the visits)
    and ``constant_data`` (prior and Laplace fit in the transformed coordinates). Attributes say model, patient,
    sampler, versions and what the notes say.

    Raises
    ------
    CalibrationError
        If the fit holds no chains.
    """
    import xarray as xr

    chains = None if fit.samples is None else fit.samples.chains
    if chains is None:
        raise CalibrationError(
            f"{fit.method} fit: it holds no chains to lay out; calibrate with method=bm.NUTS() or bm.SMC()."
        )
    count, draws, _ = chains.z.shape
    coords = {"chain": np.arange(count), "draw": np.arange(draws)}
    values = {}
    for i, (name, parameter) in enumerate(fit.parameters.items()):
        found = np.clip(parameter.prior.to_value(chains.z[..., i]), *parameter.bounds)
        values[name] = (("chain", "draw"), found, {"units": parameter.units, "description": parameter.description})
    z = {"z": (("chain", "draw", "parameter"), chains.z)}
    names = {"parameter": list(fit.names)}
    days, volumes = measured(fit.patient)
    observed = {"volume": (("day",), volumes, {"units": "cm^3"})}
    constant = {
        "prior_mean": ("parameter", fit.prior.mean),
        "prior_covariance": (("parameter", "other"), fit.prior.covariance),
        "optimum": ("parameter", fit.z),
    }
    attrs = {
        "inference_library": chains.sampler.split()[0],
        "inference_library_version": chains.sampler.split()[-1],
        "creation_library": "tumorcast",
        "creation_library_version": version("tumorcast"),
        "model": fit.model.label,
        "patient": fit.patient.id,
        "method": fit.method,
        "gradients": chains.gradients,
        "seconds": chains.seconds,
        "log_evidence": fit.log_evidence,
        "baseline": fit.patient.baseline or "",
        "notes": json.dumps(list(fit.notes), ensure_ascii=False),
    }
    days_axis = {"day": ("day", days, {"units": "days"})}
    return library("arviz").InferenceData(
        posterior=xr.Dataset(values, coords, attrs),
        unconstrained_posterior=xr.Dataset(z, {**coords, **names}, attrs),
        sample_stats=xr.Dataset({n: (("chain", "draw"), v) for n, v in chains.stats.items()}, coords, attrs),
        observed_data=xr.Dataset(observed, days_axis, attrs),
        constant_data=xr.Dataset(constant, {**names, "other": list(fit.names)}, attrs),
    )
