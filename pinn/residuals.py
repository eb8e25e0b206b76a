"""The strong residual of a model's equation for a network, with its derivatives by weights and parameters.

With S(t) the fraction of cells that treatment has spared so far, B the initial state carried by diffusion alone
(:mod:`pinn.carried`), tau in [0, 1] the time since the start in units of the whole span, and N the network,

    u = S w,    w = B exp(tau N).

Jumps of u at a fraction of radiotherapy are in S, exactly; start, zero flux and sign hold by construction. What is left
is one residual, in units of the cell fraction:

    S exp(tau N) { B [N + tau N_tau - D (tau lap N + tau² |grad N|²)] - 2 D tau grad B . grad N } - growth(u),

with D and growth in units of the box and the span.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from biomodel.solvers.base import Context
from biomodel.solvers.plan import breakpoints, make_plan
from biomodel.solvers.reaction import Course, TorchOps
from biomodel.treatments import Kill
from pinn.carried import Places
from pinn.network import Network

#: Largest exponent tau N that a trial may have; beyond it the state is nonsense and the step is refused.
LARGEST_EXPONENT = 50.0


@dataclass(frozen=True)
class Direction:
    """A direction of derivatives: a model parameter by name, or a change of the start's cosine coefficients."""

    name: str | None = None
    start: torch.Tensor | None = None


