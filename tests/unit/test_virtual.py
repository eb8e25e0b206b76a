"""Virtual patients: the same seed gives the same patient, the truth is sound, and a folder reads back."""

import json
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from biomodel import regimens
from biomodel.errors import GeometryError, InputError
from biomodel.patient import Patient
from biomodel.schedule import Schedule
from biomodel.treatments import REFERENCE_DOSES
from biomodel.virtual import Breast, Flaws, Matched, Mismatched, Scan, small_patient, virtual_patient

DAYS = (0.0, 15.0, 33.0)


@pytest.fixture(scope="module")
def matched():
    return small_patient(3, visit_days=DAYS)


@pytest.fixture(scope="module")
def mismatched():
    return small_patient(3, Mismatched(), visit_days=DAYS)


def test_the_same_seed_gives_the_same_patient(matched):
    again = small_patient(3, visit_days=DAYS)
    assert again.patient.fingerprint() == matched.patient.fingerprint()
    assert again.parameters == matched.parameters
    xr.testing.assert_identical(again.truth, matched.truth)


def test_other_seeds_give_other_patients(matched):
    other = small_patient(4, visit_days=DAYS)
    assert set(other.parameters) == set(matched.parameters)
    assert all(other.parameters[name] != value for name, value in matched.parameters.items())
    assert (other.patient.domain.mask != matched.patient.domain.mask).any() or (
        other.truth.cell_fraction != matched.truth.cell_fraction
    ).any()


def test_purposes_have_their_own_streams(matched):
    """Another regimen, noise or later visit leaves anatomy, day 0 and parameters alone."""
    other = small_patient(3, regimen=regimens.ac_t(), visit_days=(0.0, 15.0), scan=Scan(voxel_cv=0.01))
    assert other.parameters == matched.parameters
    assert (other.patient.domain.mask == matched.patient.domain.mask).all()
    np.testing.assert_array_equal(other.truth.cell_fraction[0], matched.truth.cell_fraction[0])
    untreated = small_patient(3, regimen=Schedule(), visit_days=(0.0, 15.0))
    np.testing.assert_array_equal(untreated.patient.visits[0].adc, matched.patient.visits[0].adc)
    assert untreated.truth.cells[1] > matched.truth.cells[1]


def test_written_twice_gives_the_same_bytes(matched, tmp_path):
    for name in ("a", "b"):
        matched.write(tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file())
    assert any(path.name == "truth.nc" for path in files)
    for path in files:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path


def test_a_written_folder_reads_back(matched, tmp_path):
    matched.write(tmp_path / "p")
    patient = Patient.read(tmp_path / "p")
    assert patient.fingerprint() == matched.patient.fingerprint()
    assert patient.schedule == matched.patient.schedule
    with xr.open_dataset(tmp_path / "p" / "truth" / "truth.nc", engine="h5netcdf") as truth:
        np.testing.assert_array_equal(truth.cell_fraction, matched.truth.cell_fraction)
        assert truth.time.values.tolist() == list(DAYS)  # days, not decoded to dates
        assert truth.attrs["virtual"] == 1
        assert json.loads(truth.attrs["parameters"]) == matched.parameters
        settings = json.loads(truth.attrs["settings"])
    assert settings["seed"] == 3 and settings["setting"] == "Matched"
    assert settings["truth"]["growth"] == {"median": 0.05, "sigma": 0.4}


def test_nothing_planned_is_lost_before_the_later_visits(matched):
    schedule = matched.patient.until(visit=1).schedule
    assert schedule == matched.patient.schedule
    assert all(dose.status == "planned" for dose in schedule.doses)


