"""Maps as DICOM: values, codes and places are those of the maps, and every reader finds them."""

from dataclasses import replace

import numpy as np
import pytest

from biomodel.errors import InputError
from biomodel.imaging.series import Kind, Series
from biomodel.quantify.dicom_maps import BRAIN, BREAST, write_dicom_maps
from biomodel.quantify.maps import Map, VisitMaps
from quantified_visits import oblique_grid, quantified_visit

pydicom = pytest.importorskip("pydicom")
highdicom = pytest.importorskip("highdicom")


@pytest.fixture(scope="module")
def visit() -> VisitMaps:
    return quantified_visit()


@pytest.fixture(scope="module")
def folder(visit, tmp_path_factory):
    target = tmp_path_factory.mktemp("dicom")
    write_dicom_maps(visit, target, patient="VIRTUAL-1", organ=BRAIN)
    return target


def frames(ds) -> np.ndarray:
    return np.frombuffer(ds.FloatPixelData, "<f4").reshape(ds.NumberOfFrames, ds.Rows, ds.Columns)


def places(ds) -> np.ndarray:
    """Position of each pixel, RAS+ mm, (frames, rows, columns, 3), from the attributes alone."""
    shared = ds.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float)
    down, across = (float(step) for step in shared.PixelMeasuresSequence[0].PixelSpacing)
    first = np.array([f.PlanePositionSequence[0].ImagePositionPatient for f in ds.PerFrameFunctionalGroupsSequence])
    row, column = np.arange(ds.Rows), np.arange(ds.Columns)
    lps = (
        first.astype(float)[:, None, None]
        + (cosines[3:] * down) * row[:, None, None]
        + (cosines[:3] * across) * column[:, None]
    )
    return lps * [-1, -1, 1]


def expected(values: np.ndarray, grid, where: np.ndarray) -> np.ndarray:
    """Values of a map at places in mm; every place must be the centre of a voxel."""
    inverse = np.linalg.inv(grid.affine)
    index = where @ inverse[:3, :3].T + inverse[:3, 3]
    assert np.abs(index - np.rint(index)).max() < 1e-6
    x, y, z = np.rint(index).astype(int).transpose(3, 0, 1, 2)
    return values[z, y, x]


@pytest.mark.parametrize(("name", "code", "meaning", "unit", "factor"), [
    ("Ktrans", "126312", "Ktrans", "/min", 1),
    ("ve", "126314", "ve", "mL/dL", 100),
    ("vp", "126331", "vp", "mL/dL", 100),
    ("T1", "113063", "T1", "s", 1),
    ("ADC", "113041", "Apparent Diffusion Coefficient", "mm2/s", 1),
])  # fmt: skip
def test_values_places_codes_and_units(visit, folder, name, code, meaning, unit, factor):
    ds = pydicom.dcmread(folder / f"visit1_{name}.dcm")
    assert ds.SOPClassUID.name == "Parametric Map Storage"
    np.testing.assert_allclose(frames(ds), expected(visit[name].values, visit.grid, places(ds)) * factor, rtol=1e-6)
    mapping = ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    assert (mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept) == (1.0, 0.0)
    units, quantity = mapping.MeasurementUnitsCodeSequence[0], mapping.QuantityDefinitionSequence[0]
    assert (units.CodingSchemeDesignator, units.CodeValue) == ("UCUM", unit)
    found = quantity.ConceptCodeSequence[0]
    assert (found.CodingSchemeDesignator, found.CodeValue, found.CodeMeaning) == ("DCM", code, meaning)
    assert mapping.DoubleFloatRealWorldValueFirstValueMapped == np.nanmin(frames(ds))
    assert mapping.DoubleFloatRealWorldValueLastValueMapped == np.nanmax(frames(ds))


def test_codes_are_those_of_the_standard():
    """pydicom carries the standard's context groups: each code must be in 7180 with the meaning that we write."""
    from pydicom.sr._concepts_dict import concepts

    from biomodel.quantify.dicom_maps import _OF_CONCENTRATION, _QUANTITIES

    listed = {code: entry for names in concepts["DCM"].values() for code, entry in names.items()}
    for code, meaning in (*_QUANTITIES.values(), *_OF_CONCENTRATION.values()):
        assert listed[code][0] == meaning and 7180 in listed[code][1]


def test_errors_say_that_they_are(visit, folder):
    ds = pydicom.dcmread(folder / "visit1_ve_sd.dcm")
    np.testing.assert_allclose(frames(ds), expected(visit["ve"].sd, visit.grid, places(ds)) * 100, rtol=1e-6)
    told = ds.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0].QuantityDefinitionSequence
    assert [item.ConceptCodeSequence[0].CodeMeaning for item in told] == ["ve", "Standard Deviation"]


