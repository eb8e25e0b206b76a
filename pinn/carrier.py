"""The initial state carried on by diffusion alone, which the network multiplies: in a box, and in an organ.

In a box with one diffusivity it is known exactly (:mod:`pinn.carried`). In an organ, or where tissue or drugs vary, the
classical solver carries it on the voxels, at some nodes of time at which the residual's points then lie: zero flux
through folds and walls and jumps between tissues are its business, and the network's is the rest, growth above all,
which is smooth. Either way the carried start follows the diffusivity, so that it drops out of the residual.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from biomodel.solvers.base import Built
from biomodel.solvers.grids import face_conductances
from biomodel.solvers.torch import TorchSolver
from biomodel.terms import NoGrowth
from pinn.carried import Places, coefficients, on_grid
from pinn.physics import Physics
from pinn.splines import Splines

#: Nodes of time of the carried start in an organ, and the relative error in time it is solved to.
NODES, RTOL = 24, 1e-4


class BoxCarrier:
    """Cosines, each with its own decay. A start is its coefficients (n_1, ..., n_d).

    Parameters
    ----------
    physics : Physics
    """

    per_side = 2

    def __init__(self, physics: Physics):
        self.physics = physics

    def times(self, place: torch.Tensor) -> torch.Tensor:
        """Times of points from numbers (n,) spread over [0, 1]: more of them near the first and the last day."""
        return (1 - torch.cos(torch.pi * place)) / 2

    def start(self, u0: np.ndarray, values: Mapping[str, float], days: Sequence[float] | np.ndarray) -> torch.Tensor:
        """A start from voxel averages (n_1, ..., n_d)."""
        return torch.tensor(coefficients(u0))

    def directions(self, u0: np.ndarray, values: Mapping[str, float], days: Sequence[float] | np.ndarray,
                   wrt: Sequence[str | None], du0: np.ndarray | None) -> list[torch.Tensor | None]:  # fmt: skip
        """Changes of the start along directions, None where there are none; what a diffusivity does is not in them."""
        if du0 is None:
            return [None] * len(wrt)
        return [self.start(change, values, days) if change.any() else None for change in du0]

    def guide(self, u0: np.ndarray, values: Mapping[str, float]) -> BoxGuide:
        """A reference start that tells the network where the tumour is."""
        top = float(np.abs(u0).max()) or 1.0
        return BoxGuide(self.physics, self.start(u0 / top, values, []), self.physics.diffusion(values))

    def at(self, x: torch.Tensor, tau: torch.Tensor, splines: Splines | None) -> BoxPoints:
        """The carrier at points."""
        return BoxPoints(self.physics, Places.of(x, tau, self.physics.shape, self.physics.metric))

    def voxels(self, sides: Sequence[torch.Tensor]) -> BoxVoxels:
        """The carrier on the product grid of places `sides`."""
        return BoxVoxels(self.physics, sides)


@dataclass(frozen=True, eq=False)
class BoxPoints:
    """Carried starts at points."""

    physics: Physics
    places: Places

    def of(self, start: torch.Tensor, values: Mapping[str, float]) -> torch.Tensor:
        """Value and slopes (1 + d, n)."""
        return self.places.carried(start, self.physics.diffusion(values))

    def diffused(self, start: torch.Tensor, values: Mapping[str, float]) -> torch.Tensor:
        """Derivative (1 + d, n) by the diffusivity: as if the start were tau times its Laplacian."""
        return self.physics.scale * self.places.tau * self.of(self.places.laplacian(start), values)


class BoxVoxels:
    """Carried starts on a product grid."""

    def __init__(self, physics: Physics, sides: Sequence[torch.Tensor]):
        self.physics = physics
        self.modes = [math.pi * torch.arange(n, dtype=torch.float64) for n in physics.shape]
        self.cos = [torch.cos(s[:, None] * k) for s, k in zip(sides, self.modes, strict=True)]

    def carried(self, c: torch.Tensor, amount: float) -> torch.Tensor:
        """Values (m,) of coefficients carried by an amount of diffusivity times time."""
        decay = [torch.exp(-amount * a * k**2) for a, k in zip(self.physics.metric, self.modes, strict=True)]
        return on_grid(c, self.cos, decay).reshape(-1)

    def of(self, start: torch.Tensor, values: Mapping[str, float], tau: float) -> torch.Tensor:
        """Values (m,) at one time."""
        return self.carried(start, tau * self.physics.diffusion(values))

    def diffused(self, start: torch.Tensor, values: Mapping[str, float], tau: float) -> torch.Tensor:
        """Derivative (m,) by the diffusivity."""
        total = torch.zeros_like(start)
        for i, (a, k) in enumerate(zip(self.physics.metric, self.modes, strict=True)):
            total = total - start * (a * k**2).reshape([-1 if j == i else 1 for j in range(start.ndim)])
        return tau * self.physics.scale * self.of(total, values, tau)


@dataclass(frozen=True, eq=False)
class BoxGuide:
    """A reference start, its largest value 1, carried by a reference diffusivity."""

    physics: Physics
    start: torch.Tensor
    diffusion: float

    def at(self, source: BoxPoints) -> torch.Tensor:
        """Value, derivatives by time and place, and Laplacian (d + 3, n)."""
        places = source.places
        b = places.carried(self.start, self.diffusion)
        laplacian = places.carried(places.laplacian(self.start), self.diffusion, slopes=False)
        return torch.cat((b[:1], self.diffusion * laplacian, b[1:], laplacian))

    def on_grid(self, source: BoxVoxels, tau: float) -> torch.Tensor:
        """Values (m,) at one time."""
        return source.carried(self.start, self.diffusion * tau)


@dataclass(frozen=True, eq=False)
class OrganStart:
    """A start carried on voxels.

    Attributes
    ----------
    nodes : tensor, shape (NODES, n_1, ..., n_d)
        Mirrored at the organ's surface.
    days : dict of float to tensor, shape (n_1, ..., n_d)
        By tau of the days that were asked for.
    """

    nodes: torch.Tensor
    days: dict[float, torch.Tensor]


class OrganCarrier:
    """Diffusion alone by the classical solver, on the voxels of an organ.

    Parameters
    ----------
    physics : Physics
    domain, fields
        Of the simulation.
    """

    per_side = 1

    def __init__(self, physics: Physics, domain, fields: Mapping[str, np.ndarray]):
        self.physics, self.domain = physics, domain
        model = ReactionDiffusion(NoGrowth(), physics.model.diffusion)
        self.solver: Built = TorchSolver(rtol=RTOL).build(model, domain, Schedule(), fields, start=physics.start)
        #: Denser near the first day, where a carried start changes fastest.
        self.tau = torch.linspace(0, 1, NODES, dtype=torch.float64) ** 1.5

    def times(self, place: torch.Tensor) -> torch.Tensor:
        """Times of points, each one of the nodes."""
        return self.tau[(place * NODES).long().clamp(max=NODES - 1)]

    def _diffusivities(self, values: Mapping[str, float]) -> dict[str, float]:
        return {n: v for n, v in values.items() if n.startswith("diffusion.")}

    def _times(self, days: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All times in order, and where the nodes and the days are among them."""
        nodes = self.physics.start + self.physics.span * self.tau.numpy()
        every, where = np.unique(np.concatenate((nodes, np.asarray(days, float))), return_inverse=True)
        return every, where[:NODES], where[NODES:]

    def _start(self, states: torch.Tensor, days: Sequence[float] | np.ndarray, nodes, wanted) -> OrganStart:
        states = states.reshape(-1, *self.physics.shape)
        continued = torch.stack([self.physics.geometry.continued(states[i]) for i in nodes])
        return OrganStart(continued, {self.physics.tau(day): states[i] for day, i in zip(days, wanted, strict=True)})

    def start(self, u0: np.ndarray, values: Mapping[str, float], days: Sequence[float] | np.ndarray) -> OrganStart:
        """A start from voxel averages (n_1, ..., n_d), carried to the nodes and to `days`."""
        every, nodes, wanted = self._times(days)
        state = torch.tensor(u0).reshape(1, *self.domain.shape)
        with torch.no_grad():
            found = self.solver(self._diffusivities(values), state, every)
        return self._start(found[0], days, nodes, wanted)

    def directions(self, u0: np.ndarray, values: Mapping[str, float], days: Sequence[float] | np.ndarray,
                   wrt: Sequence[str | None], du0: np.ndarray | None) -> list[OrganStart | None]:  # fmt: skip
        """Changes of the carried start along directions, those by diffusivities among them."""
        every, nodes, wanted = self._times(days)
        moves = [n if n is not None and n.startswith("diffusion.") else None for n in wrt]
        changes = np.zeros((len(wrt), *self.physics.shape)) if du0 is None else du0
        active = [i for i, n in enumerate(moves) if n is not None or changes[i].any()]
        found: list[OrganStart | None] = [None] * len(wrt)
        if not active:
            return found
        state = torch.tensor(u0).reshape(1, *self.domain.shape)
        change = torch.tensor(changes[active]).reshape(len(active), 1, *self.domain.shape)
        values = self._diffusivities(values)
        plan = self.solver.plan(values, state, every)
        _, du = self.solver.sensitivities(values, state, every, [moves[i] for i in active], plan=plan, du0=change)
        for row, i in enumerate(active):
            found[i] = self._start(du[row, 0].detach(), days, nodes, wanted)
        return found

    def guide(self, u0: np.ndarray, values: Mapping[str, float]) -> OrganGuide:
        """A reference start that tells the network where the tumour is."""
        top = float(np.abs(u0).max()) or 1.0  # zero outside the organ
        return OrganGuide(self, u0 / top, dict(values))

    def divergence(self, states: torch.Tensor, values: Mapping[str, float]) -> torch.Tensor:
        """Divergence of the flux per span on the voxels (k, n_1, ..., n_d), as the classical solver has it."""
        shape, physics = self.domain.shape, self.physics
        d = physics.coefficient(values).detach().reshape(1, *shape)
        spacing = np.array(self.domain.spacing) / physics.length
        faces = face_conductances(d, torch.tensor(self.domain.mask)[None], spacing)
        u = torch.nn.functional.pad(states.reshape(-1, *shape), (1,) * 6)
        total = torch.zeros_like(u)
        for axis, face in zip((-3, -2, -1), faces, strict=True):
            flux = face * (u - u.roll(1, axis))
            total = total + flux.roll(-1, axis) - flux
        return total[..., 1:-1, 1:-1, 1:-1].reshape(states.shape)

    def at(self, x: torch.Tensor, tau: torch.Tensor, splines: Splines | None) -> OrganPoints:
        """The carrier at points whose times are nodes."""
        assert splines is not None
        node = torch.searchsorted(self.tau, tau - 1e-9)
        return OrganPoints(node, splines)

    def voxels(self, sides: Sequence[torch.Tensor]) -> OrganVoxels:
        """The carrier on voxels."""
        return OrganVoxels()


