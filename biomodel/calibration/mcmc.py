"""Posteriors by Markov chains: `NUTS`, which follows gradients, and `SMC`, which does without.

Both sample the density of :mod:`biomodel.calibration.density` and start from a Laplace fit: its optimum is where the
weights of images are held, and its covariance is the mass matrix of NUTS.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from scipy.special import logsumexp

from biomodel.calibration.bayes import library
from biomodel.calibration.density import Whitened
from biomodel.calibration.gaussnewton import GaussianPrior
from biomodel.calibration.nuts import ByNutpie, ByPymc, Engine, sample_nuts
from biomodel.calibration.samples import Chains, Samples
from biomodel.errors import CalibrationError

if TYPE_CHECKING:
    from biomodel.calibration.laplace import MAP

__all__ = ["NUTS", "SMC", "ByNutpie", "ByPymc", "advice", "sample_nuts", "sample_smc"]

#: R-hat above which chains are called unmixed in a note, and above which there is no result; effective draws per chain
#: below which intervals are called rough. Vehtari et al. 2021, doi:10.1214/20-BA1221: 1.01 and 100; beyond 1.1 no
#: practice takes chains as draws of one distribution.
MIXED, UNMIXED, ENOUGH = 1.01, 1.1, 100


class Posterior(Protocol):
    """A density of a calibration: what the methods here sample."""

    size: int
    prior: GaussianPrior
    limits: tuple[np.ndarray, np.ndarray]

    def __call__(self, x: np.ndarray, /) -> tuple[float, np.ndarray]:
        """Log density and gradient."""

    def value(self, x: np.ndarray, /) -> float:
        """Log density."""

    def log_likelihood(self, z: np.ndarray) -> float:
        """Log-likelihood."""

    def fingerprint(self) -> str:
        """Digest of all that it is made of."""


def _whole(what: str, **numbers: tuple[int, int]) -> None:
    for name, (value, least) in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise CalibrationError(f"{what}: {name} is {value!r}; expected a whole number from {least}.")


@dataclass(frozen=True)
class NUTS:
    """Draws from the posterior by the no-U-turn sampler, started from the Laplace fit.

    Hoffman and Gelman 2014, J Mach Learn Res 15:1593. The coordinates are whitened by the Laplace covariance, which is
    so the first mass matrix; a diagonal one is adapted from there during the tuning. The evidence stays Laplace's.

    Parameters
    ----------
    chains, draws, tune : int
        Chains, draws kept of each, and draws before them that adapt step size and mass matrix.
    target_accept : float
        Mean acceptance that the step size aims at. Raise it where there are divergences.
    seed : int
        The same seed gives the same draws.
    map : MAP, optional
        The search for the optimum; ``MAP()`` by default.
    engine : ByPymc or ByNutpie
        Which library draws.
    checkpoint : path, optional
        A folder in which chains are kept as they are drawn. A run that was stopped goes on from it, and one that asks
        for more draws, or more chains, continues what is there; other settings or data are refused.
    """

    chains: int = 4
    draws: int = 1000
    tune: int = 500
    target_accept: float = 0.8
    seed: int = 0
    map: MAP | None = None
    engine: Engine = ByPymc()
    checkpoint: str | PathLike[str] | None = None

    def __post_init__(self) -> None:
        _whole("NUTS", chains=(self.chains, 1), draws=(self.draws, 4), tune=(self.tune, 0), seed=(self.seed, 0))
        if not 0 < self.target_accept < 1:
            raise CalibrationError(f"NUTS: target_accept is {self.target_accept!r}; expected a number between 0 and 1.")

    def sample(self, density: Posterior, centre: np.ndarray, covariance: np.ndarray,
               progress: Callable[[str], None] | None = None) -> Samples:  # fmt: skip
        """Draw from a density around the optimum `centre` (p,) with the covariance (p, p) there.

        Raises
        ------
        CalibrationError
            If the density is not finite at the optimum, or the chains do not mix.
        """
        if not np.isfinite(density(centre)[0]):
            raise CalibrationError(
                "NUTS: the log density is not finite at the optimum of the Laplace fit, where chains begin; check "
                "priors, bounds and data."
            )
        white = Whitened(density, centre, np.linalg.cholesky(covariance), density.limits)
        found = sample_nuts(white, self.chains, self.draws, self.tune, self.target_accept, self.seed, self.engine,
                            self.checkpoint, progress)  # fmt: skip
        chains = Chains(white.coordinates(found.x), found.stats, found.gradients, found.seconds, self.engine.version)
        _refuse_unmixed(chains, "NUTS", self.checkpoint is not None)
        return Samples.of(chains)


@dataclass(frozen=True)
class SMC:
    """Draws from the posterior by sequential Monte Carlo, without gradients; the evidence comes with them.

    Particles drawn from the prior are carried to the posterior by raising the likelihood to powers from 0 to 1 (Del
    Moral, Doucet and Jasra 2006, J R Stat Soc B 68:411, doi:10.1111/j.1467-9868.2006.00553.x), by PyMC, with
    independent Metropolis-Hastings moves. A run is short and keeps no checkpoint: one that was interrupted starts anew.
    For models whose solver gives no gradients; where there are gradients, NUTS
    needs far fewer runs of the model.

    Parameters
    ----------
    draws, chains : int
        Particles of each run, and independent runs.
    threshold : float
        Share of effective particles at which the next power is set.
    correlation : float
        Moves of a stage go on until they have taken away this much of the particles' correlation with where they were.
    seed : int
    map : MAP, optional
        The search for the optimum, at which the weights of images are held.
    """

    draws: int = 1000
    chains: int = 2
    threshold: float = 0.5
    correlation: float = 0.01
    seed: int = 0
    map: MAP | None = None

    def __post_init__(self) -> None:
        _whole("SMC", draws=(self.draws, 10), chains=(self.chains, 1), seed=(self.seed, 0))
        if not (0 < self.threshold < 1 and 0 < self.correlation < 1):
            raise CalibrationError(
                f"SMC: threshold {self.threshold!r}, correlation {self.correlation!r}; expected both between 0 and 1."
            )

    def sample(self, density: Posterior, centre: np.ndarray, covariance: np.ndarray,
               progress: Callable[[str], None] | None = None) -> Samples:  # fmt: skip
        """Draw from a density; `centre` and `covariance` are not used.

        Raises
        ------
        CalibrationError
            If no particle can be evaluated, or the runs disagree.
        """
        del centre, covariance
        found = sample_smc(density, self, progress)
        assert found.chains is not None
        _refuse_unmixed(found.chains, "SMC", False)
        return found


def sample_smc(density: Posterior, method: SMC, progress: Callable[[str], None] | None = None) -> Samples:
    """Sequential Monte Carlo of a density from its prior."""
    pm, pt, apply = library("pymc"), library("pytensor.tensor"), library("pytensor.graph.basic").Apply
    root, mean = np.linalg.cholesky(density.prior.covariance), density.prior.mean
    low, high = density.limits
    count = 0

    class LogLikelihood(library("pytensor.graph.op").Op):  # type: ignore[misc]
        __props__ = ()

        def make_node(self, *inputs: Any) -> Any:
            return apply(self, [pt.as_tensor_variable(inputs[0])], [pt.dscalar()])

        def perform(self, node: Any, inputs: Any, outputs: Any) -> None:
            nonlocal count
            count += 1
            z = mean + root @ np.asarray(inputs[0], float)
            inside = bool(((z >= low) & (z <= high)).all())
            value = density.log_likelihood(z) if inside else -np.inf
            # Powers of the likelihood near 0 times -inf would be undefined.
            outputs[0][0] = np.asarray(max(value, -1e250))
            if progress and count % 1000 == 0:
                progress(f"{count} runs of the model")

    begun = time.process_time()
    with pm.Model(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its experimental state and its own checks, which follow here
        x = pm.Normal("x", 0.0, 1.0, shape=density.size)
        pm.Potential("likelihood", LogLikelihood()(x))
        trace = pm.sample_smc(
            draws=method.draws, chains=method.chains, cores=1, threshold=method.threshold,
            correlation_threshold=method.correlation, random_seed=method.seed, progressbar=False,
            compute_convergence_checks=False,
        )  # fmt: skip
    z = mean + trace.posterior["x"].values @ root.T
    last = [np.asarray(v, object).ravel() for v in trace.sample_stats["log_marginal_likelihood"].values]
    each = np.array([float(np.ravel(v[-1])[-1]) for v in last])
    if not (np.isfinite(each).all() and (each > -1e200).all()):
        raise CalibrationError("SMC: no particle of the prior can be evaluated; check priors, bounds and data.")
    chains = Chains(z, {}, count, time.process_time() - begun, f"pymc {version('pymc')}")
    return Samples.of(chains, float(logsumexp(each) - np.log(len(each))))


def _refuse_unmixed(chains: Chains, what: str, kept: bool) -> None:
    worst = np.nan_to_num(chains.r_hat, nan=1.0).max()
    if not np.isfinite(chains.z).all() or worst > UNMIXED or (chains.z.std((0, 1)) == 0).any():
        more = "Raise draws, threshold or correlation"
        where = "; the checkpoint keeps the draws, and more of them continue it" if kept else ""
        if what == "NUTS":
            more = f"Raise tune and draws{where}; raise target_accept to 0.95 where there are divergences"
        raise CalibrationError(
            f"{what}: the chains have not mixed (R-hat {worst:.3f}, where {UNMIXED} is the most that is accepted; "
            f"{chains.divergences} divergences), so that they are no draws of the posterior. {more}; fix or narrow "
            "parameters that the data do not tell apart (the notes of a Laplace fit name them); or look for two "
            "separate optima with other starts."
        )


def advice(names: tuple[str, ...], chains: Chains) -> list[str]:
    """What is to be said of chains that are a result, but no perfect one."""
    found = []
    count = chains.z.shape[0]
    if count == 1:
        found.append("A single chain cannot show whether it has found all of the posterior; take four.")
    elif (worst := float(chains.r_hat.max())) > MIXED:
        found.append(
            f"The chains have hardly mixed: R-hat of {names[int(chains.r_hat.argmax())]} is {worst:.3f} (it should be "
            f"below {MIXED}). Take intervals with care; raise tune and draws."
        )
    whole = "The single chain is" if count == 1 else f"The {count} chains are"
    for kind, sizes in (("bulk", chains.bulk), ("tail", chains.tail)):
        if sizes.min() < ENOUGH * count:
            found.append(
                f"{whole} worth {sizes.min():.0f} independent draws ({kind}, "
                f"{names[int(sizes.argmin())]}); smooth intervals need {ENOUGH} for each chain. Raise draws."
            )
    if chains.divergences:
        share = chains.divergences / chains.z[..., 0].size
        found.append(
            f"{chains.divergences} of the draws ({100 * share:.2g} %) diverged: the posterior is curved more sharply "
            "somewhere than the step size allows, and may be missing there. Raise target_accept to 0.95 or 0.99, or "
            "narrow the priors of parameters that the data do not tell apart."
        )
    return found
