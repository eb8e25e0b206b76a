"""Fits of tracer-kinetic models to concentrations, for many voxels at once.

Models of one exponential with a shared input go through :mod:`biomodel.imaging.dce.kernels`; the others, and whatever
has a delay or an input of its own for each voxel, through :mod:`biomodel.imaging.levenberg`. Both take the same
least squares with the same exact convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.special import fdtri
from torch import Tensor

from biomodel.errors import InputError
from biomodel.imaging.aif import InputFunction, check_times
from biomodel.imaging.dce.kernels import basis, search
from biomodel.imaging.dce.models import MINUTE, Model
from biomodel.imaging.levenberg import levenberg_marquardt
from biomodel.imaging.voxelfit import VALID, Code, VoxelFit

__all__ = ["choose", "fit", "fit_volume"]

#: Rates that are searched, 1/min: slower ones look like uptake without return, faster ones like plasma.
RATES = (1e-3, 60.0)
GRID = 40
#: A voxel enhances if the model explains its curve better than nothing would by an F test of this level.
LEVEL = 0.01
#: Voxels that are worked on at a time.
BLOCK = 4096


def fit(
    concentrations: np.ndarray,
    times: np.ndarray,
    aif: InputFunction,
    model: Model,
    *,
    delay: tuple[float, float] | None = None,
    noise: float | np.ndarray | None = None,
    code: np.ndarray | None = None,
) -> VoxelFit:
    """Least-squares fit of a model between its bounds.

    Parameters
    ----------
    concentrations : ndarray, shape (voxels, n)
        Concentration in tissue, mM.
    times : ndarray, shape (n,)
        s; steps may differ.
    aif
        Plasma concentration, shared or one for each voxel, on the same clock. Its times need not be those of the
        tissue.
    model
        As ``ExtendedTofts()``.
    delay : (float, float), optional
        Bounds of a bolus delay from the input to the voxel, s, which is then fitted as the last parameter, "delay".
    noise
        Standard deviation of the concentrations, where it is known: one value, or one for each voxel. From the
        residuals otherwise.
    code : ndarray of uint8, shape (voxels,), optional
        Reasons from steps before (:attr:`biomodel.imaging.concentration.Concentration.code`); voxels other than FITTED
        are left out and keep theirs.

    Returns
    -------
    VoxelFit
        Parameters in the model's order. A voxel is NOT_FINITE for a curve that is not, NO_ENHANCEMENT if the curve is
        not told from zero (F test), AT_BOUND if a parameter ended on a bound.

    Raises
    ------
    InputError
        If there are too few samples, arrays do not fit, or the bolus lies outside of the series.
    """
    data = np.asarray(concentrations)
    if data.ndim != 2:
        raise InputError(f"DCE fit: concentrations of shape {data.shape}; expected (voxels, samples).")
    t = check_times(times, data.shape[1], "DCE fit")
    names, units = model.names, model.units
    if delay is not None:
        if not (np.isfinite(delay).all() and delay[0] < delay[1]):
            raise InputError(
                f"DCE fit: bounds of the delay {delay}; expected two finite numbers of s, the lower first."
            )
        names, units = (*names, "delay"), (*units, "s")
    p, v, n = len(names), len(data), data.shape[1]
    if n <= p:
        raise InputError(f"DCE fit: {n} samples for {p} parameters of {type(model).__name__}; expected more samples.")
    _check_input(aif, t, v, delay)
    reason = np.full(v, Code.FITTED, dtype=np.uint8) if code is None else np.array(code, dtype=np.uint8)
    if reason.shape != (v,):
        raise InputError(f"DCE fit: codes of shape {reason.shape} for {v} voxels.")
    known = None if noise is None else np.broadcast_to(np.asarray(noise, dtype=float), (v,))
    if known is not None and not (known[reason == Code.FITTED] > 0).all():
        raise InputError("DCE fit: the noise must be positive; leave it out to take it from the residuals.")

    values, covariance = np.full((v, p), np.nan), np.full((v, p, p), np.nan)
    rss = np.full(v, np.nan)
    solve: _Projection | _General
    if model.one_rate is not None and aif.shared and delay is None:
        solve = _Projection(t, aif, model)
    else:
        solve = _General(t, aif, model, delay)
    for begin in range(0, v, BLOCK):
        rows = np.arange(begin, min(begin + BLOCK, v))
        rows = rows[reason[rows] == Code.FITTED]
        block = np.ascontiguousarray(data[rows], dtype=float)
        finite = np.isfinite(block.sum(1))
        reason[rows[~finite]] = Code.NOT_FINITE
        rows, block = rows[finite], block[finite]
        if not len(rows):
            continue
        found, normal, residual, state = solve(block, rows)
        # Better than a curve of zeros?
        explained = np.einsum("vn,vn->v", block, block) - residual
        enhances = explained * (n - p) > float(fdtri(p, n - p, 1 - LEVEL)) * p * residual
        state = np.where(enhances, state, Code.NO_ENHANCEMENT)
        good = np.isin(state, VALID)
        variance = residual / (n - p) if known is None else known[rows] ** 2
        values[rows[good]] = found[good]
        covariance[rows[good]] = _inverse(normal[good]) * variance[good, None, None]
        rss[rows[good]], reason[rows] = residual[good], state
    return VoxelFit(names, units, values, covariance, rss, reason, n, noise is not None)


def _check_input(aif: InputFunction, times: np.ndarray, voxels: int, delay: tuple[float, float] | None) -> None:
    if not aif.shared and len(aif.plasma) != voxels:
        raise InputError(f"DCE fit: {len(aif.plasma)} arterial inputs for {voxels} voxels.")
    early, late = (0.0, 0.0) if delay is None else delay
    seen = np.atleast_2d(aif.plasma)[:, (aif.times + early >= times[0]) & (aif.times + early <= times[-1])]
    # The peak decides: a series that ends before it, or starts after it, cannot hold the bolus.
    top = np.atleast_2d(aif.plasma).max(1)
    if seen.shape[1] == 0 or (seen.max(1) < 0.1 * top).any():
        raise InputError(
            f"DCE fit: the bolus of the arterial input lies outside of the series ({times[0]:g} to {times[-1]:g} s). "
            "Both must be on one clock, in s."
        )
    if aif.times[-1] + late < 0.5 * (times[0] + times[-1]):
        raise InputError(f"DCE fit: the arterial input ends at {aif.times[-1]:g} s, the series at {times[-1]:g} s.")


def _inverse(normal: np.ndarray) -> np.ndarray:
    """Inverse of (v, p, p) by scaling to a unit diagonal; NaN where singular."""
    root = np.sqrt(np.maximum(np.einsum("vii->vi", normal), np.finfo(float).tiny))
    outer = root[:, :, None] * root[:, None, :]
    scaled = normal / outer
    p = normal.shape[1]
    if p == 2:
        a, b = scaled[:, 0, 0], scaled[:, 0, 1]
        det = a * scaled[:, 1, 1] - b * b
        adjugate = np.stack([np.stack([scaled[:, 1, 1], -b], 1), np.stack([-b, a], 1)], 1)
    elif p == 3:
        adjugate = np.empty_like(scaled)
        for i in range(3):
            for j in range(3):
                r, s = [k for k in range(3) if k != j], [k for k in range(3) if k != i]
                minor = scaled[:, r[0], s[0]] * scaled[:, r[1], s[1]] - scaled[:, r[0], s[1]] * scaled[:, r[1], s[0]]
                adjugate[:, i, j] = (-1) ** (i + j) * minor
        det = np.einsum("vj,vj->v", scaled[:, 0], adjugate[:, :, 0])
    else:
        det = np.linalg.det(scaled)
        sound = det > 1e-14
        adjugate = np.full_like(scaled, np.nan)
        adjugate[sound] = np.linalg.inv(scaled[sound]) * det[sound, None, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((det > 1e-14)[:, None, None], adjugate / det[:, None, None], np.nan) / outer


class _Projection:
    """Models of one exponential with a shared input."""

    def __init__(self, times: np.ndarray, aif: InputFunction, model: Model) -> None:
        assert model.one_rate is not None
        self.free_rate, self.has_plasma = model.one_rate
        bound = dict(zip(model.names, model.upper, strict=True))
        low = dict(zip(model.names, model.lower, strict=True))
        if any(low[name] > 0 for name in model.names if name != "ve"):
            raise InputError(
                f"{type(model).__name__}: lower bounds other than 0 (ve's aside) need a delay or a general model."
            )
        self.kmax = next(bound[n] for n in model.names if n in ("Ktrans", "PS")) / MINUTE
        self.vemax, self.vmax = bound.get("ve", 1.0), bound.get("vp", 0.0)
        # The input is linear between its knots; adding the sample times as knots changes nothing.
        same = times.shape == aif.times.shape and bool((times == aif.times).all())
        self.knots = times if same else np.union1d(aif.times, times)
        self.pick = np.empty(0, dtype=np.int64) if same else np.searchsorted(self.knots, times)
        self.input = aif.plasma if same else aif.at(self.knots)
        self.steps = np.diff(self.knots)
        self.steps[np.abs(self.steps - self.steps[0]) < 1e-9 * self.steps[0]] = self.steps[0]
        self.grid = np.geomspace(*RATES, GRID) / MINUTE if self.free_rate else np.zeros(1)
        curves, slope = np.empty((len(self.grid), len(self.knots))), np.empty(len(self.knots))
        for k, row in zip(self.grid, curves, strict=True):
            basis(k, self.steps, self.input, row, slope)
        rows = slice(None) if same else self.pick
        self.curves, self.plasma = np.ascontiguousarray(curves[:, rows]), np.ascontiguousarray(self.input[rows])

    def __call__(self, data: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        v = len(data)
        values, normal = np.empty((v, 3)), np.empty((v, 3, 3))
        rss, state = np.empty(v), np.empty(v, dtype=np.uint8)
        search(0, v, data, data @ self.curves.T, data @ self.plasma, self.grid,
               np.einsum("gn,gn->g", self.curves, self.curves), self.curves @ self.plasma,
               float(self.plasma @ self.plasma), self.steps, self.input, self.pick, self.kmax, self.vemax, self.vmax,
               self.free_rate, values, normal, rss, state)  # fmt: skip
        keep = [0] + [1] * self.free_rate + [2] * self.has_plasma
        if not self.has_plasma:
            keep = [0, 1]
        values, normal = values[:, keep], normal[:, keep][:, :, keep]
        # K is per second inside, Ktrans and PS are per minute.
        values[:, 0] *= MINUTE
        normal[:, 0] /= MINUTE
        normal[:, :, 0] /= MINUTE
        return values, normal, rss, state


class _General:
    """Any model, with a delay or inputs of their own."""

    def __init__(self, times: np.ndarray, aif: InputFunction, model: Model, delay: tuple[float, float] | None) -> None:
        self.times, self.knots = torch.as_tensor(times), torch.as_tensor(aif.times)
        self.plasma, self.model, self.delay = torch.as_tensor(aif.plasma), model, delay
        bounds = ((), ()) if delay is None else ((delay[0],), (delay[1],))
        self.lower = torch.tensor([*model.lower, *bounds[0]], dtype=torch.float64)
        self.upper = torch.tensor([*model.upper, *bounds[1]], dtype=torch.float64)
        shapes = model.shapes
        if delay is not None:
            steps = np.linspace(*delay, 9)
            shapes = np.column_stack([np.repeat(shapes, len(steps), 0), np.tile(steps, len(shapes))])
        self.shapes = torch.as_tensor(shapes)
        # A shared input gives curves of the shapes once for all voxels.
        self.curves = self._model(self.shapes, self.plasma) if aif.shared else None

    def _model(self, theta: Tensor, plasma: Tensor) -> Tensor:
        if self.delay is None:
            return self.model.concentration(theta, self.times, self.knots, plasma)
        return self.model.concentration(theta[:, :-1], self.times, self.knots, plasma, theta[:, -1])

    def _start(self, data: Tensor, plasma: Tensor) -> Tensor:
        """The shape that explains most of each curve, at the size that does."""
        best = torch.zeros(len(data), dtype=torch.long)
        if self.curves is not None:
            along = data @ self.curves.T
            length = self.curves.square().sum(1).clamp(min=1e-30)
            best = (along.clamp(min=0).square() / length).argmax(1)
            size = along.gather(1, best[:, None])[:, 0] / length[best]
        else:
            gain, size = torch.full((len(data),), -1.0, dtype=data.dtype), torch.zeros(len(data), dtype=data.dtype)
            # Every shape costs a pass over all voxels here, so only some are tried.
            for i in np.linspace(0, len(self.shapes) - 1, min(len(self.shapes), 60)).astype(int):
                curve = self._model(self.shapes[i].expand(len(data), -1), plasma)
                along, length = (curve * data).sum(1), curve.square().sum(1).clamp(min=1e-30)
                here = along.clamp(min=0).square() / length
                better = here > gain
                gain, size = torch.where(better, here, gain), torch.where(better, along / length, size)
                best[better] = int(i)
        start = self.shapes[best].clone()
        amounts = start if self.delay is None else start[:, :-1]
        amounts *= size.clamp(min=1e-6)[:, None]
        return start

    def __call__(self, data: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        y = torch.as_tensor(data)
        plasma = self.plasma if self.plasma.ndim == 1 else self.plasma[torch.as_tensor(rows)]

        def function(theta: Tensor, which: Tensor) -> Tensor:
            return self._model(theta, plasma if plasma.ndim == 1 else plasma[which])

        with torch.no_grad():
            start = self._start(y, plasma)
        found = levenberg_marquardt(function, y, start, self.lower, self.upper)
        state = np.full(len(data), Code.FITTED, dtype=np.uint8)
        state[~found.converged.numpy()] = Code.NOT_CONVERGED
        state[found.at_bound.numpy()] = Code.AT_BOUND
        return found.values.numpy(), found.normal.numpy(), found.rss.numpy(), state


def choose(fits: Sequence[VoxelFit]) -> tuple[np.ndarray, np.ndarray]:
    """Best of several models in each voxel by Akaike's criterion with the correction for few samples.

    Parameters
    ----------
    fits
        Of different models to the same data.

    Returns
    -------
    best : ndarray of int, shape (voxels,)
        Position in `fits`; -1 where none has a value.
    weights : ndarray, shape (voxels, models)
        Akaike weights (Burnham and Anderson 2002, Model Selection and Multimodel Inference): 0 for a model without a
        value, NaN where none has one.
    """
    if len({(f.samples, len(f.code)) for f in fits}) != 1:
        raise InputError("model choice: the fits differ in samples or voxels; expected fits of the same data.")
    scores = np.stack([np.where(np.isin(f.code, VALID), f.aic, np.inf) for f in fits], 1)
    # Several models may reproduce data without noise exactly: their criterion is then minus infinity.
    scores = np.maximum(np.nan_to_num(scores, nan=np.inf, posinf=np.inf, neginf=-1e300), -1e300)
    none = ~np.isfinite(scores).any(1)
    least = np.where(none, 0.0, scores.min(1))
    with np.errstate(over="ignore", under="ignore"):
        weights = np.exp(-0.5 * (scores - least[:, None]))
        weights /= np.where(none, 1.0, weights.sum(1))[:, None]
    weights[none] = np.nan
    return np.where(none, -1, scores.argmin(1)), weights


def fit_volume(
    signal: np.ndarray,
    times: np.ndarray,
    aif: InputFunction,
    model: Model,
    *,
    convert: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]] | None = None,
    mask: np.ndarray | None = None,
    delay: tuple[float, float] | None = None,
    block: int = 65_536,
) -> VoxelFit:
    """Fit a series of volumes in blocks of voxels, so that only a block is held as concentrations at a time.

    Parameters
    ----------
    signal : ndarray, shape (n, z, y, x)
        The series; may be a memory-mapped file, of any number type.
    times, aif, model, delay
        As for :func:`fit`; the input is shared.
    convert : callable, optional
        ``convert(signal, voxels)`` takes signals (v, n) of the voxels with these flat indices to concentrations (v, n)
        and codes (v,), for instance through :func:`biomodel.imaging.concentration.concentration` with the T1 map's
        values there. Without it the series holds concentrations already.
    mask : ndarray of bool, shape (z, y, x), optional
        Voxels to fit; the others are OUTSIDE.
    block
        Voxels at a time.

    Returns
    -------
    VoxelFit
        Of z y x voxels in flat (C) order.
    """
    if signal.ndim != 4:
        raise InputError(f"DCE series of shape {signal.shape}; expected (samples, z, y, x).")
    if mask is not None and mask.shape != signal.shape[1:]:
        raise InputError(f"DCE series: mask of shape {mask.shape} for volumes of {signal.shape[1:]}.")
    if not aif.shared:
        raise InputError("DCE series: blocks need one shared arterial input.")
    frames = signal.reshape(len(signal), -1)
    inside = np.arange(frames.shape[1]) if mask is None else np.flatnonzero(mask)
    parts = []
    # Blocks are runs of the flat volume, so that a file is read in order.
    for voxels in np.array_split(inside, max(1, -(-len(inside) // block))):
        low, high = (int(voxels[0]), int(voxels[-1]) + 1) if len(voxels) else (0, 0)
        data = np.ascontiguousarray(np.asarray(frames[:, low:high]).T[voxels - low])
        code = None
        if convert is not None:
            data, code = convert(data, voxels)
        parts.append(fit(data, times, aif, model, delay=delay, code=code))
    total, first = frames.shape[1], parts[0]
    p = len(first.names)
    values, covariance = np.full((total, p), np.nan), np.full((total, p, p), np.nan)
    rss, reason = np.full(total, np.nan), np.full(total, Code.OUTSIDE, dtype=np.uint8)
    at = 0
    for part in parts:
        rows = inside[at : at + len(part.code)]
        values[rows], covariance[rows], rss[rows], reason[rows] = part.values, part.covariance, part.rss, part.code
        at += len(rows)
    return VoxelFit(first.names, first.units, values, covariance, rss, reason, first.samples)
