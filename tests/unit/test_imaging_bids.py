"""NIfTI and sidecars with BIDS names: what comes in is what was written, and gaps in the sidecars are named."""

import json
from datetime import date
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from biomodel.errors import GeometryError, InputError, UnitError
from biomodel.imaging.bids import read_bids, read_series
from biomodel.imaging.bids_write import write_bids
from biomodel.imaging.nifti import read_image
from biomodel.imaging.series import Grid, Kind, Series

SHAPE = (5, 7, 9)
NAME = "sub-01_ses-01"


def grid(flip: bool = False) -> Grid:
    turn = 0.25
    affine = np.array(
        [[np.cos(turn), -np.sin(turn), 0, -3], [np.sin(turn), np.cos(turn), 0, 5], [0, 0, 1, 7], [0, 0, 0, 1]]
    )
    affine[:3, :3] *= [-1.5 if flip else 1.5, 1.25, 4.0]
    return Grid.at(SHAPE, affine)


GRID = grid()


def values(n: int) -> np.ndarray:
    return np.random.default_rng(n).uniform(0, 900, (n, *SHAPE)).astype(np.float32)


def dce(**fields) -> Series:
    known = {"times": [0.0, 10.5, 21.0, 40.0], "flip_angles": 12.0, "tr": 0.0051, "te": 0.0021, "field_strength": 1.5,
             "vendor": "GE", "sequence": "efgre3d", "contrast_agent": "gadoterate", "fat_saturated": False,
             "phase_encoding": "y"}  # fmt: skip
    return Series(Kind.DCE, values(4), GRID, **(known | fields))


def dwi(place: Grid = GRID) -> Series:
    directions = np.array([[0, 0, 0], [0.6, 0.8, 0], [0, -0.6, 0.8], [1, 0, 0]])
    return Series(Kind.DWI, values(4), place, b_values=[0, 50, 800, 800], directions=directions, tr=5.0, te=0.06)


def vfa() -> Series:
    return Series(Kind.VFA, values(3), GRID, flip_angles=[2, 5, 12], tr=0.0054, te=0.002)


def inversion() -> Series:
    return Series(Kind.INVERSION, values(2), GRID, inversion_times=[0.6, 1.2], flip_angles=8.0, tr=0.006, te=0.002)


def b1() -> Series:
    return Series(Kind.B1, values(1) / 450, GRID)


def same(read: Series, written: Series) -> None:
    assert read.kind is written.kind and read.grid.distance(written.grid) < 1e-3
    np.testing.assert_array_equal(read.data, written.data)
    for field in ("times", "b_values", "directions", "flip_angles", "inversion_times"):
        one, two = getattr(read, field), getattr(written, field)
        assert (one is None) == (two is None), field
        if one is not None:
            np.testing.assert_allclose(one, two, atol=1e-6)
    for field in (
        "tr",
        "te",
        "vendor",
        "sequence",
        "contrast_agent",
        "fat_saturated",
        "phase_encoding",
        "field_strength",
    ):
        assert getattr(read, field) == getattr(written, field), field


def change(path: Path, **fields) -> None:
    content = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def refused(folder: Path) -> str:
    intake = read_bids(folder)
    errors = [item for item in intake.findings if item.severity == "error"]
    assert len(errors) == 1 and intake.series == () and errors[0].remedy, [item.message for item in errors]
    return errors[0].message


@pytest.mark.parametrize("make", [dce, dwi, vfa, inversion, b1])
def test_what_is_written_is_read_back(make, tmp_path) -> None:
    series = make()
    files = write_bids(series, tmp_path, NAME)
    assert len(files) == (series.samples if series.kind in (Kind.VFA, Kind.INVERSION) else 1)
    intake = read_bids(tmp_path)
    assert intake.findings == () and intake.dropped == ()
    same(intake.one(series.kind), series)


def test_names(tmp_path) -> None:
    for series in (dce(), dwi(), vfa(), b1()):
        write_bids(series, tmp_path, NAME)
    write_bids(Series(Kind.ANATOMY, values(1), GRID), tmp_path, NAME, suffix="T2w")
    names = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.nii.gz")}
    assert names == {f"perf/{NAME}_DCE.nii.gz", f"dwi/{NAME}_dwi.nii.gz", f"fmap/{NAME}_TB1map.nii.gz",
                     f"anat/{NAME}_T2w.nii.gz", *(f"anat/{NAME}_flip-{k}_VFA.nii.gz" for k in (1, 2, 3))}  # fmt: skip
    assert len(read_bids(tmp_path).series) == 5
    with pytest.raises(InputError, match="suffix missing"):
        write_bids(Series(Kind.ANATOMY, values(1), GRID), tmp_path, NAME)


