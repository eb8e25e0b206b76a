"""Grids of voxels: face conductances, and averages between coarser and finer grids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def face_conductances(coefficient: torch.Tensor, mask: torch.Tensor, spacing) -> list[torch.Tensor]:
    """Harmonic face conductances D / spacing², padded, zero outside pairs of mask voxels; differentiable."""
    found = []
    coefficient = coefficient.expand(torch.broadcast_shapes(coefficient.shape, mask.shape))
    for axis, step in zip((-3, -2, -1), spacing, strict=True):
        n = mask.shape[axis]
        low, high = coefficient.narrow(axis, 0, n - 1), coefficient.narrow(axis, 1, n - 1)
        pair = mask.narrow(axis, 0, n - 1) & mask.narrow(axis, 1, n - 1)
        pair = pair & (low + high > 0)
        face = torch.where(pair, 2 * low * high / torch.where(pair, low + high, 1.0), 0.0) / step**2
        # Lower face of voxel i at padded index i + 1: one voxel of padding, one for the missing first face.
        width = [(1, 1), (1, 1), (1, 1)]
        width[axis + 3] = (2, 1)
        found.append(torch.nn.functional.pad(face, [w for pair in reversed(width) for w in pair]))
    return found


def spectral_radius(faces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Gershgorin bound of the operator's spectral radius by batch row (1/day)."""
    total: Any = 0.0  # a tensor from the first axis on
    for axis, face in zip((-3, -2, -1), faces, strict=True):
        n = face.shape[axis]
        total = (
            total
            + torch.nn.functional.pad(
                face.narrow(axis, 1, n - 1), [w for a in (-1, -2, -3) for w in ((0, 1) if a == axis else (0, 0))]
            )
            + face
        )
    return 2 * total.amax((-3, -2, -1))


def coarsen(u: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the mask in blocks of two along every axis longer than one; (batch, z, y, x)."""
    weight = mask.to(u.dtype).expand(u.shape)
    total, count = torch.where(weight > 0, u, 0.0), weight
    for axis in (-3, -2, -1):
        n = u.shape[axis]
        if n > 1:
            pad = [0, 0, 0, 0, 0, 0]
            pad[2 * (-axis - 1) + 1] = n % 2
            total, count = (torch.nn.functional.pad(x, pad) for x in (total, count))
            total, count = (
                x.unflatten(axis + x.ndim if axis < 0 else axis, (-1, 2)).sum(axis + x.ndim + 1) for x in (total, count)
            )
    return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0)


def subdivide(u: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Averages over half voxels from averages over voxels (batch, z, y, x), linear inside each voxel."""
    weight = mask.to(u.dtype)
    smooth, total = u * weight, weight
    kernel = torch.tensor([0.25, 0.5, 0.25], dtype=u.dtype, device=u.device)
    for axis in (-3, -2, -1):
        if u.shape[axis] > 1:
            smooth, total = (_along(x, kernel, axis) for x in (smooth, total))
    smooth = torch.where(mask, smooth / torch.where(mask, total, 1.0), 0.0)
    parts = u
    slopes = []
    for axis in (-3, -2, -1):
        slope = torch.zeros_like(u)
        n = u.shape[axis]
        if n > 2:
            inside = mask.narrow(axis, 0, n - 2) & mask.narrow(axis, 2, n - 2)
            middle = (smooth.narrow(axis, 2, n - 2) - smooth.narrow(axis, 0, n - 2)) / 2
            slope.narrow(axis, 1, n - 2).copy_(torch.where(inside, middle, 0.0))
        slopes.append(slope)
    for k, axis in enumerate((-3, -2, -1)):
        if u.shape[axis] > 1:
            at = axis + u.ndim
            parts = torch.stack((parts - slopes[k] / 4, parts + slopes[k] / 4), at + 1).flatten(at, at + 1)
            slopes = [x.repeat_interleave(2, at) for x in slopes]
    return parts


def _along(u: torch.Tensor, kernel: torch.Tensor, axis: int) -> torch.Tensor:
    """Three-point smoothing along one axis, zero outside."""
    n = u.shape[axis]
    out = kernel[1] * u
    out.narrow(axis, 1, n - 1).add_(kernel[0] * u.narrow(axis, 0, n - 1))
    out.narrow(axis, 0, n - 1).add_(kernel[2] * u.narrow(axis, 1, n - 1))
    return out
