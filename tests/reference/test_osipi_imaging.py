"""T1, concentration, arterial inputs and DCE models against the reference data of OSIPI.

Data and official tolerances: ISMRM Open Science Initiative for Perfusion Imaging, task force 2.3, repository
OSIPI/DCE-DSC-MRI_CodeCollection (Apache-2.0), files test/*/data and test/*/*_data.py; van Houdt et al. 2024, Magn Reson
Med 91:1774, doi:10.1002/mrm.29826. Tolerances are a + r |reference|. The tighter bars are ours: what the best of the
collected implementations reach on the same files.
"""

import csv

import numpy as np
import pytest

from biomodel.imaging.aif import Georgiou, InputFunction, Parker
from biomodel.imaging.concentration import Relaxivity, concentration
from biomodel.imaging.dce import ExtendedTofts, Patlak, Tofts, fit
from biomodel.imaging.t1 import (
    InversionPrepared,
    SpoiledGradientEcho,
    fit_t1,
    vfa_linear,
    vfa_nonlinear,
)
from biomodel.imaging.voxelfit import Code

csv.field_size_limit(10**8)


def table(data_dir, name):
    with open(data_dir / "osipi" / name, encoding="utf-8-sig", newline="") as file:
        return [{k.strip(): v for k, v in row.items()} for row in csv.DictReader(file)]


def numbers(text):
    return np.array(text.split(), dtype=float)


def inside(found, reference, absolute, relative):
    """Distance in units of the tolerance."""
    return np.abs(found - reference) / (absolute + relative * np.abs(reference))


# --- DCE models ------------------------------------------------------------------------------------------------------


def errors(data_dir, name, model, curve, artery, truth):
    """Estimates minus truth (cases, parameters), and truth."""
    found, known = [], []
    for row in table(data_dir, name):
        times = numbers(row["t"])
        result = fit(numbers(row[curve])[None], times, InputFunction(times, numbers(row[artery])), model)
        assert result.code[0] in (Code.FITTED, Code.AT_BOUND)
        found.append(result.values[0])
        known.append([float(row[column]) for column in truth])
    return np.array(found) - np.array(known), np.array(known)


def test_tofts(data_dir):
    """25 curves of the QIBA object. Official: ve 0.05, Ktrans 0.005 + 1 % (10 % in later versions)."""
    off, truth = errors(data_dir, "DCEmodels/dce_DRO_data_tofts.csv", Tofts(), "C", "ca", ("Ktrans", "ve"))
    assert len(off) == 25
    assert (np.abs(off[:, 0]) <= 0.005 + 0.01 * truth[:, 0]).all() and (np.abs(off[:, 1]) <= 0.05).all()
    mean = np.abs(off).mean(0)
    assert mean[0] <= 8.0e-4 and mean[1] <= 7.3e-4, mean


def test_extended_tofts(data_dir):
    """15 curves of the anthropomorphic phantom. Official: ve 0.05, vp 0.0025 (later 0.025), Ktrans 0.005 + 1 %."""
    off, _ = errors(data_dir, "DCEmodels/dce_DRO_data_extended_tofts.csv", ExtendedTofts(), "C", "ca",
                    ("Ktrans", "ve", "vp"))  # fmt: skip
    assert len(off) == 15
    worst, mean = np.abs(off).max(0), np.abs(off).mean(0)
    assert worst[0] <= 0.005 and worst[1] <= 0.05 and worst[2] <= 0.002, worst
    assert mean[0] <= 3.1e-4 and mean[1] <= 6.3e-4 and mean[2] <= 2.8e-4, mean


def test_extended_tofts_with_delay(data_dir):
    """The official test's delayed curves: shifted by five samples. Official tolerance of the delay: 0.2 s.

    With little plasma (tumour voxel 3) and noise the curves do not tell the delay to 0.2 s: its standard deviation is
    up to 0.6 s there, so three of them are allowed where they are more. The other parameters keep their tolerances.
    """
    for row in table(data_dir, "DCEmodels/dce_DRO_data_extended_tofts.csv"):
        times, curve = numbers(row["t"]), numbers(row["C"])
        shifted = np.concatenate([np.zeros(5), curve[:-5]])
        found = fit(
            shifted[None], times, InputFunction(times, numbers(row["ca"])), ExtendedTofts(), delay=(-10.0, 10.0)
        )
        off = found.values[0] - [float(row["Ktrans"]), float(row["ve"]), float(row["vp"]), 5.0]
        allowed = [0.005, 0.05, 0.0025, max(0.2, 3 * found.sd("delay")[0])]
        assert (np.abs(off) <= allowed).all(), (row["label"], off)
        if "highSNR" in row["label"]:
            assert abs(off[3]) <= 0.03


