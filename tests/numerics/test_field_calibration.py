"""The growth rate as a map: derivatives of the posterior, and calibrations that run through to a forecast."""

import re
from dataclasses import replace

import numpy as np
import pytest

import biomodel as bm
from biomodel.calibration.field import FieldLaplace
from biomodel.calibration.field_check import check_field
from biomodel.calibration.field_evidence import LearnedMatern
from biomodel.calibration.field_prior import Added, Matern, Multiplied
from biomodel.calibration.field_problem import FieldProblem, maximise
from biomodel.errors import CalibrationError
from biomodel.terms import TissueDiffusion
from biomodel.virtual import Breast, Matched, small_patient, virtual_patient


@pytest.fixture(scope="module")
def known():
    return small_patient(7).patient.until(3)


def with_drugs(patient, diffusion=None, drug_map=None):
    drugs = [bm.Chemotherapy(agent, map=drug_map) for agent in patient.schedule.agents]
    priors = Matched().priors()
    model = bm.ReactionDiffusion(bm.Logistic(), diffusion or bm.Isotropic(), drugs)
    return model.with_priors({n: p for n, p in priors.items() if n in model.parameters})


@pytest.fixture(scope="module")
def model(known):
    return with_drugs(known)


@pytest.fixture(scope="module")
def slice_of():
    """A patient of one slice: the truth of a uniform rate, on voxels of 3 mm."""
    return virtual_patient(3, shape=(1, 20, 20), spacing=(3.0, 3.0, 3.0), anatomy=Breast(radius=(9.0, 10.0)))


def mapped(patient):
    """The same patient with a drug that reaches one side of the breast better."""
    ramp = np.broadcast_to(np.linspace(0.5, 1.5, patient.domain.shape[2]), patient.domain.shape)
    return replace(patient, visits=tuple(replace(v, drug_map=ramp.copy()) for v in patient.visits))


CASES = {
    "multiplied": (Multiplied(), 0.3, None, False),
    "added": (Added(), 0.02, None, False),
    "tissues": (Multiplied(), 0.3, TissueDiffusion(), False),
    "drug map": (Multiplied(), 0.3, None, True),
}


@pytest.mark.parametrize("case", CASES)
def test_gradient_of_the_posterior(known, case):
    link, sd, diffusion, has_map = CASES[case]
    patient = mapped(known) if has_map else known
    described = with_drugs(patient, diffusion, "drug_map" if has_map else None)
    problem = FieldProblem(described, patient, bm.TorchSolver(), Matern(10.0, sd), link, 3.0)
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
    problem = FieldProblem(model, known, bm.TorchSolver(), Matern(10.0, 0.3), Multiplied())
    white = np.zeros(problem.size)
    problem.replan(white)
    linear = problem.linearise(white)
    x, y = np.random.default_rng(0).standard_normal((2, problem.size))
    assert x @ linear.hessian(y) == pytest.approx(y @ linear.hessian(x), rel=1e-9)
    assert x @ linear.hessian(x) > 0


def test_from_a_calibrated_map_to_a_forecast(slice_of):
    known = slice_of.patient.until(3)
    fit = bm.calibrate(with_drugs(known), known, method=FieldLaplace(Matern(10.0, 0.3)))
    assert fit.converged and fit.rate_map is not None
    spread = fit.rate_map.spread()
    region = known.visits[0].region[fit.box]
    # The data inform the map in the tumour, and nowhere far from it.
    assert spread[region].mean() < 0.29 and 0.295 < spread.max() < 0.301
    assert fit.rate_map.gain()[region].mean() > 5 * np.median(fit.rate_map.gain())
    last = [known.visits[-1].day]
    forecast = bm.forecast(fit, times=last, draws=8, seed=0)
    assert forecast.draws == 8 and np.isfinite(forecast["volume"].values).all()
    again = bm.forecast(fit, times=last, draws=8, seed=0)
    np.testing.assert_array_equal(forecast["volume"].values, again["volume"].values)


@pytest.mark.slow
def test_uniform_truth_stays_uniform(known, model):
    # A prior set by hand takes over what other parameters explain; the evidence sees that the map is flat.
    truth = small_patient(7).parameters
    by_hand = bm.calibrate(model, known, method=FieldLaplace(Matern(10.0, 0.3)))
    fit = bm.calibrate(model, known, method=FieldLaplace())
    region = known.visits[0].region[fit.box]
    assert fit.rate_map.prior.matern.sd < 0.12
    assert np.abs(fit.rate_map.mean[region]).max() < 0.1 < np.abs(by_hand.rate_map.mean[region]).max()
    rows = {row["name"]: row for row in fit.table()}
    for name in ("diffusion.D", "growth.k"):
        assert rows[name]["low"] < truth[name] < rows[name]["high"]
    assert fit.log_evidence > by_hand.log_evidence + 10


