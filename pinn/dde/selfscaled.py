"""The self-scaled Broyden method of Urbán, Stefanou and Pons for smooth functions of some thousand unknowns.

A quasi-Newton method that scales its whole inverse Hessian before each update. With s the step, y the change of the
gradient, H the inverse Hessian, and

    h = y.Hy / y.s,   b = s.H⁻¹s / y.s,   a = h b - 1,   c = sqrt(a / (a + 1)),
    rho = min(1, h (1 - c)),   theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b)),
    sigma = 1 + a theta,   phi = (1 - theta) / sigma,
    tau = min(1, 1 / b) min(sigma^(-1/(n-1)), 1 / theta)   if theta > 0,
    tau = min(min(1, 1 / b) sigma^(-1/(n-1)), sigma)       otherwise,
    v = sqrt(y.Hy) (s / y.s - H y / y.Hy),

the update is H+ = (H - H y y'H / y.Hy + phi v v') / tau + s s' / y.s. As s = -step H g, H⁻¹s needs no inverse.

Urbán, Stefanou and Pons 2025, J Comput Phys 523:113656, doi:10.1016/j.jcp.2024.113656; the scaling goes back to
Al-Baali and Khalfan 2005, doi:10.1080/02331930500342591. It is here to be compared with Levenberg-Marquardt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Sufficient decrease and curvature of the line search (strong Wolfe), and its most evaluations.
DECREASE, CURVATURE, TRIALS = 1e-4, 0.9, 25

Function = Callable[[torch.Tensor], tuple[float, torch.Tensor]]


@dataclass(frozen=True, eq=False)
class Descent:
    """Where a descent ended.

    Attributes
    ----------
    x, gradient : tensor, shape (n,)
    value : float
    iterations, evaluations : int
    reason : str
        Why it ended, in words.
    """

    x: torch.Tensor
    value: float
    gradient: torch.Tensor
    iterations: int
    evaluations: int
    reason: str


def updated(h: torch.Tensor, s: torch.Tensor, y: torch.Tensor, inverse_s: torch.Tensor) -> torch.Tensor:
    """The next inverse Hessian (n, n); `inverse_s` is H⁻¹ s (n,)."""
    n = len(s)
    sy = float(y @ s)
    hy = h @ y
    yhy = float(y @ hy)
    ratio, b = yhy / sy, float(s @ inverse_s) / sy
    a = max(ratio * b - 1, 1e-12)
    rho = min(1.0, ratio * (1 - math.sqrt(a / (a + 1))))
    theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
    sigma = max(1 + a * theta, 1e-12)
    phi = (1 - theta) / sigma
    shrink, power = min(1.0, 1 / b), sigma ** (-1 / max(n - 1, 1))
    tau = shrink * min(power, 1 / theta) if theta > 0 else min(shrink * power, sigma)
    v = math.sqrt(yhy) * (s / sy - hy / yhy)
    return (h - torch.outer(hy, hy) / yhy + phi * torch.outer(v, v)) / tau + torch.outer(s, s) / sy


def descend(function: Function, x: torch.Tensor, iterations: int = 1000, gradient_tolerance: float = 1e-10,
            watch: Callable[[int, torch.Tensor], bool] | None = None) -> Descent:  # fmt: skip
    """Minimise a function by the self-scaled Broyden method.

    Parameters
    ----------
    function : callable
        x (n,) -> value and gradient (n,).
    watch : callable, optional
        (iteration, x) -> whether to stop.
    """
    value, gradient = function(x)
    h = torch.eye(len(x), dtype=x.dtype)
    evaluations, reset = 1, False
    for iteration in range(1, iterations + 1):
        if float(gradient.abs().max()) <= gradient_tolerance:
            return Descent(x, value, gradient, iteration - 1, evaluations, "the gradient vanishes")
        direction = -(h @ gradient)
        slope = float(direction @ gradient)
        first = 1.0 if iteration > 1 else min(1.0, 1 / float(gradient.abs().sum()))
        found = None
        if slope < 0:
            found, used = _search(function, x, value, gradient, direction, slope, first)
            evaluations += used
        if found is None:
            if reset:
                return Descent(x, value, gradient, iteration, evaluations, "no step lowers the value any more")
            h, reset = torch.eye(len(x), dtype=x.dtype), True
            continue
        step, new, new_gradient = found
        s, y = step * direction, new_gradient - gradient
        if float(y @ s) > 1e-300:
            if iteration == 1 or reset:
                h = h * (float(y @ s) / float(y @ y))
                h = updated(h, s, y, s * (float(y @ y) / float(y @ s)))
            else:
                h = updated(h, s, y, -step * gradient)
        reset = False
        x, value, gradient = x + s, new, new_gradient
        if watch is not None and watch(iteration, x):
            return Descent(x, value, gradient, iteration, evaluations, "asked to stop")
    return Descent(x, value, gradient, iterations, evaluations, "all iterations are spent")


def _search(function: Function, x: torch.Tensor, value: float, gradient: torch.Tensor, direction: torch.Tensor,
            slope: float, first: float) -> tuple[tuple[float, float, torch.Tensor] | None, int]:  # fmt: skip
    """A step that satisfies the strong Wolfe conditions, with value and gradient there; and evaluations spent.

    Bracketing and cubic interpolation: Nocedal and Wright 2006, Numerical Optimization, algorithms 3.5 and 3.6
    (doi:10.1007/978-0-387-40065-5).
    """
    low, low_value, low_slope = 0.0, value, slope
    high: float | None = None
    high_value = high_slope = math.nan
    best: tuple[float, float, torch.Tensor] | None = None
    step = first
    for used in range(1, TRIALS + 1):
        new, new_gradient = function(x + step * direction)
        here = float(new_gradient @ direction)
        good = math.isfinite(new) and new <= value + DECREASE * step * slope
        if good and (best is None or new < best[1]):
            best = (step, new, new_gradient)
        if good and new < low_value and abs(here) <= -CURVATURE * slope:
            return (step, new, new_gradient), used
        if not good or new >= low_value:
            high, high_value, high_slope = step, new, here
        else:
            if here * ((high if high is not None else math.inf) - low) >= 0:
                high, high_value, high_slope = low, low_value, low_slope
            low, low_value, low_slope = step, new, here
        if high is None:
            step *= 4
            continue
        if abs(high - low) < 1e-14 * max(abs(low), 1e-300):
            break
        step = _cubic(low, low_value, low_slope, high, high_value, high_slope)
    return best, TRIALS


def _cubic(a: float, fa: float, ga: float, b: float, fb: float, gb: float) -> float:
    """Minimum of the cubic through values and slopes at both ends, kept away from them."""
    middle, width = (a + b) / 2, abs(b - a)
    if not (math.isfinite(fb) and math.isfinite(gb)):
        return middle
    d1 = ga + gb - 3 * (fa - fb) / (a - b)
    root = d1 * d1 - ga * gb
    if root < 0:
        return middle
    d2 = math.copysign(math.sqrt(root), b - a)
    below = gb - ga + 2 * d2
    step = b - (b - a) * (gb + d2 - d1) / below if below else middle
    return step if abs(step - middle) < 0.4 * width else middle