def test_patlak(data_dir):
    """9 curves. Official: vp 0.0025, PS 0.005 + 1 % (0.025 and 10 % in later versions)."""
    off, truth = errors(data_dir, "DCEmodels/patlak_sd_0.02_delay_0.csv", Patlak(), "C_t", "cp_aif", ("ps", "vp"))
    assert len(off) == 9
    assert (np.abs(off[:, 0]) <= 0.005 + 0.01 * truth[:, 0]).all() and (np.abs(off[:, 1]) <= 0.0025).all(), off


# --- T1 --------------------------------------------------------------------------------------------------------------

T1_FILES = ("t1_brain_data.csv", "t1_quiba_data.csv", "t1_prostate_data.csv")


def vfa_cases(data_dir, name):
    """Signals (voxels, angles), angles, TR in s, reference R1 in 1/s, rows of a file; the units differ between them."""
    rows = table(data_dir, f"T1_mapping/{name}")
    signal = np.stack([numbers(row["s"]) for row in rows])
    (angles,), (tr,) = {row["FA"] for row in rows}, {numbers(row["TR"])[0] for row in rows}
    if name == "t1_prostate_data.csv":
        return signal, numbers(angles), tr / 1000, np.array([1000 / float(row["T1 nonlinear"]) for row in rows]), rows
    factor = 1000 if name == "t1_quiba_data.csv" else 1
    return signal, numbers(angles), tr, np.array([factor * float(row["R1"]) for row in rows]), rows


def column(rows, name, factor=1.0):
    return np.array([factor * float(row[name]) for row in rows])


def test_t1_nonlinear(data_dir):
    """171 voxels. Official: R1 within 0.05/s + 5 %."""
    off = []
    for name in T1_FILES:
        signal, angles, tr, r1, _ = vfa_cases(data_dir, name)
        found = vfa_nonlinear(signal, angles, tr)
        assert (found.code == Code.FITTED).all()
        assert (inside(1 / found["T1"], r1, 0.05, 0.05) <= 1).all(), name
        off += list(1 / found["T1"] - r1)
    assert len(off) == 171
    assert np.abs(off).mean() <= 0.0062


def test_t1_linear(data_dir):
    """As the official tests, which expect one prostate voxel of low signal to fail against the nonlinear reference."""
    failed = []
    for name in T1_FILES:
        signal, angles, tr, r1, rows = vfa_cases(data_dir, name)
        found = vfa_linear(signal, angles, tr)
        failed += [rows[i]["label"] for i in np.flatnonzero(inside(1 / found["T1"], r1, 0.05, 0.05) > 1)]
    assert failed == ["Pat5_voxel5_prostaat"]
    # The prostate file, which was read last, has results of a linear fit besides.
    np.testing.assert_allclose(found["T1"], column(rows, "T1 linear", 1e-3), rtol=1e-4)
    np.testing.assert_allclose(found["S0"], column(rows, "s0 linear"), rtol=1e-4)


def test_t1_with_b1(data_dir):
    """The prostate file has results with B1, from another program."""
    signal, angles, tr, _, rows = vfa_cases(data_dir, "t1_prostate_data.csv")
    found = vfa_nonlinear(signal, angles, tr, b1=column(rows, "B1", 0.01))
    np.testing.assert_allclose(found["T1"], column(rows, "T1 nonlinear B1cor", 1e-3), rtol=1e-4)
    np.testing.assert_allclose(found["S0"], column(rows, "s0 nonlinear B1cor"), rtol=1e-4)


