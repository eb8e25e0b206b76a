"""Patients: what can be made and read, what `until` forgets, and the words of every refusal."""

import copy
import gzip
import json
import pickle
from dataclasses import replace
from datetime import date, timedelta

import nibabel as nib
import numpy as np
import pytest

from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError, OutputError, UnitError
from biomodel.imaging.nifti import read_image, resample, write_image
from biomodel.patient import CellularitySettings, Patient, Visit, VolumeSettings
from biomodel.schedule import Dose, Fraction, Ongoing, Schedule
from patient_folders import edit, rewrite

SETTINGS = CellularitySettings(adc_w=3e-3, adc_min=5e-4)
SHAPE = (6, 8, 10)


def make_domain():
    mask = np.zeros(SHAPE, bool)
    mask[1:5, 1:7, 1:9] = True
    affine = np.diag([0.7, 1.5, 3.0, 1.0])
    affine[:3, 3] = (-100.1, 20.3, -5.0)
    return Domain(mask, (3.0, 1.5, 0.7), affine, {"adipose": mask * 0.25, "fibroglandular": mask * 0.75})


def make_visit(domain, number, day, seed):
    rng = np.random.default_rng(seed)
    region = np.zeros(SHAPE, bool)
    region[2:4, 2:5, 3 : 4 + seed % 4] = True
    adc = np.where(domain.mask, 1.6e-3 - 0.6e-3 * region, 0.0) * rng.normal(1, 0.05, SHAPE)
    return Visit(
        number,
        day,
        adc=adc,
        region=region,
        longest_diameter=3.0 + seed,
        drug_map=np.where(domain.mask, rng.uniform(0.5, 1.5, SHAPE), 0.0),
        acquisition={"vendor": "virtual", "field_strength": 3.0, "institution": "A", "sequence": "SE-EPI"},
    )


def make_patient(visits=3, schedule=None, **changes):
    domain = make_domain()
    days = [0.0, 20.75, 91.0, 150.0]
    fields = {
        "id": "P014",
        "organ": "breast",
        "domain": domain,
        "visits": tuple(make_visit(domain, n + 1, days[n], n + 1) for n in range(visits)),
        "schedule": Schedule.weekly("paclitaxel", 1, 12, 80, "mg/m^2", status="planned")
        if schedule is None
        else schedule,
        "cellularity": SETTINGS,
        "volumes": VolumeSettings(0.15, 0.1),
        "clinical": {
            "age": 51.0,
            "menopausal_state": "post",
            "hr": False,
            "her2": True,
            "subtype": "HER2+",
            "grade": 3,
        },
        "outcome": {"pcr": True, "rcb_class": "0"},
        "baseline": "2024-03-01",
        **changes,
    }
    return Patient(**fields)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients") / "P014"
    make_patient().write(folder)
    return folder


def refusal(folder, kind=InputError):
    with pytest.raises(InputError) as caught:
        Patient.read(folder)
    assert type(caught.value) is kind, caught.value
    message = str(caught.value)
    assert len(message.splitlines()) <= 10 and "Traceback" not in message and "pydantic" not in message
    return message


# --- reading what was written ---------------------------------------------------------------------------------------


def test_round_trip_is_exact(folder):
    patient, found = make_patient(), Patient.read(folder)
    assert found.fingerprint() == patient.fingerprint()
    assert found.schedule == patient.schedule
    assert found.cellularity == patient.cellularity and found.volumes == patient.volumes
    assert dict(found.clinical) == dict(patient.clinical) and dict(found.outcome) == dict(patient.outcome)
    for visit, there in zip(patient.visits, found.visits, strict=True):
        np.testing.assert_array_equal(there.adc, visit.adc)
        np.testing.assert_array_equal(there.region, visit.region)
        assert dict(there.acquisition) == dict(visit.acquisition)
    assert Patient.read(folder / "patient.json").fingerprint() == patient.fingerprint()


