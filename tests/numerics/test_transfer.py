"""Transfer between voxels and meshes that lie across them: mass, constants, and the order for smooth fields."""

import itertools

import numpy as np
import pytest

from biomodel.domain import Domain
from biomodel.fenics.mesh import BoxMesh, mask_centres
from biomodel.fenics.organ_mesh import OrganMesh
from biomodel.fenics.pieces import cut
from biomodel.fenics.transfer import cut_transfer
from biomodel.virtual import small_patient

#: Edge of the organs' boxes, mm.
WIDTH = 50.0


def organ(n, dim, shift=0.0):
    """An ellipse or ellipsoid on n voxels across, off the grid's middle by a part of a voxel."""
    x = (np.arange(n) + 0.5 - n / 2) * WIDTH / n
    z, y, x = np.meshgrid(x if dim == 3 else [0.0], x, x, indexing="ij")
    mask = ((x - shift) / 20) ** 2 + ((y + shift / 2) / 18) ** 2 + (z / 16) ** 2 < 1
    return Domain.box(mask.shape, (WIDTH / n,) * 3, mask)


def smooth(points):
    return 1 + 0.9 * np.cos(2 * np.pi / WIDTH * (points - WIDTH / 2)).prod(1) + 0.02 * points[:, 0]


def voxel_averages(domain, axes):
    """Averages of `smooth` over the mask's voxels, by three Gauss points along each axis."""
    at, weights = np.polynomial.legendre.leggauss(3)
    steps = np.array([domain.spacing[2 - a] for a in axes])
    total = 0.0
    for index in itertools.product(range(3), repeat=len(axes)):
        offset = np.array([at[i] / 2 for i in index]) * steps
        total = total + np.prod([weights[i] / 2 for i in index]) * smooth(mask_centres(domain, axes) + offset)
    return total


def voxel_size(mesh):
    return float(np.prod([mesh.domain.spacing[2 - a] for a in mesh.axes]))


def graded_breast():
    patient = small_patient(3).patient
    return OrganMesh.around(patient.domain, patient.visits[0].region, 3.0, 8.0).make(patient.domain)


MESHES = {
    "disc": lambda: OrganMesh().make(organ(20, 2)),
    "coarse ball": lambda: OrganMesh(fine=6.0).make(organ(14, 3)),
    "fine ball": lambda: OrganMesh(fine=3.0).make(organ(10, 3)),
    "breast": graded_breast,
}


@pytest.fixture(scope="module", params=MESHES)
def mesh(request):
    return MESHES[request.param]()


@pytest.fixture(scope="module", params=[1, 2])
def transfer(request, mesh):
    return mesh.transfer(request.param)


def test_mass_and_constants(mesh, transfer):
    size = voxel_size(mesh)
    nodes = transfer.mass.sum(1)
    # Every column, not a sum over all: mass is kept wherever it sits, also at the boundary.
    assert np.abs(size * transfer.average.sum(0) - nodes).max() < 1e-11 * np.abs(nodes).max()
    assert np.abs(transfer.load.sum(0) / size - 1).max() < 1e-11
    assert np.abs(transfer.average.sum(1) - 1).max() < 1e-11
    assert np.abs(transfer.to_nodes(np.ones(transfer.load.shape[1])) - 1).max() < 1e-9

    rng = np.random.default_rng(0)
    u = rng.random(transfer.load.shape[1])
    assert nodes @ transfer.to_nodes(u) == pytest.approx(size * u.sum(), rel=1e-10)
    one = np.zeros_like(u)
    one[int(np.linalg.norm(mask_centres(mesh.domain, mesh.axes) - mesh.points.min(0), axis=1).argmin())] = 1.0
    at_nodes = transfer.to_nodes(one)
    assert nodes @ at_nodes == pytest.approx(size, rel=1e-10)
    assert size * (transfer.average @ at_nodes).sum() == pytest.approx(size, rel=1e-10)


def test_coefficients_are_means(transfer):
    for matrix in (transfer.nodal, transfer.cellwise):
        assert matrix.data.min() >= 0
        assert np.abs(matrix.sum(1) - 1).max() < 1e-12


def test_transposed(transfer):
    rng = np.random.default_rng(1)
    u, v = rng.random((2, transfer.load.shape[1])), rng.random((2, transfer.load.shape[0]))
    assert (transfer.to_nodes(u) * v).sum() == pytest.approx((u * transfer.to_nodes_transposed(v)).sum(), rel=1e-10)


