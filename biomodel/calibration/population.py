"""Priors learned from a cohort of patients without images (empirical Bayes).

Parameters of a patient are Gaussian in transformed coordinates, z_i ~ N(mean, covariance); measurements are
log(V + floor) with Student-t errors. `learn_priors` finds mean, covariance and the scale of the errors by expectation
maximisation: every patient's posterior is sampled at the current population (see `importance`), then the population
moves to the weighted moments. Weak prior knowledge enters as a few pseudo-patients.

A point estimate of the population ignores its own uncertainty, which is small for cohorts of hundreds; the covariance's
pseudo-patients keep directions that the data hardly inform from collapsing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.special import logsumexp, ndtr, stdtr

from biomodel.calibration.gaussnewton import GaussianPrior, prior_of
from biomodel.calibration.importance import Points, VolumeData, Weighted, modes, sample
from biomodel.calibration.volumes import VolumeNoise, measured, t_constant, t_weights, volume_parameters
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import JointPrior, Parameter
from biomodel.patient import Patient
from biomodel.solvers.torch import TorchSolver
from biomodel.tables import html_table

__all__ = ["CohortPosterior", "Population", "PseudoPatients", "learn_priors"]


@dataclass(frozen=True)
class PseudoPatients:
    """How many patients' worth of belief the starting point carries, in its mean, its covariance and its noise.

    `noise` draws the scale of each visit to that of all visits.
    """

    mean: float = 10.0
    covariance: float = 60.0
    noise: float = 25.0

    def __post_init__(self):
        if min(self.mean, self.covariance, self.noise) < 0:
            raise CalibrationError(f"{self}: expected numbers of patients, 0 or more.")


@dataclass(frozen=True, eq=False)
class Population:
    """What a cohort taught. Pass it to `calibrate` in place of a model.

    Attributes
    ----------
    model : ReactionDiffusion
        With the learned prior of its own parameters.
    prior : JointPrior
        Joint Gaussian over all calibrated parameters, those of the first visit included.
    parameters : mapping of str to Parameter
        With their learned marginal priors.
    noise : VolumeNoise
    patients : int
        From how many it was learned.
    log_evidence : float
        Of the cohort's data, summed over patients, by importance sampling.
    trace : tuple of float
        The same by iteration; it rises and then only fluctuates if the learning has converged.
    """

    model: ReactionDiffusion
    prior: JointPrior
    parameters: Mapping[str, Parameter]
    noise: VolumeNoise
    patients: int
    log_evidence: float
    trace: tuple[float, ...]

    @property
    def gaussian(self) -> GaussianPrior:
        """The prior in the order of `parameters`."""
        return prior_of(dict(self.parameters), self.prior)

    def posterior(self, patients: Sequence[Patient], days: np.ndarray | None = None, draws: int = 2048, seed: int = 0,
                  solver: TorchSolver | None = None) -> CohortPosterior:  # fmt: skip
        """Posteriors of many patients at once, as `calibrate` with `Importance` gives one by one.

        Parameters
        ----------
        patients : sequence of Patient
            All their volumes are used: cut with ``patient.until(visit)`` for a forecast.
        days : array, shape (k,) or (n, k), optional
            Days after their last visits at which predictions are wanted, increasing.
        """
        solver = TorchSolver() if solver is None else solver
        beyond = None if days is None else np.asarray(days, float)
        data = VolumeData.of(self.model, self.parameters, patients, solver, beyond)
        prior, scale = self.gaussian, self.noise.at(data.since)
        start = np.tile(prior.mean, (len(patients), 1))
        mode, covariance = modes(data, prior, scale, self.noise.df, start, 40)
        points = Points.make(len(patients), draws, len(prior.mean), seed)
        drawn = sample(data, prior, scale, self.noise.df, mode, covariance, points)
        first = np.array([measured(p)[0][0] for p in patients])
        width = data.y.shape[1]
        later = np.zeros((len(patients), 0)) if beyond is None else np.broadcast_to(
            np.atleast_2d(beyond), (len(patients), beyond.shape[-1])
        )  # fmt: skip
        return CohortPosterior(self, drawn, mode, later - first[:, None], drawn.fitted[..., width:], seed)

    def laplace(self, patients: Sequence[Patient], solver: TorchSolver | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Posterior modes (n, p) of many patients at once and the covariances (n, p, p) there, as `Laplace` gives."""
        data = VolumeData.of(self.model, self.parameters, patients, TorchSolver() if solver is None else solver)
        prior, scale = self.gaussian, self.noise.at(data.since)
        z, _ = modes(data, prior, scale, self.noise.df, np.tile(prior.mean, (len(patients), 1)), 60)
        fitted, jacobian = data.model.jacobian(z)
        weight = np.where(data.seen, t_weights(data.y - fitted, scale, self.noise.df)[1], 0.0)
        hessian = np.einsum("ntp,nt,ntq->npq", jacobian, weight, jacobian) + prior.precision
        return z, np.linalg.inv(hessian)

    def table(self) -> list[dict[str, object]]:
        """One row per parameter: median, central 90 % of patients, unit."""
        rows = []
        for name, p in self.parameters.items():
            low, high = p.prior.quantile(0.05), p.prior.quantile(0.95)
            rows.append({"name": name, "median": p.prior.quantile(0.5), "low": low, "high": high, "units": p.units,
                         "sd": p.prior.scale, "description": p.description})  # fmt: skip
        return rows

    def _repr_html_(self) -> str:
        rows = [
            (r["name"], f"{r['median']:.3g}", f"{r['low']:.3g} to {r['high']:.3g}", r["units"]) for r in self.table()
        ]
        title = f"{self.model.label}, learned from {self.patients} patients"
        scale = ", ".join(f"{s:.2f}" for s in self.noise.scale)
        return (
            html_table(("parameter", "median", "90 % of patients", "unit"), rows, title)
            + f"<p>Scale of the errors of log(volume + floor): {scale}</p>"
        )


