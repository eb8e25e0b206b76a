"""Simplicial meshes, and the transfer between voxels and their nodes."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import cg

from biomodel.domain import Domain
from biomodel.errors import GeometryError, SolverError
from biomodel.fenics.elements import EDGES, integrals

__all__ = ["BoxMesh", "Mesh", "MeshMaker", "Transfer"]

#: Relative residual of the projection onto nodes; it bounds the mass that a transfer may lose.
PROJECTION = 1e-13


@dataclass(frozen=True, eq=False)
class Transfer:
    """Linear maps between values in the mask's voxels and a mesh, for one degree.

    Attributes
    ----------
    average : sparse matrix, shape (voxels, nodes)
        Averages of a finite-element function over voxels.
    load : sparse matrix, shape (nodes, voxels)
        Integrals of shape functions times the field that voxel averages stand for (linear inside each voxel).
    mass : sparse matrix, shape (nodes, nodes)
    nodal : sparse matrix, shape (nodes, voxels)
        Means of the voxels around a node: positive weights with sum 1, for coefficients.
    cellwise : sparse matrix, shape (cells, voxels)
        Means of the voxels under a cell.
    """

    average: sparse.csr_array
    load: sparse.csr_array
    mass: sparse.csr_array
    nodal: sparse.csr_array
    cellwise: sparse.csr_array

    @cached_property
    def _jacobi(self):
        return sparse.diags_array(1 / self.mass.diagonal())

    def _solve(self, b: np.ndarray) -> np.ndarray:
        found = np.empty_like(b)
        for row in np.ndindex(b.shape[:-1]):
            if not np.any(b[row]):
                found[row] = 0.0
                continue
            found[row], wrong = cg(self.mass, b[row], rtol=PROJECTION, atol=0.0, maxiter=2000, M=self._jacobi)
            if wrong:
                raise SolverError(
                    "the projection of voxels onto the mesh did not converge; the mesh has cells that are nearly flat. "
                    "Make it coarser or smoother."
                )
        return found

    def to_nodes(self, values: np.ndarray) -> np.ndarray:
        """Nodal values (..., nodes) of the L2 projection of a field given by voxel averages (..., voxels).

        Mass is conserved; second order for smooth fields, linear ones are reproduced.
        """
        return self._solve((self.load @ values.reshape(-1, values.shape[-1]).T).T.reshape(*values.shape[:-1], -1))

    def to_nodes_transposed(self, values: np.ndarray) -> np.ndarray:
        """Transpose of `to_nodes`: (..., nodes) to (..., voxels)."""
        found = self._solve(np.ascontiguousarray(values))
        return (self.load.T @ found.reshape(-1, found.shape[-1]).T).T.reshape(*values.shape[:-1], -1)


@dataclass(frozen=True, eq=False)
class Mesh:
    """A simplicial mesh of a domain.

    Attributes
    ----------
    points : ndarray, shape (n, d)
        Vertices, mm, along the axes that the domain has, in the order x, y, z.
    cells : ndarray of int64, shape (m, d + 1)
    axes : tuple of int
        Which of x (0), y (1), z (2) each column of `points` is.
    positions : tuple of float
        Coordinates (x, y, z) of the first voxel's centre: the place on axes that the mesh does not have.
    cell_voxel : ndarray of int, shape (m,)
        The voxel in which each cell lies, counted along the mask's voxels.
    domain : Domain
    """

    points: np.ndarray
    cells: np.ndarray
    axes: tuple[int, ...]
    positions: tuple[float, float, float]
    cell_voxel: np.ndarray
    domain: Domain

    @cached_property
    def edges(self) -> np.ndarray:
        """All edges (k, 2), smaller vertex first, in lexicographic order: behind the vertices the nodes of degree 2."""
        pairs = [np.sort(self.cells[:, p], 1) for p in itertools.combinations(range(self.cells.shape[1]), 2)]
        n = len(self.points)
        keys = np.unique(np.concatenate([p[:, 0] * n + p[:, 1] for p in pairs]))
        return np.stack((keys // n, keys % n), 1)

    def nodes(self, degree: int) -> np.ndarray:
        """Coordinates (nodes, d)."""
        if degree == 1:
            return self.points
        return np.concatenate((self.points, self.points[self.edges].mean(1)))

    def cell_nodes(self, degree: int) -> np.ndarray:
        """Numbers of the nodes of each cell (m, per cell)."""
        if degree == 1:
            return self.cells
        n = len(self.points)
        keys = self.edges[:, 0] * n + self.edges[:, 1]
        found = [self.cells]
        for pair in EDGES[self.cells.shape[1] - 1]:
            low, high = np.sort(self.cells[:, pair], 1).T
            found.append((n + np.searchsorted(keys, low * n + high))[:, None])
        return np.concatenate(found, 1)

    @cached_property
    def volumes(self) -> np.ndarray:
        """Volumes of the cells (m,), in mm to the power of the dimension."""
        corners = self.points[self.cells]
        return np.abs(np.linalg.det(corners[:, 1:] - corners[:, :1])) / math.factorial(len(self.axes))

    def transfer(self, degree: int) -> Transfer:
        """The maps between the mask's voxels and the nodes of a degree."""
        nodes, dim = self.cell_nodes(degree), len(self.axes)
        count, voxels = len(self.nodes(degree)), int(self.domain.mask.sum())
        of_shape, by_coordinate, _ = integrals(dim, degree)
        volume = self.volumes[:, None]
        voxel = np.broadcast_to(self.cell_voxel[:, None], nodes.shape)
        shape = (count, voxels)
        load = gather(volume * of_shape, nodes, voxel, shape)
        size = np.prod([self.domain.spacing[2 - a] for a in self.axes])
        average = sparse.csr_array(load.T / size)
        centres = mask_centres(self.domain, self.axes)[self.cell_voxel]
        for column, axis in enumerate(self.axes):
            offset = self.points[self.cells][:, :, column] - centres[:, None, column]
            lever = gather(volume * (offset @ by_coordinate.T), nodes, voxel, shape)
            load = load + lever @ mask_slope(self.domain, 2 - axis)
        mass = mass_matrix(self, degree)
        around = gather(np.broadcast_to(volume, nodes.shape), nodes, voxel, shape)
        nodal = sparse.diags_array(1 / around.sum(1)) @ around
        cellwise = sparse.csr_array(
            (np.ones(len(self.cells)), (np.arange(len(self.cells)), self.cell_voxel)), (len(self.cells), voxels)
        )
        return Transfer(average, sparse.csr_array(load), mass, sparse.csr_array(nodal), cellwise)