def test_written_folder_is_the_same_each_time(folder, tmp_path):
    Patient.read(folder).write(tmp_path / "again")
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_fingerprint_sees_every_part():
    patient = make_patient()
    changed = [
        replace(patient, id="P015"),
        replace(patient, schedule=Schedule()),
        replace(patient, cellularity=CellularitySettings(3e-3, 6e-4)),
        replace(patient, volumes=None),
        replace(patient, clinical={}),
        replace(patient, outcome=None),
        replace(patient, notes=("x",)),
        replace(patient, visits=patient.visits[:2]),
        replace(patient, visits=(*patient.visits[:2], replace(patient.visits[2], adc=patient.visits[2].adc * 1.01))),
        replace(patient, domain=replace(patient.domain, tissues={})),
    ]
    assert len({one.fingerprint() for one in [patient, *changed]}) == len(changed) + 1


def test_all_images_in_another_orientation_give_the_same_patient(folder):
    for path in folder.glob("*.nii.gz"):
        image = nib.load(path)
        # axes (z, x, y), two of them backwards: SRP or so
        orientation = nib.orientations.axcodes2ornt(("S", "L", "P"))
        turn = nib.orientations.ornt_transform(nib.io_orientation(image.affine), orientation)
        nib.save(image.as_reoriented(turn), path)
        assert nib.aff2axcodes(nib.load(path).affine) == ("S", "L", "P")
    found, patient = Patient.read(folder), make_patient()
    np.testing.assert_array_equal(found.domain.mask, patient.domain.mask)
    np.testing.assert_allclose(found.domain.affine, patient.domain.affine, atol=1e-4)
    np.testing.assert_array_equal(found.visits[1].adc, patient.visits[1].adc)


def test_dates_and_days_give_the_same_patient(folder):
    def to_dates(data):
        for entry in (*data["visits"], *data["treatments"]):
            day = entry.pop("day")
            moment = date(2024, 3, 1) + timedelta(days=int(day))
            entry["date"] = moment.isoformat() + ("T18:00" if day % 1 else "")

    edit(folder, to_dates)
    assert Patient.read(folder).fingerprint() == make_patient().fingerprint()
    # without a baseline, the first visit is day 0
    edit(folder, lambda data: data.pop("baseline"))
    found = Patient.read(folder)
    assert found.baseline == "2024-03-01" and [visit.day for visit in found.visits] == [0, 20.75, 91]


def test_units_are_converted_at_the_door(folder):
    rewrite(folder, "visit1_adc.nii.gz", lambda values: values * 1e6)

    def change(data):
        data["visits"][0]["adc"]["units"] = "1e-6 mm^2/s"
        data["visits"][0]["longest_diameter"] = {"value": 0.4, "units": "cm"}
        data["treatments"][0]["dose"] = {"value": 0.08, "units": "g/m^2"}
        data["cellularity"]["cell_radius"] = {"value": 10, "units": "um"}

    edit(folder, change)
    found, patient = Patient.read(folder), make_patient()
    np.testing.assert_allclose(found.visits[0].adc, patient.visits[0].adc, rtol=1e-14)
    assert found.visits[0].longest_diameter == 4.0
    assert found.schedule.doses[0].amount == pytest.approx(80)
    assert found.cellularity.cell_radius_mm == 0.01


def test_adc_may_be_undefined_outside_the_mask(folder):
    image = read_image(folder / "visit1_adc.nii.gz")
    values = np.where(make_domain().mask, image.values, np.nan)
    values[0, 0, 0] = np.inf
    write_image(folder / "visit1_adc.nii.gz", values, image.affine)
    found = Patient.read(folder)
    assert np.isfinite(found.visits[0].adc).all()
    np.testing.assert_array_equal(found.visits[0].adc, make_patient().visits[0].adc)


def test_outcome_beside(folder):
    edit(folder, lambda data: data.pop("outcome"))
    (folder / "outcome.json").write_text('{"schema": "tumorcast/outcome/v1", "pcr": true, "rcb_class": "0"}')
    assert Patient.read(folder).fingerprint() == make_patient().fingerprint()
    edit(folder, lambda data: data.update(outcome={"pcr": False}))
    assert "outcome.json beside it; expected one" in refusal(folder)