def test_a_volume_lies_where_the_other_reader_puts_it(tmp_path) -> None:
    series = Series(Kind.ANATOMY, values(1), grid(flip=True))
    (path,) = write_bids(series, tmp_path, NAME, suffix="T1w")
    read, image = read_series(path), read_image(path)
    np.testing.assert_array_equal(read.data[0], image.values)
    np.testing.assert_allclose(read.grid.affine, image.affine, atol=1e-5)
    assert read.grid.spacing == pytest.approx(image.spacing)


@pytest.mark.parametrize("flip", [False, True])
def test_directions_turn_with_the_axes(flip, tmp_path) -> None:
    write_bids(dwi(grid(flip)), tmp_path, NAME)
    read = read_bids(tmp_path).one(Kind.DWI)
    np.testing.assert_allclose(read.directions, dwi().directions, atol=1e-6)
    # FSL: along the first axis of a left-handed image as it is, turned round in a right-handed one.
    rows = np.loadtxt(tmp_path / "dwi" / f"{NAME}_dwi.bvec")
    axes = grid(flip).affine[:3, :3] / np.linalg.norm(grid(flip).affine[:3, :3], axis=0)
    np.testing.assert_allclose(rows[0, 3], (1 if flip else -1) * axes[0, 0], atol=1e-9)


def test_days_go_through_scans(tmp_path) -> None:
    for session, day in (("ses-01", 0.0), ("ses-02", 21.0)):
        write_bids(dce(day=day), tmp_path / session, f"sub-01_{session}")
        write_bids(b1(), tmp_path / session, f"sub-01_{session}")
    days = [(series.kind, series.day) for series in read_bids(tmp_path).series]
    assert days == [(Kind.B1, None), (Kind.DCE, 0.0), (Kind.B1, None), (Kind.DCE, 21.0)]
    assert {series.day for series in read_bids(tmp_path, shift=2.0).of(Kind.DCE)} == {2.0, 23.0}
    assert {series.day for series in read_bids(tmp_path, first_visit=date(1899, 12, 31)).of(Kind.DCE)} == {1.0, 22.0}
    late = read_bids(tmp_path, first_visit=date(1900, 1, 5))
    assert any("before the first visit" in item.message for item in late.findings)
    assert "1900-01-22" in (tmp_path / "ses-02" / "sub-01_ses-02_scans.tsv").read_text()


def test_sidecars_are_inherited(tmp_path) -> None:
    write_bids(vfa(), tmp_path, NAME)
    for path in (tmp_path / "anat").glob("*.json"):
        change(path, RepetitionTimeExcitation=None, EchoTime=None)
    (tmp_path / "VFA.json").write_text(json.dumps({"RepetitionTimeExcitation": 0.007, "EchoTime": 0.003}))
    (tmp_path / "sub-02_VFA.json").write_text(json.dumps({"EchoTime": 0.9}))  # somebody else's
    (tmp_path / "anat" / "sub-01_VFA.json").write_text(json.dumps({"EchoTime": 0.004}))  # nearer: it wins
    read = read_bids(tmp_path).one(Kind.VFA)
    assert (read.tr, read.te) == (0.007, 0.004)


# --- units and times -------------------------------------------------------------------------------------------------


def test_b_values_in_a_stated_unit_are_converted(tmp_path) -> None:
    write_bids(dwi(), tmp_path, NAME)
    folder = tmp_path / "dwi"
    (folder / f"{NAME}_dwi.bval").write_text("0 0.05 0.8 0.8\n")
    assert "largest b-value 0.8" in refused(tmp_path)  # not stated: s/mm², as BIDS has it
    change(folder / f"{NAME}_dwi.json", BValueUnits="ms/um^2")
    np.testing.assert_allclose(read_bids(tmp_path).one(Kind.DWI).b_values, [0, 50, 800, 800])
    change(folder / f"{NAME}_dwi.json", BValueUnits="mm")
    assert "units 'mm'; expected s/mm²" in refused(tmp_path)


