"""Gradients of the FEniCS solver: discrete adjoint, tangents, finite differences, and torch's gradient."""

import dataclasses

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.parameters import Parameter
from biomodel.schedule import Fraction, Schedule
from biomodel.terms import Growth, TensorDiffusion
from fenics_here import require_fenics


@pytest.fixture(autouse=True)
def fenics():
    require_fenics()


TIMES = [10.0, 30.0]


@dataclasses.dataclass(frozen=True)
class ThetaLogistic(Growth):
    """A law without closed form, slowed by a field: k u (1 - u²) a."""

    k: bm.LogNormal = bm.LogNormal(0.05, 0.4)

    @property
    def parameters(self):
        return (Parameter("k", "1/day", self.k, (1e-6, 2.0)),)

    @property
    def fields(self):
        return ("a",)

    def rate(self, u, p, c, ops):
        return p["k"] * u * (1 - u * u) * c.a


CASES = {
    "logistic": (bm.Logistic(), bm.Isotropic(), None, 1),
    "P2": (bm.Logistic(), bm.Isotropic(), None, 2),
    "tissues": (bm.Gompertz(), bm.TissueDiffusion(("a", "b")), None, 1),
    "tensor": (bm.Exponential(), TensorDiffusion(), None, 1),
    "drug map": (ThetaLogistic(), bm.Isotropic(), "a", 1),
}


def build(case, memory=1e9, shape=(4, 6, 7), solver=None):
    growth, diffusion, drug_map, degree = CASES[case]
    rng = np.random.default_rng(0)
    mask = np.ones(shape, bool)
    mask[2, 3, 4] = mask[0, 0, :] = False
    domain = Domain.box(shape, (3, 1.5, 1.5), mask=mask, tissues={"a": rng.random(shape), "b": rng.random(shape)})
    tensor = {"xx": 1.5, "yy": 1.0, "zz": 0.6, "xy": 0.3, "xz": -0.1, "yz": 0.2}
    fields = {f"tensor_{k}": np.full(shape, v) for k, v in tensor.items()} if case == "tensor" else {}
    schedule = Schedule.weekly("paclitaxel", 3.3, 4, 80, "mg/m^2") + Schedule(fractions=(Fraction(5.6, 2.0),))
    decay, resistant = bm.LogNormal(0.35, 0.2), bm.LogitNormal(0.2, 0.5)
    drug = bm.Chemotherapy("paclitaxel", map=drug_map, decay=decay, resistant=resistant)
    model = bm.ReactionDiffusion(growth, diffusion, [drug, bm.Radiotherapy()])
    solver = solver or bm.FenicsSolver(degree=degree, linear_rtol=1e-13, memory=memory)
    simulation = solver.build(model, domain, schedule, fields)
    # Rough, but above zero at all nodes: below it growth has a kink, which differences straddle.
    u0 = torch.tensor(0.3 + 0.4 * rng.random(shape))
    return simulation, u0, torch.tensor(rng.standard_normal((1, 2, *shape)) * mask)


def central(f, step):
    a, b, c, d = (f(s * step) for s in (-2, -1, 1, 2))
    return (a - 8 * b + 8 * c - d) / (12 * step)


@pytest.mark.parametrize("case", CASES)
def test_adjoint_tangents_and_finite_differences_agree(case):
    simulation, u0, weight = build(case)
    plan = simulation.fixed_plan(TIMES, [3, 4])
    start = {n: simulation.model.parameters[n].typical * (8 if n.startswith("diffusion") else 1)
             for n in simulation.model.free}  # fmt: skip

    def f(p, u):
        return (simulation(p, u, TIMES, plan=plan) * weight).sum()

    theta = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in start.items()}
    state = u0.clone().requires_grad_()
    f(theta, state).backward()
    _, du = simulation.sensitivities(start, u0, TIMES, list(start), plan=plan)
    for i, (name, value) in enumerate(start.items()):
        difference = central(lambda s, n=name, v=value: float(f({**start, n: v + s}, u0)), 1e-3 * value)
        assert abs(float(theta[name].grad) - difference) < 1e-6 * abs(difference), name
        assert abs(float(theta[name].grad) - float((du[i] * weight).sum())) < 1e-9 * abs(difference), name
    direction = torch.tensor(np.random.default_rng(1).standard_normal(u0.shape)) * torch.tensor(simulation.domain.mask)
    difference = central(lambda s: float(f(start, u0 + s * direction)), 1e-3)
    assert abs(float((state.grad * direction).sum()) - difference) < 1e-6 * abs(difference)
    linear = simulation.linearise(start, u0, TIMES, plan=plan)
    pushed = float((linear.push(direction[None, None]) * weight).sum())
    pulled = float((linear.pull(weight[None]) * direction).sum())
    assert abs(pushed - difference) < 1e-6 * abs(difference)
    assert abs(pushed - pulled) < 1e-9 * abs(pushed)
    assert float((linear.outputs - simulation(start, u0, TIMES, plan=plan)).abs().max()) < 1e-12


@pytest.mark.parametrize("name,typical", [("growth.k", 0.05), ("diffusion.D", 0.8), ("radiotherapy.alpha", 0.1),
                                          ("paclitaxel.efficacy", 0.1)])  # fmt: skip
