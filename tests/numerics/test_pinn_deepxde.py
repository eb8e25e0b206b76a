"""The models of `biomodel` as DeepXDE problems: residual, conditions, networks, geometry, training."""

import os
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.errors import CalibrationError, SolverError
from biomodel.schedule import Dose, Fraction
from pinn.carried import Places
from pinn.carrier import BoxCarrier
from pinn.network import Network
from pinn.residuals import Guides, Points, Residual

pinn_dde = pytest.importorskip("pinn.dde", reason="DeepXDE is not installed: pip install 'tumorcast[pinn]'")
dde = pinn_dde.dde

SHAPE = (1, 10, 12)
Y, X = np.meshgrid(np.arange(10), np.arange(12), indexing="ij")
U0 = (0.4 * np.exp(-((Y - 5) ** 2 + (X - 4) ** 2) / 12)).reshape(SHAPE)
TISSUES = {"white": ((X + Y) / 20).reshape(SHAPE).clip(0, 1), "grey": (1 - (X + Y) / 20).reshape(SHAPE).clip(0, 1)}


def problem(model=None, schedule=None, mask=None, start_sd=None, fields=None, **given):
    domain = bm.Domain.box(SHAPE, (1.0, 2.0, 1.5), mask=mask, tissues=TISSUES)
    data = np.broadcast_to(U0, (2, *SHAPE)).copy()
    data[0, 0, 0, 0] = np.nan
    inverse = pinn_dde.Inverse(
        model or bm.ReactionDiffusion(), domain, schedule or bm.Schedule(), U0, [10.0, 20.0], data, 0.02,
        fields=fields, start_sd=start_sd,
    )  # fmt: skip
    return inverse.posed(hidden=(6, 6), points=40, **given)


def shaken(posed, seed=0):
    """The same with weights that are not small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in posed.net.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return posed


MODELS = {
    "plain": (bm.ReactionDiffusion(), bm.Schedule(), None),
    "treated": (
        bm.ReactionDiffusion(bm.Gompertz(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()]),
        bm.Schedule(doses=[Dose(4, "paclitaxel", 80, "mg/m^2")], fractions=[Fraction(8, 2.0)]),
        None,
    ),
    "tissues": (
        bm.ReactionDiffusion(
            diffusion=bm.TissueDiffusion(("white", "grey"), (bm.LogNormal(0.3, 1), bm.LogNormal(0.1, 1)))
        ),
        bm.Schedule(),
        None,
    ),
    "drug map": (
        bm.ReactionDiffusion(treatments=[bm.Chemotherapy("paclitaxel", map="drug")]),
        bm.Schedule(doses=[Dose(4, "paclitaxel", 80, "mg/m^2")]),
        {"drug": 0.5 + TISSUES["white"]},
    ),
}  # fmt: skip


# Residual -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_of_deriving_give_the_same_numbers(name):
    """DeepXDE's reverse mode against forward mode of forward mode, for every kind of term."""
    model, schedule, fields = MODELS[name]
    posed = shaken(problem(model, schedule, fields=fields))
    rows = posed.rows()[0]
    v = pinn_dde.network.flat(posed.net)[0]
    by_deepxde = posed.residual(posed.points)
    by_func = rows.function(v, posed.points)
    assert by_func.abs().max() > 1e-2
    assert torch.allclose(by_deepxde, by_func, atol=1e-12)
    assert torch.allclose(rows.value(v), rows.traced(v), atol=1e-12 * float(torch.as_tensor(rows.weight).max()))


def test_residual_is_that_of_the_own_solver():
    """A state of `pinn.PinnSolver` as a function that DeepXDE differentiates: the same residual to rounding."""
    model, schedule, _ = MODELS["treated"]
    posed = problem(model, schedule)
    physics, values = posed.physics, {n: p.typical for n, p in model.parameters.items()}
    carrier = BoxCarrier(physics)
    guides = Guides(physics, values, carrier.guide(U0.reshape(physics.shape), values))
    network = Network(physics.metric, 3, (5, 5), guides.count)
    w = 5 * network.start(0)
    x = posed.points
    residual = Residual(physics, network, Points.inside(x[:, :2], x[:, 2]), guides, carrier)
    start = carrier.start(U0.reshape(physics.shape), values, [20.0])
    residual.hold(values, start)
    own = residual.value(w)

    places = x.detach().clone().requires_grad_()
    tau = places[:, 2]
    carried = Places.of(places[:, :2], tau, physics.shape, physics.metric).carried(start, physics.diffusion(values))[0]
    further = [carried / U0.max(), guides.clock(tau)[0]]
    n = network.value(w, network.features(places[:, :2], tau, further))[0]
    found = posed.equation.strong(posed.net.z.detach(), places, (carried * torch.exp(tau * n))[:, None])[:, 0].detach()
    dde.gradients.clear()
    assert own.abs().max() > 0.1
    assert torch.allclose(found, own, atol=1e-12)


