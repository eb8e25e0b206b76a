"""The network's derivatives against automatic differentiation, and what holds by construction."""

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.errors import ModelError, SolverError
from biomodel.schedule import Dose, Fraction
from biomodel.solvers.base import Context
from biomodel.solvers.reaction import TorchOps
from biomodel.terms import TensorDiffusion
from pinn import PinnSolver
from pinn.carried import coefficients
from pinn.carrier import BoxCarrier
from pinn.guides import Guides
from pinn.network import Network
from pinn.physics import Physics
from pinn.residuals import Direction, Points, Residual
from pinn.training import Trained, train
from pinn.voxels import Voxels

SPAN = 20.0
SCHEDULE = bm.Schedule(
    doses=[Dose(3.0, "paclitaxel", 80.0, "mg/m^2"), Dose(10.0, "paclitaxel", 80.0, "mg/m^2")],
    fractions=[Fraction(5.0, 2.0), Fraction(12.0, 2.0)],
)
MODELS = {
    "logistic": bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic()),
    "gompertz": bm.ReactionDiffusion(bm.Gompertz(), bm.Isotropic()),
    "treated": bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()]),
}


class Case:
    """A network with random weights on a box of unequal sides."""

    def __init__(self, name):
        self.model = MODELS[name]
        schedule = SCHEDULE if self.model.treatments else bm.Schedule()
        self.domain = bm.Domain.box((1, 12, 10), (1.0, 1.0, 1.5))
        self.physics = Physics(self.model, self.domain, schedule, 0.0, SPAN)
        rng = np.random.default_rng(0)
        u0 = 0.2 + 0.6 * rng.random((12, 10))
        self.c = torch.tensor(coefficients(u0))
        self.other = torch.tensor(coefficients(rng.random((12, 10))))
        self.values = {n: float(v) for n, v in self.model.complete().items()}
        self.carrier = BoxCarrier(self.physics)
        self.guides = Guides(self.physics, self.values, self.carrier.guide(u0, self.values))
        self.network = Network(self.physics.metric, 3, (7, 6), self.guides.count)
        self.w = 2 * self.network.start(1)
        generator = torch.Generator().manual_seed(2)
        self.x = torch.rand(40, 2, generator=generator, dtype=torch.float64)
        self.tau = torch.rand(40, generator=generator, dtype=torch.float64)
        self.residual = Residual(self.physics, self.network, Points.inside(self.x, self.tau), self.guides, self.carrier)
        self.residual.hold(self.values, self.c)

    def spread(self, c, point, amount):
        """The carried start at one point, as automatic differentiation can follow it."""
        found = c
        for i, n in enumerate(self.physics.shape):
            k = np.pi * torch.arange(n, dtype=torch.float64)
            found = (torch.cos(point[i] * k) * torch.exp(-amount * point[2] * self.physics.metric[i] * k**2)) @ found
        return found

    def w_state(self, point, w, values, c):
        guide = self.guides.carried
        further = [self.spread(guide.start, point, guide.diffusion)]
        if self.guides.count > 1:
            further.append(self.clock(point[2]))
        n = self.network.value(w, self.network.features(point[None, :2], point[2:], [f[None] for f in further]))[0][0]
        return torch.exp(point[2] * n) * self.spread(c, point, values["diffusion.D"] * SPAN / self.physics.length**2)

    def clock(self, tau):
        return self.guides.clock(tau[None])[0][0]

    def strong(self, point, w, values, c):
        """The strong residual of one point."""
        amount = values["diffusion.D"] * SPAN / self.physics.length**2
        slope = torch.func.grad(self.w_state)(point, w, values, c)
        bend = torch.func.jacrev(torch.func.grad(self.w_state))(point, w, values, c)
        spared = torch.exp(-self.physics.spared(values, point[2:]))[0]
        u = spared * self.w_state(point, w, values, c)
        laplacian = self.physics.metric[0] * bend[0, 0] + self.physics.metric[1] * bend[1, 1]
        return spared * (slope[2] - amount * laplacian) - self.growth(values, u)

    def growth(self, values, u):
        term = self.model.growth
        return SPAN * term.rate(u, self.model.of(term, values), Context(), TorchOps)

    @property
    def points(self):
        return torch.cat((self.x, self.tau[:, None]), 1)


@pytest.fixture(scope="module", params=sorted(MODELS))
def case(request):
    return Case(request.param)


def test_residual_is_the_strong_form(case):
    expected = torch.stack([case.strong(p, case.w, case.values, case.c) for p in case.points])
    found = case.residual.value(case.w)
    assert float(found.abs().max()) > 0.1
    assert float((found - expected).abs().max()) < 1e-10


def test_jacobian_by_weights(case):
    r, j = case.residual.linear(case.w)
    assert torch.equal(r, case.residual.value(case.w))
    expected = torch.stack([torch.func.grad(case.strong, 1)(p, case.w, case.values, case.c) for p in case.points[:6]])
    assert float((j[:6] - expected).abs().max()) < 1e-10 * float(j.abs().max())


def test_derivatives_by_parameters_and_start(case):
    directions = [Direction(n) for n in case.model.free] + [Direction(start=case.other)]
    found = case.residual.along(case.w, directions)
    for row, direction in zip(found, directions, strict=True):

        def moved(s, p, direction=direction):
            values, c = dict(case.values), case.c
            if direction.name is not None:
                values[direction.name] = values[direction.name] + s
            else:
                c = c + s * case.other
            return case.strong(p, case.w, values, c)

        zero = torch.zeros((), dtype=torch.float64)
        expected = torch.stack([torch.func.grad(moved)(zero, p) for p in case.points[:6]])
        assert float(expected.abs().max()) > 1e-3
        assert float((row[:6] - expected).abs().max()) < 1e-9 * max(1.0, float(expected.abs().max()))


