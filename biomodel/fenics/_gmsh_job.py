"""Meshes one boundary with gmsh; run as a program of its own: ``python _gmsh_job.py FOLDER``.

Reads ``boundary.npz`` and ``size.dat`` from the folder and writes ``mesh.npz``. A program of its own because gmsh is
under the GPL, keeps global state, and may end its process on a boundary that it cannot mesh. It ends with status 3
where gmsh does not load, and 4 where it reports a failure, with the reason on standard error.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np


def surfaces(gmsh, points: np.ndarray, triangles: np.ndarray) -> None:
    """The volume inside triangles, as gmsh's geometry: parametrised patches, which it can mesh anew."""
    tag = gmsh.model.addDiscreteEntity(2)
    gmsh.model.mesh.addNodes(2, tag, np.arange(1, len(points) + 1), points.ravel())
    gmsh.model.mesh.addElementsByType(tag, 2, np.arange(1, len(triangles) + 1), (triangles + 1).ravel())
    gmsh.model.mesh.classifySurfaces(np.pi, True, True, np.pi)
    gmsh.model.mesh.createGeometry()
    loop = gmsh.model.geo.addSurfaceLoop([entity[1] for entity in gmsh.model.getEntities(2)])
    gmsh.model.geo.addVolume([loop])
    gmsh.model.geo.synchronize()


def curves(gmsh, points: np.ndarray, segments: np.ndarray, part: np.ndarray) -> None:
    """The area inside polygons, as gmsh's geometry: a closed spline through the points of each."""
    loops = []
    for number in range(part.max() + 1):
        after = dict(segments[part == number])
        first = here = next(iter(after))
        tags: list[int] = []
        while not tags or here != first:
            tags.append(gmsh.model.geo.addPoint(*points[here], 0.0))
            here = after[here]
        # Several splines, as gmsh wants at least two curves in a loop to place its points freely.
        cuts = np.linspace(0, len(tags), 4).astype(int)
        closed = [*tags, tags[0]]
        lines = [gmsh.model.geo.addSpline(closed[a : b + 1]) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        loops.append(gmsh.model.geo.addCurveLoop(lines))
    gmsh.model.geo.addPlaneSurface(loops)
    gmsh.model.geo.synchronize()


def size_field(gmsh, path: Path) -> None:
    """Sizes of cells from a file, and from nothing else."""
    field = gmsh.model.mesh.field.add("Structured")
    gmsh.model.mesh.field.setString(field, "FileName", str(path))
    gmsh.model.mesh.field.setNumber(field, "TextFormat", 0)
    gmsh.model.mesh.field.setAsBackgroundMesh(field)
    for option in ("MeshSizeExtendFromBoundary", "MeshSizeFromPoints", "MeshSizeFromCurvature"):
        gmsh.option.setNumber(f"Mesh.{option}", 0)


def where(gmsh, log: list[str]) -> str:
    """The middle of what gmsh's complaints name, as ``at: x y z``, or nothing."""
    boxes = []
    for dim, word in ((2, "surface"), (1, "curve")):
        for tag in {int(n) for line in log for n in re.findall(rf"{word}s? (\d+)", line, flags=re.IGNORECASE)}:
            if (dim, tag) in gmsh.model.getEntities(dim):
                boxes.append(gmsh.model.getBoundingBox(dim, tag))
    for numbers in (re.findall(r"\(([-+.\de]+),\s*([-+.\de]+),\s*([-+.\de]+)\)", line) for line in log):
        boxes += [[float(v) for v in point] * 2 for point in numbers]
    if not boxes:
        return ""
    low, high = np.min([b[:3] for b in boxes], 0), np.max([b[3:] for b in boxes], 0)
    return "at: " + " ".join(f"{v:.3f}" for v in (low + high) / 2)


def complaints(gmsh) -> list[str]:
    """Errors and warnings that gmsh logged."""
    return [line.split(":", 1)[1].strip() for line in gmsh.logger.get() if line.startswith(("Error", "Warning"))]


def main(folder: Path) -> int:
    """Mesh, and say how it ended."""
    try:
        import gmsh
    except (ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 3
    given = np.load(folder / "boundary.npz", allow_pickle=False)
    points, facets = given["points"], given["facets"]
    dim = points.shape[1]
    gmsh.initialize(["-nopopup"], readConfigFiles=False, interruptible=False)
    try:
        gmsh.option.setNumber("General.Terminal", 0)
        gmsh.option.setNumber("General.NumThreads", 1)  # the same mesh every time
        gmsh.logger.start()
        try:
            if dim == 3:
                surfaces(gmsh, points, facets)
            else:
                curves(gmsh, points, facets, given["part"])
            size_field(gmsh, folder / "size.dat")
            gmsh.option.setNumber("Mesh.Algorithm", 6)  # frontal-Delaunay: the best triangles
            gmsh.model.mesh.generate(dim)
            if dim == 3:
                gmsh.model.mesh.optimize("Netgen")
        except Exception as error:  # gmsh raises its own words as plain Exception
            log = complaints(gmsh)
            print(error, *log[-6:], where(gmsh, log + [str(error)]), sep="\n", file=sys.stderr)
            return 4
        tags, coordinates, _ = gmsh.model.mesh.getNodes()
        _, corners = gmsh.model.mesh.getElementsByType(4 if dim == 3 else 2)
        if len(corners) == 0:
            log = complaints(gmsh)
            print("it made no cells", *log[-6:], where(gmsh, log), sep="\n", file=sys.stderr)
            return 4
    finally:
        gmsh.finalize()
    number = np.zeros(int(tags.max()) + 1, np.int64)
    number[tags] = np.arange(len(tags))
    cells = number[corners].reshape(-1, dim + 1)
    np.savez(folder / "mesh.npz", points=coordinates.reshape(-1, 3)[:, :dim], cells=cells)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
