"""Lagrange elements of degree 1 and 2 on simplices of one to three dimensions, by barycentric coordinates."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.special import roots_jacobi

#: Edges of the reference simplex as pairs of vertices: the order of the nodes of degree 2 behind the vertices.
EDGES = {1: ((0, 1),), 2: ((1, 2), (0, 2), (0, 1)), 3: ((2, 3), (1, 3), (1, 2), (0, 3), (0, 2), (0, 1))}


def quadrature(dim: int, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Barycentric points (q, dim + 1) and weights (q,), sum 1, exact for polynomials of degree 2 `points` - 1.

    Gauss-Jacobi points on the cube, collapsed onto the simplex (Stroud 1971, Approximate Calculation of Multiple
    Integrals, section 2.4).
    """
    rules = []
    for axis in range(dim):
        x, w = roots_jacobi(points, dim - 1 - axis, 0)
        rules.append(((x + 1) / 2, w / w.sum()))
    found, weights = [], []
    for index in itertools.product(range(points), repeat=dim):
        rest, place, weight = 1.0, [], 1.0
        for axis, i in enumerate(index):
            place.append(rest * rules[axis][0][i])
            rest *= 1 - rules[axis][0][i]
            weight *= rules[axis][1][i]
        found.append([rest, *place])
        weights.append(weight)
    return np.array(found), np.array(weights)


def shapes(barycentric: np.ndarray, degree: int) -> np.ndarray:
    """Values (q, nodes) of the shape functions at barycentric points (q, dim + 1): vertices, then edges."""
    b = barycentric
    if degree == 1:
        return b
    edges = [4 * b[:, i] * b[:, j] for i, j in EDGES[b.shape[1] - 1]]
    return np.concatenate((b * (2 * b - 1), np.stack(edges, 1)), 1)


def integrals(dim: int, degree: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integrals over a simplex of volume 1: of shape functions (n,), times a barycentric coordinate (n, dim + 1), and
    of products of two (n, n)."""
    b, w = quadrature(dim, degree + 1)
    s = shapes(b, degree)
    return w @ s, (s * w[:, None]).T @ b, (s * w[:, None]).T @ s
