"""Derivatives of von Mises stress in elastic equilibrium by moduli and pressure, forward and transposed.

The stiffness is symmetric, so that each takes one more solve with the same matrix.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import ufl
from dolfinx import fem

from . import shim
from .elasticity import PLACE, RECENT, Elasticity
from .levels import measure, strain_of
from .mesh import compiling


class ElasticSlopes:
    """Derivatives at the equilibrium that a body is in (`solve` or `resume` was the last it did).

    Cell values are those of the cells that this rank owns, first of those that `Elasticity` sees.
    """

    def __init__(self, body: Elasticity):
        self.body, self.owned = body, body.space.owned_cells
        #: Displacements that earlier derivatives made, from which the next are looked for.
        self.guesses: dict[int, list[np.ndarray]] = {}

    # Forms -----------------------------------------------------------------------------------------------------------

    @cached_property
    def _changes(self):
        """What the changes of modulus and pressure do to the balance of forces, by test function."""
        body, space = self.body, self.body.space
        young, pressure = fem.Function(space.constants), fem.Function(space.constants)
        test = strain_of(ufl.TestFunction(body.levels[0].vectors))
        with compiling(space.comm):
            form = fem.form(
                pressure * ufl.tr(test) * measure(body.degree - 1)
                - young * ufl.inner(self._hooke(body.w), test) * measure(2 * (body.degree - 1))
            )
        return form, young, pressure

    def _hooke(self, w):
        made = strain_of(w)
        law = 2 * self.body.shear * made + self.body.lame * ufl.tr(made) * ufl.Identity(self.body.space.dim)
        return law

    @cached_property
    def _pull(self):
        """By cells: what a displacement `y`, dual to the balance of forces, says of modulus and pressure."""
        body, space = self.body, self.body.space
        y, weight = fem.Function(body.levels[0].vectors), ufl.TestFunction(space.constants)
        made = strain_of(y)
        with compiling(space.comm):
            by_young = fem.form(-ufl.inner(self._hooke(body.w), made) * weight * measure(2 * (body.degree - 1)))
            by_pressure = fem.form(ufl.tr(made) * weight * measure(body.degree - 1))
        return by_young, by_pressure, y

    @cached_property
    def _at_centres(self):
        """Strain of the test function at the cells' centres, with weights for its entries."""
        body, space = self.body, self.body.space
        entries = fem.Function(body.strain.function_space)
        test = strain_of(ufl.TestFunction(body.levels[0].vectors))
        each = [entries[k] for k in range(len(body.pairs))] if len(body.pairs) > 1 else [entries]
        with compiling(space.comm):
            # One point, the centre, whose weight is the cell's volume.
            form = fem.form(sum(e * test[i, j] for e, (i, j) in zip(each, body.pairs, strict=True)) * measure(1))
        return form, entries

    # Pointwise -------------------------------------------------------------------------------------------------------

    def _law(self) -> tuple[np.ndarray, np.ndarray]:
        """Von Mises stress per modulus (cells,), and its derivative by the strain's entries (cells, 6).

        It has a kink where it is zero; there its derivative counts as zero.
        """
        strain = self.body.strain_at_centres()
        shape = strain.copy()
        shape[:, :3] -= strain[:, :3].mean(1, keepdims=True)
        weights = 1.5 * (2 * self.body.shear) ** 2 * np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])
        per_modulus = np.sqrt((weights * shape**2).sum(1))
        turning = per_modulus > 1e-14 * per_modulus.max(initial=1e-300)
        slope = np.where(turning[:, None], weights * shape / np.where(turning, per_modulus, 1.0)[:, None], 0.0)
        return per_modulus, slope

    # Derivatives -----------------------------------------------------------------------------------------------------

    def push(self, young: np.ndarray, d_young: np.ndarray, d_pressure: np.ndarray) -> np.ndarray:
        """Change of the von Mises stress (m, cells) with moduli and pressure (m, cells).

        All with the cells that this rank sees of others, as `Elasticity` numbers them.
        """
        body = self.body
        form, moduli, pressure = self._changes
        per_modulus, slope = self._law()
        here, found = body.w.x.array.copy(), np.empty_like(d_young)
        for m in range(len(d_young)):
            moduli.x.array[:], pressure.x.array[:] = d_young[m], d_pressure[m]
            moved = body.respond(form, self.guesses.get(m, []))
            self.guesses[m] = [moved, *self.guesses.get(m, [])][:RECENT]
            body.w.x.array[: body.count_here] = moved
            body.w.x.scatter_forward()
            found[m] = d_young[m] * per_modulus + young * (slope * body.strain_at_centres()).sum(1)
            body.w.x.array[:] = here
        return found

    def pull(self, young: np.ndarray, cotangent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Transpose of `push`: from cotangents of the von Mises stress to those of moduli and pressure.

        Parameters
        ----------
        young : ndarray, shape (cells,)
        cotangent : ndarray, shape (owned cells,)

        Returns
        -------
        by_young, by_pressure : ndarray, shape (owned cells,)
        """
        body, n = self.body, self.owned
        per_modulus, slope = self._law()
        form, entries = self._at_centres
        rows = shim.table(entries.function_space.dofmap.list, 1)[:, 0]
        own = shim.table(body.space.constants.dofmap.list, 1)[:, 0]
        amount = np.zeros(len(young))
        amount[:n] = cotangent * young[:n] / body.space.cell_volumes
        values = entries.x.array.reshape(-1, len(body.pairs))
        for k, pair in enumerate(body.pairs):
            values[rows, k] = (amount * slope[:, PLACE[pair]])[own]
        by_young, by_pressure, y = self._pull
        y.x.array[: body.count_here] = body.respond(form)
        y.x.scatter_forward()
        found = [shim.assemble_vector(f).array.copy() for f in (by_young, by_pressure)]
        return found[0] + cotangent * per_modulus[:n], found[1]
