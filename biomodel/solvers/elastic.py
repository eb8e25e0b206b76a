"""Elastic equilibrium on voxels: trilinear elements, conjugate gradients with multigrid, and the implicit adjoint.

A voxel is an element: displacements sit at the corners, Young's modulus and the pressure of the cells are constant
inside, and stress is given as its mean over the voxel. Displacement and stress are second order in the voxel's size.
Bubbles inside each voxel, eliminated in its matrix, keep elements from being too stiff where tissue bends or, with
Poisson's ratio near 0.5, hardly changes its volume (`tests/numerics/test_mechanics.py` prints what is left).

Axes of length one are not deformed: two dimensions are plane strain.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from scipy.ndimage import label

from biomodel.errors import NotFiniteError, SolverError
from biomodel.solvers.elastic_kernels import TorchElastic, lame
from biomodel.solvers.multigrid import Multigrid, corner_sums, make_grids, pad_to

#: Most iterations of conjugate gradients; moduli that differ by a factor of ten need about 25.
ITERATIONS = 300
#: Stress (kPa) below which the von Mises stress, which has a kink at zero, is rounded off.
ROUNDED = 1e-6


class Body:
    """An elastic body on voxels: grids, boundary, and what was last computed for its moduli.

    Parameters
    ----------
    mask : Tensor of bool, shape (z, y, x)
    spacing : (dz, dy, dx), mm
    poisson : float
        Poisson's ratio, the same everywhere.
    clamped : bool
        Whether displacements are zero at the mask's edge; else the edge carries no traction.

    Raises
    ------
    SolverError
        If nothing can move, or a body without support has parts that do not hang together.
    """

    def __init__(self, mask: torch.Tensor, spacing: tuple[float, float, float], poisson: float, clamped: bool):
        self.mask, self.poisson, self.spacing = mask, poisson, spacing
        around = corner_sums(mask.to(torch.float64))
        full = 2 ** sum(n > 1 for n in mask.shape)
        moves = torch.tensor([n > 1 for n in reversed(mask.shape)], device=mask.device)
        free = ((around == full) if clamped else (around > 0)) & moves.reshape(3, 1, 1, 1)
        if not bool(free.any()):
            raise SolverError(
                "mechanics: the mask is nowhere two voxels thick, so that nothing can move between its edges; refine "
                "the grid or use TractionFree()."
            )
        if not clamped:
            count = label(mask.cpu().numpy())[1]
            if count > 1:
                raise SolverError(
                    f"mechanics: without support the mask must be one piece, but it has {count} that share no face; "
                    "keep the largest, or use Clamped()."
                )
        self.grids = make_grids(mask, free.to(torch.float64), spacing, poisson)
        self.rigid = None if clamped else self._rigid_motions()
        self._known: tuple[torch.Tensor, Multigrid] | None = None

    @property
    def free(self) -> torch.Tensor:
        """1 where a displacement is unknown, (3, nz + 1, ny + 1, nx + 1) of the padded grid."""
        return self.grids[0].free

    def _rigid_motions(self) -> torch.Tensor:
        """Orthonormal translations and rotations, (motions, 3 × corners)."""
        free = self.free
        steps = [torch.arange(n, dtype=torch.float64, device=free.device) * h
                 for n, h in zip(free.shape[1:], self.spacing, strict=True)]  # fmt: skip
        z, y, x = torch.meshgrid(*(s - s.mean() for s in steps), indexing="ij")
        place, held = (x, y, z), [n == 1 for n in reversed(self.mask.shape)]
        motions = []
        for c in range(3):
            if not held[c]:
                motion = torch.zeros_like(free)
                motion[c] = 1.0
                motions.append(motion)
            a, b = (c + 1) % 3, (c + 2) % 3
            if not held[a] and not held[b]:
                motion = torch.zeros_like(free)
                motion[a], motion[b] = -place[b], place[a]
                motions.append(motion)
        return torch.linalg.qr((torch.stack(motions) * free).reshape(len(motions), -1).T)[0].T

    def without_rigid(self, w: torch.Tensor) -> torch.Tensor:
        """`w` without its part in rigid motions, where the body has no support."""
        if self.rigid is None:
            return w
        flat = w.reshape(w.shape[0], -1)
        return (flat - (flat @ self.rigid.T) @ self.rigid).reshape(w.shape)

    def multigrid(self, young: torch.Tensor) -> Multigrid:
        """Levels for these moduli (batch or 1, padded z, y, x), kept until others are asked for."""
        young = young.detach()
        if self._known is None or self._known[0].shape != young.shape or not torch.equal(self._known[0], young):
            self._known = (young.clone(), Multigrid(self.grids, young))
        return self._known[1]

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """A field on voxels, 0 outside the mask, on the padded grid."""
        return pad_to(torch.where(self.mask, x, 0.0), self.grids[0].shape)

    def forces(self, pressure: torch.Tensor) -> torch.Tensor:
        """Nodal forces of the pressure (batch, padded z, y, x): its integral times the divergence of each motion."""
        volume = float(np.prod(self.spacing))
        components = []
        for c, h in enumerate(self.spacing[::-1]):
            f = pressure * (volume / (4 * h))
            for axis in (-3, -2, -1):
                pad = [0] * 6
                pad[2 * (-axis - 1)] = pad[2 * (-axis - 1) + 1] = 1
                f = torch.nn.functional.pad(f, pad)
                n = f.shape[axis] - 1
                low, high = f.narrow(axis, 0, n), f.narrow(axis, 1, n)
                f = low - high if axis == -1 - c else low + high
            components.append(f)
        return torch.stack(components, 1) * self.free

    def strain(self, w: torch.Tensor) -> dict[tuple[int, int], torch.Tensor]:
        """Mean strain over each voxel of the mask's grid by component pairs (x = 0, y = 1, z = 2), i <= j."""
        slope = {}
        for c in range(3):
            for d, h in enumerate(self.spacing[::-1]):
                f = w[:, c]
                for axis in (-3, -2, -1):
                    n = f.shape[axis] - 1
                    low, high = f.narrow(axis, 0, n), f.narrow(axis, 1, n)
                    f = (high - low) / h if axis == -1 - d else (low + high) / 2
                nz, ny, nx = self.mask.shape
                slope[c, d] = f[..., :nz, :ny, :nx]
        return {(i, j): (slope[i, j] + slope[j, i]) / 2 for i in range(3) for j in range(i, 3)}

    def von_mises(self, young: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """Von Mises stress of the mean strain over each voxel (batch, z, y, x), in the modulus's unit."""
        e = self.strain(w)
        mean = (e[0, 0] + e[1, 1] + e[2, 2]) / 3
        square = sum((e[i, i] - mean) ** 2 for i in range(3)) + 2 * (e[0, 1] ** 2 + e[0, 2] ** 2 + e[1, 2] ** 2)
        shear = torch.where(self.mask, lame(young, self.poisson)[0], 0.0)
        return torch.sqrt(6 * shear**2 * square + ROUNDED**2) - ROUNDED

    def solve(self, young: torch.Tensor, force: torch.Tensor, rtol: float,
              recycled: Sequence[torch.Tensor] = ()) -> torch.Tensor:  # fmt: skip
        """Displacements in equilibrium with nodal forces; differentiable by moduli and forces.

        Parameters
        ----------
        young : Tensor, shape (batch or 1, padded z, y, x)
        force : Tensor, shape (batch, 3, corners)
        rtol : float
            Residual, relative to the force, at which conjugate gradients stop.
        recycled : sequence of Tensor
            Earlier displacements, whose best combination is the start.
        """
        return _Equilibrium.apply(self, rtol, tuple(recycled), young, force)

    def equilibrium(self, young: torch.Tensor, pressure: torch.Tensor, rtol: float,
                    recycled: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Von Mises stress (batch, z, y, x) and displacements under the pressure of the cells.

        Parameters
        ----------
        young, pressure : Tensor, shape (batch or 1, z, y, x)
            Young's modulus and pressure on the mask's grid, in the same unit.

        Raises
        ------
        SolverError
            If a modulus is not positive, or conjugate gradients do not converge.
        """
        inside = young.detach()[..., self.mask]
        if not bool(torch.isfinite(inside).all()):
            raise NotFiniteError("mechanics: Young's modulus is not finite; the state or a modulus is too extreme.")
        if not bool((inside > 0).all()):
            raise SolverError(
                f"mechanics: Young's modulus falls to {float(inside.min()):.3g} kPa inside the mask; expected positive "
                "moduli. Look for cell fractions far outside [0, 1] or moduli that are not positive."
            )
        w = self.solve(self.pad(young), self.forces(self.pad(pressure)), rtol, recycled)
        return self.von_mises(young, w), w


@contextmanager
def forward_mode() -> Iterator[None]:
    """Within it, tensors may carry tangents; torch's own first use of that warns of something it deprecates itself."""
    with forward_ad.dual_level():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            forward_ad.make_dual(torch.zeros(()), torch.zeros(()))
        yield


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Product by member of the batch, (batch, 1, 1, 1, 1)."""
    return (a * b).flatten(1).sum(1).reshape(-1, 1, 1, 1, 1)


def _ratio(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.where(b > 0, a / torch.where(b > 0, b, 1.0), 0.0)


def conjugate_gradients(body: Body, young: torch.Tensor, force: torch.Tensor, rtol: float,
                        recycled: Sequence[torch.Tensor]) -> torch.Tensor:  # fmt: skip
    """Solve for displacements; see `Body.solve`."""
    levels = body.multigrid(young)
    goal = rtol * _dot(force, force).sqrt()
    if not bool(torch.isfinite(goal).all()):
        raise NotFiniteError("mechanics: the forces are not finite; the state or the pressure is too extreme.")
    p, rz = torch.zeros_like(force), torch.zeros_like(goal)
    x, r = _combination(levels, force, [w for w in recycled if w.shape == force.shape])
    for _ in range(ITERATIONS):
        size = _dot(r, r).sqrt()
        if bool((size <= goal).all()):
            return body.without_rigid(x)
        z = body.without_rigid(levels.cycle(r.clone()))
        new = _dot(r, z)
        p = z.add_(p * _ratio(new, rz))
        rz = new
        q = levels.apply(0, p)
        step = _ratio(rz, _dot(p, q))
        x.add_(p * step)
        r.sub_(q * step)
    inside = young.detach()[young > 0]
    worst = float((_dot(r, r).sqrt() / goal.clamp_min(1e-300)).max()) * rtol
    raise SolverError(
        f"mechanics: conjugate gradients left a relative residual of {worst:.2g} after {ITERATIONS} iterations, asked "
        f"for {rtol:.2g}; Young's modulus goes from {float(inside.min()):.3g} to {float(inside.max()):.3g} kPa. Use "
        "moduli that differ less, or a larger linear_rtol."
    )


def _combination(levels: Multigrid, force: torch.Tensor, known: list[torch.Tensor]):
    """The combination of known displacements that is nearest in energy, and its residual."""
    if not known:
        return torch.zeros_like(force), force.clone()
    basis = torch.stack(known, 1)
    images = torch.stack([levels.apply(0, w) for w in known], 1)
    flat, moved = basis.flatten(2), images.flatten(2)
    gram = flat @ moved.transpose(1, 2)
    weights = torch.linalg.pinv((gram + gram.transpose(1, 2)) / 2, rtol=1e-12, hermitian=True) @ (
        flat @ force.flatten(1)[..., None]
    )
    x, image = ((weights * part).sum(1).reshape(force.shape) for part in (flat, moved))
    return x, force - image


class _Equilibrium(torch.autograd.Function):
    """Displacements as a function of moduli and forces; the stiffness is symmetric, so its adjoint is itself."""

    @staticmethod
    def forward(ctx, body: Body, rtol: float, recycled, young, force):
        w = conjugate_gradients(body, young.detach(), force.detach(), rtol, recycled)
        ctx.body, ctx.rtol = body, rtol
        ctx.save_for_backward(young, w)
        ctx.save_for_forward(young, w)
        return w

    @staticmethod
    def backward(ctx, *grads: Any):
        young, w = ctx.saved_tensors
        body = ctx.body
        a = conjugate_gradients(body, young, body.without_rigid(grads[0] * body.free), ctx.rtol, ())
        by_young = None
        if ctx.needs_input_grad[3]:
            by_young = -TorchElastic.energy(a, w, body.grids[0].element)
            by_young = by_young if young.shape[0] > 1 else by_young.sum(0, keepdim=True)
        return None, None, None, by_young, a

    @staticmethod
    def jvp(ctx, *tangents: Any):
        young, w = ctx.saved_tensors
        d_young, d_force = tangents[3], tangents[4]
        body = ctx.body
        right = torch.zeros_like(w) if d_force is None else d_force.clone()
        if d_young is not None:
            levels = body.multigrid(young)
            right -= levels.kernels.apply(w, d_young.expand(young.shape), body.grids[0].element) * body.free
        return conjugate_gradients(body, young, right, ctx.rtol, ())
