"""Orders of the FEniCS solver on smooth manufactured solutions, and of the transfer between voxels and mesh."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import biomodel as bm
from biomodel.domain import Domain
from biomodel.fenics.job import Simulate
from biomodel.fenics.mesh import BoxMesh
from biomodel.schedule import Fraction, Schedule
from biomodel.terms import Diffusion, Growth
from fenics_here import require_fenics


@pytest.fixture(autouse=True)
def fenics():
    require_fenics()


def orders(errors):
    e = np.array(errors)
    return np.log2(e[:-1] / e[1:])


SIDE, RATE, DAY = 12.0, 0.1, 2.0
#: A rotation about no special axis, and mean diffusivities along three directions.
TURN = np.linalg.qr(np.array([[3.0, 1.0, 0.5], [-1.0, 2.0, 0.3], [0.2, -0.7, 2.0]]))[0]


def bump(s):
    """A polynomial on [0, 1] whose first and second derivatives vanish at the ends, with those derivatives."""
    return s**3 * (1 - s) ** 3 * 64, 192 * (s * (1 - s)) ** 2 * (1 - 2 * s), \
        384 * s * (1 - s) * (1 - 5 * s + 5 * s**2)  # fmt: skip


def solution(axes):
    """phi = 1 + product of bumps, its gradient and second derivatives, for coordinates of the given axes."""

    def phi(place):
        parts = [bump(place[a] / SIDE) for a in axes]
        value = 1.0 + math.prod(p[0] for p in parts)

        def derivative(*wanted):
            found = 1.0
            for k in range(len(axes)):
                n = wanted.count(k)
                found = found * parts[k][n] / SIDE**n
            return found

        d = len(axes)
        return value, [derivative(i) for i in range(d)], [[derivative(i, j) for j in range(d)] for i in range(d)]

    return phi


def diffusivity(x, y, z):
    """A smooth scalar factor of x, y, z with its gradient, by polynomials, so that a tape holds it exactly."""
    a, b, c = x / SIDE, y / SIDE, z / SIDE
    return 1.0 + 0.4 * a * (1 - a) + 0.3 * a * b + 0.2 * c**2, (
        (0.4 * (1 - 2 * a) + 0.3 * b) / SIDE, 0.3 * a / SIDE, 0.4 * c / SIDE)  # fmt: skip


@dataclass(frozen=True)
class Everywhere(Diffusion):
    """D(x, y, z), a scalar or a full tensor."""

    anisotropic: bool = False

    @property
    def tensor(self):
        return self.anisotropic

    @property
    def fields(self):
        return ("x", "y", "z")

    @property
    def matrix(self):
        return TURN @ np.diag([1.6, 0.9, 0.5]) @ TURN.T if self.anisotropic else np.eye(3)

    def coefficient(self, u, p, c, ops):
        d = diffusivity(c.x, c.y, c.z)[0]
        return [[d * float(m) for m in row] for row in self.matrix] if self.anisotropic else d


@dataclass(frozen=True)
class Made(Growth):
    """u times the rate that makes exp(RATE t) phi(x) a solution."""

    diffusion: Everywhere = Everywhere()
    axes: tuple = (0, 1, 2)

    @property
    def fields(self):
        return ("x", "y", "z")

    def rate(self, u, p, c, ops):
        place = [c.x, c.y, c.z]
        value, slope, bend = solution(self.axes)(place)
        d, gradient = diffusivity(*place)
        m, flux = self.diffusion.matrix, 0.0
        for i, a in enumerate(self.axes):
            for j, b in enumerate(self.axes):
                flux = flux + float(m[a, b]) * (d * bend[i][j] + gradient[a] * slope[j])
        return u * (RATE - flux / value)


def made(dim, anisotropic, n):
    axes = (0, 1) if dim == 2 else (0, 1, 2)
    diffusion = Everywhere(anisotropic)
    h = SIDE / n
    domain = Domain(np.ones((1, n, n) if dim == 2 else (n, n, n), bool), (h, h, h),
                    np.array([[h, 0, 0, h / 2], [0, h, 0, h / 2], [0, 0, h, h / 2], [0, 0, 0, 1]]))  # fmt: skip
    return domain, bm.ReactionDiffusion(Made(diffusion, axes), diffusion), axes


@pytest.mark.parametrize("anisotropic", [False, True], ids=["variable", "anisotropic"])
@pytest.mark.parametrize("dim,degree,sizes", [
    (2, 1, (12, 24, 48)), (2, 2, (8, 16, 32)),
    pytest.param(3, 1, (10, 20, 40), marks=pytest.mark.slow), pytest.param(3, 2, (5, 10, 20), marks=pytest.mark.slow),
])  # fmt: skip
def test_order_in_space(dim, degree, sizes, anisotropic):
    errors = []
    for n in sizes:
        domain, model, axes = made(dim, anisotropic, n)
        simulation = bm.FenicsSolver(degree=degree, linear_rtol=1e-12).build(model, domain, Schedule())
        nodes = simulation.mesh.nodes(degree)
        place = [nodes[:, axes.index(a)] if a in axes else np.full(len(nodes), SIDE / n / 2) for a in range(3)]
        phi = solution(axes)(place)[0]
        steps = 4 * n if degree == 1 else 20 * n
        u = from_nodes(simulation, phi, simulation.fixed_plan([DAY], [steps // 4]))
        exact = phi * np.exp(RATE * DAY)
        difference = u - exact
        mass = simulation.transfer.mass
        errors.append(np.sqrt(difference @ (mass @ difference) / (exact @ (mass @ exact))))
    found = orders(errors)
    print(f"P{degree} {dim}D {'anisotropic' if anisotropic else 'variable'} D:", errors, found)
    assert found[-1] > (1.9 if degree == 1 else 2.9)


def from_nodes(simulation, u0, plan):
    """Nodal states from a nodal initial state: without the transfer, whose order is another test's subject."""
    values = simulation._values({})
    job, leaves = simulation._job(simulation._row(values, 0), plan)
    return Simulate.apply(job, torch.tensor(u0), *leaves)[0].numpy()


