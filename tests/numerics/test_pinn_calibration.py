"""Calibration of a patient by a network beside `Laplace`, and forecasts that solve anew."""

import dataclasses

import numpy as np
import pytest

import biomodel as bm
import pinn
from biomodel.domain import Domain
from biomodel.errors import CalibrationError, SolverError
from biomodel.patient import CellularitySettings, Patient, Visit
from biomodel.schedule import Schedule
from biomodel.truth import refine

SETTINGS = CellularitySettings(3.0e-3, 0.6e-3, repeatability_cv=0.05, voxel_cv=0.05, visible_fraction=0.1)
TRUE = {"growth.k": 0.05, "diffusion.D": 0.1, "paclitaxel.efficacy": 0.08}
MODEL = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])
DAYS = (0.0, 10.0, 20.0, 35.0)


def make_patient(shape=(1, 1, 40), finer=4, radius=None):
    """A patient whose truth is solved on a finer grid, along the last axes of a box; the organ is it or a ball."""
    rng = np.random.default_rng(0)
    axes = [i for i, n in enumerate(shape) if n > 1]
    factor = [finer if i in axes else 1 for i in range(3)]
    coarse = Domain.box(shape, (1.5,) * 3)
    place = np.meshgrid(*(coarse.coords[a] - coarse.coords[a].mean() for a in "zyx"), indexing="ij")
    mask = np.ones(shape, bool) if radius is None else sum(p**2 for p in place) < radius**2
    fine = Domain.box(tuple(n * f for n, f in zip(shape, factor, strict=True)), tuple(1.5 / f for f in factor),
                      refine(mask, factor))  # fmt: skip
    place = list(np.meshgrid(*(fine.coords[a] - fine.coords[a].mean() for a in "zyx"), indexing="ij"))
    if radius is not None:
        place[-1] = place[-1] - radius + 8  # the tumour touches the organ's edge
    u0 = fine.mask * 0.7 / (1 + np.exp((np.sqrt(sum(p**2 for p in place)) - 9) / 1.5))
    schedule = Schedule.weekly("paclitaxel", 1.5, 3, 80, "mg/m^2")
    states = [u0, *bm.TorchSolver(rtol=1e-5).build(MODEL, fine, schedule)(TRUE, u0, DAYS[1:])[0].numpy()]
    visits = []
    for number, (day, u) in enumerate(zip(DAYS, states, strict=True), 1):
        u = u.reshape([k for n, f in zip(shape, factor, strict=True) for k in (n, f)]).mean((1, 3, 5))
        adc = (3.0e-3 - 2.4e-3 * u) * (1 + 0.05 * rng.standard_normal(u.shape))
        visits.append(Visit(number=number, day=day, adc=adc, region=u >= 0.1))
    domain = Domain.box(shape, (1.5,) * 3, mask)
    return Patient("virtual", "breast", domain, tuple(visits), schedule, cellularity=SETTINGS)


@pytest.fixture(scope="module")
def fits():
    patient = make_patient().until(visit=3)
    return bm.calibrate(MODEL, patient, method=pinn.LMPinn()), bm.calibrate(MODEL, patient)


def test_the_posterior_is_that_of_the_classical_fit(fits):
    network, classical = fits
    assert isinstance(network, pinn.PinnFit) and network.method == "LMPinn" and network.converged
    assert network.names == classical.names
    # The voxels' grid is the classical solver's error alone, which it infers and the network has not.
    compared = [i for i, n in enumerate(network.names) if n != "grid.error"]
    off = ((network.z - classical.z) / classical.sd)[compared]
    print("off the classical fit (posterior sd):", dict(zip(np.array(network.names)[compared], off, strict=True)))
    assert np.abs(off).max() < 0.5
    assert np.allclose(network.sd[compared], classical.sd[compared], rtol=0.15)


def test_the_forecast_solves_anew(fits):
    network, _ = fits
    assert isinstance(network.solver, bm.TorchSolver)
    days = [20.0, 35.0]
    gap = network.gap_at(days)
    print("gap", gap)
    assert gap.relative.max() < 0.05
    own, solved = network.states(days), network.solved(days)
    assert own.shape == solved.shape == (2, *(s.stop - s.start for s in network.box))
    assert np.linalg.norm(own - solved) > 0
    # Without noise in start and parameters a forecast's one draw is the classical solution at the MAP estimate.
    quiet = dataclasses.replace(network.patient, cellularity=dataclasses.replace(SETTINGS, voxel_cv=0.0))
    point = dataclasses.replace(network, covariance=np.zeros_like(network.covariance), patient=quiet)
    maps = bm.forecast(point, times=days, draws=1)["cell_fraction"].values[0]
    assert np.allclose(maps.sum((1, 2, 3)), solved.sum((1, 2, 3)), rtol=2e-3)


def test_a_large_gap_is_warned_about_with_its_cause():
    patient = make_patient().until(visit=3)
    method = pinn.LMPinn(network=pinn.PinnSolver(rtol=1e-2, hidden=(10,)), largest_gap=1e-5)
    with pytest.warns(pinn.GapWarning, match="differ by .* from those of TorchSolver .*residual is"):
        fit = bm.calibrate(MODEL, patient, method=method)
    assert any("differ by" in note for note in fit.notes)


def test_refusals():
    patient = make_patient().until(visit=3)
    with pytest.raises(CalibrationError, match="no images.*Laplace"):
        bm.calibrate(MODEL, patient.without_images(), method=pinn.LMPinn())
    mask = np.ones(patient.domain.shape, bool)
    mask[..., 3] = False
    halves = dataclasses.replace(patient, domain=Domain.box(patient.domain.shape, (1.5,) * 3, mask=mask))
    with pytest.raises(SolverError, match="2 components .*TorchSolver"):
        bm.calibrate(MODEL, halves, method=pinn.LMPinn())
    with pytest.raises(CalibrationError, match="at least two visits"):
        bm.calibrate(MODEL, patient.until(visit=1), method=pinn.LMPinn())


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "radius"), [((1, 24, 26), None), ((1, 32, 32), 22.0)], ids=["box", "organ"])
def test_two_dimensions(shape, radius):
    patient = make_patient(shape, 2, radius).until(visit=3)
    network, classical = bm.calibrate(MODEL, patient, method=pinn.LMPinn()), bm.calibrate(MODEL, patient)
    compared = [network.names.index(n) for n in MODEL.free]
    off = ((network.z - classical.z) / classical.sd)[compared]
    print("off the classical fit (posterior sd):", off, "gap", network.gap)
    assert np.abs(off).max() < 0.5
    assert network.gap.relative.max() < 0.05
