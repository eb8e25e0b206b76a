"""Strang splitting on arrays: the forward run, its discrete adjoint and its tangents.

One run is a list of operations, each a stabilised diffusion step followed by the reaction of one step. The diffusion
operator is symmetric, so the adjoint of a diffusion step is the same step; only the derivatives by the diffusivity
need the stages' values, which are computed again from the stored state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from biomodel.solvers.kernels import rkc_coefficients, rkc_stages
from biomodel.solvers.plan import TimePlan

#: An array of the kernels: numpy or torch.
Array = Any


def directional(function, inputs: Sequence[torch.Tensor], directions) -> list[list[torch.Tensor]]:
    """Derivatives of `function(*inputs)` (a list of tensors) along each direction (a tensor or None per input).

    A product with the transpose is linear in its cotangent, so its derivative by the cotangent is the product asked
    for: one graph serves all directions, in plain reverse mode.
    """
    with torch.enable_grad():
        inputs = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*inputs)
        live = [o for o in outputs if o.requires_grad]
        cotangents = [torch.zeros_like(o, requires_grad=True) for o in live]
        pulled = torch.autograd.grad(live, inputs, cotangents, create_graph=True, allow_unused=True) if live else []
        found = []
        for direction in directions:
            pairs = [(p, d) for p, d in zip(pulled, direction, strict=bool(live)) if p is not None and d is not None]
            pairs = [(p, d) for p, d in pairs if p.requires_grad]
            parts: tuple = (None,) * len(live)
            if pairs:
                parts = torch.autograd.grad([p for p, _ in pairs], cotangents, [d for _, d in pairs], retain_graph=True,
                                            allow_unused=True)  # fmt: skip
            of_live = iter(parts)
            pick = [next(of_live) if o.requires_grad else None for o in outputs]
            found.append([torch.zeros_like(o) if m is None else m.detach() for o, m in zip(outputs, pick, strict=True)])
    return found


@dataclass(frozen=True, eq=False)
class Operation:
    """Diffuse for `h` (per batch member) in the stages of `rkc`, then react (step `reaction`, -1 for none)."""

    rkc: list[tuple[float, float, float, float, float]]
    h: torch.Tensor
    reaction: int
    output: int


@dataclass(eq=False)
class Record:
    """What a forward run keeps for its adjoint.

    With `stride` at least the number of operations, the states between diffusion and reaction of all of them; otherwise
    the state at the start of every `stride`-th operation, from which the rest is computed again.
    """

    stride: int
    starts: list = field(default_factory=list)
    before: list = field(default_factory=list)


class ClosedReaction:
    """Bernoulli flow with scalar coefficients (batch, n): growth, kill and jumps of a step in one pass."""

    def __init__(self, kernels, a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype):
        self.kernels = kernels
        columns = [[kernels.array(c[:, i].to(dtype).contiguous()) for i in range(a.shape[1])] for c in (a, b)]
        self.a, self.b = columns
        self.gradients = [torch.zeros(a.shape, dtype=torch.float64) for _ in range(2)]

    def apply(self, i, u, out) -> None:
        self.kernels.bernoulli(out, u, self.a[i], self.b[i])

    def adjoint(self, i, lam, u) -> None:
        """Pull `lam` back through step i at the state u before it; the coefficients' gradients accumulate."""
        sums = torch.as_tensor(self.kernels.bernoulli_adjoint(lam, u, self.a[i], self.b[i])).cpu()
        for k in range(2):
            self.gradients[k][:, i] += sums[:, k]

    def tangent(self, i, tan, u, leaves) -> None:
        """Push tangents (directions, batch, ...) through step i; `leaves` are tangents of a and b."""
        like = torch.as_tensor(tan)
        da, db = (self.kernels.array(leaf[:, :, i].to(like.dtype).to(like.device).contiguous()) for leaf in leaves)
        self.kernels.bernoulli_tangent(tan, u, self.a[i], self.b[i], da, db)

    def slope(self, i, u) -> Array:
        """Derivative of step i by the state, voxel by voxel, at the state u before it."""
        a, b = (torch.as_tensor(c[i]).reshape(-1, 1, 1, 1) for c in (self.a, self.b))
        return self.kernels.array(a / (1 + b * self.kernels.tensor(u)) ** 2)


