"""Stiffness matrices of displacements of degree 2 and 1 on one mesh, and conjugate gradients preconditioned by both.

Displacements of degree 1 are among those of degree 2, and algebraic multigrid, slow on the latter, does well on the
former. So degree 2 is smoothed by Chebyshev polynomials and corrected by degree 1 (p-multigrid): iterations depend on
neither the mesh nor, with Poisson ratios up to 0.45, much on the body.
"""

from __future__ import annotations

import numpy as np
import ufl
from dolfinx import fem
from petsc4py import PETSc

from . import shim
from .mesh import EDGES, Space, compiling, numbering

#: Most iterations of conjugate gradients.
ITERATIONS = 400


def strain_of(w):
    """Symmetric gradient, a matrix in one dimension too."""
    return ufl.sym(ufl.grad(w)) if w.ufl_shape else ufl.as_matrix([[ufl.grad(w)[0]]])


def measure(degree: int):
    """Integration over cells, exact for polynomials of a degree."""
    return ufl.dx(metadata={"quadrature_degree": degree})


class Level:
    """Displacements of one degree: their space, what holds them, and their stiffness.

    Parameters
    ----------
    space : Space
        Its mesh is used.
    degree : int
        1 or 2.
    young : Function
        Young's modulus by cells.
    shear, lame : float
        Shear modulus and Lamé's first parameter for a Young's modulus of 1.
    clamped : bool
        Whether displacements are zero at the mesh's boundary.
    """

    def __init__(self, space: Space, degree: int, young, shear: float, lame: float, clamped: bool):
        self.space, self.degree, self.clamped, self.dim = space, degree, clamped, space.dim
        with compiling(space.comm):
            self.vectors = shim.vector_space(space.mesh, "Lagrange", degree, space.dim)
            trial, test = ufl.TrialFunction(self.vectors), ufl.TestFunction(self.vectors)
            mu, lam = (fem.Constant(space.mesh, PETSc.ScalarType(x)) for x in (shear, lame))
            made, tested = strain_of(trial), strain_of(test)
            hooke = 2 * mu * ufl.inner(made, tested) + lam * ufl.tr(made) * ufl.tr(tested)
            self.form = fem.form(young * hooke * measure(2 * (degree - 1)))
        #: Nodes (blocks of components) that this rank owns.
        self.size = self.vectors.dofmap.index_map.size_local
        self.held, self.conditions = np.zeros(0, np.int32), []
        if clamped:
            blocks = fem.locate_dofs_topological(self.vectors, space.dim - 1, shim.boundary_facets(space.mesh))
            zero = np.zeros(space.dim) if space.dim > 1 else PETSc.ScalarType(0.0)
            self.conditions = [fem.dirichletbc(zero, blocks, self.vectors)]
            self.held = blocks[blocks < self.size]
        self._matrix: PETSc.Mat | None = None

    @property
    def matrix(self) -> PETSc.Mat:
        """The stiffness, as last assembled."""
        return self._matrix if self._matrix is not None else self.assemble()

    def assemble(self) -> PETSc.Mat:
        """Stiffness at the present moduli."""
        if self._matrix is None:
            # By blocks of components: less to read in every product. Algebraic multigrid wants it entry by entry.
            made = shim.create_matrix(self.form, "baij" if self.degree == 2 and self.dim > 1 else "aij")
            shim.assemble_matrix(made, self.form, bcs=self.conditions)
            made.assemble()
            motions = self._motions(made.createVecRight())
            made.setNearNullSpace(motions)
            if not self.clamped:
                made.setNullSpace(motions)
            self._matrix, self.motions = made, motions
        else:
            self._matrix.zeroEntries()
            shim.assemble_matrix(self._matrix, self.form, bcs=self.conditions)
            self._matrix.assemble()
        return self._matrix

    def numbers(self) -> np.ndarray:
        """The sender's numbers of this rank's nodes."""
        found = numbering(self.space.mesh, self.vectors.dofmap, self.space.edges, self.degree, self.space.vertices)
        return found[: self.size]

    def _motions(self, like: PETSc.Vec) -> PETSc.NullSpace:
        """Rigid motions, orthonormal."""
        comm, d = self.space.comm, self.dim
        place = self.vectors.tabulate_dof_coordinates()[: self.size, :d]
        place = place - comm.allreduce(place.sum(0)) / comm.allreduce(len(place))
        found: list[PETSc.Vec] = []
        for a in range(d):
            for b in range(a, d):
                motion = np.zeros((self.size, d))
                if a == b:
                    motion[:, a] = 1.0
                else:
                    motion[:, a], motion[:, b] = -place[:, b], place[:, a]
                vector = like.duplicate()
                vector.array[:] = motion.ravel()
                for _ in range(2):  # again, for what roundoff leaves
                    for other in found:
                        vector.axpy(-vector.dot(other), other)
                vector.normalize()
                found.append(vector)
        return PETSc.NullSpace().create(vectors=found, comm=comm)


