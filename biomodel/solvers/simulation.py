"""One simulation: parameters and an initial state in, states and derivatives out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from biomodel.domain import Domain
from biomodel.errors import NotFiniteError, SolverError
from biomodel.solvers.base import Context
from biomodel.solvers.evolution import ClosedReaction, Evolution, PointwiseReaction, Record, directional
from biomodel.solvers.grids import coarsen, face_conductances, spectral_radius, subdivide
from biomodel.solvers.kernels import NumbaKernels, TorchKernels
from biomodel.solvers.plan import TimePlan, breakpoints, make_plan
from biomodel.solvers.reaction import FLOWS, Course, TorchOps
from biomodel.solvers.tabulated import RateRange, TabulatedReaction
from biomodel.terms import Flow
from biomodel.treatments import Kill

if TYPE_CHECKING:
    from biomodel.solvers.torch import TorchSolver

#: More steps than this are refused: the parameters are then far from any tumour's.
MOST_STEPS = 20_000
#: Safety on the error that the pilot run predicts (0.5 aims at half the tolerance).
SAFETY = 0.5


@dataclass(frozen=True, eq=False)
class _Prepared:
    """One run's tensors, differentiable by the parameters."""

    evolution: Evolution
    scale: torch.Tensor
    faces: list[torch.Tensor]
    leaves: list[torch.Tensor]
    reaction: Callable


def _told(params: Mapping[str, Any]) -> str:
    """Parameters in one line; of maps and batches the range."""
    found = []
    for name, value in params.items():
        x = torch.as_tensor(value).detach()
        low, high = float(x.min()), float(x.max())
        found.append(f"{name} {low:.4g}" if low == high else f"{name} {low:.4g} to {high:.4g}")
    return ", ".join(found)


