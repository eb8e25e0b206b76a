"""`PinnSolver` against exact solutions, the spectral reference, and the classical solver on the same model object."""

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.schedule import Dose, Fraction
from biomodel.terms import NoGrowth
from fisher_kpp import LENGTH, SPAN, VISITS, D, Problem, average, solve, start
from pinn import PinnSolver, TrainingWarning

SCHEDULE = bm.Schedule(
    doses=[Dose(4.0, "paclitaxel", 80.0, "mg/m^2"), Dose(11.0, "paclitaxel", 80.0, "mg/m^2")],
    fractions=[Fraction(6.0, 2.0), Fraction(9.0, 2.0)],
)
TREATED = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()])
FAST = {"growth.k": 0.12, "diffusion.D": 0.06, "paclitaxel.efficacy": 0.15, "radiotherapy.alpha": 0.1}


@pytest.fixture(scope="module")
def line():
    return Problem(1)


@pytest.fixture(scope="module")
def trained(line):
    simulation = PinnSolver().build(line.model, line.domain, bm.Schedule())
    return simulation, simulation(line.values, line.u0, line.days)


def test_agrees_with_the_spectral_reference(line, trained):
    simulation, u = trained
    errors = line.errors(u)
    print("relative L2 at", line.days, errors, "held out", simulation.held_out)
    assert errors.max() < 5e-4
    assert simulation.held_out < 3 * simulation.solver.rtol


@pytest.mark.slow
def test_error_falls_with_the_residual(line, trained):
    closer = PinnSolver(rtol=3e-5).build(line.model, line.domain, bm.Schedule())
    errors = line.errors(closer(line.values, line.u0, line.days))
    assert errors.max() < line.errors(trained[1]).max() / 2


def test_sensitivities_are_those_of_the_equation(line, trained):
    simulation, _ = trained
    u, du = simulation.sensitivities(line.values, line.u0, line.days[:2], ["growth.k", "diffusion.D"])
    at = [np.log(line.values[n]) for n in ("growth.k", "diffusion.D")]
    for i, name in enumerate(("growth.k", "diffusion.D")):
        h = 1e-3 * np.eye(2)[i]
        expected = (line.predicted(*(at + h)) - line.predicted(*(at - h))) / 2e-3 / line.values[name]
        gap = du[i, 0].numpy() - expected
        assert np.linalg.norm(gap) < 2e-3 * np.linalg.norm(expected)
    rows = np.zeros(tuple(u.shape[1:]), bool)
    rows[:, :, :, 30:90:7] = True
    part, dpart = simulation.sensitivities(line.values, line.u0, line.days[:2], ["growth.k", "diffusion.D"], rows=rows)
    assert torch.equal(part, u[:, torch.tensor(rows)]) and torch.equal(dpart, du[:, :, torch.tensor(rows)])


def test_sensitivity_to_the_start(line, trained):
    """Along a change of the start, by finite differences of the reference."""
    x = (np.arange(1024) + 0.5) / 1024
    bump, u0 = 0.1 * np.exp(-((x - 0.42) ** 2) / 0.005), start(1024, 1)
    h = 1e-3
    sides = [average(solve(u0 + s * h * bump, D, 4.0, VISITS, 2e-3), 8) for s in (1, -1)]
    expected = (sides[0] - sides[1]) / (2 * h)
    change = torch.tensor(average(bump[None], 8).reshape(1, *line.u0.shape))
    _, du = trained[0].sensitivities(line.values, line.u0, line.days[:2], [None], du0=change)
    assert np.linalg.norm(du[0, 0].numpy().reshape(2, -1) - expected) < 5e-3 * np.linalg.norm(expected)


def test_follows_new_parameters_from_where_it_stands(line):
    solver = PinnSolver(rtol=1e-3)
    simulation = solver.build(line.model, line.domain, bm.Schedule())
    simulation.sensitivities(line.values, line.u0, line.days[:2], ["growth.k", "diffusion.D"])
    before = simulation.iterations
    other = {"growth.k": 0.115, "diffusion.D": 0.022}
    u = simulation(other, line.u0, line.days[:2])
    cold = solver.build(line.model, line.domain, bm.Schedule())
    cold(other, line.u0, line.days[:2])
    assert simulation.iterations - before < cold.iterations / 2
    u = u.numpy().reshape(2, -1)
    fine = start(1024, 1)
    truth = average(solve(fine, other["diffusion.D"] * SPAN / LENGTH**2, 0.115 * SPAN, VISITS, 2e-3), 8)
    assert np.linalg.norm(u - truth) < 2e-3 * np.linalg.norm(truth)