def test_visit_without_tumour_and_patient_without_images(tmp_path):
    patient = make_patient()
    last = replace(patient.visits[2], region=None, volume=0.0)
    seen = replace(patient, visits=(*patient.visits[:2], last))
    seen.write(tmp_path / "a")
    assert Patient.read(tmp_path / "a").fingerprint() == seen.fingerprint()
    course = Patient.from_volumes(
        "Q1",
        [0, 21, 84],
        [12.0, float("nan"), 0.0],
        Schedule(ongoing=(Ongoing(3, "drug"),)),
        longest_diameters=[30, 25, 0],
    )
    course.write(tmp_path / "b")
    found = Patient.read(tmp_path / "b")
    assert found.fingerprint() == course.fingerprint()
    assert found.domain.well_mixed and [visit.volume for visit in found.visits] == [12.0, None, 0.0]
    assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["patient.json"]


# --- in memory ------------------------------------------------------------------------------------------------------


def test_arrays_are_own_and_frozen():
    adc = np.full((1, 1, 1), 1e-3)
    visit = Visit(1, 0, adc=adc)
    adc[:] = 9
    assert visit.adc[0, 0, 0] == 1e-3
    with pytest.raises(ValueError, match="read-only"):
        visit.adc[0, 0, 0] = 1
    patient = make_patient()
    with pytest.raises(TypeError):
        patient.clinical["age"] = 3
    with pytest.raises(AttributeError):
        patient.id = "x"


def test_copies_and_pickles():
    patient = make_patient()
    assert copy.deepcopy(patient).fingerprint() == patient.fingerprint()
    back = pickle.loads(pickle.dumps(patient))
    assert back.fingerprint() == patient.fingerprint()
    with pytest.raises(TypeError):
        back.clinical.update(age=3)


def test_from_volumes():
    patient = Patient.from_volumes("Q1", [0, 21], np.array([12.0, 3.0]), cv=0.3, floor=0.02, clinical={"hr": np.True_})
    assert patient.volumes == VolumeSettings(0.3, 0.02)
    assert patient.clinical["hr"] is True
    assert patient.visits[1].volume == 3.0 and patient.schedule == Schedule()
    for days, volumes, message in (
        ([0, 0], [1, 1], "visit 2 is on day 0, the same day as visit 1"),
        ([0, -1], [1, 1], "visit 2 is on day -1, before visit 1"),
        ([0, 1], [1], "2 days, 1 volumes"),
        ([0, 1], [1, -2], r"visit 2, volume: -2 cm³; expected 0 to"),
        ([0, 1], [1, float("inf")], "volume: inf"),
        ([], [], "no visits"),
    ):
        with pytest.raises(InputError, match=message):
            Patient.from_volumes("Q1", days, volumes)


def test_without_images():
    patient = make_patient()
    flat = patient.without_images()
    assert flat.domain.well_mixed and flat.cellularity is None and flat.volumes == patient.volumes
    region = patient.visits[0].region
    assert flat.visits[0].volume == pytest.approx(region.sum() * 3.0 * 1.5 * 0.7 / 1e3)
    assert all(visit.adc is visit.region is visit.drug_map is None for visit in flat.visits)
    assert [visit.day for visit in flat.visits] == [visit.day for visit in patient.visits]
    assert replace(patient, volumes=None).without_images().volumes.floor == pytest.approx(3.15e-3)
    assert patient.without_images(cv=0.4).volumes == VolumeSettings(0.4, 0.1)
    measured = replace(patient, visits=(replace(patient.visits[0], volume=2.0),))
    assert measured.without_images().visits[0].volume == 2.0


def test_replace_schedule_and_shows_itself():
    patient = make_patient()
    other = patient.replace_schedule(Schedule(fractions=(Fraction(3, 2),)))
    assert other.schedule.fractions and not patient.schedule.fractions
    page = replace(patient, id="<b>", notes=("a & b",))._repr_html_()
    assert "&lt;b&gt;" in page and "a &amp; b" in page and "paclitaxel" in page
    assert "visits on days 0, 20.75, 91" in repr(patient)


