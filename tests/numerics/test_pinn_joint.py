"""Start, parameters and noise at once, by network and classical solver; refusals; forecasts. Most in one dimension."""

import dataclasses
import warnings

import numpy as np
import pytest

import biomodel as bm
import virtual_starts as virtual
from biomodel.errors import CalibrationError
from biomodel.schedule import Dose
from biomodel.truth import Hazard, average, integrate
from pinn import (
    Cells,
    DataWarning,
    Foci,
    FreeStart,
    GapWarning,
    JointProblem,
    Observation,
    Outline,
    PinnSolver,
    chained,
    choose_start,
    forecast_joint,
    infer_joint,
    resampled,
)
from pinn.joint.forecast import volume_within
from pinn.joint.posterior import ROUGH

LINE = bm.Domain.box((1, 1, 40), (2.0, 2.0, 2.0))
MODEL = bm.ReactionDiffusion(bm.Logistic(bm.LogNormal(0.06, 0.5)), bm.Isotropic(bm.LogNormal(0.2, 0.7)))
TRUE = {"growth.k": 0.07, "diffusion.D": 0.25}
DAYS, NOISE = (8.0, 20.0, 30.0), 0.03


def states(places, days=(*DAYS, 45.0), fine=4):
    """Truth (T, 1, 1, 40) from foci (place, peak, width) at day 0, on voxels a quarter as wide."""
    x = (np.arange(40 * fine) + 0.5) * 2.0 / fine - 1.0
    u0 = 1 - np.prod([1 - a * np.exp(-((x - p) ** 2) / (2 * s**2)) for p, a, s in places], 0)
    run = integrate(u0[None, None, None], np.ones((1, 1, 40 * fine), bool), np.full((1, 1, 40 * fine), 0.25),
                    (2.0, 2.0, 2.0 / fine), 0.07, Hazard.none(), days)  # fmt: skip
    return np.stack([average(u, (1, 1, fine))[0] for u in run])


ONE, TWO = [(34.0, 0.4, 5.0)], [(26.0, 0.5, 5.0), (54.0, 0.3, 4.0)]


def asked(solver=ROUGH, places=ONE, start=None, seed=0, modalities=("cells", "outline", "cells"), model=MODEL):
    truth, rng, seen = states(places), np.random.default_rng(seed), []
    for day, u, kind in zip(DAYS, truth, modalities, strict=False):
        if kind == "cells":
            seen.append(Observation(day, u + NOISE * rng.standard_normal(u.shape), Cells()))
        else:
            seen.append(Observation(day, (u + 0.04 * rng.standard_normal(u.shape) > 0.25) * 1.0, Outline()))
    return JointProblem(model, LINE, bm.Schedule(), start or Foci(1), 0.0, seen, solver)


@pytest.fixture(scope="module")
def fits():
    classical = infer_joint(asked())
    network = infer_joint(asked(PinnSolver(rtol=3e-3, frequencies=5, hidden=(12, 12))), begin=classical.z)
    return classical, network


def test_gradient_and_curvature():
    """The gradient against differences of the objective; at the truth's own data the curvature is near the Hessian."""
    posed = asked(bm.TorchSolver(rtol=1e-6))
    z = posed.prior.mean.copy()
    z[posed.cut[1]] = [33.0, -0.3, np.log(5.2)]
    linear, h = posed.linearise(z), 1e-4
    assert linear.objective == pytest.approx(posed.objective(z), rel=1e-9)
    slopes = [(posed.objective(z + e) - posed.objective(z - e)) / (2 * h) for e in h * np.eye(len(z))]
    assert np.allclose(slopes, linear.gradient, rtol=2e-3, atol=2e-3 * np.abs(slopes).max())
    assert np.linalg.eigvalsh(linear.hessian).min() > -1e-8 * np.abs(linear.hessian).max()


def test_truth_lies_within_the_posterior(fits):
    for fit in fits:
        assert fit.converged and list(fit.values)[:2] == ["growth.k", "diffusion.D"]
        for name, true in {**TRUE, "focus1.x": 34.0, "focus1.peak": 0.4, "focus1.width": 5.0, "cells.noise": NOISE,
                           "outline.threshold": 0.25}.items():  # fmt: skip
            i = fit.problem.names.index(name)
            if name.split(".")[1] == "x":
                off = (fit.z[i] - true) / fit.sd[i]
            else:
                low, high = fit.interval(0.68)[name]
                off = np.log(fit.values[name] / true) / (np.log(high / low) / 2)
            assert abs(off) < 3.0, (name, off)
        assert max(fit.shrinkage[n] for n in TRUE) < 0.7


