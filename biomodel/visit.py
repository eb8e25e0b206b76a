"""What was measured at a visit, and how noisy those measurements are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import numpy as np

from biomodel.domain import Domain
from biomodel.errors import GeometryError, InputError, UnitError
from biomodel.frozen import FrozenDict, frozen_array
from biomodel.schedule import LARGEST_DAY

__all__ = ["MAPS", "CellularitySettings", "Visit", "VolumeSettings", "check_order", "check_visit", "require"]


#: The images that a visit may have.
MAPS = ("adc", "adc_sd", "region", "drug_map")


def require(condition: bool, message: str) -> None:
    """Raise an InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def plain_fields(values: Mapping[str, object]) -> Mapping[str, object]:
    """Return a read-only copy, with plain numbers for numpy's (as a data frame gives them), which JSON cannot hold."""
    return FrozenDict(
        {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}
    )


@dataclass(frozen=True)
class CellularitySettings:
    """How an ADC map is turned into cell fractions, and how noisy it is.

    Parameters
    ----------
    adc_w
        ADC of free water at body temperature, mm²/s. No default: the literature on breast tumours uses about 3.0e-3
        (Atuegwu et al. 2011, 10.1002/mrm.23203); a phantom or the scanner's protocol may say otherwise.
    adc_min
        ADC at which a voxel is full of cells, mm²/s. No default: in the literature often the smallest ADC inside the
        tumours of a study (Atuegwu et al. 2011), which depends on the scanner and on noise.
    packing
        Largest fraction of a voxel's volume that spherical cells can fill: 0.7405 = π/√18, the densest packing of equal
        spheres.
    cell_radius_mm
        Radius of a tumour cell, mm: 0.010, as in Jarrett et al. 2021 (10.1038/s41596-021-00617-y).
    repeatability_cv
        Within-subject coefficient of variation of a tumour's mean ADC between repeated scans: 0.05, rounded from the
        4.8 % (95 % interval 4.0 to 5.7 %) of the ACRIN 6698 trial in the breast (Newitt et al. 2019,
        10.1002/jmri.26539).
    voxel_cv
        Further coefficient of variation of a single voxel's ADC, independent between voxels.
    visible_fraction
        Cell fraction from which a voxel counts as tumour in volumes and diameters.
    noise_length_mm
        Correlation length of the voxels' noise, mm (integral of the correlation along an axis), as from interpolation
        and filtering on the scanner. 0: independent between voxels.
    edge_sd_mm
        Standard deviation of how far a drawn region's edge lies inside or outside the tumour's, alike all around, anew
        at each visit, mm. 0: edges are where the tumour ends.
    region_shift_sd_mm
        Standard deviation, along each axis, of how far a drawn region lies from the tumour in its own visit's images,
        mm. 0: regions lie where they should.
    misalignment_sd_mm
        Standard deviation, along each axis, of a rigid shift that registration left between a later visit's images and
        the first's, mm. 0: images lie exactly on each other.
    """

    adc_w: float
    adc_min: float
    packing: float = 0.7405
    cell_radius_mm: float = 0.010
    repeatability_cv: float = 0.05
    voxel_cv: float = 0.05
    visible_fraction: float = 0.15
    noise_length_mm: float = 0.0
    edge_sd_mm: float = 0.0
    region_shift_sd_mm: float = 0.0
    misalignment_sd_mm: float = 0.0

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            require(good, f"cellularity: {item.name} is {value!r}; expected a number.")
            object.__setattr__(self, item.name, float(value))
        require(
            0 <= self.adc_min < self.adc_w,
            f"cellularity: adc_min {self.adc_min:g} and adc_w {self.adc_w:g} mm²/s; expected 0 ≤ adc_min < adc_w. "
            "Check both values and their units.",
        )
        require(
            1e-3 <= self.adc_w <= 5e-3,
            f"cellularity: adc_w {self.adc_w:g} mm²/s; expected about 3e-3 (free water), from 1e-3 to 5e-3. "
            "Check the value and its units.",
        )
        require(0 < self.packing <= 1, f"cellularity: packing {self.packing:g}; expected above 0 and at most 1.")
        require(
            1e-3 <= self.cell_radius_mm <= 0.1,
            f"cellularity: cell_radius {self.cell_radius_mm:g} mm; expected 0.001 to 0.1 mm. Check its units.",
        )
        for name in ("repeatability_cv", "voxel_cv"):
            value = getattr(self, name)
            require(0 <= value < 1, f"cellularity: {name} {value:g}; expected a fraction from 0 to below 1.")
        require(
            0 < self.visible_fraction < 1,
            f"cellularity: visible_fraction {self.visible_fraction:g}; expected above 0 and below 1.",
        )
        for name in ("noise_length", "edge_sd", "region_shift_sd", "misalignment_sd"):
            value = getattr(self, f"{name}_mm")
            require(0 <= value <= 20, f"cellularity: {name} {value:g} mm; expected 0 to 20 mm. Check its units.")

    def carrying_capacity(self, voxel_volume: float) -> float:
        """Return θ, the number of cells in a full voxel of `voxel_volume` mm³: packing · V / (4/3 π r³)."""
        return self.packing * voxel_volume / (4.0 / 3.0 * math.pi * self.cell_radius_mm**3)


