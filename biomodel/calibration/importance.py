"""Posteriors of patients without images by importance sampling, for one patient or a whole cohort at once.

With two or three volumes per patient, posteriors of kill and resistance are skewed and curved, and a Gaussian around
the mode misstates both the forecasts and, through them, what a cohort teaches. Here the Gaussian is only the proposal.

Draws come from the mixture of a widened Student-t around the mode and the prior itself, which bounds every weight by
1 / (share of the prior) times the likelihood ratio (defensive mixture: Hesterberg 1995, Technometrics 37:185,
doi:10.1080/00401706.1995.10484303), at randomised quasi-Monte Carlo points.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import gammaln, logsumexp, ndtri
from scipy.stats import chi2, qmc

from biomodel.calibration.gaussnewton import GaussianPrior
from biomodel.calibration.samples import Samples, weighted_crps, weighted_quantile
from biomodel.calibration.volumes import VolumeModel, measured, t_constant, t_weights
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import Parameter
from biomodel.patient import Patient
from biomodel.solvers.torch import TorchSolver

__all__ = ["Importance", "Samples", "importance_samples", "weighted_crps", "weighted_quantile"]

#: The proposal: degrees of freedom of its Student-t, widening of the Laplace covariance, share of draws from the prior.
PROPOSAL_DF, WIDEN, PRIOR_SHARE = 5.0, 1.2, 0.2
#: Effective sample sizes below which a result carries a note, and below which there is no result.
FEW, TOO_FEW = 100, 10


@dataclass(frozen=True, eq=False)
class VolumeData:
    """Volumes of several patients laid out together, with the model that predicts them.

    Attributes
    ----------
    model : VolumeModel
        Its times are those of `y`, then any days beyond.
    y : ndarray, shape (n, T)
        log(V + floor); arbitrary where not `seen`.
    seen : ndarray of bool, shape (n, T)
    number : ndarray of int, shape (n, T)
        Visit numbers.
    since : ndarray, shape (n, T)
        Days since the first measured visit.
    """

    model: VolumeModel
    y: np.ndarray
    seen: np.ndarray
    number: np.ndarray
    since: np.ndarray

    @property
    def patients(self) -> int:
        return self.y.shape[0]

    @classmethod
    def of(cls, model: ReactionDiffusion, parameters: Mapping[str, Parameter], patients: Sequence[Patient],
           solver: TorchSolver, beyond: np.ndarray | None = None) -> VolumeData:  # fmt: skip
        """Lay out patients; `beyond` (n, k) are further days at which predictions are wanted, after the last visits."""
        rows = []
        for patient in patients:
            if patient.volumes is None or not patient.domain.well_mixed:
                raise CalibrationError(
                    f"patient {patient.id} has images or no noise of its volumes; use patient.without_images()."
                )
            days, volumes = measured(patient)
            if not len(days):
                raise CalibrationError(f"patient {patient.id}: no visit has a volume; there is nothing to calibrate.")
            number = [v.number for v in patient.visits if patient.volume_of(v) is not None]
            rows.append((days, volumes, number, patient.volumes.floor))
        n, width = len(rows), max(len(r[0]) for r in rows)
        day, y = np.zeros((n, width)), np.zeros((n, width))
        seen, visit = np.zeros((n, width), bool), np.zeros((n, width), int)
        for i, (days, volumes, number, least) in enumerate(rows):
            k = len(days)
            day[i, :k], y[i, :k], visit[i, :k], seen[i, :k] = days, np.log(volumes + least), number, True
            day[i, k:] = days[-1]
        times = day
        if beyond is not None:
            beyond = np.broadcast_to(np.atleast_2d(np.asarray(beyond, float)), (n, np.shape(beyond)[-1]))
            late = (beyond < day[:, -1:] - 1e-9).any(1)
            if late.any():
                who = patients[int(np.flatnonzero(late)[0])].id
                raise CalibrationError(f"patient {who}: a day to predict lies before the last visit.")
            times = np.concatenate((day, beyond), 1)
        floor = np.array([r[3] for r in rows])
        return cls(VolumeModel(model, parameters, patients, times, floor, solver), y, seen, visit, day - day[:, :1])

    def log_likelihood(self, fitted: np.ndarray, scale: np.ndarray, df: float) -> np.ndarray:
        """Log-likelihoods (n, draws) of predictions (n, draws, >= T); -inf where a prediction is not finite."""
        with np.errstate(over="ignore", invalid="ignore"):
            residual = self.y[:, None] - fitted[..., : self.y.shape[1]]
            loss = t_weights(residual, scale[:, None], df)[0]
        each = np.where(self.seen[:, None], t_constant(scale, df)[:, None] - loss, 0.0).sum(-1)
        return np.where(np.isfinite(each), each, -np.inf)


def modes(data: VolumeData, prior: GaussianPrior, scale: np.ndarray, df: float, start: np.ndarray,
          iterations: int) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Posterior mode and Laplace covariance of every patient, by Levenberg-Marquardt on all of them at once.

    Parameters
    ----------
    start : ndarray, shape (n, p)

    Returns
    -------
    z, covariance : ndarray, shape (n, p) and (n, p, p)
    """
    precision, width = prior.precision, data.y.shape[1]
    z, damping = start.copy(), np.full(len(start), 1e-3)

    def objective(fitted, z):
        offset = z - prior.mean
        value = -data.log_likelihood(fitted[:, None], scale, df)[:, 0]
        return value + 0.5 * np.einsum("np,pq,nq->n", offset, precision, offset)

    def linearise(z):
        with np.errstate(over="ignore", invalid="ignore"):
            fitted, jacobian = data.model.jacobian(z)
        fitted, jacobian = fitted[:, :width], np.nan_to_num(jacobian[:, :width], posinf=0.0, neginf=0.0)
        residual = np.where(data.seen & np.isfinite(fitted), data.y - fitted, 0.0)
        weight = np.where(data.seen, t_weights(residual, scale, df)[1], 0.0)
        return fitted, jacobian, residual, weight

    fitted, jacobian, residual, weight = linearise(z)
    now = objective(fitted, z)
    for _ in range(iterations):
        gradient = np.einsum("ntp,nt->np", jacobian, weight * residual) - (z - prior.mean) @ precision
        hessian = np.einsum("ntp,nt,ntq->npq", jacobian, weight, jacobian) + precision
        ridge = damping[:, None] * np.einsum("npp->np", hessian)
        step = np.linalg.solve(hessian + ridge[:, :, None] * np.eye(z.shape[1]), gradient[..., None])[..., 0]
        # Three prior standard deviations at once are enough, as for a single patient.
        step /= np.maximum(1.0, np.abs(step / prior.sd).max(1) / 3.0)[:, None]
        trial = linearise(z + step)
        value = objective(trial[0], z + step)
        good = value <= now + 1e-12
        z, now = np.where(good[:, None], z + step, z), np.where(good, value, now)
        fitted, residual, weight = (
            np.where(good[:, None], new, old) for new, old in zip((trial[0], *trial[2:]), (fitted, residual, weight),
                                                                  strict=True)
        )  # fmt: skip
        jacobian = np.where(good[:, None, None], trial[1], jacobian)
        damping = np.clip(np.where(good, 0.2 * damping, 8 * damping), 1e-8, 1e6)
        if np.abs(step).max() < 1e-4:
            break
    # The curvature of a heavy-tailed likelihood at an outlier is small or negative: cap it at the Gaussian one.
    weight = np.where(data.seen, np.minimum(weight, 1 / scale**2), 0.0)
    hessian = np.einsum("ntp,nt,ntq->npq", jacobian, weight, jacobian) + precision
    return z, np.linalg.inv(hessian)


