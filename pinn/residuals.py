"""The strong residual of a model's equation for a network, with its derivatives by weights and parameters.

With S(x, t) the fraction of cells that treatment has spared so far, B the initial state carried by diffusion alone
(:mod:`pinn.carried`), tau in [0, 1] the time since the start in units of the whole span, and N the network,

    u = S w,    w = B exp(tau N).

Jumps of u at a fraction of radiotherapy are in S, exactly; start, sign and zero flux on the box's sides hold by
construction. With G = tau N + log S what is left is one residual, in units of the cell fraction:

    exp(G) { B (N + tau N_tau) - D [2 grad B . grad G + B (lap G + |grad G|²)] - B grad D . grad G } - growth(u),

with D and growth in units of the box and the span: B_tau is the divergence of D grad B, whatever D is, and has dropped
out. On an organ's surface, with outward normal n, nothing flows if n . grad G = 0, as n . grad B is zero already; the
flux D u n . grad G divided by a voxel's side is the loss of a layer of that depth, and such rows count as much as the
layer has points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pinn.carrier import BoxCarrier, BoxPoints, OrganCarrier
from pinn.guides import Guides
from pinn.medium import Medium
from pinn.network import Network
from pinn.physics import Physics

Carrier = BoxCarrier | OrganCarrier

#: Largest exponent tau N that a trial may have; beyond it the state is nonsense and the step is refused.
LARGEST_EXPONENT = 50.0
#: Least number of points on the surface, as a share of those inside; their rows are weighted accordingly.
LAYER = 0.3


@dataclass(frozen=True)
class Direction:
    """A direction of derivatives: a model parameter by name, and the change of the carried start (:mod:`pinn.carrier`).

    In a box that change leaves out what a diffusivity does to it.
    """

    name: str | None = None
    start: Any = None


@dataclass(frozen=True, eq=False)
class Points:
    """Where a residual is asked for.

    Attributes
    ----------
    x, tau : tensor, shape (n, d) and (n,)
        Places inside on the unit box, and times in [0, 1].
    surface_x, surface_tau : tensor, shape (m, d) and (m,)
        On the organ's surface; m may be 0.
    normals : tensor, shape (m, d)
        Outward unit normals there, in mm.
    weight : float
        Of a row of the surface.
    """

    x: torch.Tensor
    tau: torch.Tensor
    surface_x: torch.Tensor
    surface_tau: torch.Tensor
    normals: torch.Tensor
    weight: float = 1.0

    @classmethod
    def inside(cls, x: torch.Tensor, tau: torch.Tensor) -> Points:
        """Places inside alone."""
        nothing = x.new_zeros(0, x.shape[1])
        return cls(x, tau, nothing, x.new_zeros(0), nothing)

    @classmethod
    def draw(cls, physics: Physics, carrier: Carrier, count: int, seed: int, dense: torch.Tensor | None = None
             ) -> Points:  # fmt: skip
        """Quasi-random points at the carrier's times, more of them where `dense` (n_1, ..., n_d), at most 1, is large.
        """
        geometry = physics.geometry
        inside = geometry.inside(count, seed, dense)
        layer = geometry.layer
        wanted = 0 if geometry.whole else math.ceil(max(min(layer, 0.5), LAYER) * count)
        surface, normals = geometry.surface(wanted, seed, dense)
        d = len(physics.shape)

        def times(points):
            return carrier.times(points[:, d])

        weight = math.sqrt(layer * len(inside) / len(surface)) if len(surface) else 1.0
        return cls(inside[:, :d], times(inside), surface[:, :d], times(surface), normals, weight)


class _State:
    """The network's state at fixed points, with what its derivatives need."""

    def __init__(self, physics: Physics, network: Network, guides: Guides, carrier: Carrier, x: torch.Tensor,
                 tau: torch.Tensor):  # fmt: skip
        self.physics, self.network, self.tau = physics, network, tau
        self.medium = Medium(physics, x, tau)
        self.source = carrier.at(x, tau, self.medium.splines)
        self.inputs = network.inputs(x, tau, guides.at(self.source, tau, self.medium.splines))
        self.metric = physics.metric[:, None]

    def hold(self, values: Mapping[str, float], start: Any) -> None:
        """Set the parameters and the start."""
        self.medium.hold(values)
        self.start = start
        self.carried = self.source.of(start, values)

    def value(self, w: torch.Tensor) -> torch.Tensor:
        """Cell fraction (n,) at the points."""
        n = self.network.value(w, self.inputs[0])[0]
        return torch.exp(self.tau * n - self.medium.exponent) * self.carried[0]

    def parts(self, w: torch.Tensor) -> _Parts | None:
        """The state's factors, or None where the network's exponent is beyond all bounds."""
        out, kept = self.network.forward(w, self.inputs)
        exponent = self.tau * out[0]
        if not bool(exponent.abs().max() < LARGEST_EXPONENT):
            return None
        gamma, laplacian = self.tau * out[2:-1], self.tau * out[-1]
        if self.medium.bend is not None:
            gamma, laplacian = gamma - self.medium.bend.slopes, laplacian - self.medium.bend.laplacian
        e = torch.exp(exponent - self.medium.exponent)
        return _Parts(e, out[0] + self.tau * out[1], gamma, laplacian, e * self.carried[0], kept)

    def carried_along(self, direction: Direction) -> torch.Tensor | None:
        """The change of the carried start (1 + d, n) along a direction, or None where it has none."""
        change = None if direction.start is None else self.source.of(direction.start, self.medium.values)
        if direction.name is not None and direction.name == self.physics.diffusivity:
            if isinstance(self.source, BoxPoints):
                diffused = self.source.diffused(self.start, self.medium.values)
                change = diffused if change is None else change + diffused
        return change


