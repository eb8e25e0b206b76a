"""T1 from variable flip angles, inversion recovery, or both together.

Acquisitions are objects that know their signal; flip angles are in degrees, times in seconds. Signals are arrays
(voxels, samples), one sample for each acquisition. The forward signals are torch functions, differentiable in R1, S0
and the flip-angle factor B1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from biomodel.errors import InputError
from biomodel.imaging.levenberg import forward_derivative, levenberg_marquardt
from biomodel.imaging.voxelfit import Code, VoxelFit

__all__ = [
    "Acquisition",
    "InversionPrepared",
    "InversionRecovery",
    "SpoiledGradientEcho",
    "fit_t1",
    "inversion_recovery",
    "vfa_linear",
    "vfa_nonlinear",
    "vfa_two_angles",
]

#: Bounds of R1, 1/s: T1 from 10 ms (dense contrast agent) to 20 s.
R1_BOUNDS = (0.05, 100.0)
#: Values of R1 that a search may start from; magnitudes after an inversion have several minima.
COARSE_STARTS, FINE_STARTS = 33, 97
#: By what factor R1 is moved to look beyond the next fold of such a magnitude.
ACROSS = 1.15
#: Bounds of the flip-angle factor where it is fitted.
B1_BOUNDS = (0.3, 2.0)


def _within(value: float | None, low: float, high: float, what: str, unit: str) -> float:
    if value is None or not np.isfinite(value):
        raise InputError(f"{what} is missing (found {value}); give it in {unit}, from the series' header.")
    if not low < value <= high:
        raise InputError(f"{what} is {value:g}; expected more than {low:g} and at most {high:g} {unit}.")
    return float(value)


class Acquisition(Protocol):
    """One image of a T1 measurement."""

    def signal(self, r1: Tensor, s0: Tensor, b1: Tensor) -> Tensor:
        """Signal for R1 (1/s), equilibrium signal and flip-angle factor, of one shape."""
        ...


@dataclass(frozen=True)
class SpoiledGradientEcho:
    """Spoiled gradient echo (SPGR, FLASH, T1-FFE) in the steady state.

    S = S0 sin α (1 - E) / (1 - E cos α), E = exp(-TR R1). Haase et al. 1986, J Magn Reson 67:258. T2* decay is part of
    S0 here; :mod:`biomodel.imaging.concentration` treats the part of it that the agent changes.

    Parameters
    ----------
    flip_angle
        Nominal, degrees.
    tr
        Repetition time, s.
    te
        Echo time, s; used only where T2* effects of the agent are asked for.
    """

    flip_angle: float
    tr: float
    te: float | None = None

    def __post_init__(self) -> None:
        _within(self.flip_angle, 0, 120, "spoiled gradient echo: the flip angle", "degrees")
        _within(self.tr, 0, 1, "spoiled gradient echo: the repetition time TR", "s")
        if self.te is not None:
            _within(self.te, 0, self.tr, "spoiled gradient echo: the echo time TE", "s (and not beyond TR)")

    def signal(self, r1: Tensor, s0: Tensor, b1: Tensor) -> Tensor:
        angle = b1 * np.deg2rad(self.flip_angle)
        lost = -torch.expm1(-self.tr * r1)
        # 1 - E cos α = (1 - E) + E (1 - cos α), without cancellation at small angles.
        return s0 * angle.sin() * lost / (lost + (1 - lost) * 2 * (angle / 2).sin().square())


@dataclass(frozen=True)
class InversionRecovery:
    """Magnitude signal a time TI after an inversion, repeated every TR, read by a 90° pulse.

    S = S0 |1 - 2 exp(-TI R1) + exp(-TR R1)|; without TR full recovery is taken.
    Barral et al. 2010, Magn Reson Med 64:1057, doi:10.1002/mrm.22497.

    Parameters
    ----------
    inversion_time, tr
        s.
    efficiency
        1 of a perfect inversion: the 2 becomes 1 + efficiency.
    """

    inversion_time: float
    tr: float | None = None
    efficiency: float = 1.0

    def __post_init__(self) -> None:
        _within(self.inversion_time, 0, 20, "inversion recovery: the inversion time TI", "s")
        _within(self.efficiency, 0, 1, "inversion recovery: the efficiency", "(a fraction)")
        if self.tr is not None:
            _within(self.tr, self.inversion_time, 60, "inversion recovery: the repetition time TR", "s (and beyond TI)")

    def signal(self, r1: Tensor, s0: Tensor, b1: Tensor) -> Tensor:
        recovered = 1 - (1 + self.efficiency) * torch.exp(-self.inversion_time * r1)
        if self.tr is not None:
            recovered = recovered + self.efficiency * torch.exp(-self.tr * r1)
        return s0 * recovered.abs()


@dataclass(frozen=True)
class InversionPrepared:
    """Inversion-prepared spoiled gradient echo (MP-RAGE, IR-SPGR): a train of pulses after each inversion.

    The train drives magnetisation towards M* = M0 (1 - E)/(1 - E cos b) by the factor E cos b per pulse, E =
    exp(-spacing R1); the cycle inversion - TI - train - delay is taken in its steady state. Deichmann and Haase 1992,
    J Magn Reson 96:608; used with variable flip angles by Deoni 2007, J Magn Reson Imaging 26:1106,
    doi:10.1002/jmri.21130.

    Parameters
    ----------
    inversion_time
        From the inversion to the first pulse of the train, s.
    flip_angle
        Nominal, of the train's pulses, degrees.
    spacing
        Between the pulses, s.
    pulses
        Number in a train.
    delay
        From the end of the train to the next inversion, s.
    centre
        Where in the train the centre of k-space is read, as a part of it (0.5: linear order).
    """

    inversion_time: float
    flip_angle: float
    spacing: float
    pulses: int
    delay: float = 0.0
    centre: float = 0.5

    def __post_init__(self) -> None:
        _within(self.inversion_time, 0, 20, "inversion-prepared: the inversion time TI", "s")
        _within(self.flip_angle, 0, 45, "inversion-prepared: the flip angle of the train", "degrees")
        _within(self.spacing, 0, 1, "inversion-prepared: the spacing of pulses", "s")
        _within(self.pulses, 0, 10_000, "inversion-prepared: the number of pulses", "")
        if not 0 <= self.delay <= 60 or not 0 <= self.centre <= 1:
            raise InputError(
                f"inversion-prepared: delay {self.delay} s and centre {self.centre}; "
                "expected 0 to 60 s and a part from 0 to 1."
            )

    def signal(self, r1: Tensor, s0: Tensor, b1: Tensor) -> Tensor:
        angle = b1 * np.deg2rad(self.flip_angle)
        decay = torch.exp(-self.spacing * r1)
        steady = (1 - decay) / (1 - decay * angle.cos())
        # log(cos) only for angles below 90 degrees: the bound on b1 and the check above see to that.
        keep = torch.exp(self.pulses * (angle.cos().log() - self.spacing * r1))
        before, after = torch.exp(-self.inversion_time * r1), torch.exp(-self.delay * r1)
        # m, ahead of the inversion, repeats: m -> -m -> 1 - (1 + m) before -> train -> delay -> m
        start, slope = steady + (1 - before - steady) * keep, -before * keep
        start, slope = 1 + (start - 1) * after, slope * after
        first = 1 - (1 + start / (1 - slope)) * before
        centre = torch.exp(self.centre * self.pulses * (angle.cos().log() - self.spacing * r1))
        return s0 * angle.sin() * (steady + (first - steady) * centre).abs()


def _prepare(
    signal: np.ndarray, samples: int, b1: np.ndarray | float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Signal (v, n), B1 (v,) and codes."""
    data = np.asarray(signal, dtype=float)
    if data.ndim != 2 or data.shape[1] != samples:
        raise InputError(
            f"T1: signal of shape {data.shape}; expected (voxels, {samples}), one sample for each acquisition."
        )
    factor = np.broadcast_to(np.asarray(1.0 if b1 is None else b1, dtype=float), (len(data),)).copy()
    code = np.full(len(data), Code.FITTED, dtype=np.uint8)
    code[(data <= 0).any(1)] = Code.NO_SIGNAL
    code[~(np.isfinite(data).all(1) & np.isfinite(factor) & (factor > 0))] = Code.NOT_FINITE
    return data, factor, code