class Simulation(torch.nn.Module):
    """A model on a domain under a schedule: parameters and an initial state in, states out.

    Built by `TorchSolver.build`. Tensors are (batch, time, z, y, x) and differentiable by the parameters (numbers,
    tensors of shape (batch,), or fields (z, y, x) / (batch, z, y, x)) and the initial state. A state at the time of a
    dose is the state before that dose.
    """

    def __init__(self, solver: TorchSolver, model, domains, schedules, fields, starts):
        super().__init__()
        self.solver, self.model, self.domains = solver, model, domains
        self.schedules, self.starts, self._extra = schedules, starts, fields
        self.rows = max(len(domains), len(schedules), len(starts))
        cpu = torch.device(solver.device).type == "cpu"
        self.kernels = NumbaKernels if cpu else TorchKernels
        self.device = torch.device(solver.device)
        mask = np.stack([d.mask for d in domains])
        # Everything is computed on the smallest box that holds the mask.
        self.box = tuple(
            slice(int(w.min()), int(w.max()) + 1) for w in (np.flatnonzero(mask.any((0, *a))) for a in
                                                             ((2, 3), (1, 3), (1, 2)))
        )  # fmt: skip
        self._boxed: tuple[Any, ...] = (..., *self.box)
        self.shape = domains[0].shape
        inside = (slice(None), *self.box)
        self.mask = torch.tensor(mask[inside], device=self.device)
        self.context = Context()
        for name in model.fields:
            values = fields[name] if name in fields else np.stack([d.tissues[name] for d in domains])
            values = np.asarray(values, float)
            values = values[None] if values.ndim == 3 else values
            # Nothing outside the mask counts, not even NaN.
            values = np.where(mask, values, 0.0)[inside]
            setattr(self.context, name, torch.tensor(values, device=self.device))
        self.maps = {t.map: getattr(self.context, t.map) for t in model.treatments if isinstance(t, Kill) and t.map}
        self.spacing = domains[0].spacing
        self._coarse: Simulation | None = None
        self._fine: Simulation | None = None
        self._base: tuple[Any, float] | None = None
        self.diffuses = any(n > 1 for n in self.mask.shape[1:]) and (
            bool(model.diffusion.parameters) or type(model.diffusion).__name__ != "NoDiffusion"
        )

    # Parameters ------------------------------------------------------------------------------------------------------

    def _values(self, params: Mapping) -> dict[str, torch.Tensor]:
        """All parameters as float64 tensors: (batch,) or fields (batch, z, y, x) on the box."""
        found = {}
        for name, value in self.model.complete(params).items():
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if tensor.ndim >= 3:
                tensor = tensor[self._boxed].to(self.device)
                tensor = tensor[None] if tensor.ndim == 3 else tensor
            elif tensor.ndim == 0:
                tensor = tensor[None]
            elif tensor.ndim != 1:
                raise SolverError(
                    f"{name}: shape {tuple(tensor.shape)}; expected a number, (batch,) or a field (z, y, x)."
                )
            found[name] = tensor
        return found

    def _prepare(self, values: dict, batch: int, plan: TimePlan) -> _Prepared:
        dtype, device = self.solver.dtype, self.device
        leaves, scale, faces = self._leaves(values, batch, plan)
        arrays, radius = None, 0.0
        if faces:
            arrays = self._arrays(faces)
            with torch.no_grad():
                radius = float(spectral_radius(faces).max())
        elif self.diffuses:
            arrays, radius = self._unit_faces()
            radius *= float(scale.detach().max())
        function = self._reaction(values, plan)
        reaction: ClosedReaction | PointwiseReaction | TabulatedReaction
        if self._closed(values) and self.model.growth.flow is Flow.BERNOULLI:
            a, b = (c.detach().to(device) for c in leaves)
            reaction = ClosedReaction(self.kernels, a, b, dtype)
        elif self._tabulated(values):
            reaction = TabulatedReaction(self.kernels, leaves, RateRange(leaves[0]))
        else:
            names = self._reacting(values)
            rate = names.index(self._rate) if self._rate in names else None
            reaction = PointwiseReaction(self.kernels, function, leaves, rate)
        evolution = Evolution(self.kernels, plan, reaction, arrays, scale.detach(), radius)
        return _Prepared(evolution, scale, faces, leaves, function)

    def _reaction(self, values: dict, plan: TimePlan) -> Callable:
        """The reaction of step i as a differentiable function (i, u, leaves) of torch tensors."""
        growth = self.model.growth
        if self._closed(values):
            flow = FLOWS[growth.flow]
            return lambda i, u, leaves: flow(u, *(x[:, i].reshape(-1, 1, 1, 1).to(u.device, u.dtype) for x in leaves))
        names, course = self._reacting(values), Course(self.model, self.schedules, plan)

        def pointwise(i, u, leaves):
            # Fields and maps are on the box; the state of a diffusing run is padded by one voxel.
            def fit(t):
                return torch.nn.functional.pad(t, (1,) * 6) if t.ndim == 4 and t.shape[-1] < u.shape[-1] else t

            local = {n: fit(t) for n, t in zip(names, leaves, strict=True)}
            maps = {n: fit(t) for n, t in self.maps.items()}
            if growth.flow is None:
                fields = {n: fit(getattr(self.context, n)) for n in growth.fields}
                return course.integrate(i, u, local, maps, fields).to(u.dtype)
            a, b = course.field_coefficients(i, local, maps)
            return FLOWS[growth.flow](u, a.to(u.dtype), b.to(u.dtype))

        return pointwise

    def _diffusion(self, values: dict, batch: int):
        """Scale and faces as differentiable tensors; faces are None where they are those of D = 1."""
        term = self.model.diffusion
        if term.uniform is not None and values[f"diffusion.{term.uniform}"].ndim == 1:
            return values[f"diffusion.{term.uniform}"].expand(batch), None
        p = {k: v.reshape(-1, 1, 1, 1) if v.ndim == 1 else v for k, v in self.model.of(term, values).items()}
        coefficient = term.coefficient(None, {k: v.to(self.device) for k, v in p.items()}, self.context, TorchOps)
        faces = face_conductances(torch.as_tensor(coefficient, dtype=torch.float64), self.mask, self.spacing)
        return torch.ones(batch, dtype=torch.float64), faces

    def _unit_faces(self):
        """Face arrays and spectral radius for D = 1, made once."""
        if self._base is None:
            faces = face_conductances(torch.ones((), dtype=torch.float64, device=self.device), self.mask, self.spacing)
            self._base = (self._arrays(faces), float(spectral_radius(faces).max()))
        return self._base

    def _leaves(self, values: dict, batch: int, plan: TimePlan) -> tuple[list[torch.Tensor], torch.Tensor, list]:
        """Reaction leaves, scale and faces as differentiable functions of the values."""
        scale, faces = torch.ones(batch, dtype=torch.float64), None
        if self.diffuses:
            scale, faces = self._diffusion(values, batch)
        return self._reaction_leaves(values, batch, plan), scale, faces or []

    def _reaction_leaves(self, values: dict, batch: int, plan: TimePlan) -> list[torch.Tensor]:
        """What the reaction reads, as differentiable functions of the values."""
        if self._closed(values):
            course = Course(self.model, self.schedules, plan)
            return [c.expand(batch, plan.steps) for c in course.coefficients(values)]
        if self._tabulated(values):
            rate = torch.nn.functional.pad(values[self._rate], (1,) * 6)
            nodes = RateRange(rate).nodes
            # All nodes for each of the batch, one after the other.
            others = [v.shape[0] for n, v in values.items() if n in self._reacting(values) and n != self._rate]
            rows = max(others, default=1)
            many = {n: v.expand(rows).repeat_interleave(len(nodes)) if n != self._rate else nodes.repeat(rows)
                    for n, v in values.items() if n in self._reacting(values)}  # fmt: skip
            tables = Course(self.model, self.schedules, plan).coefficients(many)
            return [rate, *(t.reshape(rows, len(nodes), plan.steps) for t in tables)]
        return [values[n] for n in self._reacting(values)]

    def _reacting(self, values: dict) -> list[str]:
        """Names of the parameters of growth and treatments."""
        terms = (self.model.growth, *self.model.treatments)
        return [n for n in values if n.startswith(tuple(f"{t.name}." for t in terms))]

    def _closed(self, values: dict) -> bool:
        """Whether the reaction is a closed form with the same coefficients everywhere."""
        return (
            self.model.growth.flow is not None
            and not self.maps
            and all(values[n].ndim == 1 for n in self._reacting(values))
        )

    @property
    def _rate(self) -> str:
        """Name of the growth law's one parameter, or nothing where it has more."""
        names = [p.name for p in self.model.growth.parameters]
        return f"growth.{names[0]}" if len(names) == 1 else ""

    def _tabulated(self, values: dict) -> bool:
        """Whether the reaction is a Bernoulli flow that differs by place in its growth rate alone."""
        return (
            self.model.growth.flow is Flow.BERNOULLI
            and self.diffuses
            and self.rows == 1
            and not self.maps
            and not self.model.growth.fields
            and [n for n in self._reacting(values) if values[n].ndim > 1] == [self._rate]
        )

    def _arrays(self, faces):
        return tuple(self.kernels.array(f.detach().to(self.solver.dtype).contiguous()) for f in faces)

    def _batch(self, values: dict, u0: torch.Tensor) -> int:
        sizes = {self.rows, u0.shape[0], *(v.shape[0] for v in values.values())} - {1}
        if len(sizes) > 1:
            raise SolverError(f"batch sizes of patients, parameters and initial state differ: {sorted(sizes)}.")
        return sizes.pop() if sizes else 1

    def _state(self, u0) -> torch.Tensor:
        u0 = torch.as_tensor(u0)
        if tuple(u0.shape[-3:]) != self.shape or u0.ndim not in (3, 4):
            raise SolverError(
                f"initial state: shape {tuple(u0.shape)}; expected (batch, z, y, x) or (z, y, x) with (z, y, x) = "
                f"{self.shape}."
            )
        u0 = u0[(..., *self.box)].to(self.device)
        u0 = u0[None] if u0.ndim == 3 else u0
        if not bool(torch.isfinite(u0.detach()).all()):
            raise SolverError("initial state: it has NaN or infinite values; mend the image or mask them.")
        return torch.where(self.mask, u0, torch.zeros((), dtype=u0.dtype, device=self.device))

    def _pad(self, u: torch.Tensor, batch: int) -> torch.Tensor:
        return torch.nn.functional.pad(u.to(self.solver.dtype).expand(batch, *u.shape[1:]), (1,) * 6).contiguous()

    # Time ------------------------------------------------------------------------------------------------------------

    def _times(self, times) -> np.ndarray:
        times = np.atleast_1d(np.asarray(times, float))
        times = times[None] if times.ndim == 1 else times
        if not np.isfinite(times).all() or times.size == 0:
            raise SolverError(f"times: expected finite days, increasing; found {times.tolist()}.")
        return np.broadcast_to(times, (max(self.rows, times.shape[0]), times.shape[1]))

    def fixed_plan(self, times, counts: Sequence[int]) -> TimePlan:
        """A plan with a given number of steps in each interval between the requested times."""
        times = self._times(times)
        rows = times.shape[0]
        starts = self.starts * rows if len(self.starts) == 1 else self.starts
        one = [breakpoints(self.model, s) for s in self.schedules]
        breaks = one * rows if len(one) == 1 else one
        plan = make_plan(starts, times, counts, breaks)
        same = all(len(set(map(tuple, np.atleast_2d(a)))) == 1 for a in (plan.edges, plan.start, plan.length))
        if rows > 1 and same and len(self.schedules) == 1:
            plan = replace(plan, **{n: getattr(plan, n)[:1] for n in ("edges", "start", "length", "step")})
        return plan

    def plan(self, params: Mapping, u0, times) -> TimePlan:
        """Choose the steps at these parameters, so that the splitting error stays below the solver's `rtol`.

        A pilot run on a grid of half the resolution (the grid itself when it is small), with one and two times the
        steps, measures the error; it falls with the square of the step.
        """
        with torch.no_grad():
            values = {k: v.detach() for k, v in self._values(params).items()}
            times = self._times(times)
            begin = np.broadcast_to(np.array(self.starts, float).reshape(-1, 1), (times.shape[0], 1))
            spans = np.diff(np.concatenate((begin, times), 1), axis=1).max(0)
            once = [int(s > 0) for s in spans]
            if not self.diffuses and self.model.growth.flow is not None:
                return self.fixed_plan(times, once)
            rates = [float(values[n].abs().max()) for n in values if n.startswith("growth.")] or [0.0]
            step = min(0.4 / max(max(rates), 1e-3), 20.0)
            counts = [int(math.ceil(s / step)) for s in spans]
            tolerance = SAFETY * self.solver.rtol
            u0 = self._state(u0)
            for _ in range(4):
                error = self._pilot_error(values, u0, times, counts)
                if not math.isfinite(error):
                    raise NotFiniteError("the pilot run is not finite; the parameters are too extreme for this model.")
                factor = math.sqrt(4 / 3 * error / tolerance)
                wanted = [int(math.ceil(c * factor - 1e-9)) if c else 0 for c in counts]
                wanted = [max(w, o) for w, o in zip(wanted, once, strict=True)]
                if sum(wanted) > MOST_STEPS:
                    raise SolverError(
                        f"{sum(wanted)} steps would be needed for a relative error of {self.solver.rtol:g}; the "
                        "parameters are too extreme for this grid, or rtol is too small."
                    )
                if factor <= 3:
                    return self.fixed_plan(times, wanted)
                counts = wanted
            return self.fixed_plan(times, counts)

    def _pilot_error(self, values, u0, times, counts) -> float:
        pilot = self if np.prod(self.mask.shape[1:]) <= 20_000 else self.coarsened()
        extreme = self._extreme(values) if self.rows == 1 else list(range(self.rows))
        small = {k: (v[extreme] if v.shape[0] > 1 else v) for k, v in values.items()}
        start = u0[extreme] if u0.shape[0] > 1 else u0
        if pilot is not self:
            small = {k: (coarsen(v, self.mask) if v.ndim > 1 else v) for k, v in small.items()}
            start = coarsen(start, self.mask)
        runs = []
        for many in (1, 2):
            plan = pilot.fixed_plan(times, [many * c for c in counts])
            runs.append([x.to(torch.float64) for x in pilot._final_states(small, start, plan)])
        worst = 0.0
        least = 1e-3 * torch.as_tensor(start).to(torch.float64).square().sum((1, 2, 3)).sqrt().cpu()
        for coarse, fine in zip(*runs, strict=True):
            # Of a tumour that has all but vanished only the size against the start counts.
            norm = torch.maximum(fine.square().sum((1, 2, 3)).sqrt(), least)
            gap = (coarse - fine).square().sum((1, 2, 3)).sqrt()
            ratio = torch.where(norm > 0, gap / torch.where(norm > 0, norm, 1.0), 0.0)
            worst = max(worst, float(ratio.max()))
            if not bool(torch.isfinite(ratio).all()):
                return math.inf
        return worst

    def _final_states(self, values: dict, u0: torch.Tensor, plan: TimePlan) -> list[torch.Tensor]:
        """States at the outputs of a plain run, without derivatives."""
        batch = self._batch(values, u0)
        out = self._prepare(values, batch, plan).evolution.forward(self.kernels.array(self._pad(u0, batch)))
        return [torch.as_tensor(o) for o in out]

    def _extreme(self, values: dict) -> list[int]:
        """Members of the batch with the largest value of each parameter: the pilot runs those."""
        chosen = {0}
        for v in values.values():
            if v.shape[0] > 1:
                chosen.add(int(v.reshape(v.shape[0], -1).amax(1).argmax()))
        return sorted(chosen)

    def coarsened(self) -> Simulation:
        """The same simulation on voxels twice as large along every axis, made once."""
        if self._coarse is None:
            domains = []
            for d in self.domains:
                d = d.crop(self.box)
                mask = torch.tensor(d.mask)[None]
                halves = [2 if n > 1 else 1 for n in d.shape]
                coarse = coarsen(torch.tensor(d.mask, dtype=torch.float64)[None], mask)[0].numpy() > 0
                tissues = {k: coarsen(torch.tensor(np.array(v))[None], mask)[0].numpy() for k, v in d.tissues.items()}
                spacing = tuple(s * h for s, h in zip(d.spacing, halves, strict=True))
                domains.append(Domain.box(coarse.shape, spacing, mask=coarse, tissues=tissues))
            mask = self.mask[:1].cpu()
            fields = {
                k: coarsen(torch.tensor(np.asarray(v, float)[self._boxed])[None], mask)[0].numpy()
                for k, v in self._extra.items()
            }
            self._coarse = type(self)(self.solver, self.model, domains, self.schedules, fields, self.starts)
        return self._coarse

    def refined(self) -> Simulation:
        """The same simulation on voxels half as large along every axis, made once."""
        if self._fine is None:
            twice = [2 if n > 1 else 1 for n in self.mask.shape[1:]]

            def split(values):
                for axis, n in enumerate(twice):
                    values = np.repeat(values, n, axis)
                return values

            domains = []
            for d in self.domains:
                d = d.crop(self.box)
                spacing = tuple(s / n for s, n in zip(d.spacing, twice, strict=True))
                mask = split(d.mask)
                tissues = {k: split(v) for k, v in d.tissues.items()}
                domains.append(Domain.box(mask.shape, spacing, mask=mask, tissues=tissues))
            fields = {k: split(np.asarray(v, float)[self._boxed]) for k, v in self._extra.items()}
            self._fine = type(self)(self.solver, self.model, domains, self.schedules, fields, self.starts)
        return self._fine

    def grid_error(self, params: Mapping, u0, times, plan: TimePlan) -> torch.Tensor:
        """Change of the voxel averages when the grid is refined once, (T, z, y, x); one patient.

        The initial state inside a voxel is taken linear, with the slope of its smoothed surroundings and its average
        kept.
        """
        fine = self.refined()
        u0 = self._state(u0).detach()
        start = coarsen(fine(params, subdivide(u0, self.mask), times, plan=plan)[0], fine.mask)
        here = self(params, self._unbox(u0), times, plan=plan)[0][self._boxed]
        return self._unbox(torch.where(self.mask, start - here, 0.0))

    # Runs ------------------------------------------------------------------------------------------------------------

    def forward(self, params: Mapping, u0, times, plan: TimePlan | None = None) -> torch.Tensor:
        """Simulate.

        Parameters
        ----------
        params : mapping
            Values by global name; those left out take their known value or their prior's median.
        u0 : array or Tensor, shape (z, y, x) or (batch, z, y, x)
        times : sequence of float, or array (batch, T)
            Requested days, increasing.
        plan : TimePlan, optional
            Steps from `plan` or `fixed_plan`, so that several runs share them.

        Returns
        -------
        Tensor, shape (batch, T, z, y, x)

        Raises
        ------
        SolverError
            If the initial state or the result is not finite.
        """
        values = self._values(params)
        u0 = self._state(u0)
        batch = self._batch(values, u0)
        plan = self.plan(params, self._unbox(u0.detach()), times) if plan is None else plan
        prepared = self._prepare(values, batch, plan)
        if not self.diffuses:
            return self._unbox(self._still(prepared, plan, u0.to(self.solver.dtype).expand(batch, *u0.shape[1:])))
        padded = self._pad(u0, batch)
        faces = prepared.faces
        out = _Evolve.apply(prepared.evolution, self.solver.memory, len(faces), padded, prepared.scale, *faces,
                            *prepared.leaves)  # fmt: skip
        if not math.isfinite(float(out.detach().sum())):
            raise NotFiniteError(f"the state is not finite at {_told(params)}; the parameters are too extreme.")
        return self._unbox(out[..., 1:-1, 1:-1, 1:-1])

    def _still(self, prepared: _Prepared, plan: TimePlan, u: torch.Tensor) -> torch.Tensor:
        """A run without diffusion: every voxel for itself, by plain differentiable torch."""
        reached = {0: u}
        for i in range(plan.steps):
            u = prepared.reaction(i, u, prepared.leaves)
            reached[i + 1] = u
        out = torch.stack([reached[n] for n in plan.outputs], 1)
        if not math.isfinite(float(out.detach().sum())):
            raise NotFiniteError("the state is not finite; the parameters are too extreme.")
        return out

    def _unbox(self, u: torch.Tensor) -> torch.Tensor:
        """From the box to the domain's full grid."""
        if tuple(u.shape[-3:]) == self.shape:
            return u
        sides = zip(reversed(self.box), reversed(self.shape), strict=True)
        widths = [w for s, n in sides for w in (s.start, n - s.stop)]
        return torch.nn.functional.pad(u, widths)

    def sensitivities(self, params: Mapping, u0, times, wrt: Sequence[str | None], plan: TimePlan | None = None,
                      du0: torch.Tensor | None = None,
                      rows: np.ndarray | None = None) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """States and their derivatives by scalar parameters, in one forward pass.

        Parameters
        ----------
        wrt : sequence of str
            Global names of scalar parameters, one direction each; None for a direction of `du0` alone.
        du0 : Tensor, shape (len(wrt), batch or 1, z, y, x), optional
            Tangent of the initial state that goes with each direction.
        rows : ndarray of bool, shape (T, z, y, x), optional
            Where results are wanted; only these voxels are kept, which saves memory.

        Returns
        -------
        u : Tensor, shape (batch, T, z, y, x), or (batch, rows)
        du : Tensor, shape (len(wrt), batch, T, z, y, x), or (len(wrt), batch, rows)
        """
        values = {k: v.detach() for k, v in self._values(params).items()}
        u0 = self._state(u0).detach()
        batch = self._batch(values, u0)
        plan = self.plan(params, self._unbox(u0), times) if plan is None else plan
        prepared = self._prepare(values, batch, plan)
        d_scale = torch.zeros(len(wrt), batch, dtype=torch.float64)
        d_faces: list = [None] * len(wrt)
        for name in wrt:
            if name is not None and (name not in values or values[name].ndim != 1):
                raise SolverError(f"sensitivities: {name!r} is not a scalar parameter of this model.")
        moving = [n for n in dict.fromkeys(wrt) if n is not None]

        def parts(*tensors):
            leaves, scale, faces = self._leaves({**values, **dict(zip(moving, tensors, strict=True))}, batch, plan)
            return [scale, *faces, *leaves]

        directions = [[torch.ones_like(values[n]) if n == name else None for n in moving] for name in wrt]
        changes = directional(parts, [values[n] for n in moving], directions)
        n_faces = len(prepared.faces)
        for d, (scale, *rest) in enumerate(changes):
            d_scale[d] = scale
            if any(bool((f != 0).any()) for f in rest[:n_faces]):
                d_faces[d] = self._arrays(rest[:n_faces])
        moves = [torch.stack([one[1 + n_faces + k] for one in changes]) for k in range(len(prepared.leaves))]
        tan = torch.zeros(len(wrt), batch, *(n + 2 for n in self.mask.shape[1:]), dtype=self.solver.dtype,
                          device=self.device)  # fmt: skip
        if du0 is not None:
            inner = torch.where(self.mask, torch.as_tensor(du0)[self._boxed].to(self.device), 0.0)
            tan[..., 1:-1, 1:-1, 1:-1] = inner.to(self.solver.dtype)
        inside = None if rows is None else [torch.tensor(r[self.box], device=self.device) for r in rows]

        def take(k, x):
            x = self.kernels.tensor(x)[..., 1:-1, 1:-1, 1:-1]
            return x.clone() if inside is None else x[..., inside[k]]

        outputs, tangents = prepared.evolution.tangents(
            self.kernels.array(self._pad(u0, batch)), self.kernels.array(tan), d_scale, d_faces, moves, take
        )
        if not math.isfinite(sum(float(x.sum()) for x in (*outputs, *tangents))):
            raise NotFiniteError("the state or its sensitivities are not finite; the parameters are too extreme.")
        if inside is not None:
            return torch.cat(outputs, -1), torch.cat(tangents, -1)
        return self._unbox(torch.stack(outputs, 1)), self._unbox(torch.stack(tangents, 2))

    def linearise(
        self, params: Mapping, u0, times, plan: TimePlan | None = None, rate: bool = False
    ) -> Linearisation:
        """The run's outputs with its derivative by the initial state, for many products at little cost.

        With `rate` also by the growth rate, which then has to be a field (z, y, x) among `params`.
        """
        values = {k: v.detach() for k, v in self._values(params).items()}
        mapped = [n for n in self._reacting(values) if values[n].ndim > 1]
        if rate and not (self.model.growth.flow is Flow.BERNOULLI and self.diffuses and mapped == [self._rate]):
            raise SolverError(
                "linearise: the derivative by a rate field needs a growth law with a Bernoulli flow and one parameter, "
                "given as a field (z, y, x), other parameters as numbers, and diffusion."
            )
        u0 = self._state(u0).detach()
        batch = self._batch(values, u0)
        plan = self.plan(params, self._unbox(u0), times) if plan is None else plan
        evolution = self._prepare(values, batch, plan).evolution
        rates: list | None = [] if rate else None
        outputs, slopes = evolution.trajectory(self.kernels.array(self._pad(u0, batch)), rates)
        return Linearisation(self, evolution, outputs, slopes, rates)


