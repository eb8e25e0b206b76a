"""Posterior of a whitened problem by the leading eigenpairs of its data Hessian.

In coordinates where the prior is white noise, the posterior covariance of a linearised problem is (I + H)^-1 with the
data's Gauss-Newton Hessian H. Where the data say nothing its eigenvalues are 0, so few pairs suffice, however fine the
grid is (Bui-Thanh et al. 2013, SIAM J Sci Comput 35:A2494, doi:10.1137/12089586X; Villa, Petra and Ghattas 2021,
hIPPYlib, ACM Trans Math Softw 47:16, doi:10.1145/3428447).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["LowRank", "conjugate_gradients", "leading", "remainder"]

#: Relative residual at which an eigenpair counts as found.
FOUND = 0.02


@dataclass(frozen=True, eq=False)
class LowRank:
    """Eigenpairs of the whitened data Hessian.

    Attributes
    ----------
    values : ndarray, shape (r,)
        Falling; data outweigh the prior where they exceed 1.
    vectors : ndarray, shape (r, n)
    next_value : float
        Estimate of the largest eigenvalue left out.
    products : int
        Hessian products spent.
    errors : ndarray, shape (r,)
        Bounds of the pairs' relative residuals: small where a pair is found, and not where the search was cut off.
    """

    values: np.ndarray
    vectors: np.ndarray
    next_value: float
    products: int
    errors: np.ndarray

    def covariance(self, x: np.ndarray) -> np.ndarray:
        """(I + H)^-1 x for rows of x, (m, n)."""
        along = x @ self.vectors.T
        return x - (along * (self.values / (1 + self.values))) @ self.vectors

    def root(self, x: np.ndarray) -> np.ndarray:
        """(I + H)^-1/2 x for rows of x: white noise to draws about the mean."""
        along = x @ self.vectors.T
        return x + (along * (1 / np.sqrt(1 + self.values) - 1)) @ self.vectors

    @property
    def information(self) -> float:
        """Information gained over the prior, nats: half the sum of log(1 + values)."""
        return 0.5 * float(np.log1p(self.values).sum())


def leading(
    product: Callable[[np.ndarray], np.ndarray], size: int, floor: float = 1.0, most: int = 600, seed: int = 0
) -> LowRank:
    """Eigenpairs above `floor` of a symmetric positive semidefinite operator, by Lanczos' method.

    Every basis vector is kept and orthogonalised against; ends when all pairs above the floor are found and the
    largest below it shows, or at `most` products.

    Parameters
    ----------
    product : callable
        (n,) to (n,).
    size : int
        n.
    """
    rng = np.random.default_rng(seed)
    most = min(most, size)
    basis = np.empty((min(64, most), size))
    v = rng.standard_normal(size)
    v /= np.linalg.norm(v)
    alpha: list[float] = []
    beta: list[float] = []
    count = 0
    while True:
        if count == len(basis):
            basis = np.concatenate((basis, np.empty((min(64, most - count), size))))
        basis[count] = v
        count += 1
        w = product(v)
        alpha.append(float(w @ v))
        # Twice is enough (Parlett 1998, The Symmetric Eigenvalue Problem).
        for _ in range(2):
            w -= (basis[:count] @ w) @ basis[:count]
        b = float(np.linalg.norm(w))
        exhausted = b <= 1e-12 * max(abs(alpha[0]), 1e-300) or count == most
        if exhausted or count % 8 == 0:
            theta, s = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
            above = theta >= floor
            left = np.abs(b * s[-1]) / np.maximum(theta, floor)
            if exhausted or (not above.all() and left[above].max(initial=0.0) <= FOUND):
                below = float(theta[~above].max(initial=0.0))
                order = np.flatnonzero(above)[::-1]
                return LowRank(theta[order], s[:, order].T @ basis[:count], below, count, left[order])
        beta.append(b)
        v = w / b


def remainder(
    product: Callable[[np.ndarray], np.ndarray],
    known: LowRank,
    size: int,
    probes: int = 4,
    steps: int = 8,
    seed: int = 0,
) -> float:
    """Half the sum of log(1 + value) over the eigenvalues that `known` left out, estimated; nats.

    Stochastic Lanczos quadrature beside the known vectors (Ubaru, Chen and Saad 2017, SIAM J Matrix Anal Appl 38:1075,
    doi:10.1137/16M1104974). The many values below 1 inform no direction much, but their sum counts in an evidence.
    """
    rng = np.random.default_rng(seed)

    def outside(x: np.ndarray) -> np.ndarray:
        return np.asarray(x - (x @ known.vectors.T) @ known.vectors)

    total = 0.0
    for _ in range(probes):
        v = outside(rng.choice([-1.0, 1.0], size))
        weight = float(v @ v)
        v /= np.sqrt(weight)
        basis, alpha, beta = [v], [], []
        for _ in range(steps):
            w = outside(product(v))
            alpha.append(float(w @ v))
            for q in basis:
                w -= (w @ q) * q
            b = float(np.linalg.norm(w))
            if len(alpha) == steps or b <= 1e-10:
                break
            beta.append(b)
            v = w / b
            basis.append(v)
        values, vectors = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))
        total += 0.5 * weight * float(np.sum(vectors[0] ** 2 * np.log1p(np.maximum(values, 0.0)))) / probes
    return total


def conjugate_gradients(
    product: Callable[[np.ndarray], np.ndarray],
    right: np.ndarray,
    rtol: float,
    most: int = 300,
    known: LowRank | None = None,
) -> tuple[np.ndarray, int]:
    """Solve (I + H) x = right for a symmetric positive semidefinite H; the solution and the products spent.

    With eigenpairs of H that are `known`, their inverse preconditions: what is left of H is below 1.
    """

    def precondition(y: np.ndarray) -> np.ndarray:
        return y if known is None else known.covariance(y[None])[0]

    x = np.zeros_like(right)
    r = right.copy()
    s = precondition(r)
    p = s.copy()
    rs = float(r @ s)
    goal = rtol**2 * rs
    for count in range(1, most + 1):
        hp = p + product(p)
        step = rs / float(p @ hp)
        x += step * p
        r -= step * hp
        s = precondition(r)
        new = float(r @ s)
        if new <= goal:
            return x, count
        p = s + new / rs * p
        rs = new
    return x, most
