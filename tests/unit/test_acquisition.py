"""Virtual acquisition: what the series hold, against the truth from which they were made."""

import json
import math
import tracemalloc
from dataclasses import fields, replace
from datetime import date

import numpy as np
import pytest
import xarray as xr
from scipy import ndimage

from biomodel.acquisition import GE_15T, PHILIPS_3T, SIEMENS_3T, ImagingFlaws, Motion, Protocol, acquire, write_raw
from biomodel.errors import InputError, OutputError
from biomodel.imaging.aif import input_from_mask, select_artery
from biomodel.imaging.bids import read_bids
from biomodel.imaging.concentration import concentration
from biomodel.imaging.dce import ExtendedTofts, fit
from biomodel.imaging.dwi import fit_adc
from biomodel.imaging.series import Kind
from biomodel.imaging.series_quality import check_series
from biomodel.imaging.t1 import SpoiledGradientEcho, vfa_nonlinear
from biomodel.scanner import Scan, observe
from biomodel.virtual import small_patient, virtual_patient


@pytest.fixture(scope="module")
def patient():
    return small_patient(3)


@pytest.fixture(scope="module")
def scanned(patient):
    return acquire(patient, 1, SIEMENS_3T)


def values(dataset, name, inside):
    return np.asarray(dataset[name].values, float)[inside]


def kinetics(acquired, protocol, inside):
    """Fit T1 and the extended Tofts model as an analysis would that knows the artery's plasma."""
    b1 = acquired.one(Kind.B1).data[0][inside] if protocol.b1_map else values(acquired.scanned, "B1", inside)
    t1 = vfa_nonlinear(acquired.one(Kind.VFA).signal(inside), protocol.vfa_angles, protocol.tr, b1=b1)
    dynamic = acquired.one(Kind.DCE)
    found = concentration(
        dynamic.signal(inside),
        t1["T1"],
        SpoiledGradientEcho(dynamic.flip_angle, dynamic.tr),
        protocol.relaxivity,
        range(protocol.baseline),
        b1=b1,
    )
    return t1, fit(found.values, dynamic.times, acquired.plasma, ExtendedTofts(), code=found.code)


@pytest.mark.parametrize("protocol", [SIEMENS_3T, GE_15T, PHILIPS_3T], ids=lambda protocol: protocol.vendor)
@pytest.mark.parametrize("visit", [1, 2])
def test_fits_of_noise_free_series_give_the_truth_back(patient, protocol, visit):
    quiet = replace(protocol.noiseless(), motion=Motion())
    acquired = acquire(patient, visit, quiet)
    assert np.array_equal(acquired.motion, np.eye(4)) == (visit == 1)
    truth = acquired.scanned
    # Without the artery, and voxels partly in it after a motion: where nothing leaks there is no rate to find.
    inside = (truth["body"].values > 0) & ~(truth["vp"].values > 0.3)
    t1, uptake = kinetics(acquired, quiet, inside)
    # Images are single precision; a fit of T1 has many times the relative error of a signal.
    np.testing.assert_allclose(t1["T1"], values(truth, "T10", inside), rtol=2e-5)
    np.testing.assert_allclose(t1["S0"], values(truth, "M0", inside), rtol=2e-5)
    # The trapezoidal rule of the simulation and the exact convolution of the fit differ by less than this.
    tumour = (truth["region"].values > 0)[inside]
    assert tumour.sum() > 100
    for name in ("Ktrans", "ve", "vp"):
        np.testing.assert_allclose(uptake[name][tumour], values(truth, name, inside)[tumour], atol=1e-5, rtol=0)
    np.testing.assert_allclose(uptake["Ktrans"], values(truth, "Ktrans", inside), atol=1e-4, rtol=0)
    diffusion = acquired.one(Kind.DWI)
    adc = fit_adc(diffusion.signal(inside), diffusion.b_values, directions=diffusion.directions)
    np.testing.assert_allclose(adc["ADC"], values(truth, "ADC", inside), rtol=1e-4)


