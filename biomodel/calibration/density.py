"""Log posterior densities with their gradients, at the transformed coordinates of a calibration, for Markov chains.

For images the weights of the residuals are those of the Laplace fit's optimum, so that chains sample one density:
outliers' weights, the inflation, and C = R + J R0 J', through which the voxel noise of the first visit's map is carried
to later ones. With C held, log det C is a constant. What is left open by "held" is which rows count: outside the
regions a prediction is held against the data only where it exceeds the visible fraction, so that the rows of C change
from point to point, and r' C^-1 r over the rows that happen to count jumps in its slope. The same quantity is the
minimum over the initial state's noise e of

    sum_i w_i rho_i(r_i(z) - (J e)_i) + e' R0^-1 e,

with rho(t) = t² where a value was measured and max(0, t)² where only a limit is known: equal to r' C^-1 r over the rows
that count at the minimum (Woodbury), convex in e, and once continuously differentiable in z, with the gradient of its
first part at the minimising e. That is the density here. It is found by Newton steps on e from where its derivative at
the optimum predicts it. At the optimum value and slope are those of the Laplace fit.

A coordinate beyond one of its bounds is reflected at it, so that a path of the sampler bounces there instead of being
refused. Between two bounds the reflections would repeat for ever and the density at x have no finite mass; so each of
the points that fall on one place takes the share g(x) / (sum of g over those points) of its density, g a normal centred
between the bounds. The density of the reflected coordinates is exactly that of the posterior cut off at the bounds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve

from biomodel.calibration.gaussnewton import GaussianPrior, Optimum, limits_of
from biomodel.calibration.images import ImageProblem
from biomodel.calibration.initial_state import shift_name
from biomodel.calibration.volumes import VolumeProblem, t_constant
from biomodel.errors import SolverError

__all__ = ["Density", "ImageDensity", "VolumeDensity", "Whitened", "folded"]

#: Most bytes of a stored J R0^1/2; where it is larger, products are solved for as needed.
STORED = 256e6
#: Standard deviation of the weights that tell reflected points apart, in widths between the bounds: the density changes
#: noticeably within a tenth of the width from a bound.
NARROW = 1 / 6
#: Squared norm of the whitened gradient at which the minimum over the initial state's noise is good enough: the log
#: density is then wrong by less than half of it.
NEAR = 1e-7
#: Most Newton steps, and conjugate-gradient steps in each.
NEWTON, PRODUCTS = 30, 60
#: Voxels whose noise is carried at once.
TOGETHER = 32


class Density(Protocol):
    """A log density at coordinates (p,), up to a constant or not."""

    size: int

    def __call__(self, x: np.ndarray, /) -> tuple[float, np.ndarray]:
        """Log density and its gradient (p,); -inf and zeros where the model cannot be evaluated."""

    def value(self, x: np.ndarray, /) -> float:
        """Log density alone."""

    def fingerprint(self) -> str:
        """Digest of all that it is made of."""


def folded(z: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates reflected into their bounds, any shape (..., p), and the sign (..., p) that slopes take."""
    inside = (z >= low) & (z <= high)
    if inside.all():
        return z, np.ones_like(z)
    with np.errstate(invalid="ignore"):
        width = high - low
        # A bound may be infinite on one side.
        both = np.isfinite(width)
        turn = np.where(both, np.mod(z - low, 2 * np.where(both, width, 1.0)), 0.0)
        two = np.where(turn > width, 2 * width - turn, turn) + low
        one = np.where(z < low, 2 * low - z, 2 * high - z)
        found = np.where(inside, z, np.where(both, two, one))
        sign = np.where(inside, 1.0, np.where(both, np.where(turn > width, -1.0, 1.0), -1.0))
    return found, sign


