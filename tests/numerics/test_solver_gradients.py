"""Gradients of the torch solver: finite differences, discrete adjoint, tangents, checkpoints and both kernels."""

import dataclasses

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.schedule import Fraction, Schedule
from biomodel.solvers.kernels import NumbaKernels, TorchKernels, rkc_bound, rkc_coefficients, rkc_stages
from biomodel.terms import Growth

TIMES = [10.0, 30.0]


@dataclasses.dataclass(frozen=True)
class ThetaLogistic(Growth):
    """A law without closed form: k u (1 - u²)."""

    k: bm.LogNormal = bm.LogNormal(0.05, 0.4)

    @property
    def parameters(self):
        from biomodel.parameters import Parameter

        return (Parameter("k", "1/day", self.k, (1e-6, 2.0)),)

    def rate(self, u, p, c, ops):
        return p["k"] * u * (1 - u * u)


CASES = {
    "logistic": (bm.Logistic(), bm.Isotropic(), None),
    "gompertz": (bm.Gompertz(), bm.Isotropic(), None),
    "exponential": (bm.Exponential(), bm.Isotropic(), None),
    "tissues": (bm.Logistic(), bm.TissueDiffusion(("a", "b")), None),
    "drug map": (bm.Logistic(), bm.Isotropic(), "a"),
    "no closed form": (ThetaLogistic(), bm.Isotropic(), None),
}


def build(case: str, memory: float = 1e9, resistant=None):
    growth, diffusion, drug_map = CASES[case]
    rng = np.random.default_rng(0)
    shape = (5, 8, 9)
    tissues = {"a": rng.random(shape), "b": rng.random(shape)}
    mask = np.ones(shape, bool)
    mask[2, 3, 4] = mask[0, 0, :] = False
    domain = Domain.box(shape, (3, 1.5, 1.5), mask=mask, tissues=tissues)
    schedule = Schedule.weekly("paclitaxel", 3.3, 4, 80, "mg/m^2") + Schedule(fractions=(Fraction(5.6, 2.0),))
    model = bm.ReactionDiffusion(
        growth, diffusion, [bm.Chemotherapy("paclitaxel", map=drug_map, resistant=resistant), bm.Radiotherapy()]
    )
    simulation = bm.TorchSolver(memory=memory).build(model, domain, schedule)
    return simulation, torch.tensor(rng.random(shape) * 0.8), torch.tensor(rng.standard_normal((1, 2, *shape)))


def objective(simulation, weight, plan):
    return lambda p, u: (simulation(p, u, TIMES, plan=plan) * weight).sum()


@pytest.mark.parametrize("case", CASES)
def test_adjoint_tangents_and_finite_differences_agree(case):
    simulation, u0, weight = build(case, resistant=bm.LogitNormal(0.2, 0.5))
    # Few steps and a large diffusivity, so that the diffusion step needs more than two stages.
    plan = simulation.fixed_plan(TIMES, [3, 4])
    start = {n: simulation.model.parameters[n].typical * (8 if n.startswith("diffusion") else 1)
             for n in simulation.model.free}  # fmt: skip
    f = objective(simulation, weight, plan)
    theta = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in start.items()}
    state = u0.clone().requires_grad_()
    f(theta, state).backward()
    _, du = simulation.sensitivities(start, u0, TIMES, list(start), plan=plan)
    for i, (name, value) in enumerate(start.items()):
        step = 1e-4 * value
        around = [float(f({**start, name: value + s * step}, u0)) for s in (-2, -1, 1, 2)]
        difference = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * step)
        assert abs(float(theta[name].grad) - difference) < 1e-6 * abs(difference), name
        assert abs(float(theta[name].grad) - float((du[i] * weight).sum())) < 1e-10 * abs(difference), name
    direction = torch.tensor(np.random.default_rng(1).standard_normal(u0.shape))
    e = 1e-4
    around = [float(f(start, u0 + s * e * direction)) for s in (-2, -1, 1, 2)]
    difference = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * e)
    assert abs(float((state.grad * direction).sum()) - difference) < 1e-6 * abs(difference)
    linear = simulation.linearise(start, u0, TIMES, plan=plan)
    pushed = float((linear.push(direction[None, None]) * weight).sum())
    pulled = float((linear.pull(weight[None]) * direction).sum())
    assert abs(pushed - difference) < 1e-6 * abs(difference)
    assert abs(pushed - pulled) < 1e-10 * abs(pushed)


def test_gradient_by_a_field_of_growth_rates():
    simulation, u0, weight = build("logistic")
    plan = simulation.fixed_plan(TIMES, [3, 4])
    f = objective(simulation, weight, plan)
    k = torch.full(u0.shape, 0.05, dtype=torch.float64, requires_grad=True)
    f({"growth.k": k}, u0).backward()
    direction = torch.tensor(np.random.default_rng(2).random(u0.shape)) * 0.01
    e = 1e-2
    around = [float(f({"growth.k": k.detach() + s * e * direction}, u0)) for s in (-2, -1, 1, 2)]
    difference = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * e)
    assert abs(float((k.grad * direction).sum()) - difference) < 1e-6 * abs(difference)
    # A constant field is the scalar.
    flat = simulation({"growth.k": torch.full(u0.shape, 0.05, dtype=torch.float64)}, u0, TIMES, plan=plan)
    scalar = simulation({"growth.k": 0.05}, u0, TIMES, plan=plan)
    assert float((flat - scalar).abs().max()) < 1e-12