@pytest.mark.parametrize("degree", [1, 2])
def test_order_in_time_with_doses(degree):
    schedule = Schedule.weekly("paclitaxel", 3.3, 4, 80, "mg/m^2") + Schedule(
        fractions=(Fraction(5.6, 2.0), Fraction(6.6, 2.0))
    )
    model = bm.ReactionDiffusion(bm.Logistic(), bm.Isotropic(), [bm.Chemotherapy("paclitaxel"), bm.Radiotherapy()])
    domain = Domain.box((1, 20, 24), (1, 1.5, 1.5))
    y, x = np.meshgrid(*(domain.coords[a] - domain.coords[a].mean() for a in "yx"), indexing="ij")
    u0 = 0.7 * np.exp(-(y**2 + x**2) / 30)[None]
    simulation = bm.FenicsSolver(degree=degree, linear_rtol=1e-13).build(model, domain, schedule)

    def run(n):
        return simulation({"diffusion.D": 1.0}, u0, [30.0], plan=simulation.fixed_plan([30.0], [n]))

    reference = run(1024)
    found = orders([float((run(n) - reference).norm() / reference.norm()) for n in (24, 48, 96)])
    print(f"time order across doses, P{degree}:", found)
    assert np.all(np.abs(found - 2) < 0.1)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("dim", [2, 3])
def test_transfer_is_second_order_up_to_the_boundary(dim, degree):
    """Its field has a slope at the boundary, which a mean of the voxels around a node would miss to first order."""

    def integral(edges):
        """Averages over voxels of sin(x / 4) on one axis, and at places."""
        return 4 * (np.cos(edges[:-1] / 4) - np.cos(edges[1:] / 4)) / np.diff(edges)

    there, back = [], []
    for n in (6, 12, 24):
        edges = np.linspace(0, SIDE, n + 1)
        h = SIDE / n
        one = integral(edges)
        values = one[None, :, None] * one[None, None, :] if dim == 2 else np.einsum("i,j,k->ijk", one, one, one)
        mesh = BoxMesh().make(Domain.box(values.shape, (h, h, h)))
        transfer = mesh.transfer(degree)
        # The first voxel's centre lies at 0.
        exact = np.sin((mesh.nodes(degree) + h / 2) / 4).prod(1)
        nodal = transfer.to_nodes(values.ravel())
        there.append(np.sqrt(np.mean((nodal - exact) ** 2)))
        back.append(np.sqrt(np.mean((transfer.average @ nodal - values.ravel()) ** 2)))
    print(f"transfer, P{degree} {dim}D:", orders(there), orders(back))
    assert (orders(there) > 1.9).all() and (orders(back) > 1.9).all()


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("shape", [(1, 1, 15), (1, 9, 11), (7, 1, 6), (5, 6, 7)])
def test_transfer_conserves_mass_on_any_mask(shape, degree):
    rng = np.random.default_rng(3)
    mask = rng.random(shape) < 0.75
    mesh = BoxMesh(2 if shape[0] == 1 else 1).make(Domain.box(shape, (3.0, 1.5, 1.0), mask=mask))
    transfer = mesh.transfer(degree)
    values = rng.random(int(mask.sum()))
    nodal = transfer.to_nodes(values)
    size = np.prod([(1.0, 1.5, 3.0)[a] for a in mesh.axes])
    assert abs((transfer.mass @ nodal).sum() / (values.sum() * size) - 1) < 1e-10
    assert abs((transfer.average @ nodal).sum() / values.sum() - 1) < 1e-10
    assert abs(mesh.volumes.sum() / (size * mask.sum()) - 1) < 1e-12
    # The transpose is the transpose.
    other = rng.random(nodal.size)
    assert abs(other @ nodal - values @ transfer.to_nodes_transposed(other)) < 1e-10 * abs(other @ nodal)


def test_voxels_that_touch_at_a_corner_are_not_connected():
    mask = np.array([[[True, False], [False, True]]])
    mesh = BoxMesh().make(Domain.box((1, 2, 2), mask=mask))
    assert len(mesh.points) == 8
    joined = BoxMesh().make(Domain.box((1, 2, 2), mask=np.array([[[True, True], [False, True]]])))
    assert len(joined.points) == 8 and len(joined.cells) == 6
