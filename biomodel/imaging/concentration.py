"""Signal of a spoiled gradient echo and concentration of a contrast agent, into each other.

R1 = 1/T10 + r1 C. The inversion is exact: no small-angle or linear approximation. The agent's T2* effect is neglected
unless the relaxivity carries r2* and the acquisition its echo time; at a TE of 2 ms, 5 mM and an r2* of 5 L/(mmol s) it
lowers the signal by 5 %, so it matters in arteries more than in tissue. Water exchange is taken as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biomodel.errors import InputError
from biomodel.imaging.t1 import SpoiledGradientEcho
from biomodel.imaging.voxelfit import Code

__all__ = ["Concentration", "Relaxivity", "concentration", "relaxivity", "to_concentration", "to_signal"]

_ROHRER = "Rohrer et al. 2005, Invest Radiol 40:715, doi:10.1097/01.rli.0000184756.66360.d3 (plasma, 37 °C)"

#: r1 in plasma at 37 °C, L/(mmol s), by agent and field (T): Rohrer et al. 2005. Szomolanyi et al. 2019 (Invest Radiol
#: 54:559, doi:10.1097/RLI.0000000000000577) found 4.78 and 4.97 for gadobutrol, 3.80 and 3.28 for gadoteridol, 3.32 and
#: 3.00 for gadoterate at 1.5 and 3 T in plasma, and less in whole blood (3.47, 2.61, 2.72 at 3 T).
_R1 = {
    "gadopentetate": {0.47: 3.8, 1.5: 4.1, 3.0: 3.7, 4.7: 3.8},
    "gadobutrol": {0.47: 6.1, 1.5: 5.2, 3.0: 5.0, 4.7: 4.7},
    "gadoteridol": {0.47: 4.8, 1.5: 4.1, 3.0: 3.7, 4.7: 3.7},
    "gadobenate": {0.47: 9.2, 1.5: 6.3, 3.0: 5.5, 4.7: 5.2},
    "gadoterate": {0.47: 4.3, 1.5: 3.6, 3.0: 3.5, 4.7: 3.3},
    "gadodiamide": {0.47: 4.4, 1.5: 4.3, 3.0: 4.0, 4.7: 3.9},
    "gadoversetamide": {0.47: 5.7, 1.5: 4.7, 3.0: 4.5, 4.7: 4.4},
}


@dataclass(frozen=True)
class Relaxivity:
    """How much a contrast agent speeds up relaxation.

    Parameters
    ----------
    r1
        L/(mmol s), that is 1/s per mM.
    r2star
        The same for T2*; None neglects the agent's T2* effect.
    source
        Where the values come from.
    """

    r1: float
    r2star: float | None = None
    source: str = "given"

    def __post_init__(self) -> None:
        if not (np.isfinite(self.r1) and 0 < self.r1 < 100):
            raise InputError(f"relaxivity: r1 is {self.r1}; expected between 0 and 100 L/(mmol s).")
        if self.r2star is not None and not 0 <= self.r2star < 1000:
            raise InputError(f"relaxivity: r2* is {self.r2star}; expected between 0 and 1000 L/(mmol s).")


def relaxivity(agent: str, field_strength: float) -> Relaxivity:
    """r1 of an agent (generic name) at a field strength (T; within 5 % of one that was measured).

    Raises
    ------
    InputError
        If the agent or the field is not in the table; values between measured fields are not made up.
    """
    fields = _R1.get(agent.strip().lower())
    if fields is None:
        raise InputError(f"relaxivity: no agent {agent!r}; there are {', '.join(_R1)}. Or give Relaxivity(r1=...).")
    for field, value in fields.items():
        if abs(field_strength - field) <= 0.05 * field:
            return Relaxivity(value, source=_ROHRER)
    known = ", ".join(f"{f:g}" for f in fields)
    raise InputError(
        f"relaxivity: {agent} at {field_strength:g} T is not in the table ({known} T). Give Relaxivity(r1=...)."
    )


def _check_t2star(acquisition: SpoiledGradientEcho, agent: Relaxivity) -> float:
    """TE r2*, 1/mM; 0 where neglected."""
    if agent.r2star is None or agent.r2star == 0:
        return 0.0
    if acquisition.te is None:
        raise InputError("concentration: r2* is given but the echo time TE is missing; give it in s, or leave r2* out.")
    return acquisition.te * agent.r2star


def to_signal(
    values: Tensor,
    t10: Tensor,
    s0: Tensor,
    acquisition: SpoiledGradientEcho,
    agent: Relaxivity,
    *,
    b1: Tensor | None = None,
) -> Tensor:
    """Signal (voxels, n) of concentrations (voxels, n) in mM; differentiable.

    Parameters
    ----------
    t10, s0 : Tensor, shape (voxels,)
        T1 before contrast, s, and equilibrium signal (with the tissue's own T2* decay).
    b1 : Tensor, shape (voxels,), optional
        Flip-angle factor.
    """
    factor = torch.ones_like(t10) if b1 is None else b1
    signal = acquisition.signal(1 / t10[:, None] + agent.r1 * values, s0[:, None], factor[:, None])
    weight = _check_t2star(acquisition, agent)
    return signal if weight == 0 else signal * torch.exp(-weight * values)


def to_concentration(
    signal: Tensor,
    before: Tensor,
    t10: Tensor,
    acquisition: SpoiledGradientEcho,
    agent: Relaxivity,
    *,
    b1: Tensor | None = None,
) -> Tensor:
    """Concentration (voxels, n), mM, of a signal (voxels, n); differentiable; NaN beyond what the sequence can give.

    Parameters
    ----------
    before : Tensor, shape (voxels,)
        Signal before contrast.
    t10 : Tensor, shape (voxels,)
        s.

    Notes
    -----
    With S/S0 = s sin α, E = (1 - s)/(1 - s cos α). With T2*, the equation for C is solved by Newton's method on the
    branch that starts at no contrast, where signal still grows with concentration.
    """
    angle = (torch.ones_like(t10) if b1 is None else b1) * np.deg2rad(acquisition.flip_angle)
    cosine = angle.cos()[:, None]
    unit = acquisition.signal(1 / t10, torch.ones_like(t10), torch.ones_like(t10) if b1 is None else b1) / angle.sin()
    relative = signal / before[:, None] * unit[:, None]  # M_z / M_0 just ahead of each pulse, if T2* stayed the same
    plain = _from_relative(relative, cosine, t10, acquisition.tr, agent.r1)
    weight = _check_t2star(acquisition, agent)
    if weight == 0:
        return plain

    def grown(c: Tensor) -> tuple[Tensor, Tensor]:
        """log(relative) of a concentration, and its slope."""
        e = torch.exp(-acquisition.tr * (1 / t10[:, None] + agent.r1 * c))
        slope = acquisition.tr * agent.r1 * e * (1 / (1 - e) - cosine / (1 - cosine * e))
        return torch.log((1 - e) / (1 - cosine * e)) - weight * c, slope - weight

    target = torch.log(relative)
    with torch.no_grad():
        guess = torch.where(plain.isfinite(), plain, torch.zeros_like(plain)).clamp(max=0)
        for _ in range(60):
            level, slope = grown(guess)
            # The curve is concave: from the left Newton's steps never jump over the solution.
            change = torch.where(slope > 0, (target - level) / slope, torch.full_like(slope, torch.nan))
            guess = guess + change
            if not bool((change.abs() > 1e-12 * (1 + guess.abs())).any()):
                break
    level, slope = grown(guess)
    # One more step, with derivatives, carries those of the implicit function.
    return guess + (target - level) / slope.detach()


def _from_relative(relative: Tensor, cosine: Tensor, t10: Tensor, tr: float, r1: float) -> Tensor:
    reachable = (relative < 1) & (relative > 0)
    inside = torch.where(reachable, relative, torch.full_like(relative, 0.5))
    rate = -torch.log((1 - inside) / (1 - inside * cosine)) / tr
    found = (rate - 1 / t10[:, None]) / r1
    return torch.where(reachable, found, torch.full_like(found, torch.nan))


@dataclass(frozen=True, eq=False)
class Concentration:
    """Concentration of the agent, and why a voxel has none.

    Attributes
    ----------
    values : ndarray, shape (voxels, n)
        mM; NaN where `code` is not FITTED.
    s0 : ndarray, shape (voxels,)
        Equilibrium signal that the baseline and T10 imply.
    noise : ndarray, shape (voxels,)
        Standard deviation of the baseline's concentration, mM; NaN with fewer than two baseline samples.
    code : ndarray of uint8, shape (voxels,)
        :class:`~biomodel.imaging.voxelfit.Code`.
    """

    values: np.ndarray
    s0: np.ndarray
    noise: np.ndarray
    code: np.ndarray

    def counts(self) -> dict[str, int]:
        """Number of voxels by code, those that occur."""
        found, count = np.unique(self.code, return_counts=True)
        return {Code(int(c)).name.lower(): int(n) for c, n in zip(found, count, strict=True)}


def concentration(
    signal: np.ndarray,
    t10: np.ndarray | float,
    acquisition: SpoiledGradientEcho,
    agent: Relaxivity,
    baseline: Sequence[int] | np.ndarray,
    *,
    b1: np.ndarray | float | None = None,
    ceiling: float | None = None,
) -> Concentration:
    """Concentration of a DCE series, voxel by voxel.

    Parameters
    ----------
    signal : ndarray, shape (voxels, n)
    t10 : ndarray, shape (voxels,), or float
        T1 before contrast, s.
    acquisition
        Flip angle and TR of the series.
    agent
        Relaxivity.
    baseline : sequence of int
        Samples before the agent arrives (:func:`biomodel.imaging.aif.baseline_samples` finds them). Their mean is the
        signal before contrast.
    b1 : ndarray, shape (voxels,), or float, optional
        Flip-angle factor.
    ceiling
        Largest value that the series can hold; voxels that reach it are SATURATED.

    Returns
    -------
    Concentration
        A voxel is NOT_FINITE for a signal, T10 or B1 that is not finite (or a T10 or B1 that is not positive),
        NO_SIGNAL for samples that are zero or negative, SATURATED for samples above what the sequence can give at any
        concentration or at the ceiling.

    Raises
    ------
    InputError
        If there is no baseline, or arrays do not fit.
    """
    data = np.asarray(signal, dtype=float)
    if data.ndim != 2:
        raise InputError(f"concentration: signal of shape {data.shape}; expected (voxels, samples).")
    samples = np.unique(np.asarray(baseline, dtype=int)) if len(baseline) else np.empty(0, dtype=int)
    if samples.size == 0:
        raise InputError(
            "concentration: no baseline samples; a DCE series needs at least one image before the agent arrives."
        )
    if samples[0] < 0 or samples[-1] >= data.shape[1]:
        raise InputError(
            f"concentration: baseline samples {samples[0]} to {samples[-1]} of a series of {data.shape[1]}; "
            "they are counted from 0."
        )
    v = len(data)
    try:
        relaxation = np.broadcast_to(np.asarray(t10, dtype=float), (v,))
        factor = np.broadcast_to(np.asarray(1.0 if b1 is None else b1, dtype=float), (v,))
    except ValueError:
        raise InputError(f"concentration: T10 or B1 do not match {v} voxels; expected one value for each.") from None
    code = np.full(v, Code.FITTED, dtype=np.uint8)
    code[(data <= 0).any(1)] = Code.NO_SIGNAL
    if ceiling is not None:
        code[(data >= ceiling).any(1)] = Code.SATURATED
    with np.errstate(invalid="ignore"):
        whole = (
            np.isfinite(data).all(1) & np.isfinite(relaxation) & (relaxation > 0) & np.isfinite(factor) & (factor > 0)
        )
    code[~whole] = Code.NOT_FINITE
    values, s0, noise = np.full(data.shape, np.nan), np.full(v, np.nan), np.full(v, np.nan)
    ok = np.flatnonzero(code == Code.FITTED)
    if ok.size:
        tensors = [torch.as_tensor(np.ascontiguousarray(a[ok])) for a in (data, relaxation, factor)]
        before = tensors[0][:, torch.as_tensor(samples)].mean(1)
        found = to_concentration(tensors[0], before, tensors[1], acquisition, agent, b1=tensors[2]).numpy()
        unit = acquisition.signal(1 / tensors[1], torch.ones_like(before), tensors[2])
        beyond = ~np.isfinite(found).all(1)
        code[ok[beyond]] = Code.SATURATED
        found[beyond] = np.nan
        values[ok] = found
        s0[ok] = np.where(beyond, np.nan, (before / unit).numpy())
        if samples.size > 1:
            noise[ok] = found[:, samples].std(1, ddof=1)
    return Concentration(values, s0, noise, code)
