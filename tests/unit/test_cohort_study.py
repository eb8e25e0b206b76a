"""What a cohort's forecasts were worth: coverage as drawn, nobody judged by their own error, and studies that go on."""

import shutil
from dataclasses import replace

import numpy as np
import pytest

import biomodel as bm
from biomodel.cohort_study import FOLDS, CohortStudy, study_cohort
from biomodel.conformal_scores import Identity
from biomodel.errors import CalibrationError, InputError
from biomodel.virtual import small_patient

MODEL = bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion())


def made(n, shift=0.0, wide=1.0, seed=0) -> CohortStudy:
    """Forecasts of a standard deviation of 2 cm³ whose errors are `wide` times that, and shifted."""
    rng = np.random.default_rng(seed)
    centre = rng.uniform(20, 60, n)
    draws = centre[:, None] + 2 * rng.standard_normal((n, 400))
    observed = centre + 2 * (shift + wide * rng.standard_normal(n))
    told = tuple({"a": x, "b": y} for x, y in rng.standard_normal((n, 2)))
    return CohortStudy(
        "made up",
        True,
        "m",
        "Laplace",
        "volume",
        tuple(f"P{i}" for i in range(n)),
        np.full(n, 20.0),
        draws,
        observed,
        told,
        {},
    )


def people(n, rng):
    for i in range(n):
        volumes = rng.uniform(5, 20) * np.exp(rng.normal(0.02, 0.01) * np.array([0.0, 20.0, 40.0]))
        yield bm.Patient.from_volumes(f"P{i}", [0.0, 20.0, 40.0], volumes * np.exp(0.05 * rng.standard_normal(3)))


def test_right_forecasts_hold_as_often_as_they_say():
    found = made(400).evidence()
    assert found.n == 400
    assert found.before.inside.all()
    assert np.abs(found.after.observed - found.after.levels).max() < 0.05


@pytest.mark.parametrize(("shift", "wide"), [(0.0, 3.0), (1.5, 1.0)])
def test_wrong_forecasts_are_found_and_adjusted(shift, wide):
    found = made(400, shift, wide).evidence()
    assert not found.before.inside[2]
    assert found.before.observed[2] < 0.8
    # A conformal interval holds at least what it says, but for chance: three standard errors.
    assert (np.abs(found.after.observed - found.after.levels) < 3 * np.sqrt(0.25 / 400)).all()
    assert found.crps_after < found.crps_before


def test_nobody_is_judged_by_their_own_error():
    """One patient far off: learned on all, the widest interval would hold even that one; on the others, never."""
    study = made(100)
    observed = study.observed.copy()
    observed[7] += 1e4
    study = replace(study, observed=observed)
    low, high = study.adjustment().interval(study.draws[7], 1 - 2 / 101)
    assert low <= observed[7] <= high
    widest = np.delete(np.arange(100), 7)
    low, high = study._learn(widest, Identity(), 1.0).interval(study.draws[7], 0.95)
    assert not low <= observed[7] <= high
    assert study.evidence().after.observed[3] < 1.0


def test_few_patients_are_shown_as_forecast_alone():
    found = made(3).evidence()
    assert found.after is None
    assert np.isnan(found.crps_after)
    assert made(12).evidence().after.levels.tolist() == [0.5, 0.8]
    assert FOLDS == 10