class PointwiseReaction:
    """Any pointwise flow, `function(i, u, leaves)` of torch tensors; derivatives by torch.

    `rate` is the number of the leaf that is the growth rate, where a derivative by it as a field is wanted.
    """

    def __init__(self, kernels, function, leaves: Sequence[torch.Tensor], rate: int | None = None):
        self.kernels, self.function, self.rate = kernels, function, rate
        self.leaves = [leaf.detach() for leaf in leaves]
        self.gradients = [torch.zeros_like(leaf) for leaf in self.leaves]

    def apply(self, i, u, out) -> None:
        with torch.no_grad():
            self.kernels.tensor(out).copy_(self.function(i, self.kernels.tensor(u), self.leaves))

    def adjoint(self, i, lam, u) -> None:
        lam = self.kernels.tensor(lam)
        with torch.enable_grad():
            inputs = [self.kernels.tensor(u).clone().requires_grad_()]
            inputs += [leaf.clone().requires_grad_() for leaf in self.leaves]
            out = self.function(i, inputs[0], inputs[1:])
            found = torch.autograd.grad(out, inputs, lam.to(out.dtype), allow_unused=True)
        lam.copy_(found[0])
        for total, part in zip(self.gradients, found[1:], strict=True):
            if part is not None:
                total += part

    def tangent(self, i, tan, u, leaves) -> None:
        tan, u = self.kernels.tensor(tan), self.kernels.tensor(u)
        moves = [[tan[d].clone(), *(leaf[d] for leaf in leaves)] for d in range(tan.shape[0])]
        moved = directional(lambda v, *rest: [self.function(i, v, rest)], [u.clone(), *self.leaves], moves)
        for d, (change,) in enumerate(moved):
            tan[d].copy_(change)

    def slope(self, i, u) -> Array:
        with torch.enable_grad():
            u = self.kernels.tensor(u).clone().requires_grad_()
            out = self.function(i, u, self.leaves)
            return self.kernels.array(torch.autograd.grad(out.sum(), u)[0])

    def rate_slope(self, i, u) -> Array:
        """Derivative of step i by the rate field, the leaf numbered `rate`, voxel by voxel."""
        assert self.rate is not None
        with torch.enable_grad():
            u = self.kernels.tensor(u)
            leaves = list(self.leaves)
            leaves[self.rate] = leaves[self.rate].clone().requires_grad_()
            out = self.function(i, u, leaves)
            found = torch.autograd.grad(out.sum(), leaves[self.rate])[0].to(u.dtype)
            return self.kernels.array(torch.nn.functional.pad(found, (1,) * 6).contiguous())


