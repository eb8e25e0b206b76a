"""Where and when the equation is asked for: points where the residual is large, weights that follow causality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pinn.dde.backend import dde
from pinn.physics import Physics

if TYPE_CHECKING:
    from pinn.dde.problem import Posed


@dataclass(frozen=True)
class Causal:
    """Weights that fall where the residual at earlier times is still large.

    w_i = exp(-tolerance sum_{k < i} L_k) with L_k the mean square residual of the k-th of `bins` equal times: Wang,
    Sankaran and Perdikaris 2024, doi:10.1016/j.cma.2024.116813. Here L_k is relative to the mean of all, so that one
    tolerance serves all problems; as the early residuals fall below the later ones, the weights even out.
    """

    tolerance: float = 1.0
    bins: int = 16

    def at(self, residual: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """Weights (n,) of squares, of residuals (n,) at times tau (n,); they carry no gradient."""
        squares = residual.detach().square()
        which = (tau.detach() * self.bins).long().clamp(0, self.bins - 1)
        total = torch.zeros(self.bins, dtype=squares.dtype).index_add(0, which, squares)
        count = torch.zeros(self.bins, dtype=squares.dtype).index_add(0, which, torch.ones_like(squares))
        loss = total / count.clamp_min(1)
        before = torch.cumsum(loss, 0) - loss
        return torch.exp(-self.tolerance * before / loss.mean().clamp_min(1e-300))[which]

    def weighted(self, residual: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        """The residual (n, 1) times the roots of its weights."""
        return residual * self.at(residual[:, 0], tau[:, 0]).sqrt()[:, None]


def draw(physics: Physics, count: int, seed: int) -> torch.Tensor:
    """Quasi-random places in the organ and times (n, d + 1), more of them near the first and the last day."""
    x = physics.geometry.inside(count, seed)
    return torch.cat((x[:, :-1], (1 - torch.cos(torch.pi * x[:, -1:])) / 2), 1)


def refined(posed: Posed, seed: int, power: float = 1.0, floor: float = 1.0, candidates: int = 8) -> torch.Tensor:
    """As many points (n, d + 1) as there are, drawn with density |r|^power / mean |r|^power + floor.

    Wu et al. 2023, doi:10.1016/j.cma.2022.115671 (RAD).

    Parameters
    ----------
    candidates : int
        From so many times as many.
    """
    count = len(posed.points)
    x = draw(posed.physics, candidates * count, seed)
    size = posed.residual(x).abs() ** power
    density = (size / size.mean().clamp_min(1e-300) + floor).numpy()
    chosen = np.random.default_rng(seed).choice(len(x), count, False, density / density.sum())
    return x[np.sort(chosen)]


class Refine(dde.callbacks.Callback):
    """Draw the points of the equation anew every `period` iterations, denser where the residual is large."""

    def __init__(self, posed: Posed, period: int = 1000, seed: int = 0):
        super().__init__()
        self.posed, self.period, self.seed, self.count = posed, period, seed, 0

    def on_epoch_end(self) -> None:
        """Count, and draw."""
        self.count += 1
        if self.count % self.period == 0:
            self.posed.points = refined(self.posed, self.seed + self.count // self.period)
            self.posed.data.replace_with_anchors(self.posed.points.numpy())


class Settled(dde.callbacks.Callback):
    """Stop when the parameters have stopped moving, whatever the loss does.

    Parameters
    ----------
    period : int
        Iterations between looks.
    tolerance : float
        In prior standard deviations; they have settled when they stay within it of their mean for `looks` looks.
    """

    def __init__(self, posed: Posed, period: int = 100, tolerance: float = 1e-3, looks: int = 10):
        super().__init__()
        self.posed, self.period, self.tolerance, self.looks = posed, period, tolerance, looks
        self.history: list[np.ndarray] = []
        self.reached = False

    def on_epoch_end(self) -> None:
        """Look."""
        step = self.model.train_state.iteration
        if step % self.period:
            return
        whitened = self.posed.prior.whitened(self.posed.net.z.detach()).numpy()
        self.history = [*self.history[-(self.looks - 1) :], whitened]
        spread = np.ptp(self.history, 0).max() if len(self.history) == self.looks else math.inf
        self.reached = bool(spread < 2 * self.tolerance)
        self.model.stop_training |= self.reached
