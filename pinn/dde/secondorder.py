"""Levenberg-Marquardt for any network and physical parameters together, by `torch.func`.

Unknowns are one flat vector v: the weights of any differentiable network, then the coordinates of physical parameters.
What is to be small is a list of :class:`Rows`: residuals of an equation, data minus prediction over their noise,
parameters minus prior mean over prior sd. Half their sum of squares is minus the log of the posterior, so that steps,
stops and covariances have absolute units. Small systems are factorised (`Dense`), large ones solved by conjugate
gradients with products only (`MatrixFree`). Points go through in chunks; where memory runs out the chunks become
smaller (:mod:`pinn.memory`).

:mod:`pinn.training` does the same for one fixed small network with derivatives written by hand, ten times faster.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch.func import grad_and_value, jvp, vjp, vmap

from pinn.memory import Chunks

with warnings.catch_warnings():
    # PyTorch's own first use of forward mode warns of something that it deprecates itself.
    warnings.simplefilter("ignore", DeprecationWarning)
    jvp(torch.tanh, (torch.zeros(1),), (torch.zeros(1),))

#: Damping, relative to the mean diagonal of J'J: where it starts, and its bounds.
DAMPING, LEAST, MOST = 1e-2, 1e-13, 1e6
#: Half the geodesic acceleration is added to a step unless it is longer than this share of it, and it is measured at
#: this share of the step (Transtrum and Sethna 2012, arXiv:1201.5885).
BEND, NEAR = 0.75, 0.1
#: Trials of one iteration.
TRIALS = 12
#: Random vectors for the diagonal of J'J where J is not formed.
PROBES = 12


@dataclass(eq=False)
class Rows:
    """Weighted misfits of one kind at many points.

    Parameters
    ----------
    function : callable
        (v, x) -> one number per point (m,), of the unknowns (n,) and points (m, k), each for itself, in operations
        that `torch.func` can transform.
    points : tensor, shape (m * group, k)
    weight : tensor, shape (m,) or ()
        What the misfit is multiplied by: one over its standard deviation.
    target : tensor, shape (m,) or ()
        Subtracted from the function first.
    group : int
        So many neighbouring points are averaged to one row, as over a voxel.
    plain : callable, optional
        The same as `function` by other means, where values alone are asked for.
    """

    function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    points: torch.Tensor
    weight: torch.Tensor | float = 1.0
    target: torch.Tensor | float = 0.0
    group: int = 1
    plain: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    chunks: Chunks = field(default_factory=Chunks)

    def _finished(self, raw: torch.Tensor) -> torch.Tensor:
        return self.weight * (raw.reshape(-1, self.group).mean(1) - self.target)

    def value(self, v: torch.Tensor) -> torch.Tensor:
        """Misfits (m,)."""
        function = self.plain or self.function
        return self._finished(torch.cat(self.chunks.over(lambda x: function(v, x).detach(), self.points)))

    def traced(self, v: torch.Tensor) -> torch.Tensor:
        """Misfits (m,), for `torch.func`."""
        return self._finished(torch.cat(self.chunks.over(lambda x: self.function(v, x), self.points)))

    def linear(self, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Misfits (m,) and their derivatives (m, n)."""
        both = vmap(grad_and_value(lambda w, x: self.function(w, x[None])[0]), (None, 0))

        def some(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            slopes, values = both(v, x)
            return slopes.detach(), values.detach()

        found = self.chunks.over(some, self.points)
        slopes = torch.cat([f[0] for f in found])
        if self.group > 1:
            slopes = slopes.reshape(-1, self.group, slopes.shape[1]).mean(1)
        weight = torch.as_tensor(self.weight, dtype=slopes.dtype).reshape(-1, 1)
        return self._finished(torch.cat([f[1] for f in found])), slopes * weight


class Linear(Protocol):
    """The misfit near one point: its value r (m,) and products with its derivative J (m, n)."""

    r: torch.Tensor
    gradient: torch.Tensor
    scale: float

    def push(self, step: torch.Tensor) -> torch.Tensor:
        """J step (m,)."""

    def pull(self, change: torch.Tensor) -> torch.Tensor:
        """J' change (n,)."""

    def solve(self, added: float, right: torch.Tensor) -> torch.Tensor | None:
        """(J'J + added I)^-1 right, for right (n,) or (n, p); None where it cannot be had."""


@dataclass(eq=False)
class _Formed:
    r: torch.Tensor
    j: torch.Tensor
    a: torch.Tensor
    gradient: torch.Tensor
    scale: float
    _factor: tuple[float, torch.Tensor | None] | None = None

    def push(self, step: torch.Tensor) -> torch.Tensor:
        return self.j @ step

    def pull(self, change: torch.Tensor) -> torch.Tensor:
        return self.j.T @ change

    def solve(self, added: float, right: torch.Tensor) -> torch.Tensor | None:
        if self._factor is None or self._factor[0] != added:
            damped = self.a.clone()
            damped.diagonal().add_(added)
            found, info = torch.linalg.cholesky_ex(damped)
            self._factor = (added, None if int(info) else found)
        factor = self._factor[1]
        if factor is None:
            return None
        solved = torch.cholesky_solve(right.reshape(len(right), -1), factor)
        return solved.reshape(right.shape)


@dataclass(frozen=True)
class Dense:
    """J formed and J'J factorised: for up to some thousand unknowns."""

    def at(self, rows: Sequence[Rows], v: torch.Tensor) -> Linear:
        """The misfit near v."""
        found = [one.linear(v) for one in rows]
        r, j = torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])
        a = j.T @ j
        return _Formed(r, j, a, j.T @ r, float(a.diagonal().mean()))