@pytest.mark.parametrize("number", [0, 4, -1, 1.0, True, "1", None])
def test_visit_that_does_not_exist(number):
    for ask in (make_patient().visit, make_patient().until):
        with pytest.raises(
            InputError, match=r"patient P014: no visit .*; it has 1 \(day 0\), 2 \(day 20.75\), 3 \(day 91\)"
        ):
            ask(number)
    assert make_patient().visit(np.int64(2)).day == 20.75


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"adc_w": 5e-4, "adc_min": 5e-4}, "0 ≤ adc_min < adc_w"),
        ({"adc_w": 3.0, "adc_min": 0.5}, "expected about 3e-3"),
        ({"packing": 1.2}, "packing"),
        ({"cell_radius_mm": 10.0}, r"cell_radius 10 mm; expected 0\.001 to 0\.1"),
        ({"voxel_cv": -0.1}, "voxel_cv"),
        ({"visible_fraction": 0.0}, "visible_fraction"),
        ({"repeatability_cv": float("nan")}, "repeatability_cv is nan"),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(InputError, match=message):
        CellularitySettings(**{"adc_w": 3e-3, "adc_min": 5e-4, **change})


def test_carrying_capacity():
    # a cube of 1 mm holds 0.7405 / (4/3 pi 0.01^3) spheres of 10 um radius
    assert SETTINGS.carrying_capacity(1.0) == pytest.approx(176_781, rel=1e-4)


# --- what until() forgets -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [1, 2])
@pytest.mark.parametrize("given", ["given", "planned"])
def test_until_is_the_same_whether_or_not_later_visits_existed(tmp_path, known, given):
    """No leakage: the record that stopped at the visit and the one that went on give the same patient."""
    plan = Schedule.weekly("paclitaxel", 1, 12, 80, "mg/m^2", status="planned")
    early = plan + Schedule(doses=(Dose(2, "carboplatin", 6, "AUC"),), ongoing=(Ongoing(0, "trastuzumab"),))
    day = [0.0, 20.75][known - 1]
    later = early
    if given == "given":
        later = early.with_doses(Dose(day + 1, "carboplatin", 5, "AUC"), Fraction(day + 3, 2.0), Ongoing(day + 4, "x"))
    stopped = make_patient(known, early.until(day), outcome=None)
    went_on = make_patient(4, later, notes=("progressed at the fourth visit",))
    assert went_on.until(known).fingerprint() == stopped.until(known).fingerprint() == stopped.fingerprint()
    # the same through files, where a later visit is damaged on top
    went_on.write(tmp_path / "went_on")
    stopped.write(tmp_path / "stopped")
    read = Patient.read(tmp_path / "went_on").until(visit=known)
    assert read.fingerprint() == Patient.read(tmp_path / "stopped").fingerprint()
    assert Patient.read(tmp_path / "went_on").until(2).until(known).fingerprint() == read.fingerprint()


def test_until_holds_no_reference_to_what_it_forgot():
    patient = make_patient()
    marked = np.where(patient.domain.mask, 1.2345678901234567e-3, 0.0)
    visits = (*patient.visits[:2], replace(patient.visits[2], adc=marked, longest_diameter=77.125))
    patient = replace(patient, visits=visits, notes=("secret of visit 3",))

    def contents(one):
        parts = [one.domain.mask, one.domain.affine, *one.domain.tissues.values()]
        for visit in one.visits:
            parts += [part for part in (visit.adc, visit.region, visit.drug_map) if part is not None]
            parts += [np.array([visit.day, visit.longest_diameter])]
        bases = [part.base for part in parts if part.base is not None]
        return pickle.dumps(
            (parts, bases, repr(one.schedule), dict(one.clinical), one.outcome, one.notes, one.baseline)
        )

    needles = (np.float64(1.2345678901234567e-3).tobytes(), np.float64(77.125).tobytes(), b"secret")
    assert all(needle in contents(patient) for needle in needles)
    assert not any(needle in contents(patient.until(2)) for needle in needles)


