"""The quality check: each kind of trouble gives a finding with severity, step, file and remedy, and nothing raises."""

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from biomodel.domain import Domain
from biomodel.imaging.nifti import read_image, write_image
from biomodel.patient import CellularitySettings, Patient, Visit
from biomodel.quality import Finding, Findings, check
from biomodel.schedule import Schedule
from patient_folders import edit, rewrite

SHAPE = (8, 12, 14)


def make_patient(id="P014", seed=0, organ="breast"):
    mask = np.zeros(SHAPE, bool)
    mask[1:7, 1:11, 1:13] = True
    domain = Domain.box(SHAPE, (3.0, 1.5, 1.5), mask, {"adipose": mask * 0.5})
    visits = []
    for number, day in enumerate((0.0, 21.0, 84.0), start=1):
        rng = np.random.default_rng([seed, number])
        region = np.zeros(SHAPE, bool)
        region[2:5, 3:7, 3 : 9 - number] = True
        adc = np.where(mask, 1.7e-3 - 0.6e-3 * region, 0.0) * rng.normal(1, 0.05, SHAPE)
        visits.append(Visit(number, day, adc=adc, region=region))
    return Patient(
        id=id,
        organ=organ,
        domain=domain,
        visits=tuple(visits),
        schedule=Schedule.weekly("paclitaxel", 1, 12, 80, "mg/m^2", status="planned"),
        cellularity=CellularitySettings(adc_w=3e-3, adc_min=5e-4),
        clinical={"age": 51.0, "histology": "ductal"},
    )


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quality") / "P014"
    make_patient().write(folder)
    return folder


def only(folder):
    """The single finding that a single fault must give."""
    found = check(folder)
    assert len(found) == 1, str(found)
    (item,) = found
    assert item.message and item.remedy
    return item


def test_a_good_folder_has_no_findings(folder):
    found = check(folder)
    assert found.ok and len(found) == 0 and found.exit_code == 0
    assert found.summary() == "P014: 1 patient checked; 0 errors, 0 warnings, 0 infos."
    assert check(folder / "patient.json") == found


