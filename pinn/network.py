"""A small multilayer perceptron with the derivatives that a diffusion equation needs, written out by hand.

Value, time derivative, gradient and Laplacian are propagated forwards through the layers together (a "forward
Laplacian", Li et al. 2024, Nat Mach Intell 6:209, doi:10.1038/s42256-024-00794-x), and the derivative of each sample's
residual by all weights backwards in one sweep. For networks of some hundred weights that costs less than the matrix
product J'J of a Gauss-Newton step, where automatic differentiation would cost many times more.

Space enters through cosines only, cos(m pi x_i) on the unit box: their normal derivative vanishes on every side, so
whatever the weights are, nothing flows through the boundary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

#: Coefficients of the derivative of tanh's second derivative and the like are written with s = tanh z:
#: s' = 1 - s², s'' = -2 s s', s''' = -2 (s'² + s s'').


@dataclass(frozen=True, eq=False)
class Network:
    """Tanh layers from (position, time) to one number N; the weights are a flat vector held by the caller.

    Attributes
    ----------
    metric : tensor, shape (d,)
        Weights a_i of the second derivatives in the Laplacian sum_i a_i N_ii.
    frequencies : int
        Cosines per axis.
    hidden : tuple of int
        Units per layer.
    further : int
        Further inputs that the caller gives beside cosines and time.
    """

    metric: torch.Tensor
    frequencies: int = 5
    hidden: tuple[int, ...] = (20, 20)
    further: int = 0

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of inputs, of units of each layer, and of outputs."""
        return (len(self.metric) * self.frequencies + 1 + self.further, *self.hidden, 1)

    @property
    def count(self) -> int:
        """Number of weights."""
        return sum((i + 1) * o for i, o in zip(self.sizes[:-1], self.sizes[1:], strict=True))

    def start(self, seed: int) -> torch.Tensor:
        """Random weights (count,) by Glorot and Bengio; the last layer starts at a tenth of that."""
        generator = torch.Generator().manual_seed(seed)
        parts = []
        last = len(self.sizes) - 2
        for k, (i, o) in enumerate(zip(self.sizes[:-1], self.sizes[1:], strict=True)):
            scale = math.sqrt(2.0 / (i + o)) * (0.1 if k == last else 1.0)
            parts.append(scale * torch.randn(o, i, generator=generator, dtype=torch.float64).reshape(-1))
            parts.append(torch.zeros(o, dtype=torch.float64))
        return torch.cat(parts)

    def layers(self, w: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Matrices (out, in) and biases (out,) of the layers."""
        found, at = [], 0
        for i, o in zip(self.sizes[:-1], self.sizes[1:], strict=True):
            found.append((w[at : at + o * i].reshape(o, i), w[at + o * i : at + o * (i + 1)]))
            at += o * (i + 1)
        return found

    def inputs(self, x: torch.Tensor, tau: torch.Tensor, further: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Input features with their derivatives.

        Parameters
        ----------
        x : tensor, shape (n, d)
            Position on the unit box.
        tau : tensor, shape (n,)
            Time in [0, 1].
        further : sequence of tensor
            `further` tensors (d + 3, n): value, derivatives and Laplacian of an input.

        Returns
        -------
        tensor, shape (d + 3, n, inputs)
            Value, derivative by time, d derivatives by position, Laplacian.
        """
        n, d = x.shape
        m = math.pi * torch.arange(1, self.frequencies + 1, dtype=torch.float64)
        angle = x[:, :, None] * m
        cos, sin = torch.cos(angle), torch.sin(angle)
        found = torch.zeros(d + 3, n, self.sizes[0], dtype=torch.float64)
        for i in range(d):
            here = slice(i * self.frequencies, (i + 1) * self.frequencies)
            found[0, :, here] = cos[:, i]
            found[2 + i, :, here] = -m * sin[:, i]
            found[-1, :, here] = -self.metric[i] * m**2 * cos[:, i]
        at = d * self.frequencies
        found[0, :, at], found[1, :, at] = 2 * tau - 1, 2.0
        for j, channels in enumerate(further):
            found[:, :, at + 1 + j] = channels
        return found

    def features(self, x: torch.Tensor, tau: torch.Tensor, further: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Input features alone (n, inputs); `further` are values (n,)."""
        m = math.pi * torch.arange(1, self.frequencies + 1, dtype=torch.float64)
        cosines = torch.cos(x[:, :, None] * m).reshape(len(x), -1)
        return torch.cat((cosines, torch.stack((2 * tau - 1, *further), 1)), 1)

    def forward(self, w: torch.Tensor, inputs: torch.Tensor) -> tuple[torch.Tensor, list]:
        """Channels (d + 3, n) of the output, and what `jacobian` needs of the layers."""
        kept = []
        layers = self.layers(w)
        h = inputs
        for matrix, bias in layers[:-1]:
            z = h @ matrix.T
            z[0] += bias
            kept.append((h, z))
            h = self._activate(z)
        matrix, bias = layers[-1]
        out = (h @ matrix.T)[..., 0]
        out[0] += bias
        kept.append((h, out))
        return out, kept

    def _activate(self, z: torch.Tensor) -> torch.Tensor:
        s = torch.tanh(z[0])
        s1 = 1 - s * s
        out = s1 * z
        out[0] = s
        out[-1] += -2 * s * s1 * (self.metric[:, None, None] * z[2:-1] ** 2).sum(0)
        return out

    def jacobian(self, w: torch.Tensor, kept: list, cotangents: torch.Tensor) -> torch.Tensor:
        """Derivatives (n, count) by the weights of sum_c cotangents[c] channel[c], sample by sample.

        Parameters
        ----------
        cotangents : tensor, shape (d + 3, n)
        """
        layers = self.layers(w)
        parts: list[torch.Tensor] = []
        g = cotangents[..., None]
        n = cotangents.shape[1]
        for k in range(len(layers) - 1, -1, -1):
            h = kept[k][0]
            if k < len(layers) - 1:
                g = self._back(kept[k][1], g)
            parts[:0] = [torch.einsum("cno,cni->noi", g, h).reshape(n, -1), g[0]]
            if k:
                g = g @ layers[k][0]
        return torch.cat(parts, 1)

    def _back(self, z: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        a = self.metric[:, None, None]
        s = torch.tanh(z[0])
        s1 = 1 - s * s
        s2 = -2 * s * s1
        s3 = -2 * (s1 * s1 + s * s2)
        square = (a * z[2:-1] ** 2).sum(0)
        back = s1 * g
        back[0] += s2 * (z[1:] * g[1:]).sum(0) + s3 * square * g[-1]
        back[2:-1] += 2 * s2 * a * z[2:-1] * g[-1]
        return back

    def value(self, w: torch.Tensor, features: torch.Tensor, directions: torch.Tensor | None = None
              ) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
        """Values (n,) and their derivatives (p, n) along directions (p, count) of the weights.

        Parameters
        ----------
        features : tensor, shape (n, inputs)
            As from `features`, or the first channel of `inputs`.
        """
        h, dh = features, None
        layers = self.layers(w)
        along = None if directions is None else [self.layers(v) for v in directions]
        for k, (matrix, bias) in enumerate(layers):
            z, dz = h @ matrix.T + bias, None
            if along is not None:
                dz = torch.stack([h @ one[k][0].T + one[k][1] for one in along])
                dz = dz if dh is None else dz + dh @ matrix.T
            if k == len(layers) - 1:
                return z[:, 0], None if dz is None else dz[..., 0]
            h = torch.tanh(z)
            dh = None if dz is None else (1 - h * h) * dz
        raise AssertionError("a network has at least one layer")
