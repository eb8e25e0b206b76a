"""The organ's mask for a network: distance to its surface, points inside and on it, and fields continued beyond it.

A network knows no voxels. The mask becomes a smooth signed distance (positive inside); points of the residual lie where
it is positive, and the zero flux through the surface is asked for at points where it is zero, along its gradient.
Sides of the box that the mask reaches are no surface: there zero flux is in the network's cosines.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter, label
from scipy.stats import qmc

from biomodel.domain import Domain
from biomodel.errors import SolverError
from pinn.splines import Splines

#: Standard deviation, in voxels, by which the distance to a surface of voxels is blurred.
SMOOTH = 1.0
#: Newton steps that move a point to the surface, and how near it then has to be, in voxels.
STEPS, NEAR = 8, 0.05
#: Least length of the distance's gradient at a surface point: at ridges between two surfaces there is no normal.
STEEP = 0.4
#: Most draws from the sequence per point wanted inside the mask.
DRAWS = 64


@dataclass(frozen=True, eq=False)
class Geometry:
    """An organ in a box; axes of one voxel are left out.

    Parameters
    ----------
    mask : ndarray of bool, shape (n_1, ..., n_d)
    spacing : ndarray, shape (d,)
        mm.
    """

    mask: np.ndarray
    spacing: np.ndarray

    @classmethod
    def of(cls, domain: Domain) -> Geometry:
        """The geometry of a domain.

        Raises
        ------
        SolverError
            If the mask has several components: nothing passes between them, and a network is one smooth function.
        """
        axes = [i for i, n in enumerate(domain.shape) if n > 1]
        mask = domain.mask.reshape([domain.shape[i] for i in axes])
        _, pieces = label(mask)
        if pieces > 1:
            raise SolverError(
                f"PinnSolver: the mask falls into {pieces} components (voxels that share a side belong together); a "
                "network is one smooth function and would leak across the gaps. Keep the component that holds the "
                "tumour, or use bm.TorchSolver() or bm.FenicsSolver()."
            )
        return cls(mask, np.array([domain.spacing[i] for i in axes]))

    @property
    def whole(self) -> bool:
        """Whether the mask is the whole box."""
        return bool(self.mask.all())

    @cached_property
    def distance(self) -> torch.Tensor:
        """Signed distance (n_1, ..., n_d) to the surface, mm, positive inside; without a surface, the box's size."""
        if self.whole:
            longest = float((np.array(self.mask.shape) * self.spacing).max())
            return torch.full(self.mask.shape, longest, dtype=torch.float64)
        signed = self._reach(self.mask) - self._reach(~self.mask)
        # A mask's edge is a staircase; blurred over a voxel it has a normal.
        return torch.tensor(gaussian_filter(signed, SMOOTH, mode="nearest"))

    def _reach(self, region: np.ndarray) -> np.ndarray:
        """Distance (n_1, ..., n_d) from voxels of a region to its edge, mm, 0 outside of it."""
        away, nearest = distance_transform_edt(region, sampling=self.spacing, return_indices=True)
        step = (nearest - np.indices(region.shape)) * self.spacing.reshape(-1, *[1] * region.ndim)
        # Centres on both sides of a face lie half a voxel from it, measured along the way, not a whole one.
        squares = (step * self.spacing.reshape(-1, *[1] * region.ndim)) ** 2
        half = 0.5 * np.sqrt(squares.sum(0)) / np.maximum(away, 1e-12)
        return np.where(region, np.maximum(away - half, 0), 0.0)

    @cached_property
    def _mirror(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Voxels (n, 2^d) and weights (n, 2^d) that give each voxel's value, mirrored at the surface where outside."""
        shape, d = self.mask.shape, self.mask.ndim
        nearest = distance_transform_edt(
            ~self.mask, sampling=self.spacing, return_distances=False, return_indices=True
        ).reshape(d, -1)
        place = np.indices(shape).reshape(d, -1).astype(float)
        distance = self.distance.numpy()
        slopes = np.stack(np.gradient(distance, *self.spacing)).reshape(d, -1)
        slopes /= np.maximum(np.linalg.norm(slopes, axis=0), STEEP)
        outside = ~self.mask.ravel()
        # From a voxel at depth -a outside to the one at depth a inside, along the distance's gradient.
        place += np.where(outside, -2 * distance.ravel() * slopes, 0) / self.spacing[:, None]
        place = np.clip(place, 0, np.array(shape)[:, None] - 1.0)
        low = np.minimum(np.floor(place).astype(int), np.maximum(np.array(shape)[:, None] - 2, 0))
        part = place - low
        index, weight = [], []
        for corner in np.ndindex((2,) * d):
            voxel = np.ravel_multi_index(tuple(low + np.array(corner)[:, None]), shape)
            # A corner that is outside itself takes the nearest voxel inside.
            index.append(np.ravel_multi_index(tuple(nearest[:, voxel]), shape))
            weight.append(np.prod([p if c else 1 - p for c, p in zip(corner, part, strict=True)], axis=0))
        return torch.tensor(np.stack(index, 1)), torch.tensor(np.stack(weight, 1))

    @property
    def thin(self) -> np.ndarray:
        """Voxels of the mask (n_1, ..., n_d) that lie beyond a smooth organ's surface and not next to it, bool."""
        smooth = binary_dilation(self.distance.numpy() > 0, np.ones((3,) * self.mask.ndim))
        return self.mask & ~smooth

    def continued(self, field: np.ndarray | torch.Tensor) -> torch.Tensor:
        """A field (n_1, ..., n_d), mirrored at the organ's surface outside of it.

        What diffuses from a mirrored field keeps its symmetry, so that hardly anything flows through the surface.
        """
        values = torch.tensor(field) if isinstance(field, np.ndarray) else field
        values = values.to(torch.float64)
        if self.whole:
            return values
        index, weight = self._mirror
        return (values.reshape(-1)[index] * weight).sum(1).reshape(values.shape)

    def inside(self, count: int, seed: int, weight: torch.Tensor | None = None) -> torch.Tensor:
        """Points (count, d + 1) of a Sobol sequence inside the organ; the last column is spread over [0, 1], too.

        Inside is where the smooth distance is positive, and in all voxels of the mask: thin parts vanish when blurred.

        Parameters
        ----------
        weight : tensor, shape (n_1, ..., n_d), optional
            Relative density of points, at most 1.

        Raises
        ------
        SolverError
            If the organ holds too few points.
        """
        d = self.mask.ndim
        sequence = qmc.Sobol(d + (1 if weight is None else 2), seed=seed)
        if self.whole and weight is None:
            return _drawn(sequence, count)
        distance, shape = self.distance, torch.tensor(self.mask.shape)
        occupied = np.argwhere(self.mask)
        low, high = (torch.tensor(v) / shape for v in (occupied.min(0), occupied.max(0) + 1))
        mask = torch.tensor(self.mask)
        kept, found = [], 0
        for _ in range(DRAWS):
            points = _drawn(sequence, count)
            points[:, :d] = low + (high - low) * points[:, :d]
            splines = Splines.of(points[:, :d], self.mask.shape)
            voxel = (points[:, :d] * shape).long().clamp(max=shape - 1)
            good = mask[tuple(voxel.T)] | (splines.value(distance) > 0)
            if weight is not None:
                good &= points[:, -1] < splines.value(weight)
            kept.append(points[good][:, : d + 1])
            found += int(good.sum())
            if found >= count:
                break
        if found < count:
            raise SolverError(
                f"PinnSolver: the organ of {int(self.mask.sum())} voxels holds {found} of {count} points wanted; crop "
                "the domain to a box around it, or use bm.TorchSolver()."
            )
        return torch.cat(kept)[:count]

    def surface(self, count: int, seed: int, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Points (m, d + 1) on the organ's surface, the last column over [0, 1], and outward normals (m, d) in mm.

        m is at most `count`; places without a clear normal are left out.
        """
        d = self.mask.ndim
        nothing = torch.zeros(0, d + 1, dtype=torch.float64), torch.zeros(0, d, dtype=torch.float64)
        if self.whole or count == 0:
            return nothing
        distance = self.distance
        sides = torch.tensor(self.mask.shape * self.spacing)
        near = np.argwhere(np.abs(distance.numpy()) < 1.01 * self.spacing.max())
        if weight is not None:
            near = near[weight.numpy()[tuple(near.T)] > np.random.default_rng(seed).random(len(near))]
        if not len(near):
            return nothing
        random = _drawn(qmc.Sobol(d + 1, seed=seed), 4 * count)
        pick = np.random.default_rng(seed).integers(len(near), size=4 * count)
        x = (torch.tensor(near[pick]) + random[:, :d]) / torch.tensor(self.mask.shape)
        for _ in range(STEPS):
            value, slope = self._distance(distance, x, sides)
            x = x - value[:, None] * slope / slope.square().sum(1, keepdim=True).clamp_min(STEEP**2) / sides
            x = x.clamp(0, 1)
        value, slope = self._distance(distance, x, sides)
        steep = slope.norm(dim=1)
        good = (value.abs() < NEAR * self.spacing.min()) & (steep > STEEP)
        points = torch.cat((x, random[:, d:]), 1)[good][:count]
        return points, (-slope / steep[:, None])[good][:count]

    def _distance(self, distance: torch.Tensor, x: torch.Tensor, sides: torch.Tensor):
        found = Splines.of(x, self.mask.shape).slopes(distance)
        return found[0], found[1:].T / sides

    @property
    def layer(self) -> float:
        """Share of the organ's voxels that touch its surface."""
        if self.whole:
            return 0.0
        padded = np.pad(self.mask, 1, mode="edge")
        bare = np.zeros(self.mask.shape, bool)
        for axis in range(self.mask.ndim):
            for shift in (-1, 1):
                bare |= ~np.roll(padded, shift, axis)[(slice(1, -1),) * self.mask.ndim]
        return float((bare & self.mask).sum() / self.mask.sum())


def _drawn(sequence: qmc.Sobol, count: int) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a Sobol sequence cut short is as good here
        return torch.tensor(sequence.random(count))
