"""The initial state: what the first visit measured, and what nobody saw outside its region."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.ndimage import distance_transform_edt

from biomodel.calibration.field_noise import StartNoise
from biomodel.calibration.placement import Outline
from biomodel.domain import Domain
from biomodel.observation import Seen
from biomodel.parameters import LogNormal, Normal, Parameter
from biomodel.visit import CellularitySettings

__all__ = ["InitialState", "shift_name", "shift_parameter", "start_noise"]

HALO = Parameter(
    "halo", "mm", LogNormal(0.7, 0.5), (0.1, 20.0),
    "a working value: sharp edges of a tumour before treatment; up to sqrt(D / k) in the foot of a travelling front",
    "length over which cells outside the visible region fall off",
)  # fmt: skip
LEVEL = Parameter(
    "level", "1", LogNormal(0.4, 0.5), (0.01, 1.0),
    "weak: the cell fraction of a region without an ADC map is not measured",
    "cell fraction inside the first region",
)  # fmt: skip#: Least distance over which the tumour's cells rise from its edge to what is read, mm.
LEAST_RISE = 0.1


@dataclass(frozen=True, eq=False)
class InitialState:
    """Initial cell fraction as a function of its few parameters, on a cropped grid.

    u0 = fraction - shift cv response inside the region (or `level` without ADC), visible exp(-distance / halo)
    outside. Where the outline's edge is not exactly known, voxels nearer to it than that are not read as tumour's: they
    may hold healthy tissue, in part or as a whole. The tumour then ends at the offset from the drawn edge, with the
    visible fraction there by definition, and rises from it in a straight line to the nearest voxel that is read.
    """

    seen: Seen
    visible: float
    cv: float
    distance: np.ndarray
    mask: np.ndarray
    base: np.ndarray
    outline: Outline | None = None
    anchor: np.ndarray | None = None

    @classmethod
    def of(
        cls, seen: Seen, visible: float, cv: float, domain: Domain, settings: CellularitySettings | None = None
    ) -> InitialState:
        # From the region's edge, which lies half a voxel beyond the last voxel's centre.
        steps = [s for s, n in zip(domain.spacing, domain.shape, strict=True) if n > 1]
        distance = distance_transform_edt(~seen.region, sampling=domain.spacing) - 0.5 * min(steps, default=0.0)
        base = np.zeros(domain.shape) if seen.fraction is None else np.maximum(seen.fraction, 0.0) * seen.region
        outline, anchor = Outline.of(seen, domain.spacing, settings), None
        if outline is not None:
            base, seen, anchor = _continued(base, seen, outline, domain)
        return cls(seen, visible, cv, np.maximum(distance, 0.0), domain.mask, base, outline, anchor)

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        if self.seen.fraction is None:
            known: tuple[Parameter, ...] = (HALO, LEVEL)
        else:
            known = (HALO, shift_parameter(self.seen.number)) if self.cv else (HALO,)
        return known if self.outline is None else known + self.outline.unknowns

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"initial.{p.name}" if p in (HALO, LEVEL) else p.name for p in self.parameters)

    def state(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Initial states (batch, z, y, x) for parameter values (batch,)."""
        halo = np.reshape(values["initial.halo"], (-1, 1, 1, 1))
        if self.outline is not None:
            depth, share = self._edge(values)
            outside = self.visible * np.exp(np.minimum(depth, 0.0) / halo)
            return (outside + share * (self._inside(values) - self.visible)) * self.mask
        outside = self.visible * np.exp(-self.distance / halo) * (self.mask & ~self.seen.region)
        return outside + self._inside(values)

    def _inside(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Cell fraction of the tumour (batch, z, y, x); 0 outside the region, unless that is continued."""
        if self.seen.fraction is None:
            level = np.reshape(values["initial.level"], (-1, 1, 1, 1))
            return level * (self.seen.region if self.outline is None else np.ones(self.mask.shape))
        shift = np.reshape(values.get(shift_name(self.seen.number), np.zeros(1)), (-1, 1, 1, 1))
        assert self.seen.response is not None
        return self.base - shift * self.cv * self.seen.response

    def _edge(self, values: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Depth of voxels below the tumour's edge, mm, and how far they rise to what is read, (batch, z, y, x) each."""
        assert self.outline is not None and self.anchor is not None
        offset = self.outline.offset(values)
        depth = offset - self.outline.distance
        # Where the voxel that is read lies beyond the edge itself, nothing rises.
        whole = np.maximum(offset - self.anchor, LEAST_RISE)
        return depth, np.clip(depth / whole, 0.0, 1.0)

    def sure(self, values: dict[str, np.ndarray]) -> np.ndarray:
        """Voxels that were read as tumour and lie within its edge, bool (batch or 1, z, y, x)."""
        if self.outline is None:
            return self.seen.region[None]
        return np.asarray(self.outline.sure & (self._edge(values)[0] >= 0.0))

    def derivatives(self, values: dict[str, float]) -> list[np.ndarray]:
        """Derivative of the state by each of `names`, (z, y, x) each."""
        halo = values["initial.halo"]
        if self.outline is not None:
            return self._edged_derivatives(values, halo)
        outside = self.visible * np.exp(-self.distance / halo) * (self.mask & ~self.seen.region)
        found = [outside * self.distance / halo**2]
        if self.seen.fraction is None:
            found.append(self.seen.region.astype(float))
        elif self.cv:
            assert self.seen.response is not None
            found.append(-self.cv * self.seen.response)
        return found

    def _edged_derivatives(self, values: dict[str, float], halo: float) -> list[np.ndarray]:
        assert self.outline is not None
        batch = {n: np.array([v]) for n, v in values.items()}
        depths, shares = self._edge(batch)
        depth, share = depths[0], shares[0]
        outside = self.visible * np.exp(np.minimum(depth, 0.0) / halo)
        found = [outside * -np.minimum(depth, 0.0) / halo**2]
        if self.seen.fraction is None:
            found.append(share)
        elif self.cv:
            assert self.seen.response is not None
            found.append(-self.cv * self.seen.response * share)
        assert self.anchor is not None
        offset = self.outline.offset(batch)[0]
        whole = np.maximum(offset - self.anchor, LEAST_RISE)
        rising = (share > 0) & (share < 1)
        slope = np.where(rising, 1 / whole - np.where(whole > LEAST_RISE, depth / whole**2, 0.0), 0.0)
        by_offset = slope * (self._inside(batch)[0] - self.visible) + outside / halo * (depth < 0)
        found += [by_offset * mode for mode in self.outline.modes.values()]
        return [d * self.mask for d in found]


def _continued(base: np.ndarray, seen: Seen, outline: Outline, domain: Domain) -> tuple[np.ndarray, Seen, np.ndarray]:
    """Measured fraction and its response of the nearest voxel that is read, and how far that lies from the drawn edge.

    Noise is that of voxels that are read.
    """
    read = outline.sure
    nearest = distance_transform_edt(~read, sampling=domain.spacing, return_distances=False, return_indices=True)
    index = tuple(nearest)
    response = None if seen.response is None else seen.response[index]
    sd = None if seen.sd is None else seen.sd * read
    return base[index] * domain.mask, replace(seen, response=response, sd=sd), outline.distance[index]


def start_noise(seen: Seen, domain: Domain, settings: CellularitySettings | None) -> StartNoise | None:
    """Noise of the first visit's cell fraction, where it is correlated; None where voxels are independent."""
    if settings is None or not settings.noise_length_mm or seen.sd is None:
        return None
    return StartNoise(seen.sd * seen.region, domain.spacing, settings.noise_length_mm)


def shift_name(number: int) -> str:
    """Name of a visit's shared ADC shift."""
    return f"adc_shift.visit{number}"


def shift_parameter(number: int) -> Parameter:
    """A visit's shared ADC shift, in units of its coefficient of variation."""
    return Parameter(
        shift_name(number), "1", Normal(0.0, 1.0), (-6.0, 6.0),
        "repeatability of ADC, Newitt et al. 2019, doi:10.1002/jmri.26539",
        f"relative ADC error shared by visit {number}, in units of the repeatability's CV",
    )  # fmt: skip
