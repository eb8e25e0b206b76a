"""The pointwise reaction at the nodes: classical Runge-Kutta on its tape, with tangents and adjoint.

Between two breakpoints the reaction is an ordinary differential equation per node, u' = f(u, s(t)), where the inputs s
are numbers, nodal fields, and the levels and exposures of drugs, which the sender tabulates at each step's beginning,
middle and end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .replay import replay

#: Weight of each stage's slope in the result, and how far along the stage before it lies (in steps).
WEIGHTS, NODES, PLACES = (1 / 6, 1 / 3, 1 / 3, 1 / 6), (0.0, 0.5, 0.5, 1.0), (0, 1, 1, 2)


class Reaction:
    """One run's reaction.

    Parameters
    ----------
    tape, slopes : mapping
        The rate, and the same with its derivatives by ``u`` and each of `wrt` behind it.
    wrt : sequence of str
    values : mapping of str to float or ndarray (nodes,)
    tables : ndarray, shape (steps, 3, columns)
    columns : sequence of str
        Inputs that the tables hold.
    """

    def __init__(self, tape, slopes, wrt: Sequence[str], values: Mapping[str, Any], tables: np.ndarray, columns):
        self.tape, self.slopes, self.wrt = tape, slopes, list(wrt)
        self.values, self.tables, self.columns = dict(values), tables, list(columns)

    def _at(self, u: np.ndarray, step: int, place: int) -> dict[str, Any]:
        return {**self.values, **dict(zip(self.columns, self.tables[step, place], strict=True)), "u": u}

    def rate(self, u: np.ndarray, step: int, place: int) -> np.ndarray:
        """The rate at the beginning (0), middle (1) or end (2) of a step."""
        return np.broadcast_to(replay(self.tape, self._at(u, step, place))[0], u.shape)

    def _derivatives(self, u, step, place) -> list:
        return replay(self.slopes, self._at(u, step, place))

    def advance(self, u: np.ndarray, step: int, h: float) -> np.ndarray:
        """One Runge-Kutta step."""
        total, k = u.copy(), np.zeros_like(u)
        for weight, node, place in zip(WEIGHTS, NODES, PLACES, strict=True):
            k = self.rate(u + h * node * k if node else u, step, place)
            total += h * weight * k
        return total

    def derivative(self, u: np.ndarray, step: int, h: float) -> tuple[np.ndarray, np.ndarray]:
        """One step, and the derivative of its result by the state, node by node."""
        after, moved = self.tangent(u, np.ones((1, len(u))), step, h, {}, np.zeros((1, 3, len(self.columns))))
        return after, moved[0]

    def tangent(self, u, du, step: int, h: float, numbers: Mapping[str, np.ndarray],
                tables: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
        """One step of the state and of m tangents.

        Parameters
        ----------
        du : ndarray, shape (m, nodes)
        numbers : mapping of str to ndarray, shape (m,)
            Tangents of the inputs that are numbers.
        tables : ndarray, shape (m, 3, columns)
            Tangents of this step's tables.
        """
        total, d_total = u.copy(), du.copy()
        k, dk = np.zeros_like(u), np.zeros_like(du)
        for weight, node, place in zip(WEIGHTS, NODES, PLACES, strict=True):
            k, by_u, *by = self._derivatives(u + h * node * k if node else u, step, place)
            dk = by_u * (du + h * node * dk)
            for name, slope in zip(self.wrt, by, strict=True):
                moves = numbers.get(name)
                if name in self.columns:
                    moves = tables[:, place, self.columns.index(name)]
                if moves is not None and np.any(moves):
                    dk = dk + moves[:, None] * slope
            k = np.broadcast_to(k, u.shape)
            total += h * weight * k
            d_total += h * weight * dk
        return total, d_total

    def adjoint(self, u, lam, step: int, h: float, sums: dict[str, Any], tables: np.ndarray) -> np.ndarray:
        """Pull `lam` back through one step at the state u before it.

        Gradients by the inputs are added to `sums` (numbers, or arrays for nodal fields) and `tables` (3, columns).
        """
        stages, k = [], np.zeros_like(u)
        for node, place in zip(NODES, PLACES, strict=True):
            found = self._derivatives(u + h * node * k if node else u, step, place)
            k = np.broadcast_to(found[0], u.shape)
            stages.append(found[1:])
        back, later = lam.copy(), np.zeros_like(lam)
        for i in range(3, -1, -1):
            own = h * WEIGHTS[i] * lam + (h * NODES[i + 1] * later if i < 3 else 0.0)
            by_u, *by = stages[i]
            for name, slope in zip(self.wrt, by, strict=True):
                if name in self.columns:
                    tables[PLACES[i], self.columns.index(name)] += np.sum(own * slope)
                elif np.ndim(self.values[name]):
                    sums[name] += own * slope
                else:
                    sums[name] += np.sum(own * slope)
            later = by_u * own
            back += later
        return back
