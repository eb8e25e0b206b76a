"""DICOM folders: what comes in is what was written, at the place that SimpleITK tells, and bad folders are refused."""

import json
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from biomodel.errors import InputError, OutputError
from biomodel.imaging.dicom import read_dicom
from biomodel.imaging.dicom_write import write_dicom
from biomodel.imaging.series import Grid, Intake, Kind, Series

pydicom = pytest.importorskip("pydicom")

SHAPE = (5, 7, 9)
START = date(1900, 1, 1)


def oblique(flip: bool = False) -> Grid:
    turn, tilt = 0.3, 0.2
    first = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    second = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    affine = np.eye(4)
    affine[:3, :3] = first @ second @ np.diag([-1.5 if flip else 1.5, 1.2, 4.0])
    affine[:3, 3] = [-10.0, 20.0, -33.0]
    return Grid.at(SHAPE, affine)


GRID = oblique()


def whole(n: int, seed: int = 0) -> np.ndarray:
    """Whole numbers, which are kept exactly."""
    return np.random.default_rng(seed).integers(0, 4000, (n, *SHAPE)).astype(np.float32)


def dce(n: int = 4, grid: Grid = GRID, **fields) -> Series:
    known = {"times": np.array([0.0, 10.5, 21.0, 31.25, 50.0])[:n], "flip_angles": 10.0, "tr": 0.005, "te": 0.0023,
             "field_strength": 3.0, "vendor": "Siemens", "sequence": "fl3d", "contrast_agent": "gadobutrol",
             "fat_saturated": True, "phase_encoding": "y", "day": 21.0}  # fmt: skip
    return Series(Kind.DCE, whole(n), grid, **(known | fields))


def dwi() -> Series:
    directions = np.array([[0, 0, 0], [0.6, 0.8, 0], [0, -0.6, 0.8], [1, 0, 0], [0, 0, 0]])
    return Series(Kind.DWI, whole(5), GRID, b_values=[0, 800, 800, 100, 1000], directions=directions, tr=5.0, te=0.06)


def vfa() -> Series:
    return Series(Kind.VFA, whole(3), GRID, flip_angles=[2, 5, 12], tr=0.0054, te=0.002, sequence="fl3d")


def inversion() -> Series:
    return Series(Kind.INVERSION, whole(2), GRID, inversion_times=[0.6, 1.2], flip_angles=8, tr=0.006, te=0.002)


def edit(folder: Path, change: Callable[[pydicom.Dataset], None], pattern: str = "*.dcm") -> None:
    for path in sorted(folder.glob(pattern)):
        header = pydicom.dcmread(path)
        change(header)
        header.save_as(path)


def refused(folder: Path) -> str:
    """The one error of a folder that gives no series."""
    intake = read_dicom(folder)
    errors = [item for item in intake.findings if item.severity == "error"]
    assert len(errors) == 1 and intake.series == (), [item.message for item in intake.findings]
    assert errors[0].remedy
    return errors[0].message


def same(read: Series, written: Series) -> None:
    assert read.kind is written.kind and read.grid.distance(written.grid) < 1e-3
    np.testing.assert_array_equal(read.data, written.data)
    for field in ("times", "b_values", "directions", "inversion_times"):
        one, two = getattr(read, field), getattr(written, field)
        assert (one is None) == (two is None), field
        if one is not None:
            np.testing.assert_allclose(one, two, atol=1e-6)
    for field in ("vendor", "sequence", "contrast_agent", "fat_saturated", "phase_encoding", "field_strength"):
        assert getattr(read, field) == getattr(written, field), field
    assert read.tr == pytest.approx(written.tr, rel=1e-9) and read.te == pytest.approx(written.te, rel=1e-9)


@pytest.mark.parametrize("make", [dce, dwi, vfa, inversion])
def test_what_is_written_is_read_back(make, tmp_path) -> None:
    series = make()
    write_dicom(series, tmp_path / "a")
    intake = read_dicom(tmp_path / "a", first_visit=START)
    assert [item.severity for item in intake.findings] == ["info"]  # what was not kept
    read = intake.one(series.kind)
    same(read, series)
    assert read.day == (series.day or 0.0) and read.name == "series 1"
    assert read.ceiling.tolist() == [65535.0] * series.samples