def test_truth_is_sound(matched):
    truth, domain = matched.truth, matched.patient.domain
    u = truth.cell_fraction.values
    assert u.dtype == np.float32 and u.shape == (3, *domain.shape)
    assert u.min() >= 0 and u.max() <= 1
    assert not u[:, ~domain.mask].any()
    assert 0.5 < u[0].max() < 1
    voxel = domain.voxel_volume / 1e3
    np.testing.assert_allclose(truth.volume, (u >= 0.10).sum(axis=(1, 2, 3)) * voxel, rtol=1e-12)
    np.testing.assert_allclose(truth.cells, u.sum(axis=(1, 2, 3)) * truth.attrs["cells_per_voxel"], rtol=1e-5)
    daily = truth.daily_cells.sel(day=list(DAYS))
    np.testing.assert_array_equal(daily, truth.cells)
    outside = 1 - u[0][u[0] >= 0.10].sum() / u[0].sum()
    assert outside < 0.12  # the front's tail below the visible fraction


@pytest.mark.parametrize("seed", range(6))
def test_day_zero_is_large_enough_and_inside(seed):
    made = small_patient(seed, visit_days=(0.0,))
    region, mask = made.patient.visits[0].region, made.patient.domain.mask
    assert region.sum() >= 60
    assert not (region & ~mask).any()
    tissues = made.patient.domain.tissues
    np.testing.assert_allclose((tissues["adipose"] + tissues["fibroglandular"])[mask], 1.0, atol=1e-6)
    assert 0.07 < tissues["fibroglandular"][mask].mean() < 0.36


def test_matched_observation_is_exact_inside_the_region(matched):
    clean = small_patient(3, visit_days=DAYS, scan=Scan(voxel_cv=0.0, repeatability_cv=0.0))
    settings = clean.patient.cellularity
    for visit, u in zip(clean.patient.visits, clean.truth.cell_fraction.values, strict=True):
        np.testing.assert_array_equal(visit.region, u >= settings.visible_fraction)
        measured = (settings.adc_w - visit.adc) / (settings.adc_w - settings.adc_min)
        np.testing.assert_allclose(measured[visit.region], u[visit.region], atol=1e-6)
    for noisy, exact in zip(matched.patient.visits, clean.patient.visits, strict=True):
        mask = clean.patient.domain.mask
        ratio = noisy.adc[mask] / exact.adc[mask]
        assert abs(ratio.mean() - 1) < 0.2  # one factor per visit ...
        assert ratio.std() / ratio.mean() == pytest.approx(0.05, rel=0.05)  # ... and independent noise per voxel
        assert not noisy.adc[~mask].any()


def test_treatment_decides_what_becomes_of_the_region():
    base, days = Matched(), (0.0, 25.0)
    strong = replace(base, drugs=tuple(replace(d, efficacy=replace(d.efficacy, median=0.5)) for d in base.drugs))
    weak = replace(base, drugs=tuple(replace(d, efficacy=replace(d.efficacy, median=0.001)) for d in base.drugs))
    shrunk, grown = small_patient(3, strong, visit_days=days), small_patient(3, weak, visit_days=days)
    assert grown.truth.volume[1] > grown.truth.volume[0]
    assert shrunk.truth.volume[1] < shrunk.truth.volume[0]
    last = shrunk.patient.visits[-1]
    assert last.region is None and last.volume == 0.0  # gone: a visit without a region, as a real record has it


def test_mismatch_changes_truth_and_scans_but_not_day_zero(matched, mismatched):
    ours, theirs = matched.truth.cell_fraction, mismatched.truth.cell_fraction
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-6)
    assert theirs[2].sum() > ours[2].sum()  # resistant cells are left
    assert 0.05 <= mismatched.parameters["truth.resistant_fraction"] <= 0.3
    for number in (0, 1, 2):
        a, b = matched.patient.visits[number], mismatched.patient.visits[number]
        assert (a.adc != b.adc).any()
        assert np.isfinite(b.adc).all()
        assert not (b.region & ~mismatched.patient.domain.mask).any()
        truth = theirs.values[number] >= 0.10
        overlap = 2 * (b.region & truth).sum() / (b.region.sum() + truth.sum())
        assert 0.5 < overlap <= 1
    assert mismatched.truth.attrs["title"] == matched.truth.attrs["title"]


def test_gompertz_differs_from_logistic(mismatched):
    other = small_patient(3, Mismatched(gompertz=True), visit_days=DAYS)
    assert other.truth.cells[1] > mismatched.truth.cells[1]