def test_b_values_missing_single_or_too_few(tmp_path) -> None:
    write_bids(dwi(), tmp_path, NAME)
    bval = tmp_path / "dwi" / f"{NAME}_dwi.bval"
    bval.write_text("800 800 800 800")
    assert "a single b-value" in refused(tmp_path)
    bval.write_text("0 800 800")
    assert "3 values for 4 samples" in refused(tmp_path)
    bval.write_text("0 b800 800 800")
    assert "expected rows of numbers" in refused(tmp_path)
    bval.unlink()
    assert "b-values missing" in refused(tmp_path)


def test_bvec_files_that_do_not_fit(tmp_path) -> None:
    write_bids(dwi(), tmp_path, NAME)
    bvec = tmp_path / "dwi" / f"{NAME}_dwi.bvec"
    rows = np.loadtxt(bvec)
    np.savetxt(bvec, rows.T)  # one row per volume is read, too
    np.testing.assert_allclose(read_bids(tmp_path).one(Kind.DWI).directions, dwi().directions, atol=1e-6)
    np.savetxt(bvec, rows[:, :3])
    assert "3 × 3 numbers for 4 volumes" in refused(tmp_path)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"FlipAngle": None}, "flip angle missing"),
        ({"RepetitionTimeExcitation": None}, "repetition time missing"),
        ({"RepetitionTimeExcitation": 5.1}, "Convert ms to s|repetition time 5.1"),
        ({"RepetitionTimeExcitation": "5 ms"}, "'5 ms'"),
        ({"FlipAngle": "twelve"}, "'twelve'"),
        ({"VolumeTiming": [0.0, 10.0]}, "VolumeTiming has 2 times for 4 volumes"),
        ({"VolumeTiming": [0.0, 10.0, 5.0, 20.0]}, "times do not rise"),
    ],
)
def test_fields_that_are_missing_or_wrong(fields, words, tmp_path) -> None:
    import re

    write_bids(dce(), tmp_path, NAME)
    change(tmp_path / "perf" / f"{NAME}_DCE.json", **fields)
    assert re.search(words, refused(tmp_path))


def test_times_from_the_header_or_not_at_all(tmp_path) -> None:
    (path,) = write_bids(dce(), tmp_path, NAME)
    sidecar = tmp_path / "perf" / f"{NAME}_DCE.json"
    change(sidecar, VolumeTiming=None, FrameTimesStart=[5.0, 15.0, 25.0, 35.0])
    assert read_series(path).times.tolist() == [0.0, 10.0, 20.0, 30.0]
    change(sidecar, FrameTimesStart=None)
    image = nib.load(path)
    for units, step, times in (("sec", 8.7, [0.0, 8.7, 17.4, 26.1]), ("msec", 500.0, [0.0, 0.5, 1.0, 1.5])):
        image.header["pixdim"][4] = step
        image.header.set_xyzt_units("mm", units)
        nib.save(image, path)
        np.testing.assert_allclose(read_series(path).times, times, rtol=1e-12)
    image.header.set_xyzt_units("mm", "unknown")
    nib.save(image, path)
    with pytest.raises(InputError, match="times of the volumes missing.*VolumeTiming"):
        read_series(path)


def test_the_time_between_volumes_is_no_repetition_time(tmp_path) -> None:
    (path,) = write_bids(dce(times=[0.0, 1.8, 3.6, 5.4]), tmp_path, NAME)
    sidecar = tmp_path / "perf" / f"{NAME}_DCE.json"
    change(sidecar, RepetitionTimeExcitation=None, RepetitionTime=1.8)
    with pytest.raises(UnitError, match="is the time between volumes"):
        read_series(path)
    change(sidecar, RepetitionTime=0.0051)  # as converters write it
    assert read_series(path).tr == 0.0051


def test_b1_maps_say_their_unit(tmp_path) -> None:
    series = b1()
    (path,) = write_bids(series, tmp_path, NAME)
    sidecar = tmp_path / "fmap" / f"{NAME}_TB1map.json"
    image = nib.load(path)
    nib.save(nib.Nifti1Image(image.get_fdata() * 100, image.affine), path)
    for units in ("percent", "%"):
        change(sidecar, Units=units)
        np.testing.assert_allclose(read_series(path).data, series.data, rtol=1e-6)
    change(sidecar, Units=None)
    with pytest.raises(UnitError, match="B1 map: units are missing"):
        read_series(path)


