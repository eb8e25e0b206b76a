"""What a virtual body is made of: maps of T1, contrast uptake and diffusion from its tissues and cell fractions.

A voxel is fat, gland and tumour in the shares that the virtual patient has, or the muscle of the chest wall, or an
artery. Tumour takes the place of healthy tissue in proportion to the cell fraction up to the one from which it is
visible, and all of it from there on, as :mod:`biomodel.scanner` has it for the ADC.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from biomodel.anatomy import Breast, random_field
from biomodel.errors import InputError
from biomodel.imaging.series_grid import Grid
from biomodel.scanner import Scan
from biomodel.truth import Array
from biomodel.virtual import VirtualPatient

__all__ = ["FieldOfView", "Streams", "Tissue", "field_of_view", "settings_of", "tissue_maps"]

Mask = NDArray[np.bool_]
Maps = dict[str, Array]


@dataclass(frozen=True)
class Tissue:
    """One kind of tissue.

    Parameters
    ----------
    t1 : mapping of float
        By field strength (T), s.
    t2 : float
        s; taken as the same at both fields.
    water : float
        Density of visible protons, relative to pure water.
    ktrans : float
        1/min.
    ve, vp : float
        Fractions. Where the tissue has cell fractions, `ve` is the share of the space outside of cells and vessels
        that the contrast agent reaches.
    """

    t1: Mapping[float, float]
    t2: float
    water: float
    ktrans: float
    ve: float
    vp: float


# T1 at 3 T of fat and gland, and T2: Edden et al. 2010, doi:10.1002/jmri.22306 (0.423 and 1.680 s; 154 and 71 ms). At
# 1.5 T: Rakow-Penner et al. 2006, J Magn Reson Imaging 23:87 (0.296 and 1.266 s). Muscle and blood: Stanisz et al.
# 2005, doi:10.1002/mrm.20605. Breast cancer at 3 T: 1.61 +- 0.22 s and 81 ms (Cancer Imaging 2020,
# doi:10.1186/s40644-020-00365-4); at 1.5 T the same part of it as in gland.
# Contrast uptake: cancers of low and high proliferation part at a Ktrans of 0.3 /min (In Vivo 2022,
# doi:10.21873/invivo.12717). The other uptakes are working values: gland enhances faintly, fat hardly, and muscle as a
# tissue of normal vessels with a tenth of its volume outside cells. Skin is taken as gland of short T2.
ADIPOSE = Tissue({1.5: 0.296, 3.0: 0.423}, 0.154, 0.95, 0.004, 0.06, 0.003)
GLAND = Tissue({1.5: 1.266, 3.0: 1.680}, 0.071, 0.80, 0.015, 0.22, 0.008)
MUSCLE = Tissue({1.5: 1.008, 3.0: 1.412}, 0.050, 0.80, 0.04, 0.11, 0.012)
BLOOD = Tissue({1.5: 1.441, 3.0: 1.932}, 0.275, 0.90, 0.0, 0.5, 1.0)  # its vp is 1 - haematocrit
SKIN = Tissue({1.5: 1.266, 3.0: 1.680}, 0.035, 0.70, 0.02, 0.20, 0.010)
TUMOUR = Tissue({1.5: 1.21, 3.0: 1.61}, 0.081, 0.85, 0.30, 0.65, 0.05)

#: ADC of muscle and skin, mm²/s (a working value); the one of flowing blood does not matter, as it gives no signal.
ADC_MUSCLE = 1.5e-3
#: Thickness of the skin (mm), 1.45 +- 0.30 in breast computed tomography (Huang et al. 2008, Med Phys 35:1199).
SKIN_DEPTH = 1.45
#: Relative standard deviations between patients of the tumours' Ktrans and vp, and of both within a tumour.
BETWEEN, WITHIN = 0.4, 0.25
#: The same within tissues for T1 (all) and for the uptake of healthy ones.
TEXTURE_T1, TEXTURE_UPTAKE = 0.04, 0.3
#: Range (uniform) of the uptake of a tumour's core relative to its rim, and how deep the rim reaches (mm). Rims that
#: enhance more mark invasive cancers, triple-negative ones above all (Galati et al. 2022,
#: doi:10.1186/s41747-022-00289-7); the numbers are working choices.
CORE, RIM = (0.4, 0.8), 3.0
#: Correlation length of heterogeneity inside tumours and in healthy tissue (mm).
PATCH, TEXTURE = 4.0, 6.0
#: Least fraction outside of cells and vessels that the agent reaches in a tumour.
LEAST_VE = 0.05
#: Radius of the artery (mm): that of a subclavian artery. Without room for two thirds of it there is none.
ARTERY = 4.0


@dataclass(frozen=True)
class Streams:
    """Sources of randomness, one for each purpose, so that a new purpose leaves the draws of the others alone.

    Parameters
    ----------
    seed : int
        A whole number from 0.
    patient : str
        Id of the patient: two patients differ under one seed.
    """

    seed: int
    patient: str

    def __post_init__(self) -> None:
        if isinstance(self.seed, bool) or not isinstance(self.seed, (int, np.integer)) or self.seed < 0:
            raise InputError(f"Virtual acquisition: seed {self.seed!r}; expected a whole number from 0.")

    def of(self, purpose: str) -> np.random.Generator:
        """Return the generator of a purpose, always from its start."""
        entropy = [int(self.seed), zlib.crc32(self.patient.encode())]
        key = zlib.crc32(f"biomodel.acquisition/{purpose}".encode())
        return np.random.default_rng(np.random.SeedSequence(entropy, spawn_key=(key,)))


@dataclass(frozen=True, eq=False)
class FieldOfView:
    """The grid of the raw series: that of the patient, wider by a margin.

    Parameters
    ----------
    grid : Grid
    box : three slices
        Where the patient's grid lies in it (z, y, x).
    muscle, artery : bool arrays (z, y, x)
    skin : array (z, y, x)
        Share of skin in the voxels around the body; the patient's own grid knows of none.
    """

    grid: Grid
    box: tuple[slice, slice, slice]
    muscle: Mask
    artery: Mask
    skin: Array

    def widen(self, values: Array) -> Array:
        """Return a map of the patient's grid on this one, 0 beyond."""
        wide = np.zeros(self.grid.shape)
        wide[self.box] = values
        return wide