def test_gradient_by_a_field(name, typical):
    simulation, u0, weight = build("logistic")
    plan = simulation.fixed_plan(TIMES, [3, 4])
    rng = np.random.default_rng(2)
    value = torch.tensor(typical * (0.5 + rng.random(u0.shape)), requires_grad=True)

    def f(v):
        return (simulation({name: v}, u0, TIMES, plan=plan) * weight).sum()

    f(value).backward()
    direction = torch.tensor(rng.random(u0.shape)) * typical
    difference = central(lambda s: float(f(value.detach() + s * direction)), 1e-3)
    assert abs(float((value.grad * direction).sum()) - difference) < 1e-6 * abs(difference)
    flat = simulation({name: torch.full(u0.shape, typical, dtype=torch.float64)}, u0, TIMES, plan=plan)
    assert float((flat - simulation({name: typical}, u0, TIMES, plan=plan)).abs().max()) < 1e-11


def test_gradient_of_a_state_that_undershoots():
    """Noise and gaps, of which a part of the nodes falls below zero; small steps that hardly ever straddle the kink."""
    simulation, _, weight = build("logistic")
    rng = np.random.default_rng(6)
    u0 = torch.tensor(0.8 * rng.random(simulation.shape) * (rng.random(simulation.shape) < 0.5))
    nodal = simulation.exchange.to_nodes(u0.numpy()[simulation.domain.mask])
    assert (nodal < 0).mean() > 0.1 and np.abs(nodal).min() > 1e-4
    plan = simulation.fixed_plan(TIMES, [3, 4])
    state = u0.clone().requires_grad_()
    (simulation({}, state, TIMES, plan=plan) * weight).sum().backward()
    direction = torch.tensor(rng.standard_normal(u0.shape)) * torch.tensor(simulation.domain.mask)
    difference = central(
        lambda s: float((simulation({}, u0 + s * direction, TIMES, plan=plan) * weight).sum()), 1e-6
    )
    assert abs(float((state.grad * direction).sum()) - difference) < 1e-5 * abs(difference)


def test_segments_computed_again_give_the_same_gradient():
    found = []
    for memory in (1e9, 1e3):
        simulation, u0, weight = build("tissues", memory)
        theta = {n: torch.tensor(simulation.model.parameters[n].typical, dtype=torch.float64, requires_grad=True)
                 for n in simulation.model.free}  # fmt: skip
        (simulation(theta, u0, TIMES, plan=simulation.fixed_plan(TIMES, [5, 9])) * weight).sum().backward()
        found.append(np.array([float(t.grad) for t in theta.values()]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


def test_gradients_agree_with_torch_to_discretisation_error():
    """Of the volume-like sum of a smooth tumour, by every parameter; the difference falls with the voxel."""
    worst = []
    for n in (1, 2, 4):
        shape, h = (1, 8 * n, 10 * n), 3 / n
        domain = Domain.box(shape, (3.0, h, h))
        y, x = np.meshgrid(*(domain.coords[a] - domain.coords[a].mean() for a in "yx"), indexing="ij")
        u0 = (0.02 + 0.6 * np.exp(-(y**2 + x**2) / 25))[None]
        drug = bm.Chemotherapy("paclitaxel", resistant=bm.LogitNormal(0.2, 0.5))
        model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [drug, bm.Radiotherapy()])
        schedule = Schedule.weekly("paclitaxel", 3.3, 4, 80, "mg/m^2") + Schedule(fractions=(Fraction(5.6, 2.0),))
        grads = []
        for solver in (bm.FenicsSolver(), bm.TorchSolver()):
            simulation = solver.build(model, domain, schedule)
            theta = {p: torch.tensor(model.parameters[p].typical, dtype=torch.float64, requires_grad=True)
                     for p in model.free}  # fmt: skip
            u = simulation(theta, u0, TIMES, plan=simulation.fixed_plan(TIMES, [40, 80]))
            (u**2).mean().backward()
            grads.append(np.array([float(t.grad) for t in theta.values()]))
        worst.append(float(np.max(np.abs(grads[0] / grads[1] - 1))))
    order = np.log2(np.array(worst[:-1]) / np.array(worst[1:]))
    print("gradient, FEniCS against torch, worst relative difference:", worst, "orders", order)
    assert (order > 1.9).all() and worst[-1] < 0.02


def test_sensitivities_carry_the_initial_state_and_pick_rows():
    simulation, u0, _ = build("logistic")
    plan = simulation.fixed_plan(TIMES, [3, 4])
    direction = torch.tensor(np.random.default_rng(4).standard_normal((2, 1, *u0.shape)))
    rows = np.zeros((2, *u0.shape), bool)
    rows[1, 1:3, 2:5, 3] = True
    u, du = simulation.sensitivities({}, u0, TIMES, ["growth.k", None], plan, direction, rows)
    whole, d_whole = simulation.sensitivities({}, u0, TIMES, ["growth.k", None], plan, direction)
    assert u.shape == (1, rows.sum()) and du.shape == (2, 1, rows.sum())
    np.testing.assert_array_equal(u[0], whole[0][torch.tensor(rows)])
    np.testing.assert_array_equal(du[1, 0], d_whole[1, 0][torch.tensor(rows)])
    pushed = simulation.linearise({}, u0, TIMES, plan).push(direction[1:])
    assert float((pushed[0] - d_whole[1]).abs().max()) < 1e-10