def test_the_adc_is_that_of_the_scanner_module(patient):
    acquired = acquire(patient, 2, SIEMENS_3T)
    domain, visible = patient.patient.domain, patient.patient.cellularity.visible_fraction
    scan = Scan(repeatability_cv=0.0, voxel_cv=0.0, visible_fraction=visible)
    cells = patient.truth["cell_fraction"].values[1].astype(float)
    visit = observe(2, 0.0, cells, domain, scan, np.random.default_rng(0))
    own = acquired.truth.isel(dict(zip("zyx", acquired.box, strict=True)))
    np.testing.assert_allclose(own["ADC"].values[domain.mask], visit.adc[domain.mask], rtol=1e-5)
    np.testing.assert_array_equal(own["region"].values.astype(bool) & domain.mask, visit.region)
    for axis, positions in domain.coords.items():
        np.testing.assert_allclose(own[axis].values, positions)


@pytest.mark.parametrize("flaws", [None, ImagingFlaws()], ids=["matched", "mismatched"])
def test_noise_has_the_stated_level(patient, flaws):
    protocol = replace(SIEMENS_3T, flaws=flaws)
    acquired = acquire(patient, 1, protocol)
    assert acquired.noise["dce"] == pytest.approx(protocol.gain / protocol.snr)
    assert acquired.noise["dwi"] == pytest.approx(protocol.gain / protocol.dwi_snr)
    # Air: the mean square of a Rayleigh variable is 2 sigma². Correlated noise leaves fewer independent samples.
    air = acquired.scanned["body"].values == 0
    for kind in (Kind.ANATOMY, Kind.VFA, Kind.DCE):
        measured = np.sqrt(np.mean(acquired.one(kind).signal(air).astype(float) ** 2) / 2)
        assert measured == pytest.approx(acquired.noise[kind.value], rel=0.03)
    unweighted = acquired.one(Kind.DWI).data[0][air].astype(float)
    assert np.sqrt(np.mean(unweighted**2) / 2) == pytest.approx(acquired.noise["dwi"], rel=0.05)
    # Body: two images before the bolus differ by noise alone.
    body = (acquired.scanned["body"].values > 0) & (np.nan_to_num(acquired.scanned["fat_share"].values) < 0.5)
    first, second = (acquired.one(Kind.DCE).data[n][body].astype(float) for n in (0, 1))
    assert np.std(first - second) / math.sqrt(2) == pytest.approx(acquired.noise["dce"], rel=0.05)
    neighbours = np.corrcoef(*(acquired.one(Kind.ANATOMY).data[0][:4, -3:, part].ravel() for part in
                               (slice(0, -1), slice(1, None))))[0, 1]  # fmt: skip
    assert (neighbours > 0.2) == (flaws is not None)


def test_gland_has_the_stated_signal(patient):
    quiet = replace(SIEMENS_3T.noiseless(), receive_bias=0.0, b1_spread=0.0)
    acquired = acquire(patient, 1, quiet)
    gland = (acquired.scanned["fat_share"].values < 0.02) & (acquired.scanned["cell_fraction"].values < 1e-3)
    inside = np.zeros_like(gland)
    inside[acquired.box] = patient.patient.domain.mask
    assert (gland & inside).sum() > 50
    assert np.median(acquired.one(Kind.DCE).data[0][gland & inside]) == pytest.approx(quiet.gain, rel=0.1)
    assert np.median(acquired.one(Kind.DWI).data[0][gland & inside]) == pytest.approx(quiet.gain, rel=0.02)