def test_json_and_table(folder):
    edit(folder, lambda data: data["visits"][1]["adc"].update(units="[red]"))
    found = check(folder)
    assert not found.ok and found.exit_code == 3
    data = json.loads(found.to_json())
    assert data["folder"] == "P014" and data["patients"] == 1 and data["ok"] is False
    assert data["findings"][0] == {
        "severity": "error",
        "step": "geometry",
        "file": "visit2_adc.nii.gz",
        "message": "patient.json: visit 2, adc: units '[red]' (not a known unit); expected mm²/s.",
        "remedy": "Set 'units' in the manifest; units are never guessed.",
    }
    console = Console(width=160, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(found)
    console.file.close()
    text = console.export_text()
    assert "error" in text and "[red]" in text and "units are never guessed" in text


def test_errors_come_first():
    kinds = ("info", "error", "warning", "error")
    found = Findings("x", tuple(Finding(kind, "schema", "f", str(n), "r") for n, kind in enumerate(kinds)))
    assert [item.message for item in found] == ["1", "3", "2", "0"]
    assert found.summary() == "x: 1 patient checked; 2 errors, 1 warning, 1 info."


# --- first step: schema ---------------------------------------------------------------------------------------------


def test_all_problems_of_the_schema_are_listed(folder):
    def change(data):
        data["visits"][0]["unknown"] = 1
        data["clinical"]["grade"] = 9
        del data["id"]

    edit(folder, change)
    found = check(folder)
    assert [(item.severity, item.step, item.file) for item in found] == [("error", "schema", "patient.json")] * 3


def test_damaged_manifest_and_no_manifest(folder, tmp_path):
    (folder / "patient.json").write_text("{")
    assert only(folder).message == (
        "patient.json: line 1, column 2: Expecting property name enclosed in double quotes; expected JSON."
    )
    (tmp_path / "empty").mkdir()
    assert "no cohort.json and no patient folders in it" in only(tmp_path / "empty").message
    nothing = check(tmp_path / "nothing")
    assert not nothing.ok and "does not exist" in str(nothing)


def test_damaged_outcome(folder):
    (folder / "outcome.json").write_text('{"pCR": true}')
    item = only(folder)
    assert (item.step, item.file) == ("schema", "outcome.json") and "unknown field 'pCR'" in item.message


# --- second step: geometry and units --------------------------------------------------------------------------------


def test_every_bad_file_is_told_at_once(folder):
    (folder / "visit1_adc.nii.gz").unlink()
    (folder / "visit2_region.nii.gz").write_bytes(b"x")
    rewrite(folder, "visit3_adc.nii.gz", lambda values: values[:, :, :-1])
    edit(folder, lambda data: data["visits"][2].update(volume={"value": 1, "units": "mm"}))
    found = check(folder)
    assert sorted(item.file for item in found.of("error")) == [
        "patient.json",
        "visit1_adc.nii.gz",
        "visit2_region.nii.gz",
        "visit3_adc.nii.gz",
    ]
    assert {item.step for item in found.of("error")} == {"geometry"}
    (grid,) = [item for item in found if item.file == "visit3_adc.nii.gz"]
    assert "tumorcast resample visit3_adc.nii.gz --like mask.nii.gz" in grid.remedy


def test_damaged_mask_does_not_hide_damaged_scans(folder):
    (folder / "mask.nii.gz").write_bytes(b"x")
    (folder / "visit1_adc.nii.gz").write_bytes(b"x")
    found = check(folder)
    assert {item.file for item in found.of("error")} == {"mask.nii.gz", "visit1_adc.nii.gz"}


def test_region_outside_the_mask_empty_and_nan(folder):
    def outside(values):
        values[0, 0, 0] = 1
        return values

    def hole(values):
        values[3, 4, 4] = np.nan
        return values

    rewrite(folder, "visit1_region.nii.gz", outside)
    rewrite(folder, "visit2_region.nii.gz", lambda values: values * 0)
    rewrite(folder, "visit3_adc.nii.gz", hole)
    found = check(folder).of("error")
    assert len(found) == 3
    text = " ".join(item.message for item in found)
    assert (
        "1 of 61 voxels lie outside the mask" in text and "the region is empty" in text and "1 voxels are NaN" in text
    )


def test_units_that_cannot_be_true(folder):
    rewrite(folder, "visit1_adc.nii.gz", lambda values: values * 1e6)
    (item,) = check(folder).of("error")
    assert (item.step, item.file) == ("geometry", "visit1_adc.nii.gz") and "typical value" in item.message


def test_header_without_units_or_orientation(folder):
    path = folder / "visit1_adc.nii.gz"
    image = nib.load(path)
    image.header.set_xyzt_units("unknown")
    nib.save(image, path)
    item = only(folder)
    assert (item.severity, item.step) == ("warning", "geometry") and "unit of length" in item.message
    image.header.set_xyzt_units("mm")
    image.header["sform_code"] = image.header["qform_code"] = 0
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), None, image.header), path)
    found = check(folder)
    assert any("does not say how the image lies" in item.message for item in found)


# --- third step: plausibility ---------------------------------------------------------------------------------------


def plausible(item, severity, file, *words):
    assert (item.severity, item.step, item.file) == (severity, "plausibility", file)
    assert all(word in item.message for word in words), item.message


def test_visit_order(folder):
    edit(folder, lambda data: data["visits"][2].update(day=3))
    plausible(only(folder), "error", "patient.json", "visit 3 is on day 3, before visit 2")


def test_doses(folder):
    def change(data):
        data["treatments"][3]["dose"]["value"] = -80
        data["treatments"][5]["dose"]["value"] = 80_000
        data["treatments"][7]["dose"]["value"] = 500

    edit(folder, change)
    found = check(folder)
    assert [item.severity for item in found] == ["error", "error", "warning"]
    plausible(found.items[0], "error", "patient.json", "treatment 4, dose of paclitaxel on day 22: amount -80")
    plausible(found.items[1], "error", "patient.json", "treatment 6", "at most 15000")
    plausible(found.items[2], "warning", "patient.json", "Doses of paclitaxel range from 80 to 500 mg/m^2")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"agent": "paclitaxel", "day": 8}, "2 doses of paclitaxel on day 8"),
        ({"agent": "Paclitaxel", "day": 9}, "'Paclitaxel' and 'paclitaxel' are treated as two agents"),
        ({"agent": "paclitaxel", "day": 3000}, "Treatments from day 1 to 3000, visits from 0 to 84"),
    ],
)
def test_odd_treatments(folder, entry, words):
    whole = {"kind": "chemotherapy", "dose": {"value": 80, "units": "mg/m^2"}, "status": "planned", **entry}
    edit(folder, lambda data: data["treatments"].append(whole))
    plausible(only(folder), "warning", "patient.json", words)