@dataclass(frozen=True, eq=False)
class Points:
    """Random numbers of the sampler: `normal` (n, draws, p), `stretch` (n, draws), `from_prior` (draws,)."""

    normal: np.ndarray
    stretch: np.ndarray
    from_prior: np.ndarray

    @classmethod
    def make(cls, patients: int, draws: int, p: int, seed: int) -> Points:
        """Sobol points, rotated for each patient: shared ones would give all patients the same error, which adds up."""
        base = qmc.Sobol(p + 1, scramble=False).random_base2(int(draws - 1).bit_length())[:draws]
        u = (base[None] + np.random.default_rng([seed, 1]).random((patients, 1, p + 1))) % 1
        u = np.clip(u, 1e-6, 1 - 1e-6)
        from_prior = np.zeros(draws, bool)
        from_prior[np.random.default_rng([seed, 2]).permutation(draws)[: max(1, round(PRIOR_SHARE * draws))]] = True
        return cls(ndtri(u[..., :p]), np.sqrt(PROPOSAL_DF / chi2.ppf(u[..., p], PROPOSAL_DF)), from_prior)


@dataclass(frozen=True, eq=False)
class Weighted:
    """Weighted draws of several patients: z (n, draws, p), predictions (n, draws, T), normalised weights (n, draws)."""

    z: np.ndarray
    fitted: np.ndarray
    weights: np.ndarray
    log_evidence: np.ndarray

    @property
    def ess(self) -> np.ndarray:
        """Effective sample sizes (n,)."""
        return 1 / (self.weights**2).sum(1)