def settings_of(virtual: VirtualPatient) -> tuple[Scan, Breast]:
    """Return how a virtual patient's ADC and anatomy were made."""
    settings = json.loads(virtual.truth.attrs["settings"])
    anatomy: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in settings["anatomy"].items()}
    return Scan(**settings["scan"]), Breast(**anatomy)


def field_of_view(virtual: VirtualPatient, margin: float, factors: tuple[int, int, int] = (1, 1, 1)) -> FieldOfView:
    """Lay out the field of view with air, chest wall and artery.

    Parameters
    ----------
    margin : float
        mm beyond the patient's grid on every side; flat axes stay flat.
    factors : three ints
        The number of voxels along each axis is made a multiple of these.
    """
    domain, (_, anatomy) = virtual.patient.domain, settings_of(virtual)
    spacing = domain.spacing
    before = [int(np.ceil(margin / step - 1e-9)) if n > 1 else 0 for n, step in zip(domain.shape, spacing, strict=True)]
    counts = [
        -(-(n + 2 * extra) // factor) * factor if n > 1 else 1
        for n, extra, factor in zip(domain.shape, before, factors, strict=True)
    ]
    shape = (counts[0], counts[1], counts[2])
    box = tuple(slice(extra, extra + n) for extra, n in zip(before, domain.shape, strict=True))
    affine = domain.affine.copy()
    affine[:3, 3] -= affine[:3, :3] @ np.array(before[::-1], float)
    # The chest wall of the patient's anatomy, carried on beyond the patient's grid; y grows from back to front.
    z, y, x = np.meshgrid(
        *(
            (np.arange(count) - extra + 0.5 - n / 2) * step
            for count, extra, n, step in zip(shape, before, domain.shape, spacing, strict=True)
        ),
        indexing="ij",
        sparse=True,
    )
    extent = np.array(domain.shape) * np.array(spacing)
    wide = (np.abs(z) / (0.47 * extent[0])) ** 2.3 + (np.abs(x) / (0.47 * extent[2])) ** 2.3
    wall = -extent[1] / 2 + extent[1] * anatomy.chest_wall * (1.0 - 0.5 * np.minimum(wide, 1.0))
    muscle = np.broadcast_to(y <= wall, shape) & (domain.shape[1] > 1)
    back = float(y.min()) - spacing[1] / 2
    depth = float(wall.min()) - back
    radius = min(ARTERY, 0.45 * depth)
    artery = np.zeros(shape, bool)
    if domain.shape[1] > 1 and radius >= 2 / 3 * ARTERY:
        across = x - 0.2 * extent[2] if domain.shape[2] > 1 else x
        artery |= (y - back - depth / 2) ** 2 + across**2 <= radius**2
    inside = np.zeros(shape, bool)
    inside[box] = domain.mask
    artery &= ~inside
    muscle = muscle & ~artery & ~inside
    solid = inside | muscle | artery
    around = ndimage.binary_dilation(solid) & ~solid
    skin = around * min(SKIN_DEPTH / float(np.mean([s for s, n in zip(spacing, shape, strict=True) if n > 1])), 1.0)
    return FieldOfView(Grid(shape, spacing, affine), box, muscle, artery, skin)  # type: ignore[arg-type]


def tissue_maps(
    virtual: VirtualPatient,
    visit: int,
    fov: FieldOfView,
    field_strength: float,
    echo_time: float,
    haematocrit: float,
    streams: Streams,
) -> Maps:
    """Make the maps of one visit where the patient's grid has the body, that is without motion.

    Parameters
    ----------
    visit : int
        From 1.
    field_strength, echo_time
        T; s, of the diffusion-weighted images.
    haematocrit : float
        Of the artery's blood.

    Returns
    -------
    dict of arrays (z, y, x)
        Densities, 0 in air: ``water``, ``fat`` (visible protons) and ``dwi_water``, ``dwi_fat`` (with T2 decay). The
        others continue in air what is nearest: ``T10`` and ``water_T10`` (s; of a voxel as one pool, and of all but
        fat), ``fat_share``, ``Ktrans`` (1/min), ``ve``, ``vp``, ``ADC`` (mm^2/s), ``perfused`` (share of tumour and
        gland), ``artery`` and ``cell_fraction``.
    """
    domain = virtual.patient.domain
    scan, _ = settings_of(virtual)
    packing = virtual.patient.cellularity.packing if virtual.patient.cellularity else 0.0
    cells = np.asarray(virtual.truth["cell_fraction"].values, float)
    shape, spacing = fov.grid.shape, fov.grid.spacing

    def field(purpose: str, length: float) -> Array:
        return random_field(streams.of(purpose), shape, spacing, length)

    u = fov.widen(np.where(domain.mask, cells[visit - 1], 0.0))
    mask = fov.widen(domain.mask) > 0
    share = np.clip(u / scan.visible_fraction, 0.0, 1.0)
    parts = {
        "tumour": (share, TUMOUR),
        "gland": ((1.0 - share) * fov.widen(domain.tissues["fibroglandular"]), GLAND),
        "fat": ((1.0 - share) * fov.widen(domain.tissues["adipose"]), ADIPOSE),
        "muscle": (fov.muscle.astype(float), MUSCLE),
        "skin": (fov.skin, SKIN),
        "blood": (fov.artery.astype(float), BLOOD),
    }

    supply = _supply(cells, visit, domain.mask, scan.visible_fraction)
    uptake = {"tumour": _tumour_uptake(u, u >= scan.visible_fraction, supply, packing, spacing, streams)}
    healthy = np.exp(TEXTURE_UPTAKE * field("healthy uptake", TEXTURE))
    for name in ("gland", "fat", "muscle", "skin"):
        tissue = parts[name][1]
        uptake[name] = (tissue.ktrans * healthy, np.full(shape, tissue.ve), tissue.vp * healthy)
    uptake["blood"] = (np.zeros(shape), np.full(shape, BLOOD.ve), np.full(shape, 1.0 - haematocrit))
    maps = {
        name: sum((parts[part][0] * uptake[part][which] for part in parts), np.zeros(shape))
        for which, name in enumerate(("Ktrans", "ve", "vp"))
    }

    texture = 1.0 + TEXTURE_T1 * field("T1", TEXTURE)
    t1 = {name: tissue.t1[field_strength] * (1.0 if name in ("fat", "blood") else texture) for name, (_, tissue)
          in parts.items()}  # fmt: skip
    wet = [name for name in parts if name != "fat"]
    share_wet = sum((parts[name][0] for name in wet), np.zeros(shape))
    weighted = sum((parts[name][0] * t1[name] for name in wet), np.zeros(shape))
    # Of what is there: skin fills a part of its voxels, and the rest is air.
    filled = np.maximum(share_wet + parts["fat"][0], 1e-6)
    maps = {name: values / filled for name, values in maps.items()}
    maps["T10"] = (weighted + parts["fat"][0] * t1["fat"]) / filled
    maps["water_T10"] = np.where(share_wet > 1e-6, weighted / np.maximum(share_wet, 1e-6), t1["gland"])
    maps["fat_share"] = parts["fat"][0]
    maps["perfused"] = parts["tumour"][0] + parts["gland"][0]
    # The scanner module's ADC, before its noise.
    adc = share * (scan.adc_w - (scan.adc_w - scan.adc_min) * u) + (1.0 - share) * (
        scan.adc_fibroglandular * fov.widen(domain.tissues["fibroglandular"])
        + scan.adc_adipose * fov.widen(domain.tissues["adipose"])
    )
    maps["ADC"] = np.where(mask, adc, ADC_MUSCLE)
    maps["cell_fraction"] = u
    maps["artery"] = parts["blood"][0]

    body = mask | fov.muscle | fov.artery | (fov.skin > 0)
    nearest = ndimage.distance_transform_edt(~body, spacing, return_distances=False, return_indices=True)
    for name in ("T10", "water_T10", "fat_share", "Ktrans", "ve", "vp", "ADC", "perfused"):
        maps[name] = maps[name][tuple(nearest)]
    maps["water"] = sum((parts[name][0] * parts[name][1].water for name in wet), np.zeros(shape))
    maps["fat"] = parts["fat"][0] * ADIPOSE.water
    # Blood that flows has left its slice between the pulses of a spin echo.
    maps["dwi_water"] = sum(
        (
            parts[name][0] * parts[name][1].water * np.exp(-echo_time / parts[name][1].t2)
            for name in wet
            if name != "blood"
        ),
        np.zeros(shape),
    )
    maps["dwi_fat"] = maps["fat"] * np.exp(-echo_time / ADIPOSE.t2)
    return maps


def _tumour_uptake(
    u: Array, region: Mask, supply: float, packing: float, spacing: tuple[float, float, float], streams: Streams
) -> tuple[Array, Array, Array]:
    """Return Ktrans, ve and vp of tumour: more uptake at the rim, in patches, and from tumour to tumour.

    The agent reaches a part of the space that cells, which fill `packing` of a voxel at a cell fraction `u` of 1, and
    vessels leave.
    """
    rng = streams.of("tumour uptake")
    between_k, between_v = np.exp(BETWEEN * rng.standard_normal(2))
    core = rng.uniform(*CORE)
    deep = ndimage.distance_transform_edt(region, spacing) if region.any() else np.zeros(u.shape)
    level = supply * (core + (1.0 - core) * np.exp(-np.maximum(deep - min(spacing), 0.0) / RIM))
    leak, vessels = (
        np.exp(WITHIN * random_field(streams.of(purpose), u.shape, spacing, PATCH))
        for purpose in ("tumour patches", "tumour vessels")
    )
    vp = np.clip(TUMOUR.vp * between_v * level * vessels, 0.0, 0.3)
    ve = np.maximum(TUMOUR.ve * (1.0 - packing * u - vp), LEAST_VE)
    return TUMOUR.ktrans * between_k * level * leak, ve, vp


def _supply(cells: Array, visit: int, mask: Mask, visible: float) -> float:
    """Return how well a tumour is supplied relative to day 0: the root of its mean cell fraction (a working choice).

    Ktrans falls in tumours that respond (Tudorica et al. 2016, Transl Oncol 9:8).
    """

    def mean(fraction: Array) -> float:
        region = mask & (fraction >= visible)
        return float(fraction[region].mean()) if region.any() else visible

    return float(np.sqrt(min(mean(cells[visit - 1]) / mean(cells[0]), 1.5)))
