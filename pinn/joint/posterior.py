"""The posterior of start, parameters and noise: a Gaussian at the optimum, corrected by importance sampling.

With few visits and an unknown start the posterior is skewed. Draws from wide Student-t distributions are weighed by the
likelihood of the classical solver, which costs little for many draws at once; a second round of draws is proposed where
the first found weight (Cappé et al. 2004, J Comput Graph Stat 13:907, doi:10.1198/106186004X12803). Where a network
found the optimum, the difference of its state from the classical one there is added to all draws: a first-order
correction of the classical solver's grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy.special import gammaln, logsumexp, ndtri

from biomodel.calibration.gaussnewton import Optimum, minimise
from biomodel.calibration.samples import Samples, weighted_quantile
from biomodel.errors import CalibrationError, SolverError
from biomodel.solvers.base import Solver
from biomodel.solvers.torch import TorchSolver
from pinn.joint.problem import DataWarning, JointProblem
from pinn.joint.starts import Start
from pinn.solver import PinnSimulation

#: How exact the classical solver is that searches and weighs: errors in time far below those of the data.
ROUGH = TorchSolver(rtol=3e-3)
#: Starting points that are followed to their optimum.
FOLLOWED = 2
#: Degrees of freedom and widening of the Student-t from which draws are proposed.
PROPOSAL_DF, WIDEN = 6.0, 1.3
#: Most coordinates for importance sampling.
MOST = 30
#: Effective sample size below which weights are not trusted, and posterior over prior sd above which nothing was told.
FEW, UNTOLD = 60.0, 0.9
#: Draws simulated at once.
BLOCK = 64


@dataclass(frozen=True, eq=False)
class JointPosterior:
    """Posterior of the coordinates z (p,): model's parameters, start, modalities' unknowns.

    Attributes
    ----------
    problem : JointProblem
        With the solver that found the optimum.
    z : ndarray, shape (p,)
        Maximum a posteriori.
    covariance : ndarray, shape (p, p)
    converged : bool
    iterations : int
    log_evidence : float
        Laplace approximation, to compare starts of several kinds on the same data.
    samples : Samples or None
        Weighted draws, where importance sampling was done.
    notes : tuple of str
        What went not as it should.
    """

    problem: JointProblem
    z: np.ndarray
    covariance: np.ndarray
    converged: bool
    iterations: int
    log_evidence: float
    samples: Samples | None = None
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> dict[str, float]:
        """Values at the optimum by name."""
        return self.problem.values(self.z)

    @property
    def sd(self) -> np.ndarray:
        """Standard deviations (p,) of the coordinates at the optimum."""
        return np.sqrt(np.diag(self.covariance))

    @property
    def shrinkage(self) -> dict[str, float]:
        """Posterior over prior sd by name: near 1 where the data told nothing."""
        covariance = self.covariance if self.samples is None else self.samples.covariance
        ratio = np.sqrt(np.diag(covariance)) / self.problem.prior.sd
        return dict(zip(self.problem.names, ratio.tolist(), strict=True))

    def draws(self, count: int, seed: int = 0) -> np.ndarray:
        """Equally weighted draws (count, p) of the coordinates."""
        rng = np.random.default_rng([seed, 11])
        if self.samples is not None:
            return self.samples.resample(count, rng)
        root = np.linalg.cholesky(self.covariance)
        return np.clip(self.z + rng.standard_normal((count, len(self.z))) @ root.T, *self.problem.limits)

    def interval(self, level: float = 0.9) -> dict[str, tuple[float, float]]:
        """Central intervals of the values by name (quantiles of each coordinate, transformed)."""
        ends = [0.5 - level / 2, 0.5 + level / 2]
        if self.samples is not None:
            z = np.stack([weighted_quantile(x, self.samples.weights, ends) for x in self.samples.z.T], 1)
        else:
            z = self.z + ndtri(np.array(ends))[:, None] * self.sd
        low, high = (self.problem.values(row) for row in z)
        return {n: (min(low[n], high[n]), max(low[n], high[n])) for n in low}


def infer_joint(problem: JointProblem, search: Solver | None = ROUGH, begin: np.ndarray | None = None,
                iterations: int = 40, tolerance: float = 0.02, progress: Callable[[str], None] | None = None
                ) -> JointPosterior:  # fmt: skip
    """Start, parameters and noise by Gauss-Newton, from several starting points.

    Parameters
    ----------
    search : Solver or None
        Finds the optimum first, from where the problem's own solver goes on; None leaves all to the problem's solver.
        A network then needs few iterations, and none of its trainings is spent on bad starting points.
    begin : ndarray, shape (p,), optional
        Coordinates to begin at, in place of a search.
    tolerance : float
        Stop where the optimum is nearer than this many posterior standard deviations.

    Raises
    ------
    CalibrationError
        If the model cannot be evaluated at any starting point.
    """
    if begin is None and search is not None and isinstance(problem.simulation, PinnSimulation):
        begin = _searched(problem.by(search), iterations, 3 * tolerance, progress).z
    if begin is None:
        best = _searched(problem, iterations, tolerance, progress)
    else:
        best = _optimum(problem, begin, iterations, tolerance, progress)
    hessian = best.linear.hessian + problem.prior.precision
    covariance = np.linalg.inv(hessian)
    volumes = np.linalg.slogdet(hessian)[1] - np.linalg.slogdet(problem.prior.precision)[1]
    evidence = np.log(problem.bound.alike) - best.objective - 0.5 * volumes
    notes = [] if best.converged else [f"the search had not converged after {best.iterations} iterations"]
    result = JointPosterior(problem, best.z, (covariance + covariance.T) / 2, best.converged, best.iterations,
                            float(evidence), None, tuple(notes))  # fmt: skip
    return _told(result)


def choose_start(problem: JointProblem, starts: Sequence[Start], search: Solver = ROUGH,
                 progress: Callable[[str], None] | None = None) -> JointPosterior:  # fmt: skip
    """The posterior with the kind of start for which the data speak most: the highest evidence (Laplace).

    The evidence counts what further foci cost: MacKay 1992, Neural Comput 4:415, doi:10.1162/neco.1992.4.3.415.

    Parameters
    ----------
    problem : JointProblem
        Its own start is not looked at.
    starts : sequence of Start
        For instance ``[Foci(1), Foci(2), FreeStart()]``.
    search : Solver
        Classical; it compares them. The problem's solver then goes on with the best.
    """
    best: tuple[float, Start] | None = None
    for start in starts:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataWarning)
            found = infer_joint(replace(problem.by(search), start=start), progress=progress)
        if progress:
            progress(f"{start}: log evidence {found.log_evidence:.1f}")
        if best is None or found.log_evidence > best[0]:
            best = (found.log_evidence, start)
    if best is None:
        raise CalibrationError("choose_start: no start was given.")
    return infer_joint(replace(problem, start=best[1]), search, progress=progress)


def _told(result: JointPosterior) -> JointPosterior:
    """With a warning where the data told nothing of a parameter of the model."""
    untold = [n for n in result.problem.parameters if result.shrinkage[n] > UNTOLD]
    if not untold:
        return result
    text = f"the observations tell nothing of {', '.join(untold)}: the posterior is the prior."
    warnings.warn(text, DataWarning, stacklevel=3)
    return replace(result, notes=(*result.notes, text))


def _searched(problem: JointProblem, iterations: int, tolerance: float, progress) -> Optimum:
    """The best of the optima found from the most likely starting points."""
    found = [_optimum(problem, z, iterations, tolerance, progress) for z in _beginnings(problem)]
    return min(found, key=lambda o: o.objective)


def _beginnings(problem: JointProblem) -> list[np.ndarray]:
    """The most likely of the starting points (p,)."""
    day = problem.days[0]
    seen = [o for o in problem.observations if o.day == day]
    image = np.mean([o.modality.guess(o.values) for o in seen], 0)
    tried: list[tuple[float, np.ndarray]] = []
    failure: Exception | None = None
    for guess in problem.bound.guesses(image):
        z = problem.prior.mean.copy()
        z[problem.cut[1]] = guess
        z = np.clip(z, *problem.limits)
        try:
            offset = (z - problem.prior.mean) / problem.prior.sd
            tried.append((problem.objective(z) + 0.5 * float(offset @ offset), z))
        except SolverError as error:
            failure = error
    if not tried:
        raise CalibrationError(f"the model cannot be evaluated at any starting point: {failure}")
    return [z for _, z in sorted(tried, key=lambda t: t[0])[:FOLLOWED]]


def _optimum(problem: JointProblem, z: np.ndarray, iterations: int, tolerance: float, progress) -> Optimum:
    return minimise(problem.linearise, z, problem.prior, problem.limits, iterations, tolerance,
                    lambda at, step: at + step, progress)  # fmt: skip


# Importance sampling --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Student:
    """A multivariate Student-t: centre (p,) and root (p, p) of its scale matrix."""

    centre: np.ndarray
    root: np.ndarray = field(repr=False)

    def draw(self, count: int, rng: np.random.Generator) -> np.ndarray:
        normal = rng.standard_normal((count, len(self.centre)))
        stretch = np.sqrt(PROPOSAL_DF / rng.chisquare(PROPOSAL_DF, count))
        return self.centre + (normal * stretch[:, None]) @ self.root.T

    def log_density(self, z: np.ndarray) -> np.ndarray:
        nu, p = PROPOSAL_DF, len(self.centre)
        squares = (np.linalg.solve(self.root, (z - self.centre).T) ** 2).sum(0)
        constant = gammaln((nu + p) / 2) - gammaln(nu / 2) - p / 2 * np.log(nu * np.pi)
        return constant - np.log(np.diag(self.root)).sum() - (nu + p) / 2 * np.log1p(squares / nu)


def resampled(posterior: JointPosterior, draws: int = 256, rounds: int = 8, wanted: float = 200.0, seed: int = 0,
              solver: Solver = ROUGH) -> JointPosterior:  # fmt: skip
    """The posterior by importance sampling around its Gaussian.

    Parameters
    ----------
    draws : int
        Of each round.
    rounds : int
        Most rounds; there are at least two.
    wanted : float
        Effective sample size at which no further round is begun.
    solver : Solver
        Classical; it weighs the draws.

    Returns
    -------
    JointPosterior
        With `samples`; with a note and without them where the weights cannot be trusted.

    Raises
    ------
    CalibrationError
        If there are too many coordinates (a free start).
    """
    size = len(posterior.z)
    if size > MOST:
        raise CalibrationError(
            f"{size} coordinates are too many for importance sampling (at most {MOST}); the Gaussian of `infer_joint` "
            "stands, `chained` corrects it, or describe the start by Foci."
        )
    rng = np.random.default_rng([seed, 12])
    classical = classical_of(posterior, solver)
    proposals = [_Student(posterior.z, np.linalg.cholesky(WIDEN * posterior.covariance))]
    z, log_target, sizes = np.empty((0, size)), np.empty(0), []
    for turn in range(rounds):
        fresh = proposals[turn].draw(draws, rng)
        z = np.concatenate((z, fresh))
        log_target = np.concatenate((log_target, log_posterior(classical, fresh)))
        sizes.append(draws)
        log_mixture = logsumexp(
            [np.log(n / len(z)) + q.log_density(z) for n, q in zip(sizes, proposals, strict=True)], axis=0
        )
        log_weight = log_target - log_mixture
        total = logsumexp(log_weight)
        if not np.isfinite(total):
            break
        weights = np.exp(log_weight - total)
        if turn and 1 / (weights**2).sum() >= wanted:
            break
        # Where few draws have the weight, they are tempered until they tell a shape.
        shape = weights.copy()
        while 1 / (shape**2).sum() < 3 * size:
            shape = np.sqrt(shape)
            shape /= shape.sum()
        centre = shape @ z
        spread = ((z - centre) * shape[:, None]).T @ (z - centre)
        # A little of the Gaussian keeps it regular.
        spread = 0.9 * spread + 0.1 * posterior.covariance
        proposals.append(_Student(centre, np.linalg.cholesky(WIDEN * spread)))
    if not np.isfinite(total) or 1 / (weights**2).sum() < FEW / 3:
        return replace(posterior, notes=(*posterior.notes, "importance sampling failed; the Gaussian stands"))
    samples = Samples(z, weights, float(total - np.log(len(z))))
    notes = posterior.notes
    if samples.ess < FEW:
        notes = (*notes, f"importance sampling has an effective sample size of {samples.ess:.0f} of {len(z)}")
    return replace(posterior, samples=samples, notes=notes)


def classical_of(posterior: JointPosterior, solver: Solver) -> JointProblem:
    """The problem by a classical solver, shifted to a network's predictions at the optimum where a network found it."""
    problem, classical = posterior.problem, posterior.problem.by(solver)
    if not isinstance(problem.simulation, PinnSimulation):
        return classical
    return problem.by(solver, problem.predicted(posterior.z) - classical.predicted(posterior.z))