def test_values_that_are_not_whole_numbers_keep_their_scale(tmp_path) -> None:
    data = np.random.default_rng(1).uniform(-3.7, 812.3, (4, *SHAPE)).astype(np.float32)
    series = Series(Kind.DCE, data, GRID, times=np.arange(4.0), flip_angles=10, tr=0.005)
    write_dicom(series, tmp_path / "a")
    read = read_dicom(tmp_path / "a").one(Kind.DCE)
    np.testing.assert_allclose(read.data, data, atol=816 / 65535)


def test_a_left_handed_grid_and_any_order_of_files(tmp_path) -> None:
    series = dce(grid=oblique(flip=True))
    write_dicom(series, tmp_path / "a")
    for number, path in enumerate(np.random.default_rng(2).permutation(sorted((tmp_path / "a").iterdir()))):
        Path(path).rename(tmp_path / "a" / f"x{number:03d}")
    read = read_dicom(tmp_path / "a").one(Kind.DCE)
    assert (np.diag(read.grid.affine)[:3] > 0).all()  # RAS+: x was written to the left
    np.testing.assert_array_equal(read.data[..., ::-1], series.data)


@pytest.mark.parametrize("orientation", ["axial", "sagittal", "coronal"])
def test_geometry_is_that_of_simpleitk(orientation, tmp_path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    axes = {"axial": (0, 1, 2), "sagittal": (1, 2, 0), "coronal": (0, 2, 1)}[orientation]
    series = dce(3)
    write_dicom(series, tmp_path / "a")
    cosines = (GRID.affine[:3, :3] / np.linalg.norm(GRID.affine[:3, :3], axis=0)) * [[-1], [-1], [1]]

    def turn(header: pydicom.Dataset) -> None:
        k = int(header.InstanceNumber - 1) % SHAPE[0]
        header.ImageOrientationPatient = [float(v) for v in (*cosines[:, axes[0]], *cosines[:, axes[1]])]
        header.ImagePositionPatient = [float(v) for v in np.array([10.0, -20.0, 5.0]) + 4.0 * k * cosines[:, axes[2]]]

    edit(tmp_path / "a", turn)
    read = read_dicom(tmp_path / "a").one(Kind.DCE)
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "a"))
    rng = np.random.default_rng(3)
    for sample in range(3):
        mine = [name for name in files if pydicom.dcmread(name).TemporalPositionIdentifier == sample + 1]
        image = sitk.ReadImage(mine)
        for _ in range(20):
            x, y, z = (int(rng.integers(0, count)) for count in read.grid.shape[::-1])
            place = read.grid.affine @ [x, y, z, 1]
            index = image.TransformPhysicalPointToIndex([float(-place[0]), float(-place[1]), float(place[2])])
            back = np.array(image.TransformIndexToPhysicalPoint(index)) * [-1, -1, 1]
            np.testing.assert_allclose(back, place[:3], atol=1e-3)
            assert image.GetPixel(index) == read.data[sample, z, y, x]


