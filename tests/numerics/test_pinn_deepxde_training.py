"""Training of DeepXDE networks: parameters and their covariance, stops, restarts, checkpoints, sampling."""

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.errors import InputError
from biomodel.schedule import Fraction
from fisher_kpp import Problem
from pinn import StateProblem, infer
from pinn.dde.secondorder import Dense, MatrixFree, Rows
from pinn.memory import OutOfMemoryWarning

pinn_dde = pytest.importorskip("pinn.dde", reason="DeepXDE is not installed: pip install 'tumorcast[pinn]'")
training = pinn_dde.training

SHAPE = (1, 1, 24)
AT = np.arange(24.0).reshape(SHAPE)
U0 = 0.3 * np.exp(-(((AT - 11.5) / 5) ** 2))
MODEL = bm.ReactionDiffusion(bm.Logistic(k=bm.LogNormal(0.03, 1.0)), bm.Isotropic(D=bm.LogNormal(0.3, 1.0)))


def small(model=MODEL, schedule=None, sd=0.02, seed=0, **given):
    """Two parameters on 24 voxels: data of the classical solver on a grid twice finer, with noise."""
    schedule = schedule or bm.Schedule()
    domain = bm.Domain.box(SHAPE)
    fine = bm.TorchSolver(rtol=1e-5).build(model, bm.Domain.box((1, 1, 48), (1.0, 1.0, 0.5)), schedule)
    start = torch.tensor(0.3 * np.exp(-((((np.arange(48) + 0.5) / 2 - 12) / 5) ** 2)).reshape(1, 1, 1, 48))
    truth = fine({"growth.k": 0.06, "diffusion.D": 0.15}, start, [10.0, 25.0])[0].reshape(2, 1, 1, 24, 2).mean(-1)
    data = truth.numpy() + sd * np.random.default_rng(seed).standard_normal((2, *SHAPE))
    inverse = pinn_dde.Inverse(model, domain, schedule, U0, [10.0, 25.0], data, sd)
    return inverse.posed(**{"hidden": (6, 6), "points": 150, "seed": seed} | given)


def classical(posed):
    one = posed.inverse
    simulation = bm.TorchSolver(rtol=1e-4).build(one.model, one.domain, one.schedule)
    return infer(StateProblem(one.model, simulation, torch.tensor(U0[None]), one.days, one.data, one.sd))