def _spread(
    names: tuple[str, ...], units: tuple[str, ...], values: np.ndarray, normal: np.ndarray, rss: np.ndarray,
    code: np.ndarray, samples: int, noise: float | np.ndarray | None,
) -> VoxelFit:  # fmt: skip
    """Covariance from JᵀJ and noise, NaN where there is no value."""
    p = len(names)
    freedom = samples - p
    if noise is not None:
        variance = np.broadcast_to(np.square(np.asarray(noise, dtype=float)), rss.shape)
    else:
        variance = rss / freedom if freedom > 0 else np.full_like(rss, np.nan)
    root = np.sqrt(np.maximum(np.einsum("vii->vi", normal), np.finfo(float).tiny))
    scaled = normal / (root[:, :, None] * root[:, None, :])
    sound = np.isfinite(scaled).all((1, 2))
    sound[sound] = np.linalg.cond(scaled[sound]) < 1e14
    covariance = np.full_like(normal, np.nan)
    covariance[sound] = np.linalg.inv(scaled[sound]) / (root[sound, :, None] * root[sound, None, :])
    covariance *= variance[:, None, None]
    bad = ~np.isin(code, (Code.FITTED, Code.AT_BOUND, Code.NOT_CONVERGED))
    values, rss = values.copy(), rss.copy()
    values[bad], covariance[bad], rss[bad] = np.nan, np.nan, np.nan
    return VoxelFit(names, units, values, covariance, rss, code, samples, noise is not None)


