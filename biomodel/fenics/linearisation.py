"""The derivative of a run's outputs by the initial state, as a linear map between voxels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from biomodel.fenics.job import LinearMap, by_matrix

if TYPE_CHECKING:
    from biomodel.fenics.simulation import FenicsSimulation


class Linearisation:
    """The derivative J of the outputs by the initial state, as a linear map and its transpose."""

    def __init__(self, simulation: FenicsSimulation, maps: list[LinearMap]):
        self.simulation, self.maps = simulation, maps
        average = simulation.exchange.average
        self.outputs = simulation._spread(torch.stack([torch.from_numpy(average @ m.outputs.T).T for m in maps]))

    def push(self, du0: torch.Tensor) -> torch.Tensor:
        """J du0: (directions, batch, z, y, x) to (directions, batch, T, z, y, x)."""
        s = self.simulation
        x = torch.as_tensor(du0, dtype=torch.float64)[..., torch.tensor(s.domain.mask)].numpy()
        found = []
        for i, one in enumerate(self.maps):
            moved = one.push(s.exchange.to_nodes(x[:, i if x.shape[1] > 1 else 0]))
            found.append(by_matrix(s.exchange.average, torch.from_numpy(moved)).transpose(0, 1))
        return s._spread(torch.stack(found, 1))

    def pull(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Transpose of J: (directions, batch, T, z, y, x) to (directions, batch, z, y, x)."""
        s = self.simulation
        y = torch.as_tensor(cotangents, dtype=torch.float64)[..., torch.tensor(s.domain.mask)]
        found = []
        for i, one in enumerate(self.maps):
            back = by_matrix(s.exchange.average.T, y[:, i].transpose(0, 1)).numpy()
            found.append(torch.from_numpy(s.exchange.to_nodes_transposed(one.pull(np.ascontiguousarray(back)))))
        return s._spread(torch.stack(found, 1))