def test_fractions(folder):
    fraction = {"kind": "radiotherapy", "day": 90, "dose": {"value": 60, "units": "Gy"}}
    edit(folder, lambda data: data["treatments"].extend([fraction, fraction]))
    found = check(folder)
    assert len(found) == 2
    plausible(found.items[0], "warning", "patient.json", "2 radiotherapy fractions at the same hour of day 90")
    plausible(found.items[1], "warning", "patient.json", "fraction of 60 Gy")


def treatment(day, status, kind="chemotherapy", **more):
    dose = {"value": 2, "units": "Gy"} if kind == "radiotherapy" else {"value": 80, "units": "mg/m^2"}
    return {"kind": kind, "day": day, "dose": dose, "status": status, **more}


def test_planned_and_then_given_counts_twice(folder):
    # the plan: paclitaxel on days 1, 8, 15, ...; a smaller dose and one a day late are the same doses all the same
    late = [treatment(1, "given"), treatment(9, "given"), treatment(15.6, "given")]
    late = [{**entry, "agent": "paclitaxel"} for entry in late]
    late[2]["dose"] = {"value": 60, "units": "mg/m^2"}
    edit(folder, lambda data: data["treatments"].extend(late))
    item = only(folder)
    plausible(item, "warning", "patient.json", "paclitaxel is entered both as planned and as given")
    assert "3 times, first planned on day 1 and given on day 1." in item.message
    assert "Keep one entry of each" in item.remedy


@pytest.mark.parametrize(("given", "count"), [(range(20), 0), ((0, 1, 2), 0), ((22.2,), 1), ((20, 21, 26), 3)])
def test_daily_treatment_given_until_now_and_planned_from_tomorrow(folder, given, count):
    fractions = [treatment(day, "planned", "radiotherapy") for day in range(20, 40)]
    fractions += [treatment(day, "given", "radiotherapy") for day in given]
    edit(folder, lambda data: data["treatments"].extend(fractions))
    found = check(folder)
    assert len(found) == bool(count), str(found)
    if count:
        plausible(found.items[0], "warning", "patient.json", "radiotherapy is entered both as planned and as given")
        assert f": {count} time" in found.items[0].message


def test_nothing_marked_planned(folder):
    edit(folder, lambda data: [entry.update(status="given") for entry in data["treatments"]])
    plausible(only(folder), "info", "patient.json", "No treatment is marked planned")


def test_adc_range(folder):
    rewrite(folder, "visit1_adc.nii.gz", lambda values: values * 0.3)
    found = check(folder)
    plausible(found.items[0], "warning", "visit1_adc.nii.gz", "median 0.000328", "tumours have about")
    plausible(found.items[1], "warning", "visit1_adc.nii.gz", "under adc_min (0.0005 mm²/s)")


def test_adc_above_water_and_below_zero(folder):
    def change(values):
        values[2, 3:7, 3:8] = 3.5e-3
        values[3, 3, 3:8] = -1e-4
        return values

    rewrite(folder, "visit1_adc.nii.gz", change)
    text = str(check(folder))
    assert "33% of the region's voxels exceed adc_w (0.003 mm²/s), free water" in text
    assert "8% of the voxels in the region are 0 or negative" in text


def test_regions_that_do_not_overlap(folder):
    rewrite(folder, "visit3_region.nii.gz", lambda values: np.roll(values, 4, axis=1))
    items = [item for item in check(folder) if "overlap" in item.message]
    plausible(items[0], "warning", "visit3_region.nii.gz", "The regions of visits 2 and 3 do not overlap")
    rewrite(folder, "visit3_region.nii.gz", lambda values: np.roll(values, -1, axis=1))
    items = [item for item in check(folder) if "overlap" in item.message]
    plausible(items[0], "warning", "visit3_region.nii.gz", "overlap in only 25% of the smaller")


def test_sizes_that_disagree(folder):
    def change(data):
        data["visits"][0]["volume"] = {"value": 12, "units": "cm^3"}
        data["visits"][1]["longest_diameter"] = {"value": 200, "units": "mm"}
        data["visits"][2]["volume"] = {"value": 0, "units": "cm^3"}

    edit(folder, change)
    text = str(check(folder))
    assert "visit 1: volume 12 cm³, but the region holds 0.405 cm³" in text
    assert "visit 2: longest diameter 200 mm, but the region's box is 9 × 6 × 6 mm" in text
    assert "visit 3: volume 0, but the region holds" in text


def test_tiny_and_huge_regions(folder):
    def tiny(values):
        keep = np.zeros_like(values)
        keep[3, 4, 3:6] = 1
        return keep

    mask = make_patient().domain.mask
    rewrite(folder, "visit1_region.nii.gz", tiny)
    rewrite(folder, "visit2_region.nii.gz", lambda values: mask * 1.0)
    text = str(check(folder))
    assert "only 3 voxels" in text and "fills 100% of the mask" in text