def test_voxels_and_their_derivatives(case):
    voxels = Voxels(case.physics, case.network, case.guides, case.carrier)
    voxels.hold(case.values, case.c)
    directions = [Direction(n) for n in case.model.free] + [Direction(start=case.other)]
    generator = torch.Generator().manual_seed(3)
    dw = torch.randn(len(directions), case.network.count, generator=generator, dtype=torch.float64)
    tau, h = 0.7, 1e-6
    u, du = voxels.along(case.w, tau, directions, dw)
    assert torch.equal(u, voxels.state(case.w, tau))
    for i, direction in enumerate(directions):
        sides = []
        for sign in (1, -1):
            values, c = dict(case.values), case.c
            if direction.name is not None:
                values[direction.name] += sign * h
            else:
                c = c + sign * h * case.other
            voxels.hold(values, c)
            sides.append(voxels.state(case.w + sign * h * dw[i], tau))
        expected = (sides[0] - sides[1]) / (2 * h)
        assert float((du[i] - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_start_holds_exactly_and_nothing_flows_out():
    case = Case("logistic")
    u0 = 0.2 + 0.6 * np.random.default_rng(0).random((12, 10))
    # A function of position, averaged finely over each voxel, gives the start's voxels back.
    fine = 64
    x = [torch.tensor((np.arange(n * fine) + 0.5) / (n * fine)) for n in (12, 10)]
    grid = torch.stack(torch.meshgrid(*x, indexing="ij"), -1).reshape(-1, 2)
    points = Points.inside(grid, torch.zeros(len(grid), dtype=torch.float64))
    residual = Residual(case.physics, case.network, points, case.guides, case.carrier)
    residual.hold(case.values, case.c)
    averages = residual.state(case.w).reshape(12, fine, 10, fine).mean((1, 3)).numpy()
    assert np.abs(averages - u0).max() < 1e-3  # midpoint rule
    for axis, side in ((0, 0.0), (0, 1.0), (1, 0.0), (1, 1.0)):
        point = torch.tensor([0.37, 0.61, 0.8], dtype=torch.float64)
        point[axis] = side
        slope = torch.func.grad(case.w_state)(point, case.w, case.values, case.c)
        assert abs(float(slope[axis])) < 1e-10 < abs(float(slope[2]))


def test_clock_is_the_integral_of_what_treatment_spares():
    case = Case("treated")
    tau = torch.linspace(0, 1, 9, dtype=torch.float64)
    found, spared = case.guides.clock(tau)
    fine = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    s = torch.exp(-case.physics.spared(case.values, fine))
    whole = torch.cat((torch.zeros(1), torch.cumulative_trapezoid(s, fine)))
    assert float((found - whole[::25_000]).abs().max()) < 1e-5
    assert torch.allclose(spared, s[::25_000])
    assert float(spared[-1]) < 0.8


def test_training_reaches_a_target_and_says_where_it_ended():
    case = Case("logistic")
    begun = Trained(case.w)
    ended = train(case.residual, begun, 1e-2, 60)
    assert ended.rms <= 1e-2 and 0 < ended.iterations < 60
    r = case.residual.value(ended.w)
    assert ended.rms == pytest.approx(
        float(r.square().mean().sqrt() / case.residual.state(ended.w).square().mean().sqrt())
    )
    again = train(case.residual, begun, 1e-2, 60)
    assert torch.equal(again.w, ended.w)


class TestRefusals:
    box = bm.Domain.box((1, 8, 8))

    def refused(self, match, model=None, domain=None, error=SolverError):
        with pytest.raises(error, match=match):
            PinnSolver().build(model or MODELS["logistic"], domain or self.box, bm.Schedule())

    def test_a_mask_of_two_pieces(self):
        mask = np.ones((1, 8, 8), bool)
        mask[0, 3] = False
        self.refused("2 components.*tumour.*TorchSolver", domain=bm.Domain.box((1, 8, 8), mask=mask))

    def test_a_point(self):
        self.refused("single point", domain=bm.Domain.point())

    def test_a_field_that_is_not_there(self):
        self.refused("adipose", model=bm.ReactionDiffusion(diffusion=bm.TissueDiffusion()))
        drug = bm.Chemotherapy("paclitaxel", map="drug_map")
        self.refused("drug_map", model=bm.ReactionDiffusion(treatments=[drug]))

    def test_a_diffusion_tensor(self):
        self.refused("preferred direction.*FenicsSolver", model=bm.ReactionDiffusion(diffusion=TensorDiffusion()))

    def test_therapy_without_a_term(self):
        with pytest.raises(ModelError, match="paclitaxel"):
            PinnSolver().build(MODELS["logistic"], self.box, SCHEDULE)

    @pytest.mark.parametrize(
        ("u0", "days", "match"),
        [
            (np.full((1, 8, 8), np.nan), [5.0], "NaN"),
            (np.full((1, 8, 7), 0.1), [5.0], r"shape \(1, 8, 7\)"),
            (np.full((1, 8, 8), 0.1), [-1.0], "not before day 0"),
            (np.full((1, 8, 8), 0.1), [5.0, 2.0], "increasing"),
        ],
    )
    def test_bad_calls(self, u0, days, match):
        simulation = PinnSolver().build(MODELS["logistic"], self.box, bm.Schedule())
        with pytest.raises(SolverError, match=match):
            simulation({}, u0, days)

    def test_bad_settings(self):
        with pytest.raises(SolverError, match="rtol"):
            PinnSolver(rtol=0.0)
        with pytest.raises(SolverError, match="hidden"):
            PinnSolver(hidden=())