def test_network_and_classical_solver_agree(fits):
    classical, network = fits
    off = (network.z - classical.z) / classical.sd
    print("network off the classical optimum (posterior sd):", dict(zip(network.problem.names, off, strict=True)))
    # Two millimetres are coarse for this front: the classical grid accounts for part of it.
    assert np.abs(off).max() < 0.5
    assert np.allclose(network.sd, classical.sd, rtol=0.2)


def test_importance_sampling_against_quadrature():
    """With all but the growth rate known, the posterior is one-dimensional and can be summed up."""
    tight = Foci(1, peak=bm.LogitNormal(0.4, 1e-3), width=bm.LogNormal(5.0, 1e-3), spread=0.25)
    model = MODEL.with_priors({"diffusion.D": bm.Fixed(0.25)})
    posed = asked(start=tight, modalities=("cells",), model=model)
    found = resampled(infer_joint(posed), draws=512)
    grid = np.linspace(-4, 4, 81) * found.sd[0] + found.z[0]
    # Place and noise are nearly independent of the rate: they stay at their optimum.
    z = np.tile(found.z, (81, 1))
    z[:, 0] = grid
    logs = np.array([-posed.objective(row) for row in z])
    logs -= 0.5 * ((grid - posed.prior.mean[0]) / posed.prior.sd[0]) ** 2
    weights = np.exp(logs - logs.max())
    weights /= weights.sum()
    mean, sd = weights @ grid, np.sqrt(weights @ (grid - weights @ grid) ** 2)
    sampled = found.samples.weights @ found.samples.z[:, 0]
    assert found.samples.ess > 150
    assert abs(sampled - mean) < 0.2 * sd
    assert np.sqrt(found.samples.covariance[0, 0]) == pytest.approx(sd, rel=0.15)
    assert found.samples.log_evidence == pytest.approx(found.log_evidence, abs=0.5)


def test_outlines_alone_tell_the_growth_and_say_what_they_do_not(fits):
    """Six edges in one dimension show how fast the tumour grows, not how steep its front is."""
    with pytest.warns(DataWarning, match="tell nothing of diffusion.D"):
        fit = infer_joint(asked(modalities=("outline",) * 3))
    fit = resampled(fit)
    low, high = fit.interval(0.99)["growth.k"]
    assert low < TRUE["growth.k"] < high
    wide, narrow = (f.shrinkage["growth.k"] for f in (fit, fits[0]))
    assert narrow < wide < 0.95


def test_what_cannot_be_known_is_refused():
    posed = asked()
    early, single = posed.observations[0], [posed.observations[1]]

    def again(**changes):
        return dataclasses.replace(posed, **changes)

    with pytest.raises(CalibrationError, match="cells of day 8: it lies before the start of day 10"):
        again(start_day=10.0)
    with pytest.raises(CalibrationError, match="nothing of growth.k, diffusion.D can be known"):
        again(observations=[early], start_day=8.0)
    with pytest.raises(CalibrationError, match="outline|single visit tells .*D / k"):
        again(observations=single)
    with pytest.raises(CalibrationError, match="none; give at least one"):
        again(observations=[])
    with pytest.raises(CalibrationError, match="shape"):
        again(domain=bm.Domain.box((1, 1, 30), (2.0, 2.0, 2.0)))
    with pytest.raises(CalibrationError, match="two different modalities are called 'cells'"):
        again(observations=[early, Observation(20.0, early.values, Cells(bm.LogNormal(0.1, 0.1)))])
    treated = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Radiotherapy()])
    with pytest.raises(CalibrationError, match="the model has treatments .radiotherapy., and states jump"):
        again(model=treated, schedule=None)
    with pytest.warns(DataWarning, match="schedule is empty"):
        again(model=treated, schedule=bm.Schedule())
    # One parameter can be known from a single visit after the start, when the others are fixed.
    again(observations=single, model=MODEL.with_priors({"growth.k": bm.Fixed(0.07)}))


