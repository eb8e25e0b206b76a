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

from biomodel.calibration.gaussnewton import GaussianPrior, prior_of
from biomodel.calibration.importance import Points, VolumeData, Weighted, modes, sample
from biomodel.calibration.volumes import VolumeNoise, measured, t_weights, volume_parameters
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
    if not patients:
        raise CalibrationError("learn_priors: no patients.")
    firsts = [measured(p)[1][:1] for p in patients]
    middle = float(np.median(np.concatenate(firsts))) if any(len(f) for f in firsts) else 1.0
    parameters = volume_parameters(model, middle)
    p, n = len(parameters), len(patients)
    if n <= p:
        raise CalibrationError(f"learn_priors: {n} patients for {p} parameters; a population needs more.")
    if start is not None:
        unknown = sorted(set(start.names) - set(parameters))
        if unknown:
            raise CalibrationError(
                f"learn_priors: start has {', '.join(unknown)}, which is not calibrated; there are "
                f"{', '.join(parameters)}."
            )
    origin = prior_of(parameters, start if start is not None else model.joint)
    data = VolumeData.of(model, parameters, patients, solver)
    settings = [patient.volumes for patient in patients if patient.volumes is not None]  # all: checked above
    df = float(settings[0].df) if df is None else float(df)
    groups = _groups(data, noise_by_visit)
    scale_of = np.full(len(groups), float(np.median([s.log_sd for s in settings])))
    prior, z, points = origin, np.tile(origin.mean, (n, 1)), Points.make(n, draws, p, seed)
    trace = []
    for iteration in range(iterations):
        scale = _spread(groups, scale_of)
        z, covariance = modes(data, prior, scale, df, z, 10 if iteration < 3 else 3)
        drawn = sample(data, prior, scale, df, z, covariance, points)
        trace.append(float(drawn.log_evidence.sum()))
        mean = (np.einsum("ns,nsp->p", drawn.weights, drawn.z) + belief.mean * origin.mean) / (n + belief.mean)
        offset = drawn.z - mean
        moment = np.einsum("nsp,nsq->pq", offset * drawn.weights[..., None], offset)
        spread = (moment + belief.covariance * origin.covariance) / (n + belief.covariance)
        prior = GaussianPrior(mean, spread if correlated else np.diag(np.diag(spread)))
        scale_of = _noise(data, drawn, groups, scale, df, belief.noise)
    return _population(model, parameters, prior, data, groups, scale_of, df, trace)


def _groups(data: VolumeData, by_visit: bool) -> list[np.ndarray]:
    """Measurements that share a scale, as masks (n, T)."""
    if not by_visit:
        return [data.seen]
    return [data.seen & (data.number == k) for k in np.unique(data.number[data.seen])]


def _spread(groups: list[np.ndarray], scale: np.ndarray) -> np.ndarray:
    found = np.ones(groups[0].shape)
    for mask, value in zip(groups, scale, strict=True):
        found[mask] = value
    return found


def _noise(data: VolumeData, drawn: Weighted, groups, scale: np.ndarray, df: float, belief: float) -> np.ndarray:
    """Scale of each group of errors, drawn to that of all."""
    possible = drawn.weights[..., None] > 0
    residual = np.where(possible, data.y[:, None] - np.where(possible, drawn.fitted, 0.0), 0.0)
    # As a scale mixture, an error weighs (df + 1) / (df + squared z) in its variance.
    weight = t_weights(residual, scale[:, None], df)[1] * scale[:, None] ** 2
    square = np.einsum("ns,nst->nt", drawn.weights, weight * residual**2)
    pooled = square[data.seen].mean()
    return np.array([np.sqrt((square[m].sum() + belief * pooled) / (m.sum() + belief)) for m in groups])


def _population(model, parameters, prior: GaussianPrior, data: VolumeData, groups, scale, df, trace) -> Population:
    """Gather what was learned."""
    n, names = data.patients, tuple(parameters)
    source = f"learned from {n} patients"
    learned = {
        name: replace(p, prior=p.prior.at(float(prior.mean[i]), float(prior.sd[i])), source=source)
        for i, (name, p) in enumerate(parameters.items())
    }
    own = [i for i, name in enumerate(names) if name in model.parameters]
    joint = None
    if own:
        joint = JointPrior(tuple(names[i] for i in own), prior.mean[own], prior.covariance[np.ix_(own, own)], source)
    fitted = replace(model, joint=None).with_priors({names[i]: learned[names[i]].prior for i in own})
    days = [float(data.since[m].mean()) for m in groups] if len(groups) > 1 else [0.0]
    noise = VolumeNoise(tuple(np.maximum.accumulate(days).tolist()), tuple(float(s) for s in scale), df)
    return Population(
        fitted if joint is None else fitted.with_joint_prior(joint),
        JointPrior(names, prior.mean, prior.covariance, source), learned, noise, n, trace[-1], tuple(trace),
    )  # fmt: skip
