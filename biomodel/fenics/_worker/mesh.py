"""A mesh and its function space, with the numbering of whoever sent it.

dolfinx numbers vertices, cells and degrees of freedom anew. Nodes are called here by the sender's numbers: vertices
first, in the order of `points`, then, for degree 2, the midpoints of edges in the order of `edges`.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import ufl
from dolfinx import fem
from petsc4py import PETSc

from . import shim

#: Edges of the reference simplex as pairs of vertices, in the order of basix's degrees of freedom.
EDGES = {1: [(0, 1)], 2: [(1, 2), (0, 2), (0, 1)], 3: [(2, 3), (1, 3), (1, 2), (0, 3), (0, 2), (0, 1)]}


@contextmanager
def compiling(comm) -> Iterator[None]:
    """Hold the cache of compiled forms while something may be compiled.

    FFCx takes a source file without its mark of completion for a compilation in progress and waits for it in vain
    when that compiler was killed. The kernel drops this lock with the process that held it, so whoever has it may
    remove such files.
    """
    if comm.rank:
        yield
        return
    folder = os.path.join(os.environ["XDG_CACHE_HOME"], "fenics")
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(os.environ["XDG_CACHE_HOME"], "in-use"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        names = set(os.listdir(folder))
        for name in names:
            if name.endswith(".c") and f"{name}.cached" not in names:
                os.remove(os.path.join(folder, name))
        yield


def numbering(mesh, dofmap, edges: np.ndarray, degree: int, vertices: int) -> np.ndarray:
    """The sender's numbers of the nodes behind this rank's degrees of freedom, and behind those it sees of others.

    Parameters
    ----------
    mesh, dofmap : dolfinx mesh and dofmap
        Of continuous functions; the latter's blocks are counted.
    edges : ndarray of int64, shape (k, 2)
        All edges, for degree 2.
    degree : int
        1 or 2.
    vertices : int
        Number of vertices of the whole mesh.
    """
    dim = mesh.topology.dim
    corner = shim.table(mesh.geometry.dofmap, dim + 1)
    corner = np.asarray(mesh.geometry.input_global_indices)[corner]
    pairs = EDGES[dim] if degree == 2 else []
    dofs = shim.table(dofmap.list, dim + 1 + len(pairs))
    nodes = np.full(dofmap.index_map.size_local + dofmap.index_map.num_ghosts, -1, np.int64)
    nodes[dofs[:, : dim + 1]] = corner
    if degree == 2:
        keys = edges[:, 0] * vertices + edges[:, 1]
        for k, (a, b) in enumerate(pairs):
            low, high = np.minimum(corner[:, a], corner[:, b]), np.maximum(corner[:, a], corner[:, b])
            nodes[dofs[:, dim + 1 + k]] = vertices + np.searchsorted(keys, low * vertices + high)
    return nodes


class Space:
    """Continuous piecewise polynomials on a mesh, and piecewise constants.

    Parameters
    ----------
    comm : MPI communicator
    points : ndarray, shape (n, d)
    cells : ndarray of int64, shape (m, d + 1)
    edges : ndarray of int64, shape (k, 2)
        All edges, smaller vertex first, in lexicographic order; used for functions of degree 2.
    degree : int
        1 or 2.
    """

    def __init__(self, comm, points: np.ndarray, cells: np.ndarray, edges: np.ndarray, degree: int):
        self.comm, self.degree, self.dim, self.edges = comm, degree, points.shape[1], edges
        root = comm.rank == 0
        with compiling(comm):
            self.mesh = shim.create_mesh(comm, cells[: None if root else 0], points[: None if root else 0])
            self.space = shim.function_space(self.mesh, ("Lagrange", degree))
            self.constants = shim.function_space(self.mesh, ("DG", 0))
        self.vertices = len(points)
        self.count = self.vertices + (len(edges) if degree == 2 else 0)
        self.size = self.space.dofmap.index_map.size_local
        #: Numbers of the nodes that this rank owns, in the order of its degrees of freedom.
        self.nodes = numbering(self.mesh, self.space.dofmap, edges, degree, self.vertices)[: self.size]
        self.dofs = shim.table(self.space.dofmap.list, self.dim + 1 + (len(EDGES[self.dim]) if degree == 2 else 0))
        self.cell_dofs = shim.table(self.constants.dofmap.list, 1)[:, 0]
        original = np.asarray(self.mesh.topology.original_cell_index)
        self.cell_of = np.zeros(len(self.cell_dofs), np.int64)
        self.cell_of[self.cell_dofs] = original[: len(self.cell_dofs)]
        self.cell_count = len(cells)
        self.owned_cells = self.constants.dofmap.index_map.size_local

    def take(self, values: np.ndarray) -> np.ndarray:
        """This rank's part of nodal values (..., nodes), in the order of its degrees of freedom."""
        return np.ascontiguousarray(values[..., self.nodes])

    @cached_property
    def _mass(self):
        trial, test = ufl.TrialFunction(self.space), ufl.TestFunction(self.space)
        with compiling(self.comm):
            found = shim.assemble_matrix(fem.form(trial * test * ufl.dx))
        found.assemble()
        into, out = found.createVecRight(), found.createVecLeft()
        into.set(1.0)
        found.mult(into, out)
        return found, out.array.copy(), into, out

    def _sharpened(self, local: np.ndarray) -> np.ndarray:
        """Coefficients whose linear function has the state's averages, from nodal values that are those at points.

        Halfway back from what mass over lumped mass smooths, as the sender does where it averages over voxels.
        """
        mass, lumped, into, out = self._mass
        into.array[:] = local
        mass.mult(into, out)
        return 1.5 * local - 0.5 * out.array / lumped

    @cached_property
    def cell_volumes(self) -> np.ndarray:
        """Volumes of the cells that this rank owns, as `constants` numbers them."""
        with compiling(self.comm):
            form = fem.form(ufl.TestFunction(self.constants) * ufl.dx)
        return shim.assemble_vector(form).array.copy()

    @cached_property
    def _centres(self):
        weight = fem.Function(self.constants)
        with compiling(self.comm):
            # One point, the centre, whose weight is the cell's volume.
            form = fem.form(weight * ufl.TestFunction(self.space) * ufl.dx(metadata={"quadrature_degree": 1}))
        return form, weight

    def at_centres_transposed(self, values: np.ndarray) -> np.ndarray:
        """Transpose of `at_centres`: from numbers of the cells that this rank owns to its degrees of freedom."""
        form, weight = self._centres
        weight.x.array[: self.owned_cells] = values / self.cell_volumes
        vector = shim.assemble_vector(form)
        vector.ghostUpdate(PETSc.InsertMode.ADD, PETSc.ScatterMode.REVERSE)
        found = vector.array.copy()
        vector.destroy()
        if self.degree > 1:
            return found
        mass, lumped, into, out = self._mass
        into.array[:] = found / lumped
        mass.mult(into, out)
        return 1.5 * found - 0.5 * out.array

    def at_centres(self, local: np.ndarray) -> np.ndarray:
        """Values (cells,) at the cells' centres of a state with the given degrees of freedom.

        Piecewise constants that this rank owns or sees, as `constants` numbers them.
        """
        values = self.function(self._sharpened(local) if self.degree == 1 else local).x.array[self.dofs]
        corner = 1 / (self.dim + 1)
        found = np.empty(len(self.cell_of))
        if self.degree == 1:
            found[self.cell_dofs] = values.mean(1)
        else:
            vertices, edges = np.split(values, [self.dim + 1], 1)
            found[self.cell_dofs] = corner * (2 * corner - 1) * vertices.sum(1) + 4 * corner**2 * edges.sum(1)
        return found

    def collect(self, local: np.ndarray) -> np.ndarray | None:
        """Nodal values (..., nodes) on rank 0 from every rank's part."""
        return self.join(local, self.nodes, self.count)

    def collect_cells(self, local: np.ndarray) -> np.ndarray | None:
        """Cell values (cells,) on rank 0 from every rank's part."""
        return self.join(local[: self.owned_cells], self.cell_of[: self.owned_cells], self.cell_count)

    def join(self, local: np.ndarray, numbers: np.ndarray, count: int) -> np.ndarray | None:
        """Values (..., count) on rank 0 from every rank's part, whose places in the whole are `numbers`."""
        if self.comm.size == 1:
            found = np.empty((*local.shape[:-1], count))
            found[..., numbers] = local
            return found
        parts = self.comm.gather((numbers, local))
        if self.comm.rank:
            return None
        found = np.empty((*local.shape[:-1], count))
        for where, values in parts:
            found[..., where] = values
        return found

    def function(self, local: np.ndarray | None = None):
        """A function of the space with the given degrees of freedom."""
        f = fem.Function(self.space)
        if local is not None:
            self.assign(f, local)
        return f

    def assign(self, function, local: np.ndarray) -> None:
        """Set a function's degrees of freedom on this rank, and those that other ranks see of them."""
        function.x.array[: self.size] = local
        function.x.scatter_forward()

    def constant_function(self, values: np.ndarray):
        """A piecewise constant function from cell values (cells,) in the sender's order."""
        f = fem.Function(self.constants)
        f.x.array[:] = values[self.cell_of]
        return f
