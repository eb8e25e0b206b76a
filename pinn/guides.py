"""Inputs of the network beside position and time: where the tumour is, and what treatment does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pinn.carrier import BoxGuide, OrganGuide
from pinn.physics import Physics
from pinn.splines import Splines, on_sides


class Guides:
    """What tells the network where the tumour is and what treatment has done.

    The start carried by a reference diffusivity; where there is treatment, the integral of S over time, whose kinks
    lie where the solution's do, and its product with each drug map. All are held fixed while parameters change.

    Parameters
    ----------
    physics : Physics
    values : mapping of str to float
        The reference parameters.
    carried : BoxGuide or OrganGuide
        The reference start.
    """

    NODES = 8

    def __init__(self, physics: Physics, values: Mapping[str, float], carried: BoxGuide | OrganGuide):
        self.physics, self.values, self.carried = physics, dict(values), carried
        self.maps = [physics.fields[n] for n in dict.fromkeys(physics.maps)] if physics.treated else []
        self.count = 1 + physics.treated + len(self.maps)

    def at(self, source: Any, tau: torch.Tensor, splines: Splines | None) -> list[torch.Tensor]:
        """Value, derivatives by time and place, and Laplacian (d + 3, n) of each, at the points of a carrier's source.
        """
        found = [self.carried.at(source)]
        if self.physics.treated:
            clock = torch.zeros_like(found[0])
            clock[0], clock[1] = self.clock(tau)
            found.append(clock)
            for field in self.maps:
                assert splines is not None
                f = splines.all(field, self.physics.metric)
                found.append(torch.cat((f[:1] * clock[0], f[:1] * clock[1], f[1:] * clock[0])))
        return found

    def on_grid(self, source: Any, tau: torch.Tensor, sides: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Values (m,) on the product grid of places `sides` of a carrier's source, at one time (1,)."""
        found = [self.carried.on_grid(source, float(tau))]
        if self.physics.treated:
            clock = self.clock(tau)[0]
            found.append(clock.expand(len(found[0])))
            found += [clock * on_sides(f, sides).reshape(-1) for f in self.maps]
        return found

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
