"""Transfer between voxels and a mesh that does not follow them: conserves mass, and is second order up to the boundary.

Each cell is cut along the voxels' planes, which makes the integrals over cell ∩ voxel exact. At the organ's boundary
that is not enough: a smooth mesh leaves corners of the mask's voxels empty and bulges beyond others, so that a voxel's
average over what it shares with the mesh stands for another volume and another place than the voxel. `balance`
therefore changes the weights as little as possible, until every voxel stands for its whole volume, every node for the
integral of its shape function, and linear fields are reproduced.
"""

from __future__ import annotations

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

#: How little moments may give way, as a share of a row's weight. With 0 linear fields would be reproduced to the last
#: digit, but volume that lacks far away could not move there.
FREEDOM = 1e-4
#: Mean square distance, in voxels, along an axis from a voxel to the nodes of cells of its size. Beyond, in cells far
#: larger than voxels, the few nodes around leave no choice, and moments give way more.
CLOSE = 0.25
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
    freedom: float | np.ndarray = FREEDOM,
) -> sparse.csr_array:
    """Change a matrix as little as possible, so that its rows and columns have given sums and its rows given moments.

    Minimises the sum of change² / weight, plus a penalty on the errors of the moments; the sums are exact.

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
    freedom : float or ndarray, shape (r,)
        How far moments may give way, as a share of a row's weight, above 0.

    Raises
    ------
    SolverError
        If no such matrix is found.
    """
    w = sparse.coo_array(weights)
    i, j = w.coords
    one = np.concatenate((np.ones((len(i), 1)), columns[j] - rows[i]), 1)
    terms = range(one.shape[1])
    gram = np.array([[np.bincount(i, w.data * one[:, a] * one[:, b], len(rows)) for a in terms] for b in terms])
    gram = gram.transpose(2, 0, 1)
    size = gram[:, 0, 0].copy()
    gram[:, 1:, 1:] += (freedom * size)[:, None, None] * np.eye(len(terms) - 1)
    inverse = np.linalg.inv(gram)
    # The multipliers of a row (of its sum and moments) follow from those of the columns; what remains is one symmetric
    # equation per column, diag(weights of columns) - half' half.
    moved = [sparse.csr_array((w.data * one[:, a], (i, j)), w.shape) for a in terms]
    root = np.linalg.cholesky(inverse)
    half = sparse.vstack([sum(sparse.diags_array(root[:, a, b]) @ moved[a] for a in terms) for b in terms],
                         format="csr")  # fmt: skip
    solve = _solver(half, np.bincount(j, w.data, len(columns)), columns)
    aim, error = ERROR * float(np.abs(totals).max()), math.inf
    v = sparse.coo_array(values)
    to, at = v.coords
    have = [np.bincount(to, v.data * (columns[at, a] - rows[to, a]), len(rows)) for a in range(columns.shape[1])]
    lacking = np.concatenate((sums[:, None], moments - np.stack(have, 1)), 1)
    for _ in range(8):  # rounding ends each pass early: multipliers are large where changes are small
        lacking[:, 0], right = sums - values.sum(1), totals - values.sum(0)
        before, error = error, max(float(np.abs(lacking[:, 0]).max()), float(np.abs(right).max()))
        if error <= aim or error > before / 2:
            break
        start = np.einsum("rab,rb->ra", inverse, lacking)
        right = right - sum(moved[a].T @ start[:, a] for a in terms)
        g = solve(right, 1e-6 * float(np.linalg.norm(right)))
        start -= np.einsum("rab,rb->ra", inverse, np.stack([m @ g for m in moved], 1))
        change = w.data * (np.einsum("ka,ka->k", one, start[i]) + g[j])
        values = sparse.csr_array(values + sparse.csr_array((change, (i, j)), w.shape))
        lacking[:, 1:] = 0.0  # the moments have had their say
    if not error <= 100 * aim:
        raise SolverError(
            "the voxels and the mesh could not be matched: somewhere the mesh leaves the mask by more than a voxel. "
            "Smooth less, or use smaller cells."
        )
    return values


def _solver(half: sparse.csr_array, diagonal: np.ndarray,
            places: np.ndarray) -> Callable[[np.ndarray, float], np.ndarray]:  # fmt: skip
    """Solves (diag(diagonal) - half' half) g = right to a residual, by conjugate gradients.

    The operator is about a bilaplacian, to which diagonal scaling leaves the long waves; these are solved for on blocks
    of voxels, on each of which g is linear.
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

    def precondition(r: np.ndarray) -> np.ndarray:
        r = r - r.mean()
        z = r / local + blocks @ factors.solve(blocks.T @ r)
        return z - z.mean()  # a constant changes nothing

    operator = LinearOperator((n, n), matvec=lambda g: diagonal * g - back @ (half @ g), dtype=float)
    preconditioner = LinearOperator((n, n), matvec=precondition, dtype=float)

    def solve(right: np.ndarray, residual: float) -> np.ndarray:
        # What all columns lack together is rounding; the caller sees whether the rest was found.
        return cg(operator, right - right.mean(), rtol=0.0, atol=residual, maxiter=1000, M=preconditioner)[0]

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
    at = per_voxel.tocoo().coords
    spread = ((places[at[1]] - centres[at[0]]) ** 2).mean(1) * per_voxel.tocoo().data
    spread = np.bincount(at[0], spread, len(centres)) / size
    average = balance(sparse.csr_array(overlap.T), per_voxel, centres, places, voxels, np.zeros_like(centres), totals,
                      FREEDOM * np.maximum(1.0, spread / CLOSE) ** 2)  # fmt: skip
    wide = squares + squares @ _neighbours(domain, axes) / (2 * len(axes))
    load = balance(sparse.csr_array(load), sparse.csr_array(wide), places, centres, totals, first, voxels)
    nodal = sparse.diags_array(1 / squares.sum(1)) @ squares
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
