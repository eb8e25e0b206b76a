"""The network's state as voxels show it: averages, and their derivatives along directions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from pinn.carrier import BoxVoxels, OrganStart
from pinn.guides import Guides
from pinn.network import Network
from pinn.physics import Physics
from pinn.residuals import Carrier, Direction
from pinn.splines import on_sides

#: Points evaluated at once.
BLOCK = 16_384
#: The two Gauss points of a voxel's side, from its lower end, in units of the side.
GAUSS = (0.5 - 0.5 / math.sqrt(3), 0.5 + 0.5 / math.sqrt(3))


class Voxels:
    """Voxel averages of u = S B exp(tau N).

    In a box by two Gauss points per axis, exact for cubic polynomials; in an organ B is known by its averages, and the
    smooth rest is taken at the voxel's centre.
    """

    def __init__(self, physics: Physics, network: Network, guides: Guides, carrier: Carrier):
        self.physics, self.network, self.guides = physics, network, guides
        self.per_side = carrier.per_side
        within = torch.tensor(GAUSS if self.per_side == 2 else (0.5,), dtype=torch.float64)
        self.sides = [(torch.arange(n)[:, None] + within).reshape(-1) / n for n in physics.shape]
        self.x = torch.stack(torch.meshgrid(*self.sides, indexing="ij"), -1).reshape(-1, len(self.sides))
        self.source = carrier.voxels(self.sides)
        maps = physics.maps if physics.treated else []
        self.maps = {n: on_sides(physics.fields[n], self.sides).reshape(-1) for n in maps}
        self.mask = torch.tensor(physics.geometry.mask)

    def hold(self, values: Mapping[str, float], start: Any) -> None:
        """Set the parameters and the start."""
        self.values, self.start = values, start

    def reaches(self, days: Sequence[float] | np.ndarray) -> bool:
        """Whether the start has been carried to these days."""
        return not isinstance(self.start, OrganStart) or all(self.physics.tau(d) in self.start.days for d in days)

    def reached(self) -> np.ndarray:
        """Where diffusion alone brings the reference start (n_1, ..., n_d): the larger of the first and last day."""
        guide: Any = self.guides.carried
        ends = [self._average(guide.on_grid(self.source, tau)) for tau in (0.0, 1.0)]
        return torch.maximum(*ends).numpy()

    def _average(self, u: torch.Tensor) -> torch.Tensor:
        """Points (..., m) to voxels (..., n_1, ..., n_d)."""
        lead = u.shape[:-1]
        shape = [k for n in self.physics.shape for k in (n, self.per_side)]
        axes = tuple(len(lead) + 2 * i + 1 for i in range(len(self.sides)))
        return u.reshape(*lead, *shape).mean(axes) * self.mask

    def _network(self, w: torch.Tensor, tau: torch.Tensor, dw: torch.Tensor | None):
        """N (m,) and its derivatives (p, m) along `dw` at all points, at one time (1,)."""
        t = tau.expand(len(self.x))
        further = self.guides.on_grid(self.source, tau, self.sides)
        values, slopes = [], []
        for part in torch.arange(len(self.x)).split(BLOCK):
            features = self.network.features(self.x[part], t[part], [f[part] for f in further])
            n, dn = self.network.value(w, features, dw)
            values.append(n)
            if dn is not None:
                slopes.append(dn)
        return torch.cat(values), torch.cat(slopes, 1) if slopes else None

    def state(self, w: torch.Tensor, tau: float) -> torch.Tensor:
        """Averages (n_1, ..., n_d) at time tau; zero outside the organ."""
        at = torch.tensor([tau], dtype=torch.float64)
        n, _ = self._network(w, at, None)
        spared = self.physics.spared(self.values, at, self.maps)
        return self._average(torch.exp(tau * n - spared) * self.source.of(self.start, self.values, tau))

    def along(self, w: torch.Tensor, tau: float, directions: list[Direction], dw: torch.Tensor
              ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Averages (n_1, ..., n_d), and their derivatives (p, n_1, ..., n_d) along directions with `dw` (p, count)."""
        physics, at = self.physics, torch.tensor([tau], dtype=torch.float64)
        n, dn = self._network(w, at, dw)
        factor = torch.exp(tau * n - physics.spared(self.values, at, self.maps))
        u = factor * self.source.of(self.start, self.values, tau)
        change = u * tau * dn
        for i, direction in enumerate(directions):
            if direction.start is not None:
                change[i] += factor * self.source.of(direction.start, self.values, tau)
            if direction.name is None:
                continue
            if direction.name == physics.diffusivity and isinstance(self.source, BoxVoxels):
                change[i] += factor * self.source.diffused(self.start, self.values, tau)
            spared = physics.spared_along(self.values, at, direction.name, self.maps)
            if spared is not None:
                change[i] -= spared * u
        return self._average(u), self._average(change)
