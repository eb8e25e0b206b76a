"""Volumes on the well-mixed domain: closed forms, batches, derivatives and the noise."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.calibration.volumes import VolumeModel, VolumeNoise, measured, volume_parameters
from biomodel.errors import CalibrationError
from biomodel.parameters import Parameter, SoftplusNormal
from biomodel.terms import NoGrowth

PLAN = bm.Schedule.weekly("paclitaxel", 1.5, 6, 80, "mg/m^2")


@dataclass(frozen=True)
class NumericalLogistic(bm.Logistic):
    """Logistic growth that hides its closed form."""

    flow = None


def patient(days, volumes, schedule=PLAN, floor=0.05):
    return bm.Patient.from_volumes("V", days, volumes, schedule, floor=floor)


def build(model, patients, days, floor=0.05):
    return VolumeModel(model, volume_parameters(model, 10.0), patients, days, np.atleast_1d(floor), bm.TorchSolver())


def exposure(day, decay):
    lag = np.clip(day - np.array([d.day for d in PLAN.doses]), 0, None)
    return float(((1 - np.exp(-decay * lag)) / decay).sum())


def test_exponential_growth_and_doses_have_their_closed_form():
    model = bm.ReactionDiffusion(bm.Exponential(), bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel")])
    days = np.array([0.0, 10.0, 33.3])
    volumes = build(model, [patient(days, [9, 8, 7])], days)
    names = list(volumes.parameters)
    values = {"growth.k": 0.02, "paclitaxel.efficacy": 0.1, "initial.volume": 12.0}
    z = torch.tensor(np.array([[volumes.parameters[n].prior.to_z(np.float64(values[n])) for n in names]]))
    expected = [12 * np.exp(0.02 * t - 0.1 * exposure(t, 0.35)) for t in days]
    np.testing.assert_allclose(volumes.volumes(z)[0], expected, rtol=1e-12)
    np.testing.assert_allclose(volumes(z)[0], np.log(np.array(expected) + 0.05), rtol=1e-12)


@pytest.mark.parametrize("growth", [bm.Logistic(), bm.Gompertz(), NumericalLogistic()])
def test_a_batch_of_patients_equals_them_one_by_one(growth):
    """Patients of one batch have their own days, treatments and floors; draws of all of them come rows fastest."""
    model = bm.ReactionDiffusion(growth, bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel")])
    people = [patient([0, 20, 40], [9, 8, 7], floor=0.05), patient([3, 11, 60], [2, 2, 1], PLAN.shift(2.0), 0.2),
              patient([0, 20, 40], [9, 8, 7], bm.Schedule(), 0.1)]  # fmt: skip
    days, floor = np.array([measured(p)[0] for p in people]), np.array([p.volumes.floor for p in people])
    together = build(model, people, days, floor)
    assert together.rows == 3
    z = np.random.default_rng(0).normal(0, 0.3, (3, 5, 4)) + [p.prior.location for p in together.parameters.values()]
    found = together.draws(z)
    assert found.shape == (3, 5, 3)
    for i, one in enumerate(people):
        alone = build(model, [one], days[i], floor[i])
        # The steps of a numerical law are those of the fastest member of its batch.
        tolerance = 1e-4 if growth == NumericalLogistic() else 1e-10
        np.testing.assert_allclose(found[i], alone.draws(z[i : i + 1])[0], rtol=tolerance)
    if growth == NumericalLogistic():
        closed = build(bm.ReactionDiffusion(bm.Logistic(), bm.NoDiffusion(), model.treatments), people, days, floor)
        np.testing.assert_allclose(found, closed.draws(z), rtol=1e-4)


def test_patients_on_one_protocol_share_a_row_but_not_their_floor():
    model = bm.ReactionDiffusion(NoGrowth(), bm.NoDiffusion(), [bm.Chemotherapy("paclitaxel")])
    people = [patient([0, 20], [9, 8], floor=f) for f in (0.05, 0.3)]
    shared = build(model, people, np.tile([0.0, 20.0], (2, 1)), [0.05, 0.3])
    assert shared.rows == 1
    z = np.random.default_rng(0).normal(0, 0.3, (2, 4, 2)) + [-2.5, 2.0]
    for i, floor in enumerate((0.05, 0.3)):
        alone = build(model, people[i : i + 1], np.array([0.0, 20.0]), floor)
        np.testing.assert_allclose(shared.draws(z)[i], alone.draws(z[[i]])[0])


def test_large_batches_are_evaluated_in_parts(monkeypatch):
    model = bm.ReactionDiffusion(bm.Gompertz(), bm.NoDiffusion())
    days = np.array([[0.0, 20.0], [0.0, 30.0]])
    people = [patient(d, [9, 8], bm.Schedule()) for d in days]
    z = np.random.default_rng(1).normal(0, 0.3, (2, 7, 3)) + [-4.0, 2.0, 5.0]
    whole = build(model, people, days).draws(z)
    monkeypatch.setattr("biomodel.calibration.volumes.BATCH", 5)
    np.testing.assert_array_equal(build(model, people, days).draws(z), whole)


@pytest.mark.parametrize("growth", [NoGrowth(), bm.Exponential(), bm.Logistic(), bm.Gompertz(), NumericalLogistic()])
def test_derivatives_agree_with_differences(growth):
    drugs = bm.Combination(("paclitaxel",), (SoftplusNormal(0.06, 1.0, 0.03),))
    model = bm.ReactionDiffusion(growth, bm.NoDiffusion(), [drugs])
    people = [patient([0, 20, 70], [9, 8, 7]), patient([2, 11, 60], [2, 2, 1])]
    volumes = build(model, people, np.array([[0, 20.0, 70], [2, 11.0, 60]]))
    z = np.random.default_rng(2).normal(0, 0.5, (2, len(volumes.parameters)))
    z += [p.prior.location for p in volumes.parameters.values()]
    value, slope = volumes.jacobian(z)
    np.testing.assert_allclose(value, volumes.draws(z[:, None])[:, 0])
    for k in range(z.shape[1]):
        step = 1e-5 * np.eye(z.shape[1])[k]
        difference = (volumes.jacobian(z + step)[0] - volumes.jacobian(z - step)[0]) / 2e-5
        np.testing.assert_allclose(slope[..., k], difference, rtol=1e-6, atol=1e-8)


def test_a_draw_beyond_the_bounds_is_set_onto_them():
    model = bm.ReactionDiffusion(NoGrowth(), bm.NoDiffusion())
    volumes = build(model, [patient([0, 20], [9, 8], bm.Schedule())], np.array([0.0, 20.0]))
    np.testing.assert_allclose(volumes.volumes(torch.tensor([[500.0]]))[0], 1e5)


def test_softplus_prior_is_a_monotone_change_of_coordinate():
    prior = SoftplusNormal(0.06, 1.3, 0.025)
    z = np.linspace(-35, 700, 200)
    value = prior.to_value(z)
    assert (np.diff(value) > 0).all() and (value > 0).all()
    np.testing.assert_allclose(prior.to_z(value[z > -15]), z[z > -15], rtol=1e-9)
    assert prior.quantile(0.5) == pytest.approx(0.06)
    again = prior.at(prior.location, 0.7)
    assert (again.median, again.sigma, again.unit) == (pytest.approx(0.06), 0.7, 0.025)
    Parameter("efficacy", "1/day", prior, (1e-6, 20.0))


def test_noise_follows_the_visits():
    noise = VolumeNoise((0.0, 21.0, 84.0), (0.2, 0.4, 0.3), 8.0)
    np.testing.assert_allclose(noise.at(np.array([0.0, 21.0, 84.0, 200.0])), [0.2, 0.4, 0.3, 0.3])
    assert noise.at(np.array([10.5]))[0] == pytest.approx(np.sqrt(0.2 * 0.4))
    plain = VolumeNoise.of(patient([0, 1], [1, 1]).volumes)
    assert plain.scale[0] == pytest.approx(np.sqrt(np.log1p(0.04))) and plain.df == 8.0
    with pytest.raises(CalibrationError, match="one positive scale per day"):
        VolumeNoise((0.0,), (0.2, 0.3), 8.0)
