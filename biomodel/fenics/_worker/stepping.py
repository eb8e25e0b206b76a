"""One run: reaction and diffusion in turn, with tangents, the discrete adjoint, and the map by the initial state.

A diffusion step over h is the L-stable second-order method with one double pole (that of TR-BDF2 and of the two-stage
SDIRK; Hosea and Shampine 1996, Appl Numer Math 20:21, doi:10.1016/0168-9274(95)00115-8). With S = (M + theta h K)^-1 M
and theta = 1 - sqrt(1/2) it is w = S c, then c = S ((1 + sqrt 2) w - sqrt 2 c): two solves with one symmetric matrix.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from petsc4py import PETSc

from .forms import Diffusion
from .reaction import Reaction

ROOT2 = math.sqrt(2.0)
THETA = 1 - math.sqrt(0.5)
#: Largest diagonal ratio theta h K / M for which Jacobi is cheaper than multigrid.
JACOBI = 60.0
#: Matrices of different steps kept at once.
KEPT = 6
#: Kinds of events.
STEP, JUMP, DIFFUSE, OUTPUT = 0, 1, 2, 3


class Failed(Exception):
    """What the sender is told, with a kind by which it chooses its error."""

    def __init__(self, kind: str, text: str):
        super().__init__(text)
        self.kind = kind


class Heat:
    """Solves with M + theta h K for the h that occur."""

    def __init__(self, diffusion: Diffusion, tolerance: float):
        self.diffusion, self.tolerance = diffusion, tolerance
        self.K = diffusion.stiffness
        self.b, self.x = self.K.createVecRight(), self.K.createVecRight()
        self.solvers: OrderedDict[float, PETSc.KSP] = OrderedDict()
        self.solves = self.iterations = 0

    def destroy(self) -> None:
        """Free the solvers."""
        for solver in self.solvers.values():
            solver.destroy()
        self.solvers.clear()

    def mass(self, c: np.ndarray) -> np.ndarray:
        """M c."""
        if self.diffusion.lumped is not None:
            return self.diffusion.lumped * c
        return self.multiply(self.diffusion.mass, c)

    def multiply(self, matrix: PETSc.Mat, c: np.ndarray) -> np.ndarray:
        """A matrix times this rank's values."""
        self.x.array[:] = c
        matrix.mult(self.x, self.b)
        return self.b.array.copy()

    def _solver(self, h: float) -> PETSc.KSP:
        key = float(f"{h:.12e}")
        if key in self.solvers:
            self.solvers.move_to_end(key)
            return self.solvers[key]
        tau = THETA * key
        A = self.K.copy()
        A.scale(tau)
        stiff = A.getDiagonal()
        if self.diffusion.lumped is not None:
            diagonal = stiff.duplicate()
            diagonal.array[:] = self.diffusion.lumped
            A.setDiagonal(stiff + diagonal)
        else:
            A.axpy(1.0, self.diffusion.mass, structure=PETSc.Mat.Structure.SAME_NONZERO_PATTERN)
            diagonal = self.diffusion.mass.getDiagonal()
        stiff.pointwiseDivide(stiff, diagonal)
        solver = PETSc.KSP().create(self.K.comm)
        solver.setOperators(A)
        solver.setType("cg")
        solver.setNormType(PETSc.KSP.NormType.UNPRECONDITIONED)
        solver.setTolerances(rtol=self.tolerance, atol=0.0, max_it=5000)
        solver.setInitialGuessNonzero(True)
        pc = solver.getPC()
        if stiff.max()[1] < JACOBI:
            pc.setType("jacobi")
        elif PETSc.Sys.hasExternalPackage("hypre"):
            pc.setType("hypre")
            pc.setHYPREType("boomeramg")
        else:
            pc.setType("gamg")
        self.solvers[key] = solver
        if len(self.solvers) > KEPT:
            self.solvers.popitem(last=False)[1].destroy()
        return solver

    def solve(self, h: float, b: np.ndarray, guess: np.ndarray) -> np.ndarray:
        """(M + theta h K)^-1 b."""
        solver = self._solver(h)
        self.b.array[:] = b
        size = self.b.norm()
        if size == 0:
            return np.zeros_like(b)
        if not math.isfinite(size):
            raise Failed("not finite", "the state is not finite")
        self.x.array[:] = guess
        solver.solve(self.b, self.x)
        self.solves += 1
        self.iterations += solver.getIterationNumber()
        if solver.getConvergedReason() < 0:
            raise Failed(
                "solve",
                f"conjugate gradients did not converge (PETSc reason {solver.getConvergedReason()} after "
                f"{solver.getIterationNumber()} iterations, residual {solver.getResidualNorm():.3g}); check the mesh's "
                "quality and the diffusivity",
            )
        return self.x.array.copy()

    def step(self, h: float, c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """One step: the intermediate state and the result."""
        w = self.solve(h, self.mass(c), c)
        return w, self.solve(h, self.mass((1 + ROOT2) * w - ROOT2 * c), w)

    def step_transposed(self, h: float, lam: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Transpose of `step`: the two inner solutions, by which derivatives by K are taken, and the result."""
        y = self.solve(h, lam, np.zeros_like(lam))
        r = self.mass(y)
        z = self.solve(h, (1 + ROOT2) * r, (1 + ROOT2) * y)
        return y, z, self.mass(z) - ROOT2 * r

    def step_back(self, h, c, kept, after, lam, wanted: Sequence[str], sums: dict[str, Any]) -> np.ndarray:
        """Pull `lam` back through a step from `c` to `after`, whose intermediate state was `kept`.

        Derivatives by those of the inputs `wanted` that the coefficient reads are added to `sums`: numbers, or arrays
        (owned cells,) of those that are piecewise constant.
        """
        y, z, back = self.step_transposed(h, lam)
        tau = THETA * h
        for name in wanted:
            if self.diffusion.is_field(name):
                pair = self.diffusion.pairing(name)
                sums[name] = sums[name] - tau * (pair(y, after) + pair(z, kept))
            elif name in self.diffusion.slopes:
                slope = self.diffusion.slope(name)
                sums[name] -= tau * float(y @ self.multiply(slope, after) + z @ self.multiply(slope, kept))
        return back

    def step_tangents(self, h, c, dc, numbers: Mapping[str, np.ndarray],
                      cells: tuple[str, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """One step of the state and of m tangents.

        Parameters
        ----------
        c, dc : ndarray, shape (nodes,) and (m, nodes)
        numbers : mapping of str to ndarray, shape (m,)
            Tangents of inputs that are numbers.
        cells : (str, ndarray of shape (m, cells)), optional
            Tangents of one input that is piecewise constant.
        """
        tau = THETA * h
        moving = {n: x for n, x in numbers.items() if n in self.diffusion.names and np.any(x)}
        w, v = self.step(h, c)
        slopes = {n: (self.multiply(self.diffusion.slope(n), w), self.multiply(self.diffusion.slope(n), v))
                  for n in moving}  # fmt: skip
        found = np.empty_like(dc)
        for m in range(len(dc)):
            load = [np.zeros_like(c) + sum(tau * x[m] * slopes[n][k] for n, x in moving.items()) for k in (0, 1)]
            if cells is not None:
                along = self.diffusion.along(cells[0])
                load = [one + tau * along(cells[1][m], state) for one, state in zip(load, (w, v), strict=True)]
            dw = self.solve(h, self.mass(dc[m]) - load[0], dc[m])
            found[m] = self.solve(h, self.mass((1 + ROOT2) * dw - ROOT2 * dc[m]) - load[1], dw)
        return v, found

    @property
    def size(self) -> int:
        """Bytes of its matrices, roughly."""
        return int(30 * self.K.getInfo()["nz_used"])

    # What a diffusion has that remembers; this one does not.

    def size_of_step(self, state: np.ndarray) -> int:
        """Bytes that a step keeps for its transpose."""
        return 2 * state.nbytes

    def mark(self) -> None:
        """What a step reads beside the state: nothing."""

    def back_to(self, mark: None) -> None:
        """Return to where `mark` was asked for."""

    def hold(self) -> None:
        """What `held` needs of the step just done."""

    def held(self, kept: None) -> Heat:
        """Matrices of a step."""
        return self


@dataclass
class Operation:
    """A diffusion over `h`, or the reaction between two of them, or an output."""

    kind: int
    h: float = 0.0
    parts: list[tuple[int, int, float]] = field(default_factory=list)


def operations(kinds: Sequence[int], values: Sequence[float]) -> list[Operation]:
    """Group a list of events: neighbouring steps and jumps of the reaction are one operation."""
    found: list[Operation] = []
    counts = {STEP: 0, JUMP: 0}
    for kind, value in zip(kinds, values, strict=True):
        kind = int(kind)
        if kind in (DIFFUSE, OUTPUT):
            found.append(Operation(kind, float(value)))
            continue
        if not found or found[-1].kind != STEP:
            found.append(Operation(STEP))
        found[-1].parts.append((kind, counts[kind], float(value)))
        counts[kind] += 1
    return found


class Run:
    """One simulation's numbers, laid out on this rank.

    Parameters
    ----------
    comm : MPI communicator
    heat : Heat or None
        None without diffusion.
    reaction : Reaction
    jumps : ndarray, shape (jumps,) or (jumps, nodes)
        Surviving fraction of each instantaneous loss.
    program : list of Operation
    memory : float
        Bytes for states kept for the adjoint; beyond it segments are computed again.
    progress : callable
        Called with the share that is done.
    """

    def __init__(self, comm, heat: Heat | None, reaction: Reaction, jumps: np.ndarray, program: list[Operation],
                 memory: float, progress: Callable[[float], None]):  # fmt: skip
        self.comm, self.reaction, self.jumps = comm, reaction, jumps
        self.heat: Any = heat
        self.program, self.memory, self.progress = program, memory, progress

    def _require_finite(self, *states: np.ndarray) -> None:
        # All ranks stop together, or the others would wait for this one for ever.
        if self.comm.allreduce(int(not all(np.isfinite(u).all() for u in states))):
            raise Failed("not finite", "the state is not finite")

    def _react(self, op: Operation, u: np.ndarray) -> np.ndarray:
        for kind, index, h in op.parts:
            u = u * self.jumps[index] if kind == JUMP else self.reaction.advance(u, index, h)
        return u

    def _advance(self, op: Operation, u: np.ndarray) -> tuple[Any, np.ndarray]:
        """One operation: what a step of diffusion keeps for its transpose, and the new state."""
        if op.kind == DIFFUSE:
            return self.heat.step(op.h, u) if self.heat is not None else (None, u)
        return None, self._react(op, u) if op.kind == STEP else u

    def forward(self, u: np.ndarray) -> list[np.ndarray]:
        """States at the outputs."""
        outputs = []
        for n, op in enumerate(self.program):
            if op.kind == OUTPUT:
                self._require_finite(u)
                outputs.append(u)
            else:
                u = self._advance(op, u)[1]
            self.progress((n + 1) / len(self.program))
        return outputs

    # Adjoint ---------------------------------------------------------------------------------------------------------

    def gradient(self, u0: np.ndarray, cotangents: np.ndarray, scalars: Sequence[str], cells: Sequence[str]):
        """Gradient of sum(cotangents * outputs), by a run forward and one backward.

        Parameters
        ----------
        u0 : ndarray, shape (nodes,)
        cotangents : ndarray, shape (outputs, nodes)
        scalars, cells : sequence of str
            Inputs of the diffusion, numbers and piecewise constant ones, by which derivatives are wanted.

        Returns
        -------
        dict
            ``u0`` (nodes,), ``reaction`` and ``diffusion`` by input, ``tables``, ``jumps``; sums are over this rank's
            nodes.
        """
        sums: dict[str, Any] = {n: np.zeros_like(u0) if np.ndim(self.reaction.values[n]) else 0.0
                                for n in self.reaction.wrt if n not in self.reaction.columns}  # fmt: skip
        diffusion: dict[str, Any] = {**dict.fromkeys(scalars, 0.0), **dict.fromkeys(cells, 0.0)}
        tables, jumps = np.zeros_like(self.reaction.tables), np.zeros_like(self.jumps)
        count = len(self.program)
        fits = max(2, int(self.memory // (self.heat.size_of_step(u0) if self.heat is not None else 2 * u0.nbytes)))
        stride = count if count <= fits else max(math.ceil(math.sqrt(count)), math.ceil(count / fits))
        starts, u = [], u0
        for n, op in enumerate(self.program[: (count - 1) // stride * stride]):
            if n % stride == 0:
                starts.append((u, self.heat.mark() if self.heat is not None else None))
            u = self._advance(op, u)[1]
        starts.append((u, self.heat.mark() if self.heat is not None else None))
        lam, remaining = np.zeros_like(u0), len(cotangents)
        for first in range((len(starts) - 1) * stride, -1, -stride):
            segment, kept, (u, mark) = self.program[first : first + stride], [], starts[first // stride]
            if self.heat is not None:
                self.heat.back_to(mark)
            for op in segment:
                middle, after = self._advance(op, u)
                kept.append((u, middle, after))
                u = after
            for n in range(len(segment) - 1, -1, -1):
                op, (u, w, v) = segment[n], kept[n]
                if op.kind == OUTPUT:
                    remaining -= 1
                    lam = lam + cotangents[remaining]
                elif op.kind == STEP:
                    lam = self._react_back(op, u, lam, sums, tables, jumps)
                elif self.heat is not None:
                    lam = self.heat.step_back(op.h, u, w, v, lam, list(diffusion), diffusion)
                self.progress(1 - (first + n) / count)
        return {"u0": lam, "reaction": sums, "diffusion": diffusion, "tables": tables, "jumps": jumps}

    def _react_back(self, op, u, lam, sums, tables, jumps):
        states = [u]
        for kind, index, h in op.parts[:-1]:
            u = u * self.jumps[index] if kind == JUMP else self.reaction.advance(u, index, h)
            states.append(u)
        for (kind, index, h), u in zip(reversed(op.parts), reversed(states), strict=True):
            if kind == JUMP:
                jumps[index] += lam * u if self.jumps.ndim > 1 else np.sum(lam * u)
                lam = lam * self.jumps[index]
            else:
                lam = self.reaction.adjoint(u, lam, index, h, sums, tables[index])
        return lam

    # Tangents --------------------------------------------------------------------------------------------------------

    def tangents(self, u, du, numbers: dict[str, np.ndarray], tables: np.ndarray, jumps: np.ndarray):
        """States at the outputs and m tangents of each.

        Parameters
        ----------
        u, du : ndarray, shape (nodes,) and (m, nodes)
        numbers : mapping of str to ndarray, shape (m,)
            Tangents of the inputs that are numbers, of reaction and diffusion.
        tables, jumps : ndarray, shape (m, steps, 3, columns) and (m, jumps)
        """
        outputs, moved = [], []
        for n, op in enumerate(self.program):
            if op.kind == OUTPUT:
                self._require_finite(u, du)
                outputs.append(u)
                moved.append(du)
            elif op.kind == STEP:
                for kind, index, h in op.parts:
                    if kind == JUMP:
                        du = du * self.jumps[index] + jumps[:, index, None] * u
                        u = u * self.jumps[index]
                    else:
                        u, du = self.reaction.tangent(u, du, index, h, numbers, tables[:, index])
            elif self.heat is not None:
                u, du = self.heat.step_tangents(op.h, u, du, numbers)
            self.progress((n + 1) / len(self.program))
        return outputs, moved

    # The linear map by the initial state -----------------------------------------------------------------------------

    def linearise(self, u: np.ndarray) -> tuple[list[np.ndarray], list[Any]]:
        """States at the outputs, and for each operation the reaction's derivative, or what `held` needs."""
        outputs, slopes = [], []
        for op in self.program:
            slope: Any = None
            if op.kind == OUTPUT:
                self._require_finite(u)
                outputs.append(u)
            elif op.kind == DIFFUSE:
                u = self._advance(op, u)[1]
                slope = self.heat.hold() if self.heat is not None else None
            else:
                slope = np.ones_like(u)
                for kind, index, h in op.parts:
                    if kind == JUMP:
                        u, g = u * self.jumps[index], self.jumps[index]
                    else:
                        u, g = self.reaction.derivative(u, index, h)
                    slope = slope * g
            slopes.append(slope)
        return outputs, slopes

    def push(self, slopes, du: np.ndarray) -> np.ndarray:
        """(m, nodes) to (outputs, m, nodes)."""
        outputs = []
        for op, slope in zip(self.program, slopes, strict=True):
            if op.kind == OUTPUT:
                outputs.append(du)
            elif op.kind == STEP:
                du = du * slope
            elif self.heat is not None:
                heat = self.heat.held(slope)
                du = np.stack([heat.step(op.h, one)[1] for one in du])
        return np.stack(outputs)

    def pull(self, slopes, cotangents: np.ndarray) -> np.ndarray:
        """(outputs, m, nodes) to (m, nodes)."""
        lam, remaining = np.zeros_like(cotangents[0]), len(cotangents)
        for op, slope in zip(reversed(self.program), reversed(slopes), strict=True):
            if op.kind == OUTPUT:
                remaining -= 1
                lam = lam + cotangents[remaining]
            elif op.kind == STEP:
                lam = lam * slope
            elif self.heat is not None:
                heat = self.heat.held(slope)
                lam = np.stack([heat.step_transposed(op.h, one)[2] for one in lam])
        return lam