@dataclass(eq=False)
class _Products:
    r: torch.Tensor
    v: torch.Tensor
    function: Callable[[torch.Tensor], torch.Tensor]
    back: Callable[[torch.Tensor], torch.Tensor]
    gradient: torch.Tensor
    diagonal: torch.Tensor
    scale: float
    most: int
    tolerance: float

    def push(self, step: torch.Tensor) -> torch.Tensor:
        return jvp(self.function, (self.v,), (step,))[1]

    def pull(self, change: torch.Tensor) -> torch.Tensor:
        return self.back(change)

    def solve(self, added: float, right: torch.Tensor) -> torch.Tensor | None:
        if right.ndim == 2:
            columns = [self.solve(added, c) for c in right.T]
            return None if any(c is None for c in columns) else torch.stack(columns, 1)  # type: ignore[arg-type]
        x, rest = torch.zeros_like(right), right.clone()
        preconditioner = 1 / (self.diagonal + added)
        z = preconditioner * rest
        p, now = z.clone(), float(rest @ z)
        target = self.tolerance**2 * now
        for _ in range(self.most):
            q = self.pull(self.push(p)) + added * p
            step = now / float(p @ q)
            x, rest = x + step * p, rest - step * q
            z = preconditioner * rest
            new = float(rest @ z)
            if not math.isfinite(new):
                return None
            if new <= target:
                break
            p, now = z + new / now * p, new
        return x


@dataclass(frozen=True)
class MatrixFree:
    """Conjugate gradients with Jacobi preconditioning and products J p, J'q only: for networks too large for J'J.

    Parameters
    ----------
    most : int
        Most iterations per step.
    tolerance : float
        Relative size of the rest (in the preconditioner's norm) at which a solve ends.
    seed : int
        Of the random vectors that give the diagonal of J'J, E[(J' e)²] for random signs e.
    """

    most: int = 200
    tolerance: float = 1e-3
    seed: int = 0

    def at(self, rows: Sequence[Rows], v: torch.Tensor) -> Linear:
        """The misfit near v."""

        def function(w: torch.Tensor) -> torch.Tensor:
            return torch.cat([one.traced(w) for one in rows])

        r, pull = vjp(function, v)[:2]

        def back(change: torch.Tensor) -> torch.Tensor:
            return pull(change, retain_graph=True)[0]

        generator = torch.Generator().manual_seed(self.seed)
        total = torch.zeros_like(v)
        for _ in range(PROBES):
            signs = torch.randint(0, 2, r.shape, generator=generator).to(r) * 2 - 1
            total = total + back(signs) ** 2
        diagonal = total / PROBES
        diagonal = diagonal + 1e-3 * diagonal.mean()
        return _Products(r.detach(), v, function, back, back(r.detach()), diagonal, float(diagonal.mean()),
                         self.most, self.tolerance)  # fmt: skip


