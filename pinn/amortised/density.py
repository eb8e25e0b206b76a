"""A conditional density: a mixture of Gaussians with full covariances whose numbers a network gives.

Trained by the negative log density of the parameters that made the data, it becomes their posterior (neural posterior
estimation: Papamakarios and Murray 2016, arXiv:1605.06376; mixture density networks: Bishop 1994, Aston University
NCRG/94/004). With a handful of parameters in transformed coordinates, posteriors are bent Gaussians, for which a few
components do; a flow would cost more to train.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

#: Largest magnitude of the log of a precision root's diagonal entry: standard deviations between 5e-4 and 2000.
STEEPEST = 7.6


@dataclass(eq=False)
class Mixture:
    """Mixtures of Gaussians, one per patient.

    Attributes
    ----------
    log_weights : tensor, shape (n, k)
    means : tensor, shape (n, k, p)
    roots : tensor, shape (n, k, p, p)
        Upper triangular R with precision R' R, the diagonal positive.
    """

    log_weights: torch.Tensor
    means: torch.Tensor
    roots: torch.Tensor

    def log_density(self, x: torch.Tensor) -> torch.Tensor:
        """Log density (n,) of points (n, p); those of one patient may be evaluated anywhere."""
        off = (self.roots @ (x[:, None] - self.means)[..., None])[..., 0]
        log = torch.log(torch.diagonal(self.roots, dim1=-2, dim2=-1)).sum(-1)
        each = self.log_weights + log - 0.5 * (off**2).sum(-1) - 0.5 * x.shape[1] * math.log(2 * math.pi)
        return torch.logsumexp(each, 1)

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Draws (n, count, p)."""
        n, _, p = self.means.shape
        which = torch.multinomial(self.log_weights.exp(), count, True, generator=generator)
        white = torch.randn(n, count, p, 1, generator=generator, dtype=self.means.dtype, device=self.means.device)
        rows = torch.arange(n, device=which.device)[:, None]
        moved = torch.linalg.solve_triangular(self.roots[rows, which], white, upper=True)[..., 0]
        return self.means[rows, which] + moved

    def moments(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Means (n, p) and covariances (n, p, p)."""
        weights = self.log_weights.exp()
        mean = torch.einsum("nk,nkp->np", weights, self.means)
        inverse = torch.linalg.solve_triangular(
            self.roots, torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device).expand_as(self.roots), upper=True
        )
        off = self.means - mean[:, None]
        within = inverse @ inverse.transpose(-1, -2)
        return mean, torch.einsum("nk,nkij->nij", weights, within + off[..., :, None] * off[..., None, :])


class MixtureHead(torch.nn.Module):
    """Features (n, f) to a `Mixture` over p coordinates.

    Parameters
    ----------
    features, coordinates : int
    components : int
    hidden : tuple of int
    seed : int
    """

    upper: torch.Tensor

    def __init__(self, features: int, coordinates: int, components: int = 3, hidden: tuple[int, ...] = (128, 128),
                 seed: int = 0):  # fmt: skip
        super().__init__()
        self.coordinates, self.components = coordinates, components
        p, sizes = coordinates, (features, *hidden)
        self.each = 1 + p + p + p * (p - 1) // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers: list[torch.nn.Module] = []
            for before, after in zip(sizes[:-1], sizes[1:], strict=True):
                layers += [torch.nn.Linear(before, after, dtype=torch.float64), torch.nn.SiLU()]
            self.body = torch.nn.Sequential(*layers)
            self.last = torch.nn.Linear(sizes[-1], components * self.each, dtype=torch.float64)
            with torch.no_grad():
                # Standard normal components to begin with, a little apart.
                self.last.weight *= 0.1
                self.last.bias.zero_()
                bias = self.last.bias.reshape(components, self.each)
                bias[:, 1 : 1 + p] = 0.3 * torch.randn(components, p, dtype=torch.float64)
        self.register_buffer("upper", torch.triu_indices(p, p, 1))

    def forward(self, features: torch.Tensor) -> Mixture:
        """The mixtures."""
        p = self.coordinates
        raw = self.last(self.body(features)).reshape(-1, self.components, self.each)
        # Bounded smoothly: an exponent that runs away early would never come back.
        diagonal = torch.exp(STEEPEST * torch.tanh(raw[..., 1 + p : 1 + 2 * p] / STEEPEST))
        roots = torch.diag_embed(diagonal)
        roots[..., self.upper[0], self.upper[1]] = raw[..., 1 + 2 * p :]
        return Mixture(torch.log_softmax(raw[..., 0], 1), raw[..., 1 : 1 + p], roots)