def prolongation(coarse: Level, fine: Level) -> PETSc.Mat:
    """Displacements of degree 1 as such of degree 2; what is held stays so."""
    d, edges = fine.dim, EDGES[fine.dim]
    low = shim.table(coarse.vectors.dofmap.list, d + 1)
    high = shim.table(fine.vectors.dofmap.list, d + 1 + len(edges))
    rows, columns = [high[:, : d + 1].ravel()], [low.ravel()]
    for k, edge in enumerate(edges):
        for end in edge:
            rows.append(high[:, d + 1 + k])
            columns.append(low[:, end])
    weights = np.concatenate((np.ones(low.size), np.full(2 * len(edges) * len(low), 0.5)))
    row, column = np.concatenate(rows), np.concatenate(columns)
    seen = coarse.vectors.dofmap.index_map.size_local + coarse.vectors.dofmap.index_map.num_ghosts
    first = np.unique(row.astype(np.int64) * seen + column, return_index=True)[1]
    first = first[row[first] < fine.size]
    moves = np.ones(seen)
    if coarse.clamped:
        moves[coarse.conditions[0].dof_indices()[0][::d] // d] = 0.0
    free = np.ones(fine.size)
    free[fine.held] = 0.0
    row, column = row[first], column[first]
    values = weights[first] * moves[column] * free[row]
    # Ghosts are columns of other ranks: their global numbers.
    everywhere = np.asarray(coarse.vectors.dofmap.index_map.local_to_global(np.arange(seen, dtype=np.int32)))
    component = np.arange(d)
    rows_of_all = (row[:, None] * d + component).ravel()
    order = np.argsort(rows_of_all, kind="stable")
    pointers = np.concatenate(([0], np.cumsum(np.bincount(rows_of_all, minlength=fine.size * d))))
    indices = (everywhere[column][:, None] * d + component).ravel()[order]
    made = PETSc.Mat().createAIJ(
        ((fine.size * d, None), (coarse.size * d, None)), comm=fine.space.comm,
        csr=(pointers.astype(PETSc.IntType), indices.astype(PETSc.IntType), np.repeat(values, d)[order]),
    )  # fmt: skip
    made.assemble()
    return made


def conjugate_gradients(fine: Level, coarse: Level | None, transfer: PETSc.Mat | None, tolerance: float) -> PETSc.KSP:
    """A solver for the fine level, corrected by the coarse one where there is one."""
    solver = PETSc.KSP().create(fine.matrix.comm)
    solver.setOperators(fine.matrix)
    solver.setType("cg")
    solver.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
    solver.setTolerances(rtol=tolerance, atol=0.0, max_it=ITERATIONS)
    solver.setInitialGuessNonzero(True)
    prefix = f"elasticity{id(fine)}_"
    solver.setOptionsPrefix(prefix)
    pc, wanted, inner = solver.getPC(), {}, ""
    if coarse is not None:
        pc.setType("mg")
        pc.setMGLevels(2)
        pc.setMGInterpolation(1, transfer)
        inner = "mg_coarse_"
        wanted = {"mg_levels_ksp_type": "chebyshev", "mg_levels_pc_type": "jacobi", "mg_coarse_ksp_type": "preonly"}
    if PETSc.Sys.hasExternalPackage("hypre"):
        wanted |= {inner + "pc_type": "hypre", inner + "pc_hypre_type": "boomeramg"}
        # With hypre's own threshold, meant for two dimensions, coarse levels fill up in three.
        wanted[inner + "pc_hypre_boomeramg_strong_threshold"] = "0.5"
    else:
        wanted[inner + "pc_type"] = "gamg"
        if not fine.clamped:
            wanted[inner + "mg_coarse_pc_type"] = "svd"
    options = PETSc.Options()
    for name, value in wanted.items():
        options[prefix + name] = value
    solver.setFromOptions()
    if coarse is not None:
        pc.getMGCoarseSolve().setOperators(coarse.matrix)
    solver.setUp()
    for name in wanted:
        options.delValue(prefix + name)
    return solver