def test_without_space_it_is_the_reaction_alone():
    """A flat start stays flat: the network then solves the logistic equation with every treatment."""
    domain = bm.Domain.box((1, 1, 8))
    u0 = torch.full((1, 1, 1, 8), 0.4, dtype=torch.float64)
    days, values = [3.0, 6.0, 6.5, 15.0], {**FAST, "paclitaxel.efficacy": 0.3}
    u = PinnSolver(hidden=(16, 16), rtol=3e-4).build(TREATED, domain, SCHEDULE)(values, u0, days)
    point = torch.full((1, 1, 1, 1), 0.4, dtype=torch.float64)
    exact = bm.TorchSolver().build(TREATED, bm.Domain.point(), SCHEDULE)(values, point, days)
    assert float(exact.min()) < 0.3
    assert float((u - exact).abs().max()) < 1e-3


def test_jumps_are_exact():
    """Across a fraction the state falls by the surviving fraction, to rounding."""
    domain = bm.Domain.box((1, 1, 32))
    u0 = 0.5 * torch.exp(-(((torch.arange(32) - 15.5) / 5) ** 2)).reshape(1, 1, 1, 32).double()
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Radiotherapy()])
    schedule = bm.Schedule(fractions=[Fraction(6.0, 2.0)])
    values = {"growth.k": 0.1, "diffusion.D": 0.1, "radiotherapy.alpha": 0.2}
    u = PinnSolver(hidden=(10, 10), rtol=2e-3).build(model, domain, schedule)(values, u0, [6.0, 6.0 + 1e-7, 12.0])
    survival = np.exp(-0.2 * 2.0 * (1 + 2.0 / 10.0))
    assert float((u[0, 1] / u[0, 0] - survival).abs().max()) < 1e-6


def test_agrees_with_the_classical_solver_on_a_treated_box():
    domain = bm.Domain.box((1, 24, 20), (1.0, 0.7, 0.8))
    y, x = (torch.arange(n) - (n - 1) / 2 for n in (24, 20))
    u0 = 0.6 * torch.exp(-((y[:, None] / 6) ** 2) - (x[None] / 5) ** 2).reshape(1, 1, 24, 20).double()
    days = [8.0, 20.0]
    network = PinnSolver(rtol=1e-3).build(TREATED, domain, SCHEDULE)
    u = network(FAST, u0, days)
    classical = network.classical(FAST, u0, days)
    gap = (u - classical).square().sum((2, 3, 4)).sqrt() / classical.square().sum((2, 3, 4)).sqrt()
    assert float(gap.max()) < 5e-3, gap


def test_diffusion_alone_needs_no_network():
    """Without growth N = 0 solves the equation: the carried start is the solution."""
    domain = bm.Domain.box((1, 1, 40))
    u0 = torch.rand(1, 1, 1, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = bm.ReactionDiffusion(NoGrowth(), bm.Isotropic())
    u = PinnSolver(rtol=1e-6).build(model, domain, bm.Schedule())({"diffusion.D": 2.0}, u0, [30.0])
    fine = bm.TorchSolver(rtol=1e-6).build(model, domain, bm.Schedule())({"diffusion.D": 2.0}, u0, [30.0])
    assert float((u - fine).abs().max()) < 1e-3
    assert float(u.mean() - u0.mean()) == pytest.approx(0.0, abs=1e-6)


def test_a_training_that_fails_says_so(line):
    solver = PinnSolver(hidden=(2,), frequencies=1, rtol=1e-6, iterations=15, restarts=1)
    with pytest.warns(TrainingWarning, match="stalled.*raise iterations or hidden"):
        solver.build(line.model, line.domain, bm.Schedule())(line.values, line.u0, line.days)


@pytest.mark.slow
def test_forward_to_five_digits(line):
    simulation = PinnSolver(rtol=3e-5, points=2400).build(line.model, line.domain, bm.Schedule())
    errors = line.errors(simulation(line.values, line.u0, line.days))
    print("relative L2", errors)
    assert errors.max() < 1e-5
