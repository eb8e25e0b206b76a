"""Transfer between voxels and a mesh that does not follow them: conserves mass, and is second order up to the boundary.

Each cell is cut along the voxels' planes, which makes the integrals over cell ∩ voxel exact. At the organ's boundary
that is not enough: a smooth mesh leaves corners of the mask's voxels empty and bulges beyond others, so that a voxel's
average over what it shares with the mesh stands for another volume and another place than the voxel. `balance`
therefore changes the weights as little as possible, until every voxel stands for its whole volume, every node for the
integral of its shape function, and linear fields are reproduced but for a small part of a voxel.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, cg, splu
from scipy.spatial import cKDTree

from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.fenics.mesh import Transfer, gather, mask_centres, mask_slope, mass_matrix
from biomodel.fenics.pieces import cut

if TYPE_CHECKING:
    from biomodel.fenics.mesh import Mesh

__all__ = ["balance", "cut_transfer", "outside_volume"]

#: Near the boundary what the voxels' steps and the smooth mesh lack against each other is exchanged over a few voxels:
#: moments are kept (this is how little they may give way, as a share of a row's weight) ...
STRICT = 1e-6
#: ... but waves longer than about 17 voxels, 2 pi / soft^(1/4), are left out: to exchange them without moments would
#: take large weights of both signs all through the organ, which spoil sharp edges inside. In larger organs this length
#: grows with the square root of the organ's width in voxels, so that it covers an ever smaller part of it.
SOFT, WIDTH = 0.02, 15.0
#: What is left, some thousandths of a voxel, is a slight displacement: here moments give way.
FREEDOM = 0.3
#: Largest error of the sums, relative to the largest sum; it bounds the mass that a transfer may lose.
ERROR = 1e-13
#: Edge of the blocks, in voxels, on which long waves are solved for.
BLOCK = 6.0


def balance(
    values: sparse.csr_array,
    weights: sparse.csr_array,
    rows: np.ndarray,
    columns: np.ndarray,
    sums: np.ndarray,
    moments: np.ndarray,
    totals: np.ndarray,
    soft: float,
) -> sparse.csr_array:
    """Change a matrix as little as possible, so that its rows and columns have given sums and its rows given moments.

    The sums are exact. Moments are for short waves, and err for long ones by a small part of a voxel.

    Parameters
    ----------
    values, weights : sparse matrix, shape (r, c)
        Entries change where the weights, which are positive, have some.
    rows, columns : ndarray, shape (r, d) and (c, d)
        Places, in units of voxels.
    sums : ndarray, shape (r,)
        Wanted sums of rows.
    moments : ndarray, shape (r, d)
        Wanted sums over a row of entry times (column's place - row's place).
    totals : ndarray, shape (c,)
        Wanted sums of columns; altogether as much as `sums`.
    soft : float
        Waves longer than 2 pi / soft^(1/4) voxels may change moments.

    Raises
    ------
    SolverError
        If no such matrix is found.
    """
    v = sparse.coo_array(values)
    to, at = v.coords
    have = [np.bincount(to, v.data * (columns[at, a] - rows[to, a]), len(rows)) for a in range(columns.shape[1])]
    near = _Changes(weights, rows, columns, STRICT, soft)
    values = near.apply(values, sums, moments - np.stack(have, 1), totals)
    far = _Changes(weights, rows, columns, FREEDOM, 0.0)
    aim, error = ERROR * float(np.abs(totals).max()), math.inf
    for _ in range(8):  # rounding ends each pass early: multipliers are large where changes are small
        before = error
        error = max(float(np.abs(sums - values.sum(1)).max()), float(np.abs(totals - values.sum(0)).max()))
        if error <= aim or error > before / 2:
            break
        values = far.apply(values, sums, np.zeros_like(moments), totals)
    if not error <= 100 * aim:
        raise SolverError(
            "the voxels and the mesh could not be matched: somewhere the mesh leaves the mask by more than a voxel. "
            "Smooth less, or use smaller cells."
        )
    return values


class _Changes:
    """The smallest changes of a matrix's entries that make up for what its sums and moments lack.

    Minimises half the sum of change² / weight, of (what a row's moments still lack)² / (`freedom` times the row's
    weight), and of (what a column's sum still lacks)² / (`soft` times the column's weight).
    """

    def __init__(self, weights: sparse.csr_array, rows: np.ndarray, columns: np.ndarray, freedom: float, soft: float):
        w = sparse.coo_array(weights)
        self.weights, self.shape = w.data, w.shape
        self.i, self.j = w.coords
        self.one = np.concatenate((np.ones((w.nnz, 1)), columns[self.j] - rows[self.i]), 1)
        terms = range(self.one.shape[1])
        self.moved = [sparse.csr_array((w.data * self.one[:, a], w.coords), w.shape) for a in terms]
        gram = np.empty((len(rows), len(terms), len(terms)))
        for a, b in itertools.product(terms, terms):
            gram[:, a, b] = np.bincount(self.i, w.data * self.one[:, a] * self.one[:, b], len(rows))
        gram[:, 1:, 1:] += freedom * gram[:, 0, 0, None, None] * np.eye(len(terms) - 1)
        self.inverse = np.linalg.inv(gram)
        root = np.linalg.cholesky(self.inverse)
        # Multipliers of the rows follow from those of the columns; what remains is one symmetric equation per column,
        # diag(weights of columns) - half' half.
        half = sparse.vstack([sum(sparse.diags_array(root[:, a, b]) @ self.moved[a] for a in terms) for b in terms],
                             format="csr")  # fmt: skip
        self.solve = _solver(half, (1 + soft) * np.bincount(self.j, w.data, len(columns)), columns, soft == 0)

    def apply(self, values: sparse.csr_array, sums: np.ndarray, moments: np.ndarray,
              totals: np.ndarray) -> sparse.csr_array:  # fmt: skip
        """The matrix changed: `sums` of rows and `totals` of columns are wanted, `moments` what is lacking."""
        lacking = np.concatenate(((sums - values.sum(1))[:, None], moments), 1)
        start = np.einsum("rab,rb->ra", self.inverse, lacking)
        right = totals - values.sum(0) - sum(m.T @ start[:, a] for a, m in enumerate(self.moved))
        g = self.solve(right)
        start -= np.einsum("rab,rb->ra", self.inverse, np.stack([m @ g for m in self.moved], 1))
        change = self.weights * (np.einsum("ka,ka->k", self.one, start[self.i]) + g[self.j])
        return sparse.csr_array(values + sparse.csr_array((change, (self.i, self.j)), self.shape))


def _solver(half: sparse.csr_array, diagonal: np.ndarray, places: np.ndarray,
            singular: bool) -> Callable[[np.ndarray], np.ndarray]:  # fmt: skip
    """Solves (diag(diagonal) - half' half) g = right by conjugate gradients.

    Diagonal scaling leaves the long waves; these are solved for on blocks of voxels, on each of which g is linear.
    Where the equations are singular, a constant solves them for nothing.
    """
    n = len(diagonal)
    back = half.T.tocsr()
    local = np.maximum(diagonal - (half * half).sum(0), 1e-9 * diagonal)
    index = np.floor(places / BLOCK)
    block = np.unique(index, axis=0, return_inverse=True)[1].ravel()
    linear = np.concatenate((np.ones((n, 1)), places / BLOCK - index - 0.5), 1)
    terms = linear.shape[1]
    at = (np.repeat(np.arange(n), terms), (block[:, None] * terms + np.arange(terms)).ravel())
    blocks = sparse.csr_array((linear.ravel(), at), (n, terms * (block.max() + 1)))
    image = half @ blocks
    coarse = blocks.T @ sparse.diags_array(diagonal) @ blocks - image.T @ image
    # Some blocks hold too few columns to tell slopes apart.
    ridge = 1e-9 * np.maximum(coarse.diagonal(), 1e-9 * coarse.diagonal().max())
    factors = splu(sparse.csc_array(coarse + sparse.diags_array(ridge)))

    def centred(r: np.ndarray) -> np.ndarray:
        return r - r.mean() if singular else r

    def precondition(r: np.ndarray) -> np.ndarray:
        r = centred(r)
        return centred(r / local + blocks @ factors.solve(blocks.T @ r))

    operator = LinearOperator((n, n), matvec=lambda g: diagonal * g - back @ (half @ g), dtype=float)
    preconditioner = LinearOperator((n, n), matvec=precondition, dtype=float)

    def solve(right: np.ndarray) -> np.ndarray:
        # The caller sees whether it was found.
        return cg(operator, centred(right), rtol=1e-6, maxiter=1000, M=preconditioner)[0]

    return solve


def cut_transfer(mesh: Mesh, degree: int) -> Transfer:
    """The maps between the mask's voxels and the nodes of a mesh whose cells lie across voxels.

    Parameters
    ----------
    mesh : Mesh
        Its volume is that of the mask.
    degree : int
        1 or 2.

    Raises
    ------
    SolverError
        If mesh and mask lie too far apart.
    """
    domain, axes = mesh.domain, mesh.axes
    spacing = np.array([domain.spacing[2 - a] for a in axes])
    corner = np.array([domain.coords["xyz"[a]][0] for a in axes]) - spacing / 2
    nodes, places = mesh.cell_nodes(degree), (mesh.nodes(degree) - corner) / spacing
    centres = (mask_centres(domain, axes) - corner) / spacing
    shape = (len(places), len(centres))
    size = float(np.prod(spacing))
    overlap, squares, cellwise = (sparse.csr_array(s) for s in (shape, shape, (len(mesh.cells), len(centres))))
    levers = [sparse.csr_array(shape) for _ in axes]
    grid, tree = (mesh.points - corner) / spacing, cKDTree(centres * spacing)
    for parts in cut(grid, mesh.cells, degree):
        corners = grid[mesh.cells[parts.cell]]
        voxel = _voxels(domain, axes, parts.voxel)
        outside = voxel < 0
        middle = np.einsum("kb,kbd->kd", parts.middle[outside], corners[outside])
        voxel[outside] = tree.query(middle * spacing)[1]
        volume = mesh.volumes[parts.cell]
        rows, columns = nodes[parts.cell], np.broadcast_to(voxel[:, None], parts.shape.shape)
        overlap = overlap + gather(volume[:, None] * parts.shape, rows, columns, shape)
        squares = squares + gather(volume[:, None] * parts.square, rows, columns, shape)
        moment = parts.lever @ corners - parts.shape[:, :, None] * centres[voxel][:, None]
        levers = [m + gather(volume[:, None] * moment[:, :, a], rows, columns, shape) for a, m in enumerate(levers)]
        cellwise = cellwise + gather(parts.share, parts.cell, voxel, cellwise.shape)
    load = overlap
    for lever, axis, step in zip(levers, axes, spacing, strict=True):
        load = load + lever @ (step * mask_slope(domain, 2 - axis))
    squares = squares + _reach(squares, tree, mesh, nodes, spacing, size)
    mass = mass_matrix(mesh, degree)
    totals, voxels = mass.sum(1), np.full(len(centres), size)
    first = mass @ places - totals[:, None] * places
    per_voxel = sparse.csr_array(squares.T)
    per_voxel = sparse.diags_array(size / per_voxel.sum(1)) @ per_voxel
    nodal = sparse.diags_array(1 / squares.sum(1)) @ squares
    soft = SOFT * (WIDTH / len(centres) ** (1 / len(axes))) ** 2
    average = balance(sparse.csr_array(overlap.T), per_voxel, centres, places, voxels, np.zeros_like(centres), totals,
                      soft)  # fmt: skip
    wide = squares + squares @ _neighbours(domain, axes) / (2 * len(axes))
    load = balance(sparse.csr_array(load), sparse.csr_array(wide), places, centres, totals, first, voxels, soft)
    return Transfer(sparse.csr_array(average / size), load, mass, sparse.csr_array(nodal), cellwise)


def outside_volume(mesh: Mesh) -> float:
    """Volume of a mesh outside the voxels of its mask, mm to the power of the dimension."""
    spacing = np.array([mesh.domain.spacing[2 - a] for a in mesh.axes])
    corner = np.array([mesh.domain.coords["xyz"[a]][0] for a in mesh.axes]) - spacing / 2
    total = 0.0
    for parts in cut((mesh.points - corner) / spacing, mesh.cells, 1):
        outside = _voxels(mesh.domain, mesh.axes, parts.voxel) < 0
        total += float((mesh.volumes[parts.cell] * parts.share)[outside].sum())
    return total


def _voxels(domain: Domain, axes: tuple[int, ...], index: np.ndarray) -> np.ndarray:
    """Numbers of the mask's voxels at indices (k, d) along the mesh's axes; -1 outside the mask."""
    number = np.where(domain.mask, np.cumsum(domain.mask).reshape(domain.shape) - 1, -1)
    full = np.zeros((len(index), 3), np.int64)
    for column, axis in enumerate(axes):
        full[:, 2 - axis] = index[:, column]
    inside = ((full >= 0) & (full < domain.shape)).all(1)
    found = np.full(len(index), -1)
    found[inside] = number[tuple(full[inside].T)]
    return found


def _reach(squares: sparse.csr_array, tree: cKDTree, mesh: Mesh, nodes: np.ndarray, spacing: np.ndarray,
           size: float) -> sparse.csr_array:  # fmt: skip
    """Weights that join voxels which the mesh does not touch to the nodes of the nearest cell."""
    missed = np.flatnonzero(squares.sum(0) <= 1e-9 * size)
    corner = np.array([mesh.domain.coords["xyz"[a]][0] for a in mesh.axes]) - spacing / 2
    _, cell = cKDTree(mesh.points[mesh.cells].mean(1)).query(tree.data[missed] + corner)
    rows = nodes[cell]
    return gather(np.full(rows.shape, 0.1 * size), rows, np.broadcast_to(missed[:, None], rows.shape), squares.shape)


def _neighbours(domain: Domain, axes: tuple[int, ...]) -> sparse.csr_array:
    """1 for voxels of the mask that share a face."""
    found = sparse.csr_array((int(domain.mask.sum()),) * 2)
    for axis in axes:
        found = found + abs(mask_slope(domain, 2 - axis))
    found.setdiag(0)
    found.eliminate_zeros()
    found.data[:] = 1.0
    return found
