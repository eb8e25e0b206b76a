"""Bounded Levenberg-Marquardt for many small problems at once, with derivatives by forward mode."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Solved", "forward_derivative", "levenberg_marquardt"]

#: function(parameters (a, p), rows (a,)) -> (a, n): what the model gives for some of the problems.
Function = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Solved:
    """Where each search ended.

    Attributes
    ----------
    values : Tensor, shape (v, p)
    normal : Tensor, shape (v, p, p)
        Jᵀ J at the end.
    rss : Tensor, shape (v,)
    converged, at_bound : Tensor of bool, shape (v,)
    """

    values: Tensor
    normal: Tensor
    rss: Tensor
    converged: Tensor
    at_bound: Tensor

    def better(self, other: Solved) -> Solved:
        """Return of each problem the search that ended lower; of equal ones this."""
        other_wins = other.rss < self.rss * (1 - 1e-6)

        def chosen(name: str) -> Tensor:
            one, two = getattr(self, name), getattr(other, name)
            return torch.where(other_wins.reshape(-1, *[1] * (one.ndim - 1)), two, one)

        return Solved(chosen("values"), chosen("normal"), chosen("rss"), chosen("converged"), chosen("at_bound"))


def forward_derivative(function: Callable[[Tensor], Tensor], point: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
    """Value of a function and its derivative along a direction."""
    with warnings.catch_warnings():
        # torch (2.13) calls an interface deprecated by which it registers its own forward derivatives.
        warnings.filterwarnings("ignore", message="`torch.jit.script`", category=DeprecationWarning)
        value, slope = torch.func.jvp(function, (point,), (along,))[:2]
    return value, slope


def _linearise(function: Function, theta: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Values (a, n) and Jacobian (p, a, n); one pass with each row repeated once per parameter."""
    a, p = theta.shape
    tangent = torch.eye(p, dtype=theta.dtype, device=theta.device).repeat_interleave(a, 0)
    repeated = rows.repeat(p)
    values, slopes = forward_derivative(lambda t: function(t, repeated), theta.repeat(p, 1), tangent)
    return values[:a], slopes.reshape(p, a, -1)


def levenberg_marquardt(
    function: Function,
    data: Tensor,
    start: Tensor,
    lower: Tensor,
    upper: Tensor,
    *,
    iterations: int = 80,
    tolerance: float = 1e-6,
) -> Solved:
    """Least squares between bounds, one small problem per row.

    Parameters
    ----------
    function
        Model of some rows; each row depends on its own parameters alone.
    data : Tensor, shape (v, n)
    start : Tensor, shape (v, p)
    lower, upper : Tensor, shape (p,)
    iterations
        Most steps tried.
    tolerance
        A row is done when a step changes the curve by less than this part of the residuals' standard deviation.

    Notes
    -----
    Marquardt 1963, J Soc Indust Appl Math 11:431, doi:10.1137/0111030. Parameters at a bound that the gradient pushes
    outward are left out of the step; the step is then cut at the bounds.
    """
    theta = torch.minimum(torch.maximum(start, lower), upper).clone()
    v, p = theta.shape
    cost = torch.full((v,), torch.inf, dtype=theta.dtype)
    normal = torch.zeros(v, p, p, dtype=theta.dtype)
    damping = torch.full((v,), 1e-3, dtype=theta.dtype)
    converged = torch.zeros(v, dtype=torch.bool)
    rows = torch.arange(v)
    gradient = torch.zeros(v, p, dtype=theta.dtype)
    fresh = torch.ones(v, dtype=torch.bool)  # rows whose derivatives are to be renewed
    n_samples, length = data.shape[1], data.norm(dim=1)
    with torch.no_grad():
        for _ in range(iterations):
            renew = rows[fresh[rows]]
            if len(renew):
                values, slopes = _linearise(function, theta[renew], renew)
                residual = data[renew] - values
                cost[renew] = residual.square().sum(1)
                gradient[renew] = torch.einsum("pan,an->ap", slopes, residual)
                normal[renew] = torch.einsum("pan,qan->apq", slopes, slopes)
                fresh[renew] = False
            here, g, n = theta[rows], gradient[rows], normal[rows]
            free = ~(((here <= lower) & (g <= 0)) | ((here >= upper) & (g >= 0)))
            diagonal = n.diagonal(dim1=1, dim2=2)
            scale = torch.where(free & (diagonal > 0), diagonal, torch.ones_like(diagonal))
            both = (free[:, :, None] & free[:, None, :]).to(n.dtype)
            # Scaled to a unit diagonal: parameters of very different size are solved for together.
            root = scale.sqrt()
            matrix = n * both / (root[:, :, None] * root[:, None, :])
            matrix.diagonal(dim1=1, dim2=2).add_(damping[rows][:, None] + (~free).to(n.dtype))
            factor, _ = torch.linalg.cholesky_ex(matrix + 1e-15 * torch.eye(p, dtype=n.dtype))
            step = torch.cholesky_solve((g * free / root)[:, :, None], factor)[:, :, 0] / root
            step = torch.where(step.isfinite(), step, torch.zeros_like(step))
            trial = torch.minimum(torch.maximum(here + step, lower), upper)
            trial_cost = (data[rows] - function(trial, rows)).square().sum(1)
            better = trial_cost < cost[rows]
            # How far the curve moves with each parameter, against what is left of the data.
            moved = ((trial - here).abs() * diagonal.clamp(min=0).sqrt()).amax(1)
            slight = tolerance * (cost[rows] / n_samples).sqrt() + 1e-13 * length[rows]
            gained = cost[rows] - trial_cost
            accepted = rows[better]
            theta[accepted] = trial[better]
            fresh[accepted] = True
            damping[rows] = torch.where(better, damping[rows] / 8, damping[rows] * 4).clamp(1e-12, 1e12)
            # A step of no length, one that gains nothing, or one that no damping makes better, is the end.
            done = (moved <= slight) | (better & (gained <= 1e-12 * cost[rows])) | (~better & (damping[rows] > 1e9))
            converged[rows[done]] = True
            rows = rows[~done]
            if not len(rows):
                break
        stale = torch.nonzero(fresh).ravel()
        if len(stale):
            values, slopes = _linearise(function, theta[stale], stale)
            cost[stale] = (data[stale] - values).square().sum(1)
            normal[stale] = torch.einsum("pan,qan->apq", slopes, slopes)
        at_bound = ((theta <= lower) | (theta >= upper)).any(1)
    return Solved(theta, normal, cost, converged, at_bound)
