"""Stages of a forecast's uncertainty: estimators, errors that callers state, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

import biomodel as bm
from biomodel.errors import CalibrationError, InputError, TumorcastError
from biomodel.stage_chain import STAGES, Errors, stage_of
from biomodel.stage_errors import DrugMapError, TreatmentError
from biomodel.stages import LABELS, Stages, _estimate, stages
from biomodel.virtual import small_patient


def crossed_runs(function, stages_, draws, seed):
    """Both sets and their crossings of a function of independent standard normals."""
    a, b = np.random.default_rng(seed).standard_normal((2, draws, stages_))
    mixed = []
    for i in range(stages_):
        x = a.copy()
        x[:, i] = b[:, i]
        mixed.append(function(x))
    zeroed = []
    for i in range(stages_):
        x = a.copy()
        x[:, i] = 0
        zeroed.append(function(x))
    return function(a), function(b), np.stack(mixed), np.stack(zeroed)[None]


def test_shares_of_a_sum_are_those_of_its_variances():
    weights = np.sqrt([0.5, 0.3, 0.15, 0.05])
    runs = crossed_runs(lambda x: 3 + x @ weights, 4, 40_000, 0)
    contribution, first, total, fall = _estimate(*runs, np.ones(1))
    for found in (contribution, first, total, fall):
        assert np.allclose(found, weights**2, atol=0.02)


def test_what_two_stages_do_only_together_is_halved():
    """f = x0 + x1 x2 / 2: variance 1 + 1/4, of which the product is neither's alone."""
    runs = crossed_runs(lambda x: x[:, 0] + x[:, 1] * x[:, 2] / 2, 3, 60_000, 1)
    contribution, first, total, fall = _estimate(*runs, np.ones(1))
    assert np.allclose(first, [0.8, 0, 0], atol=0.02)
    assert np.allclose(total, [0.8, 0.2, 0.2], atol=0.02)
    assert np.allclose(contribution, [0.8, 0.1, 0.1], atol=0.02)
    assert contribution.sum() == pytest.approx(1, abs=0.03)
    # Set to 0, a factor takes the whole product away.
    assert np.allclose(fall, [0.8, 0.2, 0.2], atol=0.03)


def test_a_stage_without_effect_has_no_share_at_any_number_of_draws():
    contribution, first, total, _ = _estimate(*crossed_runs(lambda x: x[:, 0], 2, 50, 2), np.ones(1))
    assert contribution[1] == first[1] == total[1] == 0


def test_switching_off_models_averages_over_them():
    a = np.random.default_rng(3).standard_normal(1000)
    off = np.stack([np.stack([a * 0.5]), np.stack([a * 1.5])])
    fall = _estimate(a, a[::-1], np.stack([-a]), off, np.array([0.75, 0.25]))[3]
    assert fall == pytest.approx(1 - (0.75 * 0.25 + 0.25 * 2.25))


def test_every_unknown_belongs_to_a_stage():
    names = {"growth.k": "parameters", "initial.halo": "parameters", "adc_shift.visit2": "adc", "grid.error": "grid",
             "edge.visit1": "segmentation", "region_shift.visit2.x": "segmentation",
             "misalignment.visit2.z": "registration"}  # fmt: skip
    assert {n: stage_of(n) for n in names} == names
    assert set(LABELS) == set(STAGES)


def test_errors_have_a_stream_for_each_purpose():
    errors = Errors((1, 2))
    assert errors.normal("growth.k") == Errors((1, 2)).normal("growth.k")
    assert len({errors.normal("growth.k"), errors.normal("diffusion.D"), Errors((1, 3)).normal("growth.k")}) == 3


def plan():
    weekly = bm.Schedule.weekly("paclitaxel", 0, 12, 80, "mg/m^2", status="planned")
    return weekly + bm.Schedule(fractions=tuple(bm.schedule.Fraction(60.0 + d, 2.0, "planned") for d in range(5)))


def test_a_course_differs_only_after_the_last_visit():
    error, day = TreatmentError(0.2, 0.2, 1.5), 20.0
    rng = np.random.default_rng(0)
    courses = [error.draw(plan(), day, rng) for _ in range(400)]
    before = [d for d in plan().doses if d.day <= day]
    assert all([d for d in c.doses if d.day <= day] == before for c in courses)
    later = [[d for d in c.doses if d.day > day] for c in courses]
    assert np.mean([len(x) for x in later]) == pytest.approx(0.8 * (12 - len(before)), rel=0.05)
    assert np.mean([len(c.fractions) for c in courses]) == pytest.approx(4.0, rel=0.05)
    amounts = np.array([x[0].amount for x in later if x])
    assert amounts.mean() == pytest.approx(80, rel=0.04) and amounts.std() / 80 == pytest.approx(0.2, rel=0.15)
    # One factor for all doses of a course.
    assert all(len({round(d.amount, 9) for d in x}) <= 1 for x in later)
    assert TreatmentError(0, 0, 0).draw(plan(), day, rng) == plan()


