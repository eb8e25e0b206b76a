"""Trilinear elements on voxels: products with the stiffness, on CPU (numba) and anywhere else (eager torch).

Displacements sit at the voxels' corners, (batch, 3, nz + 1, ny + 1, nx + 1) with components (x, y, z); Young's modulus
is constant in a voxel, (batch or 1, nz, ny, nx). Inside a voxel with coordinates from -1 to 1 a displacement is a sum
over eight modes 1, x, y, xy, z, xz, yz, xyz, numbered so that bit 0 stands for x, bit 1 for y and bit 2 for z. Products
of their derivatives are orthogonal over the voxel unless they are alike, so that in modes the 24 x 24 element matrix
has 21 entries on its diagonal and 24 beside it: the product costs sums and differences of corners, and little else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch

from biomodel.solvers.kernels import THREADED, _pool

_jit = numba.njit(fastmath={"contract", "nsz", "arcp", "reassoc"}, cache=True, nogil=True, error_model="numpy")
_inline = numba.njit(fastmath={"contract", "nsz", "arcp", "reassoc"}, inline="always")
#: Element planes that one job works on. Neighbouring jobs share a plane of corners, so even ones run before odd ones.
SLAB = 4


@dataclass(frozen=True, eq=False)
class Element:
    """The element matrix of one voxel in modes, for a Young's modulus of 1.

    Attributes
    ----------
    diagonal : ndarray, shape (3, 8)
        By component and mode; includes volume and the factor 1/64 of the two changes of basis.
    shear : ndarray, shape (3,)
        Factors of the products of components (x, y), (x, z) and (y, z) by the shear modulus; modes that also vary along
        the third axis count a third.
    bulk : ndarray, shape (2, 3)
        The same by Lamé's first parameter, and, with the third, of modes that also vary along the third axis.
    corner : ndarray, shape (3,)
        Diagonal entry of the element matrix at every corner, by component.
    """

    diagonal: np.ndarray
    shear: np.ndarray
    bulk: np.ndarray
    corner: np.ndarray

    @classmethod
    def of(cls, spacing: tuple[float, float, float], poisson: float) -> Element:
        """Element of a voxel with spacing (dz, dy, dx), mm, and Poisson's ratio, all terms integrated in full.

        Trilinear elements are too stiff where tissue bends or hardly changes its volume. So the bubbles 1 - x², 1 - y²
        and 1 - z² of each component are added inside a voxel and eliminated (Taylor et al. 1976, Int J Numer Methods
        Eng 10:1211, doi:10.1002/nme.1620100602). What bends a voxel, the modes that are linear along two axes with the
        displacement along one of them, then has the modulus of plane stress and no shear.
        """
        mu, lam = lame(1.0, poisson)
        softer = lam**2 / (2 * mu + lam)
        h = np.array(spacing[::-1])
        factor = float(np.prod(h)) / 64
        diagonal = np.zeros((3, 8))
        for c in range(3):
            for m in range(1, 8):
                others = 1 / 3 ** (m.bit_count() - 1)
                bends = m.bit_count() == 2 and m >> c & 1
                for d in range(3):
                    if m >> d & 1:
                        modulus = 2 * mu + lam - softer * bends if c == d else mu * (1 - bends)
                        diagonal[c, m] += factor * others * 4 / h[d] ** 2 * modulus
        pairs = np.array([4 / (h[0] * h[1]), 4 / (h[0] * h[2]), 4 / (h[1] * h[2])]) * factor
        return cls(diagonal, mu * pairs, np.stack((lam * pairs, (lam - softer) * pairs / 3)), diagonal.sum(1))

    def matrix(self) -> np.ndarray:
        """The 24 × 24 element matrix, rows by component and corner (x fastest); for tests and bounds."""
        unit = torch.eye(24, dtype=torch.float64).reshape(24, 3, 2, 2, 2)
        return TorchElastic.apply(unit, torch.ones(1, 1, 1, 1, dtype=torch.float64), self).reshape(24, 24).numpy()


def lame(young: Any, poisson: float) -> tuple[Any, Any]:
    """Shear modulus and Lamé's first parameter of an isotropic solid."""
    return young / (2 * (1 + poisson)), young * poisson / ((1 + poisson) * (1 - 2 * poisson))


@_inline
def _face(w, k, j, i):
    # modes over y and z of the four corners with x index i: 1, y, z, yz
    a, b, c, d = w[k, j, i], w[k, j + 1, i], w[k + 1, j, i], w[k + 1, j + 1, i]
    low, high, dl, dh = a + b, c + d, b - a, d - c
    return low + high, dl + dh, high - low, dh - dl


