"""The result of a calibration: the posterior in transformed coordinates, and what the data informed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from biomodel.calibration.gaussnewton import GaussianPrior
from biomodel.calibration.samples import Samples
from biomodel.calibration.volumes import VolumeNoise
from biomodel.models import ReactionDiffusion
from biomodel.parameters import Parameter
from biomodel.patient import Patient
from biomodel.solvers.base import Solver
from biomodel.tables import html_table

if TYPE_CHECKING:
    import arviz

    from biomodel.calibration.field import FieldPosterior

#: A parameter counts as identified where its posterior sd is below this share of its prior sd.
IDENTIFIED = 0.5


@dataclass(frozen=True, eq=False)
class Fit:
    """A calibrated model.

    Attributes
    ----------
    parameters : mapping of str to Parameter
        All calibrated parameters: the model's free ones, then those of the initial state and the measurement.
    z, covariance : ndarray, shape (p,) and (p, p)
        MAP estimate and covariance of the transformed coordinates. A `MAP` fit has zero covariance.
    log_evidence, log_likelihood, aic, bic : float
        Log evidence, by Laplace's approximation (for `NUTS` too) or the samples; log-likelihood at the MAP;
        information criteria (their number of parameters counts only what is calibrated, their number of data the
        measured voxels or volumes).
    inflation : float
        How many times more the residuals of images vary than their noise explains; the data count less by it (see
        :mod:`biomodel.calibration.discrepancy`). About 1 where model and noise are right.
    initial_update : ndarray or None
        Posterior mean change of the measured initial state on the computing box.
    samples : Samples or None
        Posterior draws of an `Importance`, `NUTS` or `SMC` fit; otherwise the posterior is Gaussian.
    noise : VolumeNoise or None
        Errors of measured volumes, of a patient without images.
    rate_map : FieldPosterior or None
        Of a `FieldLaplace` fit: the map of the growth rate, jointly with the parameters.
    """

    model: ReactionDiffusion
    patient: Patient
    solver: Solver
    method: str
    parameters: Mapping[str, Parameter]
    prior: GaussianPrior
    z: np.ndarray
    covariance: np.ndarray
    log_likelihood: float
    log_evidence: float
    count: int
    iterations: int
    solves: int
    converged: bool
    initial_update: np.ndarray | None = None
    box: tuple[slice, slice, slice] | None = None
    notes: tuple[str, ...] = field(default=())
    samples: Samples | None = None
    noise: VolumeNoise | None = None
    inflation: float = 1.0
    rate_map: FieldPosterior | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the calibrated parameters, in the order of `z`."""
        return tuple(self.parameters)

    @property
    def values(self) -> dict[str, float]:
        """Parameter values at the MAP estimate, by name."""
        return {n: float(p.prior.to_value(v)) for (n, p), v in zip(self.parameters.items(), self.z, strict=True)}

    @property
    def sd(self) -> np.ndarray:
        """Posterior standard deviations of the transformed coordinates, (p,)."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def shrinkage(self) -> dict[str, float]:
        """Posterior over prior standard deviation by parameter: 1 means that the data said nothing."""
        return dict(zip(self.names, (self.sd / self.prior.sd).tolist(), strict=True))

    @property
    def identified(self) -> tuple[str, ...]:
        """Parameters whose posterior sd is below half of their prior sd."""
        return tuple(n for n, s in self.shrinkage.items() if 0 < s < IDENTIFIED)

    @property
    def aic(self) -> float:
        """Akaike's information criterion."""
        return 2 * len(self.names) - 2 * self.log_likelihood

    @property
    def bic(self) -> float:
        """Bayesian information criterion."""
        return len(self.names) * float(np.log(max(self.count, 1))) - 2 * self.log_likelihood

    @property
    def inference(self) -> arviz.InferenceData:
        """The chains of a `NUTS` or `SMC` fit in ArviZ's layout; see :func:`.inference.inference_data`."""
        from biomodel.calibration.inference import inference_data

        return inference_data(self)

    def draw(self, draws: int, seed: int) -> dict[str, np.ndarray]:
        """Draw parameter values from the posterior.

        Parameters
        ----------
        draws : int
        seed : int

        Returns
        -------
        dict of str to ndarray, shape (draws,)
        """
        rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
        if self.samples is not None:
            z = self.samples.resample(draws, rng)
        elif self.rate_map is not None:
            z = self.rate_map.draw(draws, seed)[0]
        else:
            values, vectors = np.linalg.eigh(self.covariance)
            root = vectors * np.sqrt(np.maximum(values, 0))
            z = self.z + rng.standard_normal((draws, len(self.z))) @ root.T
        found = {}
        for i, (name, p) in enumerate(self.parameters.items()):
            # Bounds are far in the tails; a draw beyond one is set onto it.
            found[name] = np.clip(p.prior.to_value(z[:, i]), *p.bounds)
        return found

    def table(self) -> list[dict[str, object]]:
        """One row per parameter: estimate, 90 % interval, unit, shrinkage and whether the data informed it.

        The estimate is the MAP, or the median of the samples.
        """
        rows = []
        if self.samples is not None:
            low_z, centre, high_z = self.samples.quantile([0.05, 0.5, 0.95])
        else:
            centre, reach = self.z, 1.6448536269514722 * self.sd
            low_z, high_z = centre - reach, centre + reach
        for i, (name, p) in enumerate(self.parameters.items()):
            low, high = float(p.prior.to_value(low_z[i])), float(p.prior.to_value(high_z[i]))
            share = float(self.sd[i] / self.prior.sd[i])
            rows.append({
                "name": name, "estimate": float(p.prior.to_value(centre[i])), "low": low, "high": high,
                "units": p.units, "prior_median": float(p.prior.to_value(self.prior.mean[i])),
                "prior_low": float(p.prior.to_value(self.prior.mean[i] - 1.6448536269514722 * self.prior.sd[i])),
                "prior_high": float(p.prior.to_value(self.prior.mean[i] + 1.6448536269514722 * self.prior.sd[i])),
                "shrinkage": share, "informed_by": "not computed" if share == 0 else "data" if
                share < IDENTIFIED else ("data and prior" if share < 0.9 else "prior"),
                "description": p.description, "source": p.source,
            })  # fmt: skip
        return rows

    def _repr_html_(self) -> str:
        rows = [
            (r["name"], f"{r['estimate']:.4g}", f"{r['low']:.3g} to {r['high']:.3g}", r["units"], r["informed_by"])
            for r in self.table()
        ]
        title = f"{self.method} fit of {self.model.label}, {self.patient.id}"
        return html_table(("parameter", "estimate", "90 % interval", "unit", "informed by"), rows, title)