def shared(z: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log of a point's share among all that are reflected to the same place between its two bounds, and its slope.

    Parameters
    ----------
    z, low, high : ndarray, shape (k,)
        Unreflected coordinates, and their bounds, both finite.

    Returns
    -------
    (ndarray (k,), ndarray (k,))
    """
    width, middle = high - low, (low + high) / 2
    place, sign = folded(z, low, high)
    t, inner = (z - middle) / width, (place - middle) / width
    n = np.arange(-1, 2)  # images farther out weigh less than exp(-38)
    turn = np.where(n % 2 == 0, 1.0, -1.0)
    image = n + turn * inner[:, None]
    power = -0.5 * (image / NARROW) ** 2
    top = power.max(1)
    weight = np.exp(power - top[:, None])
    total = weight.sum(1)
    slope = sign * (weight * turn * image).sum(1) / total - t
    return -0.5 * (t / NARROW) ** 2 - top - np.log(total), slope / (NARROW**2 * width)


class Whitened:
    """A density at x with z = centre + root x, reflected at the bounds.

    Parameters
    ----------
    density : Density
        At z, without its constant Jacobian.
    centre : ndarray, shape (p,)
    root : ndarray, shape (p, p)
        Cholesky factor of a covariance; near the posterior's, so that x is near standard normal.
    limits : (ndarray (p,), ndarray (p,)), optional
    """

    def __init__(self, density: Density, centre: np.ndarray, root: np.ndarray,
                 limits: tuple[np.ndarray, np.ndarray] | None = None):  # fmt: skip
        self.density, self.centre, self.root, self.size = density, centre, root, density.size
        self.limits = limits or (np.full(self.size, -np.inf), np.full(self.size, np.inf))
        self.between = np.flatnonzero(np.isfinite(self.limits[0]) & np.isfinite(self.limits[1]))

    def coordinates(self, x: np.ndarray) -> np.ndarray:
        """z of x, (..., p)."""
        return folded(self.centre + x @ self.root.T, *self.limits)[0]

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        free = self.centre + self.root @ x
        z, sign = folded(free, *self.limits)
        value, gradient = self.density(z)
        gradient = sign * gradient
        if len(self.between):
            share, slope = shared(free[self.between], *(v[self.between] for v in self.limits))
            value += float(share.sum())
            gradient[self.between] += slope
        return value, gradient @ self.root

    def value(self, x: np.ndarray) -> float:
        """Log density alone."""
        free = self.centre + self.root @ x
        share, _ = shared(free[self.between], *(v[self.between] for v in self.limits))
        return self.density.value(folded(free, *self.limits)[0]) + float(share.sum())

    def fingerprint(self) -> str:
        """Digest of all that it is made of."""
        return _digest(self.density.fingerprint(), self.centre, self.root, *self.limits)


def _digest(*parts) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(str(part).encode() if not isinstance(part, np.ndarray) else np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


class _LogPrior:
    """Gaussian log density over z with its gradient."""

    def __init__(self, prior: GaussianPrior):
        self.mean, self.precision = prior.mean, prior.precision
        self.constant = -0.5 * float(np.linalg.slogdet(2 * np.pi * prior.covariance)[1])

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        pull = self.precision @ (z - self.mean)
        return self.constant - 0.5 * float((z - self.mean) @ pull), -pull


class VolumeDensity:
    """Log posterior of one patient without images.

    Parameters
    ----------
    problem : VolumeProblem
    prior : GaussianPrior
    """

    def __init__(self, problem: VolumeProblem, prior: GaussianPrior):
        self.problem, self.prior, self.size = problem, prior, len(prior.mean)
        self.log_prior, self.limits = _LogPrior(prior), limits_of(problem.parameters)
        self.constant = float(t_constant(problem.scale, problem.df).sum())
        self.y, self.scale = torch.tensor(problem.y), torch.tensor(problem.scale)

    def _log_likelihood(self, z: torch.Tensor) -> torch.Tensor:
        self.problem.solves += 1
        square = ((self.y - self.problem.volume_model(z)) / self.scale) ** 2
        df = self.problem.df
        loss = 0.5 * square if not np.isfinite(df) else (df + 1) / 2 * torch.log1p(square / df)
        return self.constant - loss.sum()

    def log_likelihood(self, z: np.ndarray) -> float:
        """Log-likelihood alone; -inf where the model cannot be evaluated."""
        try:
            with torch.no_grad():
                found = float(self._log_likelihood(torch.tensor(z[None])))
        except SolverError:
            return -np.inf
        return found if np.isfinite(found) else -np.inf

    def value(self, z: np.ndarray) -> float:
        """Log density alone."""
        return self.log_likelihood(z) + self.log_prior(z)[0]

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        x = torch.tensor(z[None], requires_grad=True)
        try:
            found = self._log_likelihood(x)
            (slope,) = torch.autograd.grad(found, x)
        except SolverError:
            return -np.inf, np.zeros(self.size)
        value, gradient = self.log_prior(z)
        value, gradient = value + float(found.detach()), gradient + slope[0].numpy()
        if not (np.isfinite(value) and np.isfinite(gradient).all()):
            return -np.inf, np.zeros(self.size)
        return value, gradient

    def fingerprint(self) -> str:
        """Digest of model, data, noise and prior."""
        p, patient = self.problem, self.problem.patient
        parts = (p.names, p.model, patient.schedule, p.volume_model.days, p.y, p.scale, p.df, patient.volumes)
        return _digest(*parts, self.prior.mean, self.prior.covariance, *self.limits)


class _Carried:
    """Minimum over the whitened noise e of the initial state: sum w rho(q - B e) / 2 + |e|² / 2.

    Parameters
    ----------
    forward, back : callable
        Products with B and its transpose: (k, m) to (k, n), (k, n) to (k, m).
    weight : ndarray, shape (n,)
    side : ndarray of int8, shape (n,)
        0 where both signs of a residual count, else the sign with which it does.
    """

    def __init__(self, forward: Callable, back: Callable, weight: np.ndarray, side: np.ndarray,
                 factor: Callable[[np.ndarray], np.ndarray] | None = None):  # fmt: skip
        self.forward, self.back, self.weight, self.side = forward, back, weight, side
        self.factor = factor or (lambda r: r)

    def on(self, t: np.ndarray) -> np.ndarray:
        """Rows that count at residuals (n,)."""
        return (self.side == 0) | (self.side * t > 0)

    def _newton(self, right: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """(I + B' W B)^-1 right, by preconditioned conjugate gradients."""
        x, r = np.zeros_like(right), right.copy()
        goal = max(1e-4 * float(r @ r), 0.01 * NEAR)
        if float(r @ r) <= goal:
            return x
        z = self.factor(r)
        p, rz = z.copy(), float(r @ z)
        for _ in range(PRODUCTS):
            ap = p + self.back((weight * self.forward(p[None])[0])[None])[0]
            step = rz / float(p @ ap)
            x += step * p
            r -= step * ap
            if float(r @ r) <= goal:
                break
            z = self.factor(r)
            new = float(r @ z)
            p, rz = z + new / rz * p, new
        return x

    def minimum(self, q: np.ndarray, e: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Least value, its slope (n,) by q, and where it is (m,), from a guess."""
        t = q - self.forward(e[None])[0]
        on = self.on(t)
        value = 0.5 * float((self.weight * t * t)[on].sum() + e @ e)
        for _ in range(NEWTON):
            slope = np.where(on, self.weight * t, 0.0)
            downhill = self.back(slope[None])[0] - e
            if float(downhill @ downhill) <= NEAR:
                break
            step = self._newton(downhill, np.where(on, self.weight, 0.0))
            moved, length = self.forward(step[None])[0], 1.0
            while True:
                trial, there = e + length * step, t - length * moved
                counts = self.on(there)
                new = 0.5 * float((self.weight * there * there)[counts].sum() + trial @ trial)
                if new <= value or length < 1e-3:
                    break
                length /= 2
            if new > value:
                break
            e, t, on, value = trial, there, counts, new
        return value, np.where(on, self.weight * t, 0.0), e


class ImageDensity:
    """Log posterior of one imaged patient, with the weights of an optimum held.

    Parameters
    ----------
    problem : ImageProblem
        As the search left it.
    best : Optimum
    prior : GaussianPrior
    """

    def __init__(self, problem: ImageProblem, best: Optimum, prior: GaussianPrior):
        problem.require_plain("NUTS and SMC")
        self.problem, self.prior, self.size = problem, prior, len(prior.mean)
        self.log_prior, self.limits = _LogPrior(prior), limits_of(problem.parameters)
        linear = best.linear
        weights, self.inflation = linear.weights, linear.inflation
        carried = weights.linear is not None
        # The weights at the optimum, which the last of the search's rounds may have set anew for the next.
        variance = problem.variance if carried else problem.variance + problem.spread
        self.weight = problem.trust / variance
        self.weight[weights.active] = 1 / weights.variance
        self.side = -problem.sign.astype(np.int8)
        self.constant = linear.log_likelihood() + linear.objective
        self.at, self.update = best.z.copy(), problem.update
        self.noise = np.sqrt(problem.initial_variance)
        self.where = self.noise > 0
        self.carried: _Carried | None = None
        if carried:
            self._carry(linear, np.asarray(problem.update)[self.where] / self.noise[self.where])

    def _carry(self, linear, expected: np.ndarray) -> None:
        """Set up the noise of the first visit's map, whose minimum at the optimum is `expected`, whitened."""
        problem, run = self.problem, linear.weights.linear
        m, n, shape = int(self.where.sum()), len(self.weight), self.noise.shape
        noise = self.noise[self.where]
        rows = problem.rows.ravel()

        def forward(e: np.ndarray) -> np.ndarray:
            start = np.zeros((len(e), 1, *shape))
            start[:, 0, self.where] = e * noise
            problem.solves += len(e)
            return run.push(torch.tensor(start))[:, 0].cpu().numpy().reshape(len(e), -1)[:, rows]

        def back(g: np.ndarray) -> np.ndarray:
            full = np.zeros((len(g), 1, rows.size))
            full[:, 0, rows] = g
            pulled = run.pull(torch.tensor(full).reshape(len(g), 1, *problem.rows.shape))
            problem.solves += len(g)
            return pulled[:, 0].cpu().numpy()[:, self.where] * noise

        active = np.zeros(n, bool)
        active[linear.weights.active] = True
        if 8.0 * m * n <= STORED:
            eye = np.eye(m)
            stored = np.concatenate([forward(eye[k : k + TOGETHER]) for k in range(0, m, TOGETHER)])
            counted = stored[:, active] * np.sqrt(self.weight[active])
            factor = cho_factor(np.eye(m) + counted @ counted.T)
            self.carried = _Carried(lambda e: e @ stored, lambda g: g @ stored.T, self.weight, self.side,
                                    lambda r: cho_solve(factor, r, check_finite=False))  # fmt: skip
        else:
            self.carried = _Carried(forward, back, self.weight, self.side)
        # Where the minimum lies, and how it moves with the coordinates: the guess from which each search starts.
        self.moved = forward(expected[None])[0]
        self.expected = expected
        change = np.zeros((self.size, n))
        change[:, active] = -linear.jacobian * self.weight[active]
        held = np.where(active, self.weight, 0.0)
        self.along = np.stack([self.carried._newton(b, held) for b in self.carried.back(change)])

    def _residual(self, z: np.ndarray, values: dict, u: np.ndarray) -> np.ndarray:
        """Measured or visible fraction minus prediction, of all rows (n,), as if both signs counted everywhere."""
        problem = self.problem
        predicted = u + values.get("grid.error", 0.0) * problem.grid_error
        shift = np.array([values.get(shift_name(s.number), 0.0) for s in problem.later])[problem.time_of_row]
        return np.where(problem.sign == 0, problem.value - shift * problem.response, problem.visible) - predicted

    def _misfit(self, z: np.ndarray, q: np.ndarray) -> tuple[float, np.ndarray]:
        """Half the weighted square of the residuals, and its slope (n,)."""
        if self.carried is None:
            on = (self.side == 0) | (self.side * q > 0)
            slope = np.where(on, self.weight * q, 0.0)
            return 0.5 * float(slope @ q), slope
        # The run starts from the posterior mean of the initial state; the noise counts from the measured one.
        guess = self.expected + (z - self.at) @ self.along
        value, slope, _ = self.carried.minimum(q + self.moved, guess)
        return value, slope

    def _start(self, values: dict) -> tuple[dict, torch.Tensor]:
        problem = self.problem
        problem.solves += 1
        u0 = problem.initial.state({n: np.array([values[n]]) for n in problem.initial.names}) + self.update
        return {n: values[n] for n in problem.model.free}, torch.tensor(u0)

    def log_likelihood(self, z: np.ndarray) -> float:
        """Log-likelihood alone, by one run; -inf where the model cannot be evaluated."""
        problem, values = self.problem, self.problem.values(z)
        try:
            params, u0 = self._start(values)
            with torch.no_grad():
                u = problem.simulation(params, u0, problem.days[1:], plan=problem.fine_plan)
        except SolverError:
            return -np.inf
        q = self._residual(z, values, u[0].cpu().numpy()[problem.rows])
        return self.constant - self._misfit(z, q)[0] / self.inflation

    def value(self, z: np.ndarray) -> float:
        """Log density alone."""
        return self.log_likelihood(z) + self.log_prior(z)[0]

    def __call__(self, z: np.ndarray) -> tuple[float, np.ndarray]:
        problem, values = self.problem, self.problem.values(z)
        nowhere = -np.inf, np.zeros(self.size)
        try:
            params, u0 = self._start(values)
            moving = [n for n in params if n in problem.acting]
            params |= {n: torch.tensor(params[n], dtype=torch.float64, requires_grad=True) for n in moving}
            u0.requires_grad_(True)
            u = problem.simulation(params, u0, problem.days[1:], plan=problem.fine_plan)
        except SolverError:
            return nowhere
        q = self._residual(z, values, u.detach()[0].cpu().numpy()[problem.rows])
        misfit, slope = self._misfit(z, q)
        cotangent = np.zeros(problem.rows.shape)
        cotangent[problem.rows] = slope
        u.backward(torch.tensor(cotangent)[None].to(u))
        by_value = np.zeros(self.size)
        for n in moving:
            found = params[n].grad
            by_value[problem.names.index(n)] = 0.0 if found is None else float(found)
        assert u0.grad is not None
        back = u0.grad[0].cpu().numpy()
        for n, derivative in zip(problem.initial.names, problem.initial.derivatives(values), strict=True):
            by_value[problem.names.index(n)] += float((back * derivative).sum())
        if "grid.error" in problem.names:
            by_value[problem.names.index("grid.error")] = float(slope @ problem.grid_error)
        measured = np.where(problem.sign == 0, slope * problem.response, 0.0)
        shifts = np.bincount(problem.time_of_row, measured, len(problem.later))
        for s, by_shift in zip(problem.later, shifts, strict=True):
            if shift_name(s.number) in problem.names:
                by_value[problem.names.index(shift_name(s.number))] += by_shift
        value, gradient = self.log_prior(z)
        value += self.constant - misfit / self.inflation
        gradient = gradient + by_value * problem.chain(z) / self.inflation
        return (value, gradient) if np.isfinite(value) and np.isfinite(gradient).all() else nowhere

    def fingerprint(self) -> str:
        """Digest of model, data, weights and prior."""
        p = self.problem
        data = (p.value, p.sign, p.response, p.days, p.initial.base, p.initial_variance, p.domain.mask, p.grid_error)
        held = (self.weight, np.asarray(self.inflation), self.at, np.asarray(self.update))
        what = (p.names, p.model, p.patient.schedule, p.domain.spacing)
        return _digest(*what, *data, *held, self.prior.mean, self.prior.covariance, *self.limits)