def test_a_fall_without_a_known_treatment_is_warned_about():
    posed = asked()
    dense = posed.observations[2].values
    seen = [Observation(8.0, dense, Cells()), Observation(30.0, 0.4 * dense, Cells())]
    with pytest.warns(DataWarning, match="cells falls by .* between days 8 and 30.*no treatment"):
        dataclasses.replace(posed, observations=seen)
    schedule = bm.Schedule(doses=[Dose(10.0, "paclitaxel", 80.0, "mg/m^2")])
    treated = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataclasses.replace(posed, observations=seen, schedule=schedule, model=treated)


def test_data_that_tell_nothing_say_so():
    posed = asked()
    noise = np.random.default_rng(0).standard_normal(LINE.shape)
    seen = [Observation(d, 0.5 * noise[..., ::s], Cells(bm.LogNormal(0.5, 0.05))) for d, s in ((8.0, 1), (20.0, -1))]
    with pytest.warns(DataWarning, match="tell nothing of .*diffusion.D"):
        found = infer_joint(dataclasses.replace(posed, observations=seen))
    assert any("tell nothing" in n for n in found.notes)


def test_the_evidence_finds_two_foci():
    found = choose_start(asked(places=TWO), [Foci(1), Foci(2)])
    assert found.problem.start.count == 2
    places = sorted(v for n, v in found.values.items() if n.endswith(".x"))
    assert places == pytest.approx([26.0, 54.0], abs=1.5)
    assert choose_start(asked(places=ONE), [Foci(1), Foci(2)]).problem.start.count == 1


@pytest.mark.slow
def test_a_free_start_and_its_chains():
    found = infer_joint(asked(places=TWO, start=FreeStart()))
    assert len(found.z) > 8
    with_chains = chained(found, chains=24, steps=60)
    again = chained(found, chains=24, steps=60)
    assert np.array_equal(with_chains.samples.z, again.samples.z)
    truth = states(TWO, (0.0, 45.0))
    forecast = forecast_joint(with_chains, [0.0, 45.0], draws=60)
    error = np.linalg.norm(forecast.mean - truth, axis=(1, 3)).ravel() / np.linalg.norm(truth, axis=(1, 3)).ravel()
    print("start and forecast, relative error:", error)
    assert error[1] < 0.1
    low, high = (forecast.mean - 4 * forecast.sd)[1], (forecast.mean + 4 * forecast.sd)[1]
    assert ((truth[1] > low) & (truth[1] < high)).mean() > 0.9


def test_the_forecast_solves_anew(fits):
    network = resampled(fits[1])
    forecast = forecast_joint(network, [30.0, 45.0], draws=100)
    truth = states(ONE)[-2:]
    error = np.linalg.norm(forecast.solved - truth) / np.linalg.norm(truth)
    print("forecast error", error, "gap", forecast.gap)
    assert error < 0.1 and forecast.gap.relative.max() < 0.05
    assert forecast.own.shape == forecast.solved.shape == (2, *LINE.shape)
    low, high = forecast.interval(0.99)
    volume = volume_within(truth, forecast.level, LINE.spacing)
    assert (low < volume).all() and (volume < high).all()
    assert np.allclose(forecast.cells.mean(0), truth.sum((1, 2, 3)) * LINE.voxel_volume, rtol=0.1)
    with pytest.warns(GapWarning, match="network's own cell fractions differ"):
        forecast_joint(network, [30.0, 45.0], draws=5, largest_gap=1e-6)
    with pytest.raises(CalibrationError, match="before the start"):
        forecast_joint(network, [-1.0], draws=5)


def test_volumes_are_counted_between_voxels():
    patient = virtual.Patient(3)
    assert volume_within(patient.truth, virtual.VISIBLE, virtual.SPACING) == pytest.approx(patient.volume, rel=0.01)


@pytest.mark.slow
def test_two_dimensions_by_the_network():
    patient = virtual.Patient(5)
    kinds = (Cells(virtual.NOISE), Outline(virtual.THRESHOLD, virtual.EDGE))
    seen = [Observation(day, values, kind) for day, *both in patient.visits
            for values, kind in zip(both, kinds, strict=True) if values is not None]  # fmt: skip
    model = bm.ReactionDiffusion(priors=virtual.PRIORS)
    start = Foci(1, virtual.PEAK, virtual.WIDTH)
    fit = infer_joint(JointProblem(model, patient.domain, bm.Schedule(), start, 0.0, seen))
    off = [(fit.z[i] - np.log(patient.values[n])) / fit.sd[i] for i, n in enumerate(fit.problem.parameters)]
    print("off the truth (posterior sd):", off)
    assert fit.converged and np.abs(off).max() < 3
