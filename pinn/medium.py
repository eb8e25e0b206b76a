"""What varies in space at a residual's points: diffusivity, what treatment has spared, and fields of the growth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from pinn.physics import Physics, slope
from pinn.splines import Splines


class Bend(NamedTuple):
    """Slopes (d, n) and Laplacian (n,) of a field."""

    slopes: torch.Tensor
    laplacian: torch.Tensor


class Medium:
    """Diffusivity and treatment at points x (n, d) and times tau (n,), for the parameters that `hold` was given.

    Attributes
    ----------
    diffusion : tensor, shape (n,) or ()
    diffusion_slopes : tensor, shape (d, n), or None where it is uniform
    exponent : tensor, shape (n,)
        Minus the log of S.
    bend : Bend
        Derivatives of the exponent by place, or None where S is the same everywhere.
    """

    def __init__(self, physics: Physics, x: torch.Tensor, tau: torch.Tensor):
        self.physics, self.tau = physics, tau
        self.splines = Splines.of(x, physics.shape) if physics.rough else None
        self._maps: dict[str, torch.Tensor] = {}
        self._growth: dict[str, torch.Tensor] = {}
        if self.splines is not None:
            if physics.treated:
                self._maps = {n: self.splines.all(physics.fields[n], physics.metric) for n in set(physics.maps)}
            self._growth = {n: self.splines.value(physics.fields[n]) for n in physics.model.growth.fields}

    def hold(self, values: Mapping[str, float]) -> None:
        """Set the parameters."""
        self.values = dict(values)
        self.diffusion: torch.Tensor = torch.tensor(0.0)
        self.diffusion_slopes: torch.Tensor | None = None
        if self.physics.uniform:
            self.diffusion = torch.tensor(self.physics.diffusion(values), dtype=torch.float64)
        else:
            self.diffusion, self.diffusion_slopes = self._sampled(self.physics.coefficient(values))
        self.exponent = self.spared(self.tau)
        self.bend = Bend(*self._derived(None)[1:]) if self._maps else None

    def _sampled(self, field: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.splines is not None
        found = self.splines.slopes(self.physics.geometry.continued(field))
        return found[0], found[1:]

    def spared(self, tau: torch.Tensor) -> torch.Tensor:
        """Minus the log of S (n,) at the points at other times (n,)."""
        return self.physics.spared(self.values, tau, {n: m[0] for n, m in self._maps.items()})

    def growth(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Growth per span at cell fractions u (n,), and its slope in u."""
        return self.physics.growth(self.values, u, self._growth)

    def growth_along(self, u: torch.Tensor, name: str) -> torch.Tensor | None:
        """Derivative of the growth by a parameter, or None where it has none."""
        return self.physics.growth_along(self.values, u, name, self._growth)

    def diffusion_along(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Derivative of diffusivity and its slopes by a parameter, or None where they have none."""
        if name == self.physics.diffusivity:
            return torch.tensor(self.physics.scale, dtype=torch.float64), None
        change = self.physics.coefficient_along(self.values, name)
        return None if change is None else self._sampled(change)

    def exponent_along(self, name: str) -> tuple[torch.Tensor, Bend | None] | None:
        """Derivative of the exponent and of its bend by a parameter, or None where they have none."""
        if self._maps and self.physics.kills(name):
            change, slopes, laplacian = self._derived(name)
            return change, Bend(slopes, laplacian)
        alone = self.physics.spared_along(self.values, self.tau, name)
        return None if alone is None else (alone, None)

    def _derived(self, name: str | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The exponent's value, slopes and Laplacian by the chain rule through the drug maps, or their derivatives."""
        maps = {n: m[0].detach().requires_grad_() for n, m in self._maps.items()}
        values: dict = dict(self.values)
        if name is not None:
            values[name] = torch.full_like(self.tau, self.values[name]).requires_grad_()
        s = self.physics.spared(values, self.tau, maps)
        first = {n: slope(s, m, keep=True) for n, m in maps.items()}
        second = {n: slope(f, maps[n], keep=True) for n, f in first.items()}
        if name is not None:
            by = values[name]
            s = slope(s, by)
            first = {n: slope(f, by) for n, f in first.items()}
            second = {n: slope(f, by) for n, f in second.items()}
        metric = self.physics.metric[:, None]
        slopes = sum((first[n] * m[1:-1] for n, m in self._maps.items()), torch.tensor(0.0))
        laplacian = sum(
            (first[n] * m[-1] + second[n] * (metric * m[1:-1] ** 2).sum(0) for n, m in self._maps.items()),
            torch.tensor(0.0),
        )
        return s.detach(), slopes.detach(), laplacian.detach()