def test_slices_climb_and_show_the_patient_as_viewers_do(folder):
    for path in sorted(folder.glob("*_ADC*.dcm")):
        where = places(pydicom.dcmread(path))
        along_columns, down_rows = where[0, 0, -1] - where[0, 0, 0], where[0, -1, 0] - where[0, 0, 0]
        assert np.argmax(np.abs(along_columns)) == 0 and along_columns[0] < 0  # to the left
        assert np.argmax(np.abs(down_rows)) == 1 and down_rows[1] < 0  # to the back
        assert (where[-1, 0, 0] - where[0, 0, 0])[2] > 0  # to the head
        # dcmqi takes for granted that the frames climb along rows × columns, in LPS.
        normal = np.cross(along_columns * [-1, -1, 1], down_rows * [-1, -1, 1])
        assert normal @ ((where[1, 0, 0] - where[0, 0, 0]) * [-1, -1, 1]) > 0


def test_places_agree_with_simpleitk(visit, folder, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    from biomodel.quantify.nifti_maps import write_maps

    write_maps(visit, tmp_path)
    image = sitk.ReadImage(str(tmp_path / "visit1_T1.nii.gz"))
    ds = pydicom.dcmread(folder / "visit1_T1.dcm")
    where, values = places(ds) * [-1, -1, 1], frames(ds)
    for at in map(tuple, np.argwhere(np.isfinite(values))[::97]):  # NaN in NIfTI files is 0 for ITK
        index = image.TransformPhysicalPointToIndex(where[at].tolist())
        np.testing.assert_allclose(image.TransformIndexToPhysicalPoint(index), where[at], atol=1e-4)
        np.testing.assert_allclose(image.GetPixel(*index), values[at], rtol=1e-6)


def test_highdicom_reads_the_same_volume(visit, folder):
    volume = highdicom.imread(folder / "visit1_Ktrans.dcm").get_volume(apply_real_world_transform=True)
    to_grid = np.linalg.inv(visit.grid.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    index = np.moveaxis(np.indices(volume.spatial_shape), 0, -1) @ to_grid[:3, :3].T + to_grid[:3, 3]
    x, y, z = np.rint(index).astype(int).transpose(3, 0, 1, 2)
    assert np.abs(index - np.rint(index)).max() < 1e-6
    np.testing.assert_allclose(volume.array, visit["Ktrans"].values[z, y, x], rtol=1e-6)


def test_segments(visit, folder):
    seg = highdicom.seg.segread(folder / "visit1_regions.dcm")
    assert [seg.get_segment_description(n).segment_label for n in seg.segment_numbers] == ["brain", "tumour"]
    tumour = seg.get_segment_description(2)
    assert tumour.segmented_property_type.meaning == "Neoplasm"
    assert tumour.anatomic_regions[0].value == BRAIN.code
    volume = seg.get_volume(combine_segments=False)
    to_grid = np.linalg.inv(visit.grid.affine) @ np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    for place, mask in enumerate((visit.organ, visit.region)):
        index = np.argwhere(volume.array[..., place]) @ to_grid[:3, :3].T + to_grid[:3, 3]
        got = np.zeros(mask.shape, bool)
        x, y, z = np.rint(index).astype(int).T
        got[z, y, x] = True
        assert np.array_equal(got, mask)


def test_all_objects_share_study_and_frame_and_refer_to_nothing_that_is_not_there(folder):
    made = [pydicom.dcmread(path) for path in folder.glob("*.dcm")]
    assert len(made) == 12  # six maps, five errors, the regions
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({str(ds.get(keyword)) for ds in made}) == 1
    for keyword in ("SeriesInstanceUID", "SOPInstanceUID", "SeriesNumber"):
        assert len({str(ds.get(keyword)) for ds in made}) == len(made)
    for ds in made:
        assert ds.PatientID == ds.PatientName == "VIRTUAL-1" and ds.PatientIdentityRemoved == "YES"
        assert not [e for e in ds.iterall() if e.keyword in ("SourceImageSequence", "ReferencedSOPInstanceUID")]


def test_the_same_maps_give_the_same_files(visit, folder, tmp_path):
    for path in write_dicom_maps(visit, tmp_path, patient="VIRTUAL-1", organ=BRAIN):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_the_study_is_that_of_raw_series(visit, folder, tmp_path):
    from biomodel.imaging.dicom_write import write_dicom

    signal, angles = np.ones((2, *visit.grid.shape), np.float32), np.array([3.0, 15.0])
    series = Series(Kind.VFA, signal, visit.grid, flip_angles=angles, tr=0.005, day=0.0)
    write_dicom(series, tmp_path / "raw", patient="VIRTUAL-1")
    headers = [pydicom.dcmread(path) for path in sorted((tmp_path / "raw").iterdir())]
    ds = pydicom.dcmread(folder / "visit1_ADC.dcm")
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID"):
        assert ds.get(keyword) == headers[0].get(keyword)
    # The same series as the source: images are referred to, slice by slice.
    first = headers[: visit.grid.shape[0]]
    write_dicom_maps(visit, tmp_path, organ=BRAIN, sources=first)
    ds = pydicom.dcmread(tmp_path / "visit1_ADC.dcm")
    assert ds.PatientID == "VIRTUAL-1"
    np.testing.assert_allclose(frames(ds), expected(visit["ADC"].values, visit.grid, places(ds)), rtol=1e-6)
    # The sources' character set is ASCII: nothing else may stand in texts, mm² least of all.
    assert all(str(element.value).isascii() for element in ds.iterall() if element.VR in ("LO", "SH", "UT", "ST"))
    referred = {str(e.value) for e in ds.iterall() if e.keyword == "ReferencedSOPInstanceUID"}
    assert referred and referred <= {header.SOPInstanceUID for header in first}
    with pytest.raises(InputError, match="values of StudyInstanceUID"):
        other = first[0].copy()
        other.StudyInstanceUID = "1.2.3"
        write_dicom_maps(visit, tmp_path, sources=[first[1], other])
    with pytest.raises(InputError, match="without PixelSpacing"):
        other = first[0].copy()
        del other.PixelSpacing
        write_dicom_maps(visit, tmp_path, sources=[other])


def test_a_side_is_written_where_it_is_known(visit, tmp_path):
    one = VisitMaps(1, 0.0, visit.grid, {"ADC": visit["drug_map"]}, visit.organ)
    write_dicom_maps(one, tmp_path, organ=BREAST)
    ds = pydicom.dcmread(tmp_path / "visit1_ADC.dcm")
    assert ds.Laterality == "" and "FrameAnatomySequence" not in ds.SharedFunctionalGroupsSequence[0]
    write_dicom_maps(one, tmp_path, organ=replace(BREAST, side="L"))
    ds = pydicom.dcmread(tmp_path / "visit1_ADC.dcm")
    assert "Laterality" not in ds
    assert ds.SharedFunctionalGroupsSequence[0].FrameAnatomySequence[0].FrameLaterality == "L"


def test_unknown_quantities_empty_maps_and_empty_regions(visit, tmp_path):
    nothing = np.full(visit.grid.shape, np.nan, np.float32)
    maps = {"cellularity": Map("cellularity", "1/mm^3", visit["ADC"].values), "AUC90": Map("AUC90", "s", nothing)}
    one = VisitMaps(3, 42.0, visit.grid, maps, visit.organ, region=np.zeros(visit.grid.shape, bool))
    write_dicom_maps(one, tmp_path)
    mapping = pydicom.dcmread(tmp_path / "visit3_cellularity.dcm").SharedFunctionalGroupsSequence[0]
    mapping = mapping.RealWorldValueMappingSequence[0]
    assert mapping.QuantityDefinitionSequence[0].ConceptCodeSequence[0].CodingSchemeDesignator == "99TUMORCAST"
    assert mapping.MeasurementUnitsCodeSequence[0].CodingSchemeDesignator == "99TUMORCAST"
    # An area under relative enhancement is not DICOM's IAUC90, which is one of concentration.
    empty = pydicom.dcmread(tmp_path / "visit3_AUC90.dcm")
    quantity = empty.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0].QuantityDefinitionSequence[0]
    assert quantity.ConceptCodeSequence[0].CodingSchemeDesignator == "99TUMORCAST"
    assert np.isnan(frames(empty)).all()
    seg = highdicom.seg.segread(tmp_path / "visit3_regions.dcm")
    assert seg.number_of_segments == 2
    assert seg.get_volume(combine_segments=False).array.sum(axis=(0, 1, 2)).tolist() == [visit.organ.sum(), 0]


def test_a_single_slice(tmp_path):
    grid = oblique_grid((1, 12, 14))
    values = np.arange(168, dtype=np.float32).reshape(grid.shape)
    one = VisitMaps(1, 0.0, grid, {"T1": Map("T1", "s", values)}, np.ones(grid.shape, bool))
    write_dicom_maps(one, tmp_path)
    ds = pydicom.dcmread(tmp_path / "visit1_T1.dcm")
    assert np.array_equal(frames(ds), expected(values, grid, places(ds)))
