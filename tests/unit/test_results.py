"""Results hold what the forecast holds, agree with their schema, and survive the disk to the last bit."""

import json
import os
import stat
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

import biomodel as bm
import data_schemas
from biomodel.errors import InputError, OutputError
from biomodel.findings import Finding, Findings
from biomodel.results import Results, results
from biomodel.virtual import Scan, virtual_patient

FINDINGS = Findings("P014", (Finding("warning", "plausibility", "v1_adc.nii.gz", "Low ADC.", "Look at it."),))


@pytest.fixture(scope="module")
def full(imaged):
    return results(imaged.forecast, imaged.patient, imaged.what_if, FINDINGS)


def test_summary_follows_its_schema(full, imaged, volumes):
    schema = data_schemas.load("summary")
    jsonschema.Draft202012Validator.check_schema(schema)
    for one in (full, results(imaged.forecast), results(volumes.forecast, volumes.patient, volumes.what_if)):
        jsonschema.validate(one.summary, schema, cls=jsonschema.Draft202012Validator)


def test_summary_agrees_with_the_arrays(full, imaged):
    data = full.data()
    for name in ("volume", "cells", "longest_diameter"):
        for row in full.summary["forecast"]["quantities"][name]["quantiles"]:
            draws = data[name].sel(time=row["day"]).values
            for level in (0.05, 0.25, 0.5, 0.75, 0.95):
                assert row[f"{level:g}"] == pytest.approx(np.quantile(draws, level), rel=1e-7)
    assert [row["probability"] for row in full.summary["forecast"]["none_detectable"]] == [
        pytest.approx(float((data["volume"].values[:, i] == 0).mean())) for i in range(3)
    ]
    seen = full.summary["observations"]
    assert [row["role"] for row in seen] == ["calibration", "calibration", "later", "later"]
    assert [row["volume_cm3"] for row in seen] == [
        pytest.approx(imaged.patient.volume_of(visit)) for visit in imaged.patient.visits
    ]
    scores = full.data("scores")
    assert len(full.summary["scores"]) == scores.sizes["entry"] == 6
    assert {row["predictor"] for row in full.summary["scores"]} == {"forecast", "carry-forward", "exponential volume"}


def test_treatments_that_the_forecast_did_not_know_are_named(full, imaged, volumes):
    # the record marks paclitaxel planned and, after the second visit, fractions given
    (note,) = [note for note in full.summary["notes"] if "marked given after day 20" in note]
    assert "assumes what is marked planned" in note and "5" not in note
    assert note not in imaged.forecast.notes and note not in imaged.forecast.fit.patient.notes
    assert note not in results(imaged.forecast).summary["notes"]
    assert note in results(volumes.forecast, volumes.patient).summary["notes"]
    planned = replace(imaged.patient, schedule=imaged.patient.until(2).schedule)
    assert note not in results(imaged.forecast, planned).summary["notes"]


def test_observed_maps_lie_on_the_box(full, imaged):
    seen, box = full.data("observations"), imaged.forecast.box
    assert np.array_equal(seen["region"].values[0], imaged.patient.visits[0].region[box])
    inside = seen["region"].values[1]
    adc = imaged.patient.visits[1].adc[box][inside]
    assert seen["cell_fraction_observed"].values[1][inside] == pytest.approx((3e-3 - adc) / 2.5e-3, rel=1e-5)
    assert np.isnan(seen["cell_fraction_observed"].values[3]).all()  # nothing seen, no map


def test_baselines_are_those_of_the_scores(full):
    curves = full.data("curves")
    rows = {(row["predictor"], row["day"]): row["volume"] for row in full.summary["scores"]}
    assert float(curves["carry_forward"].sel(day=90.0)) == pytest.approx(rows["carry-forward", 90.0])
    assert float(curves["exponential_volume"].sel(day=90.0)) == pytest.approx(rows["exponential volume", 90.0])
    assert np.isnan(curves["carry_forward"].sel(day=[0.0, 15.0])).all()


def test_drawn_parameters_are_those_of_the_forecast(full, imaged):
    found = full.data("parameters")
    drawn = imaged.forecast.fit.draw(imaged.forecast.draws, imaged.forecast.seed)
    for index, name in enumerate(found["name"].values):
        assert np.array_equal(found["draws"].values[:, index], drawn[name])


def test_alternatives_are_compared_draw_by_draw(full, imaged):
    less, more = full.summary["what_if"]
    plan = imaged.forecast["volume"].values[:, -1]
    for row, (_, other) in zip((less, more), imaged.what_if, strict=True):
        alternative = other["volume"].values[:, -1]
        assert row["less_volume"] == pytest.approx(np.mean(alternative < plan))
        assert row["same_volume"] == pytest.approx(np.mean(alternative == plan))
    assert less["fewer_cells"] == 0.0 and more["fewer_cells"] == 1.0
    assert less["schedule"] == [] and more["schedule"] != full.summary["schedule"]


def test_draws_that_an_alternative_lacks_are_left_out(imaged):
    label, other = imaged.what_if[1]
    fewer = replace(other, data=other.data.isel(draw=slice(3, None)), curves=other.curves.isel(draw=slice(3, None)))
    found = results(imaged.forecast, what_if=[(label, fewer)])
    assert np.isnan(found.data("what_if/0")["volume"].values[:3]).all()
    assert found.summary["what_if"][0]["fewer_cells"] == 1.0


