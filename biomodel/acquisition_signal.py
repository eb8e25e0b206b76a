"""From tissue maps to images: motion, contrast agent over time, signals, the receiver and its noise.

Nothing here is shared with the fits: the convolution is a trapezoidal rule at steps of a quarter of a second or less,
and the signal equations are written anew in numpy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from scipy.spatial.transform import Rotation
from scipy.special import ndtr

from biomodel.acquisition_protocol import ImagingFlaws, Motion, Protocol
from biomodel.anatomy import random_field
from biomodel.imaging.aif import InputFunction, Parker
from biomodel.imaging.series_grid import Grid
from biomodel.truth import Array

__all__ = [
    "bolus",
    "coarser",
    "diffusion_signal",
    "draw_motion",
    "magnitude",
    "moved",
    "shifted",
    "smooth_pattern",
    "spoiled_echo",
    "tissue_concentration",
    "walk",
]

#: Longest step of the convolution, s, and samples that make a phase where it is averaged over its duration.
STEP, SUBSAMPLES = 0.25, 4
#: Voxels whose curves are computed at a time.
BLOCK = 4096
#: Pseudodiffusion of flowing blood, mm²/s (Sigmund et al. 2011, doi:10.1002/mrm.22740).
PSEUDODIFFUSION = 14.9e-3
#: Maps that end at the skin are interpolated linearly, since cubic splines ring at an edge.
DENSITIES = ("water", "fat", "dwi_water", "dwi_fat", "artery")


def draw_motion(rng: np.random.Generator, motion: Motion, grid: Grid) -> Array:
    """Draw a rigid motion: (4, 4), from where a point of the body was to where it is now (mm, RAS+).

    It turns about the middle of the grid. A grid with a flat axis keeps its plane.
    """
    shift = motion.translation * rng.standard_normal(3)
    turn = motion.rotation * rng.standard_normal(3)
    flat = np.array(grid.shape[::-1]) == 1
    shift[flat] = 0.0
    if flat.any():
        turn[~flat | (flat.sum() > 1)] = 0.0
    middle = grid.affine @ np.array([*((np.array(grid.shape[::-1]) - 1) / 2), 1.0])
    matrix = np.eye(4)
    matrix[:3, :3] = Rotation.from_euler("xyz", turn, degrees=True).as_matrix()
    matrix[:3, 3] = middle[:3] - matrix[:3, :3] @ middle[:3] + shift
    return matrix


def walk(rng: np.random.Generator, steps: int, spread: float, grid: Grid) -> Array:
    """Draw a random walk (steps, 3), mm along z, y, x, from 0 to a standard deviation of `spread` at its end."""
    moves = rng.standard_normal((steps, 3)) * (spread / max(np.sqrt(steps - 1), 1.0))
    moves[0] = 0.0
    moves[:, np.array(grid.shape) == 1] = 0.0
    return np.asarray(np.cumsum(moves, axis=0))


def moved(maps: dict[str, Array], matrix: Array, grid: Grid) -> dict[str, Array]:
    """Return maps of a body that has moved; what comes into view continues what is at the edge."""
    if np.array_equal(matrix, np.eye(4)):
        return maps
    back = np.linalg.solve(grid.affine, np.linalg.solve(matrix, grid.affine))
    turn, offset = back[2::-1, 2::-1], back[2::-1, 3]
    found = {}
    for name, values in maps.items():
        order = 1 if name in DENSITIES else 3
        result = ndimage.affine_transform(values, turn, offset, order=order, mode="nearest")
        found[name] = np.clip(result, values.min(), values.max())
    return found


def shifted(image: Array, shift: Sequence[float], grid: Grid) -> Array:
    """Return an image of a body that has shifted by (z, y, x) mm."""
    if not np.any(shift):
        return image
    steps = np.asarray(shift) / np.asarray(grid.spacing)
    return np.maximum(ndimage.shift(image, steps, order=3, mode="nearest"), 0.0)


def coarser(image: Array, factors: Sequence[int]) -> Array:
    """Return the mean over blocks of voxels; the axes must be multiples of `factors`, or flat."""
    for axis, factor in enumerate(factors):
        if factor > 1 and image.shape[axis] > 1:
            split = (*image.shape[:axis], image.shape[axis] // factor, factor, *image.shape[axis + 1 :])
            image = image.reshape(split).mean(axis=axis + 1)
    return image


def smooth_pattern(rng: np.random.Generator, grid: Grid, body: np.ndarray) -> Array:
    """Draw a pattern as of a coil: a quadratic in position with mean 0 and standard deviation 1 over the body."""
    axes = [np.linspace(-1.0, 1.0, n) if n > 1 else np.zeros(1) for n in grid.shape]
    z, y, x = np.meshgrid(*axes, indexing="ij", sparse=True)
    pattern = np.zeros(grid.shape)
    for term in (z, y, x, z * y, y * x, x * z, z * z, y * y, x * x):
        pattern = pattern + rng.standard_normal() * term
    inside = pattern[body]
    return np.asarray((pattern - inside.mean()) / max(float(inside.std()), 1e-12))


@dataclass(frozen=True, eq=False)
class Bolus:
    """The contrast agent in the artery at one visit.

    Parameters
    ----------
    haematocrit, arrival, scale : float
        Fraction; s; relative to the population input.
    plasma : InputFunction
        At steps of the convolution.
    """

    haematocrit: float
    arrival: float
    scale: float
    plasma: InputFunction


def _substeps(protocol: Protocol) -> int:
    """Return the steps per phase: a multiple of twice the subsamples, so that their middles lie on steps."""
    return 2 * SUBSAMPLES * int(np.ceil(protocol.phase_time / STEP / (2 * SUBSAMPLES)))


def bolus(rng: np.random.Generator, protocol: Protocol) -> Bolus:
    """Draw the arterial input of a visit: Parker's, scaled, arriving between the last baseline phase and the next."""
    scale = float(np.exp(protocol.input_cv * rng.standard_normal()))
    haematocrit = float(rng.uniform(*protocol.haematocrit))
    arrival = (protocol.baseline - 1 + float(rng.uniform(0.1, 0.9))) * protocol.phase_time
    steps = _substeps(protocol)
    times = np.arange(protocol.phases * steps + 1) * (protocol.phase_time / steps)
    blood = Parker(arrival, scale).blood(times)
    tau = 0.0 if protocol.flaws is None else protocol.flaws.dispersion
    if tau > 0:
        decay = np.exp(-(times[1] - times[0]) / tau)
        wide = np.zeros_like(blood)
        for n in range(1, len(blood)):
            wide[n] = wide[n - 1] * decay + (1.0 - decay) * 0.5 * (blood[n] + blood[n - 1])
        blood = wide
    return Bolus(haematocrit, arrival, scale, InputFunction.from_blood(times, blood, haematocrit))


