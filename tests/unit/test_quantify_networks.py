"""Networks in a quantification: what a network is taught, how weights are handed in, and where uncertainty is seen."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import ndimage
from typer.testing import CliRunner

from biomodel.acquisition import SIEMENS_3T, write_raw
from biomodel.cli import app
from biomodel.errors import InputError
from biomodel.imaging.nifti import read_image, write_image
from biomodel.imaging.regions import (
    NetworkSettings,
    NetworkTissues,
    TissueNetwork,
    Training,
    TumourNetwork,
    score_region,
    train,
    train_tissues,
)
from biomodel.imaging.regions.lessons import virtual_lessons
from biomodel.imaging.registration import Rigid
from biomodel.quantify.dicom_maps import write_dicom_maps
from biomodel.quantify.lessons import read_lessons
from biomodel.quantify.maps import Map
from biomodel.quantify.nifti_maps import read_maps, write_maps
from biomodel.quantify.page import page
from biomodel.quantify.pipeline import quantify
from biomodel.quantify.study import Study
from biomodel.quantify.visit import Settings
from biomodel.virtual import small_patient
from quantified_visits import quantified_visit

pytest.importorskip("SimpleITK")
pytest.importorskip("monai")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture
def folder(tmp_path):
    """A quantified patient as it lies on disk: one visit, images around the agent, tissues and region."""
    rng = np.random.default_rng(3)
    visit = quantified_visit()
    before = 100 + 5 * rng.standard_normal(visit.grid.shape)
    images = {"before": before, "early": before * np.where(visit.region, 2.5, 1.1), "late": 1.2 * before}
    maps = {**visit.maps, **{name: Map(name, "1", values) for name, values in images.items()}}
    gland = rng.random(visit.grid.shape)
    acquisition = {"vendor": "Siemens", "field_strength": 3.0}
    visit = replace(visit, maps=maps, tissues={"fibroglandular": gland, "adipose": 1 - gland}, acquisition=acquisition)
    write_maps(visit, tmp_path / "P1" / "maps")
    (tmp_path / "P1" / "patient.json").write_text(json.dumps({"id": "P1"}))
    return tmp_path / "P1"


def test_what_a_reader_corrected_is_what_is_learnt(folder):
    (lesson,) = read_lessons(folder)
    visit = read_maps(folder / "maps")
    np.testing.assert_array_equal(lesson.tumour().region, visit.region)
    assert (lesson.patient, lesson.site) == ("P1", "Siemens 3.0 T")
    np.testing.assert_allclose(lesson.exam.early, visit["early"].values)
    fractions = lesson.tissue(fat_suppressed=True).fibroglandular
    assert np.isnan(fractions[visit.region]).all() and np.isfinite(fractions[visit.organ & ~visit.region]).all()
    # Drawn anew, partly outside of the organ.
    path = folder / "maps" / "visit1_region.nii.gz"
    drawn = np.zeros(visit.grid.shape, bool)
    drawn[2:4, :4, :6] = True
    assert (drawn & ~visit.organ).any()
    write_image(path, drawn, read_image(path).affine)
    (lesson,) = read_lessons(folder)
    np.testing.assert_array_equal(lesson.region, drawn)
    assert (lesson.organ & drawn == drawn).all()
    with pytest.raises(InputError, match="no maps/visit1.json"):
        (folder / "maps" / "visit1.json").rename(folder / "gone")
        read_lessons(folder)


def test_lessons_without_truth_teach_nothing(folder):
    (lesson,) = read_lessons(folder)
    with pytest.raises(InputError, match="without a region"):
        replace(lesson, region=None).tumour()
    with pytest.raises(InputError, match="without tissue fractions"):
        replace(lesson, fibroglandular=None).tissue(fat_suppressed=True)


def test_virtual_patients_teach_also_that_there_is_nothing():
    one, two, none = virtual_lessons([13])
    assert one.region.any() and not none.region.any() and one.patient == two.patient == none.patient
    assert one.site == "virtual A"
    # The same breast and the same noise: images differ only where the tumour was and where it thins out around that.
    away = ndimage.distance_transform_edt(~one.region, one.exam.spacing) > 10
    change = np.abs(one.exam.early - none.exam.early)
    assert change[away].max() < 0.02 * change[one.region].mean()
    assert np.isnan(one.fibroglandular[one.region]).all() and np.isfinite(none.fibroglandular[one.region]).mean() > 0.9


def test_uncertainty_is_a_map_in_files_and_on_the_page(tmp_path):
    visit = quantified_visit()
    probability = np.where(visit.organ, np.where(visit.region, 0.9, 0.1), np.nan)
    maps = {
        "tumour_probability": Map("tumour_probability", "1", probability),
        "tumour_entropy": Map("tumour_entropy", "bit", np.where(visit.organ, 0.47, np.nan)),
        "tissue_spread": Map("tissue_spread", "1", np.where(visit.organ, 0.02, np.nan)),
    }
    visit = replace(visit, maps={**visit.maps, **maps})
    write_maps(visit, tmp_path)
    again = read_maps(tmp_path)
    assert again["tumour_entropy"].units == "bit"
    np.testing.assert_allclose(again["tumour_probability"].values, probability.astype(np.float32))
    assert json.loads((tmp_path / "visit1_tumour_entropy.json").read_text())["Units"] == "bit"
    page([visit]).save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "How unsure the network is of the voxel" in text and "uncertainty of the tumour&#39;s region" in text
    pytest.importorskip("highdicom")
    pydicom = pytest.importorskip("pydicom")
    write_dicom_maps(visit, tmp_path)
    mapping = pydicom.dcmread(tmp_path / "visit1_tumour_entropy.dcm").SharedFunctionalGroupsSequence[0]
    unit = mapping.RealWorldValueMappingSequence[0].MeasurementUnitsCodeSequence[0]
    assert (unit.CodingSchemeDesignator, unit.CodeValue) == ("UCUM", "bit")


def test_the_command_refuses_what_it_cannot_learn_from_or_use(folder, tmp_path):
    def told(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, [str(word) for word in words])
        return result.exit_code, " ".join(result.output.split())

    out = tmp_path / "weights.pt"
    code, text = told("train", "--out", out)
    assert code == 3 and "nothing to learn from" in text
    code, text = told("train", folder, folder, "--out", out)
    assert code == 3 and "patient P1 was read already" in text
    code, text = told("train", folder, "--keep-back", 1, "--out", out)
    assert code == 3 and "1 of 1 quantified patients kept back" in text
    code, text = told("train", "--virtual", 2, "--tissues", "--bright-fat", "--out", out)
    assert code == 2 and "no virtual patients" in text
    assert not out.exists()
    out.write_text("no weights")
    code, text = told("train", folder, "--out", out)
    assert code == 5 and "exists already" in text and out.read_text() == "no weights"
    for option in ("--region-weights", "--tissue-weights"):
        # Told before any series is read: there is no study at all.
        code, text = told("quantify", tmp_path / "none", "--out", tmp_path / "Q", option, out)
        assert code == 3 and "weights.pt: is no file of network weights" in text
        code, text = told("quantify", tmp_path / "none", "--out", tmp_path / "Q", option, tmp_path / "no.pt")
        assert code == 3 and "no.pt: there is no such file of network weights" in text
    assert not (tmp_path / "Q").exists()


def test_the_command_trains_on_a_quantified_patient(folder, tmp_path):
    for kind, options, what in ((TumourNetwork, (), "Dice"), (TissueNetwork, ("--tissues",), "fraction")):
        out = tmp_path / f"{kind.__name__}.pt"
        copy = tmp_path / "P2"
        if not copy.exists():
            (copy / "maps").mkdir(parents=True)
            for path in (folder / "maps").iterdir():
                (copy / "maps" / path.name).write_bytes(path.read_bytes())
            (copy / "patient.json").write_text(json.dumps({"id": "P2"}))
        words = ["train", str(folder), str(copy), "--keep-back", "1", "--steps", "2", "--out", str(out), *options]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, result.output
        assert "1 exams of 1 patients" in result.output and what in result.output
        network = kind.load(out)
        assert network.digest[:12] in result.output and network.provenance["kept_back"] == 1
        assert network.provenance["training"]["steps"] == 2


@pytest.mark.slow
def test_a_study_is_quantified_with_networks(tmp_path):
    """Thresholds and clustering teach networks on the same visit; these then take their place."""
    write_raw(small_patient(5), tmp_path / "S", SIEMENS_3T, visits=[1])
    study = Study.read(tmp_path / "S")
    plain = quantify(study, Settings(correct_motion=False), Rigid())
    plain.write(tmp_path / "P")
    assert "tumour_entropy" not in plain.visits[0].maps and "tissue_spread" not in plain.visits[0].maps
    (lesson,) = read_lessons(tmp_path / "P")
    small = NetworkSettings(features=(6, 8, 12), residual_units=0, spacing=(2.0, 2.0, 2.0))
    short = Training(steps=150, patch=(16, 24, 24), batch=2, rate=2.0e-2)
    train([lesson.tumour()], small, short).save(tmp_path / "tumour.pt")
    train_tissues([lesson.tissue(fat_suppressed=True)], small, short).save(tmp_path / "tissue.pt")
    words = ["quantify", str(tmp_path / "S"), "--no-motion", "--out", str(tmp_path / "Q"), "--region-weights",
             str(tmp_path / "tumour.pt"), "--tissue-weights", str(tmp_path / "tissue.pt")]  # fmt: skip
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    visit, old = read_maps(tmp_path / "Q" / "maps", 1), plain.visits[0]
    assert score_region(visit.region, old.region, visit.grid.spacing).dice > 0.8
    assert not np.array_equal(visit.region, old.region)
    healthy = old.organ & ~old.region
    difference = np.abs(visit.tissues["fibroglandular"] - old.tissues["fibroglandular"])[healthy]
    assert 0 < difference.mean() < 0.15
    edge = np.abs(visit["tumour_probability"].values - 0.5) < 0.1
    assert np.nanmin(visit["tumour_entropy"].values[edge]) > 0.9
    assert np.isnan(visit["tumour_entropy"].values[~visit.organ]).all()
    assert np.nanmax(visit["tissue_spread"].values) > 0.001
    assert any("Network for tumours" in note for note in visit.notes)
    assert any("Network for fibroglandular tissue" in note for note in visit.notes)
    assert "uncertainty of the tumour" in (tmp_path / "Q" / "quantify.html").read_text()


@pytest.mark.slow
def test_a_tissue_network_has_no_place_outside_of_a_breast(tmp_path):
    write_raw(small_patient(5), tmp_path / "S", SIEMENS_3T, visits=[1])
    text = (tmp_path / "S" / "study.json").read_text()
    (tmp_path / "S" / "study.json").write_text(text.replace('"organ": "breast"', '"organ": "brain"'))
    network = TissueNetwork(NetworkSettings(), NetworkSettings().build(), {"fat_suppressed": [True]})
    with pytest.raises(InputError, match="organ brain: tissues are told apart in a breast only"):
        quantify(
            Study.read(tmp_path / "S"), Settings(correct_motion=False, tissue=NetworkTissues(network)), Rigid()
        )  # fmt: skip
