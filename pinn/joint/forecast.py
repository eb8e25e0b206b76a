"""Forecasts from an unknown start: the classical solver solves anew from each draw, a network's own state beside it.

A network has no grid, and parameters found by one are those of the equation; a classical solver on coarse voxels lets
steep fronts run too fast with them. So after a network the classical solver also solves once on voxels half as wide,
from the same start as a function of space, and all draws are shifted by the difference. After a classical fit, whose
parameters have made up for its grid, forecasts stay on the same grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from scipy.ndimage import zoom

from biomodel.domain import Domain
from biomodel.errors import CalibrationError
from biomodel.schedule import Schedule
from biomodel.solvers.base import Solver
from biomodel.solvers.torch import TorchSolver
from biomodel.truth import average, refine
from pinn.calibration import Gap, GapWarning
from pinn.joint.posterior import BLOCK, JointPosterior, simulated
from pinn.solver import PinnSimulation

#: Points along a voxel's side at which a volume within a level is counted.
FINER = 3


@dataclass(frozen=True, eq=False)
class JointForecast:
    """States and volumes at some days.

    Attributes
    ----------
    days : ndarray, shape (T,)
    level : float
        Cell fraction within which volumes are counted.
    volume : ndarray, shape (draws, T)
        Volume with at least `level`, mm³.
    cells : ndarray, shape (draws, T)
        Volume that the cells would fill alone, mm³: the integral of the cell fraction.
    mean, sd : ndarray, shape (T, z, y, x)
        Of the cell fraction over the draws.
    solved : ndarray, shape (T, z, y, x)
        The classical solver's state at the posterior's optimum, on halved voxels where a network found it.
    own : ndarray or None, shape (T, z, y, x)
        The network's, where a network found it.
    gap : Gap or None
        Network against classical solver.
    """

    days: np.ndarray
    level: float
    volume: np.ndarray
    cells: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    solved: np.ndarray
    own: np.ndarray | None = None
    gap: Gap | None = None

    def interval(self, level: float = 0.9) -> np.ndarray:
        """Central interval of the volume, (2, T), mm³."""
        return np.quantile(self.volume, [0.5 - level / 2, 0.5 + level / 2], axis=0)


def volume_within(u: np.ndarray, level: float, spacing: Sequence[float]) -> np.ndarray:
    """Volumes (...), mm³, where cell fractions (..., z, y, x) are at least `level`; voxels are interpolated by splines.

    Counting whole voxels would move in steps of a voxel.
    """
    *lead, z, y, x = u.shape
    points = u.reshape(-1, z, y, x)
    for axis in (1, 2, 3):
        # Averages over voxels to values at their centres, to fourth order.
        wide = np.pad(points, [(1, 1) if a == axis else (0, 0) for a in range(4)], mode="edge")
        points = points - np.diff(wide, 2, axis) / 24
    part = float(np.prod(spacing))
    for axis, n in ((1, z), (2, y), (3, x)):
        if n > 1:
            points = np.moveaxis(np.tensordot(points, _spline(n), axes=([axis], [1])), -1, axis)
            part /= FINER
    return ((points >= level).sum((1, 2, 3)) * part).reshape(lead)


@cache
def _spline(n: int) -> np.ndarray:
    """Matrix (FINER n, n) of cubic splines through n points, at the centres of parts of the voxels around them."""
    return np.asarray(zoom(np.eye(n), (FINER, 1), order=3, mode="nearest", grid_mode=True))


def forecast_joint(posterior: JointPosterior, days: Sequence[float], draws: int = 200, seed: int = 0,
                   level: float = 0.1, solver: Solver | None = None, largest_gap: float = 0.05,
                   own: bool = True) -> JointForecast:  # fmt: skip
    """Forecast by solving anew from the posterior's draws.

    Parameters
    ----------
    days : sequence of float
        Increasing, not before the start.
    level : float
        Cell fraction within which volumes are counted.
    solver : Solver, optional
        Classical; `TorchSolver` with its defaults if not given.
    largest_gap : float
        Relative difference of a network's own forecast and the one solved anew beyond which a `GapWarning` says so.
    own : bool
        Whether a network makes its own forecast too, for which it trains over the whole span.
    """
    problem, at = posterior.problem, np.atleast_1d(np.asarray(days, float))
    if at.min() < problem.start_day:
        raise CalibrationError(
            f"days: {at.min():g} lies before the start of day {problem.start_day:g}; ask for later days."
        )
    classical = (solver or TorchSolver()).build(
        problem.model, problem.domain, problem.schedule or Schedule(), problem.fields, start=problem.start_day
    )
    network = problem.simulation if isinstance(problem.simulation, PinnSimulation) else None
    coarse = solved = simulated(problem, posterior.z[None], at, classical)[0]
    if network is not None:
        solved = _halved(posterior, at, solver or TorchSolver())
    z = posterior.draws(draws, seed)
    order = np.argsort(z[:, 0])
    volume, cells = np.empty((draws, len(at))), np.empty((draws, len(at)))
    total, squares = np.zeros((len(at), *problem.domain.shape)), np.zeros((len(at), *problem.domain.shape))
    for block in np.array_split(order, max(1, -(-draws // BLOCK))):
        u = simulated(problem, z[block], at, classical) + (solved - coarse)
        volume[block] = volume_within(u, level, problem.domain.spacing)
        cells[block] = u.sum((2, 3, 4)) * problem.domain.voxel_volume
        total += u.sum(0)
        squares += (u**2).sum(0)
    mean = total / draws
    sd = np.sqrt(np.maximum(squares / draws - mean**2, 0.0))
    state = gap = None
    if network is not None and own:
        params, u0 = problem.physical(posterior.z), problem.u0(posterior.z)
        state = np.asarray(network(params, u0, at)[0])
        norm = np.sqrt((solved**2).sum((1, 2, 3)))
        grid = float((np.sqrt(((solved - coarse) ** 2).sum((1, 2, 3))) / norm).max()) / 3  # what is left of it
        gap = Gap(at, np.sqrt(((state - solved) ** 2).sum((1, 2, 3))) / norm, network.held_out, grid)
        if gap.relative.max() > largest_gap:
            warnings.warn(
                f"forecast: the network's own cell fractions differ by {gap.relative.max():.1%} from those solved anew "
                f"(day {at[int(gap.relative.argmax())]:g}): {gap.cause}.",
                GapWarning,
                stacklevel=2,
            )
    return JointForecast(at, level, volume, cells, mean, sd, solved, state, gap)


def _halved(posterior: JointPosterior, days: np.ndarray, solver: Solver) -> np.ndarray:
    """The classical state (T, z, y, x) at the optimum, solved on voxels half as wide and averaged."""
    problem, domain = posterior.problem, posterior.problem.domain
    factors = tuple(2 if n > 1 else 1 for n in domain.shape)
    scale = np.array(factors[::-1], float)
    affine = np.array(domain.affine)
    # The first fine voxel's centre lies a quarter of a voxel before that of the first coarse one.
    affine[:3, 3] += affine[:3, :3] @ ((1 - scale) / (2 * scale))
    affine[:3, :3] = affine[:3, :3] / scale
    fine = Domain(
        refine(domain.mask, factors),
        (domain.spacing[0] / factors[0], domain.spacing[1] / factors[1], domain.spacing[2] / factors[2]),
        affine,
        {n: refine(np.asarray(v), factors) for n, v in domain.tissues.items()},
    )
    fields = {n: refine(np.asarray(v), factors) for n, v in (problem.fields or {}).items()}
    built = solver.build(problem.model, fine, problem.schedule or Schedule(), fields, start=problem.start_day)
    params = problem.physical(posterior.z)
    u0 = torch.tensor(problem.start.on(fine).states(posterior.z[None, problem.cut[1]]))
    with torch.no_grad():
        u = np.asarray(built(params, u0, days, plan=built.plan(params, u0, days)))[0]
    return average(u, factors)
