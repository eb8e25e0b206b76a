"""Matrices of the diffusion: its coefficient's tape replayed as a UFL expression."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ufl
from dolfinx import fem
from petsc4py import PETSc

from . import shim
from .mesh import Space, compiling
from .replay import replay


def _xlogx(u):
    positive = ufl.gt(u, 0)
    return ufl.conditional(positive, u * ufl.ln(ufl.conditional(positive, u, 1.0)), 0.0)


#: The primitives as UFL expressions.
UFL: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow,
    "neg": operator.neg, "abs": abs, "exp": ufl.exp, "log": ufl.ln, "sqrt": ufl.sqrt, "xlogx": _xlogx,
    "where": ufl.conditional, "gt": ufl.gt, "ge": ufl.ge, "lt": ufl.lt, "le": ufl.le, "and": ufl.And, "or": ufl.Or,
    "not": ufl.Not,
}  # fmt: skip


def evaluate(space: Space, tape: Mapping, scalars: Mapping[str, float], nodal: Mapping[str, np.ndarray]) -> np.ndarray:
    """Values (outputs, nodes) of a tape replayed as UFL, with inputs that are numbers or nodal values on this rank."""
    values: dict[str, Any] = {n: fem.Constant(space.mesh, PETSc.ScalarType(v)) for n, v in scalars.items()}
    values.update({n: space.function(v) for n, v in nodal.items()})
    found = []
    with compiling(space.comm):
        for expression in replay(tape, values, UFL):
            if isinstance(expression, (int, float)):
                found.append(np.full(space.size, float(expression)))
                continue
            target = space.function()
            target.interpolate(fem.Expression(expression, shim.interpolation_points(space.space)))
            found.append(target.x.array[: space.size].copy())
    return np.stack(found)


class Diffusion:
    """The stiffness matrix of a diffusion coefficient, the mass matrix, and derivatives of the former.

    Parameters
    ----------
    space : Space
    tape : mapping
        The coefficient: one output, or nine for a tensor over (x, y, z) in row-major order.
    slopes : mapping of str to list of mapping
        For inputs that may be differentiated by: one tape per output.
    axes : sequence of int
        Which of x, y, z each coordinate of the mesh is.
    positions : sequence of float
        The coordinate of the axes along which the mesh does not extend (x, y, z).
    fields : sequence of str
        Inputs that are piecewise constant; the others are numbers, or the position ``c.x``, ``c.y``, ``c.z``.
    """

    def __init__(self, space: Space, tape, slopes, axes, positions, fields):
        self.space, self.tape, self.slopes, self.axes, self.positions = space, tape, slopes, list(axes), positions
        self.trial, self.test = ufl.TrialFunction(space.space), ufl.TestFunction(space.space)
        self.names = [row[1] for row in tape["rows"] if row[0] == "input"]
        places = ("c.x", "c.y", "c.z")
        self.inputs: dict[str, Any] = {}
        varying = False
        for name in sorted({*self.names, *slopes}):
            if name in fields:
                self.inputs[name] = fem.Function(space.constants)
            elif name in places:
                axis = places.index(name)
                varying = varying or axis in self.axes
                coordinate = ufl.SpatialCoordinate(space.mesh)
                here = self.axes.index(axis) if axis in self.axes else None
                self.inputs[name] = coordinate[here] if here is not None else float(positions[axis])
            else:
                self.inputs[name] = fem.Constant(space.mesh, PETSc.ScalarType(0.0))
        # Exact for coefficients that are constant in a cell, two degrees more for those that are not.
        self.dx = ufl.dx(metadata={"quadrature_degree": 2 * (space.degree - 1) + (2 if varying else 0)})
        self._forms: dict[str, Any] = {}
        self._stiffness: PETSc.Mat | None = None
        self._slopes: dict[str, PETSc.Mat] = {}
        with compiling(space.comm):
            if space.degree == 1:
                lumped = shim.assemble_vector(fem.form(self.test * ufl.dx))
                lumped.ghostUpdate(PETSc.InsertMode.ADD, PETSc.ScatterMode.REVERSE)
                self.lumped: np.ndarray | None = lumped.array.copy()
                self.mass: Any = None
            else:
                self.mass = shim.assemble_matrix(fem.form(self.trial * self.test * ufl.dx))
                self.mass.assemble()
                self.lumped = None

    def _flux(self, outputs: list, gradient):
        if len(outputs) == 1:
            return outputs[0] * gradient
        rows = [[outputs[3 * i + j] for j in self.axes] for i in self.axes]
        return ufl.dot(ufl.as_matrix(rows), gradient)

    def set(self, scalars: Mapping[str, float], cells: Mapping[str, np.ndarray]) -> None:
        """Give the inputs their values: numbers, and cell values (cells,) in the sender's order."""
        for name, holder in self.inputs.items():
            if isinstance(holder, fem.Function):
                holder.x.array[:] = cells[name][self.space.cell_of]
            elif isinstance(holder, fem.Constant):
                holder.value = scalars[name]
        self._stiffness = None
        self._slopes = {}

    def set_cells(self, name: str, values: np.ndarray) -> None:
        """Give one piecewise constant input its values on this rank's cells, as `Space.constants` numbers them."""
        self.inputs[name].x.array[:] = values
        self._stiffness = None
        self._slopes = {}

    @property
    def stiffness(self) -> PETSc.Mat:
        """The matrix K of (D grad u, grad v) at the inputs' values."""
        if self._stiffness is None:
            self._stiffness = self._matrix("", [self.tape])
        return self._stiffness

    def slope(self, name: str) -> PETSc.Mat:
        """Derivative of K by an input that is a number."""
        if name not in self._slopes:
            self._slopes[name] = self._matrix(name, self.slopes[name])
        return self._slopes[name]

    def _matrix(self, key: str, tapes: list) -> PETSc.Mat:
        if key not in self._forms:
            outputs = [x for tape in tapes for x in replay(tape, self.inputs, UFL)]
            flux = self._flux(outputs, ufl.grad(self.trial))
            with compiling(self.space.comm):
                self._forms[key] = fem.form(ufl.inner(flux, ufl.grad(self.test)) * self.dx)
        matrix = shim.assemble_matrix(self._forms[key])
        matrix.assemble()
        return matrix

    def is_field(self, name: str) -> bool:
        """Whether an input of the coefficient is piecewise constant."""
        return isinstance(self.inputs.get(name), fem.Function)

    def along(self, name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """The function (x, v) -> derivative of K v along a change x (cells,) of an input that is a field.

        `x` holds the cells that this rank sees, as `Space.constants` numbers them.
        """
        key = f"{name} along"
        if key not in self._forms:
            change, v = fem.Function(self.space.constants), self.space.function()
            outputs = [x for tape in self.slopes[name] for x in replay(tape, self.inputs, UFL)]
            with compiling(self.space.comm):
                flux = self._flux(outputs, ufl.grad(v))
                form = fem.form(change * ufl.inner(flux, ufl.grad(self.test)) * self.dx)
            self._forms[key] = (form, change, v)
        form, change, v = self._forms[key]

        def move(x: np.ndarray, state: np.ndarray) -> np.ndarray:
            change.x.array[:] = x
            self.space.assign(v, state)
            vector = shim.assemble_vector(form)
            vector.ghostUpdate(PETSc.InsertMode.ADD, PETSc.ScatterMode.REVERSE)
            return vector.array.copy()

        return move

    def pairing(self, name: str) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
        """The function (y, v) -> derivative of y' K v by each cell's value of an input that is a field."""
        key = f"{name} by cells"
        if key not in self._forms:
            y, v = self.space.function(), self.space.function()
            outputs = [x for tape in self.slopes[name] for x in replay(tape, self.inputs, UFL)]
            weight = ufl.TestFunction(self.space.constants)
            inside = ufl.inner(self._flux(outputs, ufl.grad(v)), ufl.grad(y)) * weight * self.dx
            with compiling(self.space.comm):
                self._forms[key] = (fem.form(inside), y, v)
        form, y, v = self._forms[key]

        def pair(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            self.space.assign(y, a)
            self.space.assign(v, b)
            return shim.assemble_vector(form).array.copy()

        return pair