@dataclass(frozen=True, eq=False)
class OrganPoints:
    """Carried starts at points."""

    node: torch.Tensor
    splines: Splines

    def of(self, start: OrganStart, values: Mapping[str, float]) -> torch.Tensor:
        """Value and slopes (1 + d, n)."""
        return self.splines.slopes(start.nodes, self.node)


class OrganVoxels:
    """Carried starts on voxels."""

    def of(self, start: OrganStart, values: Mapping[str, float], tau: float) -> torch.Tensor:
        """Averages (m,) at the time of one of the days."""
        return start.days[tau].reshape(-1)


class OrganGuide:
    """A reference start, its largest value 1, carried on voxels at reference diffusivities.

    Its derivative in time is the classical divergence on the voxels, and its Laplacian what that and its slopes leave:
    second derivatives of a spline through folds and walls would be noise.
    """

    def __init__(self, carrier: OrganCarrier, u0: np.ndarray, values: dict[str, float]):
        self.carrier, self.u0, self.values = carrier, u0, values
        self.start = carrier.start(u0, values, [])
        change = carrier.divergence(self.start.nodes, values)
        self.change = torch.stack([carrier.physics.geometry.continued(c) for c in change])

    def at(self, source: OrganPoints) -> torch.Tensor:
        """Value, derivatives by time and place, and Laplacian (d + 3, n)."""
        physics, splines = self.carrier.physics, source.splines
        b = splines.slopes(self.start.nodes, source.node)
        change = splines.slopes(self.change, source.node)[0]
        d = splines.slopes(physics.geometry.continued(physics.coefficient(self.values)))
        laplacian = change - (physics.metric[:, None] * d[1:] * b[1:]).sum(0)
        laplacian = torch.where(d[0] > 0, laplacian / d[0].clamp_min(1e-12), 0.0)
        return torch.cat((b[:1], change[None], b[1:], laplacian[None]))

    def on_grid(self, source: OrganVoxels, tau: float) -> torch.Tensor:
        """Averages (m,) at one time."""
        if tau not in self.start.days:
            physics = self.carrier.physics
            more = self.carrier.start(self.u0, self.values, [physics.start + physics.span * tau])
            self.start.days[tau] = next(iter(more.days.values()))
        return self.start.days[tau].reshape(-1)