def fit_t1(
    signal: np.ndarray,
    acquisitions: Sequence[Acquisition],
    *,
    b1: np.ndarray | float | None = None,
    fit_b1: bool = False,
    noise: float | np.ndarray | None = None,
) -> VoxelFit:
    """T1 and S0 (and the flip-angle factor) by nonlinear least squares on the signals themselves.

    Parameters
    ----------
    signal : ndarray, shape (voxels, acquisitions)
        Magnitudes, one for each acquisition and on one scale.
    acquisitions
        Any mixture. Variable flip angles alone cannot tell B1 from T1; with at least one inversion-prepared image
        both can be fitted (DESPOT1-HIFI, Deoni 2007, doi:10.1002/jmri.21130).
    b1 : ndarray, shape (voxels,), or float, optional
        True flip angle over nominal; 1 by default.
    fit_b1
        Fit the factor instead.
    noise
        Standard deviation of the signal, where it is known; from the residuals otherwise.

    Returns
    -------
    VoxelFit
        T1 (s), S0 (the signal's unit) and, if fitted, B1.

    Raises
    ------
    InputError
        If there are fewer acquisitions than parameters, or arrays of another shape.
    """
    p = 3 if fit_b1 else 2
    if len(acquisitions) < p:
        raise InputError(f"T1: {len(acquisitions)} acquisitions for {p} parameters; expected at least {p}.")
    if len(set(acquisitions)) < p:
        raise InputError("T1: acquisitions repeat each other; expected as many different ones as there are parameters.")
    if fit_b1 and all(isinstance(a, SpoiledGradientEcho) for a in acquisitions):
        raise InputError(
            "T1: B1 cannot be told from T1 by flip angles alone; give a B1 map or an inversion-prepared image."
        )
    data, factor, code = _prepare(signal, len(acquisitions), b1)
    fitted = np.flatnonzero(code == Code.FITTED)
    values = np.full((len(data), p), np.nan)
    normal, rss = np.full((len(data), p, p), np.nan), np.full(len(data), np.nan)
    # Voxels in blocks: derivatives and starting curves of all at once would need many copies of the data.
    for block in np.array_split(fitted, max(1, -(-len(fitted) // 50_000))) if len(fitted) else ():
        y, given = torch.as_tensor(data[block]), torch.as_tensor(factor[block])
        size = y.abs().amax(1, keepdim=True)
        y = y / size

        def model(theta: Tensor, rows: Tensor, given: Tensor = given) -> Tensor:
            angle = theta[:, 2] if fit_b1 else given[rows]
            return torch.stack([a.signal(theta[:, 0], theta[:, 1], angle) for a in acquisitions], 1)

        folded = any(not isinstance(a, SpoiledGradientEcho) for a in acquisitions)
        start = _start(model, y, fit_b1, FINE_STARTS if folded and not fit_b1 else COARSE_STARTS)
        lower = torch.tensor([R1_BOUNDS[0], 0.0, B1_BOUNDS[0]][:p], dtype=torch.float64)
        upper = torch.tensor([R1_BOUNDS[1], 1e9, B1_BOUNDS[1]][:p], dtype=torch.float64)
        found = levenberg_marquardt(model, y, start, lower, upper)
        # A magnitude folds where a sample passes through zero, and on either side of the fold there may be a minimum.
        for way in (ACROSS, 1 / ACROSS) if folded else ():
            beyond = start.clone()
            beyond[:, 0] = found.values[:, 0] * way
            found = found.better(levenberg_marquardt(model, y, torch.clamp(beyond, lower, upper), lower, upper))
        rate, scale = found.values[:, 0].numpy(), size[:, 0].numpy()
        theta = found.values.numpy().copy()
        theta[:, 0], theta[:, 1] = 1 / rate, theta[:, 1] * scale
        values[block] = theta
        # dR1/dT1 = -R1², and S0 and the signal share a scale.
        chain = np.ones((len(block), p))
        chain[:, 0], chain[:, 1] = -(rate**2), 1 / scale
        matrix = found.normal.numpy() * chain[:, :, None] * chain[:, None, :] * scale[:, None, None] ** 2
        normal[block], rss[block] = matrix, found.rss.numpy() * scale**2
        code[block[~found.converged.numpy()]] = Code.NOT_CONVERGED
        code[block[found.at_bound.numpy()]] = Code.AT_BOUND
    names, units = ("T1", "S0", "B1")[:p], ("s", "1", "1")[:p]
    return _spread(names, units, values, normal, rss, code, len(acquisitions), noise)


def _start(model: Callable[[Tensor, Tensor], Tensor], data: Tensor, fit_b1: bool, count: int) -> Tensor:
    """Best of a grid of R1 (and B1), each with its best S0."""
    v = len(data)
    rows = torch.arange(v)
    gain = torch.full((v,), -1.0, dtype=data.dtype)
    best = torch.ones(v, 3 if fit_b1 else 2, dtype=data.dtype)
    for factor in np.linspace(0.6, 1.4, 9) if fit_b1 else (1.0,):
        for rate in np.geomspace(0.1, 60, count):
            theta = torch.tensor([rate, 1.0, factor][: best.shape[1]], dtype=data.dtype).expand(v, -1)
            curve = model(theta, rows)
            along, length = (curve * data).sum(1), curve.square().sum(1).clamp(min=1e-30)
            here = along.clamp(min=0).square() / length
            better = here > gain
            gain = torch.where(better, here, gain)
            found = theta.clone()
            found[:, 1] = along / length
            best = torch.where(better[:, None], found, best)
    return best


def _angles(flip_angles: Sequence[float] | np.ndarray | None, tr: float | None) -> tuple[SpoiledGradientEcho, ...]:
    if flip_angles is None or len(flip_angles) == 0:
        raise InputError("T1: flip angles are missing; give one for each image, in degrees, from the series' header.")
    if len(np.unique(np.asarray(flip_angles, dtype=float))) < 2:
        raise InputError("T1: all flip angles are the same; expected at least two different ones, in degrees.")
    if tr is None:
        raise InputError("T1: the repetition time TR is missing; give it in s, from the series' header.")
    return tuple(SpoiledGradientEcho(float(a), float(tr)) for a in flip_angles)


def vfa_nonlinear(
    signal: np.ndarray,
    flip_angles: Sequence[float] | np.ndarray,
    tr: float,
    *,
    b1: np.ndarray | float | None = None,
    noise: float | np.ndarray | None = None,
) -> VoxelFit:
    """T1 and S0 from spoiled gradient echoes of several flip angles (degrees), by :func:`fit_t1`."""
    return fit_t1(signal, _angles(flip_angles, tr), b1=b1, noise=noise)


def vfa_linear(
    signal: np.ndarray,
    flip_angles: Sequence[float] | np.ndarray,
    tr: float,
    *,
    b1: np.ndarray | float | None = None,
    noise: float | np.ndarray | None = None,
) -> VoxelFit:
    """T1 and S0 by a straight line through S/sin α against S/tan α: its slope is exp(-TR/T1).

    Fast, and biased where noise is large, since both axes carry it. Gupta 1977, J Magn Reson 25:231; Deoni, Rutt and
    Peters 2003, Magn Reson Med 49:515, doi:10.1002/mrm.10407. Parameters as in :func:`vfa_nonlinear`. A voxel whose
    slope no T1 from 10 ms to 20 s gives is coded SATURATED: beyond what the signal model can reach.
    """
    acquisitions = _angles(flip_angles, tr)
    data, factor, code = _prepare(signal, len(acquisitions), b1)
    angle = np.deg2rad(np.asarray(flip_angles, dtype=float))[None] * factor[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        x, y = data / np.tan(angle), data / np.sin(angle)
        centred = x - x.mean(1, keepdims=True)
        slope = (centred * y).sum(1) / (centred**2).sum(1)
        level = y.mean(1) - slope * x.mean(1)
        t1 = -tr / np.log(slope)
        s0 = level / (1 - slope)
    reachable = (slope > 0) & (slope < 1) & (t1 >= 1 / R1_BOUNDS[1]) & (t1 <= 1 / R1_BOUNDS[0])
    code[(code == Code.FITTED) & ~reachable] = Code.SATURATED
    ok = code == Code.FITTED
    values = np.full((len(data), 2), np.nan)
    values[ok] = np.stack([t1[ok], s0[ok]], 1)
    normal, rss = np.full((len(data), 2, 2), np.nan), np.full(len(data), np.nan)
    if ok.any():
        normal[ok], rss[ok] = _at(acquisitions, data[ok], factor[ok], values[ok])
    return _spread(("T1", "S0"), ("s", "1"), values, normal, rss, code, len(acquisitions), noise)


def _at(
    acquisitions: Sequence[Acquisition], data: np.ndarray, factor: np.ndarray, values: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """JᵀJ in (T1, S0) and rss of given values."""
    t1, s0, b1 = torch.as_tensor(values[:, 0]), torch.as_tensor(values[:, 1]), torch.as_tensor(factor)

    def model(t: Tensor) -> Tensor:
        return torch.stack([a.signal(1 / t, s0, b1) for a in acquisitions], 1)

    found, by_t1 = forward_derivative(model, t1, torch.ones_like(t1))
    by_s0 = found / s0[:, None]  # the signal is proportional to S0
    jacobian = torch.stack([by_t1, by_s0], 2)
    normal = torch.einsum("vnp,vnq->vpq", jacobian, jacobian)
    return normal.numpy(), (torch.as_tensor(data) - found).square().sum(1).numpy()


def vfa_two_angles(
    signal: np.ndarray,
    flip_angles: Sequence[float] | np.ndarray,
    tr: float,
    *,
    b1: np.ndarray | float | None = None,
    noise: float | np.ndarray | None = None,
) -> VoxelFit:
    """T1 and S0 from exactly two flip angles, in closed form: two equations, two unknowns.

    Nothing is left to estimate the noise from: errors are NaN unless `noise` is given. Parameters as in
    :func:`vfa_nonlinear`.
    """
    if flip_angles is not None and len(flip_angles) != 2:
        raise InputError(f"T1: {len(flip_angles)} flip angles; expected two. Use vfa_nonlinear for more.")
    return vfa_linear(signal, flip_angles, tr, b1=b1, noise=noise)


def inversion_recovery(
    signal: np.ndarray,
    inversion_times: Sequence[float] | np.ndarray,
    *,
    tr: float | None = None,
    efficiency: float = 1.0,
    noise: float | np.ndarray | None = None,
) -> VoxelFit:
    """T1 and S0 from magnitude images at several inversion times (s), by :func:`fit_t1`."""
    if inversion_times is None or len(inversion_times) == 0:
        raise InputError("T1: inversion times are missing; give one for each image, in s, from the series' header.")
    return fit_t1(signal, [InversionRecovery(float(t), tr, efficiency) for t in inversion_times], noise=noise)
