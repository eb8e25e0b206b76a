"""Multigrid for the elasticity of voxels: levels of coarser voxels, smoothed by Chebyshev polynomials.

Every level has its own stiffness, made from mean moduli, so that no matrix is stored; the coarsest is inverted. A cycle
is a symmetric operator, which conjugate gradients need of a preconditioner.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from biomodel.solvers.elastic_kernels import Element, NumbaElastic, TorchElastic

#: An axis is made coarser where its spacing is below this multiple of the finest: points then couple alike along all.
SEMI = 1.5
#: Smoothing steps before and after the coarse correction, and the part of the spectrum that they reduce.
DEGREE, REACH = 3, 12.0


@dataclass(frozen=True, eq=False)
class Grid:
    """One level: what does not depend on the moduli.

    Attributes
    ----------
    shape : tuple of int
        Voxels (z, y, x).
    halved : tuple of bool
        Axes along which the next level is coarser.
    free : Tensor, shape (3, nz + 1, ny + 1, nx + 1)
        1 where a displacement (x, y, z) is unknown, 0 where it is held.
    inside : Tensor, shape (nz, ny, nx)
        Share of each voxel that belongs to the body.
    """

    shape: tuple[int, ...]
    spacing: tuple[float, float, float]
    halved: tuple[bool, ...]
    free: torch.Tensor
    inside: torch.Tensor
    element: Element
    bound: float


def to_coarse(x: torch.Tensor, halved) -> torch.Tensor:
    """Transpose of `to_fine`: forces at the corners of coarse voxels."""
    for axis, half in zip((-3, -2, -1), halved, strict=True):
        if half:
            even, odd = x.unfold(axis, 1, 2).squeeze(-1), x.narrow(axis, 1, x.shape[axis] - 1).unfold(axis, 1, 2)
            odd, x = odd.squeeze(-1), even.clone()
            x.narrow(axis, 0, x.shape[axis] - 1).add_(odd, alpha=0.5)
            x.narrow(axis, 1, x.shape[axis] - 1).add_(odd, alpha=0.5)
    return x


def to_fine(x: torch.Tensor, halved) -> torch.Tensor:
    """Linear interpolation of displacements between the corners of coarse voxels."""
    for axis, half in zip((-3, -2, -1), halved, strict=True):
        if half:
            n = x.shape[axis] - 1
            shape = list(x.shape)
            shape[axis] = 2 * n + 1
            out = x.new_empty(shape)
            index: list = [slice(None)] * x.ndim
            index[axis] = slice(None, None, 2)
            out[tuple(index)] = x
            index[axis] = slice(1, None, 2)
            out[tuple(index)] = (x.narrow(axis, 0, n) + x.narrow(axis, 1, n)) * 0.5
            x = out
    return x


def halve(x: torch.Tensor, halved) -> torch.Tensor:
    """Sum over pairs of voxels along the halved axes."""
    for axis, half in zip((-3, -2, -1), halved, strict=True):
        if half:
            x = x.unflatten(axis, (-1, 2)).sum(axis)
    return x


def pad_to(x: torch.Tensor, shape) -> torch.Tensor:
    """Zeros at the end of each axis, up to `shape`."""
    ends = [a - b for a, b in zip(shape, x.shape[-3:], strict=True)]
    return torch.nn.functional.pad(x, [p for end in reversed(ends) for p in (0, end)])


def corner_sums(x: torch.Tensor) -> torch.Tensor:
    """Sum over the (up to eight) voxels around every corner."""
    for axis in (-3, -2, -1):
        pad = [0] * 6
        pad[2 * (-axis - 1)] = pad[2 * (-axis - 1) + 1] = 1
        x = torch.nn.functional.pad(x, pad)
        n = x.shape[axis] - 1
        x = x.narrow(axis, 0, n) + x.narrow(axis, 1, n)
    return x


class Multigrid:
    """Levels for one set of moduli, and the cycle as an approximate inverse.

    Parameters
    ----------
    grids : list of Grid
        From fine to coarse.
    young : Tensor, shape (batch or 1, nz, ny, nx)
        Young's modulus on the finest, 0 outside the body.
    """

    def __init__(self, grids: list[Grid], young: torch.Tensor):
        self.grids = grids
        self.kernels = NumbaElastic if young.device.type == "cpu" else TorchElastic
        self.young: list[torch.Tensor] = []
        self.inverse_diagonal: list[torch.Tensor] = []
        for n, grid in enumerate(grids):
            if n:
                above = grids[n - 1]
                share = grid.inside
                total = pad_to(halve(young * above.inside, above.halved), grid.shape)
                cells = 2 ** sum(above.halved)
                young = torch.where(share > 0, total / torch.where(share > 0, share * cells, 1.0), 0.0)
            self.young.append(young.contiguous())
            corner = torch.as_tensor(grid.element.corner, device=young.device).reshape(3, 1, 1, 1)
            diagonal = corner * corner_sums(young * (grid.inside > 0))[:, None]
            self.inverse_diagonal.append(torch.where(grid.free > 0, 1 / torch.where(diagonal > 0, diagonal, 1.0), 0.0))
        self.coarsest = self._inverse()

    def apply(self, level: int, w: torch.Tensor) -> torch.Tensor:
        """Stiffness of a level times `w`, 0 where displacements are held."""
        out = self.kernels.apply(w, self.young[level], self.grids[level].element)
        return out.mul_(self.grids[level].free)

    def _inverse(self) -> torch.Tensor:
        """Pseudo-inverse of the coarsest stiffness, (batch or 1, unknowns, unknowns)."""
        grid, young = self.grids[-1], self.young[-1]
        self.unknown = torch.nonzero(grid.free.reshape(-1) > 0)[:, 0]
        n = len(self.unknown)
        unit = torch.zeros(n, grid.free.numel(), dtype=torch.float64, device=young.device)
        unit[torch.arange(n), self.unknown] = 1.0
        found = []
        for e in young:
            images = self.kernels.apply(unit.reshape(n, *grid.free.shape), e[None], grid.element)
            matrix = images.reshape(n, grid.free.numel())[:, self.unknown]
            found.append(torch.linalg.pinv(matrix, rtol=1e-11, hermitian=True))
        return torch.stack(found)

    def cycle(self, r: torch.Tensor, level: int = 0) -> torch.Tensor:
        """One V-cycle from zero: an approximate solution of (stiffness) x = r."""
        if level == len(self.grids) - 1:
            flat = r.reshape(r.shape[0], -1)[:, self.unknown]
            x = torch.zeros(r.shape[0], r[0].numel(), dtype=r.dtype, device=r.device)
            x[:, self.unknown] = (self.coarsest @ flat[..., None])[..., 0]
            return x.reshape(r.shape)
        grid = self.grids[level]
        x, r = self._smooth(level, None, r)
        coarse = self.grids[level + 1]
        down = pad_to(to_coarse(r, grid.halved), coarse.free.shape[-3:])
        below = self.cycle(down * coarse.free, level + 1)
        nodes = [n // 2 + 1 if half else n + 1 for n, half in zip(grid.shape, grid.halved, strict=True)]
        step = to_fine(below[..., : nodes[0], : nodes[1], : nodes[2]], grid.halved).mul_(grid.free)
        x += step
        r -= self.apply(level, step)
        return self._smooth(level, x, r, last=True)[0]

    def _smooth(self, level: int, x, r: torch.Tensor, last: bool = False):
        """Chebyshev steps on (stiffness) e = r, preconditioned with the diagonal; x + e and what is left of r.

        Saad 2003, Iterative Methods for Sparse Linear Systems, section 12.3, doi:10.1137/1.9780898718003.
        """
        inverse = self.inverse_diagonal[level]
        high = self.grids[level].bound
        low = high / REACH
        theta, delta = (high + low) / 2, (high - low) / 2
        sigma = theta / delta
        rho = 1 / sigma
        d = (inverse * r).mul_(1 / theta)
        x = d.clone() if x is None else x.add_(d)
        for _ in range(DEGREE - 1):
            r = r - self.apply(level, d)
            new = 1 / (2 * sigma - rho)
            d = d.mul_(new * rho).add_((inverse * r).mul_(2 * new / delta))
            x += d
            rho = new
        return x, (r if last else r - self.apply(level, d))


def make_grids(inside: torch.Tensor, free: torch.Tensor, spacing: tuple[float, float, float],
               poisson: float) -> list[Grid]:  # fmt: skip
    """Levels from a body on voxels.

    Parameters
    ----------
    inside : Tensor of bool, shape (nz, ny, nx)
    free : Tensor, shape (3, nz + 1, ny + 1, nx + 1)
    spacing : (dz, dy, dx), mm
    """
    grids = []
    share = inside.to(torch.float64)
    while True:
        shape = tuple(share.shape)
        least = min((h for h, n in zip(spacing, shape, strict=True) if n > 3), default=0.0)
        halved = tuple(n > 3 and h < SEMI * least for n, h in zip(shape, spacing, strict=True))
        # An odd number of voxels gets one more, which lies outside.
        odd = [int(half and n % 2) for half, n in zip(halved, shape, strict=True)]
        share, free = (pad_to(x, [n + m for n, m in zip(x.shape[-3:], odd, strict=True)]) for x in (share, free))
        element = Element.of(spacing, poisson)
        matrix = element.matrix()
        scale = np.sqrt(np.diag(matrix))
        bound = float(np.linalg.eigvalsh(matrix / np.outer(scale, scale))[-1])
        grids.append(Grid(tuple(share.shape), spacing, halved, free.contiguous(), share, element, bound))
        if not any(halved):
            return grids
        cells = 2 ** sum(halved)
        share = halve(share, halved) / cells
        index = tuple(slice(None, None, 2 if half else 1) for half in halved)
        kept = free[(slice(None), *index)]
        free = kept * (corner_sums(share)[None] > 0)
        spacing = tuple(h * (2 if half else 1) for h, half in zip(spacing, halved, strict=True))  # type: ignore
