"""Markov chains against other ways to the same posterior, and the density of images against differences."""

from functools import cache

import numpy as np
import pytest

import biomodel as bm
from biomodel.calibration.density import ImageDensity
from biomodel.calibration.gaussnewton import prior_of
from biomodel.calibration.images import ImageProblem
from biomodel.virtual import SMALL_BREAST, Matched, virtual_patient

pytest.importorskip("pymc")

PLAN = bm.Schedule.weekly("paclitaxel", 1.4, 8, 80.0, "mg/m^2", status="planned")


@cache
def volumes():
    patient = bm.Patient.from_volumes("N", [0.0, 21.0, 42.0, 63.0], [8.0, 6.1, 3.0, 1.4], PLAN, cv=0.15)
    model = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel")])
    return model, patient


@cache
def exact():
    """Importance sampling with so many draws that its error does not count."""
    return bm.calibrate(*volumes(), method=bm.Importance(draws=40000))


@pytest.mark.parametrize(
    "method",
    [
        bm.NUTS(chains=2, draws=300, tune=100, seed=3),
        pytest.param(bm.NUTS(draws=800, tune=300, seed=3), marks=pytest.mark.slow),
        pytest.param(bm.SMC(draws=1500, seed=3), marks=pytest.mark.slow),
    ],
)
def test_chains_agree_with_importance_sampling(method):
    fit, right = bm.calibrate(*volumes(), method=method), exact()
    mean, sd = right.samples.weights @ right.samples.z, np.sqrt(np.diag(right.covariance))
    chains = fit.samples.chains
    error = 1 / np.sqrt(np.minimum(chains.bulk, right.samples.ess))
    assert chains.bulk.min() > 100
    assert (np.abs(fit.samples.z.mean(0) - mean) / sd < 4 * error).all()
    np.testing.assert_allclose(fit.samples.z.std(0), sd, rtol=3 * error.max())
    if isinstance(method, bm.SMC):
        assert fit.log_evidence == pytest.approx(right.log_evidence, abs=0.3)
    inference = fit.inference
    values = inference.posterior["growth.k"].values
    assert values.shape == (chains.z.shape[0], chains.z.shape[1])
    np.testing.assert_allclose(np.median(values), fit.table()[fit.names.index("growth.k")]["estimate"], rtol=1e-2)


@cache
def images():
    cube = ((12, 12, 12), (4.0, 4.0, 4.0))
    known = virtual_patient(7, Matched(), *cube, regimen=PLAN, anatomy=SMALL_BREAST).patient.until(2)
    problem = ImageProblem(bm.default_model(known), known, bm.TorchSolver())
    prior = prior_of(problem.parameters)
    best = bm.MAP().optimise(problem, prior)
    return problem, best, prior


def test_density_of_images_against_differences():
    problem, best, prior = images()
    density = ImageDensity(problem, best, prior)
    covariance = np.linalg.inv(best.linear.hessian + prior.precision)
    root, rng = np.linalg.cholesky(covariance), np.random.default_rng(0)
    for reach in (0.0, 0.5, 1.0, 2.0):
        z = best.z + reach * root @ rng.standard_normal(density.size)
        value, slope = density(z)
        assert value == pytest.approx(density.value(z), rel=1e-10)
        steps = [(density.value(z + h) - density.value(z - h)) / 2 for h in 1e-4 * root.T]
        # Beside the gradient the differences carry the tolerance of the minimum over the initial state's noise.
        np.testing.assert_allclose(1e-4 * root.T @ slope, steps, atol=3e-7)


def test_density_of_images_at_the_optimum_is_that_of_the_laplace_fit():
    problem, best, prior = images()
    density = ImageDensity(problem, best, prior)
    offset = best.z - prior.mean
    log_prior = -0.5 * offset @ prior.precision @ offset - 0.5 * np.linalg.slogdet(2 * np.pi * prior.covariance)[1]
    value, slope = density(best.z)
    assert value == pytest.approx(best.linear.log_likelihood() + log_prior, abs=0.05)
    covariance = np.linalg.inv(best.linear.hessian + prior.precision)
    assert slope @ covariance @ slope < 0.1**2  # nearer than the search's tolerance, in posterior standard deviations


@pytest.mark.slow
def test_nuts_of_images_finds_the_laplace_posterior_where_it_is_nearly_gaussian():
    problem, best, prior = images()
    fit = bm.calibrate(problem.model, problem.patient, method=bm.NUTS(chains=2, draws=300, tune=150, seed=1))
    laplace = bm.calibrate(problem.model, problem.patient)
    chains = fit.samples.chains
    assert chains.r_hat.max() < 1.05
    assert (np.abs(fit.samples.z.mean(0) - laplace.z) / laplace.sd < 0.5).all()
    ratio = fit.samples.z.std(0) / laplace.sd
    assert (ratio > 0.7).all() and (ratio < 1.5).all()
