"""Practice exams: the three contrast-enhanced images of a virtual patient as several sites would have made them.

Networks learn on them and methods are scored on them where no drawn regions are at hand. Only what matters to a region
is simulated: tissues and their uptake, partial volume, the receiver's bias, noise, fat suppression that is not
complete, small movement, vessels, and glandular tissue that enhances too. The numbers are *settings of a generator*:
they belong under version control before anything is fitted to them. A region found in a practice exam is named virtual.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage

from biomodel.anatomy import positions, random_field
from biomodel.errors import InputError
from biomodel.imaging.aif import Parker
from biomodel.imaging.concentration import relaxivity
from biomodel.imaging.dce.convolution import convolve
from biomodel.imaging.regions.exam import Exam
from biomodel.imaging.t1 import SpoiledGradientEcho
from biomodel.virtual import VirtualPatient
from biomodel.visit import Visit

__all__ = ["FAMILIAR", "UNSEEN", "Practice", "Site", "practice_exam", "without_tumour"]


@dataclass(frozen=True)
class Site:
    """How a site acquires.

    Parameters
    ----------
    name : str
    field_strength : float
        1.5 or 3 T.
    agent : str
        Contrast agent.
    tr, flip_angle : float
        Of the spoiled gradient echo, s and degrees.
    early, late : float
        Of the two images after contrast, s after arrival.
    snr : float
        Gland before contrast over the standard deviation of the noise in each channel.
    bias : float
        Standard deviation over the body of the logarithm of the receiver's sensitivity.
    b1 : float
        Standard deviation of the relative flip angle over the body.
    fat : float
        Share of fat's signal that fat suppression leaves; 1 is none.
    blur : float
        Standard deviation of the point spread, voxels.
    motion : float
        Standard deviation of the shift between images along each axis, mm.
    """

    name: str
    field_strength: float = 3.0
    agent: str = "gadobutrol"
    tr: float = 5.0e-3
    flip_angle: float = 12.0
    early: float = 150.0
    late: float = 450.0
    snr: float = 25.0
    bias: float = 0.2
    b1: float = 0.05
    fat: float = 0.08
    blur: float = 0.45
    motion: float = 0.3


#: Sites to learn from and, in another part of the world, sites that no learning sees: other agents, flip angles, times,
#: noise and fat suppression. Working choices within what breast protocols use.
FAMILIAR = (
    Site("A"),
    Site("B", 1.5, "gadobenate", 6.5e-3, 10.0, 140.0, 430.0, 20.0, 0.12, 0.02, 0.09, 0.50, 0.2),
    Site("C", 3.0, "gadoterate", 4.6e-3, 10.0, 155.0, 470.0, 22.0, 0.30, 0.06, 0.06, 0.40, 0.4),
    Site("D", 1.5, "gadoteridol", 8.0e-3, 20.0, 150.0, 450.0, 18.0, 0.15, 0.03, 0.12, 0.55, 0.5),
    Site("E", 3.0, "gadobutrol", 6.0e-3, 15.0, 165.0, 420.0, 30.0, 0.25, 0.08, 0.07, 0.35, 0.2),
    Site("F", 1.5, "gadopentetate", 2.0e-2, 45.0, 150.0, 450.0, 24.0, 0.18, 0.04, 0.10, 0.50, 0.3),
)
UNSEEN = (
    Site("U", 3.0, "gadodiamide", 4.2e-3, 9.0, 135.0, 400.0, 16.0, 0.35, 0.10, 0.15, 0.45, 0.5),
    Site("V", 1.5, "gadobutrol", 1.0e-2, 30.0, 170.0, 480.0, 28.0, 0.10, 0.02, 0.05, 0.60, 0.3),
    Site("W", 3.0, "gadobenate", 7.0e-3, 18.0, 120.0, 450.0, 20.0, 0.28, 0.07, 0.11, 0.30, 0.6),
)

#: T1 (s) of fat, gland, tumour, muscle and blood by field. At 3 T fat and gland: Edden et al. 2010,
#: doi:10.1002/jmri.22306; at 1.5 T: Rakow-Penner et al. 2006, J Magn Reson Imaging 23:87; muscle and blood: Stanisz et
#: al. 2005, doi:10.1002/mrm.20605. Tumours lie a little below gland.
_T1 = {
    1.5: {"fat": 0.296, "gland": 1.266, "tumour": 1.21, "muscle": 1.008, "blood": 1.441},
    3.0: {"fat": 0.423, "gland": 1.680, "tumour": 1.61, "muscle": 1.412, "blood": 1.932},
}
_WATER = {"fat": 0.95, "gland": 0.8, "tumour": 0.85, "muscle": 0.8, "blood": 0.9}
#: Median Ktrans (1/min) and its spread between patients (of the logarithm), and ve. Working values: tumours enhance by
#: one to three times their signal, gland from hardly to as much as weak tumours.
_TUMOUR, _GLAND = (0.25, 0.4, 0.4), (0.02, 0.5, 0.22)
_FAT, _MUSCLE = (0.004, 0.06), (0.04, 0.11)
#: Uptake of a tumour's core relative to its rim of 3 mm, from patient to patient; of a tumour with few cells left.
_CORE, _RIM, _FEW = (0.4, 1.0), 3.0, 0.5
_WITHIN, _TEXTURE = 0.25, 0.3
_VESSELS, _VESSEL_RADIUS = 2, (0.8, 1.5)


@dataclass(frozen=True, eq=False)
class Practice:
    """A practice exam and what is in it.

    Attributes
    ----------
    exam : Exam
    region : ndarray of bool, shape (z, y, x)
        Where the true cell fraction reaches the visible one; empty where the tumour has gone.
    organ, body : ndarray of bool, shape (z, y, x)
        The breast, and it with the chest wall.
    fibroglandular : ndarray, shape (z, y, x)
        True fraction in the breast.
    patient, visit, site, setting
        Whose it is, and how it was made.
    """

    exam: Exam
    region: np.ndarray
    organ: np.ndarray
    body: np.ndarray
    fibroglandular: np.ndarray
    patient: str
    visit: int
    site: str
    setting: str


def _uptake(ktrans: np.ndarray, ve: float, times: np.ndarray) -> np.ndarray:
    """Concentration (mM) of the Tofts model (Tofts 1997, J Magn Reson Imaging 7:91), (voxels, times in s)."""
    knots = np.arange(0.0, times.max() + 1.0, 1.0)
    plasma = torch.as_tensor(Parker().blood(knots) / (1 - 0.42))
    top = max(float(ktrans.max()), 1e-6)
    rates = np.linspace(0.0, top, 64)
    # Smooth in Ktrans: a table in place of a convolution in every voxel.
    table = rates[:, None] / 60 * convolve(torch.as_tensor(rates / ve / 60), torch.as_tensor(knots), plasma,
                                           torch.as_tensor(times)).numpy()  # fmt: skip
    return np.stack([np.interp(ktrans, rates, column) for column in table.T], -1)


def practice_exam(virtual: VirtualPatient, visit: int, site: Site, seed: int) -> Practice:
    """Image a virtual patient at a visit.

    Parameters
    ----------
    virtual : VirtualPatient
        Of three dimensions.
    visit : int
        From 1.
    site : Site
    seed : int
        Of what the images add: uptake, vessels, bias, movement and noise. With the same seed a patient keeps uptake and
        vessels from visit to visit.

    Raises
    ------
    InputError
        If the patient has no such visit.
    """
    domain, truth = virtual.patient.domain, virtual.truth
    if not 1 <= visit <= truth.sizes["time"]:
        raise InputError(f"practice exam: visit {visit}; the patient has {truth.sizes['time']}.")
    body_rng, scan_rng = (np.random.default_rng([seed, part]) for part in (0, visit))
    shape, spacing = domain.shape, domain.spacing
    cells = truth["cell_fraction"].values[visit - 1].astype(float)
    cellularity, seen = virtual.patient.cellularity, virtual.patient.visits[visit - 1]
    if cellularity is None:
        raise InputError(f"practice exam: {virtual.patient.id} has no settings of its cells.")
    visible = cellularity.visible_fraction
    organ = domain.mask
    # Behind the breast lies muscle, down to the image's edge.
    front = np.where(organ.any(1, keepdims=True), organ.argmax(1)[:, None], 0)
    surface = _wall(shape, spacing, organ)
    muscle = ~organ & (positions(shape, spacing)[1] < surface) | (~organ & (np.arange(shape[1])[:, None] < front))
    share = np.where(organ, np.clip(cells / visible, 0, 1), 0.0)
    healthy = 1 - share
    parts = {
        "fat": healthy * domain.tissues["adipose"],
        "gland": healthy * domain.tissues["fibroglandular"],
        "tumour": share,
        "muscle": muscle.astype(float),
    }
    vessel = _vessels(body_rng, organ, spacing)
    parts = {name: part * (1 - vessel) for name, part in parts.items()} | {"blood": vessel}

    texture = {n: np.exp(_TEXTURE * random_field(body_rng, shape, spacing, 6.0)) for n in ("fat", "gland", "muscle")}
    within = np.exp(_WITHIN * random_field(body_rng, shape, spacing, 4.0))
    level, background = (m * np.exp(s * body_rng.standard_normal()) for m, s, _ in (_TUMOUR, _GLAND))
    core = body_rng.uniform(*_CORE)
    depth = ndimage.distance_transform_edt(np.pad(share > 0.5, 1), spacing)[1:-1, 1:-1, 1:-1]
    rim = core + (1 - core) * np.exp(-np.maximum(depth - _RIM, 0) / _RIM)
    few = _FEW + (1 - _FEW) * np.clip(cells / 0.5, 0, 1)
    ktrans = {
        "fat": (_FAT[0] * texture["fat"], _FAT[1]),
        "gland": (background * texture["gland"], _GLAND[2]),
        "tumour": (level * within * rim * few, _TUMOUR[2]),
        "muscle": (_MUSCLE[0] * texture["muscle"], _MUSCLE[1]),
    }
    times = np.array([0.0, site.early, site.late])
    uptake = {name: _uptake(rate.ravel(), ve, times).reshape(*shape, 3) for name, (rate, ve) in ktrans.items()}
    uptake["blood"] = np.broadcast_to(Parker().blood(times) * (times > 0), (*shape, 3))

    sequence, agent = SpoiledGradientEcho(site.flip_angle, site.tr), relaxivity(site.agent, site.field_strength)
    angle = torch.as_tensor(1 + site.b1 * random_field(scan_rng, shape, spacing, 40.0))
    receiver = np.exp(site.bias * random_field(scan_rng, shape, spacing, 40.0))
    scale = _signal(sequence, _T1[site.field_strength]["gland"], np.zeros(1), torch.ones(1)) * _WATER["gland"]
    images = []
    for k in range(3):
        signal = np.zeros(shape)
        for name, part in parts.items():
            left = site.fat if name == "fat" else 1.0
            own = _signal(sequence, _T1[site.field_strength][name], agent.r1 * uptake[name][..., k], angle)
            signal += left * _WATER[name] * part * own
        moved = ndimage.shift(signal, site.motion * scan_rng.standard_normal(3) / spacing, order=1, mode="nearest")
        clean = ndimage.gaussian_filter(moved if k else signal, site.blur) * receiver / scale
        real, imaginary = scan_rng.standard_normal((2, *shape)) / site.snr
        images.append(400 * np.hypot(clean + real, imaginary))
    adc = None if seen.adc is None else np.where(organ, seen.adc, np.nan)
    setting = "Mismatched" if "truth.resistant_fraction" in virtual.parameters else "Matched"
    return Practice(
        Exam(images[0], images[1], images[2], spacing, adc), organ & (cells >= visible), organ, organ | muscle,
        domain.tissues["fibroglandular"], virtual.patient.id, visit, site.name, setting,
    )  # fmt: skip


def without_tumour(virtual: VirtualPatient) -> VirtualPatient:
    """The same breast as if no tumour had ever grown in it, to see what a method finds where there is nothing.

    Its exams with the same seed differ from the patient's only where the tumour was. ADC maps are left out.
    """
    cells = virtual.truth["cell_fraction"]
    truth = virtual.truth.assign(cell_fraction=cells * 0.0)
    visits = tuple(Visit(visit.number, visit.day, volume=0.0) for visit in virtual.patient.visits)
    return replace(virtual, patient=replace(virtual.patient, visits=visits), truth=truth)


def _signal(sequence: SpoiledGradientEcho, t1: float, added: np.ndarray, angle: torch.Tensor) -> np.ndarray:
    rate = torch.as_tensor(1 / t1 + added)
    return sequence.signal(rate, torch.ones_like(rate), angle).numpy()


def _wall(shape: tuple[int, ...], spacing: tuple[float, ...], organ: np.ndarray) -> np.ndarray:
    """Height (mm along y) of the chest wall in every column: under the breast, carried on smoothly beside it."""
    z, y, x = positions(shape, spacing)
    column = organ.any(1)
    zz, xx = np.broadcast_to(z[:, 0], column.shape), np.broadcast_to(x[0], column.shape)
    terms = np.stack([np.ones_like(zz), zz**2, xx**2, np.abs(zz) ** 3, np.abs(xx) ** 3], -1)
    low = y[0, organ.argmax(1), 0] - spacing[1] / 2
    found, *_ = np.linalg.lstsq(terms[column], low[column], rcond=None)
    return (terms @ found)[:, None, :]


def _vessels(rng: np.random.Generator, organ: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """Share of blood (z, y, x): a few wavy vessels of about a millimetre across the breast."""
    share = np.zeros(organ.shape)
    grid = positions(organ.shape, spacing)
    inside = np.argwhere(organ)
    for _ in range(_VESSELS):
        begin, middle, end = (inside[rng.integers(len(inside))] for _ in range(3))
        radius, steps = rng.uniform(*_VESSEL_RADIUS), np.linspace(0, 1, 60)[:, None]
        line = (1 - steps) ** 2 * begin + 2 * steps * (1 - steps) * middle + steps**2 * end
        points = (line + 0.5 - np.array(organ.shape) / 2) * np.array(spacing)
        nearest = np.full(organ.shape, np.inf)
        for point in points:
            nearest = np.minimum(nearest, sum((g - p) ** 2 for g, p in zip(grid, point, strict=True)))
        share = np.maximum(share, np.clip((radius - np.sqrt(nearest)) / min(spacing) + 0.5, 0, 1))
    return np.where(organ, share, 0.0)
