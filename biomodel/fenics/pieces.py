"""Parts of a mesh's cells in each voxel of a grid, with exact integrals over them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from biomodel.errors import SolverError
from biomodel.fenics.elements import EDGES, quadrature, shapes
from biomodel.fenics.kernels import integrate_parts

__all__ = ["Parts", "cut"]

#: Parts computed at once; bounds the memory.
CHUNK = 400_000


@dataclass(frozen=True, eq=False)
class Parts:
    """Cells ∩ voxels. All integrals are shares of the cell's volume; exact for degree 1 and 2.

    Attributes
    ----------
    cell : ndarray of int64, shape (k,)
    voxel : ndarray of int64, shape (k, d)
        Index of the voxel along each axis of the mesh; outside the grid negative or beyond the last.
    share : ndarray, shape (k,)
    middle : ndarray, shape (k, d + 1)
        Barycentric coordinates of the part's centre of gravity.
    shape, square : ndarray, shape (k, nodes)
        Integrals of the cell's shape functions, and of their squares.
    lever : ndarray, shape (k, nodes, d + 1)
        Integrals of shape functions times barycentric coordinates.
    """

    cell: np.ndarray
    voxel: np.ndarray
    share: np.ndarray
    middle: np.ndarray
    shape: np.ndarray
    square: np.ndarray
    lever: np.ndarray


def cut(points: np.ndarray, cells: np.ndarray, degree: int) -> Iterator[Parts]:
    """Cut cells along the planes of a grid, some thousand at a time.

    Parameters
    ----------
    points : ndarray, shape (n, d)
        Vertices in units of voxels: voxel i reaches from i to i + 1.
    cells : ndarray of int, shape (m, d + 1)
    degree : int
        1 or 2: of the shape functions.

    Raises
    ------
    SolverError
        If a cell is hundreds of voxels long.
    """
    corners = points[cells]
    low = np.floor(corners.min(1)).astype(np.int64)
    count = np.floor(corners.max(1)).astype(np.int64) - low + 1
    behind = np.cumsum(count.prod(1))
    first = 0
    while first < len(cells):
        last = max(int(np.searchsorted(behind, (behind[first - 1] if first else 0) + CHUNK)), first + 1)
        yield _cut(corners[first:last], low[first:last], count[first:last], first, degree)
        first = last


def _cut(corners: np.ndarray, low: np.ndarray, count: np.ndarray, first: int, degree: int) -> Parts:
    dim = corners.shape[2]
    start = np.concatenate(([0], np.cumsum(count.prod(1))))
    inside, weights = quadrature(dim, degree + 1)
    nodes, total = shapes(inside, degree).shape[1], int(start[-1])
    share, middle = np.zeros(total), np.zeros((total, dim + 1))
    shape, square, lever = np.zeros((total, nodes)), np.zeros((total, nodes)), np.zeros((total, nodes, dim + 1))
    edges = np.array(EDGES[dim] if degree == 2 else np.zeros((0, 2)), np.int64)
    if not integrate_parts(corners, start, low, count, inside, weights, edges, share, middle, shape, lever, square):
        raise SolverError("a cell of the mesh is hundreds of voxels long; use smaller cells.")
    cell = np.repeat(np.arange(len(corners)), np.diff(start))
    kept = share > 0
    rest = (np.arange(total) - start[cell])[kept]
    cell = cell[kept]
    voxel = np.empty((len(cell), dim), np.int64)
    for axis in range(dim - 1, -1, -1):
        voxel[:, axis] = low[cell, axis] + rest % count[cell, axis]
        rest = rest // count[cell, axis]
    share = share[kept]
    return Parts(first + cell, voxel, share, middle[kept] / share[:, None], shape[kept], square[kept], lever[kept])