@_inline
def _spread(out, k, j, i, q0, q1, q2, q3):
    # transpose of _face
    out[k, j, i] += q0 - q1 - q2 + q3
    out[k, j + 1, i] += q0 + q1 - q2 - q3
    out[k + 1, j, i] += q0 - q1 + q2 - q3
    out[k + 1, j + 1, i] += q0 + q1 + q2 + q3


@_inline
def _forces(x, y, z, diagonal, shear, bulk):
    # the element matrix in modes: three tuples of modes 1 .. 7 in and out
    x1, x2, x3, x4, x5, x6, x7 = x
    y1, y2, y3, y4, y5, y6, y7 = y
    z1, z2, z3, z4, z5, z6, z7 = z
    sxy, sxz, syz = shear[0], shear[1], shear[2]
    bxy, bxz, byz = bulk[0, 0], bulk[0, 1], bulk[0, 2]
    gxy, gxz, gyz = bulk[1, 0], bulk[1, 1], bulk[1, 2]
    t = 1.0 / 3.0
    fx = (
        diagonal[0, 1] * x1 + bxy * y2 + bxz * z4,
        diagonal[0, 2] * x2 + sxy * y1,
        diagonal[0, 3] * x3 + gxz * z6,
        diagonal[0, 4] * x4 + sxz * z1,
        diagonal[0, 5] * x5 + gxy * y6,
        diagonal[0, 6] * x6 + t * (sxy * y5 + sxz * z3),
        diagonal[0, 7] * x7,
    )
    fy = (
        diagonal[1, 1] * y1 + sxy * x2,
        diagonal[1, 2] * y2 + bxy * x1 + byz * z4,
        diagonal[1, 3] * y3 + gyz * z5,
        diagonal[1, 4] * y4 + syz * z2,
        diagonal[1, 5] * y5 + t * (sxy * x6 + syz * z3),
        diagonal[1, 6] * y6 + gxy * x5,
        diagonal[1, 7] * y7,
    )
    fz = (
        diagonal[2, 1] * z1 + sxz * x4,
        diagonal[2, 2] * z2 + syz * y4,
        diagonal[2, 3] * z3 + t * (sxz * x6 + syz * y5),
        diagonal[2, 4] * z4 + bxz * x1 + byz * y2,
        diagonal[2, 5] * z5 + gyz * y3,
        diagonal[2, 6] * z6 + gxz * x3,
        diagonal[2, 7] * z7,
    )
    return fx, fy, fz


@_inline
def _modes(l0, l1, l2, l3, r0, r1, r2, r3):
    return r0 - l0, l1 + r1, r1 - l1, l2 + r2, r2 - l2, l3 + r3, r3 - l3


@_jit
def _apply(begin, end, color, slabs, out, w, young, diagonal, shear, bulk):
    ne, nz, ny, nx = young.shape
    for job in range(begin, end):
        b = job // slabs
        first = (2 * (job % slabs) + color) * SLAB
        ox, oy, oz = out[b, 0], out[b, 1], out[b, 2]
        wx, wy, wz = w[b, 0], w[b, 1], w[b, 2]
        e = young[b % ne]
        for k in range(first, min(first + SLAB, nz)):
            for j in range(ny):
                # The right face of one voxel is the left face of the next; so are the forces on it.
                a0, a1, a2, a3 = _face(wx, k, j, 0)
                b0, b1, b2, b3 = _face(wy, k, j, 0)
                c0, c1, c2, c3 = _face(wz, k, j, 0)
                p0 = p1 = p2 = p3 = q0 = q1 = q2 = q3 = s0 = s1 = s2 = s3 = 0.0
                for i in range(nx):
                    d0, d1, d2, d3 = _face(wx, k, j, i + 1)
                    e0, e1, e2, e3 = _face(wy, k, j, i + 1)
                    f0, f1, f2, f3 = _face(wz, k, j, i + 1)
                    x, y, z = _forces(
                        _modes(a0, a1, a2, a3, d0, d1, d2, d3),
                        _modes(b0, b1, b2, b3, e0, e1, e2, e3),
                        _modes(c0, c1, c2, c3, f0, f1, f2, f3),
                        diagonal, shear, bulk,
                    )  # fmt: skip
                    m = e[k, j, i]
                    _spread(ox, k, j, i, p0 - m * x[0], p1 + m * (x[1] - x[2]), p2 + m * (x[3] - x[4]),
                            p3 + m * (x[5] - x[6]))  # fmt: skip
                    _spread(oy, k, j, i, q0 - m * y[0], q1 + m * (y[1] - y[2]), q2 + m * (y[3] - y[4]),
                            q3 + m * (y[5] - y[6]))  # fmt: skip
                    _spread(oz, k, j, i, s0 - m * z[0], s1 + m * (z[1] - z[2]), s2 + m * (z[3] - z[4]),
                            s3 + m * (z[5] - z[6]))  # fmt: skip
                    p0, p1, p2, p3 = m * x[0], m * (x[1] + x[2]), m * (x[3] + x[4]), m * (x[5] + x[6])
                    q0, q1, q2, q3 = m * y[0], m * (y[1] + y[2]), m * (y[3] + y[4]), m * (y[5] + y[6])
                    s0, s1, s2, s3 = m * z[0], m * (z[1] + z[2]), m * (z[3] + z[4]), m * (z[5] + z[6])
                    a0, a1, a2, a3 = d0, d1, d2, d3
                    b0, b1, b2, b3 = e0, e1, e2, e3
                    c0, c1, c2, c3 = f0, f1, f2, f3
                _spread(ox, k, j, nx, p0, p1, p2, p3)
                _spread(oy, k, j, nx, q0, q1, q2, q3)
                _spread(oz, k, j, nx, s0, s1, s2, s3)


