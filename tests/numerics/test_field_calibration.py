"""The growth rate as a map: derivatives of the posterior, and a calibration that runs through to a forecast."""

from dataclasses import replace

import numpy as np
import pytest

import biomodel as bm
from biomodel.calibration.field import FieldLaplace, FieldProblem
from biomodel.calibration.field_prior import Added, Matern, Multiplied
from biomodel.errors import CalibrationError
from biomodel.virtual import Matched, small_patient


@pytest.fixture(scope="module")
def known():
    return small_patient(7).patient.until(3)


@pytest.fixture(scope="module")
def model(known):
    drugs = [bm.Chemotherapy(agent) for agent in known.schedule.agents]
    return bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), drugs).with_priors(Matched().priors())


METHODS = [FieldLaplace(Matern(10.0, 0.3), Multiplied()), FieldLaplace(Matern(10.0, 0.02), Added())]


@pytest.mark.parametrize("method", METHODS)
def test_gradient_of_the_posterior(known, model, method):
    problem = FieldProblem(model, known, bm.TorchSolver(), method)
    rng = np.random.default_rng(0)
    white = 0.1 * rng.standard_normal(problem.size)
    problem.replan(white)
    gradient = problem.linearise(white).gradient()
    p, n = problem.p, problem.field.size
    for part in (slice(0, p), slice(p, p + n), slice(p + n, None)):
        direction = np.zeros(problem.size)
        direction[part] = rng.standard_normal(direction[part].shape)
        step = 1e-4 / np.abs(direction).max()
        ahead, behind = (problem.objective(white + sign * step * direction) for sign in (1, -1))
        assert (ahead - behind) / (2 * step) == pytest.approx(gradient @ direction, rel=1e-4)


def test_hessian_is_symmetric_and_positive(known, model):
    problem = FieldProblem(model, known, bm.TorchSolver(), FieldLaplace(Matern(10.0, 0.3)))
    white = np.zeros(problem.size)
    problem.replan(white)
    linear = problem.linearise(white)
    x, y = np.random.default_rng(0).standard_normal((2, problem.size))
    assert x @ linear.hessian(y) == pytest.approx(y @ linear.hessian(x), rel=1e-9)
    assert x @ linear.hessian(x) > 0


@pytest.mark.slow
def test_from_a_calibrated_map_to_a_forecast(known, model):
    fit = bm.calibrate(model, known, method=FieldLaplace(Matern(10.0, 0.3)))
    assert fit.converged and fit.rate_map is not None
    spread = fit.rate_map.spread()
    region = known.visits[0].region[fit.box]
    # The data inform the map in the tumour, and nowhere far from it.
    assert spread[region].mean() < 0.27 < spread.max() < 0.301
    assert fit.rate_map.gain()[region].mean() > 5 * np.median(fit.rate_map.gain())
    forecast = bm.forecast(fit, times=[known.visits[-1].day], draws=8, seed=0)
    assert forecast.draws == 8 and np.isfinite(forecast["volume"].values).all()
    again = bm.forecast(fit, times=[known.visits[-1].day], draws=8, seed=0)
    np.testing.assert_array_equal(forecast["volume"].values, again["volume"].values)


def test_what_cannot_be_mapped(known, model):
    with pytest.raises(CalibrationError, match="Gompertz has no growth rate to map"):
        bm.calibrate(replace(model, growth=bm.Gompertz(), priors={}), known, method=FieldLaplace())
    with pytest.raises(CalibrationError, match="has no growth rate to map"):
        bm.calibrate(model.fix({"growth.k": 0.05}), known, method=FieldLaplace())
    mapped = [bm.Chemotherapy(agent, map="drug_map") for agent in known.schedule.agents]
    with pytest.raises(CalibrationError, match="cannot be calibrated together"):
        bm.calibrate(bm.ReactionDiffusion(treatments=mapped), known, method=FieldLaplace())
    with pytest.raises(CalibrationError, match="has no images; FieldLaplace needs them"):
        plain = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion())
        bm.calibrate(plain, known.without_images(), method=FieldLaplace())