def bolus_delay(rng: np.random.Generator, flaws: ImagingFlaws | None, grid: Grid, artery: Array) -> Array:
    """Draw by how much later the bolus reaches each voxel than the artery (s)."""
    late = 0.0 if flaws is None else flaws.delay
    spread = ndtr(random_field(rng, grid.shape, grid.spacing, max(grid.spacing) * max(grid.shape) / 6))
    return np.asarray(late * spread * (artery < 0.5))


def tissue_concentration(
    ktrans: Array, ve: Array, vp: Array, source: Bolus, protocol: Protocol, delay: Array
) -> tuple[np.ndarray, int]:
    """Concentration in tissue by the extended Tofts model, C = vp cp + Ktrans ∫ cp(s) exp(-Ktrans (t - s) / ve) ds.

    Parameters
    ----------
    ktrans, ve, vp, delay : arrays (voxels,)
        1/min; fractions; s.

    Returns
    -------
    array of float32, shape (voxels, phases * samples)
        mM.
    int
        Samples per phase.
    """
    steps, times = _substeps(protocol), source.plasma.times
    step = float(times[1] - times[0])
    plasma = source.plasma.at(times)
    samples = SUBSAMPLES if protocol.flaws is not None and protocol.flaws.phase_average else 1
    places = [steps * (2 * part + 1) // (2 * SUBSAMPLES) for part in range(samples)] if samples > 1 else [0]
    wanted = {phase * steps + place: phase * samples + n for phase in range(protocol.phases)
              for n, place in enumerate(places)}  # fmt: skip
    lag = np.rint(delay / step).astype(int)
    most = int(lag.max(initial=0))
    padded = np.concatenate([np.zeros(most), plasma])  # no agent before the series
    found = np.empty((len(ktrans), protocol.phases * samples), np.float32)
    rate = ktrans / 60.0
    for start in range(0, len(ktrans), BLOCK):
        part = slice(start, start + BLOCK)
        decay = np.exp(-rate[part] / np.maximum(ve[part], 1e-6) * step)
        late = most - lag[part]
        uniform = most == 0
        held = np.zeros_like(decay)
        before: Array | float = float(plasma[0]) if uniform else padded[late]
        for n in range(max(wanted) + 1):
            now = float(plasma[n]) if uniform else padded[late + n]
            if n:
                held = (held + 0.5 * step * before) * decay + 0.5 * step * now
            if n in wanted:
                found[part, wanted[n]] = vp[part] * now + rate[part] * held
            before = now
    return found, samples


def spoiled_echo(r1: Array, flip_angle: Array, tr: float) -> Array:
    """Signal of a spoiled gradient echo of unit magnetisation; `r1` in 1/s, angles in radians (Haase et al. 1986)."""
    e = np.exp(-tr * r1)
    return np.asarray(np.sin(flip_angle) * (1.0 - e) / (1.0 - np.cos(flip_angle) * e))


def diffusion_signal(water: Array, fat: Array, adc: Array, perfused: Array, b_value: float, perfusion: float) -> Array:
    """Signal of a diffusion weighting; `perfusion` is the share of the water's signal that flows, where it can."""
    part = perfusion * perfused
    kept = (1.0 - part) + part * np.exp(-b_value * PSEUDODIFFUSION)
    return np.asarray((water * kept + fat) * np.exp(-b_value * adc))


def magnitude(
    rng: np.random.Generator, image: Array, sigma: float, spacing: Sequence[float], length: float = 0.0
) -> np.ndarray:
    """Return the magnitude of an image with normal noise of `sigma` in each channel (Rician), float32.

    With a `length` (mm) the noise is correlated over it, at the same standard deviation.
    """
    signal = np.asarray(image, np.float32)
    if sigma == 0:
        return signal
    if length > 0:
        real, imaginary = (random_field(rng, signal.shape, spacing, length).astype(np.float32) for _ in range(2))
    else:
        real, imaginary = (rng.standard_normal(signal.shape, np.float32) for _ in range(2))
    return np.hypot(signal + np.float32(sigma) * real, np.float32(sigma) * imaginary)