@dataclass(frozen=True, eq=False)
class CohortPosterior:
    """Weighted posterior draws of many patients.

    Attributes
    ----------
    draws : Weighted
        Their `log_evidence` (n,) compares models of the same patients.
    mode : ndarray, shape (n, p)
    since : ndarray, shape (n, k)
        Predicted days since the first visit.
    predicted : ndarray, shape (n, draws, k)
        log(V + floor) without the measurement's error.
    """

    population: Population
    draws: Weighted
    mode: np.ndarray
    since: np.ndarray
    predicted: np.ndarray
    seed: int

    @property
    def weights(self) -> np.ndarray:
        return self.draws.weights

    def measurements(self) -> np.ndarray:
        """Draws of the log(V + floor) that would be measured, (n, draws, k)."""
        noise = self.population.noise
        rng = np.random.default_rng([self.seed, 3])
        errors = rng.standard_t(noise.df, self.predicted.shape) * noise.at(self.since)[:, None]
        return np.nan_to_num(self.predicted, nan=1e3, posinf=1e3, neginf=-1e3) + errors

    def log_density(self, y: np.ndarray) -> np.ndarray:
        """Log predictive density of measured log(V + floor), (n, k) to (n, k); each day by itself.

        A volume below the detection floor counts, as in the likelihood, as a measured log(floor).
        """
        noise = self.population.noise
        scale = noise.at(self.since)[:, None]
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            each = t_constant(scale, noise.df) - t_weights(np.asarray(y)[:, None] - self.predicted, scale, noise.df)[0]
            each = np.where(np.isfinite(each), each, -np.inf) + np.log(self.weights)[..., None]
        return logsumexp(each, 1)

    def pit(self, y: np.ndarray) -> np.ndarray:
        """Predictive probability of a measured log(V + floor) below the one seen, (n, k) to (n, k)."""
        noise = self.population.noise
        with np.errstate(over="ignore", invalid="ignore"):
            z = (np.asarray(y)[:, None] - self.predicted) / noise.at(self.since)[:, None]
        below = ndtr(z) if np.isinf(noise.df) else stdtr(noise.df, z)
        return np.einsum("ns,nsk->nk", self.weights, np.where(np.isnan(below), 0.0, below))


