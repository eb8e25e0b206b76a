"""What was seen of a cell fraction: noisy maps, outlines, uptake; each a likelihood with unknowns of its own.

A modality turns predicted cell fractions into a log likelihood and into the ingredients of a Gauss-Newton step: its
gradient, and the Fisher information as a sum of squares of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.special import log_ndtr

from biomodel.errors import InputError
from biomodel.parameters import LogitNormal, LogNormal, Parameter, Prior

#: log sqrt(2 pi).
LOG_ROOT = 0.5 * float(np.log(2 * np.pi))


@dataclass(frozen=True, eq=False)
class Local:
    """A modality's negative log likelihood at one prediction of n values, with derivatives.

    Attributes
    ----------
    value : float
    by_cells : ndarray, shape (n,)
        Derivative by the predicted cell fractions.
    by_unknowns : ndarray, shape (e,)
        Derivative by the modality's own unknowns.
    rows : list of (ndarray (n,), ndarray (e, n))
        The Fisher information is the sum of the outer products of these, over entries and lists.
    """

    value: float
    by_cells: np.ndarray
    by_unknowns: np.ndarray
    rows: list[tuple[np.ndarray, np.ndarray]]


class Modality(Protocol):
    """A kind of data, shared by all visits that have it."""

    @property
    def name(self) -> str:
        """Prefix of its unknowns."""

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Its unknowns with their priors; short names."""

    def check(self, values: np.ndarray, where: str) -> None:
        """Raise where measured values have no meaning."""

    def loss(self, u: np.ndarray, seen: np.ndarray, p: Mapping[str, np.ndarray]) -> np.ndarray:
        """Negative log likelihoods (draws,) of predictions (draws, n), for values (n,), unknowns (draws,)."""

    def local(self, u: np.ndarray, seen: np.ndarray, p: Mapping[str, float]) -> Local:
        """The same for one prediction (n,), with derivatives."""

    def guess(self, values: np.ndarray) -> np.ndarray:
        """A rough map of cell fractions (z, y, x) behind measured values."""


@dataclass(frozen=True)
class Cells:
    """Cell fractions with independent Gaussian noise of unknown sd.

    Parameters
    ----------
    noise : Prior
        Of one voxel's sd.
    name : str
    """

    noise: Prior = field(default_factory=lambda: LogNormal(0.06, 0.7))
    name: str = "cells"

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """The noise's sd."""
        return (Parameter("noise", "1", self.noise, (1e-5, 2.0), "", "sd of one voxel's cell fraction"),)

    def check(self, values: np.ndarray, where: str) -> None:
        """Refuse values that are no cell fractions."""
        seen = values[np.isfinite(values)]
        if seen.size and (np.median(np.abs(seen)) > 2 or np.abs(seen).max() > 10):
            raise InputError(
                f"{where}: values from {seen.min():.3g} to {seen.max():.3g}; expected cell fractions, 0 to 1 but for "
                "noise. Convert the image (for instance ADC by CellularitySettings) first."
            )

    def loss(self, u: np.ndarray, seen: np.ndarray, p: Mapping[str, np.ndarray]) -> np.ndarray:
        """Negative log likelihoods (draws,)."""
        sd = np.asarray(p["noise"], float)
        return 0.5 * ((u - seen) ** 2).sum(-1) / sd**2 + seen.shape[-1] * (np.log(sd) + LOG_ROOT)

    def local(self, u: np.ndarray, seen: np.ndarray, p: Mapping[str, float]) -> Local:
        """Value, gradient and Fisher information."""
        sd, r = p["noise"], u - seen
        value = 0.5 * float(r @ r) / sd**2 + len(r) * (np.log(sd) + LOG_ROOT)
        zero, one = np.zeros((1, len(r))), np.full((1, len(r)), np.sqrt(2.0) / sd)
        rows = [(np.full(len(r), 1 / sd), zero), (zero[0], one)]
        return Local(float(value), r / sd**2, np.array([len(r) / sd - float(r @ r) / sd**3]), rows)

    def guess(self, values: np.ndarray) -> np.ndarray:
        """The values, 0 where there are none."""
        return np.clip(np.where(np.isfinite(values), values, 0.0), 0.0, 1.0)


