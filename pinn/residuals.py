"""The strong residual of a model's equation for a network, with its derivatives by weights and parameters.

With S(x, t) the fraction of cells that treatment has spared so far, B the initial state carried by diffusion alone
(:mod:`pinn.carried`), tau in [0, 1] the time since the start in units of the whole span, and N the network,

    u = S w,    w = B exp(tau N).

Jumps of u at a fraction of radiotherapy are in S, exactly; start, sign and zero flux on the box's sides hold by
construction. With G = tau N + log S what is left is one residual, in units of the cell fraction:

    exp(G) { B_tau + B (N + tau N_tau) - D [lap B + 2 grad B . grad G + B (lap G + |grad G|²)]
             - grad D . (grad B + B grad G) } - growth(u),

with D and growth in units of the box and the span. Where D is one number B is carried by it and B_tau = D lap B; where
D varies B is carried by a fixed number and the network has to learn the rest. On an organ's surface, with outward
normal n, the flux D n . grad u is asked to vanish; divided by a voxel's side it is the loss of a layer of that depth,
and such rows count as much as the layer has points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from pinn.carried import Places
from pinn.guides import Guides
from pinn.medium import Medium
from pinn.network import Network
from pinn.physics import Physics

__all__ = ["Direction", "Guides", "Physics", "Points", "Residual"]

#: Largest exponent tau N that a trial may have; beyond it the state is nonsense and the step is refused.
LARGEST_EXPONENT = 50.0
#: Least number of points on the surface, as a share of those inside; their rows are weighted accordingly.
LAYER = 0.3


@dataclass(frozen=True)
class Direction:
    """A direction of derivatives: a model parameter by name, or a change of the start's cosine coefficients."""

    name: str | None = None
    start: torch.Tensor | None = None


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
    def draw(cls, physics: Physics, count: int, seed: int, dense: torch.Tensor | None = None) -> Points:
        """Quasi-random points; where `dense` (n_1, ..., n_d), at most 1, is large there are more of them."""
        geometry = physics.geometry
        inside = geometry.inside(count, seed, dense)
        layer = geometry.layer
        wanted = 0 if geometry.whole else math.ceil(max(min(layer, 0.5), LAYER) * count)
        surface, normals = geometry.surface(wanted, seed, dense)
        d = len(physics.shape)

        def times(points):
            # More of them near the first and the last day, where a polynomial-like fit is loosest.
            return (1 - torch.cos(torch.pi * points[:, d])) / 2

        weight = math.sqrt(layer * count / len(surface)) if len(surface) else 1.0
        return cls(inside[:, :d], times(inside), surface[:, :d], times(surface), normals, weight)


@dataclass(eq=False)
class _Held:
    """The carried start for given parameters: value and slopes (d + 1, n), Laplacian and change in time (n,)."""

    values: Mapping[str, float]
    c: torch.Tensor
    carrier: float
    carried: torch.Tensor
    laplacian: torch.Tensor | None

    @property
    def change(self) -> torch.Tensor | float:
        return 0.0 if self.laplacian is None else self.carrier * self.laplacian


