"""Draws of a posterior in transformed coordinates, whoever made them: importance sampling or chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from biomodel.calibration.bayes import library

__all__ = ["Chains", "Samples", "weighted_crps", "weighted_quantile"]


@dataclass(frozen=True, eq=False)
class Chains:
    """Markov chains of one posterior, as they were drawn, without the tuning.

    Attributes
    ----------
    z : ndarray, shape (chains, draws, p)
    stats : dict of str to ndarray, shape (chains, draws)
        By the names of ArviZ: ``lp`` (log density up to a constant), ``diverging``, ``acceptance_rate``,
        ``step_size``, ``n_steps`` (gradients of that draw), as far as the sampler has them.
    gradients : int
        Evaluations of the density with its gradient, tuning and all (of the density alone, for SMC).
    seconds : float
        CPU time, s, tuning and all.
    sampler : str
        Name and version.
    """

    z: np.ndarray
    stats: dict[str, np.ndarray]
    gradients: int
    seconds: float
    sampler: str

    @cached_property
    def r_hat(self) -> np.ndarray:
        """Rank-normalised split R-hat of each coordinate, (p,); NaN for a single chain or fewer than 4 draws.

        Vehtari et al. 2021, Bayesian Analysis 16:667, doi:10.1214/20-BA1221; so are `bulk` and `tail`.
        """
        return self._each("rhat") if self.z.shape[0] > 1 else np.full(self.z.shape[2], np.nan)

    @cached_property
    def bulk(self) -> np.ndarray:
        """Bulk effective sample size of each coordinate, (p,)."""
        return self._each("ess", method="bulk")

    @cached_property
    def tail(self) -> np.ndarray:
        """Effective sample size of each coordinate's 5 % and 95 % quantiles, (p,)."""
        return self._each("ess", method="tail")

    def _each(self, name: str, **settings: str) -> np.ndarray:
        arviz = library("arviz")
        data = arviz.convert_to_dataset(self.z)
        return np.asarray(getattr(arviz, name)(data, **settings)["x"].values, float).reshape(-1)

    @property
    def divergences(self) -> int:
        """Draws whose path left the density's level: the sampler may not have reached all of the posterior."""
        return int(np.sum(self.stats.get("diverging", np.zeros(1, bool))))


@dataclass(frozen=True, eq=False)
class Samples:
    """Draws of one posterior, weighted where they come from importance sampling.

    Attributes
    ----------
    z : ndarray, shape (draws, p)
    weights : ndarray, shape (draws,)
        Their sum is 1.
    log_evidence : float
        NaN where the sampler gives none.
    chains : Chains or None
        The same draws chain by chain, where they come from chains.
    """

    z: np.ndarray
    weights: np.ndarray
    log_evidence: float = field(default=float("nan"))
    chains: Chains | None = None

    @classmethod
    def of(cls, chains: Chains, log_evidence: float = float("nan")) -> Samples:
        """The draws of all chains together."""
        z = chains.z.reshape(-1, chains.z.shape[2])
        return cls(z, np.full(len(z), 1 / len(z)), log_evidence, chains)

    @property
    def ess(self) -> float:
        """Effective sample size: 1 / sum of squared weights, or the least bulk one of the chains' coordinates."""
        if self.chains is not None:
            return float(self.chains.bulk.min())
        return float(1 / (self.weights**2).sum())

    @property
    def covariance(self) -> np.ndarray:
        """Posterior covariance (p, p)."""
        offset = self.z - self.weights @ self.z
        return (offset * self.weights[:, None]).T @ offset

    def quantile(self, q: Sequence[float]) -> np.ndarray:
        """Quantiles of each coordinate, (len(q), p)."""
        return np.stack([weighted_quantile(x, self.weights, q) for x in self.z.T], 1)

    def resample(self, draws: int, rng: np.random.Generator) -> np.ndarray:
        """Equally weighted draws (draws, p), by systematic resampling in random order."""
        where = np.searchsorted(np.cumsum(self.weights), (rng.random() + np.arange(draws)) / draws)
        return self.z[rng.permutation(np.minimum(where, len(self.weights) - 1))]


def weighted_quantile(x: np.ndarray, weights: np.ndarray, q: Sequence[float]) -> np.ndarray:
    """Quantiles of weighted draws along the last axis: x and weights (..., draws), to (..., len(q))."""
    order = np.argsort(x, -1)
    x, cumulated = np.take_along_axis(x, order, -1), np.cumsum(np.take_along_axis(weights, order, -1), -1)
    where = [np.minimum((cumulated < k).sum(-1), x.shape[-1] - 1) for k in q]
    return np.stack([np.take_along_axis(x, w[..., None], -1)[..., 0] for w in where], -1)


def weighted_crps(x: np.ndarray, weights: np.ndarray, observed: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score of weighted draws along the last axis.

    Gneiting and Raftery 2007, J Am Stat Assoc 102:359, doi:10.1198/016214506000001437.
    """
    order = np.argsort(x, -1)
    x, weights = np.take_along_axis(x, order, -1), np.take_along_axis(weights, order, -1)
    below = np.cumsum(weights, -1)[..., :-1]
    error = (weights * np.abs(x - np.asarray(observed)[..., None])).sum(-1)
    return error - (below * (1 - below) * np.diff(x, axis=-1)).sum(-1)