def test_flaws_can_be_switched_off(mismatched):
    made = small_patient(3, Mismatched(flaws=Flaws(region_shift=0, region_edge=0)), visit_days=DAYS)
    for visit, u in zip(made.patient.visits, made.truth.cell_fraction.values, strict=True):
        np.testing.assert_array_equal(visit.region, u >= 0.10)
    xr.testing.assert_equal(made.truth.cell_fraction, mismatched.truth.cell_fraction)


def test_default_visits_are_irregular_and_start_at_day_zero():
    days = [[visit.day for visit in small_patient(seed).patient.visits] for seed in (1, 2)]
    assert days[0][0] == days[1][0] == 0.0
    assert days[0] != days[1]
    assert np.all(np.abs(np.array(days) - [0, 19, 41, 89]) <= 2)


def test_flat_axes_give_flat_patients():
    made = virtual_patient(
        5, Mismatched(), (1, 32, 32), (2.0, 1.5, 1.5), visit_days=(0.0, 10.0), anatomy=Breast(radius=(7.0, 9.0))
    )
    assert made.truth.cell_fraction.shape == (2, 1, 32, 32)
    assert made.patient.visits[0].region.sum() >= 60


def test_priors_name_every_true_parameter(matched):
    assert set(Matched().priors()) == set(matched.parameters)


def test_priors_are_the_distributions_of_the_draws():
    """The draws of growth over seeds, in the coordinate of the prior, are standard normal."""
    made = Matched()
    prior = made.priors()["growth.k"]
    quick = {"shape": (1, 16, 16), "spacing": (2.0, 3.0, 3.0), "visit_days": (0.0,)}
    breast = Breast(radius=(9.0, 10.0), smallest=5)
    values = [virtual_patient(seed, made, anatomy=breast, **quick).parameters["growth.k"] for seed in range(150)]
    scores = (np.log(values) - prior.location) / prior.scale
    assert abs(scores.mean()) < 3 / np.sqrt(150)
    assert 0.8 < scores.std() < 1.2


def test_reference_doses_are_those_of_the_models():
    for drug in Matched().drugs:
        assert REFERENCE_DOSES[drug.agent] == (drug.reference_dose, drug.units)


def test_regimens_hold_their_doses():
    plan = regimens.paclitaxel_carboplatin_ac(start=1.0)
    assert [len(plan.of(a)) for a in ("paclitaxel", "carboplatin", "doxorubicin", "cyclophosphamide")] == [12, 12, 4, 4]
    assert plan.of("doxorubicin")[0].day == 85.0 and plan.of("doxorubicin")[-1].day == 127.0
    assert "carboplatin" not in regimens.weekly_paclitaxel_ac().agents
    turned = regimens.ac_t(start=0.0)
    assert [dose.day for dose in turned.of("doxorubicin")] == [0.0, 14.0, 28.0, 42.0]
    assert turned.of("paclitaxel")[0].day == 56.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "whole number"),
        ({"seed": 1, "visit_days": (0.0, 9.0, 9.0)}, "rising days"),
        ({"seed": 1, "visit_days": (3.0, 9.0)}, "start at 0"),
        ({"seed": 1, "regimen": Schedule.weekly("docetaxel", 1, 2, 75, "mg/m^2")}, "docetaxel"),
        ({"seed": 1, "regimen": Schedule.weekly("paclitaxel", 1, 2, 75, "mg")}, "paclitaxel in mg on"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        small_patient(**arguments)


def test_an_organ_too_small_for_the_tumour_is_refused():
    with pytest.raises(GeometryError, match="no room"):
        virtual_patient(1, shape=(4, 4, 4), spacing=(2.0, 2.0, 2.0), visit_days=(0.0,))


@pytest.mark.slow
def test_the_example_leaves_a_tumour_at_every_visit():
    made = virtual_patient(7)
    assert np.all(made.truth.volume > 0.5)
    assert made.truth.cells[1] < 0.8 * made.truth.cells[0]
