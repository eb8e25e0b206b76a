"""What an encoder sees of a patient: volumes of several visits on one grid, with their times, and batches of them.

Every volume is one token later: a phase of a dynamic series, an ADC map, a T2-weighted image, of one visit. What is
missing is simply not there, so phases, visits and modalities may be missing in any way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from biomodel.errors import GeometryError, InputError

__all__ = ["CHANNELS", "Batch", "Scan", "Study", "collate"]

#: Channels of a volume. A phase of a dynamic series has its signal and its gain over the visit's first phase; other
#: volumes leave these empty. The tumour's mask goes with every volume.
CHANNELS = ("signal", "gain", "adc", "t2", "mask")
#: What a volume can be.
KINDS = ("dce", "adc", "t2")
#: ADC that enters as 1, mm²/s.
ADC_SCALE = 2.0e-3


@dataclass(frozen=True, eq=False)
class Scan:
    """The volumes of one visit, on the patient's grid.

    Parameters
    ----------
    day : float
        Of the visit.
    dce : ndarray, shape (phases, z, y, x), optional
        Signal in any unit, the same for all phases; the first phase is the one before contrast.
    times : sequence of float, optional
        Of the phases, s after the agent's arrival (negative before); needed with `dce`.
    adc : ndarray, shape (z, y, x), optional
        mm²/s.
    t2 : ndarray, shape (z, y, x), optional
        Any unit.
    mask : ndarray of bool, shape (z, y, x), optional
        The tumour; without one, features are pooled over the whole volume alone.

    Raises
    ------
    GeometryError
        If volumes differ in shape.
    InputError
        If there is no volume, a value is not finite, or the phases' times do not fit.
    """

    day: float
    dce: np.ndarray | None = None
    times: Sequence[float] = ()
    adc: np.ndarray | None = None
    t2: np.ndarray | None = None
    mask: np.ndarray | None = None

    def __post_init__(self) -> None:
        where = f"scan of day {self.day:g}"
        volumes: dict[str, np.ndarray] = {}
        for name, dimensions in (("dce", 4), ("adc", 3), ("t2", 3), ("mask", 3)):
            value = getattr(self, name)
            if value is None:
                continue
            array = np.asarray(value, np.float32)
            if array.ndim != dimensions:
                raise GeometryError(f"{where}: {name} of shape {array.shape}; expected {dimensions} axes.")
            if not np.isfinite(array).all():
                raise InputError(f"{where}: {name} has values that are not finite; fill them before encoding.")
            volumes[name] = array
            object.__setattr__(self, name, array)
        shapes = {a.shape[-3:] for a in volumes.values()}
        if len(shapes) > 1:
            raise GeometryError(f"{where}: volumes of shapes {sorted(shapes)}; resample them to one grid.")
        if not volumes.keys() - {"mask"}:
            raise InputError(f"{where}: no volume; expected dce, adc or t2.")
        times = np.asarray(self.times, float)
        phases = 0 if self.dce is None else len(self.dce)
        if times.shape != (phases,) or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
            raise InputError(f"{where}: times {times.tolist()} for {phases} phases; expected one each, increasing, s.")
        if not np.isfinite(self.day):
            raise InputError(f"{where}: expected a finite day.")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (z, y, x)."""
        first = next(a for a in (self.adc, self.t2, self.dce) if a is not None)
        z, y, x = first.shape[-3:]
        return z, y, x

    def volumes(self) -> list[tuple[str, float, np.ndarray]]:
        """Kind, time (s) and channels (5, z, y, x) of every volume.

        Signals are over the 95th percentile of the visit's first phase, the same for all phases, so that enhancement
        stays what it is.
        """
        found = []
        mask = np.zeros(self.shape, np.float32) if self.mask is None else np.asarray(self.mask)
        if self.dce is not None:
            unit = max(float(np.percentile(self.dce[0], 95)), 1e-6)
            for time, phase in zip(self.times, self.dce, strict=True):
                found.append(("dce", float(time), self._channels(mask, phase / unit, (phase - self.dce[0]) / unit)))
        if self.adc is not None:
            found.append(("adc", 0.0, self._channels(mask, adc=self.adc / ADC_SCALE)))
        if self.t2 is not None:
            unit = max(float(np.percentile(self.t2, 95)), 1e-6)
            found.append(("t2", 0.0, self._channels(mask, t2=self.t2 / unit)))
        return found

    @staticmethod
    def _channels(mask, signal=None, gain=None, adc=None, t2=None) -> np.ndarray:
        channels = [np.zeros_like(mask) if c is None else c for c in (signal, gain, adc, t2)]
        return np.stack([*channels, mask]).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Study:
    """A patient's visits, in order, on one grid.

    Raises
    ------
    InputError
        If there is no visit, or days do not increase.
    GeometryError
        If visits differ in shape.
    """

    patient: str
    scans: Sequence[Scan]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scans", tuple(self.scans))
        days = [s.day for s in self.scans]
        if not days or (np.diff(days) <= 0).any():
            raise InputError(f"study of {self.patient}: days {days}; expected one visit or more, in order.")
        if len({s.shape for s in self.scans}) > 1:
            shapes = [s.shape for s in self.scans]
            raise GeometryError(f"study of {self.patient}: visits of shapes {shapes}; register them to one grid.")

    def volumes(self) -> list[tuple[int, str, float, np.ndarray]]:
        """Number of the visit, kind, time (s) and channels of every volume."""
        return [(i, *v) for i, s in enumerate(self.scans) for v in s.volumes()]


