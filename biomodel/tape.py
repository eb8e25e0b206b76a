"""Tapes: a term's pointwise function as a flat list of primitives, so that it can cross a process boundary.

The function ``f(u, p, c, ops)`` is called once with recording operands and a recording `ops`. What comes out is plain
data (see :mod:`biomodel.fenics._worker.replay`), which numpy evaluates and UFL turns into an expression. A derivative
of a tape is a tape, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

from biomodel.errors import ModelError, TumorcastError
from biomodel.fenics._worker.replay import NUMPY, replay

__all__ = ["Operand", "Recorder", "Tape", "gradient", "record"]

_MEND = (
    "A term is recorded once and evaluated by every solver, so it may use only u, p, c and ops: write "
    "ops.where(condition, a, b) instead of if, and, or, min and max, and ops.exp, ops.log, ops.sqrt instead of other "
    "functions."
)


@dataclass(frozen=True)
class Tape:
    """A recorded function.

    Attributes
    ----------
    rows : tuple of tuple
        ``("input", name)``, ``("const", value)`` or ``(primitive, i, ...)`` with numbers of earlier rows.
    outputs : tuple of int
        Rows that are the results; more than one for tensors and gradients.
    """

    rows: tuple[tuple, ...]
    outputs: tuple[int, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the inputs that the results depend on."""
        return tuple(row[1] for row in self.rows if row[0] == "input")

    def json(self) -> dict[str, Any]:
        """The tape as plain data."""
        return {"rows": [list(row) for row in self.rows], "outputs": list(self.outputs)}

    def __call__(self, values: Mapping[str, Any], primitives: Mapping[str, Callable] = NUMPY) -> list:
        """Evaluate the results, with numpy unless other primitives are given."""
        return replay(self.json(), values, primitives)


class Recorder:
    """Makes operands and notes what is done with them; the same operation on the same operands is one row."""

    def __init__(self) -> None:
        self.rows: list[tuple] = []
        self._numbers: dict[tuple, int] = {}

    def _row(self, *row) -> Operand:
        if row not in self._numbers:
            self._numbers[row] = len(self.rows)
            self.rows.append(row)
        return Operand(self, self._numbers[row])

    def input(self, name: str) -> Operand:
        """An operand whose value is given at replay."""
        return self._row("input", name)

    def operand(self, value: Any) -> Operand:
        """A number as an operand; an operand as it is."""
        if isinstance(value, Operand):
            if value.recorder is not self:
                raise ModelError("a traced value was kept from one recording to the next. " + _MEND)
            return value
        try:
            number = float(value)
        except (TypeError, ValueError):
            raise ModelError(f"a pointwise function computes with {value!r}; expected a number. {_MEND}") from None
        if not math.isfinite(number):
            raise ModelError(f"a pointwise function computes with the constant {number}; expected a finite number.")
        return self._row("const", number)

    def apply(self, primitive: str, *operands: Any) -> Operand:
        """The result of a primitive; sums with 0, products with 0 and 1 and pure numbers are worked out at once."""
        args = [self.operand(x) for x in operands]
        known = [row[1] if (row := self.rows[x.number])[0] == "const" else None for x in args]
        if all(k is not None for k in known) and primitive not in ("where", "gt", "ge", "lt", "le", "and", "or", "not"):
            with np.errstate(all="ignore"):
                return self.operand(float(NUMPY[primitive](*(np.float64(k) for k in known))))
        if primitive in ("add", "mul"):
            neutral = 0.0 if primitive == "add" else 1.0
            for one, other in ((0, 1), (1, 0)):
                if known[one] == neutral:
                    return args[other]
                if primitive == "mul" and known[one] == 0:
                    return args[one]
        if primitive in ("sub", "div", "pow") and known[1] == (0.0 if primitive == "sub" else 1.0):
            return args[0]
        return self._row(primitive, *(x.number for x in args))

    def tape(self, results: Sequence[Any]) -> Tape:
        """The rows that the results need."""
        wanted = [self.operand(x).number for x in results]
        needed, stack = set(), list(wanted)
        while stack:
            number = stack.pop()
            if number not in needed:
                needed.add(number)
                row = self.rows[number]
                stack += row[1:] if row[0] not in ("input", "const") else ()
        order = {old: new for new, old in enumerate(sorted(needed))}
        rows = tuple(
            row if row[0] in ("input", "const") else (row[0], *(order[i] for i in row[1:]))
            for row in (self.rows[old] for old in order)
        )
        return Tape(rows, tuple(order[i] for i in wanted))


