"""Where images and outlines lie: a later visit's misalignment and the reader's edge, as unknowns with Gaussian priors.

Both move the prediction with which a visit is compared, instead of the data:

- *Misalignment* is a rigid shift d (mm) of a later visit's images against the first's: voxel x of the later visit shows
  the tissue at x + d, and is compared with u(x + d). Between voxel centres u is the quadratic through three of them
  along each axis, exact for shifts by a whole voxel.
- An *outline* is drawn offset mm too small (above 0) or too large (below) along its outward normal n, in part alike
  everywhere (the reader's edge), in part as a region that lies askew (an offset d·n). Whether voxel x was drawn as
  tumour then tells of the tumour at x + offset n, to first order u + offset n·grad u. The ADC inside is not moved by
  a reader; but voxels nearer to the edge than it is known are not read as tumour's.

The first visit's outline bounds the initial state: see :class:`biomodel.calibration.images.InitialState`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter

from biomodel.observation import Seen
from biomodel.parameters import Normal, Parameter
from biomodel.visit import CellularitySettings

__all__ = ["Outline", "Placement", "signed_distance"]

AXES = "zyx"
#: Bounds of the unknowns, in their standard deviations.
FAR = 4.0


def signed_distance(region: np.ndarray, spacing: tuple[float, float, float]) -> np.ndarray:
    """Distance of voxel centres from the region's edge, mm (z, y, x): below 0 inside, above outside.

    The edge lies half a voxel (the smallest spacing) from the centres of the voxels on either side.
    """
    half = 0.5 * min((s for s, n in zip(spacing, region.shape, strict=True) if n > 1), default=0.0)
    outside = np.maximum(distance_transform_edt(~region, sampling=spacing) - half, 0.0)
    inside = np.maximum(distance_transform_edt(region, sampling=spacing) - half, 0.0)
    return np.asarray(outside - inside)


def _unknown(name: str, sd: float, what: str) -> Parameter:
    return Parameter(name, "mm", Normal(0.0, sd), (-FAR * sd, FAR * sd), "stated in the patient's cellularity", what)


@dataclass(frozen=True, eq=False)
class Outline:
    """A drawn region whose edge is not where the tumour ends.

    Attributes
    ----------
    distance : ndarray, shape (z, y, x)
        Signed distance from the drawn edge, mm.
    modes : mapping of str to ndarray
        Derivative of the offset (mm along the normal) by each unknown: 1, or the normal's component along an axis.
    unknowns : tuple of Parameter
        The same unknowns, with their priors.
    reach : float
        Standard deviation of the offset, mm.
    """

    distance: np.ndarray
    normal: np.ndarray
    modes: Mapping[str, np.ndarray]
    unknowns: tuple[Parameter, ...]
    reach: float

    @classmethod
    def of(
        cls, seen: Seen, spacing: tuple[float, float, float], settings: CellularitySettings | None
    ) -> Outline | None:
        """The outline of a visit; None where its edge is taken as exact, or there is none."""
        if settings is None or not seen.region.any() or not (settings.edge_sd_mm or settings.region_shift_sd_mm):
            return None
        distance = signed_distance(seen.region, spacing)
        smooth = gaussian_filter(distance, [1.0 if n > 1 else 0.0 for n in distance.shape])
        normal = np.stack([np.gradient(smooth, s, axis=a) if n > 1 else np.zeros(smooth.shape)
                           for a, (s, n) in enumerate(zip(spacing, distance.shape, strict=True))])  # fmt: skip
        normal /= np.maximum(np.sqrt((normal**2).sum(0)), 1e-6)
        modes, unknowns = {}, []
        if settings.edge_sd_mm:
            name = f"edge.visit{seen.number}"
            modes[name] = np.ones(distance.shape)
            what = f"how far the tumour goes beyond the edge drawn at visit {seen.number}"
            unknowns.append(_unknown(name, settings.edge_sd_mm, what))
        for axis, component in zip(AXES, normal, strict=True):
            if settings.region_shift_sd_mm and component.any():
                name = f"region_shift.visit{seen.number}.{axis}"
                modes[name] = component
                what = f"how far, along {axis}, the tumour lies from the region drawn at visit {seen.number}"
                unknowns.append(_unknown(name, settings.region_shift_sd_mm, what))
        reach = float(np.hypot(settings.edge_sd_mm, settings.region_shift_sd_mm))
        return cls(distance, normal, modes, tuple(unknowns), reach)

    @property
    def sure(self) -> np.ndarray:
        """Voxels of the region farther from its edge than that is known, bool (z, y, x): at least its deepest."""
        return np.asarray(self.distance <= max(-self.reach, 0.999 * float(self.distance.min())))

    def offset(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """How far the tumour goes beyond the drawn edge, mm, (batch, z, y, x), from values (batch,)."""
        return np.asarray(sum(np.reshape(values[n], (-1, 1, 1, 1)) * mode for n, mode in self.modes.items()))


class Placement:
    """The prediction of later visits as they are seen: moved by misalignment, and by the offset of drawn edges.

    Maps u (..., T, z, y, x) to maps of the same shape; for given unknowns a linear operator with a transpose.

    Parameters
    ----------
    later : sequence of Seen
        The T later visits, cropped.
    spacing : (z, y, x)
        mm.
    outlined : ndarray of bool, shape (T, z, y, x)
        Where only the outline says whether tumour was seen.
    settings : CellularitySettings or None
    """

    def __init__(self, later: Sequence[Seen], spacing: tuple[float, float, float], outlined: np.ndarray,
                 settings: CellularitySettings | None):  # fmt: skip
        self.spacing, self.outlined = spacing, outlined
        self.outlines = [Outline.of(s, spacing, settings) for s in later]
        sd = settings.misalignment_sd_mm if settings else 0.0
        wide = [a for a, n in enumerate(outlined.shape[1:]) if n > 1] if sd else []
        self.moves = [{f"misalignment.visit{s.number}.{AXES[a]}": a for a in wide} for s in later]
        self.unknowns: tuple[Parameter, ...] = tuple(
            _unknown(n, sd, f"how far, along {n[-1]}, the tissue shown at a place of {n.split('.')[1]} lies from it")
            for moves in self.moves for n in moves
        ) + tuple(p for outline in self.outlines if outline is not None for p in outline.unknowns)  # fmt: skip

    @property
    def active(self) -> bool:
        """Whether there is anything unknown."""
        return bool(self.unknowns)

    def _along(self, u: np.ndarray, axis: int, left: float, right: float) -> np.ndarray:
        """left u(x - 1) + right u(x + 1) along an axis of (..., z, y, x), nothing beyond the box."""
        u = np.moveaxis(u, axis - 3, -1)
        found = np.zeros_like(u)
        found[..., 1:] += left * u[..., :-1]
        found[..., :-1] += right * u[..., 1:]
        return np.moveaxis(found, -1, axis - 3)

    def _slope(self, u: np.ndarray, axis: int) -> np.ndarray:
        """Central difference per mm."""
        return self._along(u, axis, -0.5 / self.spacing[axis], 0.5 / self.spacing[axis])

    def _bend(self, u: np.ndarray, axis: int) -> np.ndarray:
        h = self.spacing[axis]
        return self._along(u, axis, 1 / h**2, 1 / h**2) - 2 / h**2 * u

    def _moved(self, u: np.ndarray, t: int, values: Mapping[str, float], sign: float, skip: str = "") -> np.ndarray:
        for name, axis in self.moves[t].items():
            d = sign * values[name]
            if name == skip:  # the derivative by that shift
                u = self._slope(u, axis) + d * self._bend(u, axis)
            elif d:
                u = u + d * self._slope(u, axis) + d**2 / 2 * self._bend(u, axis)
        return u

    def _edged(self, u: np.ndarray, t: int, offset: np.ndarray) -> np.ndarray:
        """offset n·grad u where only the outline speaks."""
        outline = self.outlines[t]
        assert outline is not None
        slope = sum(n * self._slope(u, a) for a, n in enumerate(outline.normal) if u.shape[a - 3] > 1)
        return np.asarray(np.where(self.outlined[t], offset * slope, 0.0))

    def _offset(self, t: int, values: Mapping[str, float]) -> np.ndarray | None:
        outline = self.outlines[t]
        return None if outline is None else outline.offset({n: np.array([values[n]]) for n in outline.modes})[0]

    def seen(self, u: np.ndarray, values: Mapping[str, float]) -> np.ndarray:
        """The maps as a visit shows and a reader outlines them, (..., T, z, y, x)."""
        found = np.empty_like(u)
        for t in range(u.shape[-4]):
            moved = self._moved(u[..., t, :, :, :], t, values, 1.0)
            offset = self._offset(t, values)
            found[..., t, :, :, :] = moved if offset is None else moved + self._edged(moved, t, offset)
        return found

    def back(self, r: np.ndarray, values: Mapping[str, float]) -> np.ndarray:
        """Transpose of `seen`."""
        found = np.empty_like(r)
        for t in range(r.shape[-4]):
            one, offset, outline = r[..., t, :, :, :], self._offset(t, values), self.outlines[t]
            if offset is not None and outline is not None:
                # Central differences are antisymmetric, so their transpose is minus themselves.
                weighed = np.where(self.outlined[t], offset * one, 0.0)
                one = one - sum(self._slope(n * weighed, a) for a, n in enumerate(outline.normal) if n.shape[a] > 1)
            found[..., t, :, :, :] = self._moved(one, t, values, -1.0)
        return found

    def derivatives(self, u: np.ndarray, values: Mapping[str, float]) -> dict[str, np.ndarray]:
        """Derivative (T, z, y, x) of ``seen(u)`` by each unknown, in the order of `unknowns`; u is (T, z, y, x)."""
        found = {p.name: np.zeros(u.shape) for p in self.unknowns}
        for t, outline in enumerate(self.outlines):
            offset = self._offset(t, values)
            for name in self.moves[t]:
                moved = self._moved(u[t], t, values, 1.0, skip=name)
                found[name][t] = moved if offset is None else moved + self._edged(moved, t, offset)
            if outline is not None:
                moved = self._moved(u[t], t, values, 1.0)
                for name, mode in outline.modes.items():
                    found[name][t] = self._edged(moved, t, mode)
        return found
