"""Levenberg-Marquardt on the residual alone, and the tangent along which trained weights follow the parameters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from biomodel.errors import NotFiniteError
from pinn.residuals import LARGEST_EXPONENT, Direction, Residual

#: Damping, relative to the mean of J'J's diagonal: where it starts, and its bounds. All weights are damped alike: when
#: each is damped by its own entry, those without effect run away and the search stalls at a residual of some per cent.
DAMPING, LEAST, MOST = 1e-2, 1e-13, 1e4
#: Damping of tangents: as little as the factorisation bears.
TANGENT = 1e-11
#: Half the geodesic acceleration is added to a step unless it is longer than this share of it. The valley of small
#: residuals is narrow and bent; along its tangent alone the same number of iterations ends ten times higher.
BEND = 0.75
#: The acceleration is measured at this share of the step.
NEAR = 0.1
#: A search has stalled when this many iterations together lower the residual by less than this share.
WINDOW, GAIN = 30, 0.05


@dataclass(eq=False)
class Trained:
    """Where the training of the weights stands.

    Attributes
    ----------
    w : tensor, shape (count,)
    rms : float
        Root mean square of the residual over that of the cell fraction at the points.
    damping : float
    iterations : int
        Spent in all.
    """

    w: torch.Tensor
    rms: float = math.inf
    damping: float = DAMPING
    iterations: int = 0


def _norm(r: torch.Tensor) -> float:
    return float(r.square().mean().sqrt())


def _factor(a: torch.Tensor, damping: float) -> tuple[torch.Tensor | None, float]:
    """Cholesky factor of J'J with damping, None where it has none; and what was added to the diagonal."""
    added = damping * float(a.diagonal().mean())
    damped = a.clone()
    damped.diagonal().add_(added)
    found, info = torch.linalg.cholesky_ex(damped)
    return (None if int(info) else found), added


class Misfit(Protocol):
    """What `train` makes small: a function of the weights with its derivative, and the state for its scale."""

    def value(self, w: torch.Tensor) -> torch.Tensor | None:
        """Misfits (n,), or None where the weights are beyond all bounds."""

    def linear(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Misfits (n,) and their derivatives (n, count)."""

    def state(self, w: torch.Tensor) -> torch.Tensor:
        """Cell fraction (n,)."""


def _acceleration(misfit: Misfit, w, step, r, j, factor) -> torch.Tensor | None:
    """Half the geodesic acceleration along a step (count,); None where it cannot be had.

    Transtrum and Sethna 2012, arXiv:1201.5885.
    """
    near = misfit.value(w + NEAR * step)
    if near is None:
        return None
    curvature = 2 / NEAR * ((near - r) / NEAR - j @ step)
    return -0.5 * torch.cholesky_solve((j.T @ curvature)[:, None], factor)[:, 0]


def train(misfit: Misfit, state: Trained, target: float, iterations: int) -> Trained:
    """Lower a misfit by Levenberg-Marquardt (Nielsen's damping) until it is below `target`, or stalls.

    Parameters
    ----------
    misfit : Residual or Splitting
        With parameters and start held.
    state : Trained
        Where to begin; its `rms` need not be up to date.
    target : float
        Relative root mean square at which to stop.
    iterations : int
        Most iterations.

    Returns
    -------
    Trained
    """
    w, damping, spent = state.w, state.damping, 0
    history: list[float] = []
    raised = 2.0
    scale = _norm(misfit.state(w))
    r, j = misfit.linear(w)
    now = _norm(r)
    while spent < iterations and now > target * scale:
        history.append(now)
        if len(history) > WINDOW and history[-1] > (1 - GAIN) * history[-1 - WINDOW]:
            break
        a = j.T @ j
        gradient = j.T @ r
        accepted = False
        for _ in range(12):
            factor, added = _factor(a, damping)
            if factor is not None:
                step = -torch.cholesky_solve(gradient[:, None], factor)[:, 0]
                predicted = -float(step @ gradient) + added * float(step @ step)
                bent = _acceleration(misfit, w, step, r, j, factor)
                if bent is not None and float(bent.norm()) < BEND * float(step.norm()):
                    step = step + bent
                trial = misfit.value(w + step)
                new = math.inf if trial is None else _norm(trial)
                ratio = (now**2 - new**2) * len(r) / max(predicted, 1e-300) if math.isfinite(new) else -1.0
                if ratio > 0:
                    accepted = True
                    break
            damping = min(damping * raised, MOST)
            raised *= 2
        spent += 1
        if not accepted:
            break
        damping = max(damping * max(0.1, 1 - (2 * min(ratio, 1.0) - 1) ** 3), LEAST)
        raised = 2.0
        w = w + step
        r, j = misfit.linear(w)
        now = _norm(r)
        scale = _norm(misfit.state(w))
    return Trained(w, now / scale, damping, state.iterations + spent)


def tangents(residual: Residual, w: torch.Tensor, directions: list[Direction]) -> torch.Tensor:
    """Derivatives (p, count) of the weights that keep the residual least, by the implicit function theorem.

    At a small residual r(w, p) the weights follow the parameters along J_w dw = -J_p dp in least squares.
    """
    _, j = residual.linear(w)
    a = j.T @ j
    right = j.T @ residual.along(w, directions).T
    damping = TANGENT
    while (factor := _factor(a, damping)[0]) is None:
        damping *= 10
        if damping > MOST:
            raise NotFiniteError(
                "PinnSolver: the residual's derivatives by the weights are not finite; a growth law with an infinite "
                "slope does that. Use bm.TorchSolver() for it."
            )
    return -torch.cholesky_solve(right, factor).T


class Splitting:
    """A first guess to begin training from: the carried start, on which growth and treatment then act point by point.

    That is one step of operator splitting, with an error of first order in the span; the misfit of the network's state
    to it has the interface of a residual.
    """

    STEPS = 16

    def __init__(self, residual: Residual):
        self.equation = residual.equation
        t, medium = self.equation.tau, self.equation.medium
        b = self.equation.carried[0].clamp_min(1e-12)
        q = torch.zeros_like(t)
        h = 1.0 / self.STEPS
        for i in range(self.STEPS):
            # Heun's method along each point's own time; the exponent of treatment is zero where it begins.
            past = [medium.spared((i + k) * h * t) for k in (0, 1)]
            first = self._rate(torch.exp(q - past[0]) * b)
            second = self._rate(torch.exp(q + h * t * first - past[1]) * b)
            q = q + h * t * (first + second) / 2
        self.target = torch.exp(q - medium.exponent) * self.equation.carried[0]

    def _rate(self, u: torch.Tensor) -> torch.Tensor:
        return self.equation.medium.growth(u)[0] / u

    def value(self, w: torch.Tensor) -> torch.Tensor | None:
        """Misfit of the cell fraction (n,)."""
        n = self.equation.network.value(w, self.equation.inputs[0])[0]
        if not bool((self.equation.tau * n).abs().max() < LARGEST_EXPONENT):
            return None  # as the residual itself would
        return self.state(w) - self.target

    def state(self, w: torch.Tensor) -> torch.Tensor:
        """Cell fraction of the network (n,)."""
        return self.equation.value(w)

    def linear(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Misfit and its derivatives by the weights (n, count)."""
        equation, t = self.equation, self.equation.tau
        out, kept = equation.network.forward(w, equation.inputs)
        u = torch.exp(t * out[0] - equation.medium.exponent) * equation.carried[0]
        cotangents = torch.zeros_like(out)
        cotangents[0] = u * t
        return u - self.target, equation.network.jacobian(w, kept, cotangents)