@dataclass(frozen=True)
class Outline:
    """Which voxels lie inside an outline: P(inside) = Phi((u - threshold) / edge), voxel by voxel.

    Threshold and softness of the edge are unknown. Outlines of real images (Lipkova et al. 2019, IEEE Trans Med Imaging
    38:1875, doi:10.1109/TMI.2019.2902044) are drawn by hand: neighbouring voxels err together, which `edge` absorbs in
    part and `weight` states.

    Parameters
    ----------
    threshold : Prior
        Cell fraction of the outline.
    edge : Prior
        Sd of the cell fraction at which single voxels are called inside.
    weight : float
        Share of the voxels that count as independent: the log likelihood is multiplied by it.
    name : str
    """

    threshold: Prior = field(default_factory=lambda: LogitNormal(0.25, 0.5))
    edge: Prior = field(default_factory=lambda: LogNormal(0.05, 0.5))
    weight: float = 1.0
    name: str = "outline"

    def __post_init__(self):
        if not 0 < self.weight <= 1:
            raise InputError(f"Outline {self.name}: weight is {self.weight}; expected a share above 0 and at most 1.")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Threshold and edge."""
        return (
            Parameter("threshold", "1", self.threshold, (1e-3, 0.999), "", "cell fraction at the outline"),
            Parameter("edge", "1", self.edge, (1e-3, 1.0), "", "sd of the cell fraction at the outline"),
        )

    def check(self, values: np.ndarray, where: str) -> None:
        """Refuse what is no outline."""
        seen = values[np.isfinite(values)]
        if not np.isin(seen, (0, 1)).all():
            raise InputError(f"{where}: values other than 0 and 1; an outline says inside (1), outside (0) or NaN.")

    def loss(self, u: np.ndarray, seen: np.ndarray, p: Mapping[str, np.ndarray]) -> np.ndarray:
        """Negative log likelihoods (draws,)."""
        edge, threshold = np.asarray(p["edge"], float)[..., None], np.asarray(p["threshold"], float)[..., None]
        return -self.weight * np.asarray(log_ndtr(np.where(seen > 0.5, 1.0, -1.0) * (u - threshold) / edge)).sum(-1)

    def local(self, u: np.ndarray, seen: np.ndarray, p: Mapping[str, float]) -> Local:
        """Value, gradient and Fisher information."""
        edge, sign = p["edge"], np.where(seen > 0.5, 1.0, -1.0)
        q = (u - p["threshold"]) / edge
        inside = np.asarray(log_ndtr(sign * q))
        log_bell = -0.5 * q**2 - LOG_ROOT
        slope = -self.weight * sign * np.exp(log_bell - inside)  # by q
        by_unknowns = np.array([-slope.sum() / edge, -float(slope @ q) / edge])
        # phi² / (Phi (1 - Phi)), which falls to zero on both sides.
        root = np.sqrt(self.weight) * np.exp(log_bell - 0.5 * (np.asarray(log_ndtr(q)) + np.asarray(log_ndtr(-q))))
        rows = [(root / edge, np.stack((-root / edge, -root * q / edge)))]
        return Local(-self.weight * float(inside.sum()), slope / edge, by_unknowns, rows)

    def guess(self, values: np.ndarray) -> np.ndarray:
        """Half inside, nothing outside."""
        return np.where(np.isfinite(values), 0.5 * np.nan_to_num(values), 0.0)


@dataclass(frozen=True)
class Uptake:
    """A signal proportional to the cell fraction with Gaussian noise, as of FET-PET: signal = scale u + noise.

    Lipkova et al. 2019 (doi:10.1109/TMI.2019.2902044) take the signal, scaled to at most 1, so.

    Parameters
    ----------
    scale : Prior
        Signal of a cell fraction of 1.
    noise : Prior
        Sd of one voxel's signal.
    weight : float
        Share of the voxels that count as independent: the log likelihood is multiplied by it.
    name : str
    """

    scale: Prior = field(default_factory=lambda: LogNormal(1.0, 0.2))
    noise: Prior = field(default_factory=lambda: LogNormal(0.1, 0.5))
    weight: float = 1.0
    name: str = "pet"

    def __post_init__(self):
        if not 0 < self.weight <= 1:
            raise InputError(f"Uptake {self.name}: weight is {self.weight}; expected a share above 0 and at most 1.")

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """Scale and noise."""
        return (
            Parameter("scale", "1", self.scale, (1e-3, 1e3), "", "signal of a cell fraction of 1"),
            Parameter("noise", "1", self.noise, (1e-5, 1e3), "", "sd of one voxel's signal"),
        )

    def check(self, values: np.ndarray, where: str) -> None:
        """Refuse infinite values."""
        if np.isinf(values).any():
            raise InputError(f"{where}: infinite values; expected a signal, NaN where nothing was measured.")

    def loss(self, u: np.ndarray, seen: np.ndarray, p: Mapping[str, np.ndarray]) -> np.ndarray:
        """Negative log likelihoods (draws,)."""
        scale, sd = np.asarray(p["scale"], float)[..., None], np.asarray(p["noise"], float)
        each = 0.5 * ((scale * u - seen) ** 2).sum(-1) / sd**2
        return self.weight * (each + seen.shape[-1] * (np.log(sd) + LOG_ROOT))

    def local(self, u: np.ndarray, seen: np.ndarray, p: Mapping[str, float]) -> Local:
        """Value, gradient and Fisher information."""
        scale, sd, root = p["scale"], p["noise"], np.sqrt(self.weight)
        r = scale * u - seen
        value = self.weight * (0.5 * float(r @ r) / sd**2 + len(r) * (np.log(sd) + LOG_ROOT))
        by = self.weight * np.array([float(r @ u) / sd**2, len(r) / sd - float(r @ r) / sd**3])
        zero = np.zeros(len(u))
        rows = [
            (np.full(len(u), root * scale / sd), np.stack((root * u / sd, zero))),
            (zero, np.stack((zero, np.full(len(u), root * np.sqrt(2.0) / sd)))),
        ]
        return Local(float(value), self.weight * scale * r / sd**2, by, rows)

    def guess(self, values: np.ndarray) -> np.ndarray:
        """The signal over its scale."""
        return np.clip(np.where(np.isfinite(values), values, 0.0) / float(self.scale.quantile(0.5)), 0.0, 1.0)


@dataclass(frozen=True, eq=False)
class Observation:
    """One modality at one visit.

    Attributes
    ----------
    day : float
    values : ndarray, shape (z, y, x)
        NaN where nothing was measured.
    modality : Cells, Outline or Uptake
        The same object (or an equal one) at all visits that share its unknowns.
    """

    day: float
    values: np.ndarray
    modality: Modality = field(default_factory=Cells)

    def __post_init__(self):
        object.__setattr__(self, "values", np.asarray(self.values, float))
        where = f"{self.modality.name} of day {self.day:g}"
        if not np.isfinite(self.day):
            raise InputError(f"{where}: expected a finite number of days.")
        if not np.isfinite(self.values).any():
            raise InputError(f"{where}: no value was measured; leave the observation out.")
        self.modality.check(self.values, where)

    @property
    def seen(self) -> np.ndarray:
        """Where something was measured, (z, y, x)."""
        return np.isfinite(self.values)