def test_same_seed_same_images_and_each_purpose_has_its_stream(patient, scanned):
    again = acquire(patient, 1, SIEMENS_3T)
    for one, two in zip(scanned.series, again.series, strict=True):
        np.testing.assert_array_equal(one.data, two.data)
    xr.testing.assert_identical(scanned.truth, again.truth)
    for other in (acquire(patient, 1, SIEMENS_3T, seed=1), acquire(patient, 2, SIEMENS_3T)):
        assert not np.array_equal(other.one(Kind.DCE).data, scanned.one(Kind.DCE).data)
    # Other series, and another noise of diffusion, leave the dynamic one and the anatomy as they are.
    less = acquire(patient, 1, replace(SIEMENS_3T, vfa_angles=(3.0, 12.0), b1_map=False, b_values=(0.0, 900.0)))
    for kind in (Kind.DCE, Kind.ANATOMY):
        np.testing.assert_array_equal(less.one(kind).data, scanned.one(kind).data)
    with pytest.raises(InputError, match="no B1 map in this protocol"):
        less.one(Kind.B1)


def test_tissue_stays_with_the_patient_while_the_scan_is_new(patient):
    one, two = (acquire(patient, visit, SIEMENS_3T.noiseless()) for visit in (1, 2))
    assert one.haematocrit != two.haematocrit
    assert not np.allclose(one.scanned["receive"], two.scanned["receive"])
    never = (patient.truth["cell_fraction"].values < 1e-9).all(0) & patient.patient.domain.mask
    for name in ("T10", "Ktrans", "ve"):
        first, second = (a.truth[name].values[a.box][never] for a in (one, two))
        np.testing.assert_array_equal(first, second)


def centre(dataset, weights):
    """Centre of mass (x, y, z), mm."""
    weights = np.nan_to_num(weights)
    return np.array([float((dataset[axis] * weights.sum(tuple(n for n in range(3) if n != 2 - k))).sum())
                     for k, axis in enumerate("xyz")]) / weights.sum()  # fmt: skip


def test_the_motion_between_visits_is_known(patient):
    acquired = acquire(patient, 2, replace(SIEMENS_3T, motion=Motion(3.0, 5.0)))
    matrix = acquired.motion
    np.testing.assert_allclose(matrix[:3, :3] @ matrix[:3, :3].T, np.eye(3), atol=1e-12)
    assert np.linalg.det(matrix[:3, :3]) == pytest.approx(1.0)
    before, after = (
        centre(data, data["cell_fraction"].values.astype(float)) for data in (acquired.truth, acquired.scanned)
    )
    assert np.linalg.norm(after - before) > 1.0
    np.testing.assert_allclose(after, (matrix @ [*before, 1.0])[:3], atol=0.1)
    assert acquired.scanned.attrs["motion"] == matrix.ravel().tolist()


def test_the_motion_within_the_dynamic_series_is_known(patient):
    still = replace(SIEMENS_3T.noiseless(), phases=8, baseline=7)
    moving = replace(still, motion=Motion(0.0, 0.0, 3.0))
    one, two = (acquire(patient, 1, protocol) for protocol in (still, moving))
    assert not two.shifts[0].any() and not one.shifts.any()
    phase = int(np.argmax(np.linalg.norm(two.shifts[:7], axis=1)))
    assert np.linalg.norm(two.shifts[phase]) > 1.0
    # The same before the bolus but for the place: the tumour's bright part is where the shift says.
    still_image, moved_image = (a.one(Kind.DCE).data[phase].astype(float) for a in (one, two))
    steps = np.rint(two.shifts[phase] / two.series[0].grid.spacing).astype(int)
    near = np.roll(still_image, steps, (0, 1, 2))[4:-4, 4:-4, 4:-4]
    shown = moved_image[4:-4, 4:-4, 4:-4]
    assert np.corrcoef(near.ravel(), shown.ravel())[0, 1] > np.corrcoef(
        still_image[4:-4, 4:-4, 4:-4].ravel(), shown.ravel()
    )[0, 1]  # fmt: skip
    np.testing.assert_array_equal(one.one(Kind.VFA).data, two.one(Kind.VFA).data)


def truth_spacing(truth):
    return [float(np.diff(truth[axis].values[:2])[0]) for axis in "zyx"]


