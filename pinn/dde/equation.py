"""The strong residual of a model's equation for any network, by DeepXDE's derivatives and by `torch.func`.

Places are on the unit box, times tau in [0, 1] over the span. With S the fraction that treatment has spared, u = S w,
and the network gives w, which is continuous in time where u jumps. The residual, in cell fraction per span, is that of
:mod:`pinn.residuals`, with a_i the squares of the longest side over the box's own sides:

    S w_tau - sum_i a_i (D u_i)_i - growth(u).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.func import jvp

from biomodel.solvers.base import Context
from biomodel.solvers.reaction import TorchOps
from pinn.dde.backend import dde
from pinn.physics import Physics
from pinn.splines import Splines

Values = Mapping[str, Any]


class Equation:
    """A model's equation between places, times and the network's w.

    Parameters
    ----------
    physics : Physics

    Attributes
    ----------
    names : tuple of str
        Free parameters; z (p,) are their priors' coordinates, in this order.
    """

    def __init__(self, physics: Physics):
        self.physics, self.model = physics, physics.model
        self.names = physics.model.free
        self.d = len(physics.shape)

    def values(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """Parameters by name at coordinates z (p,), the known ones included."""
        found = {}
        for name, parameter in self.model.parameters.items():
            if parameter.fixed:
                found[name] = torch.as_tensor(parameter.typical, dtype=torch.float64, device=z.device)
            else:
                found[name] = parameter.prior.to_value(z[self.names.index(name)], TorchOps)
        return found

    # Pointwise, at x (n, d + 1) ---------------------------------------------------------------------------------------

    def _fields(self, x: torch.Tensor, names) -> dict[str, torch.Tensor]:
        names = tuple(dict.fromkeys(names))
        if not names:
            return {}
        splines = Splines.of(x[:, : self.d], self.physics.shape)
        return {n: splines.value(self.physics.fields[n]) for n in names}

    def spared(self, values: Values, x: torch.Tensor) -> torch.Tensor:
        """S (n,)."""
        maps = self._fields(x, self.physics.maps)
        exponent = self.physics.spared(values, x[:, self.d], maps)
        return torch.exp(-exponent)

    def diffusivity(self, values: Values, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """D (n,), in units of the box's longest side squared per span."""
        physics, term = self.physics, self.model.diffusion
        if physics.uniform:
            name = physics.diffusivity
            return torch.zeros_like(u) if name is None else physics.scale * values[name].expand(len(x))
        splines = Splines.of(x[:, : self.d], physics.shape)
        around = {n: physics.fields[n].reshape(-1)[splines.index] for n in term.fields}
        found = term.coefficient(u[:, None], self.model.of(term, values), Context(**around), TorchOps)
        return physics.scale * (found * splines.weights[0]).sum(1)

    def growth(self, values: Values, x: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Growth of the cell fraction (n,) per span."""
        term = self.model.growth
        c = Context(**self._fields(x, term.fields))
        return self.physics.span * term.rate(u, self.model.of(term, values), c, TorchOps)

    # Residuals --------------------------------------------------------------------------------------------------------

    def strong(self, z: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Residual (n, 1) by DeepXDE's derivatives, of inputs x (n, d + 1) and outputs w (n, 1) in its graph."""
        values, metric = self.values(z), self.physics.metric
        s = self.spared(values, x)[:, None]
        u = s * w
        spread = self.diffusivity(values, x, u[:, 0])[:, None]
        flow = s * dde.grad.jacobian(w, x, i=0, j=self.d) - self.growth(values, x, u[:, 0])[:, None]
        for i in range(self.d):
            if self.physics.uniform and not self.physics.maps:
                flow = flow - metric[i] * spread * dde.grad.hessian(u, x, i=i, j=i)
            else:
                flux = spread * dde.grad.jacobian(u, x, i=0, j=i)
                flow = flow - metric[i] * dde.grad.jacobian(flux, x, i=0, j=i)
        return flow

    def pointwise(self, w: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Residual (n,) at x (n, d + 1) of a function w, (n, d + 1) to (n,), point by point, for `torch.func`."""
        values, metric, units = self.values(z), self.physics.metric, torch.eye(self.d + 1, dtype=x.dtype)
        plain = self.physics.uniform and not self.physics.maps

        def u(y: torch.Tensor) -> torch.Tensor:
            return w(y) if plain else self.spared(values, y) * w(y)

        w_here, change = jvp(w, (x,), (units[-1].expand_as(x),))[:2]
        s = self.spared(values, x)
        here = s * w_here
        flow = s * change - self.growth(values, x, here)
        for i in range(self.d):
            direction = units[i].expand_as(x)

            def flux(y: torch.Tensor, direction=direction) -> torch.Tensor:
                value, slope = jvp(u, (y,), (direction,))[:2]
                return slope if plain else slope * self.diffusivity(values, y, value)

            spread = jvp(flux, (x,), (direction,))[1]
            if plain:
                spread = s * spread * self.diffusivity(values, x, here)
            flow = flow - metric[i] * spread
        return flow

    def state(self, w: torch.Tensor, z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Cell fraction (n,) of w (n,) at x (n, d + 1)."""
        return self.spared(self.values(z), x) * w

    def flux(self, w: Callable[[torch.Tensor], torch.Tensor], z: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Flux (n,) through a surface at points (place, time, conormal) (n, 2 d + 1), in the residual's units.

        The conormal is the outward normal in mm, each entry times the box's longest side over its own; the flux is
        divided by a voxel's side, so that it is the loss of a layer of that depth.
        """
        place, normal = x[:, : self.d + 1], x[:, self.d + 1 :]
        values = self.values(z)

        def u(y: torch.Tensor) -> torch.Tensor:
            return self.spared(values, y) * w(y)

        towards = torch.cat((normal, torch.zeros_like(normal[:, :1])), 1)
        value, slope = jvp(u, (place,), (towards,))[:2]
        return slope * self.diffusivity(values, place, value) / self.layer

    @property
    def layer(self) -> float:
        """A voxel's side in units of the box's longest."""
        return float(self.physics.geometry.spacing.max()) / self.physics.length
