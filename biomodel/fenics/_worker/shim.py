"""What differs between dolfinx 0.5 and later releases, in one place."""

from __future__ import annotations

import inspect

import dolfinx.fem.petsc
import numpy as np
import ufl
from dolfinx import fem, mesh

#: Oldest release for which this is written.
OLDEST = (0, 5)

function_space = getattr(fem, "functionspace", None) or fem.FunctionSpace


def vector_space(domain, family: str, degree: int, size: int):
    """Vectors of that size whose components lie in a scalar space, which is itself given for size 1."""
    if size == 1:
        return function_space(domain, (family, degree))
    # The value's shape was once a class of its own.
    if hasattr(fem, "functionspace"):
        return fem.functionspace(domain, (family, degree, (size,)))
    return fem.VectorFunctionSpace(domain, (family, degree), dim=size)


def boundary_facets(domain) -> np.ndarray:
    """This rank's facets on the mesh's boundary."""
    dim = domain.topology.dim
    domain.topology.create_connectivity(dim - 1, dim)
    return mesh.exterior_facet_indices(domain.topology)


def version(text: str) -> tuple[int, int]:
    """Major and minor number of a version such as "0.9.0.post1"."""
    major, minor = text.split(".")[:2]
    return int(major), int("".join(c for c in minor if c.isdigit()) or 0)


def create_mesh(comm, cells: np.ndarray, points: np.ndarray):
    """A simplicial mesh; cells (m, d + 1) and points (n, d) are given on rank 0, empty elsewhere."""
    dim = points.shape[1]
    cell = {1: "interval", 2: "triangle", 3: "tetrahedron"}[dim]
    try:
        import basix.ufl

        element = ufl.Mesh(basix.ufl.element("Lagrange", cell, 1, shape=(dim,)))
    except ImportError:
        element = ufl.Mesh(ufl.VectorElement("Lagrange", cell, 1))
    # The coordinate element is called `domain` up to 0.9 and `e` later, and has moved to another place.
    names = inspect.signature(mesh.create_mesh).parameters
    key = "domain" if "domain" in names else "e"
    return mesh.create_mesh(comm, cells=cells, x=points, **{key: element})


def table(adjacency, columns: int) -> np.ndarray:
    """A table of cells as an array (cells, columns); early releases give a list of neighbours."""
    array = adjacency if isinstance(adjacency, np.ndarray) else adjacency.array
    return array.reshape(-1, columns)


def interpolation_points(space) -> np.ndarray:
    """Points on the reference cell at which a function is evaluated for interpolation; once a method."""
    points = space.element.interpolation_points
    return points() if callable(points) else points


create_matrix = dolfinx.fem.petsc.create_matrix
assemble_matrix = dolfinx.fem.petsc.assemble_matrix
assemble_vector = dolfinx.fem.petsc.assemble_vector
