"""The boundary of an organ's mask as a smooth surface (3D) or curve (2D) that encloses the mask's volume."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage, sparse
from scipy.sparse.csgraph import connected_components

from biomodel.domain import Domain
from biomodel.errors import GeometryError, SolverError

__all__ = ["Boundary", "mask_boundary", "mask_holes"]

#: Fewest voxels along each axis: below, smoothing leaves nothing of the mask's shape.
FEWEST = 4


@dataclass(frozen=True, eq=False)
class Boundary:
    """Closed triangulated surfaces (3D) or closed polygons (2D) around an organ.

    Attributes
    ----------
    points : ndarray, shape (n, d)
        mm, in the order x, y(, z) of the axes that the domain has.
    facets : ndarray of int64, shape (m, d)
        Triangles or segments; normals point outwards.
    part : ndarray of int64, shape (m,)
        Which closed surface each facet belongs to; 0 is the outer one, the others are holes.
    level : float
        Value of the smoothed mask (about 0 to 1) on the boundary.
    """

    points: np.ndarray
    facets: np.ndarray
    part: np.ndarray
    level: float

    @property
    def holes(self) -> int:
        """Number of holes inside."""
        return int(self.part.max())


def mask_holes(inside: np.ndarray) -> list[np.ndarray]:
    """Indices (k, d) of the voxels of each hole: empty voxels that the outside does not reach through faces.

    Parameters
    ----------
    inside : ndarray of bool
        The mask, with two or three axes.

    Raises
    ------
    GeometryError
        If a hole touches the outside, or another hole, at an edge or a corner of voxels: the wall between them has no
        thickness there.
    """
    empty = np.pad(~inside, 1, constant_values=True)
    holes, count = ndimage.label(empty)
    everywhere = np.ones((3,) * inside.ndim)
    joined, together = ndimage.label(empty, everywhere)
    found = [np.argwhere(holes == k) - 1 for k in range(1, count + 1) if k != holes.flat[0]]
    if together == count:
        return found
    for place in found:
        group = joined == joined[tuple(place[0] + 1)]
        if np.count_nonzero(group) > len(place):
            near = ndimage.binary_dilation(holes == holes[tuple(place[0] + 1)], everywhere)
            here = place[0]
            for index in np.argwhere(near & group & (holes != holes[tuple(place[0] + 1)])):
                here = place[np.abs(place + 1 - index).max(1).argmin()]
                break
            outer = "the mask's border" if group.flat[0] else "another hole"
            raise GeometryError(
                f"OrganMesh: a hole of {len(place)} voxels in the mask touches {outer} at an edge or a corner, at the "
                f"voxel {_index(here)}: the wall has no thickness there. Fill the hole, or "
                "open it through the face of a voxel; BoxMesh takes the mask as it is."
            )
    return found


def _index(voxel: np.ndarray) -> str:
    axes = "z, y, x" if len(voxel) == 3 else "rows, columns"
    return f"({', '.join(str(int(i)) for i in voxel)}) ({axes})"


def _require_mask(inside: np.ndarray) -> None:
    """Raise where no mesh can be made of the mask."""
    parts, count = ndimage.label(inside)
    if count > 1:
        sizes = np.sort(np.bincount(parts.ravel())[1:])[::-1]
        shown = ", ".join(str(n) for n in sizes[:6]) + (", …" if count > 6 else "")
        raise GeometryError(
            f"OrganMesh: the mask has {count} components that share no face, of {shown} voxels; expected one. Keep the "
            "component that holds the tumour, or join them; BoxMesh takes the mask as it is."
        )
    for axis in range(inside.ndim):
        across = np.flatnonzero(inside.any(tuple(k for k in range(inside.ndim) if k != axis)))
        extent = int(across[-1] - across[0]) + 1
        if extent < FEWEST:
            raise GeometryError(
                f"OrganMesh: the mask is {extent} voxels wide along axis {axis} of {inside.ndim}; expected at least "
                f"{FEWEST}, or smoothing leaves nothing of its shape. Use BoxMesh, or images of a finer grid."
            )


def mask_boundary(domain: Domain, axes: tuple[int, ...], smooth: float) -> Boundary:
    """The smoothed boundary of a domain's mask.

    The mask is smoothed without second moment, so that curved parts do not shrink as a Gaussian would make them; the
    boundary is the isosurface (marching cubes of Lewiner et al. 2003, J Graph
    Tools 8:1, doi:10.1080/10867651.2003.10487582; in 2D marching squares) whose enclosed volume is the mask's.

    Parameters
    ----------
    domain : Domain
    axes : tuple of int
        Which of x (0), y (1), z (2) the domain has, two or three of them.
    smooth : float
        Standard deviation of the Gaussians, in voxels along each axis.

    Returns
    -------
    Boundary

    Raises
    ------
    GeometryError
        If the mask has several components, a hole that touches the border, fewer than four voxels along an axis, or a
        part so thin that smoothing cuts it off.
    """
    dim = len(axes)
    inside = domain.mask.reshape([n for n in domain.shape if n > 1])
    _require_mask(inside)
    mask_holes(inside)
    spacing = np.array([domain.spacing[2 - a] for a in axes])
    origin = np.array([domain.coords["xyz"[a]][0] for a in axes])
    margin = int(np.ceil(4 * smooth)) + 2
    field = _smoothed(np.pad(inside, margin).astype(float), smooth)
    wanted = float(inside.sum() * np.prod(spacing))

    def at(level: float) -> tuple[np.ndarray, np.ndarray]:
        points, facets = _triangles(field, level) if dim == 3 else _polygons(field, level)
        return origin + (points[:, ::-1] - margin) * spacing, facets

    low, high = 0.02, 0.98
    for _ in range(50):  # bisection: the volume falls as the level rises
        level = (low + high) / 2
        points, facets = at(level)
        volume = enclosed(points, facets) if len(facets) else 0.0
        if abs(volume - wanted) < 1e-12 * wanted:
            break
        low, high = (level, high) if volume > wanted else (low, level)
    part = closed_parts(facets)
    sizes = np.array([enclosed(points, facets[part == k]) for k in range(part.max() + 1)])
    if np.count_nonzero(sizes > 0) > 1:
        lost = int(np.where(sizes > 0, sizes, np.inf).argmin())
        centre = points[facets[part == lost]].mean((0, 1))
        raise GeometryError(
            f"OrganMesh: smoothing cuts off a part of {sizes[lost]:.3g} {'mm³' if dim == 3 else 'mm²'} around "
            f"{place(centre, axes)}: the mask is too thin beside it. Smooth less (smooth={smooth / 2:g}), widen or cut "
            "the mask there, or use BoxMesh."
        )
    order = np.argsort(-sizes, kind="stable")
    return Boundary(points, facets, np.argsort(order)[part], level)


def place(point: np.ndarray, axes: tuple[int, ...]) -> str:
    """A point in words, as ``x 3.1, y 2.0, z 7.5 mm``."""
    return ", ".join(f"{'xyz'[a]} {v:.1f}" for a, v in zip(axes, point, strict=True)) + " mm"


def enclosed(points: np.ndarray, facets: np.ndarray) -> float:
    """Volume (area in 2D) inside facets whose normals point outwards, by the divergence theorem."""
    if len(facets) == 0:
        return 0.0
    corners = points[facets] - points[facets[0, 0]]
    return float(np.linalg.det(corners).sum() / (6 if points.shape[1] == 3 else 2))


def _smoothed(values: np.ndarray, smooth: float) -> np.ndarray:
    """Twice a Gaussian less the Gaussian applied twice: a kernel of fourth order."""
    once = ndimage.gaussian_filter(values, smooth, truncate=4.0)
    return 2 * once - ndimage.gaussian_filter(once, smooth, truncate=4.0)


def _skimage():
    try:
        from skimage import measure
    except ImportError as error:
        raise SolverError(
            f"OrganMesh needs scikit-image, which does not load here ({error}). Install the extra: "
            "pip install 'tumorcast[mesh]'."
        ) from error
    return measure


def _triangles(field: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Isosurface in index coordinates (z, y, x), oriented so that the reversed coordinates have outward normals."""
    points, triangles, _, _ = _skimage().marching_cubes(field, level, allow_degenerate=False)
    # Single precision inside; the last digits decide whether two of its points are one.
    points = points.astype(float)
    triangles = triangles.astype(np.int64)
    if enclosed(points[:, ::-1], triangles) < 0:
        triangles = triangles[:, ::-1]
    return points, triangles


