"""`check_term`: is a term of one's own sound, and does every back end evaluate the same numbers?"""

from __future__ import annotations

import numpy as np
import torch

from biomodel.errors import ModelError
from biomodel.parameters import NumpyOps
from biomodel.solvers.base import Context
from biomodel.solvers.reaction import TorchOps
from biomodel.terms import Diffusion, Growth, Term
from biomodel.treatments import Jump, Kill
from biomodel.units import registry


def check_term(term: Term, fields: dict[str, float] | None = None) -> None:
    """Check a growth, diffusion or treatment term.

    Parameters have units, increasing bounds and a typical value inside them; rates are finite, the growth of no cells
    is no cells, diffusivities and hazards are not negative, survivals lie in (0, 1]; numpy and torch give the same
    numbers; the derivative by the cell fraction is finite; a kill's `cumulative` is the integral of its `rate`.

    Parameters
    ----------
    term : Term
    fields : dict of str to float, optional
        Values for the fields the term declares; 0.5 for those left out.

    Raises
    ------
    ModelError
        With the first thing that is wrong.
    """

    def require(condition: bool, what: str) -> None:
        if not condition:
            raise ModelError(f"{type(term).__name__}: {what}")

    require(bool(term.name), "name is empty; the parameters of the model are called name.parameter.")
    for p in term.parameters:
        try:
            registry.parse_units(p.units)
        except Exception as error:  # pint raises many kinds of its own
            raise ModelError(f"{type(term).__name__}: {p.name} has the unknown unit {p.units!r} ({error}).") from error
        require(p.bounds[0] <= p.typical <= p.bounds[1], f"{p.name} is typically {p.typical:g}, outside {p.bounds}.")
    values = {p.name: p.typical for p in term.parameters}
    tensors = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
    names = (*term.fields, *(a.equation.gives for a in term.auxiliaries))
    given = {name: (fields or {}).get(name, 0.5) for name in names}
    u = np.array([0.0, 1e-6, 0.1, 0.5, 0.9, 1.0])
    x = torch.tensor(u, requires_grad=True)

    def both(name: str, context: dict) -> np.ndarray:
        """The function on both back ends; equal, finite, with a finite derivative."""
        function = getattr(term, name)
        arguments = () if name in ("cumulative", "survival") else (True,)
        a = function(*((u,) if arguments else ()), values, Context(**context), NumpyOps)
        b = function(*((x,) if arguments else ()), tensors, Context(**context), TorchOps)
        a, b = np.broadcast_to(np.asarray(a, float), u.shape), torch.as_tensor(b, dtype=torch.float64).expand(x.shape)
        require(bool(np.isfinite(a).all()), f"{name} is not finite at u = {u[~np.isfinite(a)]}.")
        require(np.allclose(a, b.detach().numpy(), rtol=1e-12, atol=1e-300), f"{name}: numpy and torch differ.")
        if b.requires_grad:
            (slope,) = torch.autograd.grad(b.sum(), x, allow_unused=True)
            require(slope is None or bool(torch.isfinite(slope).all()), f"{name}: its derivative by u is not finite.")
        return a

    if isinstance(term, Growth):
        require(both("rate", given)[0] == 0, "rate is not 0 where there are no cells.")
    elif isinstance(term, Diffusion) and term.tensor:
        entries = np.array(term.coefficient(None, values, Context(**given), NumpyOps), float)
        require(entries.shape == (3, 3), f"the coefficient has shape {entries.shape}; expected three rows of three.")
        require(bool(np.isfinite(entries).all()) and np.array_equal(entries, entries.T), "the tensor is not symmetric.")
        require(bool(np.linalg.eigvalsh(entries)[0] >= -1e-12), "the diffusivity is negative along some direction.")
    elif isinstance(term, Diffusion):
        require(bool((both("coefficient", given) >= 0).all()), "the diffusivity is negative.")
    elif isinstance(term, Jump):
        survival = both("survival", {**given, "dose": 2.0})
        require(bool(((survival > 0) & (survival <= 1)).all()), "survival lies outside (0, 1].")
    elif isinstance(term, Kill):
        drug = given.get(term.map, 1.0) if term.map else 1.0

        def at(day: float) -> dict:
            each = (term.kinetics(np.float64(day), values, NumpyOps, a) for a in term.agents)
            level, exposure = zip(*each, strict=True)
            return {**given, "level": dict(zip(term.agents, level, strict=True)), "map": drug,
                    "exposure": dict(zip(term.agents, exposure, strict=True))}  # fmt: skip

        nodes, weights = np.polynomial.legendre.leggauss(20)
        days = 1.0 + nodes
        rates = np.array([both("rate", at(day))[3] for day in days])
        require(bool((rates >= 0).all()), "the hazard is negative.")
        grown = both("cumulative", at(2.0))[3] - both("cumulative", at(0.0))[3]
        require(abs(grown - weights @ rates) <= 1e-6 * max(abs(grown), 1e-12),
                f"cumulative grows by {grown:.8g} in two days after a dose, but the hazard integrates to "
                f"{weights @ rates:.8g}.")  # fmt: skip
    else:
        raise ModelError(f"{term!r} is neither a Growth, a Diffusion, a Kill nor a Jump.")
