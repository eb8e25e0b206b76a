"""Simulation-based calibration: are the posteriors of a method those of the model that made the data?

Truths are drawn from the prior, data from the truths, and each posterior from its data; then the rank of a truth among
L draws of its posterior is uniform on 0 to L, for every parameter, if and only if the sampler is right on average over
the prior (Talts et al. 2018, arXiv:1804.06788). Ranks that pile up at both ends tell of posteriors too narrow, in the
middle of ones too wide, at one end of a bias.

Uniformity is judged twice: by a chi-squared test of binned ranks, and by their empirical distribution function, which
stays in a band at all of the points where it is looked at with a stated probability (Säilynoja, Bürkner and Vehtari
2022, Stat Comput 32:32, doi:10.1007/s11222-022-10090-6).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np
from scipy.special import gammaln
from scipy.stats import binom, chi2

from biomodel.calibration.population import Population
from biomodel.calibration.samples import Samples
from biomodel.calibration.volumes import VolumeModel, measured
from biomodel.errors import InputError
from biomodel.patient import Patient
from biomodel.solvers.torch import TorchSolver
from biomodel.tables import html_table

__all__ = [
    "RankStatistics", "independent_draws", "rank_statistics", "simulate_volumes", "simulation_based_calibration",
    "uniform_band", "uniform_p",
]  # fmt: skip

#: Points at which an empirical distribution function is looked at, at most.
POINTS = 99
#: Ranks expected in each bin of the chi-squared test, at least.
EXPECTED = 10

Data = TypeVar("Data")


def _stays(n: int, at: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """Probability that the counts of n uniform values below each of the points stay within low to high, all of them.

    By recursion over the points: given the count at one, the count at the next is binomial.
    """
    factorial = gammaln(np.arange(n + 1) + 1.0)
    counts, state, before = np.zeros(1, int), np.ones(1), 0.0
    for z, a, b in zip(at, low, high, strict=True):
        after = np.arange(a, b + 1)
        share = (z - before) / (1 - before)
        more = after[None] - counts[:, None]
        left = n - counts[:, None]
        possible = more >= 0
        more = np.where(possible, more, 0)
        log = factorial[left] - factorial[more] - factorial[left - more]
        log = log + more * np.log(share) + (left - more) * np.log1p(-share)
        state = state @ np.where(possible, np.exp(log), 0.0)
        counts, before = after, z
    return float(state.sum())


def _limits(n: int, at: np.ndarray, gamma: float) -> tuple[np.ndarray, np.ndarray]:
    """Counts whose two-sided binomial tail, point by point, is above gamma."""
    half = gamma / 2 * (1 + 1e-9)
    low = binom.ppf(half, n, at).astype(int)
    # The distribution's mirror image: numbers near 1 have no digits to spare.
    high = n - binom.ppf(half, n, 1 - at).astype(int)
    return low, np.maximum(high, low)


@lru_cache(maxsize=64)
def _gamma(n: int, at: tuple[float, ...], level: float) -> float:
    points = np.array(at)
    inside, outside = np.log(1e-12), np.log(1 - level)
    for _ in range(40):
        middle = (inside + outside) / 2
        if _stays(n, points, *_limits(n, points, float(np.exp(middle)))) >= level:
            inside = middle
        else:
            outside = middle
        if outside - inside < 1e-3:
            break
    return float(np.exp(inside))


def uniform_band(n: int, at: np.ndarray, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Band that the empirical distribution function of n uniform values leaves nowhere with probability `level`.

    Parameters
    ----------
    n : int
    at : ndarray, shape (k,)
        Points where it is looked at, between 0 and 1, increasing.
    level : float
        Of all points together. Counts are whole numbers, so that the true probability is this or a little more.

    Returns
    -------
    low, high : ndarray, shape (k,)
    """
    at = np.asarray(at, float)
    if n < 1 or not (0 < level < 1) or not len(at) or at[0] <= 0 or at[-1] >= 1 or (np.diff(at) <= 0).any():
        raise InputError(
            f"uniform_band: n {n}, level {level}, {len(at)} points; expected n from 1, a level between 0 and 1, and "
            "increasing points between 0 and 1."
        )
    low, high = _limits(n, at, _gamma(n, tuple(at.tolist()), level))
    return low / n, high / n


