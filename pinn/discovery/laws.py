"""Growth laws that are learned: per-cell rates as a small network or a table, and short formulas beside them.

All are terms like any other, pointwise functions of the primitives that every solver has. Those that are learned share
one form,

    growth(u) = u (1 - u) s(u),    s > 0 and bounded,

which says no more than that cells come from cells and that growth ends at the carrying capacity, as the cell fraction's
definition has it. Logistic growth is a constant s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy.interpolate import CubicSpline

from biomodel.errors import ModelError
from biomodel.parameters import LogNormal, Normal, NumpyOps, Operand, Parameter, Prior
from biomodel.solvers.base import Context
from biomodel.terms import JARRETT, LALEH, Growth

__all__ = ["Allee", "NetworkGrowth", "Power", "Richards", "TableGrowth"]

LAGERGREN = "Lagergren et al. 2020, PLoS Comput Biol 16:e1008462, doi:10.1371/journal.pcbi.1008462"
#: Cell fraction about which the scale of cell fractions turns from linear to logarithmic. Tumour spans decades of it
#: from its middle to its rim, and growth laws differ most where cells are sparse.
SPARSE = 1e-3
#: Bounds of a rate s, 1/day, as wide as those of the growth laws with a formula.
RATES = (1e-6, 20.0)


def _clipped(u, ops) -> Operand:
    """u kept to [0, 1]: what a solver under- or overshoots by is no place to extrapolate a learned function to."""
    return ops.where(u > 0, ops.where(u < 1, u, 1.0), 0.0)


def _scaled(u, ops) -> Operand:
    """Place of u on a scale from 0 to 1 that is linear for sparse cells and logarithmic for the rest."""
    return ops.log(1 + _clipped(u, ops) / SPARSE) / math.log(1 + 1 / SPARSE)


@dataclass(frozen=True)
class NetworkGrowth(Growth):
    """Growth k u (1 - u) exp(N(u)) with a small network N, whose weights are the term's parameters.

    N(u) = sum_j a_j sigmoid(w_j (x - b_j)) with x = log(1 + 1000 u), scaled to [0, 1]: bounded by the sum of |a_j|,
    and 0 at the priors' medians, where growth is logistic. After Lagergren et al. 2020,
    doi:10.1371/journal.pcbi.1008462.

    Parameters
    ----------
    k : Prior
        Of the rate, 1/day.
    units : int
        Sigmoids, so 3 units + 1 parameters.
    departure : float
        Prior sd of each a_j: how far, in logarithms, the law may depart from the logistic one.

    Examples
    --------
    >>> from biomodel.testing import check_term
    >>> check_term(NetworkGrowth(units=3))
    """

    k: Prior = LogNormal(0.05, 1.0)
    units: int = 4
    departure: float = 1.0

    def __post_init__(self):
        if self.units < 1 or not self.departure > 0:
            raise ModelError(
                f"NetworkGrowth: units {self.units} and departure {self.departure}; expected at least one unit and a "
                "positive number."
            )

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        found = [Parameter("k", "1/day", self.k, (1e-6, 2.0), JARRETT, "rate of the logistic part")]
        for j in range(self.units):
            centre = (j + 0.5) / self.units
            found += [
                Parameter(f"a{j}", "1", Normal(0.0, self.departure), (-8.0, 8.0), LAGERGREN, "height of a sigmoid"),
                # Steep enough that each of the sigmoids turns in its own part of [0, 1], and none folds over.
                Parameter(f"w{j}", "1", Normal(1.5 * self.units, 1.0), (0.1, 40.0), LAGERGREN, "its steepness"),
                Parameter(f"b{j}", "1", Normal(centre, 0.5 / self.units), (-1.0, 2.0), LAGERGREN, "its middle"),
            ]
        return tuple(found)

    def rate(self, u, p, c, ops) -> Operand:
        x = _scaled(u, ops)
        n = sum(p[f"a{j}"] / (1 + ops.exp(-p[f"w{j}"] * (x - p[f"b{j}"]))) for j in range(self.units))
        return p["k"] * u * (1 - u) * ops.exp(n)


@dataclass(frozen=True)
class TableGrowth(Growth):
    """Growth u (1 - u) s(u), log s a cubic spline through values in a table: positive and smooth, whatever they are.

    The spline is natural, in log(1 + 1000 u).

    Parameters
    ----------
    knots : tuple of float
        Cell fractions, increasing from 0 to 1.
    s : tuple of Prior
        Of s at the knots, 1/day; `Fixed` ones make the table known.

    Examples
    --------
    >>> from biomodel.testing import check_term
    >>> check_term(TableGrowth())
    """

    knots: tuple[float, ...] = (0.0, 0.003, 0.015, 0.06, 0.25, 1.0)
    s: tuple[Prior, ...] = field(default=())

    def __post_init__(self):
        knots = tuple(float(t) for t in self.knots)
        if len(knots) < 4 or knots[0] != 0 or knots[-1] != 1 or min(np.diff(knots)) <= 0:
            raise ModelError(f"TableGrowth: knots {knots}; expected four or more that increase from 0 to 1.")
        object.__setattr__(self, "knots", knots)
        object.__setattr__(self, "s", tuple(self.s) or tuple(LogNormal(0.05, 1.0) for _ in knots))
        if len(self.s) != len(knots):
            raise ModelError(f"TableGrowth: {len(knots)} knots, but {len(self.s)} priors of s.")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(f"s{j}", "1/day", prior, RATES, LAGERGREN, f"s at cell fraction {t:g}")
            for j, (t, prior) in enumerate(zip(self.knots, self.s, strict=True))
        )

    @cached_property
    def _slopes(self) -> np.ndarray:
        """(n, n): slopes at the knots from values there, those of the natural cubic spline."""
        return np.asarray(CubicSpline(self._places, np.eye(len(self.knots)), bc_type="natural")(self._places, 1))

    @cached_property
    def _places(self) -> list[float]:
        """Places of the knots on the scale of cell fractions."""
        return [float(_scaled(np.float64(t), NumpyOps)) for t in self.knots]

    def rate(self, u, p, c, ops) -> Operand:
        y = [ops.log(p[f"s{j}"]) for j in range(len(self.knots))]
        m = [sum(float(a) * v for a, v in zip(row, y, strict=True)) for row in self._slopes]
        x = _scaled(u, ops)
        # Horner's scheme with the coefficients of the piece that holds u: one cubic, whatever the number of pieces.
        pieces = []
        for j, (low, high) in enumerate(zip(self._places[:-1], self._places[1:], strict=True)):
            h = high - low
            steep = (y[j + 1] - y[j]) / h
            bent = (3 * steep - 2 * m[j] - m[j + 1]) / h
            pieces.append((low, y[j], m[j], bent, (m[j] + m[j + 1] - 2 * steep) / h**2))
        chosen = pieces[-1]
        for j in range(len(pieces) - 2, -1, -1):
            chosen = tuple(
                ops.where(x < self._places[j + 1], own, other) for own, other in zip(pieces[j], chosen, strict=True)
            )
        low, c0, c1, c2, c3 = chosen
        d = x - low
        return u * (1 - u) * ops.exp(c0 + d * (c1 + d * (c2 + d * c3)))


@dataclass(frozen=True)
class Richards(Growth):
    """Generalised logistic growth, k u (1 - u^q): logistic at q = 1, towards Gompertz as q falls to 0."""

    k: Prior = LogNormal(0.05, 1.0)
    q: Prior = LogNormal(1.0, 1.0)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return (
            Parameter("k", "1/day", self.k, RATES, LALEH, "rate of sparse cells"),
            Parameter("q", "1", self.q, (1e-3, 20.0), LALEH, "how abruptly growth ends"),
        )

    def rate(self, u, p, c, ops) -> Operand:
        return p["k"] * u * (1 - _power(u, p["q"], ops))


@dataclass(frozen=True)
class Allee(Growth):
    """Logistic growth with a weak Allee effect, k u (1 - u) u / (u + a): sparse cells divide more slowly.

    As seen in cultures of breast cancer cells (Johnson et al. 2019, doi:10.1371/journal.pbio.3000399).
    """

    k: Prior = LogNormal(0.05, 1.0)
    a: Prior = LogNormal(0.05, 1.0)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        source = "Johnson et al. 2019, doi:10.1371/journal.pbio.3000399"
        return (
            Parameter("k", "1/day", self.k, RATES, source, "rate of dense cells"),
            Parameter("a", "1", self.a, (1e-4, 10.0), source, "cell fraction at which growth is halved"),
        )

    def rate(self, u, p, c, ops) -> Operand:
        x = _clipped(u, ops)
        return p["k"] * u * (1 - u) * x / (x + p["a"])


@dataclass(frozen=True)
class Power(Growth):
    """Growth k u^q (1 - u): of a rim at q < 1 (Benzekry et al. 2014, doi:10.1371/journal.pcbi.1003800)."""

    k: Prior = LogNormal(0.05, 1.0)
    q: Prior = LogNormal(1.0, 0.5)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        source = "Benzekry et al. 2014, doi:10.1371/journal.pcbi.1003800"
        return (
            Parameter("k", "1/day", self.k, RATES, source, "rate of dense cells"),
            Parameter("q", "1", self.q, (0.05, 5.0), source, "exponent; 1 is logistic"),
        )

    def rate(self, u, p, c, ops) -> Operand:
        return p["k"] * u * (1 - u) * _power(u, p["q"] - 1, ops)


def _power(u, exponent, ops) -> Operand:
    """u^exponent, held constant below a cell fraction of 1e-4: there slopes of broken powers have no bound."""
    return ops.exp(exponent * ops.log(ops.where(u > 1e-4, u, 1e-4)))


def at(term: Growth, values, u: Sequence[float] | np.ndarray) -> np.ndarray:
    """Growth (n,) at cell fractions (n,), 1/day, for values of the term's parameters by short name."""
    return np.asarray(term.rate(np.asarray(u, float), values, Context(), NumpyOps))


def spread_over(low: float, high: float, count: int) -> np.ndarray:
    """Cell fractions from low to high, evenly placed on the learned laws' own scale."""
    places = np.linspace(math.log1p(low / SPARSE), math.log1p(high / SPARSE), count)
    return np.clip(SPARSE * np.expm1(places), low, high)
