"""Masks, tissues and drug maps for a network: smooth fields, surface points, and the residual's derivatives."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

import biomodel as bm
from biomodel.schedule import Dose, Fraction
from pinn.carrier import OrganCarrier
from pinn.geometry import Geometry
from pinn.guides import Guides
from pinn.network import Network
from pinn.physics import Physics
from pinn.residuals import Direction, Points, Residual
from pinn.splines import Splines, on_sides
from pinn.voxels import Voxels

SPAN = 20.0
SCHEDULE = bm.Schedule(
    doses=[Dose(3.0, "paclitaxel", 80.0, "mg/m^2"), Dose(10.0, "paclitaxel", 80.0, "mg/m^2")],
    fractions=[Fraction(5.0, 2.0)],
)


def disc(shape, radius, spacing=1.0):
    axes = np.meshgrid(*[(np.arange(n) - (n - 1) / 2) * spacing for n in shape], indexing="ij")
    return sum(a**2 for a in axes) < radius**2


class TestSplines:
    def test_derivatives_are_those_of_the_value(self):
        field = torch.tensor(np.random.default_rng(0).random((7, 9)))
        x = torch.rand(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        metric = torch.tensor([1.0, 2.5], dtype=torch.float64)
        found = Splines.of(x, (7, 9)).all(field, metric)

        def value(p):
            return Splines.of(p[None], (7, 9)).value(field)[0]

        for i, p in enumerate(x):
            slope = torch.func.grad(value)(p)
            bend = torch.func.jacrev(torch.func.grad(value))(p)
            assert float((found[1:3, i] - slope).abs().max()) < 1e-10
            assert float(found[3, i] - (metric * bend.diagonal()).sum()) == pytest.approx(0, abs=1e-8)

    def test_stays_within_its_range_and_keeps_lines(self):
        x = torch.linspace(0, 1, 101, dtype=torch.float64)[:, None]
        jump = torch.tensor([0.0] * 10 + [1.0] * 10, dtype=torch.float64)
        steps = Splines.of(x, (20,)).value(jump)
        assert float(steps.min()) >= 0 and float(steps.max()) <= 1 + 1e-15 and bool((steps.diff() > -1e-15).all())
        line = torch.arange(20, dtype=torch.float64) + 0.5
        inside = (x[:, 0] > 0.1) & (x[:, 0] < 0.9)
        assert torch.allclose(Splines.of(x, (20,)).value(line)[inside], 20 * x[inside, 0])

    def test_on_a_grid_is_the_same_as_at_points(self):
        field = torch.tensor(np.random.default_rng(0).random((5, 6, 4)))
        sides = [torch.linspace(0.03, 0.98, m, dtype=torch.float64) for m in (4, 3, 5)]
        points = torch.stack(torch.meshgrid(*sides, indexing="ij"), -1).reshape(-1, 3)
        expected = Splines.of(points, field.shape).value(field)
        assert torch.allclose(on_sides(field, sides).reshape(-1), expected, atol=1e-14)


class TestGeometry:
    shape, radius = (30, 26), 10.0

    @pytest.fixture
    def round(self):
        return Geometry(disc(self.shape, self.radius), np.array([1.0, 1.0]))

    def place(self, points):
        return (points[:, :2] * torch.tensor(self.shape) - torch.tensor(self.shape) / 2).numpy()

    def test_surface_points_lie_on_the_circle_with_its_normals(self, round):
        points, normals = round.surface(300, 0)
        assert len(points) > 250
        x = self.place(points)
        r = np.linalg.norm(x, axis=1)
        assert np.abs(r - self.radius).max() < 0.5 and abs(r.mean() - self.radius) < 0.15
        cosine = (x / r[:, None] * normals.numpy()).sum(1)
        assert cosine.min() > 0.97  # the staircase is blurred

    def test_points_inside_are_inside_and_follow_the_density(self, round):
        points = round.inside(500, 3)
        assert len(points) == 500 and np.linalg.norm(self.place(points), axis=1).max() < self.radius + 0.5
        left = torch.ones(self.shape, dtype=torch.float64)
        left[15:] = 0.25
        x = self.place(round.inside(2000, 3, left))[:, 0]
        assert 3 < (x < 0).sum() / (x > 0).sum() < 5

    def test_a_continued_field_is_symmetric_about_the_surface(self, round):
        x, y = np.meshgrid(*[np.arange(n) - (n - 1) / 2 for n in self.shape], indexing="ij")
        r = np.hypot(x, y)
        field = np.exp(-((r - 7) ** 2) / 8)  # steep at the surface
        found = round.continued(np.where(round.mask, field, 1e9)).numpy()
        assert np.array_equal(found[round.mask], field[round.mask])
        ring = ~round.mask & (r < 12)
        mirrored = np.exp(-((2 * self.radius - r - 7) ** 2) / 8)
        nearest = distance_transform_edt(~round.mask, return_distances=False, return_indices=True)
        errors = [np.abs(f - mirrored)[ring].mean() for f in (found, field[tuple(nearest)])]
        print("mirrored", errors[0], "nearest voxel", errors[1])
        assert errors[0] < errors[1] / 2

    def test_thick_slices(self):
        """Distances and mirrored rows of a flat edge across and along voxels of unequal sides, mm."""
        n = 20
        for axis, spacing in ((0, (4.0, 1.0)), (1, (4.0, 1.0)), (0, (1.0, 4.0))):
            mask = np.ones((n, n), bool)
            mask[(slice(None),) * axis + (slice(10, None),)] = False
            geometry = Geometry(mask, np.array(spacing))
            line = np.arange(n, dtype=float)
            # The blur of the distance ends at the box's sides.
            found = np.moveaxis(geometry.distance.numpy(), axis, 0)[4:-4, 6]
            assert np.abs(found - (9.5 - line[4:-4]) * spacing[axis]).max() < 1e-6
            field = np.moveaxis(line[:, None] + np.zeros((n, n)), 0, axis)
            row = np.moveaxis(geometry.continued(field).numpy(), axis, 0)[:, 6]
            assert np.allclose(row[10:14], [9, 8, 7, 6])

    def test_thin_parts_have_points(self):
        mask = disc((30, 30), 7.0)
        mask[15, 15:29] = True
        x = Geometry(mask, np.ones(2)).inside(2000, 0)[:, :2].numpy() * 30
        assert ((x[:, 1] > 24) & (x[:, 0] > 15) & (x[:, 0] < 16)).sum() > 20

    def test_a_small_organ_in_a_large_box_has_all_its_points(self):
        mask = np.zeros((40, 40, 40), bool)
        mask[16:22, 16:22, 16:22] = True
        assert len(Geometry(mask, np.ones(3)).inside(300, 0)) == 300

    def test_a_whole_box_has_no_surface(self):
        box = Geometry(np.ones((4, 5), bool), np.ones(2))
        assert box.whole and box.layer == 0 and len(box.surface(50, 0)[0]) == 0


class Case:
    """A network with random weights in a disc with two tissues, a drug map and resistant cells."""

    days = (8.0, 20.0)

    def __init__(self):
        shape = (14, 12)
        mask = disc(shape, 5.5)
        rng = np.random.default_rng(0)
        tissue = rng.random(shape)
        self.domain = bm.Domain.box(
            (1, *shape), (1.0, 1.0, 1.5), mask[None],
            {"adipose": tissue[None] * mask, "fibroglandular": (1 - tissue[None]) * mask},
        )  # fmt: skip
        self.model = bm.ReactionDiffusion(
            bm.Logistic(), bm.TissueDiffusion(D=(bm.LogNormal(0.2, 0.5), bm.LogNormal(0.05, 0.5))),
            [bm.Chemotherapy("paclitaxel", map="drug_map", resistant=bm.LogitNormal(0.1, 1.0)), bm.Radiotherapy()],
        )  # fmt: skip
        self.fields = {"drug_map": (0.5 + rng.random(shape))[None]}
        self.physics = Physics(self.model, self.domain, SCHEDULE, 0.0, SPAN, self.fields)
        self.carrier = OrganCarrier(self.physics, self.domain, self.fields)
        self.values = {n: float(v) for n, v in self.model.complete().items()}
        self.u0 = np.where(mask, 0.2 + 0.6 * rng.random(shape), 0.0)
        self.other = np.where(mask, rng.random(shape), 0.0)
        self.start = self.carrier.start(self.u0, self.values, self.days)
        self.guides = Guides(self.physics, self.values, self.carrier.guide(self.u0, self.values))
        self.network = Network(self.physics.metric, 3, (6, 5), self.guides.count)
        self.w = 2 * self.network.start(1)
        self.points = Points.draw(self.physics, self.carrier, 30, 0)
        self.residual = Residual(self.physics, self.network, self.points, self.guides, self.carrier)
        self.residual.hold(self.values, self.start)

    def directions(self):
        names = [*self.model.free, None]
        du0 = np.zeros((len(names), *self.physics.shape))
        du0[-1] = self.other
        carried = self.carrier.directions(self.u0, self.values, self.days, names, du0)
        return [Direction(n, c) for n, c in zip(names, carried, strict=True)]

    def moved(self, direction, h):
        """Parameters and start a step of h along a direction; the step is relative for parameters."""
        values, u0 = dict(self.values), self.u0
        if direction.name:
            h *= values[direction.name]
            values[direction.name] += h
        else:
            u0 = u0 + h * self.other
        return values, self.carrier.start(u0, values, self.days), h


@pytest.fixture(scope="module")
def case():
    return Case()


class TestEquation:
    """The residual against automatic differentiation, the carried start and the guides taken as they are."""

    def network_at(self, case, k, w):
        """N, its derivative by time, its gradient and its Laplacian at point k (d + 3,)."""
        out, _ = case.network.forward(w, case.residual.equation.inputs[:, k : k + 1])
        return out[:, 0]

    def test_residual_is_the_product_rule(self, case):
        """div(D grad(B e^G)) less e^G div(D grad B), by automatic differentiation of smooth stand-ins for B and G."""
        physics, equation = case.physics, case.residual.equation
        rows = equation.rows(equation.parts(case.w))
        d_field = physics.geometry.continued(physics.coefficient(case.values))
        drug = physics.fields["drug_map"]
        for k in range(8):
            x, tau = case.points.x[k], case.points.tau[k]
            b0, slopes = equation.carried[0, k], equation.carried[1:, k]
            n, n_t, grad, lap = (v for v in (lambda o: (o[0], o[1], o[2:-1], o[-1]))(self.network_at(case, k, case.w)))

            def b(p, b0=b0, slopes=slopes, x=x):
                return b0 + (slopes * (p - x)).sum()

            def exponent(p, n=n, grad=grad, lap=lap, x=x, tau=tau):
                # A quadratic with the network's value, gradient and Laplacian (all of it along the first axis).
                bend = 0.5 * lap / physics.metric[0] * (p[0] - x[0]) ** 2
                m = Splines.of(p[None], physics.shape).value(drug)
                spared = physics.spared(case.values, tau[None], {"drug_map": m})[0]
                return tau * (n + (grad * (p - x)).sum() + bend) - spared

            def flux(p, f):
                d = Splines.of(p[None], physics.shape).value(d_field)[0]
                return d * physics.metric * torch.func.grad(f)(p)

            whole = torch.func.jacrev(lambda p: flux(p, lambda q: b(q) * torch.exp(exponent(q))))(x).trace()
            alone = torch.exp(exponent(x)) * torch.func.jacrev(lambda p: flux(p, b))(x).trace()
            u = b0 * torch.exp(exponent(x))
            expected = u * (n + tau * n_t) - (whole - alone) - SPAN * case.values["growth.k"] * u * (1 - u)
            assert float(rows[k]) == pytest.approx(float(expected), rel=1e-8, abs=1e-10)

    def test_flux_is_that_of_the_network_through_the_surface(self, case):
        points, flux = case.points, case.residual.pieces[1]
        assert len(points.surface_x) > 3
        parts = flux.parts(case.w)
        rows = flux.rows(parts)
        sides = torch.tensor([14.0, 12.0 * 1.5])
        d = case.physics.geometry.continued(case.physics.coefficient(case.values)) / case.physics.scale  # mm²/day
        at = Splines.of(points.surface_x, case.physics.shape).value(d)
        through = at * parts.u * (points.normals * (parts.gamma / sides[:, None]).T).sum(1)  # mm/day
        layer = ((points.normals * torch.tensor([1.0, 1.5])) ** 2).sum(1).sqrt()  # a voxel's side along the normal, mm
        assert torch.allclose(rows, points.weight * through * SPAN / layer, rtol=1e-10)

    def test_the_guide_obeys_the_heat_equation(self, case):
        """Its derivative in time is the divergence of its flux, as the channels have it, and that of its values."""
        guide, equation = case.guides.carried, case.residual.equation
        channels = guide.at(equation.source)
        physics = case.physics
        d = equation.medium.splines.slopes(physics.geometry.continued(physics.coefficient(case.values)))
        divergence = d[0] * channels[-1] + (physics.metric[:, None] * d[1:] * channels[2:-1]).sum(0)
        own = guide.carrier.divergence(guide.start.nodes, case.values)
        own = torch.stack([physics.geometry.continued(v) for v in own])
        assert torch.allclose(divergence, equation.medium.splines.slopes(own, equation.source.node)[0], atol=1e-10)
        h = 0.01
        later, sooner = (guide.carrier.start(guide.u0, case.values, [t]).days for t in (10 + h, 10 - h))
        change = (next(iter(later.values())) - next(iter(sooner.values()))) / (2 * h) * SPAN
        now = next(iter(guide.carrier.start(guide.u0, case.values, [10.0]).days.values()))
        expected = guide.carrier.divergence(now[None], case.values)[0]
        assert float((change - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_jacobian_by_weights(case):
    r, j = case.residual.linear(case.w)
    assert torch.equal(r, case.residual.value(case.w))
    direction = torch.randn(case.network.count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-6
    sides = [case.residual.value(case.w + s * h * direction) for s in (1, -1)]
    expected = (sides[0] - sides[1]) / (2 * h)
    assert float((j @ direction - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_derivatives_by_parameters_and_start(case):
    directions = case.directions()
    assert len(directions) == 7
    found = case.residual.along(case.w, directions)
    try:
        for row, direction in zip(found, directions, strict=True):
            sides, steps = [], []
            for sign in (1, -1):
                values, start, h = case.moved(direction, sign * 1e-5)
                case.residual.hold(values, start)
                sides.append(case.residual.value(case.w))
                steps.append(h)
            expected = (sides[0] - sides[1]) / (steps[0] - steps[1])
            assert float(expected.abs().max()) > 1e-4
            assert float((row - expected).abs().max()) < 1e-4 * float(expected.abs().max())
    finally:
        case.residual.hold(case.values, case.start)


def test_voxels_and_their_derivatives(case):
    voxels = Voxels(case.physics, case.network, case.guides, case.carrier)
    voxels.hold(case.values, case.start)
    directions = case.directions()
    generator = torch.Generator().manual_seed(3)
    dw = torch.randn(len(directions), case.network.count, generator=generator, dtype=torch.float64)
    tau = case.physics.tau(case.days[0])
    u, du = voxels.along(case.w, tau, directions, dw)
    outside = torch.tensor(~case.physics.geometry.mask)
    assert float(u[outside].abs().max()) == 0 and float(du[:, outside].abs().max()) == 0
    for i, direction in enumerate(directions):
        sides, steps = [], []
        for sign in (1, -1):
            values, start, h = case.moved(direction, sign * 1e-5)
            voxels.hold(values, start)
            sides.append(voxels.state(case.w + h * dw[i], tau))
            steps.append(h)
        expected = (sides[0] - sides[1]) / (steps[0] - steps[1])
        assert float((du[i] - expected).abs().max()) < 1e-4 * float(expected.abs().max())