class Evolution:
    """One simulation laid out: faces, diffusion scale, operations and reaction.

    Parameters
    ----------
    kernels : NumbaKernels or TorchKernels
    plan : TimePlan
    reaction : ClosedReaction or PointwiseReaction
    faces : tuple of three padded arrays, or None without diffusion
    scale : Tensor, shape (batch,)
        Factor on the faces, by batch member.
    radius : float
        Bound of the spectral radius of the scaled operator, largest over the batch (1/day).
    """

    def __init__(self, kernels, plan: TimePlan, reaction, faces, scale: torch.Tensor, radius: float):
        self.kernels, self.plan, self.reaction, self.faces = kernels, plan, reaction, faces
        self.batch = scale.shape[0]
        self.scale = scale
        self.operations = []
        steps = plan.diffusion
        done = {count: k for k, count in enumerate(plan.outputs)}
        h_rows = np.diff(plan.edges, axis=1)
        count = 0
        for duration, reaction_step in steps:
            count += reaction_step >= 0
            stages = rkc_stages(float(duration.max()) * radius) if faces is not None else 0
            output = done[count] if reaction_step < 0 else -1
            h = torch.tensor(np.broadcast_to(duration, (self.batch,)).copy())
            self.operations.append(Operation(rkc_coefficients(stages) if stages else [], h, reaction_step, output))
        self.initial_outputs = [k for k, n in enumerate(plan.outputs) if n == 0]
        self.repeated = {k: done[n] for k, n in enumerate(plan.outputs)}
        self.evaluations = sum(len(op.rkc) for op in self.operations) + h_rows.shape[1]
        self._pool: dict[tuple, list] = {}

    # Arrays ----------------------------------------------------------------------------------------------------------

    def _buffers(self, like, count: int, name: str) -> list:
        """Padded work arrays, zero on the padding, kept between calls."""
        key = (name, tuple(like.shape))
        have = self._pool.setdefault(key, [])
        while len(have) < count:
            have.append(self.kernels.array(torch.zeros_like(torch.as_tensor(like))))
        return have if len(have) == count else have[:count]

    def _c(self, op: Operation, j: int, like, scaled: bool = True, repeat: int = 1):
        c = op.rkc[j][4] * op.h * (self.scale.to(op.h.device, op.h.dtype) if scaled else 1.0)
        like = torch.as_tensor(like)
        return self.kernels.array(c.repeat(repeat).to(like.dtype).to(like.device))

    def _stages(self, op: Operation, u, buffers: list, repeat: int = 1, but: int = 0) -> list:
        """Stage values Y_1 .. Y_s of one diffusion step from Y_0 = u, but the last `but`. Four buffers go in turn."""
        found = [u]
        args: tuple  # three arrays or None, and their weights
        for j, (p, q, r, s, _) in enumerate(op.rkc[: len(op.rkc) - but]):
            y = found[-1]
            c = self._c(op, j, u, repeat=repeat)
            if j == 0:
                out, args = buffers[0], (None, None, None, (0, 0, r, 0))
            elif j == 1:
                out, args = buffers[1], (u, None, None, (p + s, 0, r + q, 0))
            else:
                out = buffers[j] if len(buffers) >= len(op.rkc) else buffers[1 + (j - 1) % 3]
                args = (u, found[1], found[-2], (p, q, r, s))
            self.kernels.stage(out, y, *args[:3], args[3], c, self.faces)
            found.append(out)
        return found[1:]

    # Runs ------------------------------------------------------------------------------------------------------------

    def forward(self, u0, record: Record | None = None) -> list:
        """States at the outputs, as arrays. What a gradient needs is kept in `record`."""
        u = self._copy(u0)
        outputs: list = [None] * len(self.plan.outputs)
        for k in self.initial_outputs:
            outputs[k] = self._copy(u)
        for n, op in enumerate(self.operations):
            if record is not None and n % record.stride == 0:
                record.starts.append(self._copy(u))
            before = self._advance(op, u, outputs)
            if record is not None and record.stride >= len(self.operations):
                record.before.append(self._copy(before))
        return self._fill(outputs)

    def _fill(self, outputs: list) -> list:
        return [outputs[self.repeated[k]] if o is None else o for k, o in enumerate(outputs)]

    def _copy(self, u):
        return self.kernels.array(torch.as_tensor(u).clone())

    def _before_reaction(self, op: Operation, u):
        return self._stages(op, u, self._buffers(u, 4, "ring"))[-1] if op.rkc else u

    def _advance(self, op: Operation, u, outputs: list | None):
        """Do one operation in place of u; the state between diffusion and reaction is returned (a work array)."""
        v = self._before_reaction(op, u)
        if op.reaction >= 0:
            self.reaction.apply(op.reaction, v, u)
        elif v is not u:
            u[...] = v
        if op.output >= 0 and outputs is not None:
            outputs[op.output] = self._copy(u)
        return v

    def adjoint(
        self, record: Record, cotangents: list, want_scale: bool, face_gradient
    ) -> tuple[Array, torch.Tensor]:
        """Gradient by the initial state; by the scale (returned) and the faces (into `face_gradient`) where asked.

        Parameters
        ----------
        record : Record
            Kept by `forward`.
        cotangents : list
            One padded array or None for each output.
        """
        like = record.starts[0] if record.starts else cotangents[0]
        lam = self.kernels.array(torch.zeros_like(torch.as_tensor(like)))
        d_scale = torch.zeros(self.batch, dtype=torch.float64)
        by_output: dict[int, list] = {}
        for k, cotangent in enumerate(cotangents):
            if cotangent is not None:
                by_output.setdefault(self.repeated[k], []).append(cotangent)
        scratch = self._copy(like)
        for first in range((len(record.starts) - 1) * record.stride, -1, -record.stride):
            segment = self.operations[first : first + record.stride]
            start = record.starts[first // record.stride]
            before = record.before or self._walk(start, segment)
            for n in range(len(segment) - 1, -1, -1):
                op, v = segment[n], before[n]
                for cotangent in by_output.get(op.output, ()) if op.output >= 0 else ():
                    lam += cotangent
                if op.reaction >= 0:
                    self.reaction.adjoint(op.reaction, lam, v)
                if op.rkc:
                    u = start
                    if n > 0:
                        u = before[n - 1]
                        if segment[n - 1].reaction >= 0:
                            self.reaction.apply(segment[n - 1].reaction, u, scratch)
                            u = scratch
                    # The step's result is not needed, so neither is its last stage.
                    values = self._stages(op, u, self._buffers(u, max(len(op.rkc), 4), "stages"), but=1)
                    lam = self._diffuse_back(op, lam, [u, *values], want_scale, d_scale, face_gradient)
        for k in self.initial_outputs:
            for cotangent in by_output.get(k, ()):
                lam += cotangent
        return lam, d_scale

    @staticmethod
    def _swap(ring: list, old, new):
        """Take `new` out of the work arrays and give `old` back in its place: no copy."""
        for k, buffer in enumerate(ring):
            if buffer is new:
                ring[k] = old
        return new

    def _walk(self, start, segment: list) -> list:
        """States between diffusion and reaction of a segment of operations, computed again."""
        u = self._copy(start)
        return [self._copy(self._advance(op, u, None)) for op in segment]

    def _diffuse_back(self, op: Operation, lam, values, want_scale, d_scale, face_gradient):
        """Adjoint of one diffusion step; `values` are Y_0 .. Y_s, where derivatives by D are wanted."""
        rkc, s_count = op.rkc, len(op.rkc)
        pool = [b for b in self._buffers(lam, 6, "adjoint") if b is not lam]
        acc_p, acc_q = (None, None) if s_count == 2 else (pool[3], pool[4])
        if acc_p is not None and acc_q is not None:
            acc_p[...] = 0
            acc_q[...] = 0
        newer, current = None, lam
        args: tuple
        for j in range(s_count, 0, -1):
            p, q, r, s, _ = rkc[j - 1]
            unscaled = op.rkc[j - 1][4] * op.h
            if want_scale and s_count > 2:
                d_scale += unscaled * torch.as_tensor(self.kernels.energy(current, values[j - 1], self.faces)).cpu()
            if face_gradient is not None:
                self.kernels.face_products(face_gradient, current, values[j - 1], self._c(op, j - 1, lam))
            out = next(b for b in pool[:3] if b is not current and b is not newer)
            c = self._c(op, j - 1, lam)
            if j >= 2 and acc_p is not None:
                self.kernels.tensor(acc_p).add_(self.kernels.tensor(current), alpha=p)
                self.kernels.tensor(acc_q).add_(self.kernels.tensor(current), alpha=q)
            s_next = rkc[j][3] if j < s_count else 0.0  # weight of Y_(j-1) as the older value in stage j + 1
            if s_count == 2:
                first = (None, None, None, (0, 0, r + q, 0))
                args = first if j == 2 else (lam, None, None, (rkc[1][0] + s_next, 0, r, 0))
            elif j == 1:
                args = (acc_p, acc_p, newer, (1.0, 0.0, r, s_next))
            elif j == 2:
                args = (acc_q, acc_q, newer, (1.0, 0.0, r, s_next))
            elif newer is None:
                args = (None, None, None, (0, 0, r, 0))
            else:
                args = (newer, None, None, (s_next, 0, r, 0))
            if want_scale and s_count == 2:
                energy = self.kernels.stage_and_energy(
                    out, current, args[0], values[j - 1], args[3][::2], c, self.faces
                )
                d_scale += unscaled * torch.as_tensor(energy).cpu()
            else:
                self.kernels.stage(out, current, *args[:3], args[3], c, self.faces)
            newer, current = current, out
        return current

    def tangents(self, u0, tan, d_scale, d_faces, leaves, take=None) -> tuple[list, list]:
        """States and tangents at the outputs.

        Parameters
        ----------
        u0 : padded array (batch, ...)
        tan : padded array (directions, batch, ...)
            Tangents of the initial state; overwritten.
        d_scale : Tensor, shape (directions, batch)
        d_faces : list of (faces or None), by direction, or None
        leaves : list of Tensor
            Tangents (directions, ...) of the reaction's leaves.
        take : callable, optional
            What to keep of (output, array) instead of a copy of the whole array.
        """
        take = take or (lambda k, x: self._copy(x))
        u = self._copy(u0)
        directions = tan.shape[0]
        shape, flat = tan.shape, tan.reshape(directions * self.batch, *tan.shape[2:])
        outputs: list = [None] * len(self.plan.outputs)
        moved: list = [None] * len(self.plan.outputs)
        for k in self.initial_outputs:
            outputs[k], moved[k] = take(k, u), take(k, tan)
        scale_moves = bool((d_scale != 0).any())
        for op in self.operations:
            if op.rkc:
                stages = self._stages(op, u, self._buffers(u, max(len(op.rkc), 4), "stages"))
                ring = self._buffers(flat, 4, "tangent ring")
                flat = self._swap(ring, flat, self._stages(op, flat, ring, repeat=directions)[-1])
                tan = flat.reshape(shape)
                sources = [(None, d_scale)] if scale_moves else []
                for d, faces in enumerate(d_faces or ()):
                    if faces is not None:
                        weight = torch.zeros_like(d_scale)
                        weight[d] = 1.0
                        sources.append((faces, weight))
                for faces, weight in sources:
                    source = self.kernels.tensor(self._source(op, [u, *stages], faces))
                    weight = weight.to(source.dtype).to(source.device)
                    for d in range(directions):
                        if bool((weight[d] != 0).any()):
                            self.kernels.tensor(tan)[d] += weight[d][:, None, None, None] * source
                v = stages[-1]
            else:
                v = u
            if op.reaction >= 0:
                self.reaction.tangent(op.reaction, tan, v, leaves)
                self.reaction.apply(op.reaction, v, u)
            elif v is not u:
                u[...] = v
            if op.output >= 0:
                outputs[op.output], moved[op.output] = take(op.output, u), take(op.output, tan)
        return self._fill(outputs), [moved[self.repeated[k]] if m is None else m for k, m in enumerate(moved)]

    def _source(self, op: Operation, values, faces):
        """Derivative of one diffusion step by the scale, or along a direction of the faces."""
        scaled = faces is not None
        faces = self.faces if faces is None else faces
        ring = self._buffers(values[0], 5, "source")
        zero = ring[4]
        found = [zero]
        for j, (p, q, r, s, _) in enumerate(op.rkc):
            c = self._c(op, j, values[0])
            if j == 0:
                out = ring[0]
                out[...] = 0
            else:
                out = ring[j] if j < 2 else ring[1 + (j - 1) % 3]
                if j == 1:
                    self.kernels.stage(out, found[-1], None, None, None, (0, 0, r + q, 0), c, self.faces)
                else:
                    self.kernels.stage(out, found[-1], zero, found[1], found[-2], (p, q, r, s), c, self.faces)
            self.kernels.add_operator(out, values[j], self._c(op, j, values[0], scaled=scaled), faces)
            found.append(out)
        return found[-1]

    # The run linearised in its state, about a stored trajectory ----------------------------------------------------

    def trajectory(self, u0, rates: list | None = None) -> tuple[list, list]:
        """Outputs, and the slope of every reaction: what `push` and `pull` need (the reaction acts on each voxel).

        Where a list is given, the reactions' slopes by a rate field are put into it.
        """
        u = self._copy(u0)
        outputs: list = [None] * len(self.plan.outputs)
        for k in self.initial_outputs:
            outputs[k] = self._copy(u)
        slopes = []
        for op in self.operations:
            v = self._before_reaction(op, u)
            if op.reaction >= 0:
                slopes.append(self.reaction.slope(op.reaction, v))
                if rates is not None:
                    rates.append(self.reaction.rate_slope(op.reaction, v))
                self.reaction.apply(op.reaction, v, u)
            elif v is not u:
                u[...] = v
            if op.output >= 0:
                outputs[op.output] = self._copy(u)
        return self._fill(outputs), slopes

    def push(self, slopes: list, tan, rates: list | None = None, change=None) -> list:
        """Tangents (directions, batch, ...) of the outputs for tangents of the initial state; overwrites `tan`.

        With `rates` from `trajectory`, also for a change (directions, 1, ...) of the rate field.
        """
        directions, shape = tan.shape[0], tan.shape
        flat = tan.reshape(directions * self.batch, *tan.shape[2:])
        moved: list = [None] * len(self.plan.outputs)
        for k in self.initial_outputs:
            moved[k] = self._copy(tan)
        for op in self.operations:
            if op.rkc:
                ring = self._buffers(flat, 4, "tangent ring")
                flat = self._swap(ring, flat, self._stages(op, flat, ring, repeat=directions)[-1])
                tan = flat.reshape(shape)
            if op.reaction >= 0:
                tan *= slopes[op.reaction]
                if rates is not None:
                    tan += rates[op.reaction] * change
            if op.output >= 0:
                moved[op.output] = self._copy(tan)
        return [moved[self.repeated[k]] if m is None else m for k, m in enumerate(moved)]

    def pull(self, slopes: list, cotangents: list, rates: list | None = None, change=None) -> Array:
        """Transpose of `push`: cotangents (directions, batch, ...) of the outputs to the initial state.

        With `rates`, what goes to the rate field is added to `change` (directions, batch, ...).
        """
        lam = self._copy(cotangents[0])
        lam[...] = 0
        directions, shape = lam.shape[0], lam.shape
        flat = lam.reshape(directions * self.batch, *lam.shape[2:])
        by_output: dict[int, list] = {}
        for k, cotangent in enumerate(cotangents):
            by_output.setdefault(self.repeated[k], []).append(cotangent)
        for op in reversed(self.operations):
            for cotangent in by_output.get(op.output, ()) if op.output >= 0 else ():
                lam += cotangent
            if op.reaction >= 0:
                if rates is not None:
                    change += lam * rates[op.reaction]
                lam *= slopes[op.reaction]  # its own transpose
            if op.rkc:
                ring = self._buffers(flat, 4, "tangent ring")
                flat = self._swap(ring, flat, self._stages(op, flat, ring, repeat=directions)[-1])
                lam = flat.reshape(shape)
        for k in self.initial_outputs:
            for cotangent in by_output.get(k, ()):
                lam += cotangent
        return lam
