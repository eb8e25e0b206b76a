"""Masks, tissues and drug maps for a network: smooth fields, surface points, and the residual's derivatives."""

import numpy as np
import pytest
import torch
from scipy.ndimage import distance_transform_edt

import biomodel as bm
from biomodel.schedule import Dose, Fraction
from pinn.carried import coefficients
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

    def test_a_whole_box_has_no_surface(self):
        box = Geometry(np.ones((4, 5), bool), np.ones(2))
        assert box.whole and box.layer == 0 and len(box.surface(50, 0)[0]) == 0


class Case:
    """A network with random weights in a disc with two tissues, a drug map and resistant cells."""

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
        fields = {"drug_map": (0.5 + rng.random(shape))[None]}
        self.physics = Physics(self.model, self.domain, SCHEDULE, 0.0, SPAN, fields)
        self.values = {n: float(v) for n, v in self.model.complete().items()}
        start = self.physics.geometry.continued(0.2 + 0.6 * rng.random(shape)).numpy()
        self.c = torch.tensor(coefficients(start))
        self.other = torch.tensor(coefficients(rng.random(shape)))
        self.guides = Guides(self.physics, self.values, self.c, 0.8)
        self.network = Network(self.physics.metric, 3, (6, 5), self.guides.count)
        self.w = 2 * self.network.start(1)
        self.points = Points.draw(self.physics, 30, 0)
        self.residual = Residual(self.physics, self.network, self.points, self.guides)
        self.residual.hold(self.values, self.c)

    def carried(self, c, point, carrier):
        found = c
        for i, n in enumerate(self.physics.shape):
            k = np.pi * torch.arange(n, dtype=torch.float64)
            found = (torch.cos(point[i] * k) * torch.exp(-carrier * point[2] * self.physics.metric[i] * k**2)) @ found
        return found

    def at(self, point, field):
        return Splines.of(point[None, :2], self.physics.shape).value(field)[0]

    def state(self, point, w, values, c):
        """Cell fraction at one point (y, x, tau), as automatic differentiation can follow it."""
        carrier = self.guides.diffusion
        drug = self.at(point, self.physics.fields["drug_map"])
        clock = self.guides.clock(point[2:])[0][0]
        further = [self.carried(self.guides.c, point, carrier), clock, drug * clock]
        further += [self.at(point, f) for f in self.guides.still]
        features = self.network.features(point[None, :2], point[2:], [f[None] for f in further])
        n = self.network.value(w, features)[0][0]
        spared = self.physics.spared(values, point[2:], {"drug_map": drug[None]})[0]
        return torch.exp(point[2] * n - spared) * self.carried(c, point, carrier)

    def equation(self, point, w, values, c):
        """Time derivative less divergence, kill and growth, all by automatic differentiation."""
        physics = self.physics

        def flux(p):
            d = self.at(p, physics.geometry.continued(physics.coefficient(values)))
            return d * physics.metric * torch.func.grad(self.state)(p, w, values, c)[:2]

        divergence = torch.func.jacrev(flux)(point).diagonal()[:2].sum()
        u = self.state(point, w, values, c)
        change = torch.func.grad(self.state)(point, w, values, c)[2]

        def spared(t):
            drug = self.at(point, physics.fields["drug_map"])
            return physics.spared(values, t[None], {"drug_map": drug[None]})[0]

        kill = torch.func.grad(spared)(point[2])
        return change + kill * u - divergence - SPAN * values["growth.k"] * u * (1 - u)


@pytest.fixture(scope="module")
def case():
    return Case()


def test_residual_is_the_strong_form(case):
    rows = case.residual.value(case.w)
    points = torch.cat((case.points.x, case.points.tau[:, None]), 1)
    expected = torch.stack([case.equation(p, case.w, case.values, case.c) for p in points])
    assert float(expected.abs().max()) > 0.1
    assert float((rows[: len(points)] - expected).abs().max()) < 1e-9 * float(expected.abs().max())


def test_flux_is_that_through_the_surface(case):
    points = case.points
    assert len(points.surface_x) > 3
    rows = case.residual.value(case.w)[len(points.x) :]
    sides = torch.tensor([14.0, 12.0 * 1.5])
    physics = case.physics
    d = physics.geometry.continued(physics.coefficient(case.values)) / physics.scale  # mm²/day
    for row, x, tau, normal in zip(rows, points.surface_x, points.surface_tau, points.normals, strict=True):
        point = torch.cat((x, tau[None]))
        slope = torch.func.grad(case.state)(point, case.w, case.values, case.c)[:2] / sides
        flux = case.at(point, d) * (normal * slope).sum() * SPAN / 1.0  # through a layer of 1 mm, per span
        fading = min(1.0, 4 * case.guides.diffusion * float(tau) * physics.length**2)
        assert float(row) == pytest.approx(points.weight * fading * float(flux), rel=1e-8, abs=1e-12)


def test_jacobian_by_weights(case):
    r, j = case.residual.linear(case.w)
    assert torch.equal(r, case.residual.value(case.w))
    direction = torch.randn(case.network.count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-6
    sides = [case.residual.value(case.w + s * h * direction) for s in (1, -1)]
    expected = (sides[0] - sides[1]) / (2 * h)
    assert float((j @ direction - expected).abs().max()) < 1e-6 * float(expected.abs().max())


def test_derivatives_by_parameters_and_start(case):
    directions = [Direction(n) for n in case.model.free] + [Direction(start=case.other)]
    assert len(directions) == 7
    found = case.residual.along(case.w, directions)
    try:
        for row, direction in zip(found, directions, strict=True):
            sides = []
            for sign in (1, -1):
                h = 1e-6 * (case.values[direction.name] if direction.name else 1.0)
                values, c = dict(case.values), case.c
                if direction.name:
                    values[direction.name] += sign * h
                else:
                    c = c + sign * h * case.other
                case.residual.hold(values, c)
                sides.append(case.residual.value(case.w))
            expected = (sides[0] - sides[1]) / (2 * h)
            assert float(expected.abs().max()) > 1e-4
            assert float((row - expected).abs().max()) < 1e-6 * float(expected.abs().max())
    finally:
        case.residual.hold(case.values, case.c)


def test_voxels_and_their_derivatives(case):
    voxels = Voxels(case.physics, case.network, case.guides)
    voxels.hold(case.values, case.c)
    directions = [Direction(n) for n in case.model.free] + [Direction(start=case.other)]
    generator = torch.Generator().manual_seed(3)
    dw = torch.randn(len(directions), case.network.count, generator=generator, dtype=torch.float64)
    tau = 0.7
    u, du = voxels.along(case.w, tau, directions, dw)
    outside = torch.tensor(~case.physics.geometry.mask)
    assert float(u[outside].abs().max()) == 0 and float(du[:, outside].abs().max()) == 0
    for i, direction in enumerate(directions):
        h, sides = 1e-6, []
        for sign in (1, -1):
            values, c = dict(case.values), case.c
            if direction.name:
                values[direction.name] += sign * h
            else:
                c = c + sign * h * case.other
            voxels.hold(values, c)
            sides.append(voxels.state(case.w + sign * h * dw[i], tau))
        expected = (sides[0] - sides[1]) / (2 * h)
        assert float((du[i] - expected).abs().max()) < 1e-6 * float(expected.abs().max())
