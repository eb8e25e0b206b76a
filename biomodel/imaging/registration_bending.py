"""The search for a bending transform: a cubic B-spline whose likeness is weighed against its bending energy.

SimpleITK's B-spline registration knows no penalty, and without one it bends freely where an image shows little, which
is most of a breast (the benchmark measures it); so this search is made here, on torch. The transform and its bending
energy are those of Rueckert et al. 1999 (IEEE Trans Med Imaging 18:712), doi:10.1109/42.796284.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from biomodel.imaging.series_grid import Grid

__all__ = ["JointHistogram", "Likeness", "LocalCorrelation", "Volume", "bend"]

#: Share of the median local variance that is added to each: windows with nothing but noise count little.
FLOOR = 0.05
#: Most voxels of the finest level: beyond, voxels are joined, since the transform is much smoother than they are.
MOST_VOXELS = 300_000


@dataclass(frozen=True)
class LocalCorrelation:
    """Squared correlation inside small windows: gain, contrast and shading may differ from place to place.

    As Cachier et al. 2003 (Comput Vis Image Underst 89:272) and many since; squared, so that what is bright in one
    image may be dark in the other. At the body's surface that does not help, where air is dark in both: for images of
    inverted contrast take :class:`JointHistogram`.

    Parameters
    ----------
    window
        Side of a window, mm.
    """

    window: float = 15.0

    def varied(self, factor: float) -> LocalCorrelation:
        """Return the measure with windows of another size."""
        return LocalCorrelation(self.window * factor)

    def __call__(
        self, fixed: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor, spacing: tuple[float, ...]
    ) -> torch.Tensor:
        """Return the mean over windows that overlap by half, 0 to 1. Tensors (z, y, x)."""
        size = [min(max(3, round(self.window / s)), n) for s, n in zip(spacing, fixed.shape, strict=True)]
        stride = [max(1, n // 2) for n in size]

        stack = torch.stack(
            [
                weight,
                weight * fixed,
                weight * moving,
                weight * fixed * fixed,
                weight * moving * moving,
                weight * fixed * moving,
            ]
        )
        share, f, m, ff, mm, fm = torch.nn.functional.avg_pool3d(stack[:, None], size, stride)[:, 0]
        total = share + 1e-6
        var_f = (ff / total - (f / total) ** 2).clamp_min(0)
        var_m = (mm / total - (m / total) ** 2).clamp_min(0)
        both = fm / total - f * m / total**2
        used = share > 0.1
        floor_f, floor_m = (FLOOR * v.detach()[used].median() + 1e-12 for v in (var_f, var_m))
        squared = both**2 / ((var_f + floor_f) * (var_m + floor_m))
        shares = torch.where(used, share, torch.zeros_like(share))
        return (shares * squared).sum() / shares.sum()


@dataclass(frozen=True)
class JointHistogram:
    """Mutual information, nats: for images of any two contrasts, as diffusion and contrast-enhanced ones.

    With the histogram of Mattes et al. 2003 (doi:10.1109/TMI.2003.809072): boxes for the fixed image, cubic splines
    for the moving one. Shading must have been corrected before, since it counts as contrast.

    Parameters
    ----------
    bins
        Along each axis.
    """

    bins: int = 24

    def varied(self, factor: float) -> JointHistogram:
        """Return the measure with another number of bins."""
        return JointHistogram(max(8, round(self.bins * factor)))

    def __call__(
        self, fixed: torch.Tensor, moving: torch.Tensor, weight: torch.Tensor, spacing: tuple[float, ...]
    ) -> torch.Tensor:
        """Return the mutual information. Tensors (z, y, x)."""
        used = weight > 0
        share = weight[used] / weight[used].sum()
        row = self._places(fixed[used]).round().long() * self.bins
        place = self._places(moving[used])
        first = place.detach().floor()
        joint = torch.zeros(self.bins**2)
        for step in (-1, 0, 1, 2):  # a cubic spline reaches four bins
            bin_ = first + step
            away = (place - bin_).abs()
            part = 2 / 3 - away**2 + away**3 / 2 if step in (0, 1) else (2 - away) ** 3 / 6
            joint = joint.index_add(0, row + bin_.long(), share * part)
        joint = joint.reshape(self.bins, self.bins)
        joint = joint / joint.sum()
        alone = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
        return (joint * torch.log((joint + 1e-10) / (alone + 1e-10))).sum()

    def _places(self, values: torch.Tensor) -> torch.Tensor:
        """Bins, as numbers from 2 to the last but two, which leaves room for the splines."""
        low, high = values.detach().min(), values.detach().max()
        return 2 + (values - low) / (high - low).clamp_min(1e-12) * (self.bins - 5)


Likeness = LocalCorrelation | JointHistogram


@dataclass(frozen=True, eq=False)
class Volume:
    """An image as the search takes it: values without gaps, where they count, and its grid."""

    values: np.ndarray
    weight: np.ndarray
    grid: Grid


class Spline:
    """A cubic B-spline over the box of a grid, knots `step` mm apart along its axes.

    `offset`, shares of a step, moves the knots.
    """

    def __init__(self, grid: Grid, step: float, offset: np.ndarray) -> None:
        self.axes = grid.affine[:3, :3] / grid.spacing[::-1]  # columns x, y, z
        self.grid, self.step, self.offset = grid, step, offset
        lengths = [(n - 1) * s for n, s in zip(grid.shape, grid.spacing, strict=True)]
        self.count = tuple(int(np.ceil(length / step)) + 4 for length in lengths)
        # The energy is a sum of six products of one matrix per axis.
        fine = tuple(max(2 * (k - 3), 2) for k in self.count)
        self._grams = [
            ([b.T @ b / len(b) for b in self.on(fine, orders)], times)
            for orders, times in (
                ((2, 0, 0), 1.0),
                ((0, 2, 0), 1.0),
                ((0, 0, 2), 1.0),
                ((1, 1, 0), 2.0),
                ((1, 0, 1), 2.0),
                ((0, 1, 1), 2.0),
            )
        ]

    def basis(self, axis: int, places: np.ndarray, order: int = 0) -> torch.Tensor:
        """Return the splines (or a derivative per mm) at places, mm along an axis from the first voxel: (n, knots)."""
        t = places[:, None] / self.step + 1 + self.offset[axis] - np.arange(self.count[axis])
        a = np.abs(t)
        if order == 0:
            values = np.where(a < 1, 2 / 3 - a**2 + a**3 / 2, np.where(a < 2, (2 - a) ** 3 / 6, 0.0))
        elif order == 1:
            values = np.sign(t) * np.where(a < 1, -2 * a + 1.5 * a**2, np.where(a < 2, -((2 - a) ** 2) / 2, 0.0))
        else:
            values = np.where(a < 1, -2 + 3 * a, np.where(a < 2, 2 - a, 0.0))
        return torch.as_tensor(values / self.step**order, dtype=torch.float32)

    def on(self, shape: tuple[int, ...], orders: tuple[int, int, int] = (0, 0, 0)) -> list[torch.Tensor]:
        """Return the bases for points spread evenly over the box, `shape` of them."""
        found = []
        for axis, (n, wanted, s) in enumerate(zip(self.grid.shape, shape, self.grid.spacing, strict=True)):
            # Middles of `wanted` equal parts: the voxel centres themselves, or those of blocks of voxels.
            places = ((np.arange(wanted) + 0.5) * n / wanted - 0.5) * s
            found.append(self.basis(axis, places, orders[axis]))
        return found

    @staticmethod
    def draw(coefficients: torch.Tensor, bases: list[torch.Tensor]) -> torch.Tensor:
        """Return displacements (3, z, y, x), mm along the patient's axes, of coefficients (3, kz, ky, kx)."""
        along = torch.einsum("cabd,xd->cabx", coefficients, bases[2])
        along = torch.einsum("cabx,yb->cayx", along, bases[1])
        return torch.einsum("cayx,za->czyx", along, bases[0])

    def energy(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Return the bending energy of coefficients (c, kz, ky, kx): mean of the squared second derivatives, 1/mm²."""
        total = torch.zeros(())
        for grams, times in self._grams:
            along = torch.einsum("cabd,de->cabe", coefficients, grams[2])
            along = torch.einsum("cabe,bf->cafe", along, grams[1])
            along = torch.einsum("cafe,ag->cgfe", along, grams[0])
            total = total + times * (coefficients * along).sum()
        return total


def bend(
    fixed: Volume,
    moving: Volume,
    matrix: np.ndarray,
    knots: float,
    stiffness: float,
    likeness: Likeness,
    offset: np.ndarray,
    along: np.ndarray | None = None,
    steps: tuple[int, ...] = (40, 20),
) -> np.ndarray:
    """Search the bending that comes before the linear transform `matrix` (fixed to moving, mm RAS+).

    Parameters
    ----------
    knots
        Distance between knots, mm.
    stiffness
        Weight of the bending energy against the likeness, mm².
    offset
        (3,), z, y, x: shares of a step by which the knots are moved.
    along
        (3,), x, y, z: the only direction in which points move; any without it.
    steps
        Of the search: at voxels joined by two, and at the finest level, which has at most :data:`MOST_VOXELS`.

    Returns
    -------
    ndarray of float64, shape (z, y, x, 3)
        Displacement of the fixed grid's points before `matrix`, mm RAS+, (x, y, z).
    """
    spline = Spline(fixed.grid, knots, np.asarray(offset, float))
    ways = torch.eye(3) if along is None else torch.as_tensor(along, dtype=torch.float32)[:, None]
    f_all, m_all = _standard(fixed), _standard(moving)
    fw_all, mw_all = (torch.as_tensor(np.asarray(v.weight, np.float32)) for v in (fixed, moving))
    # From mm to grid_sample's coordinates, -1 to 1 over the voxel centres.
    count = np.array(moving.grid.shape[::-1], float)
    to_unit = np.diag([*(2 / np.maximum(count - 1, 1)), 1.0])
    to_unit[:3, 3] = -1
    whole = to_unit @ np.linalg.inv(moving.grid.affine) @ matrix
    turn = torch.as_tensor(whole[:3, :3], dtype=torch.float32) @ ways

    volume = float(np.prod(fixed.grid.shape)) * fixed.grid.voxel_volume
    finest = max(min(fixed.grid.spacing), (volume / MOST_VOXELS) ** (1 / 3))
    coefficients = torch.zeros((ways.shape[1], *spline.count), requires_grad=True)
    for level, rounds in enumerate(steps):
        side = finest * 2 ** (len(steps) - 1 - level)
        factors = _factors(fixed.grid, side)
        f, fw = _pool(f_all, factors), _pool(fw_all, factors)
        both = torch.stack([_smooth(m_all, _factors(moving.grid, side)), mw_all])[None]
        shape = tuple(f.shape)
        spacing = tuple(s * k for s, k in zip(fixed.grid.spacing, factors, strict=True))
        bases = [
            basis[: n * k].reshape(n, k, -1).mean(1)
            for basis, n, k in zip(spline.on(fixed.grid.shape), shape, factors, strict=True)
        ]
        places = [(np.arange(n) + 0.5) * k - 0.5 for n, k in zip(shape, factors, strict=True)]
        index = np.stack(np.meshgrid(*places, indexing="ij"))[::-1]
        straight = whole @ fixed.grid.affine
        start = torch.as_tensor(
            np.einsum("ij,jzyx->izyx", straight[:3, :3], index) + straight[:3, 3][:, None, None, None],
            dtype=torch.float32,
        )
        search = torch.optim.LBFGS(
            [coefficients], max_iter=rounds, history_size=10, tolerance_change=1e-7, line_search_fn="strong_wolfe"
        )
        search.step(_cost(search, coefficients, spline, bases, start, turn, both, f, fw, spacing, likeness, stiffness))
    full = torch.einsum("ij,jzyx->zyxi", ways, spline.draw(coefficients.detach(), spline.on(fixed.grid.shape)))
    return full.numpy().astype(float)


def _cost(
    search: torch.optim.LBFGS,
    coefficients: torch.Tensor,
    spline: Spline,
    bases: list[torch.Tensor],
    start: torch.Tensor,
    turn: torch.Tensor,
    moving: torch.Tensor,
    fixed: torch.Tensor,
    weight: torch.Tensor,
    spacing: tuple[float, ...],
    likeness: Likeness,
    stiffness: float,
) -> Callable[[], float]:
    """Return what the search makes small: unlikeness and bending energy."""

    def cost() -> float:
        search.zero_grad()
        places = start + torch.einsum("ij,jzyx->izyx", turn, spline.draw(coefficients, bases))
        drawn = torch.nn.functional.grid_sample(
            moving, places.permute(1, 2, 3, 0)[None], mode="bilinear", padding_mode="border", align_corners=True
        )[0]
        counts = (places.detach().abs() <= 1).all(0) & (drawn[1].detach() > 0.9)
        loss = stiffness * spline.energy(coefficients) - likeness(fixed, drawn[0], weight * counts, spacing)
        loss.backward()
        return float(loss.detach())

    return cost


def _standard(image: Volume) -> torch.Tensor:
    values = image.values[np.asarray(image.weight) > 0]
    return torch.as_tensor((image.values - values.mean()) / max(float(values.std()), 1e-12), dtype=torch.float32)


def _factors(grid: Grid, side: float) -> list[int]:
    """How many voxels are joined along each axis: those smaller than `side`; eight are left at least."""
    return [max(1, min(int(side / s + 0.25), n // 8)) for s, n in zip(grid.spacing, grid.shape, strict=True)]


def _pool(values: torch.Tensor, factors: list[int]) -> torch.Tensor:
    return torch.nn.functional.avg_pool3d(values[None, None], factors, factors)[0, 0]


def _smooth(values: torch.Tensor, widths: list[int]) -> torch.Tensor:
    """Mean over about `widths` voxels, on the same grid."""
    for axis, width in enumerate(widths):
        if width > 1:
            kernel = [1, 1, 1]
            kernel[axis] = 2 * (width // 2) + 1
            pad = [k // 2 for k in kernel]
            values = torch.nn.functional.avg_pool3d(values[None, None], kernel, 1, pad, count_include_pad=False)[0, 0]
    return values
