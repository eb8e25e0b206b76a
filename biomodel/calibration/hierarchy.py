"""Priors learned from a cohort whose patients fall into groups (subtypes, sites): partial pooling.

    log(V + floor) of patient i = prediction at z_i + Student-t error,
    z_i ~ N(mu_g, Sigma) for a patient of group g,    mu_g ~ N(mu, T),    T diagonal.

Groups share the spread of patients, Sigma, and the errors; their means are alike as far as T, which is inferred, says.
Where groups hardly differ, T is small and each is learned from all patients (complete pooling); where they differ by
more than their own uncertainty, T is large and each is learned from itself. A handful of groups says little about T, so
it is never fixed at a point: its posterior under a half-Cauchy prior is sampled with the means (Gelman 2006,
doi:10.1214/06-BA117A). For the same reason T is diagonal: four means cannot tell a correlation.

Sigma and the errors are found by Monte Carlo expectation maximisation, as in `learn_priors`. What a group's patients
say about its mean is summarised by score and information of their likelihood at the present mean, with the spread of
each patient's posterior taken off the complete-data information (Louis 1982, J R Stat Soc B 44:226,
doi:10.1111/j.2517-6161.1982.tb01203.x); given these, means and T are sampled exactly by Gibbs steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biomodel.calibration.gaussnewton import GaussianPrior
from biomodel.calibration.importance import Points, VolumeData, Weighted, modes, sample
from biomodel.calibration.population import Errors, Origin, Population, PseudoPatients, population_of
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import JointPrior
from biomodel.patient import Patient
from biomodel.solvers.torch import TorchSolver
from biomodel.tables import html_table

__all__ = ["Hierarchy", "learn_hierarchy"]

#: Median of the half-Cauchy prior of the standard deviation between groups, in units of the starting point's standard
#: deviation between patients: groups are expected to differ by less than patients do.
EXPECTED = 0.5
#: Parallel Gibbs chains of the group means; sweeps in each iteration, and for the result.
CHAINS, SWEEPS, LAST = 128, 4, 200
#: First iterations, in which a group's mean moves with the mean of its patients only, as the information is not yet
#: that of the optimum.
CAREFUL = 5


@dataclass(frozen=True, eq=False)
class Hierarchy:
    """What a cohort taught about each of its groups. Pass ``of(group)`` to `calibrate` in place of a model.

    Attributes
    ----------
    populations : mapping of str to Population
        The prior of a new patient of each group: mean of the group, spread of patients plus the uncertainty of the
        mean.
    overall : Population
        The prior of a patient of a group that was not among them; the spread between groups is added.
    own : ndarray, shape (groups, p)
        What each group's mean would be if learned from its patients alone, with the same spread and errors.
    mean, sd : ndarray, shape (groups, p)
        Posterior mean and standard deviation of each group's mean, in transformed coordinates.
    between : ndarray, shape (3, p)
        5 %, 50 % and 95 % quantiles of the standard deviation between groups, in transformed coordinates.
    within : ndarray, shape (p, p)
        Covariance of the patients of one group.
    pooled : ndarray, shape (groups, p)
        Share of each group's mean that comes from the other groups and the starting point, 0 to 1: the share of the
        prior in the posterior precision of the mean along that coordinate (Gelman and Pardoe 2006,
        doi:10.1198/004017005000000517).
    trace : tuple of float
        Log evidence of all patients by iteration.
    """

    populations: Mapping[str, Population]
    overall: Population
    own: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    between: np.ndarray
    within: np.ndarray
    pooled: np.ndarray
    trace: tuple[float, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        return tuple(self.populations)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameters, in the order of the arrays."""
        return tuple(self.overall.parameters)

    def of(self, group: str) -> Population:
        """Prior of a new patient of a group, known or not."""
        return self.populations.get(group, self.overall)

    def table(self) -> list[dict[str, Any]]:
        """One row for each parameter and group: the group's median by itself, partially pooled, and over all groups.

        `own`, `median` (with its 90 % interval `low`, `high`) and `overall` are values of the parameter in its unit;
        `pooled` is the share that comes from elsewhere.
        """
        rows = []
        for k, (name, p) in enumerate(self.overall.parameters.items()):
            for g, group in enumerate(self.groups):
                m, reach = self.mean[g, k], 1.6448536269514722 * self.sd[g, k]
                rows.append({
                    "name": name, "group": group, "patients": self.populations[group].patients,
                    "own": float(p.prior.to_value(self.own[g, k])), "median": float(p.prior.to_value(m)),
                    "low": float(p.prior.to_value(m - reach)), "high": float(p.prior.to_value(m + reach)),
                    "overall": float(p.prior.to_value(self.overall.prior.mean[k])),
                    "pooled": float(self.pooled[g, k]), "units": p.units,
                })  # fmt: skip
        return rows

    def _repr_html_(self) -> str:
        rows = [
            (r["name"], r["group"], r["patients"], f"{r['own']:.3g}", f"{r['median']:.3g}",
             f"{r['low']:.3g} to {r['high']:.3g}", f"{r['overall']:.3g}", f"{r['pooled']:.0%}", r["units"])
            for r in self.table()
        ]  # fmt: skip
        head = ("parameter", "group", "patients", "by itself", "partially pooled", "90 % interval", "all groups",
                "from others", "unit")  # fmt: skip
        return html_table(head, rows, f"{self.overall.model.label}, {self.overall.patients} patients by group")


