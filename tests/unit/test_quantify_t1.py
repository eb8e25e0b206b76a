"""T1 of a visit: flip angles, inversion recovery, inversion-prepared trains and mixtures, and what headers must say."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from biomodel.acquisition import GE_15T, Motion, acquire, write_raw
from biomodel.errors import InputError, UnitError
from biomodel.imaging.bids import read_bids
from biomodel.imaging.bids_write import write_bids
from biomodel.imaging.series import Grid, Kind, Series
from biomodel.imaging.series_train import Train, TrainTiming
from biomodel.imaging.t1 import InversionPrepared, InversionRecovery
from biomodel.quantify.study import Study
from biomodel.quantify.t1_map import acquisitions, t1_map
from biomodel.quantify.visit import Settings, measure
from biomodel.virtual import small_patient

GRID = Grid((6, 12, 10), (4.0, 4.0, 4.0))
INSIDE = np.ones(GRID.shape, bool)
TR, ANGLE, TRAIN, DELAY = 0.0054, 5.0, Train(120, 0.0054), 0.1
ANGLES = (2.0, 12.0)
#: Inversion times to the centre of k-space: 0.2 and 1.1 s to the first pulse.
TIMES = 0.5 * 120 * 0.0054 + np.array([0.2, 1.1])
CYCLES = TIMES + 0.5 * 120 * 0.0054 + DELAY


def echo(r1, b1, angle, tr=TR):
    """A spoiled gradient echo by its recursion."""
    turn, m = np.deg2rad(angle) * b1, np.ones_like(r1)
    for _ in range(3000):
        m = 1 + (m * np.cos(turn) - 1) * np.exp(-tr * r1)
    return m * np.sin(turn)


def prepared(r1, b1, first):
    """A train after an inversion, pulse by pulse, over cycles until nothing changes."""
    turn, m = np.deg2rad(ANGLE) * b1, np.ones_like(r1)
    for _ in range(30):
        m = 1 + (-m - 1) * np.exp(-first * r1)
        for pulse in range(TRAIN.pulses):
            if pulse == TRAIN.pulses // 2:
                seen = np.abs(m) * np.sin(turn)
            m = 1 + (m * np.cos(turn) - 1) * np.exp(-TRAIN.spacing * r1)
        m = 1 + (m - 1) * np.exp(-DELAY * r1)
    return seen


def tissue():
    rng = np.random.default_rng(0)
    t1 = rng.uniform(0.3, 2.0, GRID.shape)
    place = np.linspace(-1, 1, 12)[None, :, None]
    return t1, np.broadcast_to(1.0 - 0.15 * place, GRID.shape), rng.uniform(800, 1200, GRID.shape)


def flips(t1, b1, scale):
    images = [scale * echo(1 / t1, b1, angle) for angle in ANGLES]
    return Series(Kind.VFA, np.array(images), GRID, flip_angles=ANGLES, tr=TR, te=0.002, name="flips")


def inversions(t1, b1, scale, **change):
    images = [scale * prepared(1 / t1, b1, first) for first in (0.2, 1.1)]
    known = {"flip_angles": ANGLE, "inversion_times": TIMES, "cycles": CYCLES, "train": TRAIN, "tr": TR, "te": 0.002}
    return Series(Kind.INVERSION, np.array(images), GRID, name="inversions", **(known | change))


def test_trains_and_flip_angles_give_t1_and_the_flip_angle():
    t1, b1, scale = tissue()
    found = t1_map([flips(t1, b1, scale), inversions(t1, b1, scale)], INSIDE)
    assert found.fitted and found.method.endswith("B1 fitted") and "flip angle was fitted" in found.notes[0]
    # Smoothing flattens the slope towards the rim, where it sees one side only.
    np.testing.assert_allclose(found.b1, b1, atol=0.04)
    np.testing.assert_allclose(found.fit["T1"], t1[INSIDE], rtol=0.09)
    assert np.median(np.abs(found.fit["T1"] / t1[INSIDE] - 1)) < 0.02
    known = t1_map([flips(t1, b1, scale), inversions(t1, b1, scale)], INSIDE, b1)
    np.testing.assert_allclose(known.fit["T1"], t1[INSIDE], rtol=1e-4)
    assert not known.fitted and known.notes == ()
    alone = t1_map([flips(t1, b1, scale)], INSIDE)
    assert np.median(np.abs(alone.fit["T1"] / t1[INSIDE] - 1)) > 0.1 and "No B1 map" in alone.notes[0]


def test_through_files_and_back(tmp_path):
    t1, b1, scale = tissue()
    for series in (flips(t1, b1, scale), inversions(t1, b1, scale)):
        write_bids(series, tmp_path, "sub-1")
    intake = read_bids(tmp_path)
    found = intake.one(Kind.INVERSION)
    assert found.train == TRAIN and found.samples == 2
    np.testing.assert_allclose(found.inversion_times, TIMES)
    np.testing.assert_allclose(found.cycles, CYCLES)
    first, second = acquisitions(found)
    assert isinstance(first, InversionPrepared) and first.delay == pytest.approx(DELAY)
    assert (first.inversion_time, second.inversion_time) == pytest.approx((0.2, 1.1))
    one = t1_map([intake.one(Kind.VFA), found], INSIDE, b1)
    np.testing.assert_allclose(one.fit["T1"], t1[INSIDE], rtol=1e-4)


def test_inversion_recovery_alone_and_beside_flip_angles():
    t1, b1, scale = tissue()
    times = np.array([0.1, 0.4, 1.0, 2.5])
    images = [0.1 * scale * np.abs(1 - 2 * np.exp(-t / t1) + np.exp(-4 / t1)) for t in times]
    series = Series(Kind.INVERSION, np.array(images), GRID, inversion_times=times, tr=4.0, flip_angles=90.0)
    found = t1_map([series, flips(t1, b1, scale)], INSIDE)
    assert "alone" in found.notes[0] and found.b1 is None
    np.testing.assert_allclose(found.fit["T1"], t1[INSIDE], rtol=1e-4)
    # A measured flip angle is for the concentrations; T1 needs none here.
    assert t1_map([series], INSIDE, b1).b1 is not None
    np.testing.assert_array_equal(t1_map([series], INSIDE, 0.5 * b1).fit["T1"], t1_map([series], INSIDE).fit["T1"])
    cycled = replace(series, tr=0.005, cycles=np.full(4, 4.0), flip_angles=None)
    assert acquisitions(cycled)[0] == InversionRecovery(0.1, 4.0)
    assert "no flip angle" in t1_map([cycled], INSIDE).notes[-1]


def test_two_inversion_times_of_another_scale_do_not_disturb_flip_angles():
    t1, b1, scale = tissue()
    data = np.ones((2, *GRID.shape))
    series = Series(Kind.INVERSION, data, GRID, inversion_times=[0.1, 1.0], tr=4.0, flip_angles=90.0)
    found = t1_map([flips(t1, b1, scale), series], INSIDE, b1)
    np.testing.assert_allclose(found.fit["T1"], t1[INSIDE], rtol=1e-4)
    assert "left out" in found.notes[0]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"train": None}, InputError, "inversions: inversion-prepared, flip angle 5°, .* without number of pulses"),
        ({"cycles": None}, InputError, "without time from inversion to inversion .RepetitionTimePreparation."),
        ({"flip_angles": None}, InputError, "without flip angle"),
        ({"flip_angles": 50.0}, InputError, "inversions: inversion-prepared: the flip angle of the train is 50"),
        ({"inversion_times": [0.168, 1.068]}, InputError, "begin before the inversion.*'first pulse'"),
        ({"cycles": [0.9, 1.5]}, InputError, "1.5 s from inversion to inversion, but .* take 1.748 s"),
        ({"cycles": [900.0, 1500.0]}, UnitError, "900 to 1500 from inversion to inversion; expected s"),
    ],
)
def test_headers_that_say_too_little_or_cannot_be(change, kind, message):
    t1, b1, scale = tissue()
    with pytest.raises(kind, match=message):
        t1_map([flips(t1, b1, scale), inversions(t1, b1, scale, **change)], INSIDE)


def test_flip_angles_that_fall_between():
    t1, b1, scale = tissue()
    with pytest.raises(InputError, match="inversions: inversion recovery: the repetition time TR is 0.0054"):
        t1_map([inversions(t1, b1, scale, train=None, cycles=None, flip_angles=90.0)], INSIDE)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Train(0, 0.005), "0 pulses"),
        (lambda: Train(100, 5.4), "spacing 5.4 s; expected the time from pulse to pulse"),
        (lambda: Train(100, 0.005, 1.5), "centre 1.5"),
        (lambda: TrainTiming(TRAIN), "either 'cycle'"),
        (lambda: TrainTiming(TRAIN, cycle=2.0, delay=0.1), "either 'cycle'"),
        (lambda: TrainTiming(TRAIN, delay=-1.0), "delay -1"),
    ],
)
def test_trains_that_cannot_be(made, message):
    with pytest.raises(InputError, match=message):
        made()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"NumberShots": [10, 20, 30]}, "NumberShots .10.0, 20.0, 30.0.; expected"),
        ({"RepetitionTimeExcitation": None}, "NumberShots without RepetitionTimeExcitation"),
        ({"RepetitionTimeExcitation": 5.4}, "spacing 5.4 s"),
    ],
)
def test_sidecars_that_cannot_be(tmp_path, change, message):
    write_bids(inversions(*tissue()), tmp_path, "sub-1")
    for path in tmp_path.rglob("*.json"):
        data = json.loads(path.read_text()) | change
        path.write_text(json.dumps({name: value for name, value in data.items() if value is not None}))
    intake = read_bids(tmp_path)
    assert not intake.series
    with pytest.raises(InputError, match=message):
        intake.one(Kind.INVERSION)


def test_trains_that_differ(tmp_path):
    write_bids(inversions(*tissue()), tmp_path, "sub-1")
    path = sorted(tmp_path.rglob("*.json"))[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"NumberShots": 80}))
    with pytest.raises(InputError, match="trains of pulses differ"):
        read_bids(tmp_path).one(Kind.INVERSION)


# --- through a study --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """One visit without a B1 map, two flip angles, and inversion-prepared images by the same scanner."""
    pytest.importorskip("SimpleITK", reason="needs the extra 'imaging'")
    folder = tmp_path_factory.mktemp("study") / "S"
    protocol = replace(GE_15T, vfa_angles=(3.0, 15.0), b1_spread=0.1, snr=100.0, motion=Motion(0.0, 0.0, 0.0))
    virtual = small_patient(5)
    write_raw(virtual, folder, protocol, visits=[1])
    seen = acquire(virtual, 1, protocol)
    scanned = {name: seen.scanned[name].values.astype(float) for name in ("T10", "M0", "B1")}
    body = np.isfinite(scanned["T10"])
    r1, b1 = 1 / scanned["T10"][body], scanned["B1"][body]
    images = np.zeros((2, *body.shape), np.float32)
    noise = np.random.default_rng(3)
    for image, first in zip(images, (0.2, 1.1), strict=True):
        image[body] = scanned["M0"][body] * prepared(r1, b1, first)
        image[:] = np.hypot(image + noise.normal(0, 2.5, body.shape), noise.normal(0, 2.5, body.shape))
    series = Series(
        Kind.INVERSION, images, seen.one(Kind.VFA).grid, flip_angles=ANGLE, inversion_times=[0.2, 1.1], tr=TR,
        te=protocol.te, field_strength=1.5, vendor="GE", name="prepared",
    )  # fmt: skip
    write_bids(series, folder / "ses-01", "sub-x")
    data = json.loads((folder / "study.json").read_text())
    data["visits"][0]["inversion_train"] = {
        "pulses": TRAIN.pulses, "spacing": {"value": 5.4, "units": "ms"}, "delay": {"value": DELAY, "units": "s"},
        "inversion_time_to": "first pulse",
    }  # fmt: skip
    (folder / "study.json").write_text(json.dumps(data))
    return folder, seen


@pytest.fixture
def study(raw, tmp_path):
    return shutil.copytree(raw[0], tmp_path / "S")


def edit(study, change):
    data = json.loads((study / "study.json").read_text())
    change(data["visits"][0])
    (study / "study.json").write_text(json.dumps(data))


def test_a_study_whose_train_is_in_its_manifest(raw, study):
    _, seen = raw
    region = seen.truth["region"].values.astype(bool)

    def median(maps, name):
        return np.nanmedian(maps[name].values[region])

    (visit,) = Study.read(study).visits
    maps = measure(visit, visit.read(), "breast", Settings(correct_motion=False))
    assert any("flip angle was fitted" in note for note in maps.notes) and "inversion-prepared" in maps["T1"].method
    for path in (study / "ses-01" / "anat").glob("*IRT1*"):
        path.unlink()
    edit(study, lambda visit: visit.pop("inversion_train"))
    (visit,) = Study.read(study).visits
    nominal = measure(visit, visit.read(), "breast", Settings(correct_motion=False))
    true = {name: np.median(seen.scanned[name].values[region]) for name in ("T10", "B1", "Ktrans")}
    assert abs(true["B1"] - 1) > 0.05  # or the test would show nothing
    assert abs(median(maps, "B1") / true["B1"] - 1) < 0.02
    assert abs(median(maps, "T1") / true["T10"] - 1) < 0.03
    assert abs(median(nominal, "T1") / true["T10"] - 1) > 0.08


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda v: v["inversion_train"].pop("spacing"), InputError, "study.json.*spacing"),
        (lambda v: v["inversion_train"].update(pulses=0), InputError, "study.json.*pulses"),
        (lambda v: v["inversion_train"].update(spacing={"value": 5.4, "units": "mm"}), UnitError,
         "study.json: visit 1, inversion_train, spacing: units 'mm'"),
        (lambda v: v["inversion_train"].update(spacing={"value": 5.4, "units": "s"}), UnitError,
         "study.json: visit 1, inversion_train: inversion train: spacing 5.4 s"),
        (lambda v: v["inversion_train"].pop("delay"), InputError, "either 'cycle'"),
    ],
)  # fmt: skip
def test_manifests_that_cannot_be(study, change, kind, message):
    edit(study, change)
    with pytest.raises(kind, match=message):
        Study.read(study)


def test_a_train_of_nothing(study):
    for path in (study / "ses-01" / "anat").glob("*IRT1*"):
        path.unlink()
    with pytest.raises(InputError, match="visit 1: inversion_train in study.json, but no inversion-prepared series"):
        Study.read(study).visits[0].read()


def test_inversion_times_that_end_elsewhere(study):
    edit(study, lambda visit: visit["inversion_train"].pop("inversion_time_to"))
    (visit,) = Study.read(study).visits
    with pytest.raises(InputError, match="begin before the inversion"):
        measure(visit, visit.read(), "breast", Settings(correct_motion=False))
