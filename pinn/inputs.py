"""What a network's simulation is called with: checked, and taken apart row by row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.models import ReactionDiffusion


def rows_of(model: ReactionDiffusion, domain: Domain, params: Mapping, u0) -> list[tuple[dict[str, float], np.ndarray]]:
    """Values by name and initial state (z, y, x), zero outside the organ, of each of a batch.

    Raises
    ------
    SolverError
        If a parameter is a field, a state has another shape or is not finite in the organ, or batch sizes differ.
    """
    values = {n: np.atleast_1d(_plain(v)) for n, v in model.complete(params).items()}
    for name, v in values.items():
        if v.ndim > 1:
            raise SolverError(f"PinnSolver: {name} is a field; the network takes numbers. Use bm.TorchSolver().")
    states = _plain(u0)
    if states.ndim not in (3, 4) or states.shape[-3:] != domain.shape:
        raise SolverError(
            f"initial state: shape {states.shape}; expected (batch, z, y, x) or (z, y, x) with (z, y, x) = "
            f"{domain.shape}."
        )
    states = np.where(domain.mask, states, 0.0).reshape(-1, *domain.shape)
    if not np.isfinite(states).all():
        raise SolverError("initial state: it has NaN or infinite values in the organ; mend the image or mask them.")
    sizes = {"initial state": len(states), **{n: len(v) for n, v in values.items()}}
    count = max(sizes.values())
    if any(n not in (1, count) for n in sizes.values()):
        found = ", ".join(f"{n} {size}" for n, size in sizes.items() if size > 1)
        raise SolverError(f"batch sizes differ: {found}; expected 1 or one common number.")
    rows = []
    for i in range(count):
        one = {n: float(v[i % len(v)]) for n, v in values.items()}
        model.complete(one)  # bounds
        rows.append((one, states[i % len(states)]))
    return rows


def days_of(start: float, times) -> np.ndarray:
    """Days (T,) that are wanted.

    Raises
    ------
    SolverError
        If there are none, or they are not finite, not in order, or before the start.
    """
    days = np.atleast_1d(np.asarray(times, float))
    if days.ndim != 1 or not days.size or not np.isfinite(days).all() or (np.diff(days) < 0).any() or days[0] < start:
        raise SolverError(
            f"times: expected finite days, increasing and not before day {start:g}; found {days.tolist()}."
        )
    return days


def check_directions(model: ReactionDiffusion, wrt: Sequence[str | None], count: int) -> None:
    """Raise where sensitivities are asked for of a batch, along nothing, or by what is no parameter."""
    if count > 1:
        raise SolverError(f"sensitivities: a batch of {count}; the network gives them one by one. Call it for each.")
    unknown = [n for n in wrt if n is not None and n not in model.parameters]
    if unknown or not len(wrt):
        raise SolverError(
            f"sensitivities: {', '.join(map(repr, unknown)) or 'no direction'}; expected some of "
            f"{', '.join(model.parameters)}, or None with du0."
        )


def _plain(values) -> np.ndarray:
    """An array of one's own: what comes in may be read-only."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().numpy()
    return np.array(values, float)
