"""How good a mesh's cells are, and how well it stands for its mask."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import numpy as np

from biomodel.fenics.mesh import Mesh

__all__ = ["MeshQuality", "cell_angles", "measure", "radius_ratios"]


@dataclass(frozen=True)
class MeshQuality:
    """Numbers that say whether a mesh is fit for use.

    Attributes
    ----------
    vertices, cells : int
    edges : (float, float, float)
        Shortest, median and longest edge, mm.
    radius_ratio : (float, float)
        Smallest and mean of d times the inscribed over the circumscribed radius: 1 for equilateral cells, 0 for flat
        ones. Below 0.02 the linear solver converges slowly.
    angle : (float, float)
        Smallest and largest dihedral angle (3D) or angle (2D) of all cells, degrees.
    volume, mask_volume : float
        Volume (mm³; mm² in 2D) of the mesh and of the mask's voxels.
    outside : float
        Share of the mesh's volume that lies outside the mask's voxels; as much of the mask is not covered.
    moved : float
        How far the vertices of the boundary were moved at most, mm, so that both volumes agree: the coarse cells of a
        curved boundary cut it short.
    holes, mask_holes : int
        Holes of the mesh and of the mask; smoothing fills those of a voxel or two.
    """

    vertices: int
    cells: int
    edges: tuple[float, float, float]
    radius_ratio: tuple[float, float]
    angle: tuple[float, float]
    volume: float
    mask_volume: float
    outside: float
    moved: float
    holes: int
    mask_holes: int

    def __str__(self) -> str:
        return (
            f"{self.vertices} vertices, {self.cells} cells, edges {self.edges[0]:.2f} to {self.edges[2]:.2f} mm; "
            f"radius ratio at least {self.radius_ratio[0]:.3f}, on average {self.radius_ratio[1]:.3f}; angles "
            f"{self.angle[0]:.1f} to {self.angle[1]:.1f}°; volume {self.volume:.6g} (mask {self.mask_volume:.6g}), "
            f"{100 * self.outside:.1f} % of it outside the mask's voxels; boundary moved by at most {self.moved:.2f} mm"
        )


def _slopes(corners: np.ndarray) -> np.ndarray:
    """Gradients of the barycentric coordinates (m, d + 1, d) of cells with corners (m, d + 1, d)."""
    inverse = np.linalg.inv(corners[:, 1:] - corners[:, :1])
    others = inverse.transpose(0, 2, 1)
    return np.concatenate((-others.sum(1, keepdims=True), others), 1)


def radius_ratios(corners: np.ndarray) -> np.ndarray:
    """d times the inscribed over the circumscribed radius (m,) of simplices with corners (m, d + 1, d)."""
    edges = corners[:, 1:] - corners[:, :1]
    centre = np.linalg.solve(2 * edges, (edges**2).sum(2)[:, :, None])[:, :, 0]
    # The inscribed radius is one over the sum of the gradients' lengths: each is one over a height.
    inscribed = 1 / np.linalg.norm(_slopes(corners), axis=2).sum(1)
    return corners.shape[2] * inscribed / np.linalg.norm(centre, axis=1)


def cell_angles(corners: np.ndarray) -> np.ndarray:
    """Angles between the facets (m, pairs) of simplices with corners (m, d + 1, d), degrees."""
    slopes = _slopes(corners)
    unit = slopes / np.linalg.norm(slopes, axis=2, keepdims=True)
    pairs = itertools.combinations(range(corners.shape[1]), 2)
    cosines = np.stack([-(unit[:, a] * unit[:, b]).sum(1) for a, b in pairs], 1)
    return np.degrees(np.arccos(np.clip(cosines, -1, 1)))


def measure(mesh: Mesh, *, outside: float, moved: float, holes: int, mask_holes: int) -> MeshQuality:
    """Measure a mesh; see `MeshQuality` for what is handed on."""
    corners = mesh.points[mesh.cells]
    lengths = np.linalg.norm(mesh.points[mesh.edges[:, 1]] - mesh.points[mesh.edges[:, 0]], axis=1)
    ratios, angles = radius_ratios(corners), cell_angles(corners)
    voxel = math.prod(mesh.domain.spacing[2 - a] for a in mesh.axes)
    return MeshQuality(
        vertices=len(mesh.points),
        cells=len(mesh.cells),
        edges=(float(lengths.min()), float(np.median(lengths)), float(lengths.max())),
        radius_ratio=(float(ratios.min()), float(ratios.mean())),
        angle=(float(angles.min()), float(angles.max())),
        volume=float(mesh.volumes.sum()),
        mask_volume=float(mesh.domain.mask.sum() * voxel),
        outside=outside,
        moved=moved,
        holes=holes,
        mask_holes=mask_holes,
    )
