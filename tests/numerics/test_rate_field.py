"""A growth rate that is a map: tabulated flow against quadrature in every voxel; derivatives and their transpose."""

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.errors import SolverError
from biomodel.solvers.simulation import Simulation

SHAPE, TIMES = (8, 10, 12), [20.0, 40.0]


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])
    doses = bm.Schedule.weekly("paclitaxel", start=3.0, n=4, amount=80.0, units="mg/m^2", status="planned")
    simulation = bm.TorchSolver().build(model, bm.Domain.box(SHAPE, (2.0, 2.0, 2.0)), doses)
    u0 = torch.zeros(SHAPE, dtype=torch.float64)
    u0[2:6, 3:7, 4:9] = 0.5
    params = {
        "growth.k": torch.tensor(0.05 * np.exp(0.5 * rng.standard_normal(SHAPE))),
        "paclitaxel.efficacy": torch.tensor(0.1, dtype=torch.float64),
        "diffusion.D": torch.tensor(0.1, dtype=torch.float64),
    }
    return simulation, params, u0, simulation.plan(params, u0, TIMES), rng


def run(case):
    """States, gradients of a weighted sum by all parameters, tangents by two scalars."""
    simulation, params, u0, plan, _ = case
    live = {n: v.clone().requires_grad_() for n, v in params.items()}
    weight = torch.linspace(-1, 1, 2 * u0.numel(), dtype=torch.float64).reshape(1, 2, *SHAPE)
    u = simulation(live, u0, TIMES, plan=plan)
    gradients = torch.autograd.grad((u * weight).sum(), list(live.values()))
    wrt = ["paclitaxel.efficacy", "diffusion.D"]
    return u.detach(), *gradients, simulation.sensitivities(params, u0, TIMES, wrt, plan=plan)[1]


def test_equals_quadrature_in_every_voxel(case, monkeypatch):
    fast = run(case)
    monkeypatch.setattr(Simulation, "_tabulated", lambda self, values: False)
    for found, expected in zip(fast, run(case), strict=True):
        assert float((found - expected).abs().max() / expected.abs().max()) < 1e-11


def test_derivative_by_the_field_and_its_transpose(case):
    simulation, params, u0, plan, rng = case
    linear = simulation.linearise(params, u0, TIMES, plan=plan, rate=True)
    rate = torch.tensor(0.01 * rng.standard_normal((2, 1, *SHAPE)))
    start = torch.tensor(0.01 * rng.standard_normal((2, 1, *SHAPE)))
    pushed = linear.push(start, rate)
    step = 1e-4

    def moved(sign):
        here = {**params, "growth.k": params["growth.k"] + sign * step * rate[0, 0]}
        return simulation(here, u0 + sign * step * start[0, 0], TIMES, plan=plan)

    expected = (moved(1) - moved(-1)) / (2 * step)
    assert float((pushed[0] - expected).abs().max() / expected.abs().max()) < 1e-7
    cotangent = torch.tensor(rng.standard_normal(pushed.shape))
    to_start, to_rate = linear.pull_rate(cotangent)
    forth, back = float((pushed * cotangent).sum()), float((start * to_start).sum() + (rate * to_rate).sum())
    assert abs(forth - back) < 1e-11 * abs(forth)


def test_batch_of_fields_equals_single_runs(case):
    simulation, params, u0, plan, _ = case
    fields = torch.stack([params["growth.k"], 1.3 * params["growth.k"]])
    efficacy = torch.tensor([0.1, 0.07], dtype=torch.float64)
    together = simulation({**params, "growth.k": fields, "paclitaxel.efficacy": efficacy}, u0, TIMES, plan=plan)
    for n in range(2):
        alone = simulation({**params, "growth.k": fields[n], "paclitaxel.efficacy": efficacy[n]}, u0, TIMES, plan=plan)
        assert float((together[n] - alone[0]).abs().max()) < 1e-9


def test_a_number_is_no_field(case):
    simulation, params, u0, plan, _ = case
    with pytest.raises(SolverError, match="needs a growth law with a Bernoulli flow"):
        simulation.linearise({**params, "growth.k": 0.05}, u0, TIMES, plan=plan, rate=True)
