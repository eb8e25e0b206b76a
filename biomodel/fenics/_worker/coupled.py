"""Diffusion that follows the stress which the evolving state itself makes.

Stress is solved once per step of diffusion, at a prediction of the state in the step's middle: half a step of diffusion
with the coefficient of the step before. That is second order in the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .elasticity import Elasticity, Stress
from .forms import Diffusion
from .mesh import Space
from .replay import replay
from .stepping import Heat


class Body:
    """The stress that a state makes, with Young's modulus and the pressure of the cells as tapes.

    Parameters
    ----------
    space : Space
    elasticity : Elasticity
    young, pressure : mapping
        Tapes with the input ``u``; they are evaluated at the cells' centres.
    values : mapping of str to float or ndarray (cells,)
        Their other inputs, fields in the sender's order.
    """

    def __init__(self, space: Space, elasticity: Elasticity, young, pressure, values: Mapping[str, Any]):
        self.space, self.elasticity, self.tapes = space, elasticity, (young, pressure)
        self.values = {n: v[space.cell_of] if np.ndim(v) else float(v) for n, v in values.items()}
        elasticity.restart()

    def stress(self, u: np.ndarray) -> Stress:
        """Stress at a state, given by this rank's nodal values."""
        inside = self.space.at_centres(u)
        values = {**self.values, "u": inside}
        young, pressure = (np.broadcast_to(replay(tape, values)[0], inside.shape) for tape in self.tapes)
        return self.elasticity.solve(young, pressure)


class CoupledHeat:
    """Steps of diffusion whose coefficient reads the von Mises stress; takes the place of `Heat` in a run.

    Parameters
    ----------
    diffusion : Diffusion
    body : Body
    name : str
        The coefficient's input that is the stress.
    tolerance : float
        As that of `Heat`.
    """

    def __init__(self, diffusion: Diffusion, body: Body, name: str, tolerance: float):
        self.diffusion, self.body, self.name, self.tolerance = diffusion, body, name, tolerance
        self._heat: Heat | None = None
        self.solves = self.iterations = 0

    def _refresh(self, u: np.ndarray) -> Heat:
        """Matrices at the stress of a state."""
        self.diffusion.set_cells(self.name, self.body.stress(u).von_mises)
        if self._heat is not None:
            self._heat.destroy()
        self._heat = Heat(self.diffusion, self.tolerance)
        return self._heat

    def step(self, h: float, c: np.ndarray) -> tuple[None, np.ndarray]:
        """One step with the stress of its middle."""
        before = self._heat or self._refresh(c)
        _, middle = before.step(h / 2, c)
        self._count(before)
        heat = self._refresh(middle)
        _, after = heat.step(h, c)
        self._count(heat)
        return None, after

    def _count(self, heat: Heat) -> None:
        self.solves, self.iterations = self.solves + heat.solves, self.iterations + heat.iterations
        heat.solves = heat.iterations = 0
