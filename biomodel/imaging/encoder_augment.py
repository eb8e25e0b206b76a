"""Augmentations and hidden blocks for training an encoder, which leave the kinetics of contrast alone.

Enhancement is the ratio of a phase to the one before contrast, and a change over time that of one visit to another.
So one transform of space applies to all volumes of a patient, and one factor to all signals of a visit; ADC, which is
in units, has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from biomodel.errors import InputError
from biomodel.imaging.encoder_study import CHANNELS, Study

__all__ = ["Augmentation", "hidden_blocks"]

_SIGNAL, _GAIN, _T2, _MASK = (CHANNELS.index(n) for n in ("signal", "gain", "t2", "mask"))


@dataclass(frozen=True)
class Augmentation:
    """How studies are changed at random.

    Parameters
    ----------
    flip : tuple of int
        Axes (0 to 2 for z, y, x) that are mirrored with a chance of one half.
    shift : int
        Most voxels by which everything is moved along each axis; what comes in is empty.
    gain : float
        Spread of the logarithm of the factor on all signals of a visit.
    noise : float
        Sd of noise added to images, in their normalised units; the mask has none.
    """

    flip: tuple[int, ...] = (0, 1, 2)
    shift: int = 2
    gain: float = 0.1
    noise: float = 0.01

    def __post_init__(self) -> None:
        if not set(self.flip) <= {0, 1, 2} or self.shift < 0 or self.gain < 0 or self.noise < 0:
            raise InputError(f"Augmentation: {self}; expected axes 0 to 2 and numbers that are not negative.")

    def __call__(self, study: Study, rng: np.random.Generator) -> list[np.ndarray]:
        """Changed channels (5, z, y, x) of every volume of a study."""
        axes = tuple(1 + a for a in self.flip if rng.random() < 0.5)
        moves = [int(m) for m in rng.integers(-self.shift, self.shift + 1, 3)]
        factors = np.exp(self.gain * rng.standard_normal(len(study.scans))).astype(np.float32)
        changed = []
        for visit, kind, _, channels in study.volumes():
            values = _moved(np.flip(channels, axes), moves)
            factor = factors[visit]
            values[[_SIGNAL, _GAIN, _T2]] *= factor
            if self.noise:
                # One draw goes to a phase's signal and to its gain, which is the same measurement.
                draw = self.noise * rng.standard_normal(values.shape[1:], dtype=np.float32)
                for row in {"dce": (_SIGNAL, _GAIN), "adc": (CHANNELS.index("adc"),), "t2": (_T2,)}[kind]:
                    values[row] += draw
            changed.append(values)
        return changed


def _moved(values: np.ndarray, moves: list[int]) -> np.ndarray:
    """Values (c, z, y, x) moved by whole voxels; what comes in is 0."""
    found = np.zeros_like(values)
    into, out = [slice(None)], [slice(None)]
    for move, n in zip(moves, values.shape[1:], strict=True):
        into.append(slice(max(move, 0), n + min(move, 0)))
        out.append(slice(max(-move, 0), n - max(move, 0)))
    found[tuple(into)] = values[tuple(out)]
    return found


def hidden_blocks(shape: tuple[int, int, int], block: int, part: float, rng: np.random.Generator) -> np.ndarray:
    """Bool (z, y, x): about a part of all cubes of `block` voxels, at least one."""
    counts = [-(-n // block) for n in shape]
    total = int(np.prod(counts))
    chosen = np.zeros(total, bool)
    chosen[rng.permutation(total)[: max(1, round(part * total))]] = True
    grid = chosen.reshape(counts)
    for axis in range(3):
        grid = np.repeat(grid, block, axis)
    return grid[: shape[0], : shape[1], : shape[2]]