def sample(data: VolumeData, prior: GaussianPrior, scale: np.ndarray, df: float, mode: np.ndarray,
           covariance: np.ndarray, points: Points) -> Weighted:  # fmt: skip
    """Self-normalised importance sampling of every patient's posterior.

    Raises
    ------
    CalibrationError
        If no draw of some patient has a finite likelihood.
    """
    draws, p = points.normal.shape[1:]
    prior_root, root = np.linalg.cholesky(prior.covariance), np.linalg.cholesky(WIDEN * covariance)
    z = mode[:, None] + np.einsum("npq,nsq->nsp", root, points.normal * points.stretch[..., None])
    z[:, points.from_prior] = prior.mean + points.normal[:, points.from_prior] @ prior_root.T
    fitted = data.model.draws(z)
    by_prior = (z - prior.mean) @ np.linalg.inv(prior_root).T
    log_prior = -0.5 * (by_prior**2).sum(-1) - np.log(np.diag(prior_root)).sum() - p / 2 * np.log(2 * np.pi)
    by_mode = np.einsum("npq,nsq->nsp", np.linalg.inv(root), z - mode[:, None])
    nu = PROPOSAL_DF
    log_t = (
        gammaln((nu + p) / 2) - gammaln(nu / 2) - p / 2 * np.log(nu * np.pi)
        - np.log(np.einsum("npp->np", root)).sum(1)[:, None] - (nu + p) / 2 * np.log1p((by_mode**2).sum(-1) / nu)
    )  # fmt: skip
    share = points.from_prior.mean()
    log_proposal = np.logaddexp(np.log(share) + log_prior, np.log(1 - share) + log_t)
    log_weight = data.log_likelihood(fitted, scale, df) + log_prior - log_proposal
    total = logsumexp(log_weight, 1)
    if not np.isfinite(total).all():
        raise CalibrationError("importance sampling: no draw explains the data at all; check priors and volumes.")
    return Weighted(z, fitted, np.exp(log_weight - total[:, None]), total - np.log(draws))


@dataclass(frozen=True)
class Importance:
    """Weighted posterior draws instead of a Gaussian, for a patient without images; the evidence comes from them.

    Parameters
    ----------
    draws : int
    seed : int
    iterations, starts : int
        Of the search for the mode around which draws are proposed: see `MAP`.
    """

    draws: int = 2048
    seed: int = 0
    starts: int = 3
    iterations: int = 40

    def __post_init__(self):
        if self.draws < TOO_FEW:
            raise CalibrationError(f"Importance: draws is {self.draws}; expected at least {TOO_FEW}, better 2048.")


def importance_samples(method: Importance, problem, prior: GaussianPrior, mode: np.ndarray) -> Samples:
    """Draw from the posterior of a `VolumeProblem` around its mode.

    Raises
    ------
    CalibrationError
        If nearly all the weight falls on a few draws.
    """
    data = VolumeData.of(problem.model, problem.parameters, [problem.patient], problem.volume_model.solver)
    scale, points = problem.scale[None], Points.make(1, method.draws, len(mode), method.seed)
    at, covariance = modes(data, prior, scale, problem.df, mode[None], 3)
    drawn = sample(data, prior, scale, problem.df, at, covariance, points)
    found = Samples(drawn.z[0], drawn.weights[0], float(drawn.log_evidence[0]))
    if found.ess < TOO_FEW:
        raise CalibrationError(
            f"patient {problem.patient.id}: importance sampling has an effective sample size of {found.ess:.1f} of "
            f"{method.draws} draws; raise draws, or calibrate with Laplace()."
        )
    return found
