"""Elastic equilibrium of the body that a mesh fills: continuous displacements, moduli and pressure by cells.

Find w with (2 mu eps(w) + lame div(w) I, eps(v)) = (p, div(v)) for all v: the pressure p of the cells pushes the tissue
apart. Moduli and pressure are constant in each cell, at the values of its centre, and so is the stress that is given
back. Displacement and stress are second order, whatever the degree; degree 2 does not lock near incompressibility.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import ufl
from dolfinx import fem
from petsc4py import PETSc

from . import shim
from .levels import ITERATIONS, Level, conjugate_gradients, measure, prolongation, strain_of
from .mesh import Space, compiling
from .stepping import Failed

#: Relative residual that float64 leaves at best, give or take.
ROUNDING = 1e-12

#: Earlier displacements from which the next is looked for.
RECENT = 3
#: Iterations beyond those right after a preconditioner was made, at which it is made anew.
PATIENCE = 4


#: Place of each pair of axes among the six entries of a symmetric tensor.
PLACE = {(0, 0): 0, (1, 1): 1, (2, 2): 2, (0, 1): 3, (0, 2): 4, (1, 2): 5}


@dataclass(frozen=True, eq=False)
class Stress:
    """Stress of the tissue by this rank's cells, in the moduli's unit.

    Attributes
    ----------
    entries : ndarray, shape (cells, 6)
        xx, yy, zz, xy, xz, yz along the mesh's axes; axes that the mesh does not have are not deformed.
    """

    entries: np.ndarray

    @property
    def von_mises(self) -> np.ndarray:
        """Von Mises stress (cells,)."""
        xx, yy, zz, xy, xz, yz = self.entries.T
        squares = ((xx - yy) ** 2 + (yy - zz) ** 2 + (zz - xx) ** 2) / 2 + 3 * (xy**2 + xz**2 + yz**2)
        return np.sqrt(squares)


class Elasticity:
    """Forms and solver of one body.

    Parameters
    ----------
    space : Space
        Its mesh is used.
    degree : int
        1 or 2, of the displacement.
    poisson : float
        Poisson's ratio.
    clamped : bool
        Whether displacements are zero at the mesh's boundary; else it carries no traction.
    tolerance : float
        Residual, relative to the force, at which conjugate gradients stop.
    """

    def __init__(self, space: Space, degree: int, poisson: float, clamped: bool, tolerance: float):
        self.space, self.degree, self.clamped, self.tolerance = space, degree, clamped, tolerance
        self.shear, self.lame = 1 / (2 * (1 + poisson)), poisson / ((1 + poisson) * (1 - 2 * poisson))
        d = space.dim
        self.pairs = [(i, j) for i in range(d) for j in range(i, d)]
        self.young, self.pressure = fem.Function(space.constants), fem.Function(space.constants)
        self.levels = [Level(space, k, self.young, self.shear, self.lame, clamped) for k in range(degree, 0, -1)]
        fine = self.levels[0]
        with compiling(space.comm):
            strains = shim.vector_space(space.mesh, "DG", 0, len(self.pairs))
            self.w, self.strain = fem.Function(fine.vectors), fem.Function(strains)
            test = strain_of(ufl.TestFunction(fine.vectors))
            self.force = fem.form(self.pressure * ufl.tr(test) * measure(degree - 1))
            entries = [strain_of(self.w)[i, j] for i, j in self.pairs]
            entries = ufl.as_vector(entries) if len(entries) > 1 else entries[0]
            self.of_w = fem.Expression(entries, shim.interpolation_points(strains))
        self.nodes, self.count = fine.numbers(), space.vertices + (len(space.edges) if degree == 2 else 0)
        self.size = fine.size
        #: Numbers in the displacement of the nodes that this rank owns.
        self.count_here = fine.size * space.dim
        self.range = (np.nan, np.nan)
        if space.comm.allreduce(self.size - len(fine.held)) == 0:
            raise Failed(
                "mechanics",
                "all nodes of the mesh lie at the clamped edge, so that nothing can move; refine the mesh, or use "
                "TractionFree()",
            )
        self.transfer = prolongation(self.levels[1], fine) if degree == 2 else None
        self.solver: PETSc.KSP | None = None
        self.restart()

    def restart(self) -> None:
        """Forget earlier solutions and preconditioners, so that a run does not depend on those before it."""
        self.w.x.array[:] = 0.0
        self.recent: list[np.ndarray] = []
        self._forget()
        self.solves = self.iterations = 0

    def _forget(self) -> None:
        if self.solver is not None:
            self.solver.destroy()
        self.solver, self.fresh, self.last = None, 0, 0

    def _prepare(self) -> PETSc.KSP:
        """A solver for the present moduli, whose preconditioner may have been made for earlier ones."""
        self.levels[0].assemble()
        if self.solver is not None and self.last <= self.fresh + PATIENCE:
            return self.solver
        self._forget()
        for level in self.levels[1:]:
            level.assemble()
        coarse = self.levels[1] if self.transfer is not None else None
        self.solver = conjugate_gradients(self.levels[0], coarse, self.transfer, self.tolerance)
        self.solver.getPC().setReusePreconditioner(True)
        return self.solver

    # Solution --------------------------------------------------------------------------------------------------------

    def solve(self, young: np.ndarray, pressure: np.ndarray) -> Stress:
        """Stress in equilibrium; starts from the displacements of the times before.

        Parameters
        ----------
        young, pressure : ndarray, shape (cells,)
            On this rank's cells, those of other ranks that it sees among them.
        """
        self._check(young, pressure)
        self.young.x.array[:], self.pressure.x.array[:] = young, pressure
        self._prepare()
        found = self.respond(self.force, self.recent)
        self.recent = [found, *self.recent][:RECENT]
        self.w.x.array[: self.count_here] = found
        self.w.x.scatter_forward()
        return self._stress(young)

    def _check(self, young: np.ndarray, pressure: np.ndarray) -> None:
        comm = self.space.comm
        least, most, wrong = float(young.min(initial=np.inf)), float(young.max(initial=-np.inf)), not (
            np.isfinite(young).all() and np.isfinite(pressure).all()
        )  # fmt: skip
        # All ranks stop together, or the others would wait for this one for ever.
        least, most, wrong = min(comm.allgather(least)), max(comm.allgather(most)), any(comm.allgather(wrong))
        self.range = least, most
        if wrong:
            raise Failed("not finite", "Young's modulus or the pressure of the cells is not finite")
        if least <= 0:
            raise Failed(
                "mechanics",
                f"Young's modulus falls to {least:.3g} kPa; expected positive moduli. Look for cell fractions far "
                "outside [0, 1] or moduli that are not positive",
            )

    def resume(self, young: np.ndarray, w: np.ndarray) -> None:
        """Return to an equilibrium found before, with the displacement `w` (this rank's, as `w` held it then)."""
        self.young.x.array[:], self.w.x.array[:] = young, w
        self._prepare()

    def respond(self, load, known: Sequence[np.ndarray] = ()) -> np.ndarray:
        """Displacement, on this rank's own nodes, that balances a form of the test function at the present moduli.

        The search starts from the combination of those already known that is nearest in energy.
        """
        b = shim.assemble_vector(load)
        b.ghostUpdate(PETSc.InsertMode.ADD, PETSc.ScatterMode.REVERSE)
        b.array.reshape(-1, self.space.dim)[self.levels[0].held] = 0.0
        if not self.clamped:
            self.levels[0].motions.remove(b)
        x = b.duplicate()
        if b.norm() > 0:
            x.array[:] = self._nearest(b, known) if known else 0.0
            self._cg(b, x)
        if not self.clamped:
            self.levels[0].motions.remove(x)
        found = x.array.copy()
        b.destroy()
        x.destroy()
        return found

    def _nearest(self, b: PETSc.Vec, known: Sequence[np.ndarray]) -> np.ndarray:
        basis, images = np.stack(known), np.empty((len(known), len(known[0])))
        into, out = b.duplicate(), b.duplicate()
        for one, image in zip(basis, images, strict=True):
            into.array[:] = one
            self.levels[0].matrix.mult(into, out)
            image[:] = out.array
        products = self.space.comm.allreduce(np.column_stack((basis @ images.T, basis @ b.array)))
        gram, right = (products[:, :-1] + products[:, :-1].T) / 2, products[:, -1]
        into.destroy()
        out.destroy()
        return np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ right @ basis

    def _cg(self, b: PETSc.Vec, x: PETSc.Vec) -> None:
        assert self.solver is not None
        solver = self.solver
        solver.solve(b, x)
        if solver.getConvergedReason() < 0 and self.fresh:
            # The preconditioner was made for other moduli.
            self.last = ITERATIONS
            solver = self._prepare()
            x.set(0.0)
            solver.solve(b, x)
        self.last = solver.getIterationNumber()
        self.fresh = self.fresh or max(self.last, 1)
        self.solves += 1
        self.iterations += self.last
        left, (least, most) = solver.getResidualNorm() / max(b.norm(), 1e-300), self.range
        # At rounding the sign of the preconditioned residual is chance, and PETSc calls the preconditioner indefinite.
        if solver.getConvergedReason() < 0 and not left < ROUNDING:
            raise Failed(
                "mechanics",
                f"conjugate gradients for the elastic equilibrium left a relative residual of {left:.2g} after "
                f"{self.last} iterations (PETSc reason {solver.getConvergedReason()}); Young's modulus goes from "
                f"{least:.3g} to {most:.3g} kPa. Use moduli that differ less, a better mesh, or a larger stress_rtol",
            )

    def strain_at_centres(self) -> np.ndarray:
        """Strain (cells, 6) of `w`, with entries as those of `Stress`; columns of the axes that are not there are 0."""
        self.strain.interpolate(self.of_w)
        # Cell by cell: piecewise constants are numbered by cells in the order of their dofs.
        rows = shim.table(self.strain.function_space.dofmap.list, 1)[:, 0]
        own = shim.table(self.space.constants.dofmap.list, 1)[:, 0]
        strain = np.zeros((len(self.space.cell_of), 6))
        values = self.strain.x.array.reshape(-1, len(self.pairs))
        for k, pair in enumerate(self.pairs):
            strain[own, PLACE[pair]] = values[rows, k]
        return strain

    def _stress(self, young: np.ndarray) -> Stress:
        strain = self.strain_at_centres()
        stress = 2 * self.shear * strain
        stress[:, :3] += self.lame * strain[:, :3].sum(1, keepdims=True)
        return Stress(young[:, None] * stress)

    def displacement(self) -> np.ndarray | None:
        """The last displacement (d, nodes), by the sender's numbers, on rank 0."""
        local = self.w.x.array[: self.count_here].reshape(self.size, -1).T
        return self.space.join(np.ascontiguousarray(local), self.nodes, self.count)
