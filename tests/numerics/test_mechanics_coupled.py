"""Diffusion that stress slows down, solved together with the stress: orders, gradients, checkpoints."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.mechanics import Elastic, StressDamped, TractionFree
from biomodel.parameters import Fixed, Parameter
from biomodel.schedule import Fraction, Schedule
from biomodel.solvers.elastic_kernels import NumbaElastic, TorchElastic, lame
from biomodel.solvers.kernels import TorchKernels
from biomodel.terms import Growth

TIMES = [10.0, 30.0]


def orders(errors):
    e = np.array(errors)
    return np.log2(e[:-1] / e[1:])


# A smooth exact solution ---------------------------------------------------------------------------------------------

SIDES, D0, GAMMA, RATE, YOUNG, POISSON = (28.0, 11.0, 8.0), 0.8, 3.0, 0.06, 3.0, 0.45
EXACT = {"diffusion.D": D0, "diffusion.gamma": GAMMA}


@dataclass(frozen=True)
class Manufactured(Growth):
    """Growth for which u = exp(rate t) psi and w = exp(rate t) grad(phi) solve the coupled equations.

    The fields are psi, its Laplacian, the stress of w at t = 0, and the product of the gradients of both. The share
    s = u / psi stands for exp(rate t): the exact diffusivity is D0 exp(-gamma s sigma).
    """

    @property
    def fields(self):
        return ("psi", "laplace", "sigma", "cross")

    def rate(self, u, p, c, ops):
        s = u / c.psi
        diffusivity = D0 * ops.exp(-GAMMA * s * c.sigma)
        return RATE * u - s * diffusivity * (c.laplace - GAMMA * s * c.cross)


def manufactured(n: int, dimensions: int = 3):
    """Simulation and exact solution on n voxels a side: a clamped box without flux through its faces.

    phi = prod (1 - cos 2 pi x / L) has grad(phi) = 0 on every face. For w = grad(phi) and uniform moduli,
    div(sigma) = (2 mu + lame) grad(laplace(phi)), so u = (2 mu + lame) laplace(phi) / lambda + constant. Sides differ
    so much that the von Mises stress comes nowhere near zero inside, where it has a kink.
    """
    a = 2 * np.pi / np.array(SIDES)
    mu, lam = lame(YOUNG, POISSON)
    pressure, base = 10.0, 0.5
    factor = (2 * mu + lam) / pressure
    scale = 0.35 / (factor * 2 ** (dimensions - 1) * (a[:dimensions] ** 2).sum())  # so that u stays positive
    # Values and derivatives of 1 - cos up to the fourth; along missing axes the function is constant.
    lines = [[np.ones(1), *(np.zeros(1),) * 4]] * 3
    for d in range(dimensions):
        x = a[d] * (np.arange(n) + 0.5) * SIDES[d] / n
        lines[d] = [1 - np.cos(x), *(a[d] ** k * wave(x) * sign for k, wave, sign in (
            (1, np.sin, 1), (2, np.cos, 1), (3, np.sin, -1), (4, np.cos, -1)))]  # fmt: skip

    def phi(*powers):
        fx, fy, fz = (lines[axis][k] for axis, k in enumerate(powers))
        return scale * fz[:, None, None] * fy[None, :, None] * fx[None, None, :]

    def bump(powers, *axes):
        powers = list(powers)
        for axis in axes:
            powers[axis] += 1
        return tuple(powers)

    zero = (0, 0, 0)

    def psi_at(powers):
        return factor * sum(phi(*bump(powers, i, i)) for i in range(3))

    psi = base + psi_at(zero)
    laplace = sum(psi_at(bump(zero, i, i)) for i in range(3))

    def hessian(i, j, extra=()):
        return phi(*bump(zero, i, j, *extra))

    def deviator(i, j, extra=()):
        trace = sum(hessian(m, m, extra) for m in range(3)) / 3
        return hessian(i, j, extra) - (trace if i == j else 0)

    pairs = [(i, j) for i in range(3) for j in range(3)]
    square = sum(deviator(i, j) ** 2 for i, j in pairs)
    sigma = 2 * mu * np.sqrt(1.5 * square)
    slope = [2 * mu * np.sqrt(1.5) * sum(deviator(i, j) * deviator(i, j, (d,)) for i, j in pairs) / np.sqrt(square)
             for d in range(3)]  # fmt: skip
    cross = sum(slope[d] * psi_at(bump(zero, d)) for d in range(3))
    shape = tuple(n if axis < dimensions else 1 for axis in (2, 1, 0))
    mechanics = Elastic(("tissue",), (Fixed(YOUNG),), tumour=None, coupling=Fixed(pressure), poisson=POISSON)
    model = bm.ReactionDiffusion(Manufactured(), StressDamped(mechanics=mechanics))
    domain = Domain.box(shape, tuple(side / n for side in SIDES[::-1]), tissues={"tissue": np.ones(shape)})
    fields = {"psi": psi, "laplace": laplace, "sigma": sigma, "cross": cross}
    fields = {k: np.broadcast_to(v, shape) for k, v in fields.items()}
    return bm.TorchSolver(linear_rtol=1e-9).build(model, domain, Schedule(), fields=fields), psi


@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_second_order_in_space_on_the_exact_solution(dimensions):
    errors, day = [], 2.0
    for n in (12, 24, 48):
        simulation, psi = manufactured(n, dimensions)
        u = simulation(EXACT, psi, [day], plan=simulation.fixed_plan([day], [48]))[0, 0].numpy()
        exact = psi * np.exp(RATE * day)
        errors.append(np.linalg.norm(u - exact) / np.linalg.norm(exact))
    print(f"coupled mechanics, {dimensions}D, order in space:", np.array(errors), orders(errors))
    assert (orders(errors) > 1.9).all()


def time_orders(run, counts, apart: int = 1) -> np.ndarray:
    """Orders from the changes when the number of steps is doubled again and again, each over `apart` doublings."""
    runs = [run(n) for n in counts]
    changes = [float((a - b).norm()) for a, b in zip(runs[:-1], runs[1:], strict=True)]
    return orders(changes[::apart]) / apart


@pytest.mark.parametrize("dimensions", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_second_order_in_time_on_the_exact_solution(dimensions):
    simulation, psi = manufactured(8, dimensions)
    found = time_orders(lambda n: simulation(EXACT, psi, [4.0], plan=simulation.fixed_plan([4.0], [n])),
                        (32, 64, 128, 256))  # fmt: skip
    print(f"coupled mechanics, {dimensions}D, order in time:", found)
    assert np.all(np.abs(found - 2) < 0.1)


# A treated tumour in a breast -----------------------------------------------------------------------------------------


def treated(shape=(6, 14, 16), growth=None, mechanics=None, base=None, dose=3.3, **settings):
    """A tumour in the middle of random tissue, with doses of a drug and two fractions of radiotherapy."""
    share = np.random.default_rng(0).random(shape)
    domain = Domain.box(shape, (3.0, 1.5, 1.5), tissues={"adipose": 1 - share, "fibroglandular": share})
    schedule = Schedule.weekly("paclitaxel", dose, 4, 80, "mg/m^2")
    schedule = schedule + Schedule(fractions=(Fraction(5.0, 2.0), Fraction(6.0, 2.0)))
    diffusion = StressDamped(base or bm.Isotropic(), mechanics=mechanics or Elastic())
    model = bm.ReactionDiffusion(growth or bm.Logistic(), diffusion, [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()])
    z, y, x = np.meshgrid(*(domain.coords[a] - domain.coords[a].mean() for a in "zyx"), indexing="ij")
    u0 = torch.tensor(0.8 * np.exp(-(z**2 + y**2 + (x - 2) ** 2) / 40))
    return bm.TorchSolver(**settings).build(model, domain, schedule), u0


def test_second_order_in_time_across_doses_and_fractions():
    """A dose inside a step leaves an error that also depends on where in the step it lies: two doublings average it."""
    params = {"diffusion.D": 0.5, "diffusion.gamma": 5.0}
    for dose, apart in ((3.0, 1), (3.3, 2)):
        simulation, u0 = treated((1, 10, 11), dose=dose, linear_rtol=1e-9)

        def run(steps, simulation=simulation, u0=u0):
            return simulation(params, u0, [10.0], plan=simulation.fixed_plan([10.0], [steps]))

        found = time_orders(run, (20, 40, 80, 160), apart)
        print(f"coupled mechanics, order in time across fractions and doses from day {dose}:", found)
        assert np.all(np.abs(found - 2) < 0.1)


def test_chosen_steps_reach_the_tolerance():
    simulation, u0 = treated((1, 14, 16), rtol=1e-3)
    for d, gamma in ((0.1, 2.0), (1.0, 20.0)):
        params = {"diffusion.D": d, "diffusion.gamma": gamma}
        chosen = simulation(params, u0, TIMES)
        fine = simulation(params, u0, TIMES, plan=simulation.fixed_plan(TIMES, [80, 160]))
        for t in range(2):
            assert float((chosen - fine)[:, t].norm() / fine[:, t].norm()) < 1e-3


def test_without_damping_it_is_plain_diffusion():
    simulation, u0 = treated()
    plain = bm.TorchSolver().build(
        bm.ReactionDiffusion(simulation.model.growth, bm.Isotropic(), simulation.model.treatments),
        simulation.domains[0], simulation.schedules[0],
    )  # fmt: skip
    small = {"diffusion.D": 0.5, "diffusion.gamma": 1e-6}
    fixed = simulation(small, u0, TIMES, plan=simulation.fixed_plan(TIMES, [40, 80]))
    other = plain({"diffusion.D": 0.5}, u0, TIMES, plan=plain.fixed_plan(TIMES, [40, 80]))
    damped = simulation({"diffusion.D": 0.5, "diffusion.gamma": 5.0}, u0, TIMES)
    assert float((fixed - other).norm() / other.norm()) < 2e-4
    assert float((damped - other).norm() / other.norm()) > 0.02


def test_mass_is_conserved_without_reaction():
    simulation, u0 = treated(growth=bm.Exponential())
    model = bm.ReactionDiffusion(bm.Exponential(), simulation.model.diffusion)
    alone = bm.TorchSolver().build(model, simulation.domains[0], Schedule())
    u = alone({"growth.k": 1e-6, "diffusion.D": 1.0}, u0, [50.0], plan=alone.fixed_plan([50.0], [25]))
    assert abs(float(u.sum() / u0.sum()) / np.exp(50e-6) - 1) < 1e-12


@dataclass(frozen=True)
class ThetaLogistic(Growth):
    """A law without closed form: k u (1 - u²)."""

    k: bm.LogNormal = bm.LogNormal(0.05, 0.4)

    @property
    def parameters(self):
        return (Parameter("k", "1/day", self.k, (1e-6, 2.0)),)

    def rate(self, u, p, c, ops):
        return p["k"] * u * (1 - u * u)


FREE = Elastic(moduli=(bm.LogNormal(2.0, 0.3), bm.LogNormal(4.0, 0.3)), tumour=bm.LogNormal(20.0, 0.3),
               coupling=bm.LogNormal(10.0, 0.5))  # fmt: skip
CASES = {
    "clamped": (bm.Logistic(), FREE, bm.Isotropic()),
    "traction-free, tissues": (bm.Gompertz(), Elastic(edge=TractionFree(), tumour=None), bm.TissueDiffusion()),
    "no closed form": (ThetaLogistic(), FREE, bm.Isotropic()),
}


@pytest.mark.parametrize("case", ["clamped", *(pytest.param(c, marks=pytest.mark.slow) for c in list(CASES)[1:])])
def test_gradients_tangents_and_finite_differences_agree(case):
    growth, mechanics, base = CASES[case]
    simulation, u0 = treated((3, 7, 8), growth, mechanics, base, linear_rtol=1e-12)
    weight = torch.tensor(np.random.default_rng(1).standard_normal((1, 2, *u0.shape)))
    plan = simulation.fixed_plan(TIMES, [1, 2])
    start = {n: simulation.model.parameters[n].typical * (8 if n.startswith("diffusion") else 1)
             for n in simulation.model.free}  # fmt: skip

    def f(p, u):
        return (simulation(p, u, TIMES, plan=plan) * weight).sum()

    theta = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in start.items()}
    state = u0.clone().requires_grad_()
    f(theta, state).backward()
    # One direction more, for the initial state alone: along its gradient nothing cancels.
    direction = state.grad / state.grad.abs().max()
    du0 = torch.zeros(len(start) + 1, 1, *u0.shape, dtype=torch.float64)
    du0[-1, 0] = direction
    _, du = simulation.sensitivities(start, u0, TIMES, [*start, None], plan=plan, du0=du0)
    adjoint = [*(float(t.grad) for t in theta.values()), float((state.grad * direction).sum())]
    for i, (name, value) in enumerate([*start.items(), ("u0", 1.0)]):
        step = 1e-3 * value
        around = [float(f({**start, name: value + s * step} if name in start else start,
                          u0 + (s * step * direction if name == "u0" else 0))) for s in (-2, -1, 1, 2)]  # fmt: skip
        difference = (around[0] - 8 * around[1] + 8 * around[2] - around[3]) / (12 * step)
        assert abs(adjoint[i] - difference) < 1e-6 * abs(difference), name
        assert abs(adjoint[i] - float((du[i] * weight).sum())) < 1e-8 * abs(difference), name


def test_checkpoints_give_the_same_gradient_and_a_batch_is_its_members():
    found = []
    for memory in (1e9, 1e3):
        simulation, u0 = treated((4, 9, 10), memory=memory, linear_rtol=1e-10)
        plan = simulation.fixed_plan(TIMES, [4, 7])
        theta = {n: torch.tensor(simulation.model.parameters[n].typical, dtype=torch.float64, requires_grad=True)
                 for n in simulation.model.free}  # fmt: skip
        out = simulation(theta, u0, TIMES, plan=plan)
        (out**2).sum().backward()
        found.append([float(out.detach().sum()), *(float(t.grad) for t in theta.values())])
    np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
    gamma = torch.tensor([1.0, 8.0], dtype=torch.float64)
    both = simulation({"diffusion.gamma": gamma}, u0, TIMES, plan=plan)
    for i, g in enumerate(gamma):
        one = simulation({"diffusion.gamma": float(g)}, u0, TIMES, plan=plan)
        assert float((both[i] - one[0]).norm() / one.norm()) < 1e-9


def test_linearisation_is_the_derivative_with_the_stress_held():
    """Its outputs are the run's, `pull` is the transpose of `push`, and without damping nothing is left out."""
    simulation, u0 = treated(linear_rtol=1e-9)
    rng = np.random.default_rng(3)
    plan = simulation.fixed_plan(TIMES, [5, 10])
    noise = torch.tensor(rng.standard_normal((2, 1, *u0.shape))) * (u0 > 0.1)
    weight = torch.tensor(rng.standard_normal((2, 1, 2, *u0.shape)))
    gaps = {}
    for gamma in (1e-6, 2.0):
        params = {"diffusion.D": 0.5, "diffusion.gamma": gamma}
        linear = simulation.linearise(params, u0, TIMES, plan=plan)
        pushed = linear.push(noise)
        left, right = float((pushed * weight).sum()), float((linear.pull(weight) * noise).sum())
        assert abs(left - right) < 1e-11 * abs(left)
        outputs, full = simulation.sensitivities(params, u0, TIMES, [None, None], plan=plan, du0=noise)
        np.testing.assert_allclose(linear.outputs, outputs, atol=1e-8)
        gaps[gamma] = float((pushed - full).norm() / full.norm())
    print(f"linearisation with stress held, noise of single voxels: {gaps[2.0]:.1%} from the full derivative")
    assert gaps[1e-6] < 1e-6