def log_posterior(problem: JointProblem, z: np.ndarray) -> np.ndarray:
    """Log posterior densities (draws,) up to a constant; -inf beyond the bounds and where the model fails."""
    low, high = problem.limits
    inside = ((z >= low) & (z <= high)).all(1)
    found = np.full(len(z), -np.inf)
    offset = z[inside] - problem.prior.mean
    log_prior = -0.5 * np.einsum("np,pq,nq->n", offset, problem.prior.precision, offset)
    log_prior += 0.5 * np.linalg.slogdet(problem.prior.precision)[1] - z.shape[1] / 2 * np.log(2 * np.pi)
    found[inside] = log_prior - problem.loss(predictions(problem, z[inside]), z[inside])
    return np.where(np.isfinite(found), found, -np.inf)


def predictions(problem: JointProblem, z: np.ndarray) -> np.ndarray:
    """Predictions (draws, n) of a classical solver at many coordinates (draws, p), where something was measured."""
    parts = []
    order = np.argsort(z[:, 0])  # neighbours in the first parameter share steps
    for block in np.array_split(order, max(1, -(-len(z) // BLOCK))):
        parts.append(simulated(problem, z[block], np.array(problem.days))[:, problem.rows])
    found = np.empty((len(z), int(problem.rows.sum())))
    found[order] = np.concatenate(parts)
    return found if problem.offset is None else found + problem.offset


def simulated(problem: JointProblem, z: np.ndarray, days: np.ndarray, simulation=None) -> np.ndarray:
    """States (draws, T, z, y, x) at coordinates (draws, p); NaN where a run fails."""
    simulation = simulation or problem.simulation
    params: Mapping = {n: torch.tensor(v) for n, v in problem.physical(z).items()}
    u0 = problem.u0(z)
    with torch.no_grad():
        try:
            return np.asarray(simulation(params, u0, days, plan=simulation.plan(params, u0, days)))
        except SolverError:
            if len(z) == 1:
                return np.full((1, len(days), *problem.domain.shape), np.nan)
    return np.concatenate([simulated(problem, row[None], days, simulation) for row in z])


__all__ = ["JointPosterior", "choose_start", "infer_joint", "resampled"]