def test_checkpoints_give_the_same_gradient():
    found = []
    for memory in (1e9, 1e3):
        simulation, u0, weight = build("tissues", memory)
        theta = {n: torch.tensor(simulation.model.parameters[n].typical, dtype=torch.float64, requires_grad=True)
                 for n in simulation.model.free}  # fmt: skip
        objective(simulation, weight, simulation.fixed_plan(TIMES, [5, 9]))(theta, u0).backward()
        found.append([float(t.grad) for t in theta.values()])
    assert found[0] == found[1]


@pytest.mark.parametrize("case", ["logistic", "gompertz", "tissues", "drug map"])
def test_eager_torch_and_fused_kernels_agree(case):
    found = []
    for kernels in (NumbaKernels, TorchKernels):
        simulation, u0, weight = build(case)
        simulation.kernels = kernels
        plan = simulation.fixed_plan(TIMES, [2, 3])
        theta = {n: torch.tensor(simulation.model.parameters[n].typical * (8 if "D" in n else 1), dtype=torch.float64,
                                 requires_grad=True) for n in simulation.model.free}  # fmt: skip
        value = objective(simulation, weight, plan)(theta, u0)
        value.backward()
        values = {n: float(t.detach()) for n, t in theta.items()}
        _, du = simulation.sensitivities(values, u0, TIMES, list(theta), plan=plan)
        gradients = [float(t.grad) for t in theta.values()]
        found.append([float(value.detach()), *gradients, *(du * weight).sum((1, 2, 3, 4, 5))])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-11)


def test_float32_follows_float64():
    simulation, u0, _ = build("logistic")
    plan = simulation.fixed_plan(TIMES, [20, 40])
    single = bm.TorchSolver(dtype=torch.float32).build(simulation.model, simulation.domains[0], simulation.schedules[0])
    a, b = simulation({}, u0, TIMES, plan=plan), single({}, u0, TIMES, plan=plan)
    assert b.dtype == torch.float32
    assert float((a - b).norm() / a.norm()) < 1e-6


def test_a_batch_equals_single_runs():
    simulation, u0, _ = build("logistic")
    plan = simulation.fixed_plan(TIMES, [60, 60])
    k, d = torch.tensor([0.02, 0.1, 0.3]), torch.tensor([0.05, 0.5, 2.0])
    batch = simulation({"growth.k": k, "diffusion.D": d}, torch.stack([u0, 0.5 * u0, 0.1 * u0]), TIMES, plan=plan)
    for i, factor in enumerate((1.0, 0.5, 0.1)):
        one = simulation({"growth.k": float(k[i]), "diffusion.D": float(d[i])}, factor * u0, TIMES, plan=plan)[0]
        # Stages are chosen for the fastest member of a batch, so single runs differ by the time error.
        assert float((batch[i] - one).norm() / one.norm()) < 2e-4


def test_patients_of_a_batch_keep_their_own_doses_and_days():
    rng = np.random.default_rng(4)
    masks = [rng.random((3, 6, 6)) < 0.9 for _ in range(2)]
    domains = [Domain.box(m.shape, mask=m) for m in masks]
    schedules = [
        Schedule.weekly("paclitaxel", 2.2, 3, 80, "mg/m^2"), Schedule.weekly("paclitaxel", 5.1, 1, 40, "mg/m^2")
    ]  # fmt: skip
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel")])
    u0 = torch.tensor(rng.random((2, 3, 6, 6)))
    times = np.array([[10.0, 21.0], [8.0, 40.0]])
    solver = bm.TorchSolver()
    both = solver.build(model, domains, schedules, start=[0.0, 3.0])
    plan = both.fixed_plan(times, [80, 80])
    u = both({}, u0, times, plan=plan)
    for i in range(2):
        one = solver.build(model, domains[i], schedules[i], start=[0.0, 3.0][i])
        single = one({}, u0[i], times[i], plan=one.fixed_plan(times[i], [80, 80]))
        assert float((u[i] - single[0]).abs().max()) < 1e-4
    parameters = {"growth.k": torch.tensor([0.05, 0.05], dtype=torch.float64, requires_grad=True)}
    both(parameters, u0, times, plan=plan).sum().backward()
    assert (parameters["growth.k"].grad > 0).all()


@pytest.mark.parametrize("stages", [2, 3, 5, 11])
def test_rkc_polynomial_is_stable_and_second_order(stages):
    def polynomial(z):
        values = [1.0, 1.0 + rkc_coefficients(stages)[0][4] * z]
        for j, (p, q, r, s, c) in enumerate(rkc_coefficients(stages)[1:], 2):
            values.append(p * values[0] + q * values[1] + (r + c * z) * values[j - 1] + s * values[j - 2])
        return values[-1]

    for z in (-1e-2, -1e-3):
        assert abs(polynomial(z) - (1 + z + z * z / 2)) < abs(z) ** 3
    z = -np.linspace(0, rkc_bound(stages), 2001)
    assert max(abs(polynomial(v)) for v in z) <= 1 + 1e-12
    assert rkc_stages(rkc_bound(stages)) == stages
    assert rkc_stages(rkc_bound(stages) * 1.01) == stages + 1
