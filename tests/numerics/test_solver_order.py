"""Order of the torch solver in space and time, conservation, and the flat limit."""

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

import biomodel as bm
from biomodel.domain import Domain
from biomodel.schedule import Dose, Fraction, Schedule


def orders(errors):
    e = np.array(errors)
    return np.log2(e[:-1] / e[1:])


LENGTH = 24.0


def manufactured(n: int):
    """u = exp(rate t) phi(x) with variable D; every face of the box and of its box-shaped hole has zero flux.

    The cosines have multiples of a third of the side as extrema, where the hole's faces lie; the growth field
    k = rate - div(D grad phi) / phi makes it exact without a source.
    """
    h = LENGTH / n
    x = (np.arange(n) + 0.5) * h
    z, y, x = np.meshgrid(x, x, x, indexing="ij")
    w = 3 * np.pi / LENGTH
    cz, cy, cx = np.cos(w * z), np.cos(w * y), np.cos(w * x)
    sz, sy, sx = np.sin(w * z), np.sin(w * y), np.sin(w * x)
    phi = 2 + cz * cy * cx
    d = 1.0 + 0.4 * cx * cy + 0.2 * cz
    flux = d * (-3 * w**2 * cz * cy * cx)
    flux += (-0.4 * w * sx * cy) * (-w * cz * cy * sx) + (-0.4 * w * cx * sy) * (-w * cz * sy * cx)
    flux += (-0.2 * w * sz) * (-w * sz * cy * cx)
    rate = 0.1
    third = n // 3
    mask = np.ones((n, n, n), bool)
    mask[third : 2 * third, third : 2 * third, third : 2 * third] = False
    domain = Domain.box((n, n, n), (h, h, h), mask=mask)
    return domain, phi * mask, d, rate - flux / phi, rate


def test_second_order_in_space_with_variable_diffusivity_and_a_hole():
    errors, day = [], 3.0
    for n in (12, 24, 48):
        domain, phi, d, k, rate = manufactured(n)
        model = bm.ReactionDiffusion(bm.Exponential(), bm.Isotropic())
        simulation = bm.TorchSolver().build(model, domain, Schedule())
        # Bounds are for tumours; the test's field is only mathematics.
        u = simulation(
            {"growth.k": torch.tensor(k), "diffusion.D": torch.tensor(d)}, phi, [day],
            plan=simulation.fixed_plan([day], [40]),
        )[0, 0].numpy()  # fmt: skip
        exact = phi * np.exp(rate * day)
        errors.append(np.linalg.norm((u - exact)[domain.mask]) / np.linalg.norm(exact))
    found = orders(errors)
    print("space order, variable D with hole:", errors, found)
    assert (found > 1.9).all()


def test_second_order_in_time_on_the_manufactured_solution():
    domain, phi, d, k, _ = manufactured(12)
    model = bm.ReactionDiffusion(bm.Exponential(), bm.Isotropic())
    simulation = bm.TorchSolver().build(model, domain, Schedule())
    params = {"growth.k": torch.tensor(k), "diffusion.D": torch.tensor(d)}

    def run(steps):
        return simulation(params, phi, [3.0], plan=simulation.fixed_plan([3.0], [steps]))

    reference = run(1024)
    found = orders([float((run(n) - reference).norm() / reference.norm()) for n in (16, 32, 64)])
    print("time order, manufactured:", found)
    assert np.all(np.abs(found - 2) < 0.1)


@pytest.fixture(scope="module")
def treated():
    domain = Domain.box((6, 20, 24), (3, 1.5, 1.5))
    schedule = Schedule.weekly("paclitaxel", 3.3, 4, 80, "mg/m^2") + Schedule(
        fractions=(Fraction(5.6, 2.0), Fraction(6.6, 2.0))
    )
    model = bm.ReactionDiffusion(
        bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()]
    )
    z, y, x = np.meshgrid(*(domain.coords[a] - domain.coords[a].mean() for a in "zyx"), indexing="ij")
    return bm.TorchSolver().build(model, domain, schedule), 0.7 * np.exp(-(z**2 + y**2 + x**2) / 60)


def test_second_order_in_time_across_doses(treated):
    simulation, u0 = treated

    def run(steps):
        return simulation({}, u0, [30.0], plan=simulation.fixed_plan([30.0], [steps]))

    reference = run(2048)
    found = orders([float((run(n) - reference).norm() / reference.norm()) for n in (24, 48, 96)])
    print("time order across doses:", found)
    assert np.all(np.abs(found - 2) < 0.1)


def test_chosen_steps_reach_the_tolerance(treated):
    simulation, u0 = treated
    reference = simulation({}, u0, [10.0, 30.0], plan=simulation.fixed_plan([10.0, 30.0], [300, 600]))
    for rtol in (1e-2, 1e-3, 1e-4):
        tight = bm.TorchSolver(rtol=rtol).build(simulation.model, simulation.domains[0], simulation.schedules[0])
        for k, d in ((0.02, 0.05), (0.05, 0.1), (0.3, 2.0)):
            params = {"growth.k": k, "diffusion.D": d}
            plan = tight.fixed_plan([10.0, 30.0], [300, 600])
            reference = tight(params, u0, [10.0, 30.0], plan=plan)
            error = float((tight(params, u0, [10.0, 30.0]) - reference).norm() / reference.norm())
            assert error < rtol


