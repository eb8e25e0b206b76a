"""One focus as torch sees it, for many patients at once: voxel averages, spread by diffusion, fitted to noisy maps.

A Gaussian is a product over the axes, and so are its averages over voxels (differences of error functions) and its
derivatives. Sums over an image are then products with three short vectors per axis: a least-squares fit of a thousand
images takes milliseconds.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from biomodel.domain import Domain
from biomodel.solvers.reaction import TorchOps
from pinn.joint.starts import BoundFoci, Foci

#: Voxels over which an image is blurred before its highest point is taken for the focus's place.
BLUR = 2.0
#: Gauss-Newton steps of a fit, and the longest in prior standard deviations.
STEPS, LONGEST = 10, 1.0


class FocusMaps(torch.nn.Module):
    """A focus on the voxels of a domain.

    Coordinates z (n, d + 2) are those of :class:`pinn.joint.starts.Foci`: positions in mm, peak and width transformed.

    Parameters
    ----------
    foci : Foci
    domain : Domain
    """

    steps: torch.Tensor
    prior_mean: torch.Tensor
    prior_sd: torch.Tensor

    def __init__(self, foci: Foci, domain: Domain):
        super().__init__()
        bound: BoundFoci = foci.on(domain)
        self.peak, self.width, self.shape = foci.peak, foci.width, domain.shape
        self.axes = [axis for axis, _ in bound.axes]
        steps = [float(domain.spacing[a]) for a in self.axes]
        self.register_buffer("steps", torch.tensor(steps, dtype=torch.float64))
        for axis, edges in zip(self.axes, bound.edges, strict=True):
            self.register_buffer(f"edges{axis}", torch.tensor(edges))
            centres = (edges[:-1] + edges[1:]) / 2
            near = np.exp(-((centres[:, None] - centres) ** 2) / (2 * (BLUR * domain.spacing[axis]) ** 2))
            self.register_buffer(f"blur{axis}", torch.tensor(near / near.sum(1, keepdims=True)))
        self.register_buffer("prior_mean", torch.tensor(bound.prior.mean))
        self.register_buffer("prior_sd", torch.tensor(bound.prior.sd))

    def edges(self, axis: int) -> torch.Tensor:
        """Edges of the voxels along an axis, mm."""
        return getattr(self, f"edges{axis}")

    def shape_of(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Positions (n, d) in mm, peaks (n,) and widths (n,) in mm."""
        return z[:, :-2], self.peak.to_value(z[:, -2], TorchOps), self.width.to_value(z[:, -1], TorchOps)

    def _vectors(self, z: torch.Tensor) -> list[torch.Tensor]:
        """Along each of the axes (z, y, x), (n, 3, voxels): the profile and its derivatives by place and log width."""
        place, _, width = self.shape_of(z)
        found = []
        for axis in range(3):
            if axis not in self.axes:
                one = torch.zeros(len(z), 3, self.shape[axis], dtype=z.dtype, device=z.device)
                one[:, 0] = 1.0
                found.append(one)
                continue
            edges = self.edges(axis)
            step = edges[1] - edges[0]
            t = (edges - place[:, self.axes.index(axis), None]) / width[:, None]
            bell = torch.exp(-0.5 * t * t)
            scale = width[:, None] / step
            profile = scale * math.sqrt(math.pi / 2) * torch.erf(t / math.sqrt(2)).diff(dim=1)
            found.append(torch.stack((profile, -bell.diff(dim=1) / step, profile - scale * (t * bell).diff(dim=1)), 1))
        return found

    def states(self, z: torch.Tensor) -> torch.Tensor:
        """Voxel averages (n, z, y, x)."""
        a, b, c = (v[:, 0] for v in self._vectors(z))
        return self.shape_of(z)[1][:, None, None, None] * torch.einsum("ni,nj,nk->nijk", a, b, c)

    def spread(self, z: torch.Tensor, x: torch.Tensor, diffused: torch.Tensor) -> torch.Tensor:
        """The focus after diffusion alone, averaged over a voxel around each point.

        Parameters
        ----------
        x : tensor, shape (n, m, d)
            Points, mm.
        diffused : tensor, shape (n,)
            Diffusivity times time, mm².

        Returns
        -------
        tensor, shape (n, m)
            Zero flux is kept on the box by reflections, also of what of the focus lies beyond a wall; the start of a
            focus that a wall cuts off is therefore met only away from that wall.
        """
        place, peak, width = self.shape_of(z)
        wide = torch.sqrt(width**2 + 2 * diffused)[:, None]
        total = peak[:, None]
        for j, axis in enumerate(self.axes):
            edges, half = self.edges(axis), self.steps[j] / 2
            total = total * width[:, None] / wide
            images = torch.zeros_like(x[..., j])
            for centre in (place[:, j], 2 * edges[0] - place[:, j], 2 * edges[-1] - place[:, j]):
                off = (x[..., j] - centre[:, None]) / (math.sqrt(2) * wide)
                span = half / (math.sqrt(2) * wide)
                images = images + torch.erf(off + span) - torch.erf(off - span)
            total = total * images * math.sqrt(math.pi / 2) * wide / (2 * half)
        return total

    @torch.no_grad()
    def fit(self, images: torch.Tensor, noise: torch.Tensor, spread: float = 1.0,
            where: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Most probable focus behind noisy maps, and its uncertainty.

        Parameters
        ----------
        images : tensor, shape (n, z, y, x)
        noise : tensor, shape (n,)
            Standard deviation of a voxel.
        spread : float
            Factor on the prior's standard deviations.
        where : tensor, shape (n, z, y, x), optional
            Maps whose highest point, once blurred, the search starts from; `images` by default.

        Returns
        -------
        z, sd : tensor, shape (n, d + 2)
        """
        sd = self.prior_sd * spread
        z = self._guess(images, images if where is None else where)
        for _ in range(STEPS):
            gradient, hessian = self._quadratic(z, images, noise, sd)
            move = torch.linalg.solve(hessian, gradient)
            longest = (move.abs() / self.prior_sd).amax(1, keepdim=True)
            z = z + move / torch.clamp(longest / LONGEST, min=1.0)
        covariance = torch.linalg.inv(self._quadratic(z, images, noise, sd)[1])
        return z, torch.sqrt(torch.diagonal(covariance, dim1=1, dim2=2))

    def _blurred(self, images: torch.Tensor) -> torch.Tensor:
        for axis in self.axes:
            blur = getattr(self, f"blur{axis}")
            images = torch.tensordot(images, blur, dims=([axis + 1], [1])).movedim(-1, axis + 1)
        return images.reshape(len(images), -1)

    def _guess(self, images: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        index = self._blurred(where).argmax(1)
        top = self._blurred(images).gather(1, index[:, None])[:, 0]
        z = self.prior_mean.repeat(len(images), 1)
        width = float(self.width.to_value(float(self.prior_mean[-1])))
        for j, axis in enumerate(self.axes):
            at = (index // math.prod(self.shape[axis + 1 :])) % self.shape[axis]
            edges = self.edges(axis)
            z[:, j] = (edges[at] + edges[at + 1]) / 2
            top = top * math.sqrt(1 + (BLUR * float(self.steps[j]) / width) ** 2)
        z[:, -2] = self.peak.to_z(top.clamp(0.03, 0.95), TorchOps)
        return z

    def _quadratic(self, z, images, noise, sd) -> tuple[torch.Tensor, torch.Tensor]:
        """Minus the gradient (n, p) and the Gauss-Newton Hessian (n, p, p) of misfit and prior."""
        vectors, (_, peak, _) = self._vectors(z), self.shape_of(z)
        slope = (self.peak.to_value(z[:, -2] + 1e-3, TorchOps) - self.peak.to_value(z[:, -2] - 1e-3, TorchOps)) / 2e-3
        by = images
        for v in reversed(vectors):  # contract x, then y, then z; what is left are the three vectors of each axis
            by = torch.einsum("n...i,nki->nk...", by, v)
        gram = [torch.einsum("nai,nbi->nab", v, v) for v in vectors]
        plain = (0, 0, 0)
        # Each column of the derivative as a sum of products over the axes.
        columns = [(peak, [_at(axis, 1)]) for axis in self.axes]
        columns += [(slope, [plain]), (peak, [_at(axis, 2) for axis in self.axes])]

        def inner(one: tuple[int, int, int], two: tuple[int, int, int]) -> torch.Tensor:
            return gram[0][:, one[0], two[0]] * gram[1][:, one[1], two[1]] * gram[2][:, one[2], two[2]]

        weight = noise**-2
        gradient, hessian = torch.empty_like(z), torch.empty(*z.shape, z.shape[1], dtype=z.dtype, device=z.device)
        for i, (scale, parts) in enumerate(columns):
            # `by` has the axes' vectors in the order z, y, x.
            seen = sum(by[:, p[0], p[1], p[2]] - peak * inner(p, plain) for p in parts)
            gradient[:, i] = weight * scale * seen
            for j, (other, against) in enumerate(columns[: i + 1]):
                value = weight * scale * other * sum(inner(p, q) for p in parts for q in against)
                hessian[:, i, j] = hessian[:, j, i] = value
        gradient = gradient - (z - self.prior_mean) / sd**2
        return gradient, hessian + torch.diag(sd**-2)


def _at(axis: int, which: int) -> tuple[int, int, int]:
    found = [0, 0, 0]
    found[axis] = which
    return found[0], found[1], found[2]