def test_grid(folder):
    for path in folder.glob("*.nii.gz"):
        image = read_image(path)
        affine = image.affine.copy()
        affine[:3, :3] *= 10
        values = np.ones(SHAPE) if path.name == "mask.nii.gz" else image.values
        write_image(path, values + 0.3 if path.name.startswith("tissue") else values, affine)
    text = str(check(folder))
    assert "voxels of 30 × 15 × 15 mm (z, y, x) are unusual" in text and "the mask fills the whole grid" in text


def test_tissues_that_add_up_to_too_much(folder):
    shutil.copy(folder / "tissue_adipose.nii.gz", folder / "b.nii.gz")
    shutil.copy(folder / "tissue_adipose.nii.gz", folder / "c.nii.gz")
    edit(folder, lambda data: data["grid"]["tissues"].update(glandular="b.nii.gz", other="c.nii.gz"))
    plausible(only(folder), "warning", "mask.nii.gz", "add up to as much as 1.50")


def test_course(folder):
    def change(data):
        data["visits"] = data["visits"][:1] + [{"day": 2000}, {"day": 2100, "adc": data["visits"][1]["adc"]}]
        data["treatments"] = []

    edit(folder, change)
    text = str(check(folder))
    assert "visit 2: nothing was measured" in text and "visit 3: an ADC map without a region" in text
    assert "Visits 1 and 2 lie 2000 days apart" in text
    edit(folder, lambda data: data.update(visits=data["visits"][:1]))
    plausible(only(folder), "info", "patient.json", "Only one visit")


def test_volume_in_other_units(tmp_path):
    Patient.from_volumes("P1", [0, 21], [12.0, 9_000.0]).write(tmp_path / "P1")
    plausible(only(tmp_path / "P1"), "warning", "patient.json", "changes from 12 to 9e+03 cm³ between visits 1 and 2")


def test_duplicated_scans(folder):
    shutil.copy(folder / "visit1_adc.nii.gz", folder / "visit2_adc.nii.gz")
    shutil.copy(folder / "visit1_region.nii.gz", folder / "visit2_region.nii.gz")
    found = check(folder)
    assert len(found) == 2
    plausible(found.items[0], "error", "visit2_adc.nii.gz", "visit 2 and visit 1 hold the same ADC map")
    plausible(found.items[1], "warning", "visit2_region.nii.gz", "Visit 2 and visit 1 have the same region")


def test_duplicated_patients(tmp_path):
    make_patient("P1").write(tmp_path / "a")
    make_patient("P2").write(tmp_path / "b")  # the same scans under another name
    make_patient("p1", seed=1).write(tmp_path / "c")  # the same name
    make_patient("P4", seed=2).write(tmp_path / "d")
    Patient.from_volumes("P5", [0, 21], [3.0, 2.0]).write(tmp_path / "e")
    Patient.from_volumes("P6", [0, 21], [3.0, 2.0]).write(tmp_path / "f")
    found = check(tmp_path)
    assert found.patients == 6
    text = str(found)
    assert text.count("hold the same ADC map") == 3 and "visit 1 of b and visit 1 of a" in text
    assert "c and a have the same id 'p1'" in text and "f and e have the same days and volumes" in text
    assert {item.file for item in found} == {"b/patient.json", "c/patient.json", "f/patient.json"}


def test_cohort_with_shared_splits(tmp_path):
    make_patient("P1").write(tmp_path / "a")
    (tmp_path / "cohort.json").write_text(
        json.dumps(
            {
                "schema": "tumorcast/cohort/v1",
                "name": "c",
                "patients": ["a"],
                "splits": {"train": ["a"], "test": ["a"]},
            }
        )
    )
    item = only(tmp_path)
    assert (item.severity, item.file) == ("error", "cohort.json") and "in the splits 'train' and 'test'" in item.message


# --- identifying information ----------------------------------------------------------------------------------------


def identifying(item, severity, file, words):
    assert (item.severity, item.step, item.file) == (severity, "identification", file)
    assert words in item.message, item.message


@pytest.mark.parametrize("id", ["Doe^Jane", "Jane Doe", "Doe, Jane", "00123456789"])
def test_id_that_names_a_person(folder, id):
    edit(folder, lambda data: data.update(id=id))
    item = only(folder)
    identifying(item, "warning", "patient.json", "the text of 'id' looks like")
    assert id not in item.message