class MeshMaker(Protocol):
    """Makes a mesh of a domain; immutable and comparable, as it is part of a solver."""

    def make(self, domain: Domain) -> Mesh:
        """The mesh of a domain."""

    def finer(self) -> MeshMaker:
        """The same with cells half as large."""


@dataclass(frozen=True)
class BoxMesh:
    """A mesh that conforms to the voxels: each is split into triangles or tetrahedra, along its main diagonal.

    The geometry is that of the voxels themselves, as `TorchSolver` has it. Voxels that touch at a corner or an edge
    without neighbours around it that join them are not connected, as nothing flows there.

    Parameters
    ----------
    refine : int
        Number of parts into which each voxel is cut along each axis before it is split.
    """

    refine: int = 1

    def __post_init__(self):
        if self.refine < 1:
            raise SolverError(f"BoxMesh: refine is {self.refine}; expected a whole number from 1.")

    def finer(self) -> BoxMesh:
        """The same with cells half as large."""
        return BoxMesh(2 * self.refine)

    def make(self, domain: Domain) -> Mesh:
        """The mesh of a domain.

        Raises
        ------
        GeometryError
            If the domain is a single point.
        """
        axes = tuple(a for a in range(3) if domain.shape[2 - a] > 1)
        if not axes:
            raise GeometryError(
                "FEniCS meshes need an axis with at least two voxels; a single point has no diffusion: use TorchSolver."
            )
        dim = len(axes)
        order = [2 - a for a in axes]
        idle = [k for k in range(3) if k not in order]
        number = np.cumsum(domain.mask).reshape(domain.shape) - 1

        def part(array):
            array = np.transpose(array, (*order, *idle)).reshape([domain.shape[k] for k in order])
            for axis in range(dim):
                array = np.repeat(array, self.refine, axis)
            return array

        inside, voxel = part(domain.mask), part(number)
        corners = list(itertools.product((0, 1), repeat=dim))
        ids, lattice = _nodes(inside, corners)
        paths = []
        for axis_order in itertools.permutations(range(dim)):
            at, path = [0] * dim, [corners.index((0,) * dim)]
            for axis in axis_order:
                at[axis] = 1
                path.append(corners.index(tuple(at)))
            paths.append(path)
        cells = ids[:, np.array(paths)].reshape(-1, dim + 1)
        step = np.array([domain.spacing[k] / self.refine for k in order])
        centre = [float(domain.coords[n][0]) for n in "xyz"]
        origin = np.array([centre[a] - domain.spacing[2 - a] / 2 for a in axes])
        return Mesh(origin + lattice * step, cells.astype(np.int64), axes, (centre[0], centre[1], centre[2]),
                    np.repeat(voxel[inside], len(paths)), domain)  # fmt: skip