def test_a_study_goes_on_where_it_stopped(tmp_path, monkeypatch):
    import biomodel.cohort_study as module

    cohort = list(people(4, np.random.default_rng(1)))
    whole = study_cohort(cohort, MODEL, calibrate_on=2, name="c", draws=30)
    assert whole.draws.shape == (4, 30)
    assert whole.observed.tolist() == [p.volume_of(p.visits[2]) for p in cohort]
    assert not whole.virtual
    assert (whole.model, whole.method, whole.quantity) == (repr(MODEL), "Laplace", "measured_volume")
    assert whole.ahead.tolist() == [20.0] * 4
    study_cohort(cohort[:3], MODEL, calibrate_on=2, name="c", draws=30, folder=tmp_path)
    asked = []
    calibrate = module.calibrate
    monkeypatch.setattr(module, "calibrate", lambda m, p, *a: asked.append(p.id) or calibrate(m, p, *a))
    again = study_cohort(cohort, MODEL, calibrate_on=2, name="c", draws=30, folder=tmp_path)
    assert asked == ["P3"]
    np.testing.assert_array_equal(again.draws, whole.draws)
    assert again.features == whole.features
    # What is damaged is made anew, and identifiers are no paths.
    for path, content in zip(sorted(tmp_path.iterdir()), (b"", b"junk", b"PK"), strict=False):
        path.write_bytes(content)
    asked.clear()
    again = study_cohort(cohort, MODEL, calibrate_on=2, name="c", draws=30, folder=tmp_path)
    assert sorted(asked) == ["P0", "P1", "P2"]
    np.testing.assert_array_equal(again.draws, whole.draws)
    odd = replace(cohort[0], id="../../" + "x" * 300)
    study_cohort([odd], MODEL, calibrate_on=2, name="c", draws=30, folder=tmp_path / "inner" / "most")
    assert len(list((tmp_path / "inner" / "most").iterdir())) == 1
    # Another model, other data or another seed is another study.
    for change in ({"model": bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion())}, {"seed": 50}):
        asked.clear()
        settings = {"model": MODEL, "calibrate_on": 2, "name": "c", "draws": 30, "folder": tmp_path} | change
        study_cohort(cohort[:1], **settings)
        assert asked == ["P0"]


def test_the_calibration_never_sees_the_visit_that_is_compared(monkeypatch):
    import biomodel.cohort_study as module

    seen = []
    calibrate = module.calibrate
    monkeypatch.setattr(module, "calibrate", lambda m, p, *a: seen.append(len(p.visits)) or calibrate(m, p, *a))
    cohort = list(people(2, np.random.default_rng(2)))
    first = study_cohort(cohort, MODEL, calibrate_on=2, name="c", draws=30)
    assert seen == [2, 2]
    other = [bm.Patient.from_volumes(p.id, [0, 20, 40], [*map(p.volume_of, p.visits[:2]), 99.0]) for p in cohort]
    np.testing.assert_array_equal(study_cohort(other, MODEL, calibrate_on=2, name="c", draws=30).draws, first.draws)


def test_patients_without_a_forecast_are_listed(monkeypatch):
    import biomodel.cohort_study as module

    calibrate = module.calibrate

    def fails(model, patient, *rest):
        if patient.id == "P1":
            raise CalibrationError("no optimum")
        return calibrate(model, patient, *rest)

    monkeypatch.setattr(module, "calibrate", fails)
    cohort = list(people(3, np.random.default_rng(3)))
    found = study_cohort(cohort, MODEL, calibrate_on=2, name="c", draws=30)
    assert found.patients == ("P0", "P2")
    assert dict(found.failed) == {"P1": "no optimum"}
    with pytest.raises(InputError, match=r"no forecast of any patient in c.*no optimum"):
        study_cohort(cohort[1:2], MODEL, calibrate_on=2, name="c")


def test_bad_cohorts_are_refused():
    cohort = list(people(2, np.random.default_rng(4)))
    with pytest.raises(InputError, match="P0 comes twice"):
        study_cohort([cohort[0], cohort[0]], MODEL, calibrate_on=2, name="c", draws=30)
    with pytest.raises(InputError, match=r"no forecast of any patient in c.*no measured volume at visit 4"):
        study_cohort(cohort, MODEL, calibrate_on=3, name="c")
    for bad in ({"draws": 10}, {"calibrate_on": 1.5}, {"calibrate_on": 0}):
        with pytest.raises(InputError, match=rf"{next(iter(bad))} is .*expected a whole number from"):
            study_cohort(cohort, MODEL, **({"calibrate_on": 2, "name": "c"} | bad))
    with pytest.raises(InputError, match="checkpoint is for the chains of one patient"):
        study_cohort(cohort, MODEL, calibrate_on=2, name="c", method=bm.NUTS(checkpoint="x"))
    with pytest.raises(InputError, match="expected at least one"):
        study_cohort([], MODEL, calibrate_on=2, name="c")


@pytest.mark.slow
def test_patients_with_images(tmp_path):
    cohort = [small_patient(70 + i).patient for i in range(2)]
    model = bm.default_model(cohort[0])
    found = study_cohort(cohort, model, calibrate_on=2, name="virtual", draws=20, folder=tmp_path)
    assert found.virtual
    assert "log inflation" in found.features[0]
    assert len(list(tmp_path.iterdir())) == 2
    shutil.rmtree(tmp_path)