def test_phase_encoding_follows_the_axes(tmp_path) -> None:
    (path,) = write_bids(dce(), tmp_path, NAME)
    image = nib.as_closest_canonical(nib.load(path))
    turned = nib.Nifti1Image(image.get_fdata().transpose(1, 0, 2, 3), image.affine[:, [1, 0, 2, 3]])
    nib.save(turned, path)
    change(tmp_path / "perf" / f"{NAME}_DCE.json", PhaseEncodingAxis=None, PhaseEncodingDirection="i-")
    assert read_series(path).phase_encoding == "y"


# --- files -----------------------------------------------------------------------------------------------------------


def test_flip_angles_of_other_geometry(tmp_path) -> None:
    write_bids(vfa(), tmp_path, NAME)
    path = tmp_path / "anat" / f"{NAME}_flip-2_VFA.nii.gz"
    image = nib.load(path)
    affine = image.affine.copy()
    affine[2, 3] += 2
    nib.save(nib.Nifti1Image(image.get_fdata(), affine), path)
    assert "another geometry" in refused(tmp_path)
    assert next(i for i in read_bids(tmp_path).findings if i.severity == "error").step == "geometry"


def test_flip_angle_missing_in_one_file(tmp_path) -> None:
    write_bids(vfa(), tmp_path, NAME)
    change(tmp_path / "anat" / f"{NAME}_flip-2_VFA.json", FlipAngle=None)
    assert "flip angle missing" in refused(tmp_path)


def test_damaged_files(tmp_path) -> None:
    (path,) = write_bids(dce(), tmp_path, NAME)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert "truncated, damaged or no NIfTI file" in refused(tmp_path)
    path.write_bytes(b"hello")
    assert "truncated, damaged or no NIfTI file" in refused(tmp_path)
    path.write_bytes(content)
    sidecar = tmp_path / "perf" / f"{NAME}_DCE.json"
    sidecar.write_text("{")
    assert "cannot be read as JSON" in refused(tmp_path)
    sidecar.write_text("[]")
    assert "expected an object" in refused(tmp_path)
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3, 2, 2), np.float32), np.eye(4)), path)
    with pytest.raises((GeometryError, InputError)):
        read_series(path)


def test_other_files_and_parts_are_ignored_with_a_note(tmp_path) -> None:
    (path,) = write_bids(dce(), tmp_path, NAME)
    for name in (f"{NAME}_bold.nii.gz", f"{NAME}_part-phase_DCE.nii.gz"):
        (path.parent / name).write_bytes(path.read_bytes())
    intake = read_bids(tmp_path)
    assert len(intake.series) == 1 and "2 NIfTI files with other suffixes" in intake.findings[0].message
    (path.parent / f"{NAME}_DCE.nii").write_bytes(b"")
    assert "there twice" in refused(tmp_path)


def test_folders_and_names_that_do_not_exist(tmp_path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_bids(tmp_path / "none")
    with pytest.raises(InputError, match="no NIfTI file with a known suffix"):
        read_bids(tmp_path)
    with pytest.raises(InputError, match="does not exist"):
        read_series(tmp_path / "a_DCE.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4)), tmp_path / "scan.nii")
    with pytest.raises(InputError, match="suffix 'scan' is not known"):
        read_series(tmp_path / "scan.nii")
    assert read_series(tmp_path / "scan.nii", Kind.ANATOMY).samples == 1


def test_names_in_sidecars_are_not_kept(tmp_path) -> None:
    write_bids(dce(), tmp_path, NAME)
    change(
        tmp_path / "perf" / f"{NAME}_DCE.json", PatientName="Doe^Jane", SeriesDescription="Jane", InstitutionName="X"
    )
    intake = read_bids(tmp_path)
    assert intake.dropped == ("InstitutionName", "PatientName", "SeriesDescription")
    assert "Jane" not in repr(intake) and "Jane" not in repr(vars(intake.series[0]))


def test_scratch_files_hold_the_voxels(tmp_path) -> None:
    write_bids(dce(), tmp_path / "b", NAME)
    read = read_bids(tmp_path / "b", scratch=tmp_path / "s").one(Kind.DCE)
    np.testing.assert_array_equal(read.data, dce().data)
    assert [path.name for path in (tmp_path / "s").iterdir()] == [f"{NAME}_DCE.f32"]