@pytest.mark.parametrize("shape", [(1, 7, 6), (4, 5, 6)])
@pytest.mark.parametrize("degree", [1, 2])
def test_on_a_mesh_along_voxels_nothing_is_left_to_balance(shape, degree):
    """On `BoxMesh` each cell lies in one voxel: the maps are those that it makes itself."""
    mask = np.ones(shape, bool)
    mask[:, -2:, :2] = False
    mesh = BoxMesh().make(Domain.box(shape, (2.0, 1.5, 1.0), mask))
    own, cut_along = mesh.transfer(degree), cut_transfer(mesh, degree)
    for name in ("average", "load", "cellwise", "mass"):
        assert abs(getattr(own, name) - getattr(cut_along, name)).max() < 1e-12, name


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("degree", [1, 2])
def test_parts_of_cells(dim, degree):
    """Parts add up to their cells, lie in their voxels, and hold the integrals that sampling gives."""
    rng = np.random.default_rng(dim)
    points = 4 * rng.random((6, dim)) - 1.0
    points[0] = np.round(points[0])  # a vertex on the grid
    cells = np.array(list(itertools.combinations(range(6), dim + 1)))[:8]
    (parts,) = cut(points, cells, degree)
    assert np.bincount(parts.cell, parts.share) == pytest.approx(np.ones(len(cells)), abs=1e-12)
    assert parts.shape.sum(1) == pytest.approx(parts.share, abs=1e-12)
    assert parts.lever.sum((1, 2)) == pytest.approx(parts.share, abs=1e-12)
    middle = np.einsum("kb,kbd->kd", parts.middle, points[cells[parts.cell]])
    assert (middle > parts.voxel - 1e-9).all() and (middle < parts.voxel + 1 + 1e-9).all()

    barycentric = rng.dirichlet(np.ones(dim + 1), 200_000)
    for cell in (0, len(cells) - 1):
        at = np.floor(barycentric @ points[cells[cell]]).astype(int)
        first = barycentric[:, 0] if degree == 1 else barycentric[:, 0] * (2 * barycentric[:, 0] - 1)
        for k in np.flatnonzero((parts.cell == cell) & (parts.share > 0.02)):
            inside = (at == parts.voxel[k]).all(1)
            assert inside.mean() == pytest.approx(parts.share[k], abs=6e-3)
            assert (first * inside).mean() == pytest.approx(parts.shape[k, 0], abs=6e-3)
            assert (first**2 * inside).mean() == pytest.approx(parts.square[k, 0], abs=6e-3)
            assert (first * barycentric[:, 1] * inside).mean() == pytest.approx(parts.lever[k, 0, 1], abs=6e-3)


def transfer_errors(n, dim, degree, cell):
    """L2 errors of both directions, over places of the organ on the grid: a mask's volume jumps as it moves."""
    squares = []
    for shift in (0.0, 0.4, 0.7):
        mesh = OrganMesh(fine=cell * WIDTH / n).make(organ(n, dim, shift * WIDTH / n))
        transfer, exact = mesh.transfer(degree), voxel_averages(mesh.domain, mesh.axes)
        at_nodes = smooth(mesh.nodes(degree))
        back = transfer.average @ at_nodes - exact
        there = transfer.to_nodes(exact) - at_nodes
        squares.append(((back**2).mean(), there @ (transfer.mass @ there) / mesh.volumes.sum()))
    return np.sqrt(np.mean(squares, 0))


def order(sizes, errors):
    return -np.polyfit(np.log(sizes), np.log(errors), 1)[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dim", "degree", "cell", "sizes"),
    [(2, 1, 1.0, (16, 32, 64, 128)), (2, 2, 2.0, (16, 32, 64, 128)), (2, 1, 2.5, (16, 32, 64, 128)),
     (3, 1, 1.0, (24, 48)), (3, 2, 2.0, (20, 40))],
)  # fmt: skip
def test_second_order_up_to_the_boundary(dim, degree, cell, sizes):
    errors = np.array([transfer_errors(n, dim, degree, cell) for n in sizes])
    for name, e in zip(("to voxels", "to nodes"), errors.T, strict=True):
        print(f"{dim}D, P{degree}, cells of {cell} voxels, {name}: errors {', '.join(f'{x:.2e}' for x in e)}; orders "
              f"{', '.join(f'{x:.2f}' for x in np.log2(e[:-1] / e[1:]))}; fitted {order(sizes, e):.2f}")  # fmt: skip
        assert order(sizes, e) > 1.85


def test_sharp_fields_inside_keep_their_shape():
    """Balancing stays near the boundary: deep inside, averages are those of the finite-element function."""
    domain = organ(24, 3)
    mesh = OrganMesh().make(domain)
    transfer, step = mesh.transfer(1), domain.spacing[0]
    centres = mask_centres(domain, mesh.axes)
    middle = centres.mean(0)
    u = 1 / (1 + np.exp((np.linalg.norm(mesh.points - middle, axis=1) - 2.5 * step) / (0.4 * step)))
    exact = np.zeros(len(centres))
    number = np.cumsum(domain.mask).reshape(domain.shape) - 1
    corner = np.array([domain.coords[n][0] for n in "xyz"]) - step / 2
    for parts in cut((mesh.points - corner) / step, mesh.cells, 1):
        index = tuple(parts.voxel[:, ::-1].T)
        inside = domain.mask[index]
        voxel = number[index][inside]
        amount = (mesh.volumes[parts.cell, None] * parts.shape * u[mesh.cells[parts.cell]]).sum(1)[inside]
        exact += np.bincount(voxel, amount / step**3, len(centres))
    deep = np.linalg.norm(centres - middle, axis=1) < 4 * step
    error = np.linalg.norm((transfer.average @ u - exact)[deep]) / np.linalg.norm(exact[deep])
    assert error < 0.01


def test_order_in_the_plane():
    sizes = (16, 48)
    errors = np.array([transfer_errors(n, 2, 1, 1.0) for n in sizes])
    assert (np.log(errors[0] / errors[1]) / np.log(3) > 1.8).all(), errors
