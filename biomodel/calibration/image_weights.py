"""Weights of residuals of images: the noise of voxels, and that of the first visit as the model carries it on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from biomodel.calibration.images import ImageProblem

__all__ = ["Weights"]


class Weights:
    """Products with the inverse of C = R + J R0 J' on the n residuals that count, whose indices are `active`.

    Without `exact` the voxel noise of the initial state is taken as if it were carried on without smoothing, which
    needs no solves.
    """

    def __init__(
        self, problem: ImageProblem, params, u0, times, active: np.ndarray, exact: bool, values: dict[str, float]
    ):
        self.problem, self.active, self.values = problem, active, values
        self.where = np.flatnonzero(problem.rows)[active]
        variance, trust = problem.variance[active], problem.trust[active]
        self.variance = variance / trust
        noisy = bool(problem.initial_variance.any())
        exact = exact and noisy
        self.linear = problem.rough.linearise(params, u0, times, plan=problem.coarse_plan) if exact else None
        if noisy and not exact:
            self.variance = (variance + problem.spread[active]) / trust

    def _scatter(self, x: np.ndarray) -> torch.Tensor:
        full = np.zeros((len(x), 1, self.problem.rows.size))
        full[:, 0, self.where] = x
        full = full.reshape(len(x), 1, *self.problem.rows.shape)
        if self.problem.placement.active:
            full = self.problem.placement.back(full, self.values)
        return torch.tensor(full)

    def pulled(self, x: np.ndarray) -> np.ndarray:
        """R0 J' x: (m, n) to (m, z, y, x)."""
        pulled = self.carried_back(x)
        noise = self.problem.start_noise
        if noise is None:
            return pulled * self.problem.initial_variance
        return np.stack([noise.root(noise.transpose(one)) for one in pulled])

    def carried_back(self, x: np.ndarray) -> np.ndarray:
        """J' x: (m, n) to (m, z, y, x)."""
        assert self.linear is not None
        self.problem.solves += len(x)
        return np.asarray(self.linear.pull(self._scatter(x))[:, 0].cpu().numpy())

    def carried(self, update: np.ndarray) -> np.ndarray:
        """J update, (n,)."""
        if self.linear is None:
            return np.zeros(len(self.active))
        return self._pushed(update[None])[0]

    def _pushed(self, x: np.ndarray) -> np.ndarray:
        """J x: (m, z, y, x) to (m, n)."""
        assert self.linear is not None
        pushed = self.linear.push(torch.tensor(x[:, None]))[:, 0].cpu().numpy()
        return self.problem.seen(pushed, self.values).reshape(len(x), -1)[:, self.where]

    def covariance(self, x: np.ndarray) -> np.ndarray:
        """C x for rows of x, (m, n)."""
        assert self.linear is not None
        self.problem.solves += len(x)
        return self.variance * x + self._pushed(self.pulled(x))

    def solve(self, b: np.ndarray, rtol: float = 1e-3, limit: int = 60) -> np.ndarray:
        """C^-1 b for rows of b, (m, n), by conjugate gradients preconditioned with R."""
        if self.linear is None:
            return b / self.variance
        x = b / self.variance * 0.5
        r = b - self.covariance(x)
        z = r / self.variance
        p, rz = z.copy(), np.sum(r * z, 1)
        goal = rtol**2 * np.maximum(np.sum(b * b / self.variance, 1), 1e-300)
        for _ in range(limit):
            if np.all(np.sum(r * r / self.variance, 1) <= goal):
                return x
            cp = self.covariance(p)
            step = rz / np.maximum(np.sum(p * cp, 1), 1e-300)
            x += step[:, None] * p
            r -= step[:, None] * cp
            z = r / self.variance
            new = np.sum(r * z, 1)
            p = z + (new / np.maximum(rz, 1e-300))[:, None] * p
            rz = new
        return x

    def log_determinant(self, probes: int = 6, steps: int = 12) -> float:
        """log det C over the measured rows, by stochastic Lanczos quadrature beyond the diagonal R.

        Ubaru, Chen and Saad 2017, SIAM J Matrix Anal Appl 38:1075, doi:10.1137/16M1104974.
        """
        measured = self.problem.sign[self.active] == 0
        total = float(np.log(self.variance[measured]).sum())
        if self.linear is None or not measured.any():
            return total
        root = np.sqrt(self.variance)
        rng = np.random.default_rng(0)
        v = rng.choice([-1.0, 1.0], (probes, len(root))) * measured
        n = float(measured.sum())
        v /= np.sqrt(n)
        alpha, beta, basis = [], [], [v]
        previous, b = np.zeros_like(v), np.zeros(probes)
        for _ in range(steps):
            w = self.covariance(v / root) / root * measured - b[:, None] * previous
            a = np.sum(w * v, 1)
            w -= a[:, None] * v
            for q in basis:  # full reorthogonalisation: few steps, short vectors in number
                w -= np.sum(w * q, 1)[:, None] * q
            b = np.linalg.norm(w, axis=1)
            alpha.append(a)
            beta.append(b)
            if np.all(b < 1e-10):
                break
            previous, v = v, w / np.maximum(b, 1e-300)[:, None]
            basis.append(v)
        estimate = 0.0
        for m in range(probes):
            diagonal, off = [a[m] for a in alpha], [c[m] for c in beta[:-1]]
            matrix = np.diag(diagonal) + np.diag(off, 1) + np.diag(off, -1)
            eigenvalues, vectors = np.linalg.eigh(matrix)
            estimate += n * float(np.sum(vectors[0] ** 2 * np.log(np.maximum(eigenvalues, 1e-12)))) / probes
        return total + estimate