def test_manufactured_solution_has_no_residual():
    """u = exp(-D k² t + r t) cos(k x) solves u_t = D u_xx + r u."""
    model = bm.ReactionDiffusion(bm.Exponential(k=bm.LogNormal(0.02, 1)), bm.Isotropic(D=bm.LogNormal(0.5, 1)))
    posed = problem(model)
    x = posed.points.detach().clone().requires_grad_()
    k, length = np.pi / 18.0, 18.0  # one half wave along x: 12 voxels of 1.5 mm
    w = torch.exp((0.02 - 0.5 * k**2) * 20 * x[:, 2]) * torch.cos(k * length * x[:, 1])
    residual = posed.equation.strong(posed.net.z.detach(), x, w[:, None])
    dde.gradients.clear()
    assert residual.abs().max() < 1e-12


# Conditions and losses ------------------------------------------------------------------------------------------------


def test_losses_add_up_to_the_posterior():
    """DeepXDE's weighted losses, the rows of the second-order training, and the posterior written out."""
    posed = shaken(problem(start_sd=0.05))
    v = pinn_dde.network.flat(posed.net)[0]
    value, gradient = pinn_dde.training.objective(posed)(v)
    half = sum(0.5 * float(r.value(v).square().sum()) for r in posed.rows())
    count = len(posed.seen.data)
    assert count == 3 * 120 - 1
    assert value * count == pytest.approx(half, rel=1e-10)
    states = posed.states([0.0, 10.0, 20.0])
    data = np.concatenate((U0[None], posed.inverse.data))
    sd = np.array([0.05, 0.02, 0.02]).reshape(3, 1, 1, 1)
    misfit = 0.5 * np.nansum(((states - data) / sd) ** 2)
    prior = 0.5 * sum(
        ((z - p.prior.location) / p.prior.scale) ** 2
        for z, p in zip(posed.z, (posed.inverse.model.parameters[n] for n in posed.equation.names), strict=True)
    )
    noise = (2 * 120 - 1) / count * 0.02**2 + 120 / count * 0.05**2
    equation = 0.5 * posed.weight * count * float(posed.residual(posed.points).square().mean()) / noise
    assert half == pytest.approx(misfit + prior + equation, rel=1e-10)
    step = 1e-6 * torch.randn(len(v), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    f = pinn_dde.training.objective(posed)
    assert float(gradient @ step) == pytest.approx((f(v + step)[0] - f(v - step)[0]) / 2, rel=1e-4)


def test_start_holds_and_states_are_positive():
    for growing in (True, False):
        posed = shaken(problem(growing=growing))
        states = posed.states([0.0, 15.0])
        assert np.allclose(states[0], U0, atol=2e-4 * U0.max())
        assert states.min() > 0 and np.abs(states[1] - U0).max() > 0.05


def test_jump_is_exact():
    model, schedule, _ = MODELS["treated"]
    posed = shaken(problem(model, schedule))
    before, after = posed.states([8.0, 8.0 + 1e-6])
    alpha = posed.values["radiotherapy.alpha"]
    assert np.allclose(after / before, np.exp(-alpha * 2.0 * 1.2), rtol=1e-5)


def test_organ_as_a_geometry_of_deepxde():
    mask = ((Y - 4.5) / 4.2) ** 2 + ((X - 5.5) / 5.0) ** 2 < 1
    posed = shaken(problem(mask=mask.reshape(SHAPE)))
    organ = pinn_dde.Organ(posed.physics.geometry)
    centres = np.stack(((Y + 0.5) / 10, (X + 0.5) / 12), -1).reshape(-1, 2)
    assert (organ.inside(centres) == mask.ravel()).mean() > 0.97
    inside = organ.random_points(200)
    assert organ.inside(inside).all() and not np.array_equal(inside, organ.random_points(200))
    surface = organ.random_boundary_points(60)
    assert len(surface) > 20 and organ.on_boundary(surface).all()
    outward = organ.boundary_normal(surface)
    assert np.allclose(np.linalg.norm(outward, axis=1), 1)
    assert not organ.inside(surface + 0.05 * outward).any() and organ.inside(surface - 0.05 * outward).all()
    # The flux of the condition and of the rows is the same, and it is a loss.
    rows = posed.rows()[-1]
    v = pinn_dde.network.flat(posed.net)[0]
    x = torch.tensor(posed.data.train_x).requires_grad_()
    ends = np.cumsum([0, *posed.data.num_bcs])
    flux = posed.flux.error(None, x, posed.net(x), ends[2], ends[3]).detach()[:, 0]
    dde.gradients.clear()
    assert torch.allclose(rows.value(v), rows.weight * flux, atol=1e-10)
    assert len(posed.model.weights) == 4 and posed.states([20.0])[0][0][~mask].max() == 0


def test_sides_of_the_box_are_closed():
    """By cosines whatever the weights are; by a condition where the user's features do not see to it."""
    posed = shaken(problem())
    assert posed.flux is None
    x = torch.tensor([[0.0, 0.3, 0.5], [1.0, 0.6, 0.2], [0.4, 0.0, 0.9], [0.7, 1.0, 0.4]], dtype=torch.float64)
    x.requires_grad_()
    (slope,) = torch.autograd.grad(posed.net(x).sum(), x)
    assert slope[:2, 0].abs().max() < 1e-12 and slope[2:, 1].abs().max() < 1e-12
    features = pinn_dde.Fourier(posed.physics, 4, seed=1)
    opened = problem(features=features)
    assert opened.flux is not None and len(opened.model.weights) == 4


# Networks of the user -------------------------------------------------------------------------------------------------


class Dictionary(torch.nn.Linear):
    def forward(self, x):
        return {"u": super().forward(x)}


def layers(count, units, out=1, between=None):
    between = between or [torch.nn.Tanh()]
    return torch.nn.Sequential(torch.nn.Linear(count, units), *between, torch.nn.Linear(units, out))


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda n: layers(n, 4, out=2), r"\(7, 2\).*\(7, 1\)"),
        (lambda n: layers(n + 1, 4), "must take"),
        (lambda n: layers(n, 4, between=[torch.nn.ReLU()]), "second derivative"),
        (lambda n: layers(n, 4, between=[torch.nn.Tanh(), torch.nn.BatchNorm1d(4)]), "batch"),
        (lambda n: Dictionary(n, 1), "dict"),
        (lambda n: torch.nn.Tanh(), "no weights"),
    ],
)
def test_network_with_wrong_outputs_is_refused(make, complaint):
    count = problem().net.features.count
    with pytest.raises(SolverError, match=complaint):
        problem(core=make(count).double())


