"""`OrganMesh`: meshes with a smooth boundary, fine at the tumour and coarse away from it."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy.spatial import cKDTree

from biomodel.domain import Domain
from biomodel.errors import GeometryError, SolverError
from biomodel.fenics import _gmsh_job
from biomodel.fenics.mesh import Mesh, Transfer, mask_centres
from biomodel.fenics.mesh_quality import MeshQuality, measure
from biomodel.fenics.surface import Boundary, closed_parts, enclosed, mask_boundary, mask_holes, place
from biomodel.fenics.transfer import cut_transfer, outside_volume

__all__ = ["OrganGeometry", "OrganMesh"]

#: Seconds after which gmsh is taken to be stuck.
PATIENCE = 900.0
#: Largest share of the organ's volume by which a mesh may differ before its boundary is fitted to the volume.
MISSED = 0.15
#: Size to ask of gmsh for edges of median length 1: its tetrahedra come out longer.
ASKED = {2: 1.0, 3: 0.8}
#: Debian's packages of the libraries that gmsh's wheel expects on the system.
PACKAGES = {
    "libGLU": "libglu1-mesa", "libGL": "libgl1", "libXrender": "libxrender1", "libXcursor": "libxcursor1",
    "libXft": "libxft2", "libXinerama": "libxinerama1", "libXfixes": "libxfixes3", "libXext": "libxext6",
    "libX11": "libx11-6", "libfontconfig": "libfontconfig1", "libgomp": "libgomp1", "libOpenGL": "libopengl0",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class OrganGeometry(Mesh):
    """A mesh whose cells lie across voxels.

    Attributes
    ----------
    cell_voxel : ndarray of int, shape (m,)
        The voxel of the mask nearest to the middle of each cell.
    moved : float
        How far the boundary's vertices were moved at most, mm; see `MeshQuality`.
    holes : int
        Number of holes.
    """

    moved: float
    holes: int

    def transfer(self, degree: int) -> Transfer:
        """The maps between the mask's voxels and the nodes of a degree."""
        return cut_transfer(self, degree)

    @cached_property
    def quality(self) -> MeshQuality:
        """Shapes and sizes of the cells, and how the mesh fits its mask."""
        inside = self.domain.mask.reshape([n for n in self.domain.shape if n > 1])
        outside = outside_volume(self) / float(self.volumes.sum())
        return measure(self, outside=outside, moved=self.moved, holes=self.holes, mask_holes=len(mask_holes(inside)))