@dataclass(frozen=True, eq=False)
class _Evidence:
    """What patients say about the means of their groups: log-likelihood = score' m - m' information m / 2 + constant.

    Attributes
    ----------
    score : ndarray, shape (groups, p)
    information : ndarray, shape (groups, p, p)
    """

    score: np.ndarray
    information: np.ndarray


class _Means:
    """Parallel Gibbs chains of group means, overall mean and the spread between groups.

    Parameters
    ----------
    origin : GaussianPrior
        Starting point; `belief` patients of it are the prior of the overall mean.
    known : float or None
        Standard deviation between groups in units of the origin's, where it is not inferred.
    """

    def __init__(self, groups: int, origin: GaussianPrior, belief: float, known: float | None, seed: int):
        self.origin, self.belief, self.known = origin, belief, known
        self.rng = np.random.default_rng([seed, 5])
        self.width = EXPECTED * origin.sd
        p = len(origin.mean)
        start = self.width if known is None else max(known, 1e-6) * origin.sd
        # Under a known spread the means are Gaussian: one chain passes all there is in one sweep.
        self.chains = CHAINS if known is None else 1
        self.variance = np.tile(start**2, (self.chains, 1))
        self.auxiliary = np.tile(self.width**2, (self.chains, 1))
        self.size = (groups, p)

    def sweep(self, evidence: _Evidence, within: np.ndarray, sweeps: int):
        """Posterior of the means under the present spread, averaged over what the chains pass.

        Returns
        -------
        mean, covariance : ndarray, shape (groups + 1, p) and (groups + 1, p, p)
            The overall mean is last.
        pooled : ndarray, shape (groups, p)
        variances : ndarray, shape (sweeps * chains, p)
            Between groups.
        """
        groups, p = self.size
        total = (groups + 1) * p
        eye, inverse = np.eye(p), np.linalg.inv(within)
        prior = (self.belief + 1e-9) * inverse
        fixed, right = np.zeros((groups + 1, p, groups + 1, p)), np.zeros((groups + 1, p))
        for g in range(groups):
            fixed[g, :, g] = evidence.information[g]
        fixed[groups, :, groups] = prior
        right[:groups], right[groups] = evidence.score, prior @ self.origin.mean
        centres, covariances, shares, variances = [], [], [], []
        chains = self.chains
        for _ in range(sweeps if self.known is None else 1):
            precision = np.tile(fixed, (chains, 1, 1, 1, 1))
            link = eye / self.variance[:, None, :]
            for g in range(groups):
                precision[:, g, :, g] += link
                precision[:, groups, :, groups] += link
                precision[:, g, :, groups] -= link
                precision[:, groups, :, g] -= link
            covariance = np.linalg.inv(precision.reshape(chains, total, total))
            covariance = (covariance + covariance.transpose(0, 2, 1)) / 2
            centre = covariance @ right.ravel()
            blocks = covariance.reshape(chains, groups + 1, p, groups + 1, p)
            centres.append(centre.reshape(chains, groups + 1, p))
            covariances.append(np.einsum("cgpgq->gpq", blocks) / chains)
            own = np.einsum("gpp->gp", evidence.information)
            shares.append((1 / (1 + own * self.variance[:, None])).mean(0))
            variances.append(self.variance)
            if self.known is None:
                root = np.linalg.cholesky(covariance)
                drawn = (centre + np.einsum("cij,cj->ci", root, self.rng.standard_normal((chains, total)))).reshape(
                    chains, groups + 1, p
                )
                square = ((drawn[:, :groups] - drawn[:, groups:]) ** 2).sum(1)
                # Half-Cauchy as a mixture of inverse gamma distributions (Makalic and Schmidt 2016,
                # doi:10.1109/LSP.2015.2503725).
                self.variance = (1 / self.auxiliary + square / 2) / self.rng.gamma((groups + 1) / 2, size=square.shape)
                self.auxiliary = (1 / self.width**2 + 1 / self.variance) / self.rng.gamma(1.0, size=square.shape)
        passed = np.concatenate(centres)
        mean = passed.mean(0)
        offset = passed - mean
        covariance = np.mean(covariances, 0) + np.einsum("cgp,cgq->gpq", offset, offset) / len(passed)
        return mean, covariance, np.mean(shares, 0), np.concatenate(variances)