def test_stress_scales_and_torch_kernels_agree(monkeypatch):
    simulation, u0 = treated((4, 9, 10), linear_rtol=1e-11)
    one, w = simulation.stress({}, u0)
    twice, w2 = simulation.stress({"mechanics.coupling": 20.0}, u0)
    np.testing.assert_allclose(twice, 2 * one, atol=1e-5)
    np.testing.assert_allclose(w2, 2 * w, rtol=1e-8, atol=1e-12)
    # Cells push outwards along every axis.
    coords = simulation.domains[0].coords
    for c, axis in enumerate("xyz"):
        place = torch.tensor(coords[axis]).reshape([-1 if a == axis else 1 for a in "zyx"])
        away = place - (place * u0).sum() / u0.sum()
        assert float((w[0, c] * away * u0).sum()) > 0
    plan = simulation.fixed_plan(TIMES, [3, 4])
    found = simulation({}, u0, TIMES, plan=plan)
    simulation.kernels = TorchKernels
    monkeypatch.setattr("biomodel.solvers.multigrid.NumbaElastic", TorchElastic)
    monkeypatch.setattr(NumbaElastic, "apply", None)  # so that its use would show
    np.testing.assert_allclose(simulation({}, u0, TIMES, plan=plan), found, atol=1e-9)
