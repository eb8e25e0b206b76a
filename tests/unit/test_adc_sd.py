"""A measured error of the ADC in each voxel: read, written, checked, dropped, and used in place of the assumed one."""

from dataclasses import replace

import numpy as np
import pytest

from biomodel.domain import Domain
from biomodel.errors import InputError
from biomodel.observation import observe
from biomodel.patient import CellularitySettings, Patient, Visit
from biomodel.quality import check
from biomodel.schedule import Schedule
from patient_folders import edit, rewrite

SHAPE = (6, 10, 10)


def make_patient(sd=6e-5):
    region = np.zeros(SHAPE, bool)
    region[2:4, 3:7, 3:7] = True
    rng = np.random.default_rng(0)
    adc = np.where(region, 1.2e-3, 1.8e-3) * rng.normal(1, 0.02, SHAPE)
    errors = np.where(region, sd, np.nan)  # need not be known outside
    visits = tuple(Visit(n, 20.0 * n, adc=adc, region=region, adc_sd=errors) for n in (1, 2, 3))
    return Patient("P1", "breast", Domain.box(SHAPE, (2.0, 2.0, 2.0)), visits, Schedule(),
                   cellularity=CellularitySettings(3e-3, 5e-4))  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    make_patient().write(tmp_path / "P1")
    return tmp_path / "P1"


def test_round_trip_and_until(folder):
    found = Patient.read(folder)
    region = found.visits[1].region
    np.testing.assert_allclose(found.visits[1].adc_sd[region], 6e-5, rtol=1e-6)
    assert len(found.until(2).visits) == 2
    assert found.until(1).fingerprint() != replace(found, visits=(replace(found.visits[0], adc_sd=None),)).fingerprint()
    assert found.without_images().visits[0].adc_sd is None
    assert not [f for f in check(folder) if "adc_sd" in f.message]


def test_it_replaces_the_assumed_noise():
    patient = make_patient()
    visit = patient.visits[0]
    measured, assumed = observe(patient, visit), observe(patient, replace(visit, adc_sd=None))
    np.testing.assert_allclose(measured.sd[visit.region], 6e-5 / 2.5e-3, rtol=1e-9)
    np.testing.assert_allclose(assumed.sd[visit.region], 0.05 * 1.2e-3 / 2.5e-3, rtol=0.05)
    np.testing.assert_array_equal(measured.fraction, assumed.fraction)


def test_lucky_voxels_get_no_larger_weight():
    patient = make_patient()
    visit = patient.visits[0]
    rng = np.random.default_rng(1)
    ragged = 6e-5 * np.sqrt(rng.chisquare(2, SHAPE) / 2)  # as from two degrees of freedom
    sd = observe(patient, replace(visit, adc_sd=np.maximum(ragged, 1e-7))).sd[visit.region]
    assert sd.std() / sd.mean() < 0.25 * ragged.std() / ragged.mean()


@pytest.mark.parametrize("value", [0.0, -1e-5, np.nan, np.inf])
def test_errors_must_be_positive_in_the_region(folder, value):
    def spoil(values):
        values[2, 4, 4] = value
        return values

    rewrite(folder, "visit2_adc_sd.nii.gz", spoil)
    with pytest.raises(InputError, match="visit 2, adc_sd.*1 of 32 voxels of the tumour are not positive"):
        Patient.read(folder)
    found = [f for f in check(folder) if "adc_sd" in f.message]
    assert len(found) == 1 and "visit2_adc_sd.nii.gz" in (found[0].file + found[0].message)


def test_errors_without_a_map(folder):
    edit(folder, lambda data: data["visits"][1].pop("adc"))
    with pytest.raises(InputError, match="visit 2, adc_sd.*there is no 'adc'"):
        Patient.read(folder)


def test_units_are_needed(folder):
    edit(folder, lambda data: data["visits"][1]["adc_sd"].update(units="s"))
    with pytest.raises(InputError, match="visit 2, adc_sd: units 's'"):
        Patient.read(folder)