@dataclass(frozen=True)
class OrganMesh:
    """A mesh that follows the organ instead of its voxels, graded by the distance to the tumour.

    The mask is smoothed a little, its isosurface chosen so that it encloses the mask's volume, and the inside filled
    with triangles (2D) or tetrahedra (3D) by gmsh (Geuzaine and Remacle 2009, Int J Numer Meth Eng 79:1309,
    doi:10.1002/nme.2579), which runs in a process of its own. At the end the boundary's vertices are moved along their
    normals, where cells are coarse and the boundary is curved, until the mesh has exactly the mask's volume. Needs the
    extra ``mesh``.

    Parameters
    ----------
    focus : Domain, optional
        A domain whose mask is the region that needs small cells, usually the tumour's, on any grid with the same axes
        (`OrganMesh.around` makes it). Without it all cells have the size `fine`.
    fine : float, optional
        Median length of edges in the region and up to `margin` around it, mm; by default the geometric mean of the
        voxel's edges.
    coarse : float, optional
        Longest edges, mm; by default four times `fine`.
    margin : float
        mm around the region that are meshed as finely as the region itself: where the tumour may spread.
    grading : float
        How much longer edges become per mm of distance.
    smooth : float
        Standard deviation of the Gaussians that smooth the mask, in voxels. The default removes the voxels' steps;
        details of a voxel or two go with them.

    Examples
    --------
    >>> import numpy as np
    >>> import biomodel as bm
    >>> OrganMesh(fine=2.0).finer()
    OrganMesh(focus=None, fine=1.0, coarse=None, margin=5.0, grading=0.3, smooth=1.0)
    """

    focus: Domain | None = None
    fine: float | None = None
    coarse: float | None = None
    margin: float = 5.0
    grading: float = 0.3
    smooth: float = 1.0

    def __post_init__(self):
        for name, low, high in (("fine", 0, 1e3), ("coarse", 0, 1e3), ("grading", 0, 1), ("smooth", 0, 5)):
            value = getattr(self, name)
            if value is not None and not low < value <= high:
                raise SolverError(f"OrganMesh: {name} is {value}; expected a number above {low} and up to {high:g}.")
        if not 0 <= self.margin < 1e4:
            raise SolverError(f"OrganMesh: margin is {self.margin}; expected mm from 0.")
        if self.fine is not None and self.coarse is not None and self.coarse < self.fine:
            raise SolverError(f"OrganMesh: coarse is {self.coarse:g} mm, below fine, {self.fine:g} mm; exchange them.")

    @classmethod
    def around(cls, domain: Domain, region: np.ndarray, fine: float | None = None, coarse: float | None = None,
               margin: float = 5.0) -> OrganMesh:  # fmt: skip
        """A mesh that is fine around a region given on the domain's grid, bool (z, y, x).

        Raises
        ------
        GeometryError
            If the region is empty or has another shape than the domain.
        """
        region = np.asarray(region)
        if region.shape != domain.shape:
            raise GeometryError(f"OrganMesh.around: region of shape {region.shape}; the domain's is {domain.shape}.")
        return cls(Domain(region, domain.spacing, domain.affine), fine, coarse, margin)

    def finer(self) -> OrganMesh:
        """The same with cells half as large."""
        if self.fine is None:
            raise SolverError("OrganMesh: name the size of cells to refine it, as in OrganMesh(fine=2.0).")
        return replace(self, fine=self.fine / 2, coarse=None if self.coarse is None else self.coarse / 2)

    def sizes(self, domain: Domain) -> tuple[float, float]:
        """Shortest and longest edges on a domain, mm."""
        used = [s for s, n in zip(domain.spacing, domain.shape, strict=True) if n > 1]
        fine = math.prod(used) ** (1 / len(used)) if self.fine is None else self.fine
        return fine, max(4 * fine if self.coarse is None else self.coarse, fine)

    def make(self, domain: Domain) -> OrganGeometry:
        """The mesh of a domain.

        Raises
        ------
        GeometryError
            If the mask has several components, a hole that touches the border, too few voxels or too thin parts.
        SolverError
            If gmsh or scikit-image is missing, or gmsh fails.
        """
        axes = tuple(a for a in range(3) if domain.shape[2 - a] > 1)
        if len(axes) < 2:
            raise GeometryError(f"OrganMesh: the domain has {len(axes)} axes with more than one voxel; expected two or "
                                "three. Use BoxMesh.")  # fmt: skip
        boundary = mask_boundary(domain, axes, self.smooth)
        sizes, first, step = self._size_field(domain, axes)
        points, cells = run_gmsh(boundary, axes, ASKED[len(axes)] * sizes, first, step)
        volume = float(domain.mask.sum()) * math.prod(domain.spacing[2 - a] for a in axes)
        _require_shape(points, cells, boundary, volume, axes)
        fitted = fit_volume(points, cells, boundary, volume, axes)
        moved = float(np.linalg.norm(fitted - points, axis=1).max())
        centre = [float(domain.coords[n][0]) for n in "xyz"]
        nearest = cKDTree(mask_centres(domain, axes)).query(fitted[cells].mean(1))[1]
        return OrganGeometry(fitted, cells, axes, (centre[0], centre[1], centre[2]), nearest.astype(np.int64), domain,
                             moved, boundary.holes)  # fmt: skip

    def _size_field(self, domain: Domain, axes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Wanted length of edges on a grid: values over the mesh's axes, first place and steps, mm."""
        fine, coarse = self.sizes(domain)
        step = np.array([domain.spacing[2 - a] for a in axes])
        first = np.array([domain.coords["xyz"[a]][0] for a in axes]) - 3 * step
        shape = [domain.shape[2 - a] + 6 for a in axes]
        if self.focus is None:
            return np.full(shape, fine), first, step
        here = mask_centres(self.focus, tuple(range(3)))
        low, high = (np.array([domain.coords[n][k] for n in "xyz"]) for k in (0, -1))
        half = np.array(domain.spacing[::-1])
        idle = [a for a in range(3) if a not in axes]
        near = ((here >= low - half) & (here <= high + half))[:, idle].all(1)
        if not near.any():
            raise GeometryError("OrganMesh: the region of small cells does not meet the domain's slice; expected it on "
                                "the same grid. Make it by OrganMesh.around.")  # fmt: skip
        lines = [f + s * np.arange(n) for f, s, n in zip(first, step, shape, strict=True)]
        grid = np.stack(np.meshgrid(*lines, indexing="ij"), -1)
        distance = cKDTree(here[near][:, list(axes)]).query(grid)[0]
        return np.clip(fine + self.grading * (distance - self.margin), fine, coarse), first, step


def run_gmsh(boundary: Boundary, axes: tuple[int, ...], sizes: np.ndarray, first: np.ndarray,
             step: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Points (n, d) and cells (m, d + 1) of the inside of a boundary, by gmsh in a process of its own.

    Raises
    ------
    SolverError
        If gmsh does not load, fails, or does not end.
    """
    dim = len(axes)
    with tempfile.TemporaryDirectory(prefix="tumorcast-mesh-") as name:
        folder = Path(name)
        np.savez(folder / "boundary.npz", points=boundary.points, facets=boundary.facets, part=boundary.part)
        # gmsh's binary format: origin, steps, counts, then values with z fastest; in the plane one layer on each side.
        if dim == 2:
            sizes, first, step = np.repeat(sizes[:, :, None], 2, 2), np.append(first, -1.0), np.append(step, 2.0)
        with open(folder / "size.dat", "wb") as file:
            for array, kind in ((first, "<f8"), (step, "<f8"), (sizes.shape, "<i4"), (sizes, "<f8")):
                file.write(np.ascontiguousarray(array, kind).tobytes())
        # -P: or the folder of the program would hide modules of the same names.
        command = [sys.executable, "-P", _gmsh_job.__file__, str(folder)]
        try:
            ended = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired as error:
            raise SolverError(f"OrganMesh: gmsh did not end within {PATIENCE:g} s; use larger cells (fine, coarse), or "
                              "BoxMesh.") from error  # fmt: skip
        if ended.returncode == 3:
            raise SolverError(_missing(ended.stderr.strip()))
        if ended.returncode or not (folder / "mesh.npz").exists():
            raise SolverError(_failed(ended, axes))
        with np.load(folder / "mesh.npz", allow_pickle=False) as found:
            points, cells = found["points"], found["cells"]
    used, cells = np.unique(cells, return_inverse=True)
    return points[used], cells.reshape(-1, dim + 1).astype(np.int64)


def _missing(said: str) -> str:
    library = said.split(".so")[0].split("/")[-1].strip() if ".so" in said else ""
    if library in PACKAGES:
        return (
            f"OrganMesh: gmsh does not load: {said}. Install the system's library: apt-get install {PACKAGES[library]} "
            "(Debian and Ubuntu)."
        )
    if library:
        return (f"OrganMesh: gmsh does not load: {said}. Install the system package that holds {library}, or use "
                "BoxMesh.")  # fmt: skip
    return f"OrganMesh needs gmsh, which does not load here ({said}). Install the extra: pip install 'tumorcast[mesh]'."


def _failed(ended: subprocess.CompletedProcess, axes: tuple[int, ...]) -> str:
    lines = [line.strip() for line in ended.stderr.splitlines() if line.strip()]
    region = ""
    for line in [one for one in lines if one.startswith("at: ")]:
        lines.remove(line)
        region = f" around {place(np.array([float(v) for v in line[4:].split()[: len(axes)]]), axes)}"
    said = "; ".join(dict.fromkeys(lines[-4:])) or f"it ended with status {ended.returncode} and no words"
    return (
        f"OrganMesh: gmsh could not fill the organ{region}: {said}. Thin parts and narrow gaps there need smaller "
        "cells (coarse, fine), or a smoother boundary (smooth=1.5); BoxMesh always works."
    )


def boundary_facets(cells: np.ndarray) -> np.ndarray:
    """Facets (k, d) of cells (m, d + 1) that belong to one cell alone; orientation as in that cell."""
    corners = cells.shape[1]
    all_facets, opposite = [], []
    for k in range(corners):
        all_facets.append(np.delete(cells, k, 1))
        opposite.append(cells[:, k])
    facets = np.concatenate(all_facets)
    _, first, count = np.unique(np.sort(facets, 1), axis=0, return_index=True, return_counts=True)
    return np.concatenate((facets, np.concatenate(opposite)[:, None]), 1)[first[count == 1]]


def _require_shape(points: np.ndarray, cells: np.ndarray, boundary: Boundary, volume: float,
                   axes: tuple[int, ...]) -> None:  # fmt: skip
    """Raise where the mesh has not the shape of the boundary it was made from, as its cells are too large for that."""
    facets = boundary_facets(cells)[:, :-1]
    found = closed_parts(facets).max()
    if found != boundary.holes:
        raise SolverError(
            f"OrganMesh: gmsh returned a mesh with {found} holes for an organ with {boundary.holes}. Use smaller cells "
            "(coarse, fine), or BoxMesh."
        )
    corners = points[cells]
    share = float(np.abs(np.linalg.det(corners[:, 1:] - corners[:, :1])).sum()) / math.factorial(len(axes)) / volume
    if abs(share - 1) > MISSED:
        far = cKDTree(np.concatenate((points, points[facets].mean(1)))).query(boundary.points)[0].argmax()
        raise SolverError(
            f"OrganMesh: the cells are too large for the organ's shape: the mesh holds {100 * share:.0f} % of its "
            f"volume, and misses it most around {place(boundary.points[far], axes)}. Use smaller cells (coarse, fine)."
        )


def fit_volume(points: np.ndarray, cells: np.ndarray, boundary: Boundary, volume: float,
               axes: tuple[int, ...]) -> np.ndarray:  # fmt: skip
    """Move the boundary's vertices along their normals until the mesh has a given volume.

    Each moves in proportion to how far the facets around it cut the boundary short, and a little everywhere, so that
    fine parts stay where they are.

    Raises
    ------
    SolverError
        If that would turn cells inside out.
    """
    dim = points.shape[1]
    found = boundary_facets(cells)
    facets, inner = found[:, :dim], points[found[:, dim]]
    corners = points[facets]
    normal = _normals(corners)
    flip = ((inner - corners[:, 0]) * normal).sum(1) > 0
    facets[flip] = facets[flip][:, [1, 0, *range(2, dim)]]
    normal[flip] *= -1
    middle = corners.mean(1)
    true_normal = _normals(boundary.points[boundary.facets])
    true_middle = boundary.points[boundary.facets].mean(1)
    near = cKDTree(true_middle).query(middle)[1]
    size = np.linalg.norm(normal, axis=1)
    gap = ((true_middle[near] - middle) * true_normal[near]).sum(1) / np.linalg.norm(true_normal[near], axis=1)
    edge = np.linalg.norm(corners[:, 1] - corners[:, 0], axis=1)
    # A floor that falls with the square of the cells, as gaps do, so that there is always something to move.
    gap = np.maximum(gap, 0.0) + 1e-3 * edge**2 / edge.max()
    weight, direction = np.zeros(len(points)), np.zeros_like(points)
    amount = np.zeros(len(points))
    for k in range(dim):
        np.add.at(weight, facets[:, k], size)
        np.add.at(amount, facets[:, k], size * gap)
        np.add.at(direction, facets[:, k], normal)
    on = weight > 0
    length = np.linalg.norm(direction[on], axis=1)
    shift = np.zeros_like(points)
    shift[on] = (amount[on] / weight[on] / np.maximum(length, 1e-300))[:, None] * direction[on]

    def lack(scale: float) -> float:
        return enclosed(points + scale * shift, facets) - volume

    scale = 0.0
    for _ in range(50):  # Newton on a polynomial of degree d
        step = lack(scale) * 1e-4 / ((lack(scale + 1e-4) - lack(scale)) or 1.0)
        scale -= step
        if abs(step) < 1e-14 * max(1.0, abs(scale)):
            break
    moved = points + scale * shift
    signed = np.linalg.det(moved[cells][:, 1:] - moved[cells][:, :1])
    before = np.linalg.det(points[cells][:, 1:] - points[cells][:, :1])
    if (signed * before <= 0).any() or not np.isfinite(moved).all():
        worst = place(points[cells][np.argmin(signed / before)].mean(0), axes)
        raise SolverError(
            f"OrganMesh: the mesh's volume cannot be matched to the mask's: cells around {worst} would turn inside "
            "out. The boundary there is too curved for cells of that size: use smaller ones (coarse, fine)."
        )
    return moved


def _normals(corners: np.ndarray) -> np.ndarray:
    """Normals of facets with corners (k, d, d), as long as twice their area (3D) or their length (2D)."""
    if corners.shape[1] == 2:
        along = corners[:, 1] - corners[:, 0]
        return np.stack((along[:, 1], -along[:, 0]), 1)
    return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