@pytest.mark.parametrize("name", ["MR1/15820", "MR1/4919", "MR2/15970", "MR2/4950", "MR2/6273"])
def test_real_slices_lie_where_simpleitk_says(name, tmp_path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    from pydicom.data import get_testdata_file

    source = Path(get_testdata_file("DICOMDIR")).parent / "98892003" / name
    (tmp_path / "one").write_bytes(source.read_bytes())
    (series,) = read_dicom(tmp_path).series
    image = sitk.ReadImage(str(source))
    for index in np.ndindex(16, 16, 1):
        place = np.array([*image.TransformIndexToPhysicalPoint(index), 1.0]) * [-1, -1, 1, 1]
        at = np.linalg.solve(series.grid.affine, place)[:3]
        x, y, z = np.rint(at).astype(int)
        np.testing.assert_allclose(at, [x, y, z], atol=1e-3)
        assert series.data[0, z, y, x] == image.GetPixel(index)


@pytest.mark.parametrize("name", ["MR_small_RLE.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"])
def test_transfer_syntaxes(name, tmp_path) -> None:
    from pydicom.data import get_testdata_file

    (tmp_path / "one").write_bytes(Path(get_testdata_file(name)).read_bytes())
    (series,) = read_dicom(tmp_path).series
    plain = pydicom.dcmread(get_testdata_file("MR_small.dcm")).pixel_array
    np.testing.assert_array_equal(np.sort(series.data.ravel()), np.sort(plain.ravel()))


def test_compression_that_cannot_be_read_is_named(tmp_path, monkeypatch) -> None:
    def undecodable(*_: object, **__: object) -> None:
        raise RuntimeError("Unable to decompress the pixel data: all plugins are missing dependencies")

    write_dicom(dce(), tmp_path / "a")
    monkeypatch.setattr("pydicom.pixels.iter_pixels", undecodable)
    assert "compressed in a way that cannot be read" in refused(tmp_path / "a")


# --- multi-frame -----------------------------------------------------------------------------------------------------


def enhanced(series: Series, path: Path) -> None:
    """An Enhanced MR file as the standard describes it, frames in a shuffled order."""
    folder = path.parent / "classic"
    write_dicom(series, folder)
    slices = [pydicom.dcmread(name) for name in sorted(folder.glob("*.dcm"))]
    order = np.random.default_rng(4).permutation(len(slices))
    first = slices[0]
    out = pydicom.Dataset()
    out.file_meta = first.file_meta
    out.file_meta.MediaStorageSOPClassUID = out.SOPClassUID = pydicom.uid.EnhancedMRImageStorage
    for name in ("SOPInstanceUID", "SeriesInstanceUID", "StudyInstanceUID", "Manufacturer", "SeriesNumber", "Rows",
                 "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel",
                 "PhotometricInterpretation", "PatientName", "StudyDate", "MagneticFieldStrength"):  # fmt: skip
        if name in first:
            setattr(out, name, getattr(first, name))
    out.NumberOfFrames, out.Modality = len(slices), "MR"
    out.PixelData = b"".join(slices[int(at)].PixelData for at in order)
    out["PixelData"].VR = "OW"

    def macro(target: pydicom.Dataset, sequence: str, **values) -> None:
        item = pydicom.Dataset()
        for name, value in values.items():
            setattr(item, name, value)
        setattr(target, sequence, [item])

    shared = pydicom.Dataset()
    macro(shared, "PixelMeasuresSequence", PixelSpacing=first.PixelSpacing, SliceThickness=first.SliceThickness)
    macro(shared, "PlaneOrientationSequence", ImageOrientationPatient=first.ImageOrientationPatient)
    macro(shared, "PixelValueTransformationSequence", RescaleSlope=2, RescaleIntercept=1, RescaleType="US")
    macro(shared, "MRFOVGeometrySequence", InPlanePhaseEncodingDirection="COLUMN")
    macro(shared, "MREchoSequence", EffectiveEchoTime=2.3)
    out.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for at in order:
        one, frame = slices[int(at)], pydicom.Dataset()
        macro(frame, "PlanePositionSequence", ImagePositionPatient=one.ImagePositionPatient)
        macro(frame, "MRTimingAndRelatedParametersSequence", RepetitionTime=one.RepetitionTime,
              FlipAngle=one.get("FlipAngle", 90))  # fmt: skip
        content = {"FrameAcquisitionDateTime": one.AcquisitionDate + one.AcquisitionTime}
        if "TemporalPositionIdentifier" in one:
            content["TemporalPositionIndex"] = int(one.TemporalPositionIdentifier)
        macro(frame, "FrameContentSequence", **content)
        if "DiffusionBValue" in one:
            direction = pydicom.Dataset()
            if "DiffusionGradientOrientation" in one:
                direction.DiffusionGradientOrientation = one.DiffusionGradientOrientation
            macro(frame, "MRDiffusionSequence", DiffusionBValue=one.DiffusionBValue,
                  DiffusionGradientDirectionSequence=[direction])  # fmt: skip
        frames.append(frame)
    out.PerFrameFunctionalGroupsSequence = frames
    path.parent.mkdir(parents=True, exist_ok=True)
    out.save_as(path, enforce_file_format=True)
    for name in folder.iterdir():
        name.unlink()


def test_multi_frame_dynamic_series(tmp_path) -> None:
    series = dce()
    enhanced(series, tmp_path / "m" / "one.dcm")
    read = read_dicom(tmp_path / "m", first_visit=START).one(Kind.DCE)
    np.testing.assert_array_equal(read.data, 2 * series.data + 1)  # slope and intercept of the shared groups
    np.testing.assert_allclose(read.times, series.times)
    assert read.grid.distance(series.grid) < 1e-3 and read.flip_angle == 10.0 and read.day == 21.0
    assert (read.tr, read.te, read.field_strength, read.phase_encoding) == (0.005, 0.0023, 3.0, "y")


def test_multi_frame_diffusion_series(tmp_path) -> None:
    series = dwi()
    enhanced(series, tmp_path / "m" / "one.dcm")
    read = read_dicom(tmp_path / "m").one(Kind.DWI)
    # Frames have no order but that in the file, so samples are found by what they are.
    for b, direction, data in zip(series.b_values, series.directions, series.data, strict=True):
        at = [k for k in range(5) if read.b_values[k] == b and np.allclose(read.directions[k], direction, atol=1e-6)]
        assert len(at) == 1
        np.testing.assert_array_equal(read.data[at[0]], 2 * data + 1)


# --- vendors ---------------------------------------------------------------------------------------------------------


def strip_standard(header: pydicom.Dataset) -> tuple[float, list[float]]:
    b = float(header.DiffusionBValue)
    direction = [float(v) for v in header.get("DiffusionGradientOrientation", [0.0, 0.0, 0.0])]
    for name in ("DiffusionBValue", "DiffusionGradientOrientation", "DiffusionDirectionality"):
        if name in header:
            delattr(header, name)
    return b, direction


def siemens(header: pydicom.Dataset) -> None:
    b, direction = strip_standard(header)
    header.Manufacturer = "SIEMENS"
    block = header.private_block(0x0019, "SIEMENS MR HEADER", create=True)
    block.add_new(0x0C, "IS", int(b))
    if b:
        block.add_new(0x0E, "FD", direction)


def philips(header: pydicom.Dataset) -> None:
    b, direction = strip_standard(header)
    header.Manufacturer = "Philips Medical Systems"
    header.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x03, "FL", b)
    block = header.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
    for element, value in zip((0xB0, 0xB1, 0xB2), direction, strict=True):
        block.add_new(element, "FL", value)
    block.add_new(0x0E, "FL", 0.5)


