"""Maps as NIfTI files: what is written comes back, in the units that the files state."""

import json

import nibabel as nib
import numpy as np
import pytest

from biomodel.errors import GeometryError, InputError, OutputError, UnitError
from biomodel.imaging.series_grid import Grid
from biomodel.imaging.voxelfit import Code
from biomodel.quantify.maps import Curve, Map, VisitMaps
from biomodel.quantify.nifti_maps import read_maps, write_maps
from biomodel.quantify.quantities import REASONS
from quantified_visits import oblique_grid, quantified_visit


@pytest.fixture(scope="module")
def visit() -> VisitMaps:
    return quantified_visit()


def sidecar(folder, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_round_trip_gives_back_everything(visit, tmp_path):
    write_maps(visit, tmp_path)
    back = read_maps(tmp_path)
    assert (back.number, back.day, back.notes, back.findings) == (1, 0.0, visit.notes, visit.findings)
    assert dict(back.acquisition) == dict(visit.acquisition)
    assert visit.grid.distance(back.grid) < 1e-4  # mm; NIfTI keeps positions in single precision
    assert list(back.maps) == list(visit.maps)
    for name, one in visit.maps.items():
        again = back[name]
        assert (again.units, again.method) == (one.units, one.method)
        # Fractions were multiplied by 100 and divided again.
        np.testing.assert_allclose(again.values, one.values, rtol=2e-7)
        for part in ("sd", "code"):
            before, after = getattr(one, part), getattr(again, part)
            assert (before is None) == (after is None)
            if before is not None:
                np.testing.assert_allclose(after, before, rtol=2e-7)
    assert np.array_equal(back.organ, visit.organ) and np.array_equal(back.region, visit.region)
    assert np.array_equal(back.tissues["fibroglandular"], visit.tissues["fibroglandular"])
    for before, after in zip(visit.curves, back.curves, strict=True):
        assert (after.title, after.voxel, after.x_label, after.y_label) == (
            before.title, before.voxel, before.x_label, before.y_label)  # fmt: skip
        for part in ("x", "measured", "fitted"):
            assert np.array_equal(getattr(after, part), getattr(before, part))


def test_units_leave_as_caplex_has_them(visit, tmp_path):
    write_maps(visit, tmp_path)
    for name, units, factor in (("ve", "mL/100mL", 100), ("vp", "mL/100mL", 100), ("Ktrans", "1/min", 1),
                                ("ADC", "mm^2/s", 1), ("drug_map", "1", 1)):  # fmt: skip
        assert sidecar(tmp_path, f"visit1_{name}")["Units"] == units
        stored = np.asarray(nib.load(tmp_path / f"visit1_{name}.nii.gz").dataobj)
        np.testing.assert_allclose(stored.transpose(2, 1, 0), visit[name].values * factor, rtol=1e-6)
    error = np.asarray(nib.load(tmp_path / "visit1_ve_sd.nii.gz").dataobj)
    np.testing.assert_allclose(error.transpose(2, 1, 0), visit["ve"].sd * 100, rtol=1e-6)
    assert sidecar(tmp_path, "visit1_ve_sd")["Units"] == "mL/100mL"


def test_flows_leave_per_100_ml_and_come_back(visit, tmp_path):
    values = np.full(visit.grid.shape, 0.3, np.float32)
    one = VisitMaps(2, 14.0, visit.grid, {"Fp": Map("Fp", "1/min", values)}, visit.organ)
    write_maps(one, tmp_path)
    assert sidecar(tmp_path, "visit2_Fp")["Units"] == "mL/min/100mL"
    back = read_maps(tmp_path)["Fp"]
    assert back.units == "1/min"
    np.testing.assert_allclose(back.values, values, rtol=2e-7)


def test_a_fraction_in_other_units_is_left_alone(visit, tmp_path):
    values = np.full(visit.grid.shape, 35.0, np.float32)
    write_maps(VisitMaps(1, 0.0, visit.grid, {"ve": Map("ve", "%", values)}, visit.organ), tmp_path)
    assert sidecar(tmp_path, "visit1_ve")["Units"] == "%"
    assert read_maps(tmp_path)["ve"].units == "%"


def test_sidecars_explain(visit, tmp_path):
    write_maps(visit, tmp_path)
    told = sidecar(tmp_path, "visit1_Ktrans")
    assert told["CAPLEX"] == "Q.PH1.008" and told["EstimationAlgorithm"] == visit["Ktrans"].method
    assert told["Manufacturer"] == "Siemens" and told["MagneticFieldStrength"] == 3.0
    code = visit["Ktrans"].code
    assert told["Voxels"]["tumour"] == {
        Code(int(c)).name.lower(): int(np.sum(code[visit.region] == c)) for c in np.unique(code[visit.region])
    }
    assert sum(told["Voxels"]["organ"].values()) == visit.organ.sum()
    levels = sidecar(tmp_path, "visit1_Ktrans_code")["Levels"]
    assert levels == {str(int(code)): text for code, text in REASONS.items()} and len(levels) == len(Code)
    volume = sidecar(tmp_path, "visit1_region")["VolumeCm3"]
    assert volume == pytest.approx(visit.region.sum() * 8.0 / 1000)


def test_positions_agree_with_another_reader(visit, tmp_path):
    sitk = pytest.importorskip("SimpleITK")
    write_maps(visit, tmp_path)
    image = sitk.ReadImage(str(tmp_path / "visit1_ADC.nii.gz"))
    z, y, x = (int(i) for i in np.argwhere(visit.region)[0])
    place = np.array(image.TransformIndexToPhysicalPoint((x, y, z))) * [-1, -1, 1]  # ITK is LPS
    np.testing.assert_allclose(place, (visit.grid.affine @ [x, y, z, 1])[:3], atol=1e-4)
    assert image.GetPixel(x, y, z) == pytest.approx(float(visit["ADC"].values[z, y, x]))


def test_several_visits_in_a_folder(visit, tmp_path):
    write_maps(visit, tmp_path)
    write_maps(quantified_visit(2, 21.0), tmp_path)
    assert read_maps(tmp_path, 2).day == 21.0
    with pytest.raises(InputError, match="visits 1, 2"):
        read_maps(tmp_path)
    with pytest.raises(InputError, match="no visit3.json"):
        read_maps(tmp_path, 3)


def test_a_visit_without_tumour_or_maps(visit, tmp_path):
    write_maps(VisitMaps(1, 0.0, visit.grid, {}, visit.organ), tmp_path)
    back = read_maps(tmp_path)
    assert back.region is None and not back.maps and not back.curves


def test_writing_again_removes_what_is_gone_and_nothing_else(visit, tmp_path):
    write_maps(visit, tmp_path)
    (tmp_path / "visit1_mine.txt").write_text("kept")
    fewer = VisitMaps(1, 0.0, visit.grid, {"ADC": visit["ADC"]}, visit.organ)
    write_maps(fewer, tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"visit1.json", "visit1_mine.txt"} | {
        f"visit1_{stem}{ending}" for stem in ("ADC", "ADC_sd", "ADC_code", "organ") for ending in (".nii.gz", ".json")
    }
    assert list(read_maps(tmp_path).maps) == ["ADC"]


def test_a_failure_leaves_the_folder_as_it_was(visit, tmp_path):
    write_maps(visit, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "visit1_new.nii.gz").mkdir()  # something is in the way of the last map
    broken = VisitMaps(1, 0.0, visit.grid, {"ADC": visit["drug_map"], "new": visit["ADC"]}, visit.organ)
    with pytest.raises(OutputError):
        write_maps(broken, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_odd_names_and_missing_numbers(visit, tmp_path):
    curve = Curve("x", (0, 0, 0), np.array([0.0, 1.0]), "t", np.array([1.0, np.nan]), np.array([1.0, 2.0]), "s")
    one = Map("D*", "mm^2/s", visit["ADC"].values)
    write_maps(VisitMaps(1, 0.0, visit.grid, {"D*": one}, visit.organ, curves=(curve,)), tmp_path)
    assert (tmp_path / "visit1_Dstar.nii.gz").is_file()
    back = read_maps(tmp_path)
    assert list(back.maps) == ["D*"] and np.isnan(back.curves[0].measured[1])


def test_refusals_on_the_way_out(visit, tmp_path):
    twice = {"Ktrans": visit["Ktrans"], "Ktrans_sd": Map("Ktrans_sd", "1/min", visit["Ktrans"].sd)}
    with pytest.raises(InputError, match="Ktrans_sd"):
        write_maps(VisitMaps(1, 0.0, visit.grid, twice, visit.organ), tmp_path)
    with pytest.raises(InputError, match="JSON"):
        write_maps(VisitMaps(1, 0.0, visit.grid, {}, visit.organ, acquisition={"vendor": object()}), tmp_path)
    flipped = Grid.at((9, 20, 24), oblique_grid().affine @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(GeometryError, match="anterior"):
        write_maps(VisitMaps(1, 0.0, flipped, {}, visit.organ), tmp_path)
    assert not list(tmp_path.iterdir())


def test_refusals_on_the_way_in(visit, tmp_path):
    with pytest.raises(InputError, match="no list of maps"):
        read_maps(tmp_path)
    write_maps(visit, tmp_path)
    place = tmp_path / "visit1_ve.json"
    told = json.loads(place.read_text())
    place.write_text(json.dumps({key: value for key, value in told.items() if key != "Units"}))
    with pytest.raises(UnitError, match="never guessed"):
        read_maps(tmp_path)
    place.unlink()
    with pytest.raises(InputError, match="visit1_ve.json: does not exist"):
        read_maps(tmp_path)
    place.write_text(json.dumps(told))
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3)), np.eye(4)), tmp_path / "visit1_ve.nii.gz")
    with pytest.raises(GeometryError):
        read_maps(tmp_path)
    (tmp_path / "visit1.json").write_text('{"Format": "tumorcast-maps/1", "Visit": 1}')
    with pytest.raises(InputError, match="damaged"):
        read_maps(tmp_path)
    (tmp_path / "visit1.json").write_text('{"Format": "other"}')
    with pytest.raises(InputError, match="format 'other'"):
        read_maps(tmp_path)