class Operand:
    """A traced value: arithmetic with it is recorded; its value is not known."""

    __slots__ = ("number", "recorder")

    def __init__(self, recorder: Recorder, number: int):
        self.recorder, self.number = recorder, number

    def _unknown(self, *_):
        raise ModelError("a pointwise function asks for the value of a traced operand (if, and, or, min, max, float). "
                         + _MEND)  # fmt: skip

    __bool__ = __float__ = __int__ = __index__ = __len__ = __iter__ = __array__ = _unknown
    __eq__ = __ne__ = _unknown
    __hash__ = object.__hash__

    def __array_ufunc__(self, ufunc, method, *inputs, **options):
        # A numpy number on the left of an operator arrives here.
        name = _UFUNCS.get(ufunc.__name__)
        if name is None or method != "__call__" or options:
            raise ModelError(f"a pointwise function calls numpy.{ufunc.__name__} on a traced operand. {_MEND}")
        return self.recorder.apply(name, *inputs)


_UFUNCS = {"add": "add", "subtract": "sub", "multiply": "mul", "divide": "div", "true_divide": "div", "power": "pow",
           "greater": "gt", "greater_equal": "ge", "less": "lt", "less_equal": "le", "negative": "neg",
           "absolute": "abs", "logical_and": "and", "logical_or": "or", "bitwise_and": "and",
           "bitwise_or": "or"}  # fmt: skip


def _operator(primitive: str, swapped: bool = False) -> Callable:
    def apply(self, *other):
        return self.recorder.apply(primitive, *((*other, self) if swapped else (self, *other)))

    return apply


for _name, _primitive in {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow", "and": "and",
                          "or": "or"}.items():  # fmt: skip
    setattr(Operand, f"__{_name}__", _operator(_primitive))
    setattr(Operand, f"__r{_name}__", _operator(_primitive, swapped=True))
for _name, _primitive in {"neg": "neg", "abs": "abs", "invert": "not", "gt": "gt", "ge": "ge", "lt": "lt",
                          "le": "le"}.items():  # fmt: skip
    setattr(Operand, f"__{_name}__", _operator(_primitive))


class _RecordingOps:
    """The primitive functions of terms, recorded."""

    def __init__(self, recorder: Recorder):
        for name in ("exp", "log", "sqrt", "xlogx", "where"):
            setattr(self, name, lambda *x, _name=name: recorder.apply(_name, *x))

    def __getattr__(self, name: str):
        raise ModelError(f"a pointwise function uses ops.{name}; there are exp, log, sqrt, xlogx and where.")


class _RecordedContext(SimpleNamespace):
    def __getattr__(self, name: str):
        raise ModelError(f"a term reads c.{name}, which it does not declare; add {name!r} to the term's `fields`.")


def record(
    function: Callable,
    parameters: Sequence[str] = (),
    fields: Sequence[str] = (),
    agents: Sequence[str] = (),
) -> Tape:
    """Record a pointwise function ``f(u, p, c, ops)``.

    Parameters
    ----------
    function : callable
        A term's `rate` or `coefficient`; it may return nested sequences (a tensor), whose entries become the outputs
        in row-major order.
    parameters : sequence of str
        Keys of `p`; the inputs are called ``p.<name>``.
    fields : sequence of str
        Attributes of `c`; the inputs are called ``c.<name>``.
    agents : sequence of str
        Keys of ``c.level`` and ``c.exposure``; the inputs are called ``level.<agent>`` and ``exposure.<agent>``.

    Returns
    -------
    Tape
        With the input ``u`` beside those.

    Raises
    ------
    ModelError
        If the function branches on a traced value, or uses what a tape cannot hold.

    Examples
    --------
    >>> tape = record(lambda u, p, c, ops: p["k"] * u * (1 - u), ["k"])
    >>> tape({"u": 0.5, "p.k": 0.1})
    [0.025]
    """
    recorder = Recorder()
    context: dict[str, Any] = {name: recorder.input(f"c.{name}") for name in fields}
    if agents:
        context.update({w: {a: recorder.input(f"{w}.{a}") for a in agents} for w in ("level", "exposure")})
    values = {name: recorder.input(f"p.{name}") for name in parameters}
    try:
        result = function(recorder.input("u"), values, _RecordedContext(**context), _RecordingOps(recorder))
    except TumorcastError:
        raise
    except Exception as error:
        name = getattr(function, "__qualname__", repr(function))
        raise ModelError(f"{name} could not be recorded ({type(error).__name__}: {error}). {_MEND}") from error
    return recorder.tape(_flat(result))