def test_until_keeps_the_whole_grid():
    assert make_patient().until(1).domain.shape == SHAPE
    assert make_patient().until(1).outcome is None


def test_until_of_a_record_that_knows_only_given_doses():
    given = Schedule.weekly("paclitaxel", 0, 12, 80, "mg/m^2")
    known = make_patient(3, given).until(2)
    assert known.schedule == given
    (note,) = known.notes
    assert "9 treatments recorded as given after day 20.75 stay" in note
    # nothing after the visit: nothing to tell
    assert make_patient(3, given).until(3).notes == ()
    assert make_patient(3, Schedule()).until(1).notes == ()
    # visits that were forgotten change nothing in the note
    assert make_patient(2, given).until(2).fingerprint() == make_patient(3, given).until(2).fingerprint()


def test_until_beside_planned_doses():
    """Later given doses go, planned ones stay, and no note tells that something was given later."""
    plan = Schedule.weekly("paclitaxel", 1, 12, 80, "mg/m^2", status="planned")
    given = tuple(Dose(dose.day, dose.agent, dose.amount, dose.units) for dose in plan.doses)
    known = make_patient(3, plan.with_doses(given)).until(2)
    assert known.schedule == plan.with_doses(given[:3])  # days 1, 8 and 15 of both kinds: that is for the check to say
    assert known.notes == ()


def test_a_virtual_patient_stays_virtual():
    made = "Virtual: made for a test."
    patient = make_patient(notes=(made, "progressed at the third visit"))
    assert patient.virtual and patient.until(2).notes == (made,) and patient.until(2).virtual
    assert patient.until(2).without_images().virtual
    assert not make_patient(notes=("A virtual reality headset was worn.",)).virtual
    given = Schedule.weekly("paclitaxel", 0, 12, 80, "mg/m^2")
    first, second = make_patient(3, given, notes=(made,)).until(2).notes
    assert first == made and "stay in the schedule" in second


def test_notes_travel_with_the_folder(tmp_path):
    known = make_patient(3, Schedule.weekly("paclitaxel", 0, 12, 80, "mg/m^2")).until(2)
    known.write(tmp_path / "a")
    assert Patient.read(tmp_path / "a").notes == known.notes


# --- bad input: what, where, found, remedy --------------------------------------------------------------------------


def test_no_such_patient(tmp_path):
    assert "does not exist; expected patient.json" in refusal(tmp_path / "nobody")
    assert "no patient.json in this folder" in refusal(tmp_path)


def test_missing_file(folder):
    (folder / "visit2_adc.nii.gz").unlink()
    message = refusal(folder)
    assert message.startswith("patient.json: visit 2, adc (visit2_adc.nii.gz): file ")
    assert "does not exist; expected a NIfTI file" in message and "Check the name" in message


def test_truncated_file(folder):
    path = folder / "visit2_region.nii.gz"
    path.write_bytes(path.read_bytes()[:-20])
    message = refusal(folder)
    assert message.startswith("patient.json: visit 2, region (visit2_region.nii.gz): ")
    assert "truncated, damaged or no NIfTI file" in message and "Copy or export it again" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "place"), [("adc", "visit2_adc.nii.gz"), ("drug_map", "visit2_drug_map.nii.gz")])
def test_no_numbers_inside_the_mask(folder, value, name, place):
    image = read_image(folder / place)
    image.values[2, 3, 3] = value  # in the region
    image.values[1, 1, 1] = value  # in the mask
    image.values[0, 0, 0] = value  # outside, which is fine
    write_image(folder / place, image.values, image.affine)
    message = refusal(folder)
    assert message.startswith(f"patient.json: visit 2, {name} ({place}): 2 voxels are NaN or infinite inside the mask")
    assert "1 of them in the region" in message or name == "drug_map"
    assert "expected numbers there. Repair the map" in message


def test_wrong_units(folder):
    edit(folder, lambda data: data["visits"][1]["adc"].update(units="1"))
    assert refusal(folder, UnitError) == (
        "patient.json: visit 2, adc: units '1'; expected mm²/s. Set 'units' in the manifest; units are never guessed."
    )