Algebra = Dense | MatrixFree


@dataclass(frozen=True, eq=False)
class Found:
    """Where a search ended.

    Attributes
    ----------
    v : tensor, shape (n,)
    objective : float
        Half the sum of squares of all rows.
    damping : float
    iterations : int
    settled : bool
        Whether it ended because nothing was to be gained any more.
    linear : Linear
        The misfit near v.
    """

    v: torch.Tensor
    objective: float
    damping: float
    iterations: int
    settled: bool
    linear: Linear


def minimise(rows: Sequence[Rows], v: torch.Tensor, algebra: Algebra | None = None, iterations: int = 100,
             gain: float = 0.01, patience: int = 3, damping: float = DAMPING,
             progress: Callable[[str], None] | None = None) -> Found:  # fmt: skip
    """Lower half the sum of squares by Levenberg-Marquardt (Nielsen's damping, geodesic acceleration).

    Parameters
    ----------
    gain : float
        An iteration that lowers the objective by less than this counts as idle; the search ends after `patience` of
        them in a row. The objective is minus a log posterior: 0.5 is one standard deviation.
    """
    algebra = algebra or Dense()

    def total(w: torch.Tensor) -> float:
        return sum(0.5 * float(one.value(w).square().sum()) for one in rows)

    linear = algebra.at(rows, v)
    now = 0.5 * float(linear.r.square().sum())
    raised, idle, spent = 2.0, 0, 0
    while spent < iterations and idle < patience:
        step, new, ratio = None, math.inf, -1.0
        for _ in range(TRIALS):
            added = damping * linear.scale
            step = linear.solve(added, -linear.gradient)
            if step is not None:
                predicted = 0.5 * (-float(step @ linear.gradient) + added * float(step @ step))
                step = _bent(rows, v, step, linear, added)
                new = total(v + step)
                ratio = (now - new) / max(predicted, 1e-300) if math.isfinite(new) else -1.0
                if ratio > 0:
                    break
            damping, raised = min(damping * raised, MOST), 2 * raised
        spent += 1
        if step is None or ratio <= 0:
            return Found(v, now, damping, spent, True, linear)
        damping = max(damping * max(0.1, 1 - (2 * min(ratio, 1.0) - 1) ** 3), LEAST)
        raised = 2.0
        idle = idle + 1 if now - new < gain else 0
        v, now = v + step, new
        linear = algebra.at(rows, v)
        if progress:
            progress(f"iteration {spent}: objective {now:.6g}, damping {damping:.1e}")
    return Found(v, now, damping, spent, idle >= patience, linear)


def _bent(rows: Sequence[Rows], v: torch.Tensor, step: torch.Tensor, linear: Linear, added: float) -> torch.Tensor:
    """The step with half its geodesic acceleration."""
    near = torch.cat([one.value(v + NEAR * step) for one in rows])
    curvature = 2 / NEAR * ((near - linear.r) / NEAR - linear.push(step))
    if not bool(torch.isfinite(curvature).all()):
        return step
    bent = linear.solve(added, -0.5 * linear.pull(curvature))
    return step + bent if bent is not None and float(bent.norm()) < BEND * float(step.norm()) else step


def marginal(linear: Linear, count: int, ridge: float = 1e-10) -> torch.Tensor:
    """Covariance (count, count) of the last unknowns with all others marginalised.

    With J'J the precision of all unknowns, it is the corner of its inverse. Weights that nothing informs are held by
    `ridge`, relative to the mean diagonal.

    Raises
    ------
    RuntimeError
        If J'J with the ridge cannot be factorised.
    """
    n = len(linear.gradient)
    right = torch.zeros(n, count, dtype=linear.gradient.dtype, device=linear.gradient.device)
    right[n - count :] = torch.eye(count, dtype=right.dtype, device=right.device)
    while (solved := linear.solve(ridge * linear.scale, right)) is None:
        if ridge > 1e-2:
            raise RuntimeError("marginal: J'J is not positive definite.")
        ridge *= 10
    corner = solved[n - count :]
    return (corner + corner.T) / 2