def ge(header: pydicom.Dataset, offset: int = 10**9) -> None:
    b, direction = strip_standard(header)
    header.Manufacturer = "GE MEDICAL SYSTEMS"
    header.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x39, "IS", [offset + int(b), 8, 0, 0])
    block = header.private_block(0x0019, "GEMS_ACQU_01", create=True)
    for element, value in zip((0xBB, 0xBC, 0xBD), direction, strict=True):
        block.add_new(element, "DS", str(value))


@pytest.mark.parametrize("vendor", [siemens, philips, ge, lambda header: ge(header, 0)])
def test_b_values_of_vendors(vendor, tmp_path) -> None:
    series = dwi()
    write_dicom(series, tmp_path / "a")
    edit(tmp_path / "a", vendor)
    read = read_dicom(tmp_path / "a").one(Kind.DWI)
    assert read.b_values.tolist() == series.b_values.tolist()
    if read.vendor == "GE":  # along the scanner's axes, of which the signs are not known
        assert read.directions is None and "signs are not known" in read.notes[0]
    else:
        np.testing.assert_allclose(read.directions, series.directions, atol=1e-6)
    # Philips' scale slope: (stored × 1 + 0) / (1 × 0.5)
    np.testing.assert_array_equal(read.data, series.data * (2 if read.vendor == "Philips" else 1))


def test_private_numbers_without_creator_or_type(tmp_path) -> None:
    write_dicom(dwi(), tmp_path / "a")

    def bare(header: pydicom.Dataset) -> None:
        b, _ = strip_standard(header)
        header.Manufacturer = "SIEMENS"
        header.add_new((0x0019, 0x100C), "UN", f"{int(b)} ".encode())

    edit(tmp_path / "a", bare)
    intake = read_dicom(tmp_path / "a")
    assert intake.one(Kind.DWI).b_values.tolist() == [0, 800, 800, 100, 1000]