@dataclass(frozen=True)
class VolumeSettings:
    """How noisy a measured tumour volume is.

    Parameters
    ----------
    cv
        Coefficient of variation of a repeated measurement. 0.2 is a working default, not a published repeatability.
    floor
        Volume under which nothing is seen, cm³. 0.05 is a working default (about a sphere of 4.6 mm).
    df
        Degrees of freedom of the Student-t distribution of errors of log(volume + floor): few for heavy tails (a bad
        segmentation now and then), hundreds for a Gaussian. 8 is a working default.
    """

    cv: float = 0.2
    floor: float = 0.05
    df: float = 8.0

    def __post_init__(self) -> None:
        for name in ("cv", "floor", "df"):
            value = getattr(self, name)
            good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            require(good, f"volumes: {name} is {value!r}; expected a number.")
            object.__setattr__(self, name, float(value))
        require(0 < self.cv < 2, f"volumes: cv {self.cv:g}; expected a fraction above 0 and below 2.")
        require(
            0 < self.floor <= 100, f"volumes: floor {self.floor:g} cm³; expected above 0 to 100 cm³. Check its units."
        )
        require(self.df > 2, f"volumes: df {self.df:g}; expected more than 2, so that the errors have a variance.")

    @property
    def log_sd(self) -> float:
        """Scale of the errors of the logarithm, √log(1 + cv²)."""
        return math.sqrt(math.log1p(self.cv**2))


@dataclass(frozen=True, eq=False)
class Visit:
    """What was measured on one day.

    Parameters
    ----------
    number
        From 1, in the order of days.
    day
        Days from the patient's day 0.
    adc
        Apparent diffusion coefficient, mm²/s (z, y, x).
    adc_sd
        Standard deviation of `adc` in each voxel, independent between voxels, mm²/s (z, y, x); read inside the region.
        It stands in place of the settings' `voxel_cv`.
    region
        bool (z, y, x), true inside the tumour.
    volume
        Tumour volume, cm³. 0 says that no tumour was seen.
    longest_diameter
        mm.
    drug_map
        Relative supply of drug, from 0 up (z, y, x).
    acquisition
        How the scan was made: ``vendor``, ``field_strength`` (T), ``institution``, ``sequence``.
    """

    number: int
    day: float
    adc: np.ndarray | None = None
    region: np.ndarray | None = None
    volume: float | None = None
    longest_diameter: float | None = None
    drug_map: np.ndarray | None = None
    acquisition: Mapping[str, object] = field(default_factory=dict)
    adc_sd: np.ndarray | None = None

    def __post_init__(self) -> None:
        require(
            isinstance(self.number, (int, np.integer)) and self.number >= 1,
            f"visit: number {self.number!r}; expected a whole number from 1.",
        )
        where = f"visit {self.number}"
        day = float(self.day)
        require(
            math.isfinite(day) and abs(day) <= LARGEST_DAY,
            f"{where}: day {day:g}; expected a number of days from day 0. Check the day or the date.",
        )
        object.__setattr__(self, "number", int(self.number))
        object.__setattr__(self, "day", day)
        for name, largest, units in (("volume", 2e4, "cm³"), ("longest_diameter", 1e3, "mm")):
            value = getattr(self, name)
            if value is None:
                continue
            value = float(value)
            require(
                math.isfinite(value) and 0 <= value <= largest,
                f"{where}, {name}: {value:g} {units}; expected 0 to {largest:g} {units}. Check value and units.",
            )
            object.__setattr__(self, name, value)
        for name in ("adc", "adc_sd", "drug_map"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, frozen_array(getattr(self, name), float))
        if self.region is not None:
            region = np.asarray(self.region)
            require(
                region.dtype == bool or bool(np.isin(region, (0, 1)).all()),
                f"{where}, region: values other than 0 and 1; expected a mask. Save the tumour's label as 0 and 1.",
            )
            object.__setattr__(self, "region", frozen_array(region, bool))
        object.__setattr__(self, "acquisition", plain_fields(self.acquisition))