def learn_hierarchy(
    model: ReactionDiffusion,
    patients: Sequence[Patient],
    groups: Sequence[str],
    *,
    start: JointPrior | None = None,
    correlated: bool = False,
    noise_by_visit: bool = False,
    df: float | None = None,
    belief: PseudoPatients | None = None,
    between: float | None = None,
    iterations: int = 40,
    draws: int = 128,
    seed: int = 0,
    solver: TorchSolver | None = None,
) -> Hierarchy:
    """Learn priors of a model for each group of a cohort, each informed by the others as far as groups are alike.

    Parameters
    ----------
    model : ReactionDiffusion
        Its own priors are the starting point.
    patients : sequence of Patient
        On the well-mixed domain (``patient.without_images()``); all their volumes are used.
    groups : sequence of str
        The group of each patient, e.g. ``"HR+ HER2-"``.
    start, correlated, noise_by_visit, df, iterations, draws, seed, solver
        As for :func:`~biomodel.calibration.population.learn_priors`; `correlated` is about patients of one group.
    belief : PseudoPatients, optional
        How many patients the starting point counts for: its mean for the mean over all groups, its covariance for the
        spread of patients.
    between : float, optional
        Known standard deviation between groups, in units of the starting point's standard deviation of patients,
        instead of the inferred one: 0 pools completely, 10 practically not at all.

    Returns
    -------
    Hierarchy

    Raises
    ------
    CalibrationError
        If groups and patients differ in number, there is one group only (without `between`), fewer patients than
        parameters, or one has no volumes.
    """
    patients, labels = list(patients), [str(g) for g in groups]
    solver, belief = TorchSolver() if solver is None else solver, PseudoPatients() if belief is None else belief
    if len(labels) != len(patients):
        raise CalibrationError(f"learn_hierarchy: {len(patients)} patients, but {len(labels)} groups; give one each.")
    names = sorted(set(labels))
    if between is None and len(names) == 1:
        raise CalibrationError(
            f"learn_hierarchy: all patients are of the group {names[0]!r}; learn_priors is for one group."
        )
    if between is not None and not (np.isfinite(between) and between >= 0):
        raise CalibrationError(f"learn_hierarchy: between is {between!r}; expected a finite number, 0 or more.")
    origin = Origin.of(model, patients, start, df, "learn_hierarchy")
    members = [[p for p, label in zip(patients, labels, strict=True) if label == name] for name in names]
    data = [VolumeData.of(model, origin.parameters, m, solver) for m in members]
    points = [Points.make(len(m), draws, len(origin.prior.mean), seed + k) for k, m in enumerate(members)]
    errors = Errors.of(data, origin.scale, noise_by_visit)
    count, p = len(patients), len(origin.prior.mean)
    chains = _Means(len(names), origin.prior, belief.mean, between, seed)
    mean, within = np.tile(origin.prior.mean, (len(names), 1)), origin.prior.covariance
    z = [np.tile(origin.prior.mean, (len(m), 1)) for m in members]
    evidence = None
    trace: list[np.ndarray] = []
    for iteration in range(iterations):
        drawn = []
        for g, d in enumerate(data):
            prior, scale = GaussianPrior(mean[g], within), errors.at(d)
            z[g], around = modes(d, prior, scale, origin.df, z[g], 10 if iteration < 3 else 3)
            drawn.append(sample(d, prior, scale, origin.df, z[g], around, points[g]))
        trace.append(np.array([w.log_evidence.sum() for w in drawn]))
        moments = [_moments(w) for w in drawn]
        evidence = _evidence(moments, mean, within, iteration < CAREFUL)
        new, uncertain, *_ = chains.sweep(evidence, within, SWEEPS)
        mean = mean + np.clip(new[:-1] - mean, -origin.prior.sd, origin.prior.sd)
        total = belief.covariance * origin.prior.covariance
        for g, (centre, spread) in enumerate(moments):
            offset = centre - mean[g]
            # As a group's mean moves, so do its patients, but by less: by the share that its prior has in them.
            share = np.eye(p) - spread @ np.linalg.inv(within)
            total = total + np.einsum("np,nq->pq", offset, offset) + spread.sum(0)
            total = total + np.einsum("npa,ab,nqb->pq", share, uncertain[g], share)
        total = total / (count + belief.covariance)
        within = (total + total.T) / 2 if correlated else np.diag(np.diag(total))
        errors = errors.learned(list(zip(data, drawn, strict=True)), origin.df, belief.noise)
    if evidence is None:
        raise CalibrationError(f"learn_hierarchy: iterations is {iterations}; expected at least 1.")
    final, uncertain, pooled, variances = chains.sweep(evidence, within, LAST)
    noise = errors.noise(data, origin.df)
    source = f"learned from {count} patients in {len(names)} groups"

    def population(centre, covariance, size: int, source: str, found: Sequence[float]) -> Population:
        return population_of(model, origin.parameters, GaussianPrior(centre, covariance), noise, size, source, found)

    populations = {
        name: population(final[g], within + uncertain[g], len(members[g]), f"{source}: {name}",
                         [float(t[g]) for t in trace])
        for g, name in enumerate(names)
    }  # fmt: skip
    summed = [float(t.sum()) for t in trace]
    overall = population(final[-1], within + uncertain[-1] + np.diag(variances.mean(0)), count, source, summed)
    alone = belief.mean * np.linalg.inv(within)
    own = np.stack([np.linalg.solve(i + alone + 1e-9 * np.linalg.inv(within), s + alone @ origin.prior.mean)
                    for s, i in zip(evidence.score, evidence.information, strict=True)])  # fmt: skip
    return Hierarchy(
        populations, overall, own, final[:-1], np.sqrt(np.einsum("gpp->gp", uncertain[:-1])),
        np.sqrt(np.quantile(variances, [0.05, 0.5, 0.95], 0)), within, pooled, tuple(summed),
    )  # fmt: skip


def _moments(drawn: Weighted) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean (n, p) and covariance (n, p, p) of each patient."""
    centre = np.einsum("ns,nsp->np", drawn.weights, drawn.z)
    offset = drawn.z - centre[:, None]
    return centre, np.einsum("ns,nsp,nsq->npq", drawn.weights, offset, offset)


def _evidence(moments, mean: np.ndarray, within: np.ndarray, careful: bool) -> _Evidence:
    """Score and information of the groups' means at the present ones."""
    root = np.linalg.cholesky(within)
    white = np.linalg.inv(root)
    scores, information = [], []
    for m, (centre, spread) in zip(mean, moments, strict=True):
        n = len(centre)
        found = n * np.eye(len(m))
        if not careful:
            # Between nothing and that of patients whose parameters are known, whatever the sampling error.
            values, vectors = np.linalg.eigh(found - white @ spread.sum(0) @ white.T)
            found = (vectors * np.clip(values, 0.01 * n, n)) @ vectors.T
        found = white.T @ found @ white
        scores.append(white.T @ white @ (centre - m).sum(0) + found @ m)
        information.append(found)
    return _Evidence(np.stack(scores), np.stack(information))
