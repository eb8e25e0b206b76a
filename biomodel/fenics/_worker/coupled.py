"""Diffusion that follows the stress which the evolving state itself makes.

Stress is solved once per step of diffusion, at a prediction of the state in the step's middle: half a step of diffusion
with the coefficient of the step before. That is second order in the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .elastic_slopes import ElasticSlopes
from .elasticity import Elasticity, Stress
from .forms import Diffusion
from .mesh import Space
from .replay import replay
from .stepping import Heat


@dataclass(frozen=True, eq=False)
class Equilibrium:
    """Where a state left the tissue.

    Attributes
    ----------
    state : ndarray, shape (nodes,)
    displacement : ndarray
        As the elasticity holds it.
    von_mises : ndarray, shape (cells,)
    """

    state: np.ndarray
    displacement: np.ndarray
    von_mises: np.ndarray


class Body:
    """The stress that a state makes, with Young's modulus and the pressure of the cells as tapes.

    Parameters
    ----------
    space : Space
    elasticity : Elasticity
    tissue : mapping
        ``young`` and ``pressure``: tapes with the input ``u``, evaluated at the cells' centres; ``young_slopes`` and
        ``pressure_slopes``: the same with their derivatives by ``u`` and each of ``wrt`` behind them.
    values : mapping of str to float or ndarray (cells,)
        Their other inputs, fields in the sender's order.
    """

    def __init__(self, space: Space, elasticity: Elasticity, tissue, values: Mapping[str, Any]):
        self.space, self.elasticity, self.tissue = space, elasticity, tissue
        self.values = {n: v[space.cell_of] if np.ndim(v) else float(v) for n, v in values.items()}
        elasticity.restart()

    @cached_property
    def slopes(self) -> ElasticSlopes:
        """Derivatives of the stress."""
        return ElasticSlopes(self.elasticity)

    def _replay(self, kind: str, u: np.ndarray) -> list[np.ndarray]:
        inside = self.space.at_centres(u)
        return [np.broadcast_to(x, inside.shape) for x in replay(self.tissue[kind], {**self.values, "u": inside})]

    def stress(self, u: np.ndarray) -> Stress:
        """Stress at a state, given by this rank's nodal values."""
        return self.elasticity.solve(self._replay("young", u)[0], self._replay("pressure", u)[0])

    def equilibrium(self, u: np.ndarray) -> Equilibrium:
        """The same, with what its derivatives need."""
        stress = self.stress(u)
        return Equilibrium(u, self.elasticity.w.x.array.copy(), stress.von_mises)

    def push(self, u: np.ndarray, du: np.ndarray, numbers: Mapping[str, np.ndarray]) -> np.ndarray:
        """Change of the von Mises stress (m, cells) at the equilibrium just found.

        Parameters
        ----------
        u, du : ndarray, shape (nodes,) and (m, nodes)
        numbers : mapping of str to ndarray, shape (m,)
            Changes of inputs that are numbers.
        """
        inside = np.stack([self.space.at_centres(one) for one in du])
        young, changes = None, []
        for kind in ("young_slopes", "pressure_slopes"):
            value, by_u, *by = self._replay(kind, u)
            change = by_u * inside
            for name, slope in zip(self.tissue["wrt"], by, strict=True):
                if name in numbers:
                    change = change + numbers[name][:, None] * slope
            young = value if young is None else young
            changes.append(change)
        assert young is not None
        return self.slopes.push(young, *changes)

    def pull(self, at: Equilibrium, cotangent: np.ndarray, wanted: Sequence[str], sums: dict[str, Any]) -> np.ndarray:
        """From cotangents of the von Mises stress (owned cells,) to that of the state (nodes,).

        Those of the inputs `wanted` are added to `sums`: numbers, or arrays (owned cells,) of fields.
        """
        n = self.space.owned_cells
        found = {k: [x[:n] for x in self._replay(k, at.state)] for k in ("young_slopes", "pressure_slopes")}
        young = self._replay("young", at.state)[0]
        self.elasticity.resume(young, at.displacement)
        inside = np.zeros(n)
        for by_value, (_, by_u, *by) in zip(self.slopes.pull(young, cotangent), found.values(), strict=True):
            inside += by_value * by_u
            for name, slope in zip(self.tissue["wrt"], by, strict=True):
                if name in wanted:
                    part = by_value * slope
                    sums[name] = sums[name] + (part if np.ndim(self.values[name]) else float(part.sum()))
        return self.space.at_centres_transposed(inside)


@dataclass(frozen=True, eq=False)
class Kept:
    """One step, as its transpose needs it.

    Attributes
    ----------
    before, now : Equilibrium
        Whose stress held for the prediction and for the step.
    first : bool
        Whether `before` was found at this step's own start.
    half, middle : ndarray
        What is between the prediction's two solves, and its result.
    whole : ndarray
        What is between the step's two solves.
    """

    before: Equilibrium
    first: bool
    half: np.ndarray
    middle: np.ndarray
    whole: np.ndarray
    now: Equilibrium


