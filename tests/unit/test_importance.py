"""Importance sampling against what is known exactly: linear-Gaussian posteriors, brute force on a grid, and itself."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.stats import kstest, multivariate_normal, norm, t

import biomodel as bm
from biomodel.calibration.importance import (
    Importance,
    Points,
    Samples,
    VolumeData,
    modes,
    sample,
    weighted_crps,
    weighted_quantile,
)
from biomodel.calibration.population import Population
from biomodel.calibration.volumes import VolumeNoise, volume_parameters
from biomodel.domain import Domain
from biomodel.errors import CalibrationError
from biomodel.parameters import JointPrior, Parameter, Prior
from biomodel.scoring import crps
from biomodel.terms import NoGrowth
from biomodel.visit import CellularitySettings, Visit, VolumeSettings

PLAN = bm.Schedule.weekly("paclitaxel", 1.0, 12, 80, "mg/m^2", status="planned")


@dataclass(frozen=True)
class NetGrowth(bm.Exponential):
    """Growth or decline; log V is linear in its Gaussian rate and in log V0."""

    k: Prior = bm.Normal(-0.01, 0.02)

    @property
    def parameters(self):
        return (Parameter("k", "1/day", self.k, (-5.0, 5.0)),)


def linear_patient(days, logs, sd=0.3):
    """Volumes with practically Gaussian errors of log V and no floor."""
    patient = bm.Patient.from_volumes("L", days, np.exp(logs))
    return replace(patient, volumes=VolumeSettings(np.sqrt(np.expm1(sd**2)), 1e-9, 1e8))


def test_a_linear_gaussian_posterior_is_met():
    days, logs = np.array([0.0, 15.0, 40.0]), np.array([2.3, 2.2, 1.1])
    patient = linear_patient(days, logs)
    model = bm.ReactionDiffusion(NetGrowth(), bm.NoDiffusion())
    fits = [bm.calibrate(model, patient, method=m) for m in (bm.Laplace(), Importance(draws=8192))]
    # Exact: y = X (k, log V0) + e.
    design, prior = np.stack([days, np.ones(3)], 1), fits[0].prior
    precision = design.T @ design / 0.09 + prior.precision
    covariance = np.linalg.inv(precision)
    mean = covariance @ (design.T @ logs / 0.09 + prior.precision @ prior.mean)
    marginal = design @ prior.covariance @ design.T + 0.09 * np.eye(3)
    evidence = multivariate_normal(design @ prior.mean, marginal).logpdf(logs)
    for fit in fits:
        np.testing.assert_allclose((fit.z - mean) / np.sqrt(np.diag(covariance)), 0.0, atol=0.1)
    np.testing.assert_allclose(fits[0].covariance, covariance, rtol=1e-5)
    assert fits[0].log_evidence == pytest.approx(evidence, abs=1e-5)
    samples = fits[1].samples
    assert samples.ess > 4000
    error = 4 * np.sqrt(np.diag(covariance) / samples.ess)
    assert (np.abs(samples.weights @ samples.z - mean) < error).all()
    np.testing.assert_allclose(fits[1].covariance, covariance, rtol=0.06)
    assert fits[1].log_evidence == pytest.approx(evidence, abs=0.03)


def hard_problem():
    """A skewed posterior: an efficacy of which two volumes, one of them zero, say little but a lower bound."""
    model = bm.ReactionDiffusion(NoGrowth(), bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel", bm.LogNormal(0.05, 1.0))])
    patient = bm.Patient.from_volumes("H", [0.0, 21.0, 60.0], [8.0, 3.5, 0.0], PLAN, cv=0.3)
    return model, patient


def test_a_skewed_posterior_agrees_with_a_grid():
    model, patient = hard_problem()
    fit = bm.calibrate(model, patient, method=Importance(draws=8192))
    parameters = volume_parameters(model, 8.0)
    data = VolumeData.of(model, parameters, [patient], bm.TorchSolver())
    axes = [np.linspace(p.prior.location - 6 * p.prior.scale, p.prior.location + 6 * p.prior.scale, 501)
            for p in parameters.values()]  # fmt: skip
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    scale, settings = np.full((1, 3), patient.volumes.log_sd), patient.volumes
    fitted = data.model.draws(grid[None])[0]
    log = t.logpdf((data.y - fitted) / scale, settings.df).sum(1) - 3 * np.log(scale[0, 0])
    log += sum(norm.logpdf(grid[:, i], p.prior.location, p.prior.scale) for i, p in enumerate(parameters.values()))
    cell = np.prod([a[1] - a[0] for a in axes])
    evidence = np.log(np.exp(log - log.max()).sum() * cell) + log.max()
    assert fit.log_evidence == pytest.approx(evidence, abs=0.03)
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    exact = np.stack([weighted_quantile(grid[:, i], weight, [0.05, 0.25, 0.5, 0.75, 0.95]) for i in range(2)], 1)
    sd = np.sqrt([weight @ (x - weight @ x) ** 2 for x in grid.T])
    np.testing.assert_allclose(fit.samples.quantile([0.05, 0.25, 0.5, 0.75, 0.95]) / sd, exact / sd, atol=0.08)
    np.testing.assert_allclose(fit.sd, sd, rtol=0.05)
    row = next(r for r in fit.table() if r["name"] == "paclitaxel.efficacy")
    np.testing.assert_allclose([row["low"], row["estimate"], row["high"]], np.exp(exact[[0, 2, 4], 0]), rtol=0.06)


def test_ranks_of_the_truth_are_uniform():
    """Simulation-based calibration: truths from the prior, data from the truths (Talts et al. 2018,
    arXiv:1804.06788).
    """
    rng, days = np.random.default_rng(11), [0.0, 21.0, 84.0]
    drugs = bm.Combination(("paclitaxel",), (bm.LogNormal(0.06, 0.8),))
    model = bm.ReactionDiffusion(NoGrowth(), bm.NoDiffusion(), [drugs])
    parameters = volume_parameters(model, 10.0)
    names, mean = tuple(parameters), np.array([p.prior.location for p in parameters.values()])
    prior = JointPrior(names, mean, np.diag([p.prior.scale**2 for p in parameters.values()]))
    noise = VolumeNoise((0.0, 21.0, 84.0), (0.2, 0.3, 0.4), 8.0)
    population = Population(model, prior, parameters, noise, 0, 0.0, ())
    truth = rng.multivariate_normal(mean, prior.covariance, 300)
    blank = [bm.Patient.from_volumes(f"S{i}", days, [1.0, 1.0, 1.0], PLAN) for i in range(300)]
    clean = VolumeData.of(model, parameters, blank, bm.TorchSolver()).model.draws(truth[:, None])[:, 0]
    logs = clean + rng.standard_t(8, clean.shape) * noise.scale
    # log(V + floor) below log floor is noise that a volume cannot show: the smallest volume is 0, as in real records.
    seen = np.maximum(np.exp(logs) - 0.05, 0.0)
    patients = [bm.Patient.from_volumes(f"S{i}", days, v, PLAN) for i, v in enumerate(seen)]
    keep = (seen > 0).all(1)
    assert keep.mean() > 0.85
    known = [p.until(2) for p in patients]
    posterior = population.posterior(known, [84.0], draws=1024)
    weights, z = posterior.weights, posterior.draws.z
    for i, name in enumerate(names):
        rank = (weights * (z[..., i] < truth[:, None, i])).sum(1)
        assert kstest(rank, "uniform").pvalue > 0.005, name
    rank = (weights * (posterior.measurements()[..., 0] < logs[:, None, 2])).sum(1)
    assert kstest(rank, "uniform").pvalue > 0.005


def test_draws_of_a_fit_follow_the_samples():
    model, patient = hard_problem()
    fit = bm.calibrate(model, patient, method=Importance())
    first, again, other = (fit.draw(4000, seed) for seed in (3, 3, 4))
    for i, (name, p) in enumerate(fit.parameters.items()):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()
        exact = p.prior.to_value(fit.samples.quantile([0.1, 0.5, 0.9])[:, i])
        np.testing.assert_allclose(np.quantile(first[name], [0.1, 0.5, 0.9]), exact, rtol=0.02)
    runs = [bm.forecast(bm.calibrate(model, patient, method=Importance()), times=[84.0], draws=50) for _ in range(2)]
    np.testing.assert_array_equal(runs[0]["measured_volume"], runs[1]["measured_volume"])
    assert fit.method == "Importance" and fit.noise == VolumeNoise.of(patient.volumes)


def test_one_patient_is_a_cohort_of_one():
    model, patient = hard_problem()
    fit = bm.calibrate(model, patient, method=Importance(draws=512))
    data = VolumeData.of(model, fit.parameters, [patient, patient], bm.TorchSolver())
    scale = np.full((2, 3), patient.volumes.log_sd)
    mode, covariance = modes(data, fit.prior, scale, 8.0, np.tile(fit.prior.mean, (2, 1)), 40)
    np.testing.assert_allclose((mode - fit.z) / fit.sd, 0.0, atol=0.1)
    drawn = sample(data, fit.prior, scale, 8.0, mode, covariance, Points.make(2, 512, 2, 0))
    assert drawn.log_evidence == pytest.approx(fit.log_evidence, abs=0.1)
    assert (drawn.z[0] != drawn.z[1]).any(), "patients have their own random numbers"
    np.testing.assert_allclose(drawn.weights.sum(1), 1.0)


def test_few_effective_draws_are_told():
    model, patient = hard_problem()
    fit = bm.calibrate(model, patient, method=Importance(draws=64))
    assert fit.samples.ess < 64 and any("worth" in note and "64 draws" in note for note in fit.notes)
    with pytest.raises(CalibrationError, match="effective sample size .* raise draws"):
        bm.calibrate(model, patient, method=Importance(draws=10))
    with pytest.raises(CalibrationError, match="at least"):
        Importance(draws=3)


def test_images_are_refused():
    region = np.ones((2, 3, 4), bool)
    visits = [Visit(1, 0.0, np.full(region.shape, 1e-3), region), Visit(2, 9.0, np.full(region.shape, 1e-3), region)]
    settings = CellularitySettings(3e-3, 5e-4)
    patient = bm.Patient("I", "breast", Domain.box(region.shape), tuple(visits), cellularity=settings)
    with pytest.raises(CalibrationError, match="has images.*without_images"):
        bm.calibrate(bm.ReactionDiffusion(), patient, method=Importance())
    with pytest.raises(CalibrationError, match="without_images"):
        VolumeData.of(bm.ReactionDiffusion(), {}, [patient], bm.TorchSolver())


def test_weighted_scores_agree_with_equal_weights():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 4001))
    w = np.full(x.shape, 1 / x.shape[1])
    plain = [crps(row, 0.7) for row in x]
    np.testing.assert_allclose(weighted_crps(x, w, np.full(3, 0.7)), plain, atol=1e-3)
    np.testing.assert_allclose(weighted_quantile(x, w, [0.1, 0.9]), np.quantile(x, [0.1, 0.9], axis=1).T, atol=0.01)
    # A weight counts like that many copies.
    y, k = rng.standard_normal(50), rng.integers(1, 9, 50)
    copies = np.repeat(y, k)
    found = weighted_crps(y, k / k.sum(), np.array(0.3))
    assert found == pytest.approx(weighted_crps(copies, np.full(copies.size, 1 / copies.size), np.array(0.3)))
    assert Samples(y[:, None], k / k.sum()).ess == pytest.approx(k.sum() ** 2 / (k**2).sum())