class NumbaElastic:
    """Products on CPU tensors."""

    @staticmethod
    def apply(w: torch.Tensor, young: torch.Tensor, element: Element) -> torch.Tensor:
        """Nodal forces of displacements `w`, (batch, 3, nz + 1, ny + 1, nx + 1)."""
        out = torch.zeros_like(w, memory_format=torch.contiguous_format)
        arrays = (out.numpy(), w.contiguous().numpy(), young.contiguous().numpy(),
                  element.diagonal, element.shear, element.bulk)  # fmt: skip
        planes = -(-young.shape[1] // SLAB)
        for color in range(2):
            slabs = (planes + 1 - color) // 2
            if not slabs:
                continue
            count = w.shape[0] * slabs
            threads = min(torch.get_num_threads(), count) if w.numel() >= THREADED else 1
            if threads == 1:
                _apply(0, count, color, slabs, *arrays)
                continue
            cuts = [count * t // threads for t in range(threads + 1)]
            jobs = [_pool(threads - 1).submit(_apply, a, b, color, slabs, *arrays)
                    for a, b in zip(cuts[1:-1], cuts[2:], strict=True)]  # fmt: skip
            _apply(cuts[0], cuts[1], color, slabs, *arrays)
            for job in jobs:
                job.result()
        return out

    @staticmethod
    def energy(a: torch.Tensor, w: torch.Tensor, element: Element) -> torch.Tensor:
        """Product of `a` with the element matrix and `w` in every voxel, (batch, nz, ny, nx)."""
        return TorchElastic.energy(a, w, element)


class TorchElastic:
    """The same by whole-array operations of torch, on any device."""

    @staticmethod
    def _modes(w: torch.Tensor) -> list[torch.Tensor]:
        """Eight arrays (..., nz, ny, nx), by mode."""
        found = [w]
        for axis in (-1, -2, -3):
            n = w.shape[axis] - 1
            low, high = ([x.narrow(axis, s, n) for x in found] for s in (0, 1))
            found = [b + a for a, b in zip(low, high, strict=True)] + [b - a for a, b in zip(low, high, strict=True)]
        return found

    @classmethod
    def _products(cls, w: torch.Tensor, e: Element) -> list[list[torch.Tensor]]:
        x, y, z = (cls._modes(w[:, c])[1:] for c in range(3))
        return [list(f) for f in _forces.py_func(x, y, z, e.diagonal, e.shear, e.bulk)]

    @classmethod
    def apply(cls, w: torch.Tensor, young: torch.Tensor, element: Element) -> torch.Tensor:
        """Nodal forces of displacements `w`, (batch, 3, nz + 1, ny + 1, nx + 1)."""
        components = []
        for force in cls._products(w, element):
            parts = [torch.zeros_like(force[0]), *(young * f for f in force)]
            for axis in (-3, -2, -1):
                half = len(parts) // 2
                joined = []
                for even, odd in zip(parts[:half], parts[half:], strict=True):
                    pad = [0] * 6
                    pad[2 * (-axis - 1) + 1] = 1
                    low = torch.nn.functional.pad(even - odd, pad)
                    pad[2 * (-axis - 1)], pad[2 * (-axis - 1) + 1] = 1, 0
                    joined.append(low + torch.nn.functional.pad(even + odd, pad))
                parts = joined
            components.append(parts[0])
        return torch.stack(components, 1)

    @classmethod
    def energy(cls, a: torch.Tensor, w: torch.Tensor, element: Element) -> torch.Tensor:
        """Product of `a` with the element matrix and `w` in every voxel, (batch, nz, ny, nx)."""
        total = torch.zeros((), dtype=w.dtype, device=w.device)
        for c, force in enumerate(cls._products(w, element)):
            modes = cls._modes(a[:, c])[1:]
            for m, f in zip(modes, force, strict=True):
                total = total + m * f
        return total