def test_missing_units(folder):
    edit(folder, lambda data: data["visits"][1]["adc"].pop("units"))
    assert refusal(folder, UnitError) == (
        "patient.json: visit 2, adc: units are missing. Set 'units' in the manifest; units are never guessed."
    )
    edit(folder, lambda data: data["visits"][1]["adc"].update(units=" "))
    assert "visit 2, adc: units are missing; expected mm²/s" in refusal(folder, UnitError)


@pytest.mark.parametrize("scale", [1e6, 1e3, 1e-3])
def test_units_that_cannot_be_true(folder, scale):
    rewrite(folder, "visit2_adc.nii.gz", lambda values: values * scale)
    message = refusal(folder, UnitError)
    assert message.startswith("patient.json: visit 2, adc (visit2_adc.nii.gz): typical value ")
    assert "expected about 3e-4 to 3e-3 mm²/s" in message and "never guessed" in message


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda data: data["visits"][1].update(volume={"value": 3, "units": "mm"}), "visit 2, volume: units 'mm'"),
        (
            lambda data: data["visits"][1]["longest_diameter"].update(units="mL"),
            "visit 2, longest_diameter: units 'mL'",
        ),
        (lambda data: data["visits"][1]["drug_map"].update(units="mm"), "visit 2, drug_map: units 'mm'"),
        (lambda data: data["cellularity"]["adc_w"].update(units="s"), "cellularity, adc_w: units 's'"),
        (lambda data: data["volumes"]["floor"].update(units="mm"), "volumes, floor: units 'mm'"),
        (
            lambda data: data["treatments"][2]["dose"].update(units="mm"),
            "treatment 3, dose of paclitaxel on day 15: units 'mm'",
        ),
        (
            lambda data: data["visits"][0]["acquisition"]["field_strength"].update(units="mm"),
            "visit 1, acquisition, field_strength: units 'mm'",
        ),
    ],
)
def test_wrong_units_elsewhere(folder, change, where):
    edit(folder, change)
    message = refusal(folder, UnitError)
    assert message.startswith(f"patient.json: {where}") and "expected" in message and "never guessed" in message


def test_other_grid_and_the_command_that_mends_it(folder):
    image = read_image(folder / "visit2_adc.nii.gz")
    moved = image.affine.copy()
    moved[0, 3] += 0.7
    write_image(folder / "visit2_adc.nii.gz", image.values, moved)
    message = refusal(folder, GeometryError)
    assert message.startswith(
        "patient.json: visit 2, adc (visit2_adc.nii.gz): the same number of voxels as the mask, but up"
    )
    assert "tumorcast resample visit2_adc.nii.gz --like mask.nii.gz --out resampled_visit2_adc.nii.gz" in message
    # what the command does makes the folder readable
    resample(folder / "visit2_adc.nii.gz", folder / "mask.nii.gz", folder / "resampled_visit2_adc.nii.gz")
    edit(folder, lambda data: data["visits"][1]["adc"].update(file="resampled_visit2_adc.nii.gz"))
    Patient.read(folder)


def test_other_size(folder):
    rewrite(folder, "visit2_region.nii.gz", lambda values: values[:, :, :-1])
    message = refusal(folder, GeometryError)
    assert "visit 2, region (visit2_region.nii.gz): 6 × 8 × 9 voxels of 3 × 1.5 × 0.7 mm" in message
    assert "expected 6 × 8 × 10 of 3 × 1.5 × 0.7 mm like the mask" in message and "tumorcast resample" in message


def test_empty_region(folder):
    rewrite(folder, "visit3_region.nii.gz", lambda values: values * 0)
    message = refusal(folder)
    assert message.startswith("patient.json: visit 3, region (visit3_region.nii.gz): the region is empty; expected")
    assert "leave 'region' out and give 'volume'" in message


