"""Series of a study that cannot be quantified, and voxels of them: what is refused, and what is counted."""

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from biomodel.acquisition import GE_15T, SIEMENS_3T, Motion, write_raw
from biomodel.errors import TumorcastError
from biomodel.imaging.voxelfit import Code
from biomodel.quantify.study import Study
from biomodel.quantify.visit import Settings, measure
from biomodel.virtual import small_patient

pytest.importorskip("SimpleITK", reason="needs the extra 'imaging'")
QUICK = Settings(correct_motion=False)


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "S"
    write_raw(small_patient(6), folder, replace(SIEMENS_3T, b1_map=False), visits=[1])
    return folder


@pytest.fixture
def study(raw, tmp_path):
    return shutil.copytree(raw, tmp_path / "S")


def quantified(study, settings=QUICK):
    (visit,) = Study.read(study).visits
    return measure(visit, visit.read(), "breast", settings)


def cut(study, kind, change, **fields):
    """Change the volumes (x, y, z, n) of a series, and fields of its sidecar (by what they were)."""
    (path,) = (study / "ses-01" / kind).glob("*.nii.gz")
    image = nib.load(path)
    nib.save(nib.Nifti1Image(change(np.asarray(image.dataobj)), image.affine), path)
    sidecar(study, kind, **fields)


def sidecar(study, kind, **fields):
    for path in (study / "ses-01" / kind).glob("*.json"):
        data = json.loads(path.read_text())
        for name, value in fields.items():
            data[name] = value(data[name]) if callable(value) else value
        path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))


def refused(study, settings=QUICK):
    with pytest.raises(TumorcastError) as error:
        quantified(study, settings)
    return str(error.value)


def test_no_image_before_the_agent(study):
    cut(study, "perf", lambda data: data[..., 6:], VolumeTiming=lambda times: times[6:])
    assert "baseline" in refused(study)


def test_the_bolus_comes_after_the_last_image(study):
    cut(study, "perf", lambda data: data[..., :5], VolumeTiming=lambda times: times[:5])
    assert "No contrast agent arrives within the series" in refused(study)


def test_a_series_that_ends_too_early(study):
    cut(study, "perf", lambda data: data[..., :12], VolumeTiming=lambda times: times[:12])
    message = refused(study)
    assert message.startswith("visit 1 (ses-01): ") and "late" in message


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("perf", {"FlipAngle": None}, "flip angle missing"),
        ("perf", {"RepetitionTimeExcitation": None}, "repetition time missing"),
        ("perf", {"RepetitionTimeExcitation": 5.0}, "Convert ms to s"),
        ("perf", {"MagneticFieldStrength": None}, "contrast agent 'gadobutrol' at None T"),
        ("anat", {"FlipAngle": None}, "flip angle missing"),
        ("dwi", {"BValueUnits": "ms"}, "b-values: units 'ms'"),
    ],
)
def test_headers_that_lack_what_is_needed(study, kind, fields, message):
    sidecar(study, kind, **fields)
    assert message in refused(study)


@pytest.mark.parametrize(
    ("text", "message"),
    [(None, "b-values missing"), ("800 800 800 800\n", "a single b-value"), ("0 0.1 0.6 0.8\n", "largest b-value 0.8"),
     ("0 100 600\n", "3 values for 4 samples")],
)  # fmt: skip
def test_b_values_that_say_nothing(study, text, message):
    (path,) = (study / "ses-01" / "dwi").glob("*.bval")
    path.unlink() if text is None else path.write_text(text)
    assert message in refused(study)


def test_voxels_without_signal_and_cut_off_ones_are_counted(study):
    """They have no value and a reason, and the rest of the visit has all of it."""
    ceiling = 900

    def spoil(data):
        data = np.minimum(data, ceiling)
        data[10:13, 12:15, 14:17] = 0
        data[16:18, 12:15, 14:17, 3] = -5
        return data.astype(np.int16)

    plain = quantified(study)
    cut(study, "perf", spoil)
    maps = quantified(study)
    place = (slice(14, 17), slice(12, 15))
    for part in (slice(10, 13), slice(16, 18)):
        codes = maps["Ktrans"].code[(*place, part)]
        assert np.isin(codes, (Code.NO_SIGNAL, Code.NOT_FINITE, Code.OUTSIDE)).all(), np.unique(codes)
        assert np.isnan(maps["Ktrans"].values[(*place, part)]).all()
    assert maps["Ktrans"].counts()["no_signal"] > plain["Ktrans"].counts().get("no_signal", 0)
    far = np.ones(maps.grid.shape, bool)
    far[12:19, 10:17, 8:20] = False
    both = far & np.isfinite(plain["T1"].values)
    np.testing.assert_array_equal(maps["T1"].values[both], plain["T1"].values[both])


@pytest.mark.slow
def test_images_at_the_rim_that_motion_took_out_of_view(tmp_path):
    """Averages over directions in DICOM, and samples that show nothing at the rim once motion is corrected."""
    protocol = replace(GE_15T, phases=22, phase_time=24.0, motion=Motion(within=6.0))
    write_raw(small_patient(6), tmp_path / "S", protocol, visits=[1], dicom=True)
    maps = quantified(tmp_path / "S", Settings())
    assert any("Motion in the dynamic series" in note for note in maps.notes)
    before = maps["before"].values
    assert np.isfinite(before).all() and np.isnan(maps["late"].values).any()
    assert maps.region is not None and maps.region.any() and np.isfinite(maps["ADC"].values[maps.region]).all()
