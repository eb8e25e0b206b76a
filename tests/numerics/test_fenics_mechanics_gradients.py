"""Derivatives through tissue mechanics in FEniCS: adjoint, tangents, finite differences, and torch's gradient."""

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.mechanics import Clamped, Elastic, StressDamped, TractionFree
from biomodel.parameters import LogNormal
from biomodel.schedule import Fraction, Schedule
from fenics_here import require_fenics


@pytest.fixture(autouse=True)
def fenics():
    require_fenics()


TIMES = [10.0, 30.0]
CASES = {
    "P1": ((1, 7, 8), Clamped(), 1, 1),
    "P1 and P2": ((1, 7, 8), TractionFree(), 1, 2),
    "P2": ((1, 6, 7), Clamped(), 2, 2),
    "line": ((1, 1, 9), Clamped(), 1, 2),
    "3D": ((4, 5, 6), Clamped(), 1, 2),
}


def build(case, memory=1e9, ranks=1):
    """A simulation whose stress reads tissues, state and all moduli; its values, state and weights of its outputs."""
    shape, edge, degree, displacement_degree = CASES[case]
    rng = np.random.default_rng(0)
    mask = np.ones(shape, bool)
    if shape[1] > 1:
        mask[0, 0, :2] = False
    tissues = {n: 0.1 + 0.9 * rng.random(shape) for n in ("a", "b")}
    domain = Domain.box(shape, (3.0, 1.5, 1.5), mask=mask, tissues=tissues)
    priors = [LogNormal(x, 0.3) for x in (2.0, 5.0, 20.0, 10.0)]
    mechanics = Elastic(("a", "b"), tuple(priors[:2]), tumour=priors[2], coupling=priors[3], poisson=0.4, edge=edge)
    treatments = [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()]
    model = bm.ReactionDiffusion(bm.Logistic(), StressDamped(bm.Isotropic(), mechanics=mechanics), treatments)
    schedule = Schedule.weekly("paclitaxel", 3.3, 4, 80, "mg/m^2") + Schedule(fractions=(Fraction(5.6, 2.0),))
    solver = bm.FenicsSolver(degree=degree, displacement_degree=displacement_degree, linear_rtol=1e-13,
                             stress_rtol=1e-13, memory=memory, ranks=ranks)  # fmt: skip
    # Rough, but above zero at all nodes: below it growth has a kink, which differences straddle.
    u0 = torch.tensor(0.3 + 0.4 * rng.random(shape))
    start = {n: model.parameters[n].typical for n in model.free} | {"diffusion.D": 0.8, "diffusion.gamma": 0.3}
    return solver.build(model, domain, schedule), start, u0, torch.tensor(rng.standard_normal((1, 2, *shape)) * mask)


def central(f, step):
    a, b, c, d = (f(s * step) for s in (-2, -1, 1, 2))
    return (a - 8 * b + 8 * c - d) / (12 * step)


@pytest.mark.parametrize("case", CASES)
def test_adjoint_tangents_and_finite_differences_agree(case):
    simulation, start, u0, weight = build(case)
    plan = simulation.fixed_plan(TIMES, [2, 3])

    def f(p, u):
        return (simulation(p, u, TIMES, plan=plan) * weight).sum()

    theta = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in start.items()}
    state = u0.clone().requires_grad_()
    f(theta, state).backward()
    u, du = simulation.sensitivities(start, u0, TIMES, list(start), plan=plan)
    assert float((u - simulation(start, u0, TIMES, plan=plan)).abs().max()) < 1e-11
    for i, (name, value) in enumerate(start.items()):
        difference = central(lambda s, n=name, v=value: float(f({**start, n: v + s}, u0)), 3e-3 * value)
        print(f"{case}, {name}: {difference:.6g}, adjoint {float(theta[name].grad) / difference - 1:.1e}, "
              f"tangents {float((du[i] * weight).sum()) / difference - 1:.1e}")  # fmt: skip
        assert abs(float(theta[name].grad) - difference) < 1e-5 * abs(difference), name
        assert abs(float(theta[name].grad) - float((du[i] * weight).sum())) < 1e-8 * abs(difference), name
    direction = torch.tensor(np.random.default_rng(1).standard_normal(u0.shape)) * torch.tensor(simulation.domain.mask)
    difference = central(lambda s: float(f(start, u0 + s * direction)), 1e-3)
    _, along = simulation.sensitivities(start, u0, TIMES, [None], plan=plan, du0=direction[None, None])
    assert abs(float((state.grad * direction).sum()) - difference) < 1e-5 * abs(difference)
    assert abs(float((along[0] * weight).sum()) - float((state.grad * direction).sum())) < 1e-8 * abs(difference)


FIELDS = [("mechanics.E_a", 2.0), ("mechanics.coupling", 10.0), ("diffusion.gamma", 0.3), ("diffusion.D", 0.8)]


@pytest.mark.parametrize("name,typical", FIELDS)
def test_gradient_by_a_field(name, typical):
    simulation, start, u0, weight = build("P1 and P2")
    plan = simulation.fixed_plan(TIMES, [2, 3])
    rng = np.random.default_rng(2)
    value = torch.tensor(typical * (0.5 + rng.random(u0.shape)), requires_grad=True)

    def f(v):
        return (simulation({**start, name: v}, u0, TIMES, plan=plan) * weight).sum()

    f(value).backward()
    direction = torch.tensor(rng.random(u0.shape)) * typical
    difference = central(lambda s: float(f(value.detach() + s * direction)), 3e-3)
    assert abs(float((value.grad * direction).sum()) - difference) < 1e-5 * abs(difference)