def test_uptake_follows_the_cells(patient):
    truth = acquire(patient, 1, SIEMENS_3T).truth
    region = truth["region"].values > 0
    cells, ve, ktrans = (values(truth, name, region) for name in ("cell_fraction", "ve", "Ktrans"))
    assert np.corrcoef(cells, ve)[0, 1] < -0.8
    depth = ndimage.distance_transform_edt(region, truth_spacing(truth))[region]
    assert np.median(ktrans[depth < 3]) > 1.15 * np.median(ktrans[depth > 7])
    for name, low, high in (("T10", 1.2, 2.0), ("Ktrans", 0.03, 1.0), ("ve", 0.1, 0.65), ("vp", 0.003, 0.2)):
        inside = values(truth, name, region)
        assert low < inside.min() and inside.max() < high
    early = (values(acquire(patient, n, SIEMENS_3T).truth, "Ktrans", region).mean() for n in (1, 2))
    assert next(early) > next(early)  # under treatment


def test_an_artery_can_be_found_in_the_images(patient, scanned):
    body = scanned.scanned["body"].values > 0
    dynamic = scanned.one(Kind.DCE)
    blood = values(scanned.scanned, "T10", body)
    curves = concentration(
        dynamic.signal(body), blood, SpoiledGradientEcho(dynamic.flip_angle, dynamic.tr), SIEMENS_3T.relaxivity,
        range(SIEMENS_3T.baseline), b1=values(scanned.scanned, "B1", body),
    )  # fmt: skip
    chosen = select_artery(curves.values, dynamic.times)
    artery = scanned.scanned["artery"].values[body] > 0
    assert artery.sum() > 200
    assert chosen.sum() >= 10 and artery[chosen].mean() > 0.9
    measured = input_from_mask(curves.values, chosen & artery, dynamic.times, scanned.haematocrit)
    expected = scanned.plasma.at(dynamic.times)
    late = dynamic.times > scanned.scanned.attrs["bolus_arrival_s"] + 60
    np.testing.assert_allclose(measured.plasma[late], expected[late], rtol=0.1)


def test_phases_before_the_bolus_have_no_agent(patient):
    for protocol in (SIEMENS_3T, GE_15T, PHILIPS_3T):
        acquired = acquire(patient, 1, protocol.noiseless())
        data = acquired.one(Kind.DCE).data
        for phase in range(1, protocol.baseline):
            np.testing.assert_array_equal(data[phase], data[0])
        assert not np.array_equal(data[protocol.baseline], data[0])


#: The kinds of series that each flaw changes.
TOUCHED = {
    "noise_length": {"anatomy", "vfa", "dce", "dwi"},
    "fat_pool": {"anatomy", "vfa", "dce"},
    "phase_average": {"dce"},
    "delay": {"dce"},
    "dispersion": {"dce"},
    "r2star": {"dce"},
    "perfusion": {"dwi"},
    "dwi_shift": {"dwi"},
}
NONE = {item.name: type(item.default)(0) for item in fields(ImagingFlaws)}


@pytest.mark.parametrize("flaw", sorted(NONE))
def test_each_flaw_changes_what_it_says_and_is_named(patient, flaw):
    protocol = replace(SIEMENS_3T, phases=12)
    only = ImagingFlaws(**(NONE | {flaw: getattr(ImagingFlaws(), flaw)}))
    assert only.present == (flaw,) and ImagingFlaws(**NONE).present == ()
    plain, none, flawed = (acquire(patient, 1, replace(protocol, flaws=f)) for f in (None, ImagingFlaws(**NONE), only))
    assert json.loads(flawed.truth.attrs["flaws"]) == {flaw: getattr(only, flaw)}
    changed = set()
    for one, zero, two in zip(plain.series, none.series, flawed.series, strict=True):
        np.testing.assert_array_equal(one.data, zero.data)
        if not np.array_equal(one.data, two.data):
            changed.add(one.kind.value)
    assert changed == TOUCHED[flaw]