def test_steps_are_stable_whatever_the_diffusivity(treated):
    simulation, u0 = treated
    for d in (1e-3, 0.1, 1.0, 19.0):
        u = simulation({"diffusion.D": d, "growth.k": 1e-6}, u0, [30.0])
        assert float(u.max()) <= 0.7 + 1e-9 and float(u.min()) >= -1e-3


def test_tissue_jumps_and_a_rough_mask_converge():
    """Re-entrant corners and jumps lower the order; the error must still fall at every refinement."""
    rng = np.random.default_rng(0)
    coarse = np.zeros((8, 10, 10), bool)
    z, y, x = np.indices(coarse.shape)
    coarse[(z - 3.5) ** 2 / 14 + (y - 4.5) ** 2 / 20 + (x - 4.5) ** 2 / 20 < 1] = True
    coarse[3:5, 4:6, 6:8] = False
    tissue = (rng.random(coarse.shape) < 0.5).astype(float)

    def solve(factor):
        def grow(a):
            for axis in range(3):
                a = np.repeat(a, factor, axis)
            return a

        domain = Domain.box(tuple(n * factor for n in coarse.shape), (2 / factor,) * 3, mask=grow(coarse),
                            tissues={"a": grow(tissue), "b": 1 - grow(tissue)})  # fmt: skip
        diffusion = bm.TissueDiffusion(("a", "b"), (bm.Fixed(1.0), bm.Fixed(0.1)))
        simulation = bm.TorchSolver().build(bm.ReactionDiffusion(bm.Logistic(), diffusion), domain, Schedule())
        c = [domain.coords[k] - domain.coords[k].mean() for k in "zyx"]
        z, y, x = np.meshgrid(*c, indexing="ij")
        u0 = 0.6 * np.exp(-(z**2 + (y + 2) ** 2 + x**2) / 12) * domain.mask
        u = simulation({"growth.k": 0.1}, u0, [10.0], plan=simulation.fixed_plan([10.0], [80]))[0, 0].numpy()
        n = factor
        return u.reshape(8, n, 10, n, 10, n).mean((1, 3, 5))

    reference = solve(8)
    errors = [np.linalg.norm(solve(f) - reference) / np.linalg.norm(reference) for f in (1, 2, 4)]
    print("rough mask with tissue jumps:", errors, orders(errors))
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("dtype,limit", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_mass_is_conserved_without_reaction(dtype, limit):
    rng = np.random.default_rng(1)
    mask = rng.random((10, 12, 14)) < 0.8
    domain = Domain.box(mask.shape, (2.5, 1.5, 1.0), mask=mask, tissues={"a": rng.random(mask.shape)})
    from biomodel.terms import NoGrowth

    model = bm.ReactionDiffusion(NoGrowth(), bm.Isotropic())
    simulation = bm.TorchSolver(dtype=dtype).build(model, domain, Schedule())
    u0 = rng.random(mask.shape) * mask
    u = simulation({"diffusion.D": 0.7}, u0, [100.0], plan=simulation.fixed_plan([100.0], [1000]))[0, 0]
    assert abs(float(u.to(torch.float64).sum()) / u0.sum() - 1) < limit
    assert not u.numpy()[~mask].any()


@pytest.mark.parametrize("growth", [bm.Logistic(), bm.Gompertz(), bm.Exponential()])
def test_flat_state_is_the_ordinary_differential_equation(growth):
    doses = tuple(Dose(d, "paclitaxel", 80, "mg/m^2", "given") for d in (0.0, 2.71, 9.3))
    schedule = Schedule(doses, (Fraction(4.4, 2.0), Fraction(9.3, 3.0)))
    model = bm.ReactionDiffusion(growth, bm.Isotropic(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()])
    simulation = bm.TorchSolver().build(model, Domain.box((3, 4, 5)), schedule)
    values = model.complete({"growth.k": 0.08})
    times = [4.4, 9.3, 20.0]
    u = simulation(values, np.full((3, 4, 5), 0.3), times)[0]
    assert float((u - u[:, :1, :1, :1]).abs().max()) < 1e-14

    def slope(t, y):
        level = sum(np.exp(-0.35 * (t - d.day)) for d in doses if t > d.day)
        from biomodel.parameters import NumpyOps

        grow = growth.rate(y, {"k": 0.08}, None, NumpyOps)
        return grow - values["paclitaxel.efficacy"] * level * y

    y, t0, exact = np.array([0.3]), 0.0, []
    knots = sorted({2.71, *times})
    for t1 in knots:
        y = solve_ivp(slope, (t0 + 1e-12, t1 - 1e-12), y, rtol=1e-11, atol=1e-13).y[:, -1]
        if t1 in times:
            exact.append(y[0])
        for f in schedule.fractions:
            if f.day == t1:
                y = y * np.exp(-values["radiotherapy.alpha"] * f.gray * (1 + f.gray / 10))
        t0 = t1
    np.testing.assert_allclose(u[:, 0, 0, 0].numpy(), exact, rtol=2e-8)