def _nodes(inside: np.ndarray, corners: list[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray]:
    """Node of each corner of each box inside (boxes, corners), and the nodes' places on the lattice (nodes, d).

    Around a corner of the lattice, boxes that do not share a face, directly or through others, get a node each.
    """
    dim = inside.ndim
    labels = _components(corners)
    padded = np.pad(inside, 1)
    pattern = np.zeros([n + 1 for n in inside.shape], np.int64)
    for k, corner in enumerate(corners):
        window = tuple(slice(c, c + n + 1) for c, n in zip(corner, inside.shape, strict=True))
        pattern |= padded[window].astype(int) << k
    groups = (labels.max(1) + 1)[pattern]
    first = np.cumsum(groups).reshape(groups.shape) - groups
    boxes = np.argwhere(inside)
    ids = np.empty((len(boxes), len(corners)), np.int64)
    for k, corner in enumerate(corners):
        at = tuple((boxes + corner).T)
        # Seen from its corner c, a box lies at 1 - c in the block of boxes around that point of the lattice.
        ids[:, k] = first[at] + labels[pattern[at], corners.index(tuple(1 - c for c in corner))]
    lattice = np.repeat(np.indices(groups.shape).reshape(dim, -1).T, groups.ravel(), axis=0)
    return ids, lattice


def _components(corners: list[tuple[int, ...]]) -> np.ndarray:
    """Number of the connected group of each box of a block, for every pattern of boxes inside: (patterns, boxes)."""
    count = len(corners)
    labels = np.full((2**count, count), -1)
    for pattern in range(2**count):
        groups = 0
        for k in range(count):
            if not pattern >> k & 1 or labels[pattern, k] >= 0:
                continue
            stack = [k]
            while stack:
                here = stack.pop()
                labels[pattern, here] = groups
                stack += [
                    j for j in range(count) if pattern >> j & 1 and labels[pattern, j] < 0
                    and sum(a != b for a, b in zip(corners[here], corners[j], strict=True)) == 1
                ]  # fmt: skip
            groups += 1
    return labels


def mass_matrix(mesh: Mesh, degree: int) -> sparse.csr_array:
    """Integrals of products of two shape functions (nodes, nodes)."""
    nodes, count = mesh.cell_nodes(degree), len(mesh.nodes(degree))
    products = integrals(len(mesh.axes), degree)[2]
    n = nodes.shape[1]
    rows, columns = np.repeat(nodes, n, 1), np.tile(nodes, (1, n))
    return gather(mesh.volumes[:, None] * products.reshape(1, -1), rows, columns, (count, count))


def gather(values: np.ndarray, rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> sparse.csr_array:
    """A sparse matrix from entries, those at one place summed."""
    values = np.broadcast_to(values, rows.shape)
    return sparse.csr_array(sparse.coo_array((values.ravel(), (rows.ravel(), columns.ravel())), shape))


def mask_centres(domain: Domain, axes: tuple[int, ...]) -> np.ndarray:
    """Centres of the mask's voxels (voxels, d)."""
    index = np.argwhere(domain.mask)
    return np.stack([domain.coords["xyz"[a]][index[:, 2 - a]] for a in axes], 1)


def mask_slope(domain: Domain, axis: int) -> sparse.csr_array:
    """Slope along an axis of the array in each of the mask's voxels: central, or one-sided at the mask's edge."""
    mask, step = domain.mask, domain.spacing[axis]
    number = np.where(mask, np.cumsum(mask).reshape(mask.shape) - 1, -1)
    width = [(1, 1) if k == axis else (0, 0) for k in range(3)]
    around = np.pad(number, width, constant_values=-1)
    n = mask.shape[axis]
    low, here, high = (np.take(around, np.arange(n) + k, axis)[mask] for k in range(3))
    both = (low >= 0) & (high >= 0)
    only_high, only_low = (low < 0) & (high >= 0), (low >= 0) & (high < 0)
    found = sparse.csr_array((len(here), len(here)))
    for chosen, plus, minus, distance in ((both, high, low, 2), (only_high, high, here, 1), (only_low, here, low, 1)):
        rows, weight = here[chosen], np.full(int(chosen.sum()), 1 / (distance * step))
        found = found + sparse.csr_array(
            (np.concatenate((weight, -weight)), (np.tile(rows, 2), np.concatenate((plus[chosen], minus[chosen])))),
            found.shape,
        )
    return found
