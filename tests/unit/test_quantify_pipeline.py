"""From the folder of a study with raw series to a patient that can be forecast."""

import json
import shutil

import numpy as np
import pytest
import xarray as xr
from scipy import ndimage
from typer.testing import CliRunner

from biomodel.acquisition import SIEMENS_3T, write_raw
from biomodel.cli import app
from biomodel.errors import InputError, UnitError
from biomodel.imaging.registration import Rigid
from biomodel.imaging.transforms import Transform
from biomodel.patient import Patient
from biomodel.quality import check
from biomodel.quantify.displaced import displacement_sd
from biomodel.quantify.pipeline import quantify
from biomodel.quantify.study import Study
from biomodel.quantify.visit import Settings
from biomodel.virtual import small_patient

pytest.importorskip("SimpleITK", reason="needs the extra 'imaging'")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "S"
    write_raw(small_patient(5), folder, SIEMENS_3T, visits=[1, 2])
    return folder


@pytest.fixture(scope="module")
def done(raw):
    return quantify(Study.read(raw), Settings(correct_motion=False), Rigid())


@pytest.fixture
def study(raw, tmp_path):
    return shutil.copytree(raw, tmp_path / "S")


def edit(study, change):
    data = json.loads((study / "study.json").read_text())
    change(data)
    (study / "study.json").write_text(json.dumps(data))


def test_maps_of_the_first_visit_are_near_the_truth(raw, done):
    with xr.open_dataset(raw / "truth" / "visit1.nc", engine="h5netcdf") as truth:
        region = truth["region"].values.astype(bool) & done.visits[0].region
        assert 2 * region.sum() > 0.85 * (truth["region"].values.sum() + done.visits[0].region.sum())
        # Voxel noise averages out; what is left comes from the input's coarse sampling, B1 and registration of DWI.
        for name, true, within in (
            ("T1", "T10", 0.03),
            ("Ktrans", "Ktrans", 0.15),
            ("ve", "ve", 0.1),
            ("ADC", "ADC", 0.05),
        ):
            found, wanted = np.nanmedian(done.visits[0][name].values[region]), np.median(truth[true].values[region])
            assert abs(found / wanted - 1) < within, (name, found, wanted)


def test_a_later_visit_lies_on_the_first(raw, done):
    with xr.open_dataset(raw / "truth" / "visit2.nc", engine="h5netcdf") as truth:
        wanted, organ = truth["T10"].values, done.visits[0].organ
        moved = Transform(done.visits[0].grid, np.reshape(truth.attrs["motion"], (4, 4))).displacement()
    found = done.visits[1]["T1"].values

    def misfit(values):
        return np.nanmean(np.abs(values - wanted)[organ])

    # Fat and gland differ in T1: two voxels beside, in any direction, they would lie on each other.
    for axis in range(3):
        for step in (-2, 2):
            assert misfit(found) < 0.8 * misfit(np.roll(found, step, axis)), (axis, step)
    off = np.linalg.norm(done.registrations[0].displacement() - moved, axis=-1)[organ]
    assert np.sqrt(np.mean(off**2)) < 0.3 * min(done.visits[0].grid.spacing)
    assert done.visits[1].grid.same_as(done.visits[0].grid) and done.registrations[0].visit == 2
    assert abs(done.registrations[0].tumour.after / done.registrations[0].tumour.before - 1) < 0.03


def test_the_preparation_is_stated(done):
    """What was corrected, and what was not and why."""
    for visit in done.visits:
        (shading,) = [note for note in visit.notes if note.startswith("Coil shading from ")]
        low, high = (float(word) for word in shading.split()[3:6:2])
        assert 0.5 < low < 1 < high < 2 and "left as they are" in shading


def test_errors_of_a_later_visit_hold_that_of_its_registration(raw, done):
    """Where the map is steep, errors from noise alone cover too little of the truth."""
    (one,), maps, grid = done.registrations, done.visits[1], done.visits[0].grid
    assert one.spread is not None and any("Repeated 3 times" in note for note in maps.notes)
    with xr.open_dataset(raw / "truth" / "visit2.nc", engine="h5netcdf") as truth:
        wanted = truth["ADC"].values * truth.attrs["adc_factor"]
    values, sd = maps["ADC"].values, maps["ADC"].sd
    own = displacement_sd(values, grid, one.spread)
    noise = np.sqrt(np.maximum(sd**2 - own**2, 0))
    inner = ndimage.binary_erosion(done.visits[0].organ) & np.isfinite(wanted) & np.isfinite(sd)
    steep = inner & (own > np.quantile(own[inner], 0.75))
    off = np.abs(values - wanted)[steep]
    told, untold = ((off < 1.96 * error[steep]).mean() for error in (sd, noise))
    assert told > untold + 0.05 and told > 0.7, (told, untold)
    first = done.visits[0]["ADC"]
    assert "Repeated" not in " ".join(done.visits[0].notes) and np.nanmedian(first.sd) < np.nanmedian(sd[inner])