class _State:
    """The network's state at fixed points, with what its derivatives need."""

    def __init__(self, physics: Physics, network: Network, guides: Guides, x: torch.Tensor, tau: torch.Tensor):
        self.physics, self.network, self.guides, self.tau = physics, network, guides, tau
        self.places = Places.of(x, tau, physics.shape, physics.metric)
        self.medium = Medium(physics, x, tau)
        self.inputs = network.inputs(x, tau, guides.at(self.places, self.medium.splines))
        self.metric = physics.metric[:, None]

    def hold(self, values: Mapping[str, float], c: torch.Tensor) -> None:
        """Set the parameters and the start's coefficients."""
        self.medium.hold(values)
        # Where D is one number the start is carried by it, and its Laplacian drops out of the residual.
        carrier = self.physics.diffusion(values) if self.physics.uniform else self.guides.diffusion
        self.held = _Held(values, c, carrier, self.places.carried(c, carrier), self._laplacian(c, carrier))

    def _laplacian(self, c: torch.Tensor, carrier: float) -> torch.Tensor | None:
        if self.physics.uniform:
            return None
        return self.places.carried(self.places.laplacian(c), carrier, slopes=False)[0]

    def value(self, w: torch.Tensor) -> torch.Tensor:
        """Cell fraction (n,) at the points."""
        n = self.network.value(w, self.inputs[0])[0]
        return torch.exp(self.tau * n - self.medium.exponent) * self.held.carried[0]

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
        return _Parts(e, out[0] + self.tau * out[1], gamma, laplacian, e * self.held.carried[0], kept)

    def carried_along(self, direction: Direction) -> _Held | None:
        """The change of the carried start along a direction, or None where it has none."""
        held = self.held
        start, factor = direction.start, None
        if direction.name is not None and direction.name == self.physics.diffusivity:
            # B changes as if its start were tau times its Laplacian.
            start, factor = self.places.laplacian(held.c), self.physics.scale * self.tau
        if start is None:
            return None
        change, laplacian = self.places.carried(start, held.carrier), self._laplacian(start, held.carrier)
        if factor is not None:
            change = factor * change
            assert laplacian is None, "the start is carried by the diffusivity itself"
        return _Held(held.values, start, held.carrier, change, laplacian)


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

    def _flow(self, parts: _Parts, held: _Held) -> torch.Tensor:
        """Change in time less divergence of the flux, linear in the carried start."""
        d, metric = self.medium.diffusion, self.metric
        b, slopes = held.carried[0], held.carried[1:]
        bent = 2 * (metric * slopes * parts.gamma).sum(0) + b * self._bend(parts)
        flow = b * parts.rate - d * bent
        if held.laplacian is not None:
            flow = flow + held.change - d * held.laplacian
        return parts.e * (flow - self._drift(parts, held))

    def _bend(self, parts: _Parts) -> torch.Tensor:
        return parts.laplacian + (self.metric * parts.gamma**2).sum(0)

    def _drift(self, parts: _Parts, held: _Held) -> torch.Tensor | float:
        if self.medium.diffusion_slopes is None:
            return 0.0
        b, slopes = held.carried[0], held.carried[1:]
        return (self.metric * self.medium.diffusion_slopes * (slopes + b * parts.gamma)).sum(0)

    def rows(self, parts: _Parts) -> torch.Tensor:
        """Residuals (n,)."""
        return self._flow(parts, self.held) - self.medium.growth(parts.u)[0]

    def linear(self, w: torch.Tensor, parts: _Parts) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals (n,) and their derivatives by the weights (n, count)."""
        growth, rate = self.medium.growth(parts.u)
        flow = self._flow(parts, self.held)
        d, t, u = self.medium.diffusion, self.tau, parts.u
        cotangents = torch.empty(len(self.metric) + 3, len(t), dtype=torch.float64)
        cotangents[0] = t * flow + u - rate * t * u
        cotangents[1] = u * t
        pull = 2 * d * (parts.e * self.held.carried[1:] + u * parts.gamma)
        if self.medium.diffusion_slopes is not None:
            pull = pull + self.medium.diffusion_slopes * u
        cotangents[2:-1] = -self.metric * t * pull
        cotangents[-1] = -d * t * u
        return flow - growth, self.network.jacobian(w, parts.kept, cotangents)

    def along(self, parts: _Parts, direction: Direction) -> torch.Tensor:
        """Derivative of the residuals (n,) along a direction of parameters and start, with the weights held."""
        held, medium, u = self.held, self.medium, parts.u
        rate = medium.growth(u)[1]
        total = torch.zeros_like(u)
        change = self.carried_along(direction)
        if change is not None:
            total = total + self._flow(parts, change) - rate * parts.e * change.carried[0]
        if direction.name is None:
            return total
        b, slopes = held.carried[0], held.carried[1:]
        diffused = medium.diffusion_along(direction.name)
        if diffused is not None:
            spread = 2 * (self.metric * slopes * parts.gamma).sum(0) + b * self._bend(parts)
            if held.laplacian is not None:
                spread = spread + held.laplacian
            flux = diffused[0] * spread
            if diffused[1] is not None:
                flux = flux + (self.metric * diffused[1] * (slopes + b * parts.gamma)).sum(0)
            total = total - parts.e * flux
        spared = medium.exponent_along(direction.name)
        if spared is not None:
            total = total - spared[0] * (self._flow(parts, held) - rate * u)
            if spared[1] is not None:
                # grad G and lap G change, too.
                bend = spared[1]
                bent = 2 * (self.metric * bend.slopes * (slopes + b * parts.gamma)).sum(0) + b * bend.laplacian
                flux = medium.diffusion * bent
                if medium.diffusion_slopes is not None:
                    flux = flux + (self.metric * medium.diffusion_slopes * bend.slopes).sum(0) * b
                total = total + parts.e * flux
        growth = medium.growth_along(u, direction.name)
        return total if growth is None else total - growth


class _Flux(_State):
    """Rows of the outward flux through the organ's surface."""

    def __init__(self, physics, network, guides, points: Points):
        super().__init__(physics, network, guides, points.surface_x, points.surface_tau)
        # Derivatives are by the unit box's coordinates: n . grad = sum_i n_i / side_i d_i; the flux over a voxel's side
        # in units of the box's longest side squared.
        geometry = physics.geometry
        sides = torch.tensor(geometry.mask.shape * geometry.spacing)
        layer = float(geometry.spacing.min())
        # Until cells have crossed a voxel, the slope at the surface is that of the start's voxels, which no network
        # changes: such rows fade towards the first day.
        fading = (4 * guides.diffusion * self.tau * (physics.length / layer) ** 2).clamp(max=1)
        self.normals = points.weight * fading * (points.normals / sides).T * physics.length**2 / layer

    def _through(self, parts: _Parts, held: _Held, diffusion: torch.Tensor) -> torch.Tensor:
        b, slopes = held.carried[0], held.carried[1:]
        return diffusion * parts.e * (self.normals * (slopes + b * parts.gamma)).sum(0)

    def rows(self, parts: _Parts) -> torch.Tensor:
        """Flux (m,)."""
        return self._through(parts, self.held, self.medium.diffusion)

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
            total = total + self._through(parts, change, self.medium.diffusion)
        if direction.name is None:
            return total
        diffused = self.medium.diffusion_along(direction.name)
        if diffused is not None:
            total = total + self._through(parts, self.held, diffused[0])
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
    """

    def __init__(self, physics: Physics, network: Network, points: Points, guides: Guides):
        self.network = network
        self.equation = _Equation(physics, network, guides, points.x, points.tau)
        self.pieces: list[_Equation | _Flux] = [self.equation]
        if len(points.surface_x):
            self.pieces.append(_Flux(physics, network, guides, points))

    def hold(self, values: Mapping[str, float], c: torch.Tensor) -> None:
        """Set the parameters and the start's coefficients."""
        for piece in self.pieces:
            piece.hold(values, c)

    def value(self, w: torch.Tensor) -> torch.Tensor | None:
        """Residuals (n,), or None where the network's exponent is beyond all bounds."""
        found = []
        for piece in self.pieces:
            parts = piece.parts(w)
            if parts is None:
                return None
            found.append(piece.rows(parts))
        return torch.cat(found)

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


def _given(parts: _Parts | None) -> _Parts:
    assert parts is not None, "the weights were accepted before"
    return parts


def dense_where(carried: np.ndarray, share: float = 0.5) -> torch.Tensor:
    """Density of points (n_1, ..., n_d), at most 1: `share` of it follows the cells, the rest is even."""
    top = float(np.abs(carried).max()) or 1.0
    return torch.tensor((1 - share) + share * np.minimum(1.0, np.abs(carried) / (0.2 * top)))
