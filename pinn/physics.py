"""A model on a domain as a network sees it: in the box's own units, with smooth fields of tissue and drug."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch

from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from biomodel.solvers.base import Context, check_fields, coordinate_fields
from biomodel.solvers.plan import breakpoints, make_plan
from biomodel.solvers.reaction import Course, TorchOps
from biomodel.terms import NoDiffusion
from biomodel.treatments import Kill
from pinn.geometry import Geometry


class Physics:
    """A model on a domain from a first day over a span of days, in units of the box's longest side and of the span.

    Parameters
    ----------
    fields : mapping of str to ndarray (z, y, x), optional
        Fields that terms read, beside the domain's tissues and its coordinates.

    Raises
    ------
    SolverError
        If the model or the domain has what this network cannot do; the message names what can.
    """

    def __init__(self, model: ReactionDiffusion, domain: Domain, schedule: Schedule, start: float, span: float,
                 fields: Mapping[str, np.ndarray] | None = None):  # fmt: skip
        _check(model, domain)
        model.check_schedule(schedule)
        self.model, self.start, self.span = model, float(start), float(span)
        self.axes = tuple(i for i, n in enumerate(domain.shape) if n > 1)
        self.shape = tuple(domain.shape[i] for i in self.axes)
        lengths = np.array([domain.shape[i] * domain.spacing[i] for i in self.axes])
        self.length = float(lengths.max())
        self.metric = torch.tensor((self.length / lengths) ** 2)
        self.geometry = Geometry.of(domain)
        available = {**coordinate_fields(domain), **domain.tissues, **(fields or {})}
        check_fields(model, available)
        self.fields = {
            n: self.geometry.continued(np.asarray(available[n]).reshape(self.shape)) for n in model.fields
        }
        self.maps = [t.map for t in model.treatments if isinstance(t, Kill) and t.map]
        self.breaks = breakpoints(model, schedule)
        plan = make_plan([self.start], np.array([[self.start + self.span]]), [1], [self.breaks])
        self.course = Course(model, [schedule], plan)
        self.treated = bool(self.course.active)

    def tau(self, day: float) -> float:
        """Time of a day in units of the span."""
        return (float(day) - self.start) / self.span

    @property
    def rough(self) -> bool:
        """Whether voxels of a mask or of fields enter, and not only smooth functions."""
        return bool(self.fields) or not self.geometry.whole or not self.uniform

    # Diffusion --------------------------------------------------------------------------------------------------------

    @cached_property
    def uniform(self) -> bool:
        """Whether one number is the diffusivity everywhere."""
        return self.model.diffusion.uniform is not None or isinstance(self.model.diffusion, NoDiffusion)

    @property
    def diffusivity(self) -> str | None:
        """Name of the parameter that is the diffusivity everywhere, if there is one."""
        name = self.model.diffusion.uniform
        return None if name is None else f"diffusion.{name}"

    @property
    def scale(self) -> float:
        """Diffusivity in units of the box's longest side squared per span, of 1 mm²/day."""
        return self.span / self.length**2

    def diffusion(self, values: Mapping[str, float]) -> float:
        """The diffusivity where it is uniform, else its mean over the organ."""
        if self.uniform:
            return 0.0 if self.diffusivity is None else values[self.diffusivity] * self.scale
        return float(self.coefficient(values)[torch.tensor(self.geometry.mask)].mean())

    def coefficient(self, values: Mapping[str, Any]) -> torch.Tensor:
        """Diffusivity per voxel (n_1, ..., n_d)."""
        if self.uniform:
            return torch.full(self.shape, self.diffusion(values), dtype=torch.float64)
        term = self.model.diffusion
        p = {n: torch.as_tensor(v, dtype=torch.float64) for n, v in self.model.of(term, values).items()}
        found = term.coefficient(None, p, Context(**{n: self.fields[n] for n in term.fields}), TorchOps)
        return self.scale * torch.as_tensor(found, dtype=torch.float64).expand(self.shape)

    def coefficient_along(self, values: Mapping[str, float], name: str) -> torch.Tensor | None:
        """Derivative of `coefficient` by a parameter, or None where it has none."""
        if self.uniform or not name.startswith("diffusion."):
            return None
        each = torch.full(self.shape, float(values[name]), dtype=torch.float64).requires_grad_()
        return slope(self.coefficient({**values, name: each}), each)

    # Treatment --------------------------------------------------------------------------------------------------------

    def spared(self, values: Mapping[str, Any], tau: torch.Tensor, maps: Mapping[str, torch.Tensor] | None = None
               ) -> torch.Tensor:  # fmt: skip
        """Minus the log of S at times tau (n,), 0 at the start; values are numbers or one per place.

        Parameters
        ----------
        maps : mapping of str to tensor, shape (m,)
            Drug maps at m places; then n is m or 1.
        """
        if not self.treated:
            return torch.zeros_like(tau)
        tensors = {n: torch.as_tensor(v, dtype=torch.float64).reshape(-1) for n, v in values.items()}
        columns = {n: m[:, None] for n, m in (maps or {}).items()}
        found = self.course.exponent(tensors, (self.start + self.span * tau)[:, None], columns)[:, 0]
        if not (self.breaks < self.start).any():
            return found
        # What was given before the first day has already made the start what it is.
        first = torch.full((1, 1), self.start, dtype=torch.float64)
        return found - self.course.exponent(tensors, first, columns)[:, 0]

    def kills(self, name: str) -> bool:
        """Whether a parameter belongs to a treatment that is given."""
        return name.startswith(tuple(f"{t.name}." for t in self.course.active))

    def spared_along(self, values: Mapping[str, float], tau: torch.Tensor, name: str,
                     maps: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor | None:  # fmt: skip
        """Derivative of `spared` by a parameter, or None where it has none."""
        if not self.kills(name):
            return None
        count = max(len(tau), *(len(m) for m in maps.values())) if maps else len(tau)
        each = torch.full((count,), values[name], dtype=torch.float64).requires_grad_()
        return slope(self.spared({**values, name: each}, tau, maps), each)

    # Growth -----------------------------------------------------------------------------------------------------------

    def growth(self, values: Mapping[str, float], u: torch.Tensor, fields: Mapping[str, torch.Tensor] | None = None
               ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Growth per span at cell fractions u (n,), and its slope in u; `fields` (n,) are what the law reads."""
        here = u.detach().requires_grad_()
        rate = self._rate(values, here, fields)
        return rate.detach(), slope(rate, here)

    def growth_along(self, values: Mapping[str, float], u: torch.Tensor, name: str,
                     fields: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor | None:  # fmt: skip
        """Derivative of the growth per span by a parameter, or None where it has none."""
        if not name.startswith(f"{self.model.growth.name}."):
            return None
        each = torch.full_like(u, values[name]).requires_grad_()
        return slope(self._rate({**values, name: each}, u, fields), each)

    def _rate(self, values: Mapping[str, Any], u: torch.Tensor, fields: Mapping[str, torch.Tensor] | None):
        term = self.model.growth
        return self.span * term.rate(u, self.model.of(term, values), Context(**(fields or {})), TorchOps)


def slope(y: torch.Tensor, x: torch.Tensor, keep: bool = False) -> torch.Tensor:
    """Derivative of each of y (n,) by the x (n,) of the same place; zero where y does not depend on x.

    With `keep` it can be differentiated again.
    """
    if not y.requires_grad:
        return torch.zeros_like(x.detach())
    (found,) = torch.autograd.grad(y.sum(), x, allow_unused=True, create_graph=keep, retain_graph=True)
    return torch.zeros_like(x.detach()) if found is None else found


def _check(model: ReactionDiffusion, domain: Domain) -> None:
    others = "use bm.TorchSolver() or bm.FenicsSolver()"
    if domain.well_mixed or max(domain.shape) < 2:
        raise SolverError("PinnSolver: the domain is a single point, so there is no space; use bm.TorchSolver().")
    if model.diffusion.tensor:
        raise SolverError(
            f"PinnSolver: {type(model.diffusion).__name__} has a preferred direction; use bm.Isotropic(), "
            "bm.TissueDiffusion() or, for the tensor, bm.FenicsSolver()."
        )
    if model.auxiliaries:
        raise SolverError(f"PinnSolver: the model has auxiliary fields ({model.label}); {others}.")
