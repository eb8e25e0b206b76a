"""The integrator behind virtual patients: the equation of the fitted models, solved in another way.

Virtual truth must not come from the code that later fits it. This module therefore shares nothing with
``biomodel.solvers``: it discretises space by finite volumes on a grid twice finer than the voxels and time by the
classical fourth-order Runge-Kutta method applied to the whole right-hand side (method of lines, no operator splitting),
restarted at every dose so that no step ever straddles one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from biomodel.errors import SolverError

Array = NDArray[np.float64]

# Stability interval of RK4 on the negative real axis is 2.785; the margin covers the change of the kill within a step.
_STABLE = 2.2


@dataclass(frozen=True, eq=False)
class Hazard:
    """Kill rate of a course of doses, ``sum_i weight_i exp(-decay_i (t - day_i))`` over the doses already given.

    Parameters
    ----------
    days : array of shape (n,)
        Days of the doses.
    weights : array of shape (n,)
        Kill rate right after each dose (1/day): efficacy times amount over reference dose.
    decays : array of shape (n,)
        Rate at which the effect of each dose fades (1/day).
    """

    days: Array
    weights: Array
    decays: Array

    @classmethod
    def none(cls) -> Hazard:
        """No treatment."""
        return cls(np.empty(0), np.empty(0), np.empty(0))

    def at(self, day: float, since: float) -> float:
        """Kill rate (1/day) at `day` from the doses given at or before the day `since`.

        Two times are needed because the rate jumps at a dose: within a step only the doses known at its start count.
        """
        given = self.days <= since
        return float(np.sum(self.weights[given] * np.exp(-self.decays[given] * (day - self.days[given]))))


def face_rates(mask: NDArray[np.bool_], diffusivity: Array, spacing: Sequence[float]) -> tuple[Array, Array, Array]:
    """Exchange rates between neighbouring cells, one array per axis.

    Parameters
    ----------
    mask : bool array of shape (z, y, x)
        Cells of the organ; no flux crosses its boundary.
    diffusivity : array of shape (z, y, x)
        Diffusion coefficient in each cell (mm^2/day). The face value is the harmonic mean of its two cells, which is
        the exact one for two layers in series.
    spacing : three floats
        Size of a cell (mm) along z, y, x.

    Returns
    -------
    tuple of three arrays of shape (z + 2, y + 2, x + 2)
        Rates (1/day) across the lower face of every cell of the array padded by one cell on each side.
    """
    shape = tuple(n + 2 for n in mask.shape)
    inside = np.zeros(shape)
    inside[1:-1, 1:-1, 1:-1] = np.where(mask, diffusivity, 0.0)
    rates = []
    for axis, step in enumerate(spacing):
        below, above = np.roll(inside, 1, axis=axis), inside  # the padding is empty, so the wrap brings in zeros
        both = (below > 0) & (above > 0)
        rate = np.zeros(shape)
        rate[both] = 2.0 * below[both] * above[both] / (below[both] + above[both]) / step**2
        rates.append(rate)
    return rates[0], rates[1], rates[2]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _stage(u, y, acc, out, cz, cy, cx, growth, floor, kill, a, b, kind, box, spans):
    """One Runge-Kutta stage on a box of padded arrays: r = rhs(y); acc (+)= b r; out = u + a r, or u = acc + b r.

    `kind` is 0 for the first stage, 1 for the middle ones and 2 for the last. `growth` is a padded map of the rate, or
    has a single voxel. `floor` > 0 selects Gompertz growth, with a rate that rises no further below that fraction;
    `floor` = 0 selects logistic growth. `spans` holds the organ's extent along each row.
    """
    crowd = np.empty(u.shape[3])
    mapped, one = growth.size > 1, growth[0, 0, 0]
    for i in range(box[0, 0], box[0, 1]):
        for j in range(box[1, 0], box[1, 1]):
            x0, x1 = max(box[2, 0], spans[i, j, 0]), min(box[2, 1], spans[i, j, 1])
            for m in range(x0, x1):
                crowd[m] = y[0, i, j, m]
            for p in range(1, u.shape[0]):
                for m in range(x0, x1):
                    crowd[m] += y[p, i, j, m]
            if floor > 0.0:
                for m in range(x0, x1):
                    crowd[m] = -(growth[i, j, m] if mapped else one) * np.log(max(crowd[m], floor))
            elif mapped:
                for m in range(x0, x1):
                    crowd[m] = growth[i, j, m] * (1.0 - crowd[m])
            else:
                for m in range(x0, x1):
                    crowd[m] = one * (1.0 - crowd[m])
            for p in range(u.shape[0]):
                mid, zl, zu = y[p, i, j], y[p, i - 1, j], y[p, i + 1, j]
                yl, yu = y[p, i, j - 1], y[p, i, j + 1]
                fz, gz, fy, gy, fx = cz[i, j], cz[i + 1, j], cy[i, j], cy[i, j + 1], cx[i, j]
                base, total, new = u[p, i, j], acc[p, i, j], out[p, i, j]
                loss = kill[p]
                for m in range(x0, x1):
                    c = mid[m]
                    r = (
                        fz[m] * (zl[m] - c)
                        + gz[m] * (zu[m] - c)
                        + fy[m] * (yl[m] - c)
                        + gy[m] * (yu[m] - c)
                        + fx[m] * (mid[m - 1] - c)
                        + fx[m + 1] * (mid[m + 1] - c)
                        + (crowd[m] - loss) * c
                    )
                    if kind == 0:
                        total[m] = base[m] + b * r
                        new[m] = base[m] + a * r
                    elif kind == 1:
                        total[m] += b * r
                        new[m] = base[m] + a * r
                    else:
                        base[m] = total[m] + b * r


@numba.njit(cache=True, nogil=True)
def _active(u, cutoff, spans):
    """Smallest box (half-open, padded indices) that holds every cell above `cutoff`; empty boxes have hi <= lo."""
    box = np.empty((3, 2), np.int64)
    for axis in range(3):
        box[axis, 0], box[axis, 1] = u.shape[axis + 1], 0
    for p in range(u.shape[0]):
        for i in range(1, u.shape[1] - 1):
            for j in range(1, u.shape[2] - 1):
                row = u[p, i, j]
                lo, hi = u.shape[3], 0
                for m in range(spans[i, j, 0], spans[i, j, 1]):
                    if row[m] > cutoff:
                        lo, hi = min(lo, m), m + 1
                if hi > 0:
                    box[0, 0], box[0, 1] = min(box[0, 0], i), max(box[0, 1], i + 1)
                    box[1, 0], box[1, 1] = min(box[1, 0], j), max(box[1, 1], j + 1)
                    box[2, 0], box[2, 1] = min(box[2, 0], lo), max(box[2, 1], hi)
    return box


def integrate(
    state: Array,
    mask: NDArray[np.bool_],
    diffusivity: Array,
    spacing: Sequence[float],
    growth: float | Array,
    hazard: Hazard,
    times: Sequence[float],
    *,
    start: float = 0.0,
    sensitivity: Sequence[float] = (1.0,),
    gompertz_floor: float = 0.0,
    max_step: float = 0.5,
    cutoff: float = 1e-12,
) -> Iterator[Array]:
    """Solve ``du_p/dt = div(D grad u_p) + growth(U) u_p - s_p hazard(t) u_p``, U the sum over the populations p.

    Parameters
    ----------
    state : array of shape (populations, z, y, x)
        Cell fraction of each population at `start`; zero outside the mask. It is not changed.
    mask, diffusivity, spacing
        See :func:`face_rates`.
    growth : float or array of shape (z, y, x)
        Growth rate k (1/day), the same everywhere or a map: k (1 - U) for logistic growth, -k log(U) for Gompertz.
    hazard : Hazard
        The kill. The state at a time is the one before a dose at that time.
    times : increasing sequence of floats
        Days at which the state is wanted, none before `start`.
    sensitivity : sequence of floats
        Factor s_p on the kill of each population.
    gompertz_floor : float
        0 for logistic growth. Above 0: Gompertz growth, with the rate per cell held constant below this cell fraction;
        without it the thinnest tail of a diffusing front grows without limit and fills the organ.
    max_step : float
        Longest step (day); shorter ones are chosen where stability asks for them.
    cutoff : float
        Only a box around the cells above this fraction, widened by the reach of a step, is computed. A negative number
        computes every cell.

    Yields
    ------
    array of shape (populations, z, y, x)
        The state at each of `times`, in order (a fresh array).

    Raises
    ------
    SolverError
        If a time lies before the one before it, or the state stops being finite.
    """
    cz, cy, cx = face_rates(mask, diffusivity, spacing)
    u = np.pad(np.asarray(state, float), ((0, 0), (1, 1), (1, 1), (1, 1)))
    first, second, total = u.copy(), u.copy(), u.copy()
    kills = np.asarray(sensitivity, float)
    limits = np.array([[1, n + 1] for n in mask.shape])
    box = limits[:, ::-1].copy()
    inside = np.pad(mask, 1)
    first_in = np.where(inside.any(axis=2), inside.argmax(axis=2), inside.shape[2])
    behind = np.where(inside.any(axis=2), inside.shape[2] - inside[:, :, ::-1].argmax(axis=2), 0)
    spans = np.stack([first_in, behind], axis=-1)
    spread = float(np.max(2.0 * (cz + cy + cx + sum(np.roll(c, -1, a) for a, c in enumerate((cz, cy, cx))))))
    rates = np.asarray(growth, float)
    rates = np.pad(rates, 1) if rates.ndim == 3 else rates.reshape(1, 1, 1)
    fastest = float(np.abs(rates).max())
    steepest = fastest * max(1.0, -np.log(gompertz_floor)) if gompertz_floor > 0 else fastest

    def stage(y: Array, out: Array, kill: float, a: float, b: float, kind: int) -> None:
        _stage(u, y, total, out, cz, cy, cx, rates, gompertz_floor, kill * kills, a, b, kind, box, spans)

    now = float(start)
    for wanted in times:
        if wanted < now:
            raise SolverError(
                f"Virtual truth: the time {wanted:g} day was asked for after {now:g} day. Sort the times and start no "
                f"later than the first."
            )
        stops = sorted({float(day) for day in hazard.days if now < day < wanted} | {float(wanted)})
        for stop in stops:
            length = stop - now
            if length <= 0.0:
                continue
            rate = spread + steepest + hazard.at(now, now) * float(kills.max()) + 1e-12
            steps = int(np.ceil(length / min(max_step, _STABLE / rate)))
            h = length / steps
            for n in range(steps):
                t = now + n * h
                reach = _active(u, cutoff, spans)
                # A step of four stages reaches four cells; the box never shrinks, so the cells left out keep the
                # values that all the work arrays were given at the start.
                box[:, 0] = np.maximum(limits[:, 0], np.minimum(box[:, 0], reach[:, 0] - 4))
                box[:, 1] = np.minimum(limits[:, 1], np.maximum(box[:, 1], reach[:, 1] + 4))
                mid = hazard.at(t + h / 2, now)
                stage(u, first, hazard.at(t, now), h / 2, h / 6, 0)
                stage(first, second, mid, h / 2, h / 3, 1)
                stage(second, first, mid, h, h / 3, 1)
                stage(first, second, hazard.at(t + h, now), 0.0, h / 6, 2)
            now = stop
        if not np.isfinite(u).all():
            raise SolverError(f"Virtual truth: the state is not finite at day {wanted:g}. Use smaller rates or steps.")
        yield u[:, 1:-1, 1:-1, 1:-1].copy()


def refine(values: NDArray, factors: Sequence[int]) -> NDArray:
    """Repeat every cell `factors` times along its axis: the same piecewise constant field on a finer grid."""
    for axis, factor in enumerate(factors):
        values = np.repeat(values, factor, axis=axis)
    return values


def average(values: Array, factors: Sequence[int]) -> Array:
    """Mean over blocks of `factors` cells along the last three axes: fine cells to voxels."""
    *lead, z, y, x = values.shape
    fz, fy, fx = factors
    return values.reshape(*lead, z // fz, fz, y // fy, fy, x // fx, fx).mean(axis=(-1, -3, -5))