def learn_priors(
    model: ReactionDiffusion,
    patients: Sequence[Patient],
    *,
    start: JointPrior | None = None,
    correlated: bool = False,
    noise_by_visit: bool = False,
    df: float | None = None,
    belief: PseudoPatients | None = None,
    iterations: int = 40,
    draws: int = 128,
    seed: int = 0,
    solver: TorchSolver | None = None,
) -> Population:
    """Learn the priors of a model, and the noise of the volumes, from a cohort of patients without images.

    Parameters
    ----------
    model : ReactionDiffusion
        Its own priors are the starting point, and what `belief` draws the result to.
    patients : sequence of Patient
        On the well-mixed domain (``patient.without_images()``); all their volumes are used.
    start : JointPrior, optional
        Starting point of some parameters in place of the model's priors; also those of the first visit
        (``"initial.volume"``, ``"initial.capacity"``).
    correlated : bool
        Learn a full covariance; otherwise parameters are independent.
    noise_by_visit : bool
        Learn a scale of the errors for each visit number (all patients on one protocol) rather than one.
    df : float, optional
        Degrees of freedom of the errors; by default those of the patients' records.
    belief : PseudoPatients, optional
        How many patients the starting point counts for.
    iterations : int
        Of the expectation maximisation.
    draws : int
        Of the importance sampling, for each patient.
    seed : int
        Of the draws.
    solver : TorchSolver, optional
        Solver of the model.

    Returns
    -------
    Population

    Raises
    ------
    CalibrationError
        If there are fewer patients than parameters, or one has no volumes.

    Notes
    -----
    Monte Carlo expectation maximisation: Wei and Tanner 1990, doi:10.1080/01621459.1990.10474930; the errors' scale
    with the weights of the Student-t as a scale mixture: Lange et al. 1989, doi:10.1080/01621459.1989.10478852.
    """
    patients, solver = list(patients), TorchSolver() if solver is None else solver
    belief = PseudoPatients() if belief is None else belief
    origin = Origin.of(model, patients, start, df, "learn_priors")
    data = VolumeData.of(model, origin.parameters, patients, solver)
    n, p = len(patients), len(origin.parameters)
    errors = Errors.of([data], origin.scale, noise_by_visit)
    prior, z, points = origin.prior, np.tile(origin.prior.mean, (n, 1)), Points.make(n, draws, p, seed)
    trace = []
    for iteration in range(iterations):
        scale = errors.at(data)
        z, covariance = modes(data, prior, scale, origin.df, z, 10 if iteration < 3 else 3)
        drawn = sample(data, prior, scale, origin.df, z, covariance, points)
        trace.append(float(drawn.log_evidence.sum()))
        total = np.einsum("ns,nsp->p", drawn.weights, drawn.z)
        mean = (total + belief.mean * origin.prior.mean) / (n + belief.mean)
        offset = drawn.z - mean
        moment = np.einsum("nsp,nsq->pq", offset * drawn.weights[..., None], offset)
        spread = (moment + belief.covariance * origin.prior.covariance) / (n + belief.covariance)
        prior = GaussianPrior(mean, spread if correlated else np.diag(np.diag(spread)))
        errors = errors.learned([(data, drawn)], origin.df, belief.noise)
    noise = errors.noise([data], origin.df)
    return population_of(model, origin.parameters, prior, noise, n, f"learned from {n} patients", trace)


@dataclass(frozen=True, eq=False)
class Origin:
    """Where learning starts: parameters with their prior, the errors' degrees of freedom and scale."""

    parameters: dict[str, Parameter]
    prior: GaussianPrior
    df: float
    scale: float

    @classmethod
    def of(cls, model: ReactionDiffusion, patients: Sequence[Patient], start: JointPrior | None, df: float | None,
           who: str) -> Origin:  # fmt: skip
        """The model's priors, or those of `start`, for a cohort; `who` asks, for the messages."""
        if not patients:
            raise CalibrationError(f"{who}: no patients.")
        firsts = [measured(p)[1][:1] for p in patients]
        middle = float(np.median(np.concatenate(firsts))) if any(len(f) for f in firsts) else 1.0
        parameters = volume_parameters(model, middle)
        if len(patients) <= len(parameters):
            raise CalibrationError(
                f"{who}: {len(patients)} patients for {len(parameters)} parameters; a population needs more."
            )
        if start is not None and (unknown := sorted(set(start.names) - set(parameters))):
            raise CalibrationError(
                f"{who}: start has {', '.join(unknown)}, which is not calibrated; there are {', '.join(parameters)}."
            )
        settings = [patient.volumes for patient in patients if patient.volumes is not None]
        if len(settings) < len(patients):
            bad = next(p for p in patients if p.volumes is None)
            raise CalibrationError(
                f"patient {bad.id} has images or no noise of its volumes; use patient.without_images()."
            )
        prior = prior_of(parameters, start if start is not None else model.joint)
        found = float(settings[0].df) if df is None else float(df)
        return cls(parameters, prior, found, float(np.median([s.log_sd for s in settings])))