def test_coarser_diffusion_images_lie_where_the_others_do(patient):
    fine, coarse = (
        acquire(patient, 1, replace(SIEMENS_3T.noiseless(), dwi_factors=factors)) for factors in ((1, 1, 1), (2, 1, 2))
    )
    one, two = fine.one(Kind.DWI), coarse.one(Kind.DWI)
    assert two.grid.spacing == (4.0, 2.0, 4.0)
    np.testing.assert_allclose(two.data[0][3, :, 5], one.data[0][6:8, :, 10:12].mean((0, 2)), rtol=1e-5)
    corner = (two.grid.affine @ [5, 0, 3, 1])[:3]
    np.testing.assert_allclose(corner, (one.grid.affine @ [10.5, 0, 6.5, 1])[:3])


def test_directions_are_kept_where_the_protocol_says(patient):
    series = acquire(patient, 1, PHILIPS_3T).one(Kind.DWI)
    assert series.samples == 1 + 3 * 3
    np.testing.assert_array_equal(series.directions[1:4], np.eye(3))


def test_flat_patients_have_flat_images():
    flat = virtual_patient(5, shape=(1, 48, 48), spacing=(2.0, 2.0, 2.0))
    acquired = acquire(flat, 2, SIEMENS_3T)
    assert acquired.one(Kind.DCE).grid.shape == (1, 56, 56)
    np.testing.assert_allclose(acquired.motion[2], [0.0, 0.0, 1.0, 0.0], atol=1e-12)
    assert not np.allclose(acquired.motion[:2, 3], 0.0)
    assert acquired.scanned["artery"].values.any()


def test_the_series_pass_the_check_of_raw_series(scanned):
    findings = [item for series in scanned.series for item in check_series(series)]
    assert not [item for item in findings if item.severity == "error"], findings
    assert not [item for item in findings if "missing" in item.message or "from sample" in item.message], findings


def test_memory_stays_near_the_size_of_the_series(patient):
    tracemalloc.start()
    acquired = acquire(patient, 2, SIEMENS_3T.mismatched())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Curves of four samples per phase are the largest part; without phase averaging it is a fourth of them.
    assert peak < 6 * sum(series.data.nbytes for series in acquired.series)


def test_a_study_is_written_and_read_back(patient, tmp_path):
    path = write_raw(patient, tmp_path / "study", [SIEMENS_3T, GE_15T], visits=[1, 3])
    study = json.loads(path.read_text())
    assert study["schema"] == "tumorcast/study/v1"
    assert [(visit["day"], visit["folder"]) for visit in study["visits"]] == [
        (patient.patient.visits[n].day, f"ses-{n + 1:02d}") for n in (0, 2)
    ]
    assert study["clinical"] == dict(patient.patient.clinical)
    assert study["cellularity"]["adc_w"] == {"value": 3e-3, "units": "mm^2/s"}
    doses = patient.patient.schedule.doses
    assert [entry["day"] for entry in study["treatments"]] == [dose.day for dose in doses]
    assert {entry["status"] for entry in study["treatments"]} == {dose.status for dose in doses}
    for number, protocol in ((1, SIEMENS_3T), (3, GE_15T)):
        expected = acquire(patient, number, protocol)
        intake = read_bids(path.parent / f"ses-{number:02d}", first_visit=date(1900, 1, 1))
        assert not [item for item in intake.findings if item.severity == "error"]
        assert len(intake.series) == len(expected.series)
        for series in expected.series:
            found = intake.one(series.kind)
            np.testing.assert_array_equal(found.data, series.data)
            assert found.grid.same_as(series.grid)
            assert found.vendor == series.vendor and found.sequence == series.sequence
            assert found.day == int(series.day)
            for name in ("times", "b_values", "flip_angles"):
                one, two = getattr(found, name), getattr(series, name)
                if series.kind is not Kind.ANATOMY:
                    assert (one is None) == (two is None)
                    np.testing.assert_allclose(one, two) if one is not None else None
        assert intake.one(Kind.DCE).contrast_agent == protocol.agent
        for name, dataset in ((f"visit{number}", expected.truth), (f"visit{number}_scanned", expected.scanned)):
            with xr.open_dataset(path.parent / "truth" / f"{name}.nc", engine="h5netcdf") as stored:
                np.testing.assert_array_equal(stored["Ktrans"].values, dataset["Ktrans"].values)
                np.testing.assert_allclose(stored.attrs["motion"], dataset.attrs["motion"])
    # Neither truth nor regions reach a reader of the folder.
    everything = read_bids(path.parent)
    assert {series.kind for series in everything.series} <= set(Kind) and len(everything.series) == 5 + 4
    assert not list(path.parent.rglob("*region*")) and not list(path.parent.rglob("*mask*"))


