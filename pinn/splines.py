"""Voxel fields made smooth by cubic B-splines: values, gradient and Laplacian anywhere in the box.

The voxels' values are the spline's coefficients, without the filter that would make it interpolate: fields of tissue
jump from voxel to voxel, an interpolating curve overshoots there and a diffusivity would become negative. So a field is
blurred with a standard deviation of 0.58 voxels (the B-spline's own) and stays within its range. At the box's sides it
is mirrored. B-splines: Unser 1999, IEEE Signal Process Mag 16:22, doi:10.1109/79.799930.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


def _weights(at: torch.Tensor, n: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The four voxels (m, 4) around each place, and their weights (m, 4) for value, first and second derivative.

    Parameters
    ----------
    at : tensor, shape (m,)
        Places on the unit interval, which holds n voxels.
    """
    place = at * n - 0.5
    first = torch.floor(place)
    t = (place - first)[:, None]
    index = first.long()[:, None] + torch.arange(-1, 3)
    index = torch.where(index < 0, -1 - index, index)
    index = torch.where(index >= n, 2 * n - 1 - index, index).clamp(0, n - 1)
    value = torch.cat(((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3), 1) / 6
    slope = torch.cat((-((1 - t) ** 2), 3 * t**2 - 4 * t, -3 * t**2 + 2 * t + 1, t**2), 1) / 2
    curve = torch.cat((1 - t, 3 * t - 2, -3 * t + 1, t), 1)
    return index, [value, n * slope, n * n * curve]


@dataclass(frozen=True, eq=False)
class Splines:
    """Places in a box with the voxels and weights that a spline needs there.

    Attributes
    ----------
    index : tensor, shape (n, 4^d)
        Flat index of voxels.
    weights : list of tensor, shape (n, 4^d)
        For the value, the derivative along each axis, and the second derivative along each axis.
    """

    index: torch.Tensor
    weights: list[torch.Tensor]

    @classmethod
    def of(cls, x: torch.Tensor, shape: Sequence[int]) -> Splines:
        """At places x (n, d) on the unit box of `shape` voxels."""
        d = len(shape)
        each = [_weights(x[:, i], n) for i, n in enumerate(shape)]
        index = torch.zeros(len(x), 1, dtype=torch.long)
        for (here, _), n in zip(each, shape, strict=True):
            index = (index[:, :, None] * n + here[:, None, :]).reshape(len(x), -1)

        def product(orders: Sequence[int]) -> torch.Tensor:
            total = torch.ones(len(x), 1, dtype=torch.float64)
            for (_, weight), order in zip(each, orders, strict=True):
                total = (total[:, :, None] * weight[order][:, None, :]).reshape(len(x), -1)
            return total

        orders = [[0] * d] + [[k * (i == j) for j in range(d)] for k in (1, 2) for i in range(d)]
        return cls(index, [product(o) for o in orders])

    def value(self, field: torch.Tensor) -> torch.Tensor:
        """Values (n,) of a voxel field of the box's shape."""
        return (field.reshape(-1)[self.index] * self.weights[0]).sum(1)

    def slopes(self, field: torch.Tensor, which: torch.Tensor | None = None) -> torch.Tensor:
        """Value and gradient (1 + d, n), in units of the box's sides.

        With `which` (n,) the field has a leading axis, and each place takes one of its entries.
        """
        if which is None:
            here = field.reshape(-1)[self.index]
        else:
            here = field.reshape(len(field), -1)[which[:, None], self.index]
        d = (len(self.weights) - 1) // 2
        return torch.stack([(here * w).sum(1) for w in self.weights[: d + 1]])

    def all(self, field: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
        """Value, gradient and Laplacian sum_i metric_i f_ii (d + 2, n)."""
        here = field.reshape(-1)[self.index]
        d = len(metric)
        found = [(here * w).sum(1) for w in self.weights]
        return torch.stack([*found[: d + 1], (metric[:, None] * torch.stack(found[d + 1 :])).sum(0)])


def on_sides(field: torch.Tensor, sides: Sequence[torch.Tensor]) -> torch.Tensor:
    """Values of a voxel field (n_1, ..., n_d) on the product grid of places `sides` (m_i,) to (m_1, ..., m_d)."""
    for places, n in zip(sides, field.shape, strict=True):
        index, (value, _, _) = _weights(places, n)
        matrix = torch.zeros(len(places), n, dtype=torch.float64)
        matrix.scatter_add_(1, index, value)
        field = torch.tensordot(field, matrix, dims=([0], [1]))
    return field