@pytest.mark.slow
def test_the_maximum_with_more_mass_is_taken():
    """Here the joint density is highest far off, where cells divide and die eight times as fast as they do."""
    plan = bm.Schedule.weekly("paclitaxel", 1.4, 6, 80.0, "mg/m^2", status="planned")
    virtual = small_patient(5, regimen=plan, visit_days=(0.0, 19.0, 41.0))
    known, told = virtual.patient.until(2), []
    described = with_drugs(known)
    fit = bm.calibrate(described, known, method=FieldLaplace(), progress=told.append)
    first, last = (float(n) for n in re.findall(r"log evidence (\S+) .*, (\S+) near", " ".join(told))[0])
    assert last > first + 50
    plain = bm.calibrate(described, known)
    rows = {row["name"]: row for row in fit.table()}
    for name in described.free:
        assert rows[name]["low"] < plain.values[name] < rows[name]["high"]
    assert rows["diffusion.D"]["low"] < virtual.parameters["diffusion.D"] < rows["diffusion.D"]["high"]
    problem = FieldProblem(described, known, bm.TorchSolver(), Matern(), Multiplied())
    free = maximise(problem, np.zeros(problem.size), 20, 1e-3)
    values = dict(zip(problem.base.names, problem.decode(free.white)[0], strict=True))
    assert np.exp(values["growth.k"]) > 5 * virtual.parameters["growth.k"]


def test_held_unknowns_stay_where_they_start(slice_of):
    known = slice_of.patient.until(2)
    problem = FieldProblem(with_drugs(known), known, bm.TorchSolver(), Matern(10.0, 0.3), Multiplied())
    white = np.zeros(problem.size)
    white[:2] = 0.4, -0.3
    found = maximise(problem, white, 10, 1e-3, held=[0, 1])
    np.testing.assert_array_equal(found.white[:2], [0.4, -0.3])
    gradient = problem.linearise(found.white).gradient()
    assert np.abs(gradient[2:]).max() < 0.05 * np.abs(gradient[:2]).max()
    assert np.abs(found.white[2:]).max() > 0.01


@pytest.mark.slow
def test_tissues_field_and_start_together(slice_of):
    known = slice_of.patient.until(3)
    fit = bm.calibrate(with_drugs(known, TissueDiffusion()), known, method=FieldLaplace())
    assert fit.converged
    true = slice_of.parameters["diffusion.D"]
    for row in fit.table():
        if row["name"].startswith("diffusion.D"):
            assert row["low"] < true < row["high"]
    _, _, starts = fit.rate_map.draw(20, 0)
    region = known.visits[0].region[fit.box]
    # The start moves inside the region, where it was measured with noise, and in the unseen halo around it.
    moved = starts.std(0) > 0
    assert moved[region].all() and moved[~region].any() and not moved.all()


def refined(patient, factor: int):
    """The same patient on smaller voxels, each with what was seen in the larger one."""

    def split(values):
        for axis in (1, 2):
            values = np.repeat(values, factor, axis)
        return values

    spacing = (patient.domain.spacing[0], *(s / factor for s in patient.domain.spacing[1:]))
    mask = split(patient.domain.mask)
    visits = tuple(replace(v, adc=split(v.adc), region=split(v.region), drug_map=None) for v in patient.visits)
    return replace(patient, domain=bm.Domain.box(mask.shape, spacing, mask), visits=visits)


@pytest.mark.slow
def test_smaller_voxels_do_not_know_more(slice_of):
    known = slice_of.patient.until(3)
    known = replace(known, domain=bm.Domain.box(known.domain.shape, known.domain.spacing, known.domain.mask))
    knowledge = {}
    for length in (3.0, 0.0):
        for factor in (1, 2):
            patient = known if factor == 1 else refined(known, factor)
            method = FieldLaplace(Matern(12.0, 0.4), noise_length=length)
            fit = bm.calibrate(with_drugs(patient), patient, method=method)
            region = patient.visits[0].region[fit.box]
            knowledge[length, factor] = fit.rate_map.gain()[region].mean()
    # Four independent voxels for one would know more; four that share one error do not.
    assert knowledge[0.0, 2] - knowledge[0.0, 1] > 0.15 > abs(knowledge[3.0, 2] - knowledge[3.0, 1])


