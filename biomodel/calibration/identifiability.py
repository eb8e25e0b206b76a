"""What a patient's data leave open, in words: parameters that they say nothing about, and those they do not tell apart.

A direction of parameter space is judged by how much of the prior's spread along it is left in the posterior: the
eigenvalues of the posterior covariance in units of the prior's, other unknowns (shifts of the images, the grid)
integrated out. Where nearly all is left, the result there is the prior.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from biomodel.calibration.gaussnewton import GaussianPrior
from biomodel.parameters import LogNormal, Parameter

__all__ = ["unidentified"]

#: Share of the prior's standard deviation above which a direction is the prior's alone.
OPEN = 0.9
#: Beginnings of the names of unknowns of measurement and start.
NUISANCES = ("adc_shift.", "grid.", "initial.", "edge.", "region_shift.", "misalignment.")
#: Share of a direction (squared component) from which a parameter belongs to it; and above which it is the direction.
PART, ALONE = 0.1, 0.9


def _spread(covariance: np.ndarray, prior: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares of the prior's sd (p,), falling, their directions in whitened units (p, p), and the prior's root."""
    root = np.linalg.cholesky(prior)
    half = np.linalg.solve(root, np.linalg.solve(root, covariance).T)
    values, vectors = np.linalg.eigh((half + half.T) / 2)
    return np.sqrt(np.clip(values[::-1], 0.0, None)), vectors[:, ::-1], root


def _change(name: str, parameter: Parameter, step: float) -> str:
    """A step of the transformed coordinate in words."""
    if isinstance(parameter.prior, LogNormal):
        return f"{name} {100 * np.expm1(step):+.0f} %"
    return f"{name} {step:+.2g} ({parameter.units}, in its transformed coordinate)"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def unidentified(parameters: Mapping[str, Parameter], hessian: np.ndarray, prior: GaussianPrior) -> list[str]:
    """Notes on the directions of parameter space that the data leave to the prior.

    Parameters
    ----------
    parameters : mapping of str to Parameter
        In the order of the coordinates. Shifts of single visits and the error of the grid are no part of the answer.
    hessian : ndarray, shape (p, p)
        Information of the data: the Gauss-Newton Hessian at the optimum, without the prior's.
    prior : GaussianPrior
    """
    names = list(parameters)
    kept = [i for i, n in enumerate(names) if not n.startswith(NUISANCES)]
    if not kept:
        return []
    posterior = np.linalg.inv(hessian + prior.precision)
    # Alone: the coordinate itself lies among the open directions.
    share, vectors, _ = _spread(posterior[np.ix_(kept, kept)], prior.covariance[np.ix_(kept, kept)])
    within = (vectors[:, share > OPEN] ** 2).sum(1)
    alone = [i for i, w in zip(kept, within, strict=True) if w > ALONE]
    while True:
        rest = [i for i in kept if i not in alone]
        together = _together(rest, posterior, prior) if rest else []
        single = [rest[parts[0]] for parts, *_ in together if len(parts) == 1]
        if not single:
            break
        alone += single
    notes = []
    if alone:
        alone = sorted(alone)
        left = min(float(np.sqrt(posterior[i, i] / prior.covariance[i, i])) for i in alone)
        told = [names[i] for i in alone]
        what, spread = ("their", "or more of its spread are") if len(told) > 1 else ("its", "of its spread is")
        notes.append(
            f"The data say next to nothing about {_listed(told)}: {what} posterior is the prior's ({100 * left:.0f} % "
            f"{spread} left)."
        )
    for parts, steps, left in together:
        told = [names[rest[k]] for k in parts]
        moves = [_change(names[rest[k]], parameters[names[rest[k]]], float(steps[k])) for k in parts]
        known = "a combination of them"
        if len(parts) == 2:
            known = "their difference" if steps[parts[0]] * steps[parts[1]] > 0 else "what they do together"
        notes.append(
            f"{_listed(told)} cannot be told apart by these data, which know only {known}: {', '.join(moves)} changes "
            f"the predictions by less than the noise. Along that direction the prior decides ({100 * left:.0f} % of "
            "its spread is left)."
        )
    return notes


def _together(
    rest: list[int], posterior: np.ndarray, prior: GaussianPrior
) -> list[tuple[list[int], np.ndarray, float]]:
    """Open directions among some coordinates: who belongs to each, its step of one prior sd, and the share left."""
    share, vectors, root = _spread(posterior[np.ix_(rest, rest)], prior.covariance[np.ix_(rest, rest)])
    found = []
    for left, vector in zip(share, vectors.T, strict=True):
        if left > OPEN:
            parts = [int(k) for k in np.argsort(-(vector**2)) if vector[k] ** 2 > PART]
            found.append((parts, root @ (vector * np.sign(vector[parts[0]])), float(left)))
    return found