@dataclass(frozen=True, eq=False)
class Errors:
    """Scale of the errors of log(V + floor): one, or one for each visit number.

    Attributes
    ----------
    visits : ndarray of int, shape (k,)
        Visit numbers that have a scale of their own; a single 0 where all share one.
    scale : ndarray, shape (k,)
    """

    visits: np.ndarray
    scale: np.ndarray

    @classmethod
    def of(cls, data: Sequence[VolumeData], scale: float, by_visit: bool) -> Errors:
        numbers = np.concatenate([d.number[d.seen] for d in data]) if by_visit else np.zeros(1, int)
        visits = np.unique(numbers)
        return cls(visits, np.full(len(visits), scale))

    def _masks(self, data: VolumeData) -> list[np.ndarray]:
        """Measurements (n, T) that share a scale."""
        return [data.seen & ((data.number == v) | (v == 0)) for v in self.visits]

    def at(self, data: VolumeData) -> np.ndarray:
        """Scale of each measurement, (n, T)."""
        found = np.ones(data.seen.shape)
        for mask, value in zip(self._masks(data), self.scale, strict=True):
            found[mask] = value
        return found

    def learned(self, parts: Sequence[tuple[VolumeData, Weighted]], df: float, belief: float) -> Errors:
        """Scales that fit weighted draws of several cohorts, each drawn to that of all by `belief` patients."""
        total, count = np.zeros(len(self.visits)), np.zeros(len(self.visits))
        for data, drawn in parts:
            possible = drawn.weights[..., None] > 0
            residual = np.where(possible, data.y[:, None] - np.where(possible, drawn.fitted, 0.0), 0.0)
            # As a scale mixture, an error weighs (df + 1) / (df + squared z) in its variance.
            scale = self.at(data)[:, None]
            weight = t_weights(residual, scale, df)[1] * scale**2
            square = np.einsum("ns,nst->nt", drawn.weights, weight * residual**2)
            masks = self._masks(data)
            total += [square[m].sum() for m in masks]
            count += [m.sum() for m in masks]
        pooled = total.sum() / count.sum()
        return Errors(self.visits, np.sqrt((total + belief * pooled) / (count + belief)))

    def noise(self, data: Sequence[VolumeData], df: float) -> VolumeNoise:
        """The same by day."""
        days = [0.0]
        if len(self.visits) > 1:
            since = [np.concatenate(part) for part in zip(*[[d.since[m] for m in self._masks(d)] for d in data],
                                                          strict=True)]  # fmt: skip
            days = [float(s.mean()) for s in since]
        return VolumeNoise(tuple(np.maximum.accumulate(days).tolist()), tuple(float(s) for s in self.scale), df)


def population_of(model: ReactionDiffusion, parameters: Mapping[str, Parameter], prior: GaussianPrior,
                  noise: VolumeNoise, patients: int, source: str, trace: Sequence[float]) -> Population:  # fmt: skip
    """Gather what was learned."""
    names = tuple(parameters)
    learned = {
        name: replace(p, prior=p.prior.at(float(prior.mean[i]), float(prior.sd[i])), source=source)
        for i, (name, p) in enumerate(parameters.items())
    }
    own = [i for i, name in enumerate(names) if name in model.parameters]
    joint = None
    if own:
        joint = JointPrior(tuple(names[i] for i in own), prior.mean[own], prior.covariance[np.ix_(own, own)], source)
    fitted = replace(model, joint=None).with_priors({names[i]: learned[names[i]].prior for i in own})
    return Population(
        fitted if joint is None else fitted.with_joint_prior(joint),
        JointPrior(names, prior.mean, prior.covariance, source), learned, noise, patients, trace[-1], tuple(trace),
    )  # fmt: skip
