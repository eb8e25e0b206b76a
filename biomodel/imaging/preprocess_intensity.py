"""Bringing the intensities of images without a unit onto one scale: z-scores and Nyúl's landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from biomodel.errors import GeometryError, InputError
from biomodel.frozen import frozen_array

__all__ = ["Nyul", "NyulScale", "ZScore"]

#: Fewest voxels from which a mean or a percentile is taken.
LEAST_VOXELS = 20


@dataclass(frozen=True)
class ZScore:
    """Mean 0 and standard deviation 1 in the organ, for each image by itself; there is nothing to learn."""

    def apply(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return (image - mean) / standard deviation, float64; mean and deviation inside the mask, NaN left out.

        Raises
        ------
        InputError
            If the image has no contrast inside the mask.
        GeometryError
            If the shapes differ.
        """
        values = _inside(image, mask, "z-score")
        spread = float(values.std())
        if not spread > 1e-9 * max(abs(float(values.mean())), 1e-300):
            raise InputError(f"z-score: constant ({values.mean():g}) inside the mask; expected an image with contrast.")
        return (np.asarray(image, float) - values.mean()) / spread


@dataclass(frozen=True, eq=False)
class NyulScale:
    """A scale learned from training images.

    Parameters
    ----------
    percentiles
        (n,), rising, 0 to 100.
    landmarks
        (n,), rising: where they lie on the scale.
    """

    percentiles: np.ndarray
    landmarks: np.ndarray

    def __post_init__(self) -> None:
        percentiles, landmarks = frozen_array(self.percentiles, float), frozen_array(self.landmarks, float)
        if percentiles.ndim != 1 or landmarks.shape != percentiles.shape or not (np.diff(landmarks) > 0).all():
            raise InputError("Nyúl: landmarks must be as many as percentiles, and rise. Learn the scale again.")
        object.__setattr__(self, "percentiles", percentiles)
        object.__setattr__(self, "landmarks", landmarks)

    def apply(self, image: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Return the image on the scale, float64: linear between its landmarks and on beyond the outer ones.

        Raises
        ------
        InputError
            If two landmarks of the image coincide: it has no contrast there, so that no scale fits.
        GeometryError
            If the shapes differ.
        """
        own = _landmarks(image, mask, self.percentiles, "image")
        image = np.asarray(image, float)
        out: np.ndarray = np.interp(image, own, self.landmarks)
        for end, step in ((0, 1), (-1, -2)):
            slope = (self.landmarks[end] - self.landmarks[step]) / (own[end] - own[step])
            beyond = image < own[0] if end == 0 else image > own[-1]
            out[beyond] = self.landmarks[end] + slope * (image[beyond] - own[end])
        out[~np.isfinite(image)] = np.nan
        return out


@dataclass(frozen=True)
class Nyul:
    """Piecewise linear scaling by percentiles in the organ (Nyúl, Udupa and Zhang 2000, doi:10.1109/42.836373).

    Parameters
    ----------
    percentiles
        Rising; the outer ones keep outliers out. The deciles between 1 and 99 by default, the authors' choice.
    scale
        Where the outer two come to lie.
    """

    percentiles: tuple[float, ...] = (1.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 99.0)
    scale: tuple[float, float] = (0.0, 100.0)

    def __post_init__(self) -> None:
        given = np.asarray(self.percentiles, float)
        if len(given) < 2 or not (np.diff(given) > 0).all() or given[0] < 0 or given[-1] > 100:
            raise InputError(f"Nyúl: percentiles {self.percentiles}; expected two or more, rising, from 0 to 100.")
        if not self.scale[0] < self.scale[1]:
            raise InputError(f"Nyúl: scale {self.scale}; expected two rising numbers.")

    def fit(self, images: Sequence[np.ndarray], masks: Sequence[np.ndarray]) -> NyulScale:
        """Learn the scale from training images, and from those alone.

        Raises
        ------
        InputError
            If there are none, or one of them has no contrast.
        """
        if not len(images) or len(images) != len(masks):
            raise InputError(f"Nyúl: {len(images)} images and {len(masks)} masks; expected as many, one or more.")
        low, high = self.scale
        placed = []
        for number, (image, mask) in enumerate(zip(images, masks, strict=True), start=1):
            own = _landmarks(image, mask, np.asarray(self.percentiles), f"training image {number}")
            placed.append(low + (high - low) * (own - own[0]) / (own[-1] - own[0]))
        return NyulScale(np.asarray(self.percentiles), np.mean(placed, axis=0))


def _landmarks(image: np.ndarray, mask: np.ndarray, percentiles: np.ndarray, name: str) -> np.ndarray:
    values = _inside(image, mask, f"Nyúl: {name}")
    own: np.ndarray = np.percentile(values, percentiles)
    steps = np.diff(own)
    if not (steps > 1e-9 * max(float(np.abs(own).max()), 1e-300)).all():
        at = int(np.argmin(steps))
        raise InputError(
            f"Nyúl: {name}: percentiles {percentiles[at]:g} and {percentiles[at + 1]:g} are both {own[at]:g}; expected "
            "contrast between them. Check the image and its mask, or use fewer percentiles."
        )
    return own


def _inside(image: np.ndarray, mask: np.ndarray, where: str) -> np.ndarray:
    image, mask = np.asarray(image, float), np.asarray(mask, bool)
    if image.shape != mask.shape:
        raise GeometryError(f"{where}: image of shape {image.shape}, mask of {mask.shape}; expected the same.")
    values: np.ndarray = image[mask]
    values = values[np.isfinite(values)]
    if values.size < LEAST_VOXELS:
        raise InputError(
            f"{where}: {values.size} voxels with a value inside the mask; expected at least {LEAST_VOXELS}."
        )
    return values