def gradient(case, memory=1e9, ranks=1):
    """Gradient by every parameter, and by the initial state."""
    simulation, start, u0, weight = build(case, memory, ranks)
    theta = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in start.items()}
    state = u0.clone().requires_grad_()
    (simulation(theta, state, TIMES, plan=simulation.fixed_plan(TIMES, [3, 4])) * weight).sum().backward()
    return np.array([float(t.grad) for t in theta.values()]), state.grad.numpy()


def test_segments_computed_again_give_the_same_gradient():
    for one, two in zip(gradient("P1"), gradient("P1", memory=1e3), strict=True):
        assert np.abs(one - two).max() < 1e-9 * np.abs(one).max()
        np.testing.assert_allclose(one, two, rtol=1e-6)


@pytest.mark.slow
def test_two_ranks_give_the_same_gradient_and_tangents():
    for one, two in zip(gradient("3D"), gradient("3D", ranks=2), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-6)
    found = []
    for ranks in (1, 2):
        simulation, start, u0, _ = build("3D", ranks=ranks)
        found.append(simulation.sensitivities(start, u0, TIMES, list(start), plan=simulation.fixed_plan(TIMES, [2, 3])))
    for one, two in zip(*found, strict=True):
        assert float((one - two).norm() / one.norm()) < 1e-9


@pytest.mark.parametrize("memory", [1e9, 1.0], ids=["matrices kept", "matrices made again"])
def test_the_held_derivative_is_a_map_and_its_transpose(memory):
    """The stress of the run is held: what is left out is small beside the whole."""
    simulation, start, u0, weight = build("P1", memory)
    plan = simulation.fixed_plan(TIMES, [2, 3])
    linear = simulation.linearise(start, u0, TIMES, plan=plan)
    assert float((linear.outputs - simulation(start, u0, TIMES, plan=plan)).abs().max()) < 1e-11
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.standard_normal((2, 1, *u0.shape))) * torch.tensor(simulation.domain.mask)
    y = torch.tensor(rng.standard_normal((2, 1, 2, *u0.shape))) * torch.tensor(simulation.domain.mask)
    other = simulation({**start, "diffusion.D": 0.1}, u0, TIMES, plan=plan)  # the map must not see other runs
    assert torch.isfinite(other).all()
    pushed, pulled = linear.push(x), linear.pull(y)
    np.testing.assert_allclose((pushed * y).sum((1, 2, 3, 4, 5)), (x * pulled).sum((1, 2, 3, 4)), rtol=1e-10)
    _, whole = simulation.sensitivities(start, u0, TIMES, [None, None], plan=plan, du0=x)
    left_out = float((pushed - whole).norm() / whole.norm())
    print(f"stress held: {left_out:.3f} of the derivative by the initial state is left out")
    assert 1e-6 < left_out < 0.3


@pytest.mark.slow
def test_gradients_agree_with_torch_to_discretisation_error():
    """Of the volume-like sum of a smooth tumour, by every parameter; the difference falls with the voxel."""
    worst = []
    for n in (1, 2, 4):
        shape, h = (1, 10 * n, 12 * n), 2 / n
        affine = np.diag([h, h, 2.0, 1.0])
        affine[:2, 3] = h / 2
        domain = Domain(np.ones(shape, bool), (2.0, h, h), affine)
        _, y, x = np.meshgrid(*(domain.coords[a] for a in "zyx"), indexing="ij")
        share = 1 / (1 + np.exp(-(x - 14) / 3))
        domain = Domain(domain.mask, domain.spacing, affine, {"adipose": 1 - share, "fibroglandular": share})
        u0 = 0.02 + 0.6 * np.exp(-((y - 9) ** 2 + (x - 11) ** 2) / 16)
        mechanics = Elastic(coupling=LogNormal(10.0, 0.3), tumour=LogNormal(20.0, 0.3))
        model = bm.ReactionDiffusion(bm.Logistic(), StressDamped(bm.Isotropic(), mechanics=mechanics))
        values = {"growth.k": 0.05, "diffusion.D": 0.5, "diffusion.gamma": 1.0, "mechanics.coupling": 10.0,
                  "mechanics.E_tumour": 20.0}  # fmt: skip
        grads = []
        for solver in (bm.FenicsSolver(), bm.TorchSolver()):
            simulation = solver.build(model, domain, Schedule())
            theta = {p: torch.tensor(v, dtype=torch.float64, requires_grad=True) for p, v in values.items()}
            u = simulation(theta, u0, TIMES, plan=simulation.fixed_plan(TIMES, [16, 32]))
            (u**2).mean().backward()
            grads.append(np.array([float(t.grad) for t in theta.values()]))
        worst.append(np.abs(grads[0] / grads[1] - 1))
    order = np.log2(np.array(worst[:-1]) / np.array(worst[1:]))
    print("gradient through mechanics, FEniCS against torch, relative differences by", *values)
    print(np.array(worst), "orders", order)
    assert (order > 1.7).all() and np.max(worst[-1]) < 0.01
