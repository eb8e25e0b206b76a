"""Learning priors from a cohort: the exact maximum likelihood of a linear model, known populations, and misuse."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

import biomodel as bm
from biomodel.calibration.importance import Importance
from biomodel.calibration.population import PseudoPatients, learn_priors
from biomodel.calibration.volumes import VolumeNoise, measured
from biomodel.errors import CalibrationError
from biomodel.parameters import JointPrior, Parameter, Prior
from biomodel.terms import NoGrowth
from biomodel.visit import VolumeSettings

PLAN = bm.Schedule.weekly("paclitaxel", 1.0, 12, 80, "mg/m^2", status="planned")
NOTHING = PseudoPatients(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class NetGrowth(bm.Exponential):
    """Growth or decline; log V is linear in its Gaussian rate and in log V0."""

    k: Prior = bm.Normal(0.0, 0.03)

    @property
    def parameters(self):
        return (Parameter("k", "1/day", self.k, (-5.0, 5.0)),)


def linear_cohort(n, days, mean, covariance, sd, seed=0):
    """Patients of a linear-Gaussian population of (k, log V0), with practically Gaussian errors and no floor."""
    rng = np.random.default_rng(seed)
    design = np.stack([days, np.ones(len(days))], 1)
    logs = rng.multivariate_normal(mean, covariance, n) @ design.T + rng.standard_normal((n, len(days))) * sd
    settings = VolumeSettings(0.3, 1e-9, 1e8)
    people = [replace(bm.Patient.from_volumes(f"L{i}", days, np.exp(y)), volumes=settings) for i, y in enumerate(logs)]
    return people, design, logs


MEAN, COVARIANCE = np.array([0.02, 2.0]), np.array([[4e-4, 0.006], [0.006, 0.25]])


@pytest.fixture(scope="module")
def linear():
    people, design, logs = linear_cohort(150, np.array([0.0, 20.0, 40.0, 60.0]), MEAN, COVARIANCE, 0.3)
    model = bm.ReactionDiffusion(NetGrowth(), bm.NoDiffusion())
    return model, people, design, logs, learn_priors(model, people, correlated=True, belief=NOTHING, iterations=30)


def test_the_likelihood_of_a_linear_model_is_maximal(linear):
    """Learned by sampling, and the same by the exact likelihood of the linear mixed model (Laird and Ware 1982)."""
    _, people, design, logs, population = linear
    prior, sd = population.prior, population.noise.scale[0]

    def likelihood(mean, covariance, sd):
        marginal = design @ covariance @ design.T + sd**2 * np.eye(len(design))
        return multivariate_normal(design @ mean, marginal).logpdf(logs).sum()

    best = likelihood(prior.mean, prior.covariance, sd)
    assert population.log_evidence == pytest.approx(best, abs=1.0)
    # No change in any direction by a tenth of a standard error or so raises the likelihood.
    error = np.sqrt(np.diag(prior.covariance) / len(people))
    for i in range(2):
        for sign in (-1, 1):
            step = sign * 0.5 * error[i] * np.eye(2)[i]
            assert likelihood(prior.mean + step, prior.covariance, sd) < best + 0.02
            scaled = prior.covariance.copy()
            scaled[i] *= 1 + sign * 0.05
            scaled[:, i] *= 1 + sign * 0.05
            assert likelihood(prior.mean, scaled, sd) < best + 0.02
    assert max(likelihood(prior.mean, prior.covariance, sd * f) for f in (0.96, 1.04)) < best + 0.02


def test_the_population_is_found_again(linear):
    _, people, _, _, population = linear
    assert tuple(population.parameters) == ("growth.k", "initial.volume") and population.patients == 150
    error = np.sqrt(np.diag(COVARIANCE) / 150)
    assert (np.abs(population.prior.mean - MEAN) < 4 * error).all()
    # The error of a standard deviation is about sd / sqrt(2 n), somewhat more for noisy patients.
    np.testing.assert_allclose(np.sqrt(np.diag(population.prior.covariance)), np.sqrt(np.diag(COVARIANCE)), rtol=0.25)
    assert population.noise.scale[0] == pytest.approx(0.3, rel=0.12)
    assert np.diff(population.trace)[3:].min() > -0.5, "the evidence rises, up to sampling error"
    table = {r["name"]: r for r in population.table()}
    assert table["initial.volume"]["median"] == pytest.approx(np.exp(population.prior.mean[1]))
    assert "learned from 150 patients" in population._repr_html_()


def test_two_runs_are_the_same(linear):
    model, people, *_ = linear
    runs = [learn_priors(model, people[:20], iterations=3) for _ in range(2)]
    np.testing.assert_array_equal(runs[0].prior.mean, runs[1].prior.mean)
    other = learn_priors(model, people[:20], iterations=3, seed=1)
    assert (runs[0].prior.mean != other.prior.mean).any()


def test_predictive_densities_of_a_linear_model_are_the_exact_ones(linear):
    _, people, design, logs, population = linear
    posterior = population.posterior([p.until(3) for p in people[:20]], [60.0], draws=16384)
    prior, sd = population.prior, population.noise.scale[0]
    marginal = design @ prior.covariance @ design.T + sd**2 * np.eye(4)
    gain = marginal[3, :3] @ np.linalg.inv(marginal[:3, :3])
    centre = design[3] @ prior.mean + (logs[:20, :3] - design[:3] @ prior.mean) @ gain
    exact = norm(centre, np.sqrt(marginal[3, 3] - gain @ marginal[:3, 3]))
    np.testing.assert_allclose(posterior.log_density(logs[:20, 3:])[:, 0], exact.logpdf(logs[:20, 3]), atol=0.03)
    np.testing.assert_allclose(posterior.pit(logs[:20, 3:])[:, 0], exact.cdf(logs[:20, 3]), atol=0.01)


def chemotherapy_cohort(n, seed):
    """Known efficacies, resistant fractions and volumes, noise that differs between visits, and a detection floor."""
    rng = np.random.default_rng(seed)
    drugs = bm.Combination(("paclitaxel",), (bm.LogNormal(0.08, 0.6),))
    model = bm.ReactionDiffusion(NoGrowth(), bm.NoDiffusion(), [drugs])
    days, scale = np.array([0.0, 21.0, 84.0, 110.0]), np.array([0.15, 0.2, 0.4, 0.4])
    truth = {"chemotherapy.efficacy_paclitaxel": np.exp(np.log(0.05) + 0.7 * rng.standard_normal(n)),
             "chemotherapy.resistant": 1 / (1 + np.exp(2.0 - 1.0 * rng.standard_normal(n))),
             "initial.volume": np.exp(2.5 + 0.9 * rng.standard_normal(n))}  # fmt: skip
    lag = np.clip(days[:, None] - np.array([d.day for d in PLAN.doses]), 0, None)
    exposure = ((1 - np.exp(-0.35 * lag)) / 0.35).sum(1)
    efficacy, spared, first = (v[:, None] for v in truth.values())
    volumes = first * ((1 - spared) * np.exp(-efficacy * exposure) + spared)
    logs = np.log(volumes + 0.05) + rng.standard_t(8, volumes.shape) * scale
    seen = np.maximum(np.exp(logs) - 0.05, 0.0)
    return model, [bm.Patient.from_volumes(f"C{i}", days, v, PLAN) for i, v in enumerate(seen)], scale


@pytest.fixture(scope="module")
def treated():
    model, people, scale = chemotherapy_cohort(250, 4)
    return model, people, scale, learn_priors(model, people[:200], noise_by_visit=True, belief=NOTHING, iterations=40)


def test_a_nonlinear_population_is_found_again(treated):
    """Truth and estimate are as far apart as a likelihood-ratio test of ten parameters allows (0.999: 29.6)."""
    _, people, scale, population = treated
    mean, sd = np.array([np.log(0.05), -2.0, 2.5]), np.array([0.7, 1.0, 0.9])
    names = tuple(population.parameters)
    assert names == ("chemotherapy.efficacy_paclitaxel", "chemotherapy.resistant", "initial.volume")
    assert population.noise.days == (0.0, 21.0, 84.0, 110.0)
    truth = replace(population, prior=JointPrior(names, mean, np.diag(sd**2)),
                    noise=VolumeNoise(population.noise.days, tuple(scale), 8.0))  # fmt: skip
    at_truth, learned = (p.posterior(people[:200], draws=512).draws.log_evidence.sum() for p in (truth, population))
    assert -1.0 < 2 * (learned - at_truth) < 29.6
    assert learned == pytest.approx(population.log_evidence, abs=2.0)
    np.testing.assert_allclose(population.prior.mean, mean, atol=0.4 * sd.max())
    np.testing.assert_allclose(np.sqrt(np.diag(population.prior.covariance)), sd, rtol=0.5)
    assert np.mean(population.noise.scale[2:]) > 1.4 * np.mean(population.noise.scale[:2])


def test_belief_draws_to_the_starting_point(treated):
    model, people, *_ = treated
    start = JointPrior(("initial.volume",), [0.0], [[1.0]])
    free, held = (learn_priors(model, people[:30], start=start, belief=PseudoPatients(k, k, k), iterations=15)
                  for k in (0.0, 1e6))  # fmt: skip
    assert held.prior.mean[2] == pytest.approx(0.0, abs=1e-3)
    assert held.prior.covariance[2, 2] == pytest.approx(1.0, rel=0.01)
    assert free.prior.mean[2] > 2.0 and free.prior.covariance[2, 2] > 0.3


def test_a_new_patient_is_calibrated_and_forecast_with_what_was_learned(treated):
    _, people, _, population = treated
    new = people[220:]
    together = population.posterior([p.until(2) for p in new], [84.0, 110.0])
    fit = bm.calibrate(population, new[0].until(2), method=Importance())
    assert fit.prior.mean == pytest.approx(population.prior.mean) and fit.noise == population.noise
    assert fit.model is population.model and fit.log_evidence == pytest.approx(together.draws.log_evidence[0], abs=0.1)
    assert all(p.source == "learned from 200 patients" for p in fit.parameters.values())
    forecast = bm.forecast(fit, times=[84.0, 110.0], draws=4000, seed=1)
    logs, weights = together.measurements()[0], together.weights[0]
    for k in range(2):
        alone = np.log(forecast["measured_volume"].values[:, k] + 0.05)
        batch = np.maximum(logs[:, k], np.log(0.05))
        assert alone.mean() == pytest.approx(weights @ batch, abs=0.12)
        assert alone.std() == pytest.approx(np.sqrt(weights @ (batch - weights @ batch) ** 2), rel=0.12)
    # Narrower than without the cohort, and still right for nine in ten.
    seen = np.log([measured(p)[1][2] + 0.05 for p in new])
    centre = [np.sum(w * x[:, 0]) for w, x in zip(together.weights, together.measurements(), strict=True)]
    assert np.abs(seen - centre).mean() < 1.0
    laplace = bm.calibrate(population, new[0].until(2))
    assert laplace.noise == population.noise and laplace.samples is None


def test_the_learned_model_stands_alone(treated):
    *_, population = treated
    model = population.model
    assert model.joint is not None and set(model.joint.names) == set(model.free)
    i = list(population.parameters).index("chemotherapy.resistant")
    assert model.parameters["chemotherapy.resistant"].prior.location == pytest.approx(population.prior.mean[i])


def test_visits_without_a_volume_and_of_different_number_are_fine(treated):
    model, people, *_ = treated
    missing = bm.Patient.from_volumes("G1", [0, 21, 84, 110], [9.0, np.nan, 3.0, 1.0], PLAN)
    gaps = [missing, people[0].until(3), *people[1:9]]
    population = learn_priors(model, gaps, noise_by_visit=True, iterations=3)
    assert len(population.noise.scale) == 4 and np.isfinite(population.log_evidence)
    posterior = population.posterior(gaps, np.array([[120.0]] * 10))
    assert posterior.predicted.shape == (10, 2048, 1) and np.isfinite(posterior.draws.log_evidence).all()
    assert (posterior.draws.ess > 20).all()


def test_misuse_is_refused(treated):
    model, people, _, population = treated
    with pytest.raises(CalibrationError, match="no patients"):
        learn_priors(model, [])
    with pytest.raises(CalibrationError, match="3 patients for 3 parameters"):
        learn_priors(model, people[:3])
    with pytest.raises(CalibrationError, match="start has initial.capacity"):
        learn_priors(model, people[:5], start=JointPrior(("initial.capacity",), [1.0], [[1.0]]))
    with pytest.raises(CalibrationError, match="C0: a day to predict lies before the last visit"):
        population.posterior(people[:2], [50.0])
    with pytest.raises(CalibrationError, match="no visit has a volume"):
        learn_priors(model, [*people[:5], bm.Patient.from_volumes("E", [0.0], [np.nan])])
    with pytest.raises(CalibrationError, match="numbers of patients"):
        PseudoPatients(mean=-1.0)