class Physics:
    """A model on a box from a first day over a span of days, in the box's own units.

    Raises
    ------
    SolverError
        If the model or the domain has what this network cannot do; the message names what can.
    """

    def __init__(self, model: ReactionDiffusion, domain: Domain, schedule: Schedule, start: float, span: float):
        _check(model, domain)
        model.check_schedule(schedule)
        self.model, self.start, self.span = model, float(start), float(span)
        self.axes = tuple(i for i, n in enumerate(domain.shape) if n > 1)
        self.shape = tuple(domain.shape[i] for i in self.axes)
        lengths = np.array([domain.shape[i] * domain.spacing[i] for i in self.axes])
        self.length = float(lengths.max())
        self.metric = torch.tensor((self.length / lengths) ** 2)
        self.breaks = breakpoints(model, schedule)
        plan = make_plan([self.start], np.array([[self.start + self.span]]), [1], [self.breaks])
        self.course = Course(model, [schedule], plan)
        self.treated = bool(self.course.active)

    def diffusion(self, values: Mapping[str, float]) -> float:
        """Diffusivity in units of the box's longest side squared per span."""
        name = self.model.diffusion.uniform
        return 0.0 if name is None else values[f"diffusion.{name}"] * self.span / self.length**2

    @property
    def diffusivity(self) -> str | None:
        """Name of the diffusivity."""
        name = self.model.diffusion.uniform
        return None if name is None else f"diffusion.{name}"

    def spared(self, values: Mapping[str, Any], tau: torch.Tensor) -> torch.Tensor:
        """Minus the log of S at times tau (n,); values are numbers or one per time."""
        if not self.treated:
            return torch.zeros_like(tau)
        tensors = {n: torch.as_tensor(v, dtype=torch.float64).reshape(-1) for n, v in values.items()}
        return self.course.exponent(tensors, (self.start + self.span * tau)[:, None])[:, 0]

    def spared_along(self, values: Mapping[str, float], tau: torch.Tensor, name: str) -> torch.Tensor | None:
        """Derivative of `spared` by a parameter, or None where it has none."""
        if not name.startswith(tuple(f"{t.name}." for t in self.course.active)):
            return None
        each = torch.full_like(tau, values[name]).requires_grad_()
        return _slope(self.spared({**values, name: each}, tau), each)

    def growth(self, values: Mapping[str, float], u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Growth per span at cell fractions u (n,), and its slope in u."""
        here = u.detach().requires_grad_()
        rate = self._rate(values, here)
        return rate.detach(), _slope(rate, here)

    def growth_along(self, values: Mapping[str, float], u: torch.Tensor, name: str) -> torch.Tensor | None:
        """Derivative of the growth per span by a parameter, or None where it has none."""
        if not name.startswith(f"{self.model.growth.name}."):
            return None
        each = torch.full_like(u, values[name]).requires_grad_()
        return _slope(self._rate({**values, name: each}, u), each)

    def _rate(self, values: Mapping[str, Any], u: torch.Tensor) -> torch.Tensor:
        term = self.model.growth
        return self.span * term.rate(u, self.model.of(term, values), Context(), TorchOps)


def _slope(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Derivative of each of y (n,) by the x (n,) of the same place; zero where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x.detach())
    (found,) = torch.autograd.grad(y.sum(), x, allow_unused=True)
    return torch.zeros_like(x.detach()) if found is None else found


def _check(model: ReactionDiffusion, domain: Domain) -> None:
    others = "use bm.TorchSolver() or bm.FenicsSolver()"
    if domain.well_mixed or max(domain.shape) < 2:
        raise SolverError("PinnSolver: the domain is a single point, so there is no space; use bm.TorchSolver().")
    if not domain.mask.all():
        raise SolverError(
            f"PinnSolver: the mask leaves out {int((~domain.mask).sum())} of {domain.mask.size} voxels; zero flux is "
            f"built into the network on whole boxes only. Crop the domain to a box inside the organ, or {others}."
        )
    if model.diffusion.uniform is None and type(model.diffusion).__name__ != "NoDiffusion":
        raise SolverError(
            f"PinnSolver: {type(model.diffusion).__name__} varies in space or with u; the network carries the start by "
            f"one diffusivity. Use bm.Isotropic(), or {others}."
        )
    if model.auxiliaries:
        raise SolverError(f"PinnSolver: the model has auxiliary fields ({model.label}); {others}.")
    mapped = [t.name for t in model.treatments if isinstance(t, Kill) and t.map]
    if mapped or model.growth.fields:
        what = ", ".join(mapped + list(model.growth.fields))
        raise SolverError(f"PinnSolver: {what} varies in space, which the form u = S(t) w does not have; {others}.")


class Guides:
    """Inputs beside position and time that tell the network where the tumour is and what treatment has done.

    The start carried by a reference diffusivity, and where there is treatment the integral of S over time, whose kinks
    lie where the solution's do. Both are held fixed while parameters change.

    Parameters
    ----------
    physics : Physics
    values : mapping of str to float
        The reference parameters.
    c : tensor, shape (n_1, ..., n_d)
        Cosine coefficients of the reference start.
    top : float
        Its largest value.
    """

    NODES = 8

    def __init__(self, physics: Physics, values: Mapping[str, float], c: torch.Tensor, top: float):
        self.physics, self.values, self.c = physics, dict(values), c / top
        self.diffusion = physics.diffusion(values)
        self.count = 2 if physics.treated else 1

    def at(self, places: Places) -> list[torch.Tensor]:
        """Value, derivatives and Laplacian (d + 3, n) of each."""
        b = places.carried(self.c, self.diffusion)
        lap = places.carried(places.laplacian(self.c), self.diffusion, slopes=False)
        found = [torch.cat((b[:1], self.diffusion * lap, b[1:], lap))]
        if self.count > 1:
            clock = torch.zeros_like(found[0])
            clock[0], clock[1] = self.clock(places.tau)
            found.append(clock)
        return found

    def clock(self, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The integral of S from 0 to tau (n,), piece by piece between doses, and S."""
        breaks = torch.tensor((self.physics.breaks - self.physics.start) / self.physics.span)
        knots = torch.cat((torch.zeros(1), breaks[(breaks > 0) & (breaks < 1)], torch.ones(1))).to(torch.float64)
        x, weight = (torch.tensor(v) for v in np.polynomial.legendre.leggauss(self.NODES))
        total = torch.zeros_like(tau)
        for low, high in zip(knots[:-1], knots[1:], strict=True):
            length = (tau.clamp(low, high) - low)[:, None]
            nodes = low + length * (x + 1) / 2
            s = torch.exp(-self.physics.spared(self.values, nodes.reshape(-1))).reshape(nodes.shape)
            total = total + (s * weight * length / 2).sum(1)
        return total, torch.exp(-self.physics.spared(self.values, tau))


@dataclass(eq=False)
class _Held:
    """What does not depend on the weights: parameters, the carried start and minus the log of S."""

    values: Mapping[str, float]
    c: torch.Tensor
    diffusion: float
    carried: torch.Tensor
    exponent: torch.Tensor


class Residual:
    """Residuals at fixed points of space and time.

    Parameters
    ----------
    physics : Physics
    network : Network
    x, tau : tensor, shape (n, d) and (n,)
        Points on the unit box and times in [0, 1].
    guides : Guides
    """

    def __init__(self, physics: Physics, network: Network, x: torch.Tensor, tau: torch.Tensor, guides: Guides):
        self.physics, self.network, self.x, self.tau = physics, network, x, tau
        self.places = Places.of(x, tau, physics.shape, physics.metric)
        self.inputs = network.inputs(x, tau, guides.at(self.places))
        self.metric = physics.metric[:, None]

    def hold(self, values: Mapping[str, float], c: torch.Tensor) -> None:
        """Set the parameters and the start's coefficients."""
        diffusion = self.physics.diffusion(values)
        self.held = _Held(
            values, c, diffusion, self.places.carried(c, diffusion), self.physics.spared(values, self.tau)
        )

    def _parts(self, w: torch.Tensor):
        held, t = self.held, self.tau
        out, kept = self.network.forward(w, self.inputs)
        n, n_t, grad, lap = out[0], out[1], out[2:-1], out[-1]
        exponent = t * n
        if not bool(exponent.abs().max() < LARGEST_EXPONENT):
            return None
        e = torch.exp(exponent - held.exponent)
        b, slope = held.carried[0], held.carried[1:]
        bracket = n + t * n_t - held.diffusion * (t * lap + t * t * (self.metric * grad * grad).sum(0))
        cross = 2 * held.diffusion * t * (self.metric * slope * grad).sum(0)
        return e, b, slope, grad, lap, bracket, cross, e * b, kept

    def value(self, w: torch.Tensor) -> torch.Tensor | None:
        """Residuals (n,), or None where the network's exponent is beyond all bounds."""
        parts = self._parts(w)
        if parts is None:
            return None
        e, b, _, _, _, bracket, cross, u, _ = parts
        return e * (b * bracket - cross) - self.physics.growth(self.held.values, u)[0]

    def state(self, w: torch.Tensor) -> torch.Tensor:
        """Cell fraction (n,) at the points."""
        n = self.network.value(w, self.inputs[0])[0]
        return torch.exp(self.tau * n - self.held.exponent) * self.held.carried[0]

    def linear(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals (n,) and their derivatives by the weights (n, count)."""
        parts = self._parts(w)
        assert parts is not None, "the weights were accepted before"
        e, b, slope, grad, _, bracket, cross, u, kept = parts
        d, t = self.held.diffusion, self.tau
        growth, rate = self.physics.growth(self.held.values, u)
        flow = e * (b * bracket - cross)
        cotangents = torch.empty(len(self.metric) + 3, len(t), dtype=torch.float64)
        cotangents[0] = t * flow + u - rate * t * u
        cotangents[1] = u * t
        cotangents[2:-1] = -2 * d * self.metric * t * (t * u * grad + e * slope)
        cotangents[-1] = -d * t * u
        return flow - growth, self.network.jacobian(w, kept, cotangents)

    def along(self, w: torch.Tensor, directions: list[Direction]) -> torch.Tensor:
        """Derivatives of the residuals (p, n) along directions of parameters and start, with the weights held."""
        parts = self._parts(w)
        assert parts is not None, "the weights were accepted before"
        e, b, slope, grad, lap, bracket, cross, u, _ = parts
        held, t, physics = self.held, self.tau, self.physics
        rate = physics.growth(held.values, u)[1]
        flow = e * (b * bracket - cross)
        found = []
        for direction in directions:
            total = torch.zeros_like(t)
            start, scale = direction.start, 1.0
            if direction.name is not None and direction.name == physics.diffusivity:
                # B changes as if its start were tau times its Laplacian, and D itself stands in the bracket.
                scale = physics.span / physics.length**2
                start = self.places.laplacian(held.c)
                total = total - scale * e * (
                    b * (t * lap + t * t * (self.metric * grad * grad).sum(0))
                    + 2 * t * (self.metric * slope * grad).sum(0)
                )
            if start is not None:
                change = self.places.carried(start, held.diffusion)
                if direction.name is not None:
                    change = scale * t * change
                steep = 2 * held.diffusion * t * (self.metric * change[1:] * grad).sum(0)
                total = total + e * (change[0] * bracket - steep) - rate * e * change[0]
            if direction.name is not None:
                spared = physics.spared_along(held.values, t, direction.name)
                if spared is not None:
                    total = total - spared * (flow - rate * u)
                growth = physics.growth_along(held.values, u, direction.name)
                if growth is not None:
                    total = total - growth
            found.append(total)
        return torch.stack(found)