def check_visit(visit: Visit, domain: Domain, where: Mapping[str, str]) -> None:
    """Check the maps of `visit` against the `domain`.

    Parameters
    ----------
    where
        Place to be named in a message, for each of `MAPS`.

    Raises
    ------
    GeometryError
        If a map has another shape than the domain.
    InputError
        If voxels are NaN or infinite inside the mask, or the region is empty or leaves the mask.
    """
    for name in MAPS:
        values = getattr(visit, name)
        if values is not None and values.shape != domain.shape:
            raise GeometryError(
                f"{where[name]}: {' × '.join(map(str, values.shape))} voxels (z, y, x); expected "
                f"{' × '.join(map(str, domain.shape))} like the mask. Bring it to the mask's grid with "
                "'tumorcast resample IMAGE --like MASK --out FILE'."
            )
    for name in ("adc", "drug_map"):
        values = getattr(visit, name)
        if values is None:
            continue
        bad = ~np.isfinite(values) & domain.mask
        if bad.any():
            inside = f", {int((bad & visit.region).sum())} of them in the region" if visit.region is not None else ""
            raise InputError(
                f"{where[name]}: {int(bad.sum())} voxels are NaN or infinite inside the mask{inside}; expected numbers "
                "there. Repair the map, or leave these voxels out of the mask."
            )
        if name == "drug_map" and values[domain.mask].min() < 0:
            raise InputError(
                f"{where[name]}: smallest value {values[domain.mask].min():.4g}; expected a supply from 0 up. "
                "Repair the map."
            )
    if visit.region is not None:
        if not visit.region.any():
            raise InputError(
                f"{where['region']}: the region is empty; expected at least one voxel. If no tumour was seen at this "
                "visit, leave 'region' out and give 'volume': {'value': 0, 'units': 'cm^3'}."
            )
        outside = int((visit.region & ~domain.mask).sum())
        if outside:
            raise InputError(
                f"{where['region']}: {outside} of {int(visit.region.sum())} voxels lie outside the mask; expected "
                "none. Enlarge the mask or cut the region."
            )
    if visit.adc_sd is not None:
        require(visit.adc is not None, f"{where['adc_sd']}: errors of an ADC map, but there is no 'adc'. Add the map.")
        inside = visit.adc_sd[domain.mask if visit.region is None else visit.region]
        bad = int((~np.isfinite(inside) | (inside <= 0)).sum())
        require(
            not bad,
            f"{where['adc_sd']}: {bad} of {inside.size} voxels of the tumour are not positive numbers; expected a "
            "standard deviation in each. Leave these voxels out of the region, or the whole map away.",
        )
    if visit.adc is not None:
        _check_scale(visit.adc[domain.mask if visit.region is None else visit.region], where["adc"])


def _check_scale(adc: np.ndarray, where: str) -> None:
    # Water moves at 3e-3 mm²/s at body temperature, so a typical value far from that is in other units than stated.
    # This refuses a map; it never chooses units for it.
    typical = float(np.median(np.abs(adc)))
    if not 1e-5 <= typical <= 1e-2:
        raise UnitError(
            f"{where}: typical value {typical:.3g} mm²/s; expected about 3e-4 to 3e-3 mm²/s in tissue. State the units "
            "that the file's values have, for example 'um^2/s' or '1e-6 mm^2/s'; units are never guessed."
        )


def check_order(before: float, day: float, number: int, where: str) -> None:
    """Refuse a visit that is not later than the one before it."""
    if day <= before:
        what = "the same day as" if day == before else "before"
        raise InputError(
            f"{where}: visit {number} is on day {day:g}, {what} visit {number - 1} (day {before:g}); expected growing "
            "days. Correct the days or dates, or list the visits in order."
        )