def test_region_outside_the_mask(folder):
    image = read_image(folder / "visit3_region.nii.gz")
    image.values[0, 0, :3] = 1
    write_image(folder / "visit3_region.nii.gz", image.values, image.affine)
    message = refusal(folder)
    assert message.startswith("patient.json: visit 3, region (visit3_region.nii.gz): 3 of ")
    assert "voxels lie outside the mask; expected none. Enlarge the mask or cut the region." in message


@pytest.mark.parametrize("place", ["visit3_region.nii.gz", "mask.nii.gz"])
def test_masks_hold_zero_and_one(folder, place):
    rewrite(folder, place, lambda values: values * 255)
    message = refusal(folder)
    assert (
        f"({place}): values 255 in" in message and "expected a mask of 0 and 1 alone. Save the wanted label" in message
    )


def test_empty_mask(folder):
    rewrite(folder, "mask.nii.gz", lambda values: values * 0)
    assert refusal(folder).startswith(
        "patient.json: grid, mask (mask.nii.gz): the mask is empty; expected the organ as 1."
    )


def test_tissue_out_of_range(folder):
    rewrite(folder, "tissue_adipose.nii.gz", lambda values: values * 100)
    message = refusal(folder)
    assert message.startswith(
        "patient.json: grid, tissue 'adipose' ranges from 25 to 25 inside the mask; expected fractions"
    )


@pytest.mark.parametrize(("day", "word"), [(20.75, "the same day as"), (3.0, "before")])
def test_visits_out_of_order(folder, day, word):
    edit(folder, lambda data: data["visits"][2].update(day=day))
    message = refusal(folder)
    assert message.startswith(
        f"patient.json: visit 3 is on day {day:g}, {word} visit 2 (day 20.75); expected growing days."
    )
    assert "list the visits in order" in message


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"kind": "chemotherapy", "agent": "paclitaxel", "day": 3, "dose": {"value": -80, "units": "mg/m^2"}},
            "treatment 1, dose of paclitaxel on day 3: amount -80 mg/m^2; expected a positive number. Correct it",
        ),
        (
            {"kind": "chemotherapy", "agent": "paclitaxel", "day": 3, "dose": {"value": 80, "units": "kg/m^2"}},
            "treatment 1, dose of paclitaxel on day 3: amount 8e+07 mg/m^2; expected at most 15000 mg/m^2. Check",
        ),
        (
            {"kind": "radiotherapy", "day": 3, "dose": {"value": -2, "units": "Gy"}},
            "treatment 1, radiotherapy fraction on day 3: dose -2 Gy; expected a positive number. Correct it",
        ),
        (
            {"kind": "radiotherapy", "day": 3, "dose": {"value": 200, "units": "Gy"}},
            "treatment 1, radiotherapy fraction on day 3: dose 200 Gy; expected at most 90 Gy. Give the dose per",
        ),
    ],
)
def test_absurd_doses(folder, entry, message):
    edit(folder, lambda data: data.update(treatments=[entry]))
    assert refusal(folder).startswith(f"patient.json: {message}")


def test_one_agent_in_two_kinds_of_units(folder):
    edit(folder, lambda data: data["treatments"][3]["dose"].update(units="mg"))
    assert "patient.json: schedule: paclitaxel is dosed in" in refusal(folder)


def test_unknown_field(folder):
    edit(folder, lambda data: data["visits"][1].update(longestdiameter=3))
    assert refusal(folder) == (
        "patient.json: visit 2: unknown field 'longestdiameter'; expected day, date, adc, adc_sd, region, volume, "
        "longest_diameter, drug_map, acquisition. Did you mean 'longest_diameter'?"
    )


def test_many_problems_fit_on_a_screen(folder):
    edit(folder, lambda data: data.update({f"field{number}": number for number in range(30)}))
    message = refusal(folder)
    assert message.count("unknown field") == 8 and message.endswith("… and 22 more.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": ', "line 1, column 12"),
        ("", "line 1, column 1"),
        ('{"id": 1, "id": 2}', "field 'id' appears twice"),
        ('{"id": NaN}', "NaN is no JSON number"),
        ("[" * 100_000, "patient.json: "),
        ("[]", "found []; expected an object with 'schema', 'id'"),
    ],
)
def test_damaged_manifest(folder, text, message):
    (folder / "patient.json").write_text(text)
    found = refusal(folder)
    assert found.startswith("patient.json: ") and message in found


