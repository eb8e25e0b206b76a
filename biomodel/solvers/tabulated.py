"""Closed-form growth whose rate is a map: the flow's coefficients as polynomials of the rate.

Where treatments act alike everywhere, the coefficients a and b of a step's flow u a / (1 + b u) depend on the place
only through the growth rate k(x). Over the range of k they are entire functions that vary little within a step, so a
Chebyshev series of degree `NODES` - 1 gives them to rounding, and one matrix product per step to every voxel: the
quadrature inside the steps is done for `NODES` rates, not for all voxels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch

#: Chebyshev nodes over the range of the rate. A step advances by a factor exp(k dt) of a few at most: 12 give 1e-10.
NODES = 12

#: An array of the kernels: numpy or torch.
Array = Any


@lru_cache(maxsize=1)
def chebyshev() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes in [-1, 1], the matrix from values at them to coefficients, and that from coefficients to the slope's."""
    j = np.arange(NODES)
    nodes = np.cos(np.pi * (j + 0.5) / NODES)
    to_coefficients = 2.0 / NODES * np.cos(np.pi * np.outer(j, j + 0.5) / NODES)
    to_coefficients[0] /= 2
    slope = np.zeros((NODES, NODES))
    for m in range(NODES):
        unit = np.zeros(NODES)
        unit[m] = 1
        derivative = np.polynomial.chebyshev.chebder(unit)
        slope[: len(derivative), m] = derivative[:NODES]
    return nodes, to_coefficients, slope


class RateRange:
    """Nodes over the range of a rate field, and the polynomials' values in its voxels.

    Parameters
    ----------
    rate : Tensor, shape (batch, z, y, x)
        Padded by one voxel, whose values do not count.
    """

    def __init__(self, rate: torch.Tensor):
        inner = rate.detach()[:, 1:-1, 1:-1, 1:-1]
        low, high = float(inner.min()), float(inner.max())
        self.middle, self.half = (low + high) / 2, max((high - low) / 2, 1e-6 * max(abs(high), 1e-6))
        nodes, to_coefficients, slope = (torch.tensor(x) for x in chebyshev())
        self.nodes = self.middle + self.half * nodes
        self.to_coefficients, self.slope = to_coefficients, slope / self.half
        x = ((rate.detach() - self.middle) / self.half).clamp(-1, 1)
        basis = [torch.ones_like(x), x]
        while len(basis) < NODES:
            basis.append(2 * x * basis[-1] - basis[-2])
        self.basis = torch.stack(basis, 1)  # (batch, node, z, y, x)

    def at(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Sums of the polynomials: (..., batch, node) to (..., batch, z, y, x)."""
        basis = self.basis.flatten(2)
        if basis.shape[0] < coefficients.shape[-2]:
            basis = basis.expand(coefficients.shape[-2], -1, -1)
        elif coefficients.shape[-2] < basis.shape[0]:
            coefficients = coefficients.expand(*coefficients.shape[:-2], basis.shape[0], -1)
        found = torch.einsum("...bm,bmn->...bn", coefficients.to(basis), basis)
        return found.reshape(*found.shape[:-1], *self.basis.shape[2:])

    def moments(self, values: torch.Tensor) -> torch.Tensor:
        """Transpose of `at`: (batch, z, y, x) to (batch, node)."""
        basis = self.basis.flatten(2)
        return torch.einsum("bn,bmn->bm", values.flatten(1), basis.expand(values.shape[0], -1, -1)).double()


class TabulatedReaction:
    """Bernoulli flow with a rate field; leaves are the rate (batch, z, y, x) and the values of a, b at the nodes.

    Parameters
    ----------
    kernels
    leaves : (rate, a, b)
        The padded rate; a and b of every step at the nodes, (batch, node, steps).
    span : RateRange
        Of the same rate.
    """

    def __init__(self, kernels, leaves, span: RateRange):
        self.kernels, self.span = kernels, span
        self.leaves = [leaf.detach() for leaf in leaves]
        self.gradients = [torch.zeros_like(leaf, dtype=torch.float64) for leaf in self.leaves]
        self.coefficients = [torch.einsum("mj,bjn->bmn", span.to_coefficients, leaf) for leaf in self.leaves[1:]]

    def _of(self, i: int, u: torch.Tensor, slopes: bool) -> list[torch.Tensor]:
        """a and b of step i, with their derivatives by the rate where asked, each (batch, z, y, x)."""
        both = [c[:, :, i] for c in self.coefficients]
        if slopes:
            both += [c @ self.span.slope.T for c in both]
        return [x.to(u.dtype) for x in self.span.at(torch.stack(both))]

    def apply(self, i, u, out) -> None:
        u, out = self.kernels.tensor(u), self.kernels.tensor(out)
        a, b = self._of(i, u, False)
        torch.div(a.mul_(u), b.mul_(u).add_(1), out=out)

    def parts(self, i, u) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Derivatives of the step by u, by the rate, by a and by b."""
        u = self.kernels.tensor(u)
        a, b, da, db = self._of(i, u, True)
        d = 1 / (1 + b * u)
        by_a = u * d
        by_b = -a * by_a**2
        return a * d**2, by_a * da + by_b * db, by_a, by_b

    def adjoint(self, i, lam, u) -> None:
        lam = self.kernels.tensor(lam)
        by_u, by_rate, by_a, by_b = self.parts(i, u)
        self.gradients[0] += _as(lam * by_rate, self.gradients[0])
        for total, part in zip(self.gradients[1:], (by_a, by_b), strict=True):
            total[:, :, i] += _as(self.span.moments(lam * part) @ self.span.to_coefficients, total[:, :, i])
        lam *= by_u

    def tangent(self, i, tan, u, leaves) -> None:
        tan = self.kernels.tensor(tan)
        by_u, by_rate, by_a, by_b = self.parts(i, u)
        rate, *tables = leaves
        tan *= by_u
        for d in range(tan.shape[0]):
            if bool((rate[d] != 0).any()):
                tan[d] += (by_rate * rate[d]).to(tan.dtype)
            for part, table in zip((by_a, by_b), tables, strict=True):
                if bool((table[d] != 0).any()):
                    tan[d] += part * self.span.at(table[d][:, :, i] @ self.span.to_coefficients.T).to(tan.dtype)

    def slope(self, i, u) -> Array:
        return self.kernels.array(self.parts(i, u)[0].contiguous())

    def rate_slope(self, i, u) -> Array:
        """Derivative of step i by the rate, voxel by voxel."""
        return self.kernels.array(self.parts(i, u)[1].contiguous())


def _as(found: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Summed over the batch where the leaf is shared by it."""
    return (found.sum(0, keepdim=True) if like.shape[0] < found.shape[0] else found).to(like.dtype)