def csa_header(b: int, direction: list[float]) -> bytes:
    """A Siemens CSA2 header with two tags, as nibabel documents it."""
    import struct

    def tag(name: str, vr: str, values: list[str]) -> bytes:
        out = struct.pack("<64si4siii", name.encode(), len(values), vr.encode(), 0, 6, 77)
        for number in range(6):
            text = values[number].encode() + b"\0" if number < len(values) else b""
            out += struct.pack("<4i", len(text), len(text), 77, len(text))
            out += text + b"\0" * (-len(text) % 4)
        return out

    tags = [tag("B_value", "IS", [str(b)])]
    if b:
        tags.append(tag("DiffusionGradientDirection", "FD", [f"{v:.8f}" for v in direction]))
    return b"SV10\4\3\2\1" + struct.pack("<II", len(tags), 77) + b"".join(tags)


def test_siemens_csa_header(tmp_path) -> None:
    series = dwi()
    write_dicom(series, tmp_path / "a")

    def csa(header: pydicom.Dataset) -> None:
        b, direction = strip_standard(header)
        header.Manufacturer = "SIEMENS"
        header.private_block(0x0029, "SIEMENS CSA HEADER", create=True).add_new(
            0x10, "OB", csa_header(int(b), direction)
        )

    edit(tmp_path / "a", csa)
    read = read_dicom(tmp_path / "a").one(Kind.DWI)
    assert read.b_values.tolist() == series.b_values.tolist()
    np.testing.assert_allclose(read.directions, series.directions, atol=1e-6)


def test_philips_scale_that_changes_within_a_series(tmp_path) -> None:
    series = dce(3, vendor="Philips")
    write_dicom(series, tmp_path / "a")

    def scaled(header: pydicom.Dataset, private: bool = True) -> None:
        # The signal is the stored value over the scale slope: rescaling for display must not matter.
        header.RescaleSlope = float(header.TemporalPositionIdentifier)
        if private:
            block = header.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
            block.add_new(0x0E, "FL", 4.0)

    edit(tmp_path / "a", scaled)
    np.testing.assert_allclose(read_dicom(tmp_path / "a").one(Kind.DCE).data, series.data / 4, rtol=1e-6)
    write_dicom(series, tmp_path / "a", overwrite=True)
    edit(tmp_path / "a", lambda header: scaled(header, private=False))
    assert "scale of values changes" in refused(tmp_path / "a")


def test_philips_without_its_scale_says_so(tmp_path) -> None:
    write_dicom(dce(vendor="Philips"), tmp_path / "a")
    assert "scale slope (2005,100E) missing" in read_dicom(tmp_path / "a").one(Kind.DCE).notes[0]


# --- times -----------------------------------------------------------------------------------------------------------


def without_clocks(header: pydicom.Dataset) -> None:
    for name in ("AcquisitionTime", "ContentTime", "AcquisitionDate", "ContentDate", "TemporalPositionIdentifier"):
        if name in header:
            delattr(header, name)


def sample_of(header: pydicom.Dataset) -> int:
    return (int(header.InstanceNumber) - 1) // SHAPE[0]


@pytest.mark.parametrize("source", ["AcquisitionDateTime", "TriggerTime", "TemporalResolution", "ContentTime"])
def test_times_from_what_there_is(source, tmp_path) -> None:
    series = dce(times=np.array([0.0, 10.0, 20.0, 30.0]))
    write_dicom(series, tmp_path / "a")

    def keep(header: pydicom.Dataset) -> None:
        without_clocks(header)
        seconds = 10 * sample_of(header)
        if source == "AcquisitionDateTime":
            header.AcquisitionDateTime = (
                f"202403012359{40 + seconds:02d}" if seconds < 20 else f"202403020000{seconds - 20:02d}"
            )
        elif source == "TriggerTime":
            header.TriggerTime = 1000 * seconds
            header.AcquisitionTime = "120000"  # the same for all, as GE writes it
        elif source == "TemporalResolution":
            header.TemporalPositionIdentifier, header.TemporalResolution = sample_of(header) + 1, 10_000
        else:
            header.ContentTime = f"1200{seconds:02d}"

    edit(tmp_path / "a", keep)
    read = read_dicom(tmp_path / "a").one(Kind.DCE)
    np.testing.assert_allclose(read.times, [0, 10, 20, 30])
    np.testing.assert_array_equal(read.data, series.data)
    assert (len(read.notes) == 1) == (source in ("TemporalResolution", "ContentTime"))