@pytest.mark.parametrize("case", CASES)
def test_slope_by_the_adjoint_is_the_gradient(slice_of, case):
    link, sd, diffusion, has_map = CASES[case]
    known = slice_of.patient.until(3)
    patient = mapped(known) if has_map else known
    described = with_drugs(patient, diffusion, "drug_map" if has_map else None)
    problem = FieldProblem(described, patient, bm.TorchSolver(), Matern(10.0, sd), link, 5.0)
    white = 0.1 * np.random.default_rng(0).standard_normal(problem.size)
    problem.replan(white)
    value, slope = problem.slope(white)
    assert value == pytest.approx(problem.objective(white), rel=1e-12)
    gradient = problem.linearise(white).gradient()
    np.testing.assert_allclose(slope, gradient, atol=1e-6 * np.abs(gradient).max())


@pytest.mark.slow
def test_chain_about_the_laplace_posterior(slice_of):
    known = slice_of.patient.until(3)
    method = FieldLaplace(Matern(12.0, 0.2), floor=0.1)
    fit = bm.calibrate(with_drugs(known), known, method=method)
    found = check_field(fit, draws=150, settle=60)
    assert found.accepted > 0.5 and found.field_shift.shape == fit.rate_map.mean.shape
    # The joint maximum lies several standard deviations from the mean: noise of the start, fitted, looks like growth.
    # The search does not end there, since the evidence prefers to begin where the parameters are without a map.
    maximum = check_field(bm.calibrate(with_drugs(known), known, method=replace(method, pairs=0)), 150, 60)
    k = fit.names.index("growth.k")
    assert abs(found.shift[k]) < 1.0 and abs(maximum.shift[k]) < 2.0
    region = known.visits[0].region[fit.box]
    assert np.abs(found.field_shift[region]).mean() < 1.0 and 0.5 < found.field_ratio[region].mean() < 1.5
    rows = {row["name"]: row for row in found.table()}
    # The data say next to nothing about the share of the grid's error: the approximation is exact there.
    assert abs(rows["grid.error"]["shift"]) < 4 * rows["grid.error"]["error"]
    assert rows["grid.error"]["ratio"] == pytest.approx(1.0, abs=0.2)
    again = [check_field(fit, draws=50, settle=5).shift for _ in range(2)]
    np.testing.assert_array_equal(*again)


def test_check_needs_a_map(slice_of):
    known = slice_of.patient.until(3)
    fit = bm.calibrate(with_drugs(known), known)
    with pytest.raises(CalibrationError, match="has no map of the rate; calibrate by FieldLaplace"):
        check_field(fit)


def test_what_cannot_be_mapped(known, model, slice_of):
    with pytest.raises(CalibrationError, match="Gompertz has no growth rate to map"):
        bm.calibrate(replace(model, growth=bm.Gompertz(), priors={}), known, method=FieldLaplace())
    with pytest.raises(CalibrationError, match="has no growth rate to map"):
        bm.calibrate(model.fix({"growth.k": 0.05}), known, method=FieldLaplace())
    with pytest.raises(CalibrationError, match="has no images; FieldLaplace needs them"):
        plain = bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion())
        bm.calibrate(plain, known.without_images(), method=FieldLaplace())
    first = slice_of.patient.until(1)
    with pytest.raises(CalibrationError, match="a calibration needs at least two visits"):
        bm.calibrate(with_drugs(first), first, method=FieldLaplace())
    outlined = slice_of.patient.until(2)
    outlined = replace(outlined, visits=(outlined.visits[0], replace(outlined.visits[1], adc=None)))
    with pytest.raises(CalibrationError, match="a map of the growth rate would rest on outlines alone"):
        bm.calibrate(with_drugs(outlined), outlined, method=FieldLaplace())
    with pytest.raises(CalibrationError, match="length 1 mm is shorter than a voxel"):
        bm.calibrate(model, known, method=FieldLaplace(Matern(1.0, 0.3)))


@pytest.mark.parametrize("values", [{"noise_length": -1.0}, {"most": 0}, {"tolerance": 0.0}, {"floor": 0.0}])
def test_method_needs_sensible_numbers(values):
    with pytest.raises(CalibrationError, match="FieldLaplace: noise_length"):
        FieldLaplace(**values)


def test_hyperpriors_have_a_reference_on_the_rough_side():
    learned = LearnedMatern()
    rough = learned.reference(1.0)
    assert rough.length < learned.median.length and rough.sd > learned.median.sd