@dataclass(eq=False)
class _Parts:
    """exp(G), N + tau N_tau, grad G (d, n), lap G, u, and what the network's derivative needs."""

    e: torch.Tensor
    rate: torch.Tensor
    gamma: torch.Tensor
    laplacian: torch.Tensor
    u: torch.Tensor
    kept: list


class _Equation(_State):
    """Rows of the equation inside the organ."""

    def _flow(self, parts: _Parts, carried: torch.Tensor) -> torch.Tensor:
        """Change in time less divergence of the flux, linear in the carried start."""
        return parts.e * (carried[0] * parts.rate - self._spread(parts, carried, self.medium.diffusion,
                                                                 self.medium.diffusion_slopes))  # fmt: skip

    def _spread(self, parts: _Parts, carried: torch.Tensor, d: torch.Tensor, slopes: torch.Tensor | None
                ) -> torch.Tensor:  # fmt: skip
        """Divergence of the flux of w over exp(G), but for that of the carried start itself."""
        bend = parts.laplacian + (self.metric * parts.gamma**2).sum(0)
        found = d * (2 * (self.metric * carried[1:] * parts.gamma).sum(0) + carried[0] * bend)
        return found if slopes is None else found + carried[0] * (self.metric * slopes * parts.gamma).sum(0)

    def rows(self, parts: _Parts) -> torch.Tensor:
        """Residuals (n,)."""
        return self._flow(parts, self.carried) - self.medium.growth(parts.u)[0]

    def linear(self, w: torch.Tensor, parts: _Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals (n,) and their derivatives by the weights (n, count)."""
        growth, rate = self.medium.growth(parts.u)
        flow = self._flow(parts, self.carried)
        d, t, u = self.medium.diffusion, self.tau, parts.u
        cotangents = torch.empty(len(self.metric) + 3, len(t), dtype=torch.float64)
        cotangents[0] = t * flow + u - rate * t * u
        cotangents[1] = u * t
        pull = 2 * d * (parts.e * self.carried[1:] + u * parts.gamma)
        if self.medium.diffusion_slopes is not None:
            pull = pull + self.medium.diffusion_slopes * u
        cotangents[2:-1] = -self.metric * t * pull
        cotangents[-1] = -d * t * u
        return flow - growth, self.network.jacobian(w, parts.kept, cotangents)

    def along(self, parts: _Parts, direction: Direction) -> torch.Tensor:
        """Derivative of the residuals (n,) along a direction of parameters and start, with the weights held."""
        medium, u = self.medium, parts.u
        rate = medium.growth(u)[1]
        total = torch.zeros_like(u)
        change = self.carried_along(direction)
        if change is not None:
            total = total + self._flow(parts, change) - rate * parts.e * change[0]
        if direction.name is None:
            return total
        diffused = medium.diffusion_along(direction.name)
        if diffused is not None:
            total = total - parts.e * self._spread(parts, self.carried, *diffused)
        spared = medium.exponent_along(direction.name)
        if spared is not None:
            total = total - spared[0] * (self._flow(parts, self.carried) - rate * u)
            if spared[1] is not None:
                # grad G and lap G change, too.
                b, slopes, bend = self.carried[0], self.carried[1:], spared[1]
                bent = 2 * (self.metric * bend.slopes * (slopes + b * parts.gamma)).sum(0) + b * bend.laplacian
                flux = medium.diffusion * bent
                if medium.diffusion_slopes is not None:
                    flux = flux + (self.metric * medium.diffusion_slopes * bend.slopes).sum(0) * b
                total = total + parts.e * flux
        growth = medium.growth_along(u, direction.name)
        return total if growth is None else total - growth


class _Flux(_State):
    """Rows of the outward flux through the organ's surface."""

    def __init__(self, physics, network, guides, carrier, points: Points):
        super().__init__(physics, network, guides, carrier, points.surface_x, points.surface_tau)
        # Derivatives are by the unit box's coordinates: n . grad = sum_i n_i / side_i d_i; the flux over a voxel's side
        # in units of the box's longest side squared.
        geometry = physics.geometry
        spacing = torch.tensor(geometry.spacing)
        sides = torch.tensor(geometry.mask.shape) * spacing
        layer = (points.normals * spacing).norm(dim=1)  # a voxel's side along the normal, mm
        self.normals = points.weight * (points.normals / sides).T * physics.length**2 / layer

    def _through(self, parts: _Parts, u: torch.Tensor, diffusion: torch.Tensor) -> torch.Tensor:
        return diffusion * u * (self.normals * parts.gamma).sum(0)

    def rows(self, parts: _Parts) -> torch.Tensor:
        """Flux (m,)."""
        return self._through(parts, parts.u, self.medium.diffusion)

    def linear(self, w: torch.Tensor, parts: _Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Flux (m,) and its derivatives by the weights (m, count)."""
        flux = self.rows(parts)
        cotangents = torch.zeros(len(self.metric) + 3, len(flux), dtype=torch.float64)
        cotangents[0] = self.tau * flux
        cotangents[2:-1] = self.medium.diffusion * self.normals * parts.u * self.tau
        return flux, self.network.jacobian(w, parts.kept, cotangents)

    def along(self, parts: _Parts, direction: Direction) -> torch.Tensor:
        """Derivative of the flux (m,) along a direction of parameters and start, with the weights held."""
        total = torch.zeros_like(parts.u)
        change = self.carried_along(direction)
        if change is not None:
            total = total + self._through(parts, parts.e * change[0], self.medium.diffusion)
        if direction.name is None:
            return total
        diffused = self.medium.diffusion_along(direction.name)
        if diffused is not None:
            total = total + self._through(parts, parts.u, diffused[0])
        spared = self.medium.exponent_along(direction.name)
        if spared is not None:
            total = total - spared[0] * self.rows(parts)
            if spared[1] is not None:
                total = total - self.medium.diffusion * parts.u * (self.normals * spared[1].slopes).sum(0)
        return total


class Residual:
    """Residuals at fixed points of space and time, of the equation and of zero flux through the organ's surface.

    Parameters
    ----------
    physics : Physics
    network : Network
    points : Points
    guides : Guides
    carrier : BoxCarrier or OrganCarrier
    """

    def __init__(self, physics: Physics, network: Network, points: Points, guides: Guides, carrier: Carrier):
        self.points = points
        self.equation = _Equation(physics, network, guides, carrier, points.x, points.tau)
        self.pieces: list[_Equation | _Flux] = [self.equation]
        if len(points.surface_x):
            self.pieces.append(_Flux(physics, network, guides, carrier, points))

    def hold(self, values: Mapping[str, float], start: Any) -> None:
        """Set the parameters and the start, as the carrier made it."""
        for piece in self.pieces:
            piece.hold(values, start)

    def value(self, w: torch.Tensor) -> torch.Tensor | None:
        """Residuals (n,), or None where the network's exponent is beyond all bounds."""
        found = []
        for piece in self.pieces:
            parts = piece.parts(w)
            if parts is None:
                return None
            found.append(piece.rows(parts))
        return torch.cat(found)

    def worst(self, w: torch.Tensor, count: int) -> torch.Tensor:
        """Indices (count,) of the points inside where the equation is violated most."""
        return self.equation.rows(_given(self.equation.parts(w))).abs().topk(count).indices

    def state(self, w: torch.Tensor) -> torch.Tensor:
        """Cell fraction (n,) at the points inside."""
        return self.equation.value(w)

    def linear(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals (n,) and their derivatives by the weights (n, count)."""
        found = [piece.linear(w, _given(piece.parts(w))) for piece in self.pieces]
        return torch.cat([r for r, _ in found]), torch.cat([j for _, j in found])

    def along(self, w: torch.Tensor, directions: list[Direction]) -> torch.Tensor:
        """Derivatives of the residuals (p, n) along directions of parameters and start, with the weights held."""
        found = []
        for piece in self.pieces:
            parts = _given(piece.parts(w))
            found.append(torch.stack([piece.along(parts, direction) for direction in directions]))
        return torch.cat(found, 1)


def sharpened(trained: Residual, fresh: Residual, w: torch.Tensor, seed: int) -> Points:
    """Points for further training: half of those trained on, and of fresh ones the half where the equation fails most.

    Wu et al. 2023, Comput Methods Appl Mech Eng 403:115671, doi:10.1016/j.cma.2022.115671, choose by the residual, too.
    """
    old, new = trained.points, fresh.points
    count = len(old.tau)
    kept = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count - count // 2]
    added = fresh.worst(w, min(count // 2, len(new.tau)))
    x = torch.cat((old.x[kept], new.x[added]))
    return replace(old, x=x, tau=torch.cat((old.tau[kept], new.tau[added])))


def _given(parts: _Parts | None) -> _Parts:
    assert parts is not None, "only weights that `value` accepted come here"
    return parts


def dense_where(carried: np.ndarray, share: float = 0.5) -> torch.Tensor:
    """Density of points (n_1, ..., n_d), at most 1: `share` of it follows the cells, the rest is even."""
    top = float(np.abs(carried).max()) or 1.0
    return torch.tensor((1 - share) + share * np.minimum(1.0, np.abs(carried) / (0.2 * top)))