def test_dicom_gives_the_same_numbers(patient, tmp_path):
    pytest.importorskip("pydicom")
    from biomodel.imaging.dicom import read_dicom

    protocol = replace(SIEMENS_3T, phases=7, vfa_angles=(2.0, 15.0))
    path = write_raw(patient, tmp_path / "study", protocol, visits=[1], dicom=True)
    expected = acquire(patient, 1, protocol)
    intake = read_dicom(path.parent / "ses-01" / "dicom")
    for kind in (Kind.DCE, Kind.DWI, Kind.VFA, Kind.ANATOMY):
        np.testing.assert_array_equal(intake.one(kind).data, expected.one(kind).data)
    b1 = read_bids(path.parent / "ses-01").one(Kind.B1)
    np.testing.assert_array_equal(b1.data, expected.one(Kind.B1).data)


def test_folders_are_not_lost(patient, tmp_path):
    protocol = replace(SIEMENS_3T, phases=6)
    write_raw(patient, tmp_path / "study", protocol, visits=[1])
    with pytest.raises(OutputError, match="exists already"):
        write_raw(patient, tmp_path / "study", protocol, visits=[1])
    write_raw(patient, tmp_path / "study", protocol, visits=[1], overwrite=True)
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("kept")
    with pytest.raises(OutputError, match=r"holds no study\.json"):
        write_raw(patient, other, protocol, visits=[1], overwrite=True)


def test_what_cannot_be_scanned_is_refused(patient, tmp_path):
    with pytest.raises(InputError, match=r"visit 9; expected 1 to 4"):
        acquire(patient, 9, SIEMENS_3T)
    with pytest.raises(InputError, match="seed -1"):
        acquire(patient, 1, SIEMENS_3T, seed=-1)
    with pytest.raises(InputError, match="2 protocols for 1 visits"):
        write_raw(patient, tmp_path / "study", [SIEMENS_3T, GE_15T], visits=[1])
    with pytest.raises(InputError, match="rising numbers"):
        write_raw(patient, tmp_path / "study", SIEMENS_3T, visits=[2, 1])
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"field_strength": 7.0}, "field strength 7 T"),
        ({"agent": "gadolinium"}, "no agent"),
        ({"baseline": 1}, "1 phases before the bolus"),
        ({"baseline": 40}, "40 phases before the bolus"),
        ({"snr": 0.0}, "snr 0.0"),
        ({"receive_bias": -0.1}, "receive_bias -0.1"),
        ({"haematocrit": (45.0, 46.0)}, "haematocrit from 45"),
        ({"dwi_factors": (1, 0, 1)}, "dwi_factors"),
    ],
)
def test_impossible_protocols_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        replace(Protocol(), **change)


def test_impossible_motion_and_flaws_are_refused():
    with pytest.raises(InputError, match="Motion: rotation"):
        Motion(rotation=-1.0)
    with pytest.raises(InputError, match="ImagingFlaws: delay"):
        ImagingFlaws(delay=math.nan)
    with pytest.raises(InputError, match=r"perfusion 0\.7"):
        ImagingFlaws(perfusion=0.7)