def test_each_slice_may_have_its_own_time_and_midnight_passes(tmp_path) -> None:
    series = dce(times=np.array([0.0, 10.0, 20.0, 30.0]))
    write_dicom(series, tmp_path / "a")

    def clock(header: pydicom.Dataset) -> None:
        k = (int(header.InstanceNumber) - 1) % SHAPE[0]
        seconds = 23 * 3600 + 59 * 60 + 45 + 10 * sample_of(header) + k
        without_clocks(header)
        hours, rest = divmod(seconds % 86400, 3600)
        header.AcquisitionTime = f"{hours:02d}{rest // 60:02d}{rest % 60:02d}"
        header.TemporalPositionIdentifier = sample_of(header) + 1

    edit(tmp_path / "a", clock)
    read = read_dicom(tmp_path / "a").one(Kind.DCE)
    np.testing.assert_array_equal(read.data, series.data)
    assert read.times[0] == 0 and (np.diff(read.times) > 0).all()


def test_a_series_without_times_is_refused(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    edit(tmp_path / "a", without_clocks)
    assert "4 samples without times that rise" in refused(tmp_path / "a")


# --- what is refused -------------------------------------------------------------------------------------------------


def test_missing_slices(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    (tmp_path / "a" / "001_0003_0002.dcm").unlink()
    assert "sample 3 has 4 slices, others 5 (at" in refused(tmp_path / "a")
    write_dicom(dce(), tmp_path / "a", overwrite=True)
    for path in (tmp_path / "a").glob("*_0003.dcm"):
        path.unlink()
    message = refused(tmp_path / "a")
    assert "1 slice missing between" in message and "4 mm apart" in message


def test_slices_that_are_there_twice(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    copy = tmp_path / "a" / "copy.dcm"
    copy.write_bytes((tmp_path / "a" / "001_0002_0003.dcm").read_bytes())
    intake = read_dicom(tmp_path / "a")  # the very same image: harmless
    assert intake.one(Kind.DCE).samples == 4 and any("1 files are copies" in item.message for item in intake.findings)
    edit(tmp_path / "a", lambda header: setattr(header, "SOPInstanceUID", "1.2.3"), "copy.dcm")
    assert "is there twice in sample 2" in refused(tmp_path / "a")


def test_samples_that_nothing_tells_apart(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")

    def same_number(header: pydicom.Dataset) -> None:
        without_clocks(header)
        header.InstanceNumber = 1

    edit(tmp_path / "a", same_number)
    assert "nothing in the headers" in refused(tmp_path / "a")


@pytest.mark.parametrize("by", ["along", "across"])
def test_a_sample_elsewhere(by, tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    axis = GRID.affine[:3, 2 if by == "along" else 0] / (4 if by == "along" else 1.5) * [-1, -1, 1]

    def move(header: pydicom.Dataset) -> None:
        header.ImagePositionPatient = [float(v) for v in np.array(header.ImagePositionPatient) + 2.0 * axis]

    edit(tmp_path / "a", move, "001_0003_*.dcm")
    message = refused(tmp_path / "a")
    assert ("sample 3 has another geometry" in message) if by == "along" else ("shifted by up to 2 mm" in message)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda header: setattr(header, "ImageType", ["DERIVED", "PRIMARY", "ADC"]), "map computed by the scanner"),
        (lambda header: setattr(header, "ImageType", ["ORIGINAL", "PRIMARY", "P"]), "'phase'"),
        (lambda header: setattr(header, "ImageOrientationPatient", [1, 0, 0, 0, 1, 0]), "mixes orientations"),
        (lambda header: setattr(header, "PixelSpacing", [1.3, 1.3]), "mixes pixels"),
        (lambda header: setattr(header, "EchoTime", 4.6), "mixes 2 echo times"),
        (lambda header: setattr(header, "RepetitionTime", 9), "mixes 2 repetition times"),
        (lambda header: (setattr(header, "Rows", 3), setattr(header, "Columns", 21)), "images of 3 × 21, 7 × 9 pixels"),
    ],
)
def test_mixed_series(change, words, tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    edit(tmp_path / "a", change, "001_0003_*.dcm")
    assert words in refused(tmp_path / "a")


def test_truncated_damaged_and_empty_files(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    path = tmp_path / "a" / "001_0002_0003.dcm"
    content = path.read_bytes()
    path.write_bytes(content[:-60])
    assert "001_0002_0003.dcm is truncated or damaged" in refused(tmp_path / "a")
    path.write_bytes(content[:700])
    messages = [item.message for item in read_dicom(tmp_path / "a").findings if item.severity == "error"]
    assert any("001_0002_0003.dcm" in message for message in messages) and any("missing" in m for m in messages)
    path.write_bytes(b"")
    messages = [item.message for item in read_dicom(tmp_path / "a").findings if item.severity == "error"]
    assert "001_0002_0003.dcm: empty file." in messages


def test_files_of_other_kinds_are_ignored_with_a_note(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("hello")
    (tmp_path / "a" / "sub").mkdir()
    (tmp_path / "a" / "sub" / "table.csv").write_text("1,2")
    header = pydicom.dcmread(tmp_path / "a" / "001_0001_0001.dcm")
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    header.save_as(tmp_path / "a" / "capture.dcm")
    intake = read_dicom(tmp_path / "a")
    assert intake.one(Kind.DCE).samples == 4
    (note,) = [item.message for item in intake.findings if "ignored" in item.message]
    assert "3 files" in note and "2 × no DICOM file" in note and "Secondary Capture" in note


def test_folders_without_series(tmp_path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_dicom(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(InputError, match="no MR images"):
        read_dicom(tmp_path)


@pytest.mark.parametrize(
    ("name", "words"), [("FlipAngle", "flip angle missing"), ("RepetitionTime", "repetition time missing")]
)
def test_flip_angle_or_tr_missing(name, words, tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    edit(tmp_path / "a", lambda header: delattr(header, name))
    assert words in refused(tmp_path / "a")


def test_b_values_missing_in_part_or_all_or_single(tmp_path) -> None:
    write_dicom(dwi(), tmp_path / "a")
    edit(tmp_path / "a", strip_standard, "001_0005_*.dcm")
    assert "b-value missing in 1 of 5 samples" in refused(tmp_path / "a")
    edit(tmp_path / "a", lambda header: "DiffusionBValue" in header and strip_standard(header))
    intake = read_dicom(tmp_path / "a", kind=Kind.DWI)
    with pytest.raises(InputError, match="b-values missing"):
        intake.one(Kind.DWI)
    write_dicom(dwi(), tmp_path / "a", overwrite=True)
    edit(tmp_path / "a", lambda header: setattr(header, "DiffusionBValue", 800.0))
    assert "a single b-value (800 s/mm²)" in refused(tmp_path / "a")


def test_b_values_in_other_units(tmp_path) -> None:
    write_dicom(dwi(), tmp_path / "a")
    edit(tmp_path / "a", lambda header: setattr(header, "DiffusionBValue", header.DiffusionBValue / 1000))
    assert "largest b-value 1; expected 50" in refused(tmp_path / "a")


def test_one_bad_series_does_not_cost_the_others(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "v" / "a")
    write_dicom(dwi(), tmp_path / "v" / "b", number=2)
    (tmp_path / "v" / "a" / "001_0003_0002.dcm").unlink()
    intake = read_dicom(tmp_path / "v")
    assert [series.kind for series in intake.series] == [Kind.DWI]
    assert [item.step for item in intake.findings if item.severity == "error"] == ["geometry"]


def test_mosaics_and_maps(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    edit(tmp_path / "a", lambda header: setattr(header, "ImageType", ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]))
    assert "Siemens mosaics" in refused(tmp_path / "a")
    edit(tmp_path / "a", lambda header: setattr(header, "ImageType", ["DERIVED", "PRIMARY", "ADC"]))
    intake = read_dicom(tmp_path / "a")
    assert intake.series == () and any("no raw signal" in item.message for item in intake.findings)


# --- scans stored one by one -----------------------------------------------------------------------------------------


def scans(folder: Path, **changes: list) -> Intake:
    for number in range(3):
        fields = {name: values[number] for name, values in changes.items()}
        one = Series(Kind.ANATOMY, whole(1, number), GRID, **({"flip_angles": 10.0, "tr": 0.005, "te": 0.002} | fields))
        write_dicom(one, folder / str(number), number=number + 1)
        edit(
            folder / str(number), lambda header, n=number: setattr(header, "AcquisitionTime", f"0900{30 - 10 * n:02d}")
        )
    return read_dicom(folder)


def test_single_scans_are_put_together_by_what_changes(tmp_path) -> None:
    vfa_whole = scans(tmp_path / "v", flip_angles=[12.0, 2.0, 5.0]).one(Kind.VFA)
    assert vfa_whole.flip_angles.tolist() == [2.0, 5.0, 12.0] and vfa_whole.name == "series 2, 3, 1"
    np.testing.assert_array_equal(vfa_whole.data[2], whole(1, 0)[0])
    inverted = scans(tmp_path / "i", inversion_times=[0.3, 0.9, 0.6]).one(Kind.INVERSION)
    assert inverted.inversion_times.tolist() == [0.3, 0.6, 0.9]
    intake = scans(tmp_path / "d")
    assert intake.one(Kind.DCE).times.tolist() == [0.0, 10.0, 20.0]
    np.testing.assert_array_equal(intake.one(Kind.DCE).data[0], whole(1, 2)[0])
    assert any("were put together" in item.message for item in intake.findings)
    assert len(read_dicom(tmp_path / "d", joined=False).of(Kind.ANATOMY)) == 3
    assert len(scans(tmp_path / "t", tr=[0.005, 0.006, 0.007]).of(Kind.ANATOMY)) == 3


def test_visits_become_days(tmp_path) -> None:
    write_dicom(dce(day=0.0), tmp_path / "p" / "1")
    write_dicom(dce(day=21.0), tmp_path / "p" / "2")
    read = read_dicom(tmp_path / "p").series
    assert [(series.day, series.name) for series in read] == [(0.0, "series 1"), (21.0, "series 1 (2)")]
    assert [series.day for series in read_dicom(tmp_path / "p", shift=5).series] == [5.0, 26.0]
    intake = read_dicom(tmp_path / "p", first_visit=date(1900, 1, 5))
    assert any("before the first visit" in item.message for item in intake.findings)


# --- what is written -------------------------------------------------------------------------------------------------


def test_what_is_written_has_what_the_standard_asks(tmp_path) -> None:
    highdicom = pytest.importorskip("highdicom")
    tables = Path(highdicom.__file__).parent / "_standard"
    modules = json.loads((tables / "iod_module_map.json").read_text())["mr-image"]
    attributes = json.loads((tables / "module_attribute_map.json").read_text())
    write_dicom(dce(), tmp_path / "a")
    header = pydicom.dcmread(tmp_path / "a" / "001_0001_0001.dcm")
    lacking = [
        item["keyword"]
        for module in modules
        if module["usage"] == "M"
        for item in attributes[module["key"]]
        if not item["path"] and item["type"] in ("1", "2")
        if item["keyword"] not in header or (item["type"] == "1" and header[item["keyword"]].value in (None, ""))
    ]
    assert lacking == []


def test_the_same_series_gives_the_same_files(tmp_path) -> None:
    for name in ("a", "b"):
        write_dicom(dce(), tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_writing_does_not_destroy(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a")
    with pytest.raises(OutputError, match="exists already"):
        write_dicom(dce(), tmp_path / "a")
    data = whole(1)
    data[0, 0, 0, 0] = np.nan
    with pytest.raises(InputError, match="NaN"):
        write_dicom(Series(Kind.ANATOMY, data, GRID), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_scratch_files_hold_the_voxels(tmp_path) -> None:
    series = dce()
    write_dicom(series, tmp_path / "a")
    read = read_dicom(tmp_path / "a", scratch=tmp_path / "s").one(Kind.DCE)
    np.testing.assert_array_equal(read.data, series.data)
    (file,) = (tmp_path / "s").iterdir()
    assert file.stat().st_size == series.data.nbytes


def test_nothing_of_the_patient_comes_through(tmp_path) -> None:
    write_dicom(dce(), tmp_path / "a", patient="Doe^Jane")
    intake = read_dicom(tmp_path / "a")
    uid = str(pydicom.dcmread(tmp_path / "a" / "001_0001_0001.dcm").SeriesInstanceUID)
    text = repr(intake) + repr([vars(series) for series in intake.series])
    assert "Doe" not in text and uid not in text and "1900" not in text
    assert {"PatientName", "SeriesInstanceUID"} <= set(intake.dropped)
