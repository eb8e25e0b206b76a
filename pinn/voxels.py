"""The network's state as voxels show it: averages, and their derivatives along directions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from pinn.carried import on_grid
from pinn.guides import Guides
from pinn.network import Network
from pinn.physics import Physics
from pinn.residuals import Direction
from pinn.splines import on_sides

#: Points evaluated at once.
BLOCK = 16_384
#: The two Gauss points of a voxel's side, from its lower end, in units of the side.
GAUSS = (0.5 - 0.5 / math.sqrt(3), 0.5 + 0.5 / math.sqrt(3))


class Voxels:
    """Voxel averages of u = S B exp(tau N), by two Gauss points per axis: exact for cubic polynomials."""

    def __init__(self, physics: Physics, network: Network, guides: Guides):
        self.physics, self.network, self.guides = physics, network, guides
        self.sides = [(torch.arange(n)[:, None] + torch.tensor(GAUSS, dtype=torch.float64)).reshape(-1) / n
                      for n in physics.shape]  # fmt: skip
        self.x = torch.stack(torch.meshgrid(*self.sides, indexing="ij"), -1).reshape(-1, len(self.sides))
        self.modes = [math.pi * torch.arange(n, dtype=torch.float64) for n in physics.shape]
        self.cos = [torch.cos(s[:, None] * k) for s, k in zip(self.sides, self.modes, strict=True)]
        maps = physics.maps if physics.treated else []
        self.maps = {n: on_sides(physics.fields[n], self.sides).reshape(-1) for n in maps}
        self.mask = torch.tensor(physics.geometry.mask)

    def hold(self, values: Mapping[str, float], c: torch.Tensor) -> None:
        """Set the parameters and the start's coefficients."""
        self.values, self.c = values, c

    def _carried(self, c: torch.Tensor, amount: float) -> torch.Tensor:
        decay = [torch.exp(-amount * a * k**2) for a, k in zip(self.physics.metric, self.modes, strict=True)]
        return on_grid(c, self.cos, decay).reshape(-1)

    def reached(self) -> np.ndarray:
        """Where diffusion alone brings the reference start (n_1, ..., n_d): the larger of the first and last day."""
        ends = [self._average(self._carried(self.guides.c, self.guides.diffusion * tau)) for tau in (0.0, 1.0)]
        return torch.maximum(*ends).numpy()

    def _average(self, u: torch.Tensor) -> torch.Tensor:
        """Points (..., m) to voxels (..., n_1, ..., n_d)."""
        lead = u.shape[:-1]
        shape = [k for n in self.physics.shape for k in (n, 2)]
        axes = tuple(len(lead) + 2 * i + 1 for i in range(len(self.sides)))
        return u.reshape(*lead, *shape).mean(axes) * self.mask

    def _network(self, w: torch.Tensor, tau: torch.Tensor, dw: torch.Tensor | None):
        """N (m,) and its derivatives (p, m) along `dw` at all points, at one time (1,)."""
        t = tau.expand(len(self.x))
        further = self.guides.on_grid(self._carried(self.guides.c, self.guides.diffusion * float(tau)), tau, self.sides)
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
        return self._average(torch.exp(tau * n - spared) * self._carried(self.c, self._amount(tau)))

    def along(self, w: torch.Tensor, tau: float, directions: list[Direction], dw: torch.Tensor
              ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Averages (n_1, ..., n_d), and their derivatives (p, n_1, ..., n_d) along directions with `dw` (p, count)."""
        physics, at = self.physics, torch.tensor([tau], dtype=torch.float64)
        amount = self._amount(tau)
        n, dn = self._network(w, at, dw)
        factor = torch.exp(tau * n - physics.spared(self.values, at, self.maps))
        u = factor * self._carried(self.c, amount)
        change = u * tau * dn
        for i, direction in enumerate(directions):
            if direction.start is not None:
                change[i] += factor * self._carried(direction.start, amount)
            if direction.name is None:
                continue
            if direction.name == physics.diffusivity:
                change[i] += tau * physics.scale * factor * self._carried(self._laplacian(), amount)
            spared = physics.spared_along(self.values, at, direction.name, self.maps)
            if spared is not None:
                change[i] -= spared * u
        return self._average(u), self._average(change)

    def _amount(self, tau: float) -> float:
        """How far the start has been carried."""
        return tau * (self.physics.diffusion(self.values) if self.physics.uniform else self.guides.diffusion)

    def _laplacian(self) -> torch.Tensor:
        total = torch.zeros_like(self.c)
        for i, (a, k) in enumerate(zip(self.physics.metric, self.modes, strict=True)):
            total = total - self.c * (a * k**2).reshape([-1 if j == i else 1 for j in range(self.c.ndim)])
        return total