class Linearisation:
    """The derivative J of the outputs by the initial state and a rate field, as a linear map and its transpose."""

    def __init__(self, simulation: Simulation, evolution: Evolution, outputs, slopes, rates: list | None = None):
        self.simulation, self.evolution, self.slopes, self.rates = simulation, evolution, slopes, rates
        self.outputs = simulation._unbox(torch.stack([torch.as_tensor(o) for o in outputs], 1)[..., 1:-1, 1:-1, 1:-1])

    def _in(self, x: torch.Tensor):
        s = self.simulation
        x = torch.where(s.mask, torch.as_tensor(x)[s._boxed].to(s.device), 0.0).to(s.solver.dtype)
        return s.kernels.array(torch.nn.functional.pad(x, (1,) * 6).contiguous())

    def _out(self, x) -> torch.Tensor:
        s = self.simulation
        return s._unbox(torch.where(s.mask, torch.as_tensor(x)[..., 1:-1, 1:-1, 1:-1], 0.0))

    def push(self, du0: torch.Tensor, rate: torch.Tensor | None = None) -> torch.Tensor:
        """J (du0, rate): each (directions, batch, z, y, x), to (directions, batch, T, z, y, x)."""
        if rate is None:
            moved = self.evolution.push(self.slopes, self._in(du0))
        else:
            moved = self.evolution.push(self.slopes, self._in(du0), self.rates, self._in(rate))
        return self.simulation._unbox(torch.stack([torch.as_tensor(m) for m in moved], 2)[..., 1:-1, 1:-1, 1:-1])

    def pull(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Transpose of J: (directions, batch, T, z, y, x) to the initial state, (directions, batch, z, y, x)."""
        parts = [self._in(cotangents[:, :, t]) for t in range(cotangents.shape[2])]
        return self._out(self.evolution.pull(self.slopes, parts))

    def pull_rate(self, cotangents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Transpose of J: to the initial state and to the rate field, each (directions, batch, z, y, x)."""
        parts = [self._in(cotangents[:, :, t]) for t in range(cotangents.shape[2])]
        change = self.simulation.kernels.array(torch.zeros_like(torch.as_tensor(parts[0])))
        initial = self.evolution.pull(self.slopes, parts, self.rates, change)
        return self._out(initial), self._out(change)


class _Evolve(torch.autograd.Function):
    """The whole run as one differentiable operation with a hand-written discrete adjoint."""

    @staticmethod
    def forward(ctx, evolution: Evolution, memory: float, n_faces: int, u0, scale, *tensors):
        faces = tensors[:n_faces]
        needed = any(t.requires_grad for t in (u0, scale, *tensors))
        kernels = evolution.kernels
        ctx.evolution, ctx.n_faces = evolution, n_faces
        ctx.need_scale, ctx.need_faces = scale.requires_grad, any(f.requires_grad for f in faces)
        ctx.shapes = [t.shape for t in tensors]
        if needed:
            fits = max(1, int(memory // (u0.numel() * u0.element_size())))
            count = len(evolution.operations)
            # Either all states, or every stride-th with the rest computed again segment by segment.
            stride = count if count <= fits else max(math.ceil(math.sqrt(count)), math.ceil(count / fits))
            ctx.record = Record(max(stride, 1))
            outputs = evolution.forward(kernels.array(u0), ctx.record)
        else:
            outputs = evolution.forward(kernels.array(u0))
        return torch.stack([torch.as_tensor(o) for o in outputs], 1)

    @staticmethod
    def backward(ctx, grad):
        evolution = ctx.evolution
        kernels = evolution.kernels
        cotangents = [kernels.array(grad[:, t].contiguous()) for t in range(grad.shape[1])]
        gradient = None
        if ctx.need_faces:
            gradient = [kernels.array(torch.zeros(shape, dtype=grad.dtype, device=grad.device))
                        for shape in ctx.shapes[: ctx.n_faces]]  # fmt: skip
        for total in evolution.reaction.gradients:
            total.zero_()
        lam, d_scale = evolution.adjoint(ctx.record, cotangents, ctx.need_scale, gradient)
        face_parts = [torch.as_tensor(g).to(torch.float64) for g in gradient] if gradient else [None] * ctx.n_faces
        leaf_parts = [g.clone() for g in evolution.reaction.gradients]
        return None, None, None, torch.as_tensor(lam), d_scale, *face_parts, *leaf_parts