def test_network_in_single_precision_is_refused():
    count = problem().net.features.count
    with pytest.raises(SolverError, match=r"float32.*\.double\(\)"):
        problem(core=layers(count, 4))


def test_own_network_and_going_on_alone(tmp_path):
    """A user's network, DeepXDE's own optimiser and NNCG, its save and restore; global precision is untouched."""
    count = problem().net.features.count
    torch.manual_seed(0)
    core = torch.nn.Sequential(torch.nn.Linear(count, 5), torch.nn.SiLU(), torch.nn.Linear(5, 1)).double()
    posed = problem(core=core)
    model = posed.model
    model.compile("adam", lr=1e-2)
    first = pinn_dde.training._loss(posed)[0]
    model.train(iterations=30)
    model.compile("NNCG")  # DeepXDE refuses it where parameters are external variables
    assert pinn_dde.training._loss(posed)[0] < first
    z = posed.z
    model.compile("adam", lr=1e-2)
    path = model.save(str(tmp_path / "kept"))
    model.train(iterations=1)
    assert not np.array_equal(posed.z, z)
    model.restore(path)
    assert np.array_equal(posed.z, z)
    assert torch.get_default_dtype() == torch.float32 and dde.config.real.precision == 32
    assert model.predict(posed.points[:3].numpy()).dtype == np.float64


# Bad input ------------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused():
    domain = bm.Domain.box(SHAPE)
    data = np.zeros((1, *SHAPE))
    given = (bm.ReactionDiffusion(), domain, bm.Schedule(), U0)
    with pytest.raises(CalibrationError, match="shape"):
        pinn_dde.Inverse(*given, [1.0, 2.0], data, 0.1)
    with pytest.raises(CalibrationError, match="before the first image"):
        pinn_dde.Inverse(*given, [-1.0], data, 0.1)
    with pytest.raises(CalibrationError, match="no value"):
        pinn_dde.Inverse(*given, [1.0], data * np.nan, 0.1)
    with pytest.raises(CalibrationError, match="all parameters are known"):
        known = bm.ReactionDiffusion().fix({"growth.k": 0.1, "diffusion.D": 0.1})
        pinn_dde.Inverse(known, domain, bm.Schedule(), U0, [1.0], data, 0.1)
    two = np.zeros(SHAPE, bool)
    two[:, :, :3] = two[:, :, 8:] = True
    with pytest.raises(SolverError, match="2 components"):
        problem(mask=two)
    with pytest.raises(CalibrationError, match="rise"):
        pinn_dde.SecondOrder(weights=(10.0, 1.0))


def test_other_back_ends_are_refused(monkeypatch):
    backend = pinn_dde.backend
    other = types.ModuleType("deepxde")
    other.backend = types.SimpleNamespace(backend_name="paddle")
    monkeypatch.setitem(sys.modules, "deepxde", other)
    with pytest.raises(SolverError, match="already imported with the back end 'paddle'"):
        backend.load()
    monkeypatch.setitem(sys.modules, "deepxde", None)  # as if it were not installed
    with pytest.raises(SolverError, match="pip install"):
        backend.load()
    monkeypatch.setenv("DDE_BACKEND", "jax")
    with pytest.raises(SolverError, match="DDE_BACKEND is 'jax'"):
        backend.load()


@pytest.mark.slow
def test_import_says_nothing_and_pinn_alone_does_not_load_deepxde():
    code = (
        "import pinn, sys; print('deepxde' in sys.modules);"
        "from pinn.dde import dde; print(dde.backend.backend_name)"
    )
    env = {k: v for k, v in os.environ.items() if k != "DDE_BACKEND"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert run.stdout.split() == ["False", "pytorch"] and run.stderr == ""
