"""Compiled: cells of a mesh cut along the planes of a voxel grid."""

import numba
import numpy as np

#: A vertex this close to a plane, in voxels, lies on it.
CLOSE = 1e-9
#: Simplices that wait to be cut further, at most.
DEPTH = 512


@numba.njit(cache=True, nogil=True)
def integrate_parts(corners, start, low, count, inside, weights, edges, share, middle, shape, lever, square):
    """Integrals over the parts of cells in each voxel; False where a cell takes too many cuts.

    A simplex that a plane crosses is bisected at that plane, edge by edge, until none is crossed.

    `corners` (m, d + 1, d): places in voxels. `start` (m + 1,): first entry of each cell in the results, one for each
    voxel of the box `low` (m, d), `count` (m, d) around it, the last axis fastest. `inside` (q, d + 1), `weights` (q,):
    quadrature on a simplex; `edges` (e, 2): vertices of the edges that carry nodes (none for degree 1). Results, all as
    shares of the cell's volume: `share` (k,) of the part, `middle` (k, d + 1) of barycentric coordinates, `shape`
    (k, n) of shape functions, `lever` (k, n, d + 1) of these times barycentric coordinates, `square` (k, n).
    """
    cells, ends, dim = corners.shape
    nodes = shape.shape[1]
    inner = np.empty((DEPTH, ends, ends))
    place = np.empty((DEPTH, ends, dim))
    size = np.empty(DEPTH)
    b = np.empty(ends)
    values = np.empty(nodes)
    for cell in range(cells):
        inner[0] = 0.0
        for v in range(ends):
            inner[0, v, v] = 1.0
        place[0] = corners[cell]
        size[0] = 1.0
        waiting = 1
        while waiting > 0:
            top = waiting - 1
            axis, one, two, t = _crossing(place[top])
            if axis >= 0:
                if waiting >= DEPTH:
                    return False
                inner[waiting], place[waiting] = inner[top], place[top]
                size[waiting] = size[top] * t
                size[top] *= 1.0 - t
                for w in range(ends):
                    new = (1.0 - t) * inner[top, one, w] + t * inner[top, two, w]
                    inner[top, one, w] = new
                    inner[waiting, two, w] = new
                plane = np.round((1.0 - t) * place[top, one, axis] + t * place[top, two, axis])
                for w in range(dim):
                    new = (1.0 - t) * place[top, one, w] + t * place[top, two, w]
                    if w == axis:
                        new = plane
                    place[top, one, w] = new
                    place[waiting, two, w] = new
                waiting += 1
                continue
            waiting -= 1
            k = 0
            for a in range(dim):
                centre = 0.0
                for v in range(ends):
                    centre += place[top, v, a] / ends
                index = int(np.floor(centre)) - low[cell, a]
                k = k * count[cell, a] + min(max(index, 0), count[cell, a] - 1)
            k += start[cell]
            share[k] += size[top]
            for q in range(inside.shape[0]):
                amount = size[top] * weights[q]
                for w in range(ends):
                    b[w] = 0.0
                    for v in range(ends):
                        b[w] += inside[q, v] * inner[top, v, w]
                    middle[k, w] += amount * b[w]
                if nodes == ends:
                    values[:] = b
                else:
                    for v in range(ends):
                        values[v] = b[v] * (2.0 * b[v] - 1.0)
                    for e in range(edges.shape[0]):
                        values[ends + e] = 4.0 * b[edges[e, 0]] * b[edges[e, 1]]
                for n in range(nodes):
                    part = amount * values[n]
                    shape[k, n] += part
                    square[k, n] += part * values[n]
                    for w in range(ends):
                        lever[k, n, w] += part * b[w]
    return True


@numba.njit(cache=True, nogil=True)
def _crossing(place):
    """Axis of a plane that crosses a simplex (-1: none), the two ends of an edge across it, and where along the edge.

    Of several planes the middle one, which leaves fewer pieces than one cut after the other.
    """
    ends, dim = place.shape
    for axis in range(dim):
        least, most = place[0, axis], place[0, axis]
        for v in range(1, ends):
            least, most = min(least, place[v, axis]), max(most, place[v, axis])
        first, last = np.floor(least + CLOSE) + 1.0, np.ceil(most - CLOSE) - 1.0
        if first > last:
            continue
        plane = np.floor((first + last) / 2.0)
        for one in range(ends):
            below = place[one, axis] - plane
            if below >= -CLOSE:
                continue
            for two in range(ends):
                above = place[two, axis] - plane
                if above > CLOSE:
                    return axis, one, two, below / (below - above)
    return -1, 0, 0, 0.0
