"""Cohorts: which patients, how they are split, and whose file an error is in."""

import json

import pytest

from biomodel.cohort import Cohort
from biomodel.errors import InputError, UnitError
from biomodel.patient import Patient


@pytest.fixture
def folder(tmp_path):
    for number in (1, 2, 3):
        Patient.from_volumes(f"P{number}", [0, 21], [10.0 + number, 5.0]).write(tmp_path / f"P{number}")
    write(tmp_path)
    return tmp_path


def write(folder, **changes):
    data = {
        "schema": "tumorcast/cohort/v1",
        "name": "pilot",
        "patients": ["P1", "P2", "P3"],
        "splits": {"train": ["P1", "P3"], "test": ["P2"]},
        **changes,
    }
    (folder / "cohort.json").write_text(json.dumps(data))


def test_reads_patients_in_order(folder):
    cohort = Cohort.read(folder)
    assert (cohort.name, len(cohort)) == ("pilot", 3)
    assert [patient.id for patient in cohort] == ["P1", "P2", "P3"]
    assert [patient.id for patient in Cohort.read(folder / "cohort.json").split("train")] == ["P1", "P3"]
    assert cohort.patient("P2").visits[0].volume == 12.0


def test_folder_without_a_manifest(folder):
    (folder / "cohort.json").unlink()
    (folder / "notes").mkdir()
    cohort = Cohort.read(folder)
    assert cohort.members == ("P1", "P2", "P3") and cohort.name == folder.name and not cohort.splits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patients": ["P1", "./P1"]}, r"patient './P1' is listed twice; expected each once\. Remove one entry"),
        ({"patients": ["P1", "P9"]}, r"cohort\.json: no patient\.json in P9; expected a patient folder"),
        ({"splits": {"train": ["P1"], "test": ["P1"]}}, "in the splits 'train' and 'test'; expected one"),
        ({"splits": {"train": ["P7"]}}, "split 'train' names 'P7', which is not among the patients"),
        ({"patients": []}, r"cohort\.json: patients: found \[\]; expected at least one entry"),
        ({"split": {}}, "unknown field 'split'.*Did you mean 'splits'"),
    ],
)
def test_refused(folder, changes, message):
    write(folder, **changes)
    with pytest.raises(InputError, match=message):
        Cohort.read(folder)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"no cohort\.json and no patient folders"):
        Cohort.read(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        Cohort.read(tmp_path / "cohort.json")


def test_unknown_split_and_patient(folder):
    with pytest.raises(InputError, match="no split 'validation'; it has train, test"):
        Cohort.read(folder).split("validation")
    with pytest.raises(InputError, match="no patient 'P9' among its 3"):
        Cohort.read(folder).patient("P9")


def test_an_error_names_the_patient(folder):
    path = folder / "P2" / "patient.json"
    data = json.loads(path.read_text())
    data["visits"][1]["volume"]["units"] = "mm"
    path.write_text(json.dumps(data))
    with pytest.raises(UnitError, match=r"^P2/patient\.json: visit 2, volume: units 'mm'; expected cm³"):
        list(Cohort.read(folder))
