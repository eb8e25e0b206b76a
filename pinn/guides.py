"""Inputs of the network beside position and time: where the tumour is, what treatment does, what the organ is like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from pinn.carried import Places
from pinn.physics import Physics
from pinn.splines import Splines, on_sides

#: Distance from the surface, in voxels, over which the network's input for it changes.
DEPTH = 4.0


class Guides:
    """What tells the network where the tumour is, what treatment has done and what the organ is like.

    The start carried by a reference diffusivity; where there is treatment, the integral of S over time, whose kinks
    lie where the solution's do, and its product with each drug map; the diffusivity where it varies; the distance to
    the organ's surface where it has one. All are held fixed while parameters change.

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
        #: Voxel fields that are inputs by themselves, and those that are multiplied with the clock.
        self.still: list[torch.Tensor] = []
        if not physics.uniform:
            coefficient = physics.coefficient(values)
            self.still.append(physics.geometry.continued(coefficient / coefficient.max()))
        if not physics.geometry.whole:
            deep = DEPTH * float(physics.geometry.spacing.max())
            self.still.append(torch.tanh(physics.geometry.distance / deep))
        self.moving = [physics.fields[n] for n in dict.fromkeys(physics.maps)]
        self.count = 1 + physics.treated * (1 + len(self.moving)) + len(self.still)

    def at(self, places: Places, splines: Splines | None) -> list[torch.Tensor]:
        """Value, derivatives by time and place, and Laplacian (d + 3, n) of each."""
        b = places.carried(self.c, self.diffusion)
        lap = places.carried(places.laplacian(self.c), self.diffusion, slopes=False)
        found = [torch.cat((b[:1], self.diffusion * lap, b[1:], lap))]
        if self.physics.treated:
            clock = torch.zeros_like(found[0])
            clock[0], clock[1] = self.clock(places.tau)
            found.append(clock)
            for field in self.moving:
                assert splines is not None
                f = splines.all(field, self.physics.metric)
                found.append(torch.cat((f[:1] * clock[0], f[:1] * clock[1], f[1:] * clock[0])))
        for field in self.still:
            assert splines is not None
            f = splines.all(field, self.physics.metric)
            found.append(torch.cat((f[:1], torch.zeros_like(f[:1]), f[1:])))
        return found

    def on_grid(self, carried: torch.Tensor, tau: torch.Tensor, sides: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Values (m,) on the product grid of places `sides` at one time (1,), given the carried start there (m,)."""
        found = [carried]
        if self.physics.treated:
            clock = self.clock(tau)[0]
            found.append(clock.expand(len(carried)))
            found += [clock * on_sides(f, sides).reshape(-1) for f in self.moving]
        return found + [on_sides(f, sides).reshape(-1) for f in self.still]

    def clock(self, tau: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The integral of S from 0 to tau (n,), piece by piece between doses, and S; drug maps count as 1."""
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
