"""How an inversion-prepared series is read: by a train of pulses after each inversion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from biomodel.errors import InputError, UnitError

if TYPE_CHECKING:
    from biomodel.imaging.series import Series

__all__ = ["Train", "TrainTiming"]

#: Longest time between two pulses of a train, s; beyond, it is in ms, or the time from inversion to inversion.
LONGEST_SPACING = 0.1


@dataclass(frozen=True)
class Train:
    """Pulses of a spoiled gradient echo that follow each inversion.

    Parameters
    ----------
    pulses
        Number.
    spacing
        From pulse to pulse, s.
    centre
        Part of the train that comes before the pulse that reads the centre of k-space: 0.5 in linear order, 0 where
        the centre is read first.

    Raises
    ------
    InputError, UnitError
        If a number is impossible.
    """

    pulses: int
    spacing: float
    centre: float = 0.5

    def __post_init__(self) -> None:
        if isinstance(self.pulses, bool) or int(self.pulses) != self.pulses or not 1 <= self.pulses <= 10_000:
            raise InputError(f"inversion train: {self.pulses} pulses; expected a whole number from 1.")
        if not (np.isfinite(self.spacing) and self.spacing > 0):
            raise InputError(f"inversion train: spacing {self.spacing} s; expected the time between pulses, above 0.")
        if self.spacing > LONGEST_SPACING:
            raise UnitError(
                f"inversion train: spacing {self.spacing:g} s; expected the time from pulse to pulse, at most "
                f"{LONGEST_SPACING:g} s. Convert ms to s, or give the time from inversion to inversion as such."
            )
        if not 0 <= self.centre <= 1:
            raise InputError(f"inversion train: centre {self.centre}; expected a part of the train, 0 to 1.")

    @property
    def lead(self) -> float:
        """From the first pulse to the one that reads the centre of k-space, s."""
        return self.centre * self.pulses * self.spacing

    @property
    def length(self) -> float:
        """From the first pulse to the end of the train, s."""
        return self.pulses * self.spacing


@dataclass(frozen=True)
class TrainTiming:
    """What a study says of its inversion-prepared series where their headers do not.

    Parameters
    ----------
    train
        The pulses.
    cycle, delay
        From inversion to inversion, or from the end of the train to the next inversion, s; one of them.
    to_first_pulse
        Whether the headers' inversion times end at the train's first pulse. DICOM and BIDS define them to end at the
        pulse that reads the centre of k-space, and not all scanners keep to it.
    """

    train: Train
    cycle: float | None = None
    delay: float | None = None
    to_first_pulse: bool = False

    def __post_init__(self) -> None:
        if (self.cycle is None) == (self.delay is None):
            raise InputError(
                "inversion train: expected either 'cycle' (from inversion to inversion) or 'delay' (from the end of "
                "the train to the next inversion), and not both. Give the one that the protocol states."
            )
        for name in ("cycle", "delay"):
            value = getattr(self, name)
            if value is not None and not (np.isfinite(value) and 0 <= value <= 60):
                raise InputError(f"inversion train: {name} {value} s; expected 0 to 60 s.")

    def of(self, series: Series) -> Series:
        """Return an inversion-prepared series with its train, times to the centre of k-space, and cycles.

        Raises
        ------
        InputError
            If the times do not fit the train.
        """
        assert series.inversion_times is not None
        centre = series.inversion_times + (self.train.lead if self.to_first_pulse else 0.0)
        first = centre - self.train.lead
        cycles = np.full(series.samples, self.cycle) if self.delay is None else first + self.train.length + self.delay
        return replace(series, train=self.train, inversion_times=centre, cycles=cycles)