def test_manifest_in_another_encoding(folder):
    (folder / "patient.json").write_bytes('{"id": "é"}'.encode("latin-1"))
    assert "is not UTF-8 text" in refusal(folder)
    text = json.dumps(json.loads(gzip.decompress(gzip.compress(b'{"id": "x"}'))))
    (folder / "patient.json").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "field 'schema' is missing" in refusal(folder)


def test_impossible_and_ambiguous_dates(folder):
    edit(folder, lambda data: data.update(baseline="2024-02-31"))
    assert "patient.json: baseline: date '2024-02-31' (day is out of range for month)" in refusal(folder)
    edit(folder, lambda data: data.update(baseline="01.03.2024"))
    assert 'baseline: found "01.03.2024"; expected an ISO date like 2024-03-01' in refusal(folder)

    def mixed(data):
        data.pop("baseline")
        data["visits"][1].pop("day")
        data["visits"][1]["date"] = "2024-03-22"

    edit(folder, mixed)
    assert "visit 2: date '2024-03-22', but the patient has no 'baseline'" in refusal(folder)


def test_images_without_grid_or_settings(folder):
    edit(folder, lambda data: data.pop("cellularity"))
    message = refusal(folder)
    assert (
        "visit 1, adc: the manifest has no 'cellularity'; expected adc_w and adc_min, which have no default" in message
    )
    edit(folder, lambda data: data.pop("grid"))
    assert "visit 1, adc: an image, but the manifest has no 'grid'; expected the mask of the organ" in refusal(folder)


def test_absolute_paths(folder):
    edit(folder, lambda data: data["grid"].update(mask=str(folder / "mask.nii.gz")))
    assert "is an absolute path; expected one relative to the manifest's folder" in refusal(folder)


# --- writing --------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_never_destroyed(folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(OutputError, match="exists already and is left as it is.*overwrite=True") as caught:
        make_patient(1).write(folder)
    assert caught.value.exit_code == 5
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    make_patient(1).write(folder, overwrite=True)
    assert len(Patient.read(folder).visits) == 1
    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.txt").write_text("years of work")
    with pytest.raises(OutputError, match=r"holds no patient\.json, so it is not replaced"):
        make_patient(1).write(other, overwrite=True)
    assert (other / "chapter1.txt").read_text() == "years of work"
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="is a file; expected a folder"):
        make_patient(1).write(tmp_path / "file", overwrite=True)
    empty = tmp_path / "empty"
    empty.mkdir()
    make_patient(1).write(empty)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["P014", "empty", "file", "thesis"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_in_the_middle_leaves_what_was_there(folder, tmp_path, monkeypatch, error, overwrite):
    from biomodel import records

    target = folder if overwrite else tmp_path / "new"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, calls = records.write_image, []

    def failing(path, values, affine):
        calls.append(path)
        if len(calls) == 4:
            raise error
        real(path, values, affine)

    monkeypatch.setattr(records, "write_image", failing)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt) as caught:
        make_patient().write(target, overwrite=overwrite)
    if isinstance(error, OSError):
        assert f"{target}: cannot be written" in str(caught.value) and "The disk is full" in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["P014"]


def test_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written.*choose another output"):
        make_patient(1).write(tmp_path / "file" / "P1")
    with pytest.raises(OutputError, match="cannot be written"):
        make_patient(1).write("/proc/nowhere/P1")


def test_what_cannot_be_read_back_is_not_written(tmp_path):
    with pytest.raises(InputError, match="patient P014: clinical: unknown field 'name'"):
        make_patient(clinical={"name": "x"}).write(tmp_path / "a")
    odd = replace(make_domain(), tissues={"a b": np.zeros(SHAPE)})
    with pytest.raises(InputError, match="tissue 'a b'; expected a name of letters"):
        make_patient(domain=odd).write(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