def uniform_p(counts: np.ndarray, n: int, at: np.ndarray) -> float:
    """Probability that n uniform values leave the diagonal somewhere by as much as these, pointwise tails compared.

    Parameters
    ----------
    counts : ndarray of int, shape (k,)
        Values below each of the points `at` (k,).
    """
    at = np.asarray(at, float)
    tails = 2 * np.minimum(binom.cdf(counts, n, at), binom.cdf(n - np.asarray(counts), n, 1 - at))
    gamma = float(tails.min())
    return 1.0 if gamma >= 1 else float(np.clip(1 - _stays(n, at, *_limits(n, at, gamma)), 0.0, 1.0))


@dataclass(frozen=True, eq=False)
class RankStatistics:
    """Ranks of truths among draws of their posteriors.

    Attributes
    ----------
    names : tuple of str
    ranks : ndarray of int, shape (n, p)
        How many of the draws lie below the truth, 0 to `draws`.
    draws : int
        Of each posterior, near independent.
    """

    names: tuple[str, ...]
    ranks: np.ndarray
    draws: int

    @property
    def replications(self) -> int:
        return self.ranks.shape[0]

    @property
    def bins(self) -> int:
        """Bins of equal width with at least `EXPECTED` ranks expected in each."""
        most = max(2, self.replications // EXPECTED)
        return max((b for b in range(2, most + 1) if (self.draws + 1) % b == 0), default=self.draws + 1)

    @property
    def counts(self) -> np.ndarray:
        """Ranks in each bin, (p, bins)."""
        width = (self.draws + 1) // self.bins
        return np.stack([np.bincount(r // width, minlength=self.bins) for r in self.ranks.T])

    @property
    def chi_squared(self) -> np.ndarray:
        """p-value of the chi-squared test of uniform ranks for each parameter, (p,)."""
        counts = self.counts
        expected = self.replications / self.bins
        return chi2.sf(((counts - expected) ** 2 / expected).sum(1), self.bins - 1)

    @property
    def at(self) -> np.ndarray:
        """Points at which the distribution function is looked at: exact under uniform ranks."""
        edges = np.unique(np.linspace(0, self.draws + 1, min(self.draws, POINTS) + 2).round().astype(int))[1:-1]
        return edges / (self.draws + 1)

    @property
    def ecdf(self) -> np.ndarray:
        """Share of ranks below each of the points `at`, (p, k)."""
        edges = np.round(self.at * (self.draws + 1))
        return (self.ranks.T[:, None] < edges[:, None]).mean(-1)

    @property
    def ecdf_p(self) -> np.ndarray:
        """p-value of the distribution function over all points for each parameter, (p,).

        It lies in the band of 95 % where this is above 0.05.
        """
        return np.array([uniform_p(np.round(e * self.replications).astype(int), self.replications, self.at)
                         for e in self.ecdf])  # fmt: skip

    def band(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """Simultaneous band of the distribution function at the points `at`."""
        return uniform_band(self.replications, self.at, level)

    def table(self) -> list[dict[str, object]]:
        """One row per parameter: the two p-values, and the shares of truths in the outer eighths of their posteriors.

        `expected` is the share that right posteriors have in each: an eighth, or as near as the number of draws allows.
        """
        edge = max(1, round((self.draws + 1) / 8))
        return [
            {"name": name, "chi_squared_p": float(c), "ecdf_p": float(e), "in_band": bool(e > 0.05),
             "lowest": float((self.ranks[:, k] < edge).mean()),
             "highest": float((self.ranks[:, k] > self.draws - edge).mean()), "expected": edge / (self.draws + 1)}
            for k, (name, c, e) in enumerate(zip(self.names, self.chi_squared, self.ecdf_p, strict=True))
        ]  # fmt: skip

    def _repr_html_(self) -> str:
        rows = [
            (r["name"], f"{r['chi_squared_p']:.3g}", f"{r['ecdf_p']:.3g}", f"{r['lowest']:.1%}",
             f"{r['highest']:.1%}") for r in self.table()
        ]  # fmt: skip
        title = f"Ranks of {self.replications} truths among {self.draws} draws"
        return html_table(("parameter", "p, chi-squared", "p, ECDF", "lowest eighth", "highest eighth"), rows, title)


def rank_statistics(names: Sequence[str], truth: np.ndarray, draws: np.ndarray, seed: int = 0) -> RankStatistics:
    """Rank truths among draws of their posteriors.

    Parameters
    ----------
    names : sequence of str
    truth : ndarray, shape (n, p)
    draws : ndarray, shape (n, L, p)
        Near independent: see `independent_draws`. Best with L + 1 a power of two, which many numbers of bins divide.
    seed : int
        Draws equal to the truth count as below it at random.

    Raises
    ------
    InputError
        If shapes differ or a value is not finite.
    """
    truth, draws = np.asarray(truth, float), np.asarray(draws, float)
    if truth.ndim != 2 or draws.ndim != 3 or draws.shape[::2] != truth.shape or len(names) != truth.shape[1]:
        raise InputError(
            f"rank_statistics: {len(names)} names, truth {truth.shape}, draws {draws.shape}; expected (n, p) and "
            "(n, draws, p)."
        )
    if not (np.isfinite(truth).all() and np.isfinite(draws).all()):
        raise InputError("rank_statistics: a truth or a draw is not finite; a rank needs numbers.")
    below, same = (draws < truth[:, None]).sum(1), (draws == truth[:, None]).sum(1)
    return RankStatistics(tuple(names), below + np.random.default_rng(seed).integers(0, same + 1), draws.shape[1])


def simulation_based_calibration(
    names: Sequence[str],
    prior: Callable[[int, np.random.Generator], np.ndarray],
    data: Callable[[np.ndarray, np.random.Generator], Data],
    posterior: Callable[[Data, np.random.Generator], np.ndarray],
    replications: int,
    seed: int = 0,
) -> RankStatistics:
    """Simulation-based calibration of a method, all replications at once.

    Parameters
    ----------
    names : sequence of str
        Of the p quantities ranked.
    prior : callable
        (n, rng) to truths (n, p), from the very prior that `posterior` uses: one that depends on the data will not do.
    data : callable
        (truths, rng) to the data of all of them, from the very likelihood that `posterior` uses.
    posterior : callable
        (data, rng) to near independent draws (n, L, p) of each posterior. A method that takes one set of data at a
        time loops here.
    replications : int
    seed : int

    Returns
    -------
    RankStatistics
    """
    if replications < 2 * EXPECTED:
        raise InputError(
            f"simulation_based_calibration: {replications} replications; fewer than {2 * EXPECTED} show nothing."
        )
    streams = [np.random.default_rng(s) for s in np.random.SeedSequence([seed, 7]).spawn(3)]
    truth = prior(replications, streams[0])
    draws = posterior(data(truth, streams[1]), streams[2])
    return rank_statistics(names, truth, draws, seed)


def independent_draws(samples: Samples, count: int, rng: np.random.Generator) -> np.ndarray:
    """Near independent, equally weighted draws (count, p) out of those of one posterior.

    Chains are thinned evenly; they should be worth several times `count` independent draws (``samples.ess``). Weighted
    draws are drawn from by their weights.
    """
    if samples.chains is not None:
        if count > len(samples.z):
            raise InputError(f"independent_draws: {count} asked for, but the chains have {len(samples.z)} draws.")
        return samples.z[np.linspace(0, len(samples.z) - 1, count).round().astype(int)]
    return samples.z[rng.choice(len(samples.z), count, p=samples.weights)]


def simulate_volumes(population: Population, patient: Patient, z: np.ndarray,
                     rng: np.random.Generator) -> list[Patient]:  # fmt: skip
    """Virtual patients of a population: its model at the coordinates z, with errors drawn from its likelihood.

    Parameters
    ----------
    population : Population
    patient : Patient
        Without images: its days, treatments and detection floor are those of all; its volumes are not used.
    z : ndarray, shape (n, p)
        Transformed coordinates of the patients, as drawn from ``population.gaussian``.

    Raises
    ------
    InputError
        If log(V + floor) came out below log(floor), which no volume shows: with such a floor the likelihood is not the
        exact law of the data.
    """
    if patient.volumes is None:
        raise InputError(f"simulate_volumes: patient {patient.id} has no noise of its volumes.")
    floor = patient.volumes.floor
    days = measured(patient)[0]
    course = VolumeModel(population.model, population.parameters, [patient], days, np.array([floor]), TorchSolver())
    clean = course.draws(np.asarray(z, float)[None])[0]
    noise = population.noise
    errors = rng.standard_normal(clean.shape) if np.isinf(noise.df) else rng.standard_t(noise.df, clean.shape)
    volumes = np.exp(clean + errors * noise.at(days - days[0])) - floor
    if (low := int((~(volumes > 0)).sum())) or not np.isfinite(volumes).all():
        raise InputError(
            f"simulate_volumes: {low} of {volumes.size} volumes are not above 0 or not finite; lower the floor of "
            f"{floor:g} cm³, or narrow the priors."
        )
    return [Patient.from_volumes(f"{patient.id}{i}", days, v, patient.schedule, cv=patient.volumes.cv, floor=floor)
            for i, v in enumerate(volumes)]  # fmt: skip