def test_t1_and_b1_of_a_phantom(data_dir):
    """Three flip angles and two inversion-prepared volumes of a phantom of tubes in one fluid.

    Data: SEPAL (Thrippleton et al., Apache-2.0). Nothing tells the true T1 here, but the fluid is one: a flip-angle
    factor that is right removes most of the spread of T1 that its profile across the phantom causes.
    """
    import nibabel as nib

    names = ("TI_168ms", "TI_1068ms", "FA2", "FA5", "FA12")
    volumes = [np.asarray(nib.load(data_dir / "vfa_t1" / f"{n}.nii.gz").dataobj)[78, ::2, ::2] for n in names]
    signal = np.stack([v.ravel() for v in volumes], 1).astype(float)
    signal = signal[signal[:, 3] > 80]
    echoes = [SpoiledGradientEcho(a, 5.4e-3) for a in (2.0, 5.0, 12.0)]
    prepared = [InversionPrepared(t, 5.0, 5.4e-3, 160) for t in (0.168, 1.068)]
    both = fit_t1(signal, [*prepared, *echoes], fit_b1=True)
    alone = fit_t1(signal[:, 2:], echoes)
    fluid = (both["T1"] > 0.45) & (both["T1"] < 0.6)
    assert fluid.mean() > 0.7 and (both.code[fluid] == Code.FITTED).all()
    spread = [np.diff(np.percentile(f["T1"][fluid], [16, 84]))[0] / np.median(f["T1"][fluid]) for f in (both, alone)]
    assert spread[0] < 0.5 * spread[1], spread
    assert 0.9 < np.median(both["B1"][fluid]) < 1.1


# --- Signal to concentration -----------------------------------------------------------------------------------------


def test_concentration(data_dir):
    """5 curves. Official: 1e-5 + 1e-5 relative. The baseline of the reference leaves out the first sample."""
    rows = table(data_dir, "SI_to_Conc/SI2Conc_data.csv")
    assert len(rows) == 5
    for row in rows:
        acquisition = SpoiledGradientEcho(float(row["FA"]), float(row["TR"]))
        baseline = np.arange(1, int(row["numbaselinepts"]))
        found = concentration(
            numbers(row["s"])[None], float(row["T1base"]), acquisition, Relaxivity(float(row["r1"])), baseline
        )
        assert found.code[0] == Code.FITTED
        np.testing.assert_allclose(found.values[0], numbers(row["conc"]), rtol=1e-5, atol=1e-5)


# --- Population inputs -----------------------------------------------------------------------------------------------


def curves(data_dir, name):
    """label -> (times in s, reference, delay in s)."""
    found = {}
    for row in table(data_dir, f"PopulationAIF_DCE/{name}"):
        entry = found.setdefault(row["label"], ([], [], float(row.get("delay", 0))))
        entry[0].append(60 * float(row["time"]))
        entry[1].append(float(row["Cb"]))
    return {k: (np.array(t), np.array(c), d) for k, (t, c, d) in found.items()}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("ParkerAIF_ref.csv", Parker), ("ParkerAIF_ref_with_delay.csv", Parker), ("GeorgiouAIF_ref.csv", Georgiou)],
)
def test_population_inputs(data_dir, name, kind):
    """Official: 1e-4 mM + 1 %; here 1e-4 alone."""
    cases = curves(data_dir, name)
    assert len(cases) >= 7
    for label, (times, reference, delay) in cases.items():
        np.testing.assert_allclose(kind(arrival=delay).blood(times), reference, rtol=0, atol=1e-4, err_msg=label)


# --- A real region from signal to parameters -------------------------------------------------------------------------


def test_patlak_of_a_real_region(data_dir):
    """Brain, 32 volumes of 39.6 s: a per cent or two of plasma and next to no leakage.

    Data: SEPAL (Thrippleton et al., Apache-2.0): spoiled gradient echo of 15° and 3.4 ms, gadobutrol at 3 T. There is
    no truth; the wide ranges see to the units from signals to parameters.
    """
    read = {n: np.load(data_dir / "dce_roi" / f"{n}.npy") for n in
            ("signal_tissue", "signal_vif", "t1_tissue", "t1_vif", "k_tissue", "k_vif")}  # fmt: skip
    times = 39.6 * (np.arange(32) + 0.5)
    acquisition, agent = SpoiledGradientEcho(15.0, 0.0034), Relaxivity(5.0)
    curves = [
        concentration(read[f"signal_{w}"][None], read[f"t1_{w}"], acquisition, agent, range(3), b1=read[f"k_{w}"])
        for w in ("tissue", "vif")
    ]
    assert all(c.code[0] == Code.FITTED for c in curves)
    aif = InputFunction.from_blood(times, curves[1].values[0], 0.45)
    found = fit(curves[0].values, times, aif, Patlak())
    assert found.code[0] == Code.FITTED
    assert 0 < found["PS"][0] < 1e-3 and 0.005 < found["vp"][0] < 0.03
    assert found.sd("PS")[0] < 2e-4 and found.sd("vp")[0] < 0.2 * found["vp"][0]
