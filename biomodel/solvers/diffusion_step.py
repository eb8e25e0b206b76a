"""One diffusion step with face conductances of its own, differentiable by the state and the conductances.

The same Runge-Kutta-Chebyshev stages as in a run with fixed conductances (:mod:`biomodel.solvers.evolution`), as an
operation of torch: for models where the diffusivity follows the state, so that it differs from step to step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from biomodel.solvers.grids import spectral_radius
from biomodel.solvers.kernels import rkc_coefficients, rkc_stages

_coefficients = lru_cache(maxsize=64)(rkc_coefficients)


def stages_of(h: float, faces: Sequence[torch.Tensor]) -> int:
    """Fewest stages with which a step of h days is stable."""
    with torch.no_grad():
        return rkc_stages(h * float(spectral_radius([f.detach() for f in faces]).max()))


def diffuse(kernels, u: torch.Tensor, h: float, stages: int, faces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Diffuse for h days.

    Parameters
    ----------
    kernels : NumbaKernels or TorchKernels
    u : Tensor, shape (batch, z, y, x)
    h : float
        Length of the step, days.
    stages : int
        From `stages_of`.
    faces : three Tensors, shape (batch or 1, z + 2, y + 2, x + 2)
        Conductances as `face_conductances` gives them, 1/day. Where the batch of `u` is a multiple of theirs, they
        repeat.
    """
    if h == 0:
        return u
    padded = torch.nn.functional.pad(u, (1,) * 6)
    fz, fy, fx = (f.to(u.dtype) for f in faces)
    return _Step.apply(kernels, h, stages, padded, fz, fy, fx)[..., 1:-1, 1:-1, 1:-1]


class _Steps:
    """The stages on arrays of the kernels."""

    def __init__(self, kernels, h: float, stages: int, faces: Sequence[torch.Tensor]):
        self.kernels, self.h, self.rkc = kernels, h, _coefficients(stages)
        self.faces = tuple(kernels.array(f.detach().contiguous()) for f in faces)

    def weight(self, j: int, like: torch.Tensor):
        c = torch.full((like.shape[0],), self.rkc[j][4] * self.h, dtype=like.dtype, device=like.device)
        return self.kernels.array(c)

    def product(self, y: torch.Tensor, j: int, r: float) -> torch.Tensor:
        """r y + c h L y."""
        out = torch.zeros_like(y)
        array = self.kernels.array
        self.kernels.stage(array(out), array(y), None, None, None, (0, 0, r, 0), self.weight(j, y), self.faces)
        return out

    def values(self, u: torch.Tensor, d_faces: Sequence[torch.Tensor] | None = None,
               about: list[torch.Tensor] | None = None) -> list[torch.Tensor]:  # fmt: skip
        """Y_0 .. Y_s from Y_0 = u; with `d_faces`, their tangents about the values `about`."""
        found, array = [u], self.kernels.array
        moved = None if d_faces is None else tuple(array(f.detach().to(u.dtype).contiguous()) for f in d_faces)
        args: tuple
        for j, (p, q, r, s, _) in enumerate(self.rkc):
            out = torch.zeros_like(u)
            if j == 0:
                args = (None, None, None, (0, 0, r, 0))
            elif j == 1:
                args = (array(u), None, None, (p + s, 0, r + q, 0))
            else:
                args = (array(u), array(found[1]), array(found[-2]), (p, q, r, s))
            self.kernels.stage(array(out), array(found[-1]), *args, self.weight(j, u), self.faces)
            if moved is not None and about is not None:
                self.kernels.add_operator(array(out), array(about[j]), self.weight(j, u), moved)
            found.append(out)
        return found


class _Step(torch.autograd.Function):
    """Y_s as a function of the padded Y_0 and the faces. The operator is symmetric."""

    @staticmethod
    def forward(ctx, kernels, h: float, stages: int, u, fz, fy, fx):
        u = u.detach().contiguous()
        ctx.steps = _Steps(kernels, h, stages, (fz, fy, fx))
        ctx.save_for_backward(u)
        ctx.save_for_forward(u)
        ctx.rows = fz.shape[0]
        return ctx.steps.values(u)[-1]

    @staticmethod
    def backward(ctx, *grads: Any):
        (u,) = ctx.saved_tensors
        steps, kernels = ctx.steps, ctx.steps.kernels
        by_faces = any(ctx.needs_input_grad[4:])
        values = steps.values(u) if by_faces else []
        gradient = [torch.zeros(ctx.rows, *u.shape[1:], dtype=u.dtype, device=u.device) for _ in range(3)]
        arrays = tuple(kernels.array(g) for g in gradient)
        # Cotangents of Y_0, Y_1 and of the last two values; the first two also hang on every later stage.
        count = len(steps.rkc)
        bar: list[Any] = [None] * (count + 1)
        bar[count] = _inner(grads[0])

        def add(k: int, part: torch.Tensor) -> None:
            bar[k] = part if bar[k] is None else bar[k] + part

        for j in range(count, 0, -1):
            p, q, r, s, _ = steps.rkc[j - 1]
            b = bar[j]
            if by_faces:
                kernels.face_products(arrays, kernels.array(b), kernels.array(values[j - 1]), steps.weight(j - 1, u))
            add(j - 1, steps.product(b, j - 1, r))
            if p:
                add(0, p * b)
            if q:
                add(1 if j > 1 else 0, q * b)
            if s and j > 1:
                add(j - 2, s * b)
            bar[j] = None
        return None, None, None, bar[0], *(gradient if by_faces else (None,) * 3)

    @staticmethod
    def jvp(ctx, *tangents: Any):
        (u,) = ctx.saved_tensors
        du = torch.zeros_like(u) if tangents[3] is None else tangents[3].contiguous()
        d_faces = tangents[4:]
        if all(f is None for f in d_faces):
            return ctx.steps.values(du)[-1]
        shape = (ctx.rows, *u.shape[1:])
        moved = [torch.zeros(shape, dtype=u.dtype, device=u.device) if f is None else f for f in d_faces]
        return ctx.steps.values(du, moved, ctx.steps.values(u))[-1]


def _inner(x: torch.Tensor) -> torch.Tensor:
    """A copy with the padding set to zero: cotangents may have values there."""
    return torch.nn.functional.pad(x[..., 1:-1, 1:-1, 1:-1], (1,) * 6).contiguous()