def test_a_drug_map_keeps_its_mean_and_varies_smoothly():
    rng = np.random.default_rng(0)
    supply = np.full((16, 16, 16), 1.0)
    region = np.zeros_like(supply, bool)
    region[4:12, 4:12, 4:12] = True
    error = DrugMapError(cv=0.3, length_mm=6.0)
    drawn = np.stack([error.draw(supply, region, (2.0, 2.0, 2.0), rng) for _ in range(40)])
    assert np.allclose(drawn[:, region].mean(1), 1.0) and (drawn > 0).all()
    assert drawn.std() == pytest.approx(0.3, rel=0.2)
    beside = np.corrcoef(drawn[..., :-1].ravel(), drawn[..., 1:].ravel())[0, 1]
    far = np.corrcoef(drawn[..., :-8].ravel(), drawn[..., 8:].ravel())[0, 1]
    assert beside > 0.6 > 0.3 > abs(far)
    assert np.array_equal(DrugMapError(cv=0).draw(supply, region, (2.0,) * 3, rng), supply)


@pytest.mark.parametrize("make", [
    lambda: TreatmentError(intensity_cv=-0.1), lambda: TreatmentError(missed=1.0), lambda: TreatmentError(delay_sd=99),
    lambda: DrugMapError(cv=2.0), lambda: DrugMapError(length_mm=float("nan")),
])  # fmt: skip
def test_absurd_errors_are_refused(make):
    with pytest.raises(InputError, match="expected a number from"):
        make()


@pytest.fixture(scope="module")
def fit():
    known = small_patient(7).patient.until(2)
    return bm.calibrate(bm.default_model(known), known)


def test_bad_input_is_refused(fit):
    with pytest.raises(InputError, match="expected one from the last calibrated visit, day"):
        stages(fit, until=3.0)
    for far in (np.inf, np.nan, 1e6):
        with pytest.raises(InputError, match="within 36525 days of the first"):
            stages(fit, far)
    with pytest.raises(InputError, match="draws is 2"):
        stages(fit, until=60.0, draws=2)
    with pytest.raises(CalibrationError, match="no fits"):
        stages([], until=60.0)
    other = replace(fit, patient=replace(fit.patient, id="another"))
    with pytest.raises(CalibrationError, match="different patients"):
        stages([fit, other], until=60.0)
    volumes = fit.patient.without_images()
    with pytest.raises(CalibrationError, match="has no images"):
        stages(replace(fit, patient=volumes), until=60.0)
    bare = replace(fit.patient, visits=tuple(replace(v, adc=None) for v in fit.patient.visits))
    with pytest.raises(CalibrationError, match="no visit has an ADC map"):
        stages(replace(fit, patient=bare), until=60.0)


@pytest.mark.slow
def test_what_is_absent_is_named_and_the_same_seed_gives_the_same_shares(fit):
    one = stages(fit, until=45.0, draws=12, seed=3, treatment=None)
    two = stages(fit, until=45.0, draws=12, seed=3, treatment=None)
    assert np.array_equal(one.crossed, two.crossed) and one.table() == two.table()
    assert set(one.names) | set(one.absent) == set(STAGES) and not set(one.names) & set(one.absent)
    assert one.absent["treatment"] == "taken as planned" and "edge_sd" in one.absent["segmentation"]
    assert "misalignment_sd" in one.absent["registration"] and "one model" in one.absent["model"]
    assert stages(fit, until=45.0, draws=12, seed=4, treatment=None).table() != one.table()
    assert "ADC noise" in one._repr_html_()
    with pytest.raises(TumorcastError, match="no quantity 'size'"):
        one.table("size")
    from biomodel.figure_stages import stages_figure

    figure = stages_figure(one)
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    assert labels == [LABELS[n] for n in one.names]


def test_a_forecast_that_does_not_vary_is_refused():
    same = np.zeros((10, 3))
    found = Stages(("adc",), {}, same, same, same[None], None, np.ones(1), ("m",), 9.0, (), 0)
    with pytest.raises(InputError, match="no variance to divide"):
        found.table()