def _flat(result: Any) -> list:
    if isinstance(result, (tuple, list)) or (isinstance(result, np.ndarray) and result.ndim):
        return [x for part in result for x in _flat(part)]
    return [result]


def gradient(tape: Tape, wrt: Sequence[str], output: int = 0) -> Tape:
    """Differentiate one output of a tape.

    Parameters
    ----------
    tape : Tape
    wrt : sequence of str
        Names of inputs.
    output : int
        Which of the tape's outputs.

    Returns
    -------
    Tape
        Its outputs are the chosen one and then its derivative by each of `wrt`.
    """
    r = Recorder()
    values: list[Operand] = []
    moving: list[bool] = []
    for name, *args in tape.rows:
        if name in ("input", "const"):
            values.append(r.input(args[0]) if name == "input" else r.operand(args[0]))
            moving.append(name == "input" and args[0] in wrt)
        else:
            values.append(r.apply(name, *(values[i] for i in args)))
            moving.append(any(moving[i] for i in args))
    last = tape.outputs[output]
    pulled: dict[int, Any] = {last: r.operand(1.0)}
    for number in range(last, -1, -1):
        name, *args = tape.rows[number]
        if number not in pulled or not moving[number] or name in ("input", "const"):
            continue
        parts = _RULES[name](r, pulled[number], values[number], *(values[i] for i in args)) if name in _RULES else ()
        for i, part in zip(args, parts, strict=False):
            if part is not None and moving[i]:
                pulled[i] = part() if i not in pulled else pulled[i] + part()
    inputs = [(i, row[1]) for i, row in enumerate(tape.rows[: last + 1]) if row[0] == "input"]
    by_name: dict[str, Any] = {name: pulled.get(i, 0.0) for i, name in inputs}
    return r.tape([values[last], *(by_name.get(name, 0.0) for name in wrt)])


def _xlogx_slope(r: Any, g, u):
    positive = u > 0
    safe = r.apply("where", positive, u, 1.0)
    return r.apply("where", positive, g * (r.apply("log", safe) + 1.0), 0.0)


#: Derivative of each primitive by its operands, as (recorder, cotangent, result, operands...) -> one thunk each, called
#: only where the operand moves; None for operands without a derivative.
_RULES: dict[str, Callable[..., tuple]] = {
    "add": lambda r, g, y, a, b: (lambda: g, lambda: g),
    "sub": lambda r, g, y, a, b: (lambda: g, lambda: -g),
    "mul": lambda r, g, y, a, b: (lambda: g * b, lambda: g * a),
    "div": lambda r, g, y, a, b: (lambda: g / b, lambda: -g * y / b),
    "pow": lambda r, g, y, a, b: (lambda: g * b * a ** (b - 1.0), lambda: g * y * r.apply("log", a)),
    "neg": lambda r, g, y, a: (lambda: -g,),
    "abs": lambda r, g, y, a: (lambda: r.apply("where", a > 0, g, -g),),
    "exp": lambda r, g, y, a: (lambda: g * y,),
    "log": lambda r, g, y, a: (lambda: g / a,),
    "sqrt": lambda r, g, y, a: (lambda: 0.5 * g / y,),
    "xlogx": lambda r, g, y, a: (lambda: _xlogx_slope(r, g, a),),
    "where": lambda r, g, y, q, a, b: (
        None, lambda: r.apply("where", q, g, 0.0), lambda: r.apply("where", q, 0.0, g),
    ),
}  # fmt: skip