@pytest.mark.parametrize("treated", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_second_order_finds_what_the_classical_solver_finds(treated):
    """Parameters and their covariance, the network's weights marginalised; treatment by u = S w."""
    treatments = [bm.Radiotherapy(bm.Fixed(0.05))] if treated else []
    schedule = bm.Schedule(fractions=[Fraction(15, 2.0)] if treated else [])
    # Six units and 150 points are too few across a fraction: there the parameters move with the equation's weight.
    size = {"hidden": (10, 10), "points": 600} if treated else {}
    training = {"weights": (10.0, 100.0, 1000.0), "tolerance": 0.1} if treated else {
        "weights": (10.0, 100.0), "tolerance": 1.0}  # fmt: skip
    posed = small(bm.ReactionDiffusion(MODEL.growth, MODEL.diffusion, treatments), schedule, **size)
    found = pinn_dde.SecondOrder(**training).train(posed)
    best = classical(posed)
    assert posed.equation.names == tuple(best.values)
    off = (found.z - best.z) / best.sd
    print("off the classical solver (posterior sd):", off, "sd ratio:", found.sd / best.sd, found.iterations)
    assert found.converged and np.abs(off).max() < 0.3
    assert np.allclose(found.sd, best.sd, rtol=0.1)
    solved = bm.TorchSolver(rtol=1e-4).build(posed.inverse.model, posed.inverse.domain, posed.inverse.schedule)
    states = solved(found.values, torch.tensor(U0[None]), [10.0, 25.0])[0].numpy()
    assert np.abs(posed.states([10.0, 25.0]) - states).max() < 0.02


@pytest.mark.slow
def test_second_order_on_the_reference_problem():
    problem = Problem(1)
    data, sd = problem.noisy(0.05, 0)
    u0, days = problem.u0.numpy(), problem.days[:2]
    inverse = pinn_dde.Inverse(problem.model, problem.domain, bm.Schedule(), u0, days, data, sd)
    posed = inverse.posed(hidden=(12, 12), points=800)
    found = pinn_dde.SecondOrder().train(posed)
    solver = bm.TorchSolver(rtol=1e-4).build(problem.model, problem.domain, bm.Schedule())
    best = infer(StateProblem(problem.model, solver, problem.u0, problem.days[:2], data, sd))
    off = (found.z - best.z) / best.sd
    print("off (posterior sd):", off, "sd ratio:", found.sd / best.sd)
    # The classical grid's own error is up to 0.1 sd here.
    assert np.abs(off).max() < 0.4 and np.allclose(found.sd, best.sd, rtol=0.15)


def test_second_order_says_when_the_parameters_still_move():
    posed = small()
    with pytest.warns(pinn_dde.StoppedEarlyWarning, match="still moved"):
        found = pinn_dde.SecondOrder(weights=(1e-3, 10.0), iterations=4).train(posed)
    assert not found.converged and found.moved > 0.1


def test_second_order_without_memory(monkeypatch):
    """The device refuses more than 40 points at once."""
    posed, refused, linear = small(), [], Rows.linear

    def tight(self, v):
        held = self.chunks.over
        self.chunks.over = lambda f, points: held(guarded(f), points)
        return linear(self, v)

    def guarded(function):
        def inner(x):
            if len(x) > 40:
                refused.append(len(x))
                raise torch.OutOfMemoryError("CUDA out of memory")
            return function(x)

        return inner

    monkeypatch.setattr(Rows, "linear", tight)
    with pytest.warns((OutOfMemoryWarning, pinn_dde.StoppedEarlyWarning)) as said:
        pinn_dde.SecondOrder(weights=(10.0,), iterations=1).train(posed)
    assert refused and any("out of memory on cpu" in str(w.message) for w in said)


# First order ----------------------------------------------------------------------------------------------------------


def test_first_order_descends_and_seeds_repeat():
    reports = []
    for _ in range(2):
        posed = small()
        before = training._loss(posed)[0]
        reports.append(pinn_dde.FirstOrder(adam=60, lbfgs=40, restarts=0).train(posed))
        assert reports[-1].loss < 0.3 * before and reports[-1].adam == 60 and reports[-1].lbfgs == 40
    assert reports[0].loss == reports[1].loss


def test_lbfgs_that_gives_up_is_noticed(monkeypatch):
    """A line search that fails at once, as in single precision: new starts, then a warning."""
    posed = small()
    real = torch.optim.LBFGS.step

    def gives_up(self, closure):
        self.param_groups[0]["max_iter"] = 1
        return real(self, closure)

    monkeypatch.setattr(torch.optim.LBFGS, "step", gives_up)
    with pytest.warns(pinn_dde.StoppedEarlyWarning, match="L-BFGS stopped after .* gradient"):
        report = pinn_dde.FirstOrder(adam=0, lbfgs=500, restarts=2).train(posed)
    assert report.restarts == 2 and not report.flat and report.lbfgs < 10


def test_training_stops_when_the_parameters_have_settled():
    for tolerance, iterations in ((10.0, 15), (1e-9, 30)):
        posed = small()
        stop = pinn_dde.Settled(posed, period=5, tolerance=tolerance, looks=3)
        posed.model.compile("adam", lr=1e-3)
        posed.model.train(iterations=30, display_every=10**9, callbacks=[stop])
        assert stop.reached == (iterations == 15) and posed.model.train_state.iteration == iterations


def test_resume_continues_where_it_stopped(tmp_path):
    kept = tmp_path / "state.pt"
    whole = small()
    pinn_dde.FirstOrder(adam=40, lbfgs=0, every=10).train(whole)
    pinn_dde.FirstOrder(adam=20, lbfgs=0, every=10, checkpoint=kept).train(small())
    resumed = small()
    report = pinn_dde.FirstOrder(adam=40, lbfgs=0, every=10, checkpoint=kept).train(resumed)
    assert report.adam == 40
    assert torch.equal(pinn_dde.network.flat(whole.net)[0], pinn_dde.network.flat(resumed.net)[0])
    with pytest.raises(InputError, match="state.pt: not a checkpoint"):
        pinn_dde.FirstOrder(checkpoint=kept).train(small(hidden=(5, 5)))
    kept.write_bytes(b"PK damaged")
    with pytest.raises(InputError, match="state.pt"):
        pinn_dde.FirstOrder(checkpoint=kept).train(small())


def test_nothing_is_printed_in_a_pipe(capfd):
    pinn_dde.FirstOrder(adam=5, lbfgs=0).train(small())
    found = capfd.readouterr()
    assert found.out == "" and found.err == ""


# Sampling -------------------------------------------------------------------------------------------------------------


def test_points_go_where_the_residual_is_large():
    posed = small()
    monitored = posed.residual(pinn_dde.sampling.draw(posed.physics, 2000, 9)).abs()
    points = pinn_dde.refined(posed, seed=1)
    assert points.shape == posed.points.shape
    assert posed.residual(points).abs().mean() > 1.2 * monitored.mean()
    refine = pinn_dde.Refine(posed, period=2)
    before = posed.data.train_x_all.copy()
    posed.model.compile("adam", lr=1e-3)
    posed.model.train(iterations=3, display_every=10**9, callbacks=[refine])
    assert posed.data.train_x_all.shape == before.shape and not np.array_equal(posed.data.train_x_all, before)
    assert np.array_equal(posed.data.train_x_all, posed.points.numpy())


def test_causal_weights_fall_with_time():
    causal = pinn_dde.Causal(tolerance=1.0, bins=4)
    tau = torch.linspace(0, 1, 400, dtype=torch.float64)
    level = causal.at(torch.ones(400, dtype=torch.float64), tau)
    assert torch.allclose(torch.unique(level), torch.exp(-torch.arange(3, -1, -1.0)).double())
    late = causal.at((tau > 0.75).double(), tau)
    assert torch.allclose(late, torch.ones_like(late))
    # In the losses of DeepXDE and in the rows of second order alike.
    posed = small(causal=causal)
    v = pinn_dde.network.flat(posed.net)[0]
    half = sum(0.5 * float(r.value(v).square().sum()) for r in posed.rows())
    assert training.objective(posed)(v)[0] * len(posed.seen.data) == pytest.approx(half, rel=1e-10)


def test_without_the_matrix_the_step_is_the_same():
    """Forward and reverse mode through the equation, for networks too large for J'J."""
    posed = small(hidden=(3, 3), points=30)
    rows, v = posed.rows(), pinn_dde.network.flat(posed.net)[0]
    dense, free = Dense().at(rows, v), MatrixFree(most=500, tolerance=1e-10).at(rows, v)
    assert torch.allclose(free.gradient, dense.gradient, rtol=1e-8, atol=1e-8 * float(dense.gradient.abs().max()))
    step = torch.linspace(-1, 1, len(v), dtype=torch.float64)
    assert torch.allclose(free.push(step), dense.push(step), atol=1e-8 * float(dense.push(step).abs().max()))
    wanted = dense.solve(1e-3 * dense.scale, dense.gradient)
    assert torch.allclose(free.solve(1e-3 * dense.scale, free.gradient), wanted, rtol=1e-4, atol=1e-6)