def test_without_a_record_nothing_is_scored(imaged):
    found = results(imaged.forecast)
    assert found.summary["scores"] == [] and found.summary["findings"] is None
    assert found.summary["patient"]["outcome"] is None and len(found.summary["observations"]) == 2


def test_without_images(volumes):
    found = results(volumes.forecast, volumes.patient)
    assert found.summary["patient"]["grid"] is None and "region" not in found.data("observations")
    assert set(found.summary["forecast"]["quantities"]) == {"volume", "measured_volume"}
    assert found.summary["patient"]["detection_floor_cm3"] == 0.05
    chance = found.summary["forecast"]["none_detectable"][-1]["probability"]
    assert chance == pytest.approx(np.mean(volumes.forecast["volume"].values[:, -1] < 0.05))


def test_written_and_read_back(full, volumes, tmp_path):
    for name, one in (("images", full), ("volumes", results(volumes.forecast, volumes.patient, volumes.what_if))):
        one.write(tmp_path / name)
        again = Results.read(tmp_path / name)
        assert again.summary == one.summary
        assert again.tree.identical(one.tree)
        assert sorted(path.name for path in (tmp_path / name).iterdir()) == ["forecast.nc", "summary.json"]


def test_maps_lose_no_more_than_a_ten_thousandth(full, imaged):
    given, kept = imaged.forecast["cell_fraction"].values, full.data()["cell_fraction"].values
    assert np.abs(kept - given).max() <= 1.3e-4 * given.max() and (kept[given == 0] == 0).all()
    assert np.all(np.abs(kept - given) <= 1.3e-4 * given)


def test_the_summary_knows_no_clock_and_no_place(full, imaged, tmp_path):
    texts = []
    for name in ("a", "b/c"):
        results(imaged.forecast, imaged.patient, imaged.what_if, FINDINGS).write(tmp_path / name)
        texts.append((tmp_path / name / "summary.json").read_bytes())
    assert texts[0] == texts[1]
    assert os.fsencode(tmp_path) not in texts[0] and os.fsencode(os.getcwd()) not in texts[0]
    assert json.loads(texts[0]) == full.summary


def test_two_whole_runs_give_the_same_summary(tmp_path):
    """From the virtual patient to the file, twice."""
    for name in ("first", "second"):
        flat = virtual_patient(
            3, shape=(1, 20, 20), spacing=(2.0, 2.0, 2.0), scan=Scan(), visit_days=[0, 14, 28]
        ).patient
        treatments = [bm.Chemotherapy(agent) for agent in flat.schedule.agents]
        fit = bm.calibrate(bm.ReactionDiffusion(treatments=treatments), flat.until(2), method=bm.MAP(starts=1))
        forecast = bm.forecast(fit, times=[14.0, 28.0], draws=12, seed=4)
        results(forecast, flat).write(tmp_path / name)
    first, second = ((tmp_path / name / "summary.json").read_bytes() for name in ("first", "second"))
    assert first == second
    assert json.loads(first)["patient"]["virtual"] is True


def test_another_patient_is_refused(imaged, make_imaged):
    with pytest.raises(InputError, match="the forecast is for patient P014 .* the observed one is P015"):
        results(imaged.forecast, make_imaged.patient("P015"))


def test_an_alternative_that_does_not_match_is_refused(imaged, make_imaged):
    other = make_imaged.forecast(imaged.patient)
    for wrong in (other, replace(other, fit=imaged.forecast.fit, seed=8)):
        with pytest.raises(InputError, match="what-if 'x': is not of the same fit, seed and last day"):
            results(imaged.forecast, what_if=[("x", wrong)])


@pytest.mark.parametrize("name", ["summary.json", "forecast.nc"])
def test_missing_and_damaged_files(full, tmp_path, name):
    full.write(tmp_path / "out")
    whole = (tmp_path / "out" / name).read_bytes()
    (tmp_path / "out" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{name} cannot be read .* Run 'tumorcast forecast' again"):
        Results.read(tmp_path / "out")
    (tmp_path / "out" / name).unlink()
    with pytest.raises(InputError, match=f"no {name} in this folder"):
        Results.read(tmp_path / "out")


def test_changed_files_are_told(full, tmp_path):
    full.write(tmp_path)
    changed = {**full.summary, "notes": ["another"]}
    (tmp_path / "summary.json").write_text(json.dumps(changed))
    with pytest.raises(InputError, match="are not of one run or were changed"):
        Results.read(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({**changed, "extra": 1}))
    with pytest.raises(InputError, match=r"summary.json, extra: .* expected tumorcast/summary/v1"):
        Results.read(tmp_path)


def test_unwritable_output_leaves_nothing(full, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="cannot be written"):
        full.write(tmp_path / "file" / "out")
    (tmp_path / "taken" / "summary.json").mkdir(parents=True)
    with pytest.raises(OutputError, match="is a folder"):
        full.write(tmp_path / "taken")
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["summary.json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(full, tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(OutputError, match="You may not write there"):
            full.write(tmp_path / "out")
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_failure_while_writing_keeps_the_old_files(full, imaged, tmp_path, monkeypatch):
    full.write(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    later = results(imaged.forecast)
    monkeypatch.setattr("xarray.DataTree.to_netcdf", full_disk)
    with pytest.raises(OutputError, match="The disk is full"):
        later.write(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