@pytest.mark.parametrize(
    "note", ["patient born in May", "born 1970-05-03", "3.5.1970", "accession 12", "see 12345678", "Doe^Jane"]
)
def test_notes_that_name_a_person(folder, note):
    edit(folder, lambda data: data.update(notes=[note]))
    item = only(folder)
    identifying(item, "warning", "patient.json", "the text of 'notes 1' looks like")
    assert note not in item.message


def test_ordinary_texts_name_nobody(folder):
    def change(data):
        data["notes"] = ["drawn by two readers at 3 T, b = 0, 100, 600 and 800 s/mm2"]
        data["clinical"].update(histology="Invasive Ductal", subtype="HR+/HER2-", arm="Paclitaxel + Carboplatin")
        data["visits"][0]["acquisition"] = {"institution": "General Hospital", "sequence": "SE-EPI 6/800"}

    edit(folder, change)
    assert len(check(folder)) == 0


@pytest.mark.parametrize("field", ["patient_name", "birth_date", "accession_number", "mrn"])
def test_fields_for_personal_data(folder, field):
    edit(folder, lambda data: data["clinical"].update({field: "x"}))
    found = check(folder)
    assert not found.ok
    identifying(
        found.of("warning")[0], "warning", "patient.json", f"field 'clinical, {field}' is meant for personal data"
    )


def test_dates_and_ages(folder):
    edit(folder, lambda data: data.update(baseline="2024-03-01"))
    identifying(only(folder), "info", "patient.json", "real dates")
    edit(folder, lambda data: data.update(notes=["Virtual: made up."]))
    assert check(folder).items == ()
    edit(folder, lambda data: data.pop("notes"))
    edit(folder, lambda data: (data.pop("baseline"), data["clinical"].update(age=93)))
    identifying(only(folder), "warning", "patient.json", "age above 89")


@pytest.mark.parametrize(
    ("field", "text", "severity"),
    [
        ("descrip", b"Doe^Jane", "warning"),
        ("aux_file", b"19700503", "warning"),
        ("intent_name", b"Jane Doe", "warning"),
        ("db_name", b"1234567", "warning"),
        ("descrip", b"left side", "info"),
    ],
)
def test_header_texts(folder, field, text, severity):
    path = folder / "visit1_adc.nii.gz"
    image = nib.load(path)
    image.header[field] = text
    nib.save(image, path)
    item = only(folder)
    identifying(item, severity, "visit1_adc.nii.gz", f"header field '{field}'")
    assert text.decode() not in item.message


def test_texts_of_programs_and_extensions(folder):
    path = folder / "visit1_adc.nii.gz"
    image = nib.load(path)
    image.header["descrip"] = b"FSL6.0"
    nib.save(image, path)
    assert len(check(folder)) == 0
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"a comment"))
    nib.save(image, path)
    identifying(only(folder), "warning", "visit1_adc.nii.gz", "the header carries an extension of kind 6")


def test_other_files(folder):
    (folder / "raw.dcm").write_bytes(b"x")
    (folder / "sub").mkdir()
    (folder / "sub" / "IM1").write_bytes(b"\0" * 128 + b"DICM" + b"x")
    (folder / "scan_19700503.txt").write_text("x")
    found = check(folder)
    assert {(item.severity, item.file) for item in found} == {
        ("warning", "raw.dcm"),
        ("warning", "sub/IM1"),
        ("warning", "scan_19700503.txt"),
    }


def test_faces(tmp_path):
    patient = make_patient(organ="brain")
    patient.write(tmp_path / "covered")
    assert len(check(tmp_path / "covered")) == 0
    bright = replace(patient.visits[1], adc=np.where(patient.domain.mask, patient.visits[1].adc, 1e-3))
    replace(patient, visits=(patient.visits[0], bright, patient.visits[2])).write(tmp_path / "face")
    identifying(only(tmp_path / "face"), "warning", "visit2_adc.nii.gz", "the face may be recognisable")


def test_nothing_raises_whatever_the_bytes(folder):
    """Files cut or overwritten at random places give findings, never an exception."""
    rng = np.random.default_rng(5)
    originals = {path: path.read_bytes() for path in sorted(folder.iterdir())}
    for path, content in originals.items():
        for _ in range(6):
            damaged = bytearray(content)
            if rng.random() < 0.5:
                damaged = damaged[: rng.integers(len(damaged))]
            else:
                for place in rng.integers(len(damaged), size=4):
                    damaged[place] = rng.integers(256)
            path.write_bytes(damaged)
            check(folder).to_json()
        path.write_bytes(content)
    assert len(check(folder)) == 0
