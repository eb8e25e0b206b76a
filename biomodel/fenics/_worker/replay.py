"""Replay of a tape: the flat list of primitives to which a term's pointwise function was recorded.

A tape is a mapping ``{"rows": [...], "outputs": [...]}``. A row is ``["input", name]``, ``["const", value]`` or
``[primitive, i, ...]`` with the numbers of earlier rows; the outputs are numbers of rows. Whoever replays it supplies
the primitives by name, so that the same list is evaluated by numpy here and becomes an expression of UFL there.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

#: Every primitive and the number of its operands.
PRIMITIVES = {
    "add": 2, "sub": 2, "mul": 2, "div": 2, "pow": 2, "neg": 1, "abs": 1, "exp": 1, "log": 1, "sqrt": 1, "xlogx": 1,
    "where": 3, "gt": 2, "ge": 2, "lt": 2, "le": 2, "and": 2, "or": 2, "not": 1,
}  # fmt: skip


def _xlogx(u):
    positive = np.greater(u, 0)
    return np.where(positive, u * np.log(np.where(positive, u, 1.0)), 0.0)


#: The primitives on numpy arrays and floats.
NUMPY: dict[str, Callable] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow,
    "neg": operator.neg, "abs": np.abs, "exp": np.exp, "log": np.log, "sqrt": np.sqrt, "xlogx": _xlogx,
    "where": np.where, "gt": operator.gt, "ge": operator.ge, "lt": operator.lt, "le": operator.le,
    "and": np.logical_and, "or": np.logical_or, "not": np.logical_not,
}  # fmt: skip


def replay(tape: Mapping[str, Any], values: Mapping[str, Any], primitives: Mapping[str, Callable] = NUMPY) -> list:
    """Evaluate a tape.

    Parameters
    ----------
    tape : mapping
        As in the module's description.
    values : mapping of str to operand
        The inputs by name: floats or arrays for numpy, expressions for UFL.
    primitives : mapping of str to callable
        The back end's primitives, by the names in `PRIMITIVES`.

    Returns
    -------
    list
        One value per output.
    """
    found: list[Any] = []
    for name, *operands in tape["rows"]:
        if name == "input":
            found.append(values[operands[0]])
        elif name == "const":
            found.append(operands[0])
        else:
            found.append(primitives[name](*(found[i] for i in operands)))
    return [found[i] for i in tape["outputs"]]