class CoupledHeat:
    """Steps of diffusion whose coefficient reads the von Mises stress; takes the place of `Heat` in a run.

    Parameters
    ----------
    diffusion : Diffusion
    inputs : (mapping of str to float, mapping of str to ndarray)
        The coefficient's other inputs: numbers, and fields (cells,) in the sender's order.
    body : Body
    name : str
        The coefficient's input that is the stress.
    tolerance : float
        As that of `Heat`.
    memory : float
        Bytes for matrices that `hold` keeps.
    """

    def __init__(self, diffusion: Diffusion, inputs, body: Body, name: str, tolerance: float, memory: float):
        self.diffusion, self.inputs, self.body, self.name = diffusion, inputs, body, name
        self.tolerance, self.memory = tolerance, memory
        self.solves = self.iterations = 0
        #: The equilibrium whose stress holds, and its matrices.
        self.now: Equilibrium | None = None
        self._heat: tuple[Equilibrium | None, Heat] | None = None
        #: Cotangent of the stress before the step that was transposed last; tangents of the stress that holds.
        self._owed: np.ndarray | None = None
        self._moving: np.ndarray | None = None
        self._set(np.zeros(len(body.space.cell_of)))

    def _set(self, von_mises: np.ndarray) -> None:
        numbers, cells = self.inputs
        self.diffusion.set(numbers, {**cells, self.name: np.zeros(self.body.space.cell_count)})
        self.diffusion.set_cells(self.name, von_mises)

    def _matrices(self, at: Equilibrium) -> Heat:
        """Matrices at the stress of an equilibrium."""
        if self._heat is not None:
            if self._heat[0] is at:
                return self._heat[1]
            self._heat[1].destroy()
        self.diffusion.set_cells(self.name, at.von_mises)
        self._heat = (at, Heat(self.diffusion, self.tolerance))
        return self._heat[1]

    def _count(self, heat: Heat) -> None:
        self.solves, self.iterations = self.solves + heat.solves, self.iterations + heat.iterations
        heat.solves = heat.iterations = 0

    # Forward ---------------------------------------------------------------------------------------------------------

    def mark(self) -> Equilibrium | None:
        """What a step reads beside the state."""
        return self.now

    def back_to(self, mark: Equilibrium | None) -> None:
        """Return to where `mark` was asked for."""
        self.now = mark
        if mark is None:
            self.body.elasticity.restart()
        else:
            self.body.elasticity.recent = [mark.displacement[: self.body.elasticity.count_here]]

    def size_of_step(self, state: np.ndarray) -> int:
        """Bytes that a step keeps for its transpose."""
        space = self.body.space
        return 6 * state.nbytes + self.body.elasticity.w.x.array.nbytes + 8 * len(space.cell_of)

    def step(self, h: float, c: np.ndarray) -> tuple[Kept, np.ndarray]:
        """One step with the stress of its middle."""
        first = self.now is None
        before = self.now or self.body.equilibrium(c)
        heat = self._matrices(before)
        half, middle = heat.step(h / 2, c)
        self._count(heat)
        self.now = self.body.equilibrium(middle)
        heat = self._matrices(self.now)
        whole, after = heat.step(h, c)
        self._count(heat)
        return Kept(before, first, half, middle, whole, self.now), after

    # Derivatives -----------------------------------------------------------------------------------------------------

    def step_back(self, h, c, kept: Kept, after, lam, wanted: Sequence[str], sums: dict[str, Any]) -> np.ndarray:
        """Pull `lam` back through one step; steps come in the reverse of their order."""
        owed = {self.name: 0.0 if self._owed is None else self._owed}
        inputs = [*wanted, self.name]
        both = {**sums, **owed}
        at_start = self._matrices(kept.now).step_back(h, c, kept.whole, after, lam, inputs, both)
        at_middle = self.body.pull(kept.now, both[self.name], wanted, both)
        both[self.name] = 0.0
        heat = self._matrices(kept.before)
        at_start = at_start + heat.step_back(h / 2, c, kept.half, kept.middle, at_middle, inputs, both)
        self._owed = both.pop(self.name)
        if kept.first:
            at_start = at_start + self.body.pull(kept.before, self._owed, wanted, both)
            self._owed = None
        sums.update(both)
        return at_start

    def step_tangents(self, h, c, dc, numbers: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """One step of the state and of m tangents."""
        if self.now is None or self._moving is None:
            self.now = self.body.equilibrium(c)
            self._moving = self.body.push(c, dc, numbers)
        middle, d_middle = self._matrices(self.now).step_tangents(h / 2, c, dc, numbers, (self.name, self._moving))
        self.now = self.body.equilibrium(middle)
        self._moving = self.body.push(middle, d_middle, numbers)
        return self._matrices(self.now).step_tangents(h, c, dc, numbers, (self.name, self._moving))

    def hold(self) -> Any:
        """The step just done, with its stress held: what `held` makes matrices of."""
        assert self.now is not None and self._heat is not None
        heat = self._heat[1]
        self.memory -= heat.size
        if self.memory > 0:
            self._heat = None  # not destroyed with the next
            return heat
        return self.now.von_mises

    def held(self, kept: Any) -> Heat:
        """Matrices of a step that was held."""
        if isinstance(kept, Heat):
            return kept
        self._set(kept)
        if self._heat is not None:
            self._heat[1].destroy()
        self._heat = (None, Heat(self.diffusion, self.tolerance))
        return self._heat[1]