def _polygons(field: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Isolines in index coordinates (y, x), oriented so that the reversed coordinates have outward normals."""
    points: list[np.ndarray] = []
    segments: list[np.ndarray] = []
    count = 0
    for curve in _skimage().find_contours(field, level, positive_orientation="high"):
        closed = curve[:-1]  # the last point is the first
        step = np.linalg.norm(closed - np.roll(closed, 1, 0), axis=1)
        closed = closed[step > 1e-9]
        if len(closed) < 3:
            continue
        number = count + np.arange(len(closed))
        points.append(closed)
        segments.append(np.stack((number, np.roll(number, -1)), 1))
        count += len(closed)
    if not points:
        return np.empty((0, 2)), np.empty((0, 2), np.int64)
    joined, found = np.concatenate(points), np.concatenate(segments)
    return joined, found if enclosed(joined[:, ::-1], found) > 0 else found[:, ::-1]


def closed_parts(facets: np.ndarray) -> np.ndarray:
    """Number, from 0, of the connected surface that each facet (m, d) belongs to."""
    pairs = np.concatenate([facets[:, [k, (k + 1) % facets.shape[1]]] for k in range(facets.shape[1])])
    graph = sparse.coo_array((np.ones(len(pairs)), pairs.T), (int(facets.max()) + 1,) * 2)
    label = connected_components(graph, directed=False)[1][facets[:, 0]]
    return np.unique(label, return_inverse=True)[1]