@dataclass(frozen=True, eq=False)
class Batch:
    """Volumes of several patients; rows that a patient lacks are not there.

    Attributes
    ----------
    volumes : tensor, shape (n, 5, z, y, x)
        Of all patients, one after another; see `CHANNELS`.
    patient, slot : tensor of int, shape (n,)
        Which patient of the batch, and which of its tokens.
    visit, kind : tensor of int, shape (n,)
    day, time : tensor, shape (n,)
        Of the visit, days since the patient's first; of the phase, s.
    size : int
        Number of patients.
    """

    volumes: torch.Tensor
    patient: torch.Tensor
    slot: torch.Tensor
    visit: torch.Tensor
    kind: torch.Tensor
    day: torch.Tensor
    time: torch.Tensor
    size: int

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved = {n: getattr(self, n).to(device, non_blocking=True) for n in self._tensors()}
        return replace(self, **moved)

    def part(self, first: int, last: int) -> Batch:
        """Patients `first` up to, without, `last`."""
        rows = (self.patient >= first) & (self.patient < last)
        parts = {n: getattr(self, n)[rows] for n in self._tensors()}
        parts["patient"] = parts["patient"] - first
        return Batch(**parts, size=last - first)

    @staticmethod
    def _tensors() -> Sequence[str]:
        return ("volumes", "patient", "slot", "visit", "kind", "day", "time")


def collate(studies: Sequence[Study], volumes: Mapping[int, Sequence[np.ndarray]] | None = None) -> Batch:
    """A batch of patients.

    Parameters
    ----------
    studies : sequence of Study
        Of one shape.
    volumes : mapping of int to sequence of ndarray, optional
        Changed channels (5, z, y, x) of the volumes of the patients with these numbers, as augmentation makes them.

    Raises
    ------
    GeometryError
        If the patients' grids differ in shape.
    """
    if not studies:
        raise InputError("encoder: a batch of no patients.")
    shapes = {s.scans[0].shape for s in studies}
    if len(shapes) > 1:
        raise GeometryError(f"encoder: patients of shapes {sorted(shapes)} in one batch; crop them to one shape.")
    rows: dict[str, list] = {n: [] for n in ("patient", "slot", "visit", "kind", "day", "time")}
    arrays = []
    for number, study in enumerate(studies):
        changed = None if volumes is None else volumes.get(number)
        for slot, (visit, kind, time, channels) in enumerate(study.volumes()):
            arrays.append(channels if changed is None else changed[slot])
            day = study.scans[visit].day - study.scans[0].day
            for name, value in zip(rows, (number, slot, visit, KINDS.index(kind), day, time), strict=True):
                rows[name].append(value)
    ints = {n: torch.tensor(rows[n], dtype=torch.long) for n in ("patient", "slot", "visit", "kind")}
    floats = {n: torch.tensor(rows[n], dtype=torch.float32) for n in ("day", "time")}
    return Batch(torch.from_numpy(np.stack(arrays)), **ints, **floats, size=len(studies))
