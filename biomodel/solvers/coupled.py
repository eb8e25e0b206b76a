"""Simulations whose diffusivity follows the stress that the tumour itself makes.

A step of length h reacts for h / 2, diffuses for h, and reacts for h / 2; neighbouring halves of the reaction are
joined. Stress is solved once per step, at a prediction of the state in the middle of the diffusion: half a step of
diffusion with the conductances of the step before. That is second order in h. Doses are exact at any time, as without
mechanics; fractions of radiotherapy, at which stress jumps, end a step.

In space it is second order too, where the stress is smooth. Von Mises stress has a kink where it is zero: exact
solutions that come near zero inside were seen to converge with orders of 1.85 to 1.93 on 12³ to 48³ voxels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.autograd.forward_ad as forward_ad
from torch.utils.checkpoint import checkpoint

from biomodel.errors import NotFiniteError, SolverError
from biomodel.mechanics import Clamped, Elastic
from biomodel.solvers.base import Context
from biomodel.solvers.diffusion_step import diffuse, stages_of
from biomodel.solvers.elastic import Body, forward_mode
from biomodel.solvers.grids import coarsen, face_conductances
from biomodel.solvers.held import HeldLinearisation
from biomodel.solvers.plan import RESOLUTION, TimePlan, breakpoints, make_plan
from biomodel.solvers.reaction import TorchOps
from biomodel.solvers.simulation import Simulation

if TYPE_CHECKING:
    from biomodel.solvers.torch import TorchSolver

#: Largest grid (voxels) on which steps are tried out.
PILOT = 6_000
#: Earlier displacements kept to start the next solve from.
RECYCLED = 4
#: Numbers per voxel that the derivative of one step keeps, and the same of a step that is computed again.
KEPT, CHECKPOINTED = 80, 12


@dataclass(frozen=True, eq=False)
class CoupledPlan:
    """Steps of one coupled simulation.

    Attributes
    ----------
    reaction : TimePlan
        The reaction's steps, cut at doses: one before each diffusion, and one before each output.
    lengths : tuple of tuple of float
        Days of each diffusion, by interval between outputs.
    """

    reaction: TimePlan
    lengths: tuple[tuple[float, ...], ...]

    @property
    def steps(self) -> int:
        """Number of diffusions, each with a solve for the stress."""
        return sum(len(part) for part in self.lengths)


@dataclass(eq=False)
class _Memory:
    """What passes from step to step beside the state.

    Attributes
    ----------
    faces : list of Tensor
        Conductances of the step before.
    displacements : tuple of Tensor
        The last ones, without derivatives.
    """

    faces: list[torch.Tensor]
    displacements: tuple[torch.Tensor, ...]


class CoupledSimulation(Simulation):
    """A model with mechanics on one domain under one schedule; used as :class:`Simulation` is.

    Raises
    ------
    SolverError
        If several patients are given, a term other than diffusion reads the stress, or the organ cannot be solved.
    """

    def __init__(self, solver: TorchSolver, model, domains, schedules, fields, starts):
        super().__init__(solver, model, domains, schedules, fields, starts)
        if self.rows > 1:
            raise SolverError("a model with mechanics is simulated patient by patient; build one simulation for each.")
        for term in (model.growth, *model.treatments):
            if term.auxiliaries:
                raise SolverError(f"TorchSolver: {term.name} reads an auxiliary field; only diffusion may.")
        (auxiliary,) = model.auxiliaries
        if not isinstance(auxiliary.equation, Elastic):
            raise SolverError(f"TorchSolver cannot solve {type(auxiliary.equation).__name__}; it solves Elastic.")
        self.equation: Elastic = auxiliary.equation
        clamped = isinstance(self.equation.edge, Clamped)
        self.body = Body(self.mask[0], self.spacing, self.equation.poisson, clamped)

    def _tabulated(self, values: dict) -> bool:
        """Never: the reaction is differentiated by torch here."""
        return False

    # Time ------------------------------------------------------------------------------------------------------------

    def fixed_plan(self, times, counts: Sequence[int]) -> Any:
        """A plan with at least the given number of steps in each interval between the requested times."""
        (row,) = self._times(times)[:1]
        now, lengths, days = self.starts[0], [], [self.starts[0]]
        breaks = breakpoints(self.model, self.schedules[0])
        jumps = np.array([f.day for f in self.schedules[0].fractions])
        for time, count in zip(row, counts, strict=True):
            if time < now - RESOLUTION:
                raise SolverError(f"times must increase and not lie before day {self.starts[0]:g}; found {time:g}.")
            if not count or time <= now + RESOLUTION:
                lengths.append(())
                continue
            inner = np.unique(jumps[(jumps > now + RESOLUTION) & (jumps < time - RESOLUTION)])
            knots, here = [now, *inner.tolist(), time], []
            for low, high in zip(knots[:-1], knots[1:], strict=True):
                n = max(1, math.ceil(count * (high - low) / (time - now) - 1e-9))
                here += [(high - low) / n] * n
            lengths.append(tuple(here))
            edges = now + np.concatenate(([0.0], np.cumsum(here)))
            days += [*((edges[1:] + edges[:-1]) / 2).tolist(), float(time)]
            now = float(time)
        reaction = make_plan(self.starts, np.array([days[1:]]), [1] * (len(days) - 1), [breaks])
        return CoupledPlan(reaction, tuple(lengths))

    def _final_states(self, values: dict, u0: torch.Tensor, plan: Any) -> list[torch.Tensor]:
        return self._run(values, self._start(u0, self._batch(values, u0)), plan)

    def _pilot_error(self, values, u0, times, counts) -> float:
        if np.prod(self.mask.shape[1:]) <= PILOT or max(self.mask.shape[1:]) <= 12:
            return super()._pilot_error(values, u0, times, counts)
        small = {k: (coarsen(v, self.mask) if v.ndim > 1 else v) for k, v in values.items()}
        try:
            pilot = self.coarsened()
        except SolverError:
            # Too thin for larger voxels.
            return super()._pilot_error(values, u0, times, counts)
        return pilot._pilot_error(small, coarsen(u0, self.mask), times, counts)

    # Steps -----------------------------------------------------------------------------------------------------------

    def _start(self, u0: torch.Tensor, batch: int) -> torch.Tensor:
        return u0.to(self.solver.dtype).expand(batch, *u0.shape[1:])

    def stress(self, params: Mapping, u) -> tuple[torch.Tensor, torch.Tensor]:
        """Stress and displacement that given cell fractions make; differentiable.

        Parameters
        ----------
        params : mapping
            Values by global name, as for `forward`.
        u : array or Tensor, shape (z, y, x) or (batch, z, y, x)

        Returns
        -------
        von_mises : Tensor, shape (batch, z, y, x)
            Of the mean stress in each voxel, kPa; 0 outside the mask.
        displacement : Tensor, shape (batch, 3, z, y, x)
            Mean over each voxel, components (x, y, z) along the grid's axes, mm; 0 outside the mask.
        """
        values, u = self._values(params), self._state(u)
        von_mises, w = self._stress(u.expand(self._batch(values, u), *u.shape[1:]), values)
        for axis in (-3, -2, -1):
            n = w.shape[axis] - 1
            w = (w.narrow(axis, 0, n) + w.narrow(axis, 1, n)) / 2
        nz, ny, nx = self.mask.shape[1:]
        return self._unbox(von_mises), self._unbox(torch.where(self.mask, w[..., :nz, :ny, :nx], 0.0))

    def _stress(self, u: torch.Tensor, values: Mapping[str, torch.Tensor],
                recycled: Sequence[torch.Tensor] = ()) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Von Mises stress (batch, z, y, x), kPa, and displacements at the voxels' corners, mm, on the computing box.

        Parameters
        ----------
        u : Tensor, shape (batch, z, y, x)
            Cell fraction on the computing box.
        values : mapping of str to Tensor
            All parameters by global name, (batch,) or (batch, z, y, x).
        recycled : sequence of Tensor
            Earlier displacements to start from.
        """
        u = u.to(torch.float64)
        p = {k: _spread(v).to(self.device) for k, v in self.model.of(self.equation, values).items()}
        young = self.equation.young(u, p, self.context, TorchOps)
        pressure = self.equation.pressure(u, p, self.context, TorchOps)
        young = torch.as_tensor(young, dtype=torch.float64).expand(-1, *self.mask.shape[1:])
        return self.body.equilibrium(young, pressure, self.solver.linear_rtol, recycled)

    def _faces(self, von_mises: torch.Tensor, values: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        term = self.model.diffusion
        p = {k: _spread(v).to(self.device) for k, v in self.model.of(term, values).items()}
        c = Context(**{**vars(self.context), self.equation.gives: von_mises})
        coefficient = term.coefficient(None, p, c, TorchOps)
        return face_conductances(torch.as_tensor(coefficient, dtype=torch.float64), self.mask, self.spacing)

    def _refresh(self, u: torch.Tensor, values: dict, known: tuple[torch.Tensor, ...]) -> _Memory:
        """Conductances at the stress of a state."""
        von_mises, w = self._stress(u, values, known)
        return _Memory(self._faces(von_mises, values), (w.detach(), *known)[:RECYCLED])

    def _step(self, u: torch.Tensor, h: float, memory: _Memory, values: dict) -> tuple[torch.Tensor, _Memory]:
        """Diffuse for h days with the stress of the middle."""
        middle = diffuse(self.kernels, u, h / 2, stages_of(h / 2, memory.faces), memory.faces)
        memory = self._refresh(middle, values, memory.displacements)
        return diffuse(self.kernels, u, h, stages_of(h, memory.faces), memory.faces), memory

    def _operations(self, plan: CoupledPlan) -> list[tuple[str, float]]:
        """The run as a flat list: ("react", step), ("diffuse", days) and ("output", index)."""
        found: list[tuple[str, float]] = []
        i = 0
        for k, part in enumerate(plan.lengths):
            for h in part:
                found += [("react", i), ("diffuse", h)]
                i += 1
            if part:
                found.append(("react", i))
                i += 1
            found.append(("output", k))
        return found

    def _run(self, values: dict, u: torch.Tensor, plan: CoupledPlan,
             known: Iterator[tuple[torch.Tensor, ...]] | None = None,
             keep: Callable[[_Memory], None] | None = None) -> list[torch.Tensor]:  # fmt: skip
        """States at the outputs.

        Parameters
        ----------
        values : dict of Tensor
        u : Tensor, shape (batch, z, y, x)
        known : iterator of tuple of Tensor, optional
            Displacements from which each solve starts, instead of the last ones.
        keep : callable, optional
            Receives what each solve found.
        """
        leaves, react = self._reaction_leaves(values, u.shape[0], plan.reaction), self._reaction(values, plan.reaction)
        outputs: list[torch.Tensor] = []
        memory = self._refresh(u, values, () if known is None else next(known))
        if keep:
            keep(memory)
        operations = self._operations(plan)
        stride = self._stride(u, plan, values, leaves)
        if stride:
            return self._checkpointed(operations, stride, u, memory, values, leaves, react)
        for kind, value in operations:
            if kind == "react":
                u = react(int(value), u, leaves)
            elif kind == "diffuse":
                if known is not None:
                    memory.displacements = next(known)
                u, memory = self._step(u, value, memory, values)
                if keep:
                    keep(memory)
            else:
                outputs.append(u)
        return outputs

    def _stride(self, u: torch.Tensor, plan: CoupledPlan, values: dict, leaves: list[torch.Tensor]) -> int:
        """Operations between states that are kept where a gradient would need too much memory, else 0."""
        if not (torch.is_grad_enabled() and any(t.requires_grad for t in (u, *values.values(), *leaves))):
            return 0
        if plan.steps * u.numel() * 8 * KEPT <= self.solver.memory:
            return 0
        return max(1, math.ceil(math.sqrt(plan.steps * CHECKPOINTED / KEPT))) * 2

    def _checkpointed(self, operations, stride: int, u, memory: _Memory, values, leaves, react) -> list[torch.Tensor]:
        """The same run in segments that are computed again for the gradient."""

        def segment(part, u, known, *faces):
            memory, outputs = _Memory(list(faces), known), []
            for kind, value in part:
                if kind == "react":
                    u = react(int(value), u, leaves)
                elif kind == "diffuse":
                    u, memory = self._step(u, value, memory, values)
                else:
                    outputs.append(u)
            return (u, memory.displacements, len(memory.faces), *memory.faces, *outputs)

        found: list[torch.Tensor] = []
        for first in range(0, len(operations), stride):
            part = operations[first : first + stride]
            u, known, count, *rest = checkpoint(segment, part, u, memory.displacements, *memory.faces,
                                                use_reentrant=False, preserve_rng_state=False)  # fmt: skip
            memory = _Memory(rest[:count], known)
            found += rest[count:]
        return found

    # Runs ------------------------------------------------------------------------------------------------------------

    def forward(self, params: Mapping, u0, times, plan: Any = None) -> torch.Tensor:
        """Simulate; see :meth:`Simulation.forward`."""
        values, u0 = self._values(params), self._state(u0)
        plan = self.plan(params, self._unbox(u0.detach()), times) if plan is None else plan
        out = torch.stack(self._run(values, self._start(u0, self._batch(values, u0)), plan), 1)
        self._check(out)
        return self._unbox(out)

    @staticmethod
    def _check(*states: torch.Tensor) -> None:
        if not math.isfinite(sum(float(x.detach().sum()) for x in states)):
            raise NotFiniteError("the state or its derivative is not finite; the parameters are too extreme.")

    def sensitivities(self, params: Mapping, u0, times, wrt: Sequence[str | None], plan: Any = None,
                      du0: torch.Tensor | None = None,
                      rows: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """States and their derivatives by scalar parameters; see :meth:`Simulation.sensitivities`.

        All directions run as one batch with tangents, which starts every solve at the displacements of a plain run.
        """
        values = {k: v.detach() for k, v in self._values(params).items()}
        for name in wrt:
            if name is not None and (name not in values or values[name].ndim != 1):
                raise SolverError(f"sensitivities: {name!r} is not a scalar parameter of this model.")
        u0 = self._state(u0).detach()
        plan = self.plan(params, self._unbox(u0), times) if plan is None else plan
        batch, trail = self._batch(values, u0), []
        with torch.no_grad():
            start = self._start(u0, batch)
            plain = torch.stack(self._run(values, start, plan, keep=lambda m: trail.append(m.displacements[0])), 1)
            moved = torch.zeros(len(wrt), batch, *u0.shape[1:], dtype=start.dtype, device=self.device)
            if du0 is not None:
                inner = torch.where(self.mask, torch.as_tensor(du0)[self._boxed].to(self.device), 0.0)
                moved[...] = inner.to(start.dtype)
            many = max(1, int(self.solver.memory // (start.numel() * 8 * KEPT)))
            parts = [self._tangents(values, start, moved[i : i + many], wrt[i : i + many], plan, trail)
                     for i in range(0, len(wrt), many)]  # fmt: skip
        tangents = torch.cat(parts)
        self._check(plain, tangents)
        plain, tangents = self._unbox(plain), self._unbox(tangents)
        if rows is None:
            return plain, tangents
        inside = torch.tensor(rows, device=self.device)
        return plain[:, inside], tangents[:, :, inside]

    def _tangents(self, values: dict, start: torch.Tensor, moved: torch.Tensor, wrt, plan: CoupledPlan,
                  trail: list[torch.Tensor]) -> torch.Tensor:  # fmt: skip
        count, batch = moved.shape[:2]

        def repeat(x: torch.Tensor) -> torch.Tensor:
            return x.expand(batch, *x.shape[1:]).repeat(count, *[1] * (x.ndim - 1))

        with forward_mode():
            dual = {}
            for name, value in values.items():
                dual[name] = repeat(value)
                if name in wrt:
                    along = torch.tensor([float(n == name) for n in wrt], dtype=torch.float64)
                    dual[name] = forward_ad.make_dual(dual[name], along.repeat_interleave(batch))
            state = forward_ad.make_dual(repeat(start), moved.reshape(-1, *moved.shape[2:]))
            found = self._run(dual, state, plan, known=iter([(repeat(w),) for w in trail]))
            parts = [forward_ad.unpack_dual(x).tangent for x in found]
        parts = [torch.zeros_like(x) if t is None else t for x, t in zip(found, parts, strict=True)]
        return torch.stack(parts, 1).reshape(count, batch, len(parts), *start.shape[1:])

    def linearise(self, params: Mapping, u0, times, plan: Any = None, rate: bool = False) -> Any:
        """The derivative of the outputs by the initial state at the stress of this run, for many products.

        The stress is held: how it would follow a change of the initial state is left out, which spares a solve per step
        and product. For the noise of single voxels, for whose weights a calibration asks this, that is about a tenth of
        the derivative, and what is calibrated hardly moves (`tests/numerics/test_mechanics_calibration.py` holds both
        against each other). `sensitivities` and gradients leave nothing out.
        """
        if rate:
            raise SolverError("a growth rate that is a field cannot be linearised with mechanics; use Isotropic().")
        values = {k: v.detach() for k, v in self._values(params).items()}
        u0 = self._state(u0).detach()
        plan = self.plan(params, self._unbox(u0), times) if plan is None else plan
        return HeldLinearisation(self, values, self._start(u0, self._batch(values, u0)), plan)


def _spread(value: torch.Tensor) -> torch.Tensor:
    """(batch,) to (batch, 1, 1, 1); fields stay as they are."""
    return value.reshape(-1, 1, 1, 1) if value.ndim <= 1 else value