@pytest.mark.parametrize("repeats", [1, -1])
def test_repeats_that_tell_nothing(raw, repeats):
    with pytest.raises(InputError, match=f"{repeats} repeats; expected 0, or 2 and more"):
        quantify(Study.read(raw), repeats=repeats)


def test_the_patient_can_be_written_read_and_forecast(raw, done, tmp_path):
    done.write(tmp_path / "P", dicom=True)
    assert not [f for f in check(tmp_path / "P") if f.severity == "error"]
    patient = Patient.read(tmp_path / "P")
    assert patient.virtual and len(patient.schedule) == len(small_patient(5).patient.schedule)
    assert patient.visits[0].adc_sd is not None and patient.visits[0].drug_map is not None
    assert patient.visits[0].drug_map[patient.visits[0].region].mean() == pytest.approx(1, abs=0.15)
    page = (tmp_path / "P" / "quantify.html").read_text()
    beside = json.loads((tmp_path / "P" / "maps" / "visit2.json").read_text())["Notes"]
    for words in ("Coil shading from", "Registered to visit 1", "Diffusion series moved onto"):
        assert words in page and any(words in note for note in beside)
    assert (tmp_path / "P" / "maps" / "visit2_Ktrans.json").exists()
    assert (tmp_path / "P" / "registration" / "visit2" / "registration.json").exists()
    assert (tmp_path / "P" / "dicom" / "visit1_regions.dcm").exists()
    # What the later visit brought can be dropped, and the first visit does not know of it.
    assert patient.until(1).visits[0].region.sum() == patient.visits[0].region.sum()


def test_no_later_visit_shapes_the_first(raw, done, tmp_path):
    alone = shutil.copytree(raw, tmp_path / "S")
    edit(alone, lambda data: data.update(visits=data["visits"][:1]))
    first = quantify(Study.read(alone), Settings(correct_motion=False), Rigid()).patient
    one, two = first.visits[0], done.patient.visits[0]
    np.testing.assert_array_equal(one.region, two.region)
    np.testing.assert_array_equal(first.domain.mask, done.patient.domain.mask)
    # A repeated registration agrees to rounding, not bit for bit.
    for name in ("adc", "adc_sd", "drug_map"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-12)


def test_a_folder_that_is_not_there(study):
    edit(study, lambda data: data["visits"][1].update(folder="ses-09"))
    with pytest.raises(InputError, match="visit 2: there is no folder 'ses-09'"):
        quantify(Study.read(study), Settings(correct_motion=False), Rigid())


def test_a_folder_outside_of_the_study(study):
    edit(study, lambda data: data["visits"][0].update(folder="../elsewhere"))
    with pytest.raises(InputError, match=r"study.json: visit 1, folder: '../elsewhere'; expected a folder below"):
        Study.read(study)


def test_settings_without_units(study):
    edit(study, lambda data: data["cellularity"]["adc_w"].pop("units"))
    with pytest.raises(UnitError, match="study.json: cellularity, adc_w: units are missing"):
        Study.read(study)


@pytest.mark.parametrize("kind, message", [("perf", "no dynamic contrast-enhanced series"), ("dwi", "no diffusion"),
                                           ("anat", "no variable-flip-angle series")])  # fmt: skip
def test_a_series_that_is_missing(study, kind, message):
    shutil.rmtree(study / "ses-01" / kind)
    with pytest.raises(InputError, match=f"visit 1 .ses-01.: {message}"):
        quantify(Study.read(study), Settings(correct_motion=False), Rigid())


def test_an_unknown_agent(study):
    (sidecar,) = (study / "ses-01" / "perf").glob("*.json")
    data = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({k: v for k, v in data.items() if not k.startswith("Contrast")}))
    with pytest.raises(InputError, match="contrast agent None at 3.0 T; expected both"):
        quantify(Study.read(study), Settings(correct_motion=False), Rigid())


def test_the_command_leaves_nothing_behind_when_it_fails(study, tmp_path):
    edit(study, lambda data: data["visits"][1].update(folder="ses-09"))
    result = CliRunner().invoke(app, ["quantify", str(study), "--out", str(tmp_path / "P"), "--no-motion"])
    assert result.exit_code != 0 and not (tmp_path / "P").exists()


def test_a_virtual_study_by_the_command(tmp_path):
    result = CliRunner().invoke(app, ["virtual", "--raw", "--small", "--seed", "5", "--out", str(tmp_path / "S")])
    assert result.exit_code == 0, result.output
    assert len(Study.read(tmp_path / "S").visits) == 4 and not list((tmp_path / "S").glob("*region*"))
