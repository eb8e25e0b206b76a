"""A model on a mesh under a schedule: parameters and an initial state on voxels in, states on voxels out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from biomodel.domain import Domain
from biomodel.errors import NotFiniteError, SolverError
from biomodel.fenics.exchange import Exchange
from biomodel.fenics.job import Job, Linear, LinearMap, Simulate, by_matrix
from biomodel.fenics.linearisation import Linearisation
from biomodel.fenics.mechanics import Tissue, displacement_on_voxels, von_mises_on_voxels
from biomodel.fenics.mesh import BoxMesh, Mesh, Transfer
from biomodel.fenics.pool import pool
from biomodel.fenics.process import Request
from biomodel.fenics.program import Course, StepPlan, lay_out
from biomodel.fenics.system import PLACES, Tapes
from biomodel.mechanics import Clamped
from biomodel.solvers.base import coordinate_fields
from biomodel.solvers.evolution import directional
from biomodel.solvers.grids import coarsen

if TYPE_CHECKING:
    from biomodel.fenics.solver import FenicsSolver

#: More steps than this are refused: the parameters are then far from any tumour's.
MOST_STEPS = 20_000
#: Safety on the error that the pilot run predicts (0.5 aims at half the tolerance).
SAFETY = 0.5
#: Most nodes of the mesh on which steps are tried out.
PILOT = 20_000
#: The same where each step also solves for the stress.
COUPLED_PILOT = 4_000


class FenicsSimulation:
    """A model on a mesh under a schedule.

    Built by `FenicsSolver.build` and called as the simulations of `TorchSolver` are: values on voxels in and out,
    (batch, time, z, y, x), differentiable by the parameters (numbers, tensors of shape (batch,), or fields (z, y, x) /
    (batch, z, y, x)) and the initial state. A state at the time of a dose is the state before that dose.
    """

    def __init__(self, solver: FenicsSolver, model, domain: Domain, schedule, fields: Mapping[str, np.ndarray],
                 start: float):  # fmt: skip
        self.solver, self.model, self.domain, self.schedule, self.start = solver, model, domain, schedule, start
        self.shape = domain.shape
        self._extra = {n: np.asarray(v, float) for n, v in fields.items()}
        self.course = Course(model, schedule, start)
        self.tissue = Tissue.of(model, domain)
        self.tapes = Tapes.of(model, self.course.kills, self.course.columns)
        given = {**coordinate_fields(domain), **domain.tissues, **self._extra}
        self.fields = {n: np.asarray(given[n], float)[domain.mask] for n in model.fields}
        for name, values in self.fields.items():
            if not np.isfinite(values).all():
                raise SolverError(f"field {name!r} has NaN or infinite values inside the mask; mend it.")
        if self.tapes.diffusion is not None and len(self.tapes.diffusion.outputs) == 9:
            self.tapes.check_tensor(model, self.fields, [a for a in range(3) if domain.shape[2 - a] > 1])

    # Mesh and tapes --------------------------------------------------------------------------------------------------

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh."""
        return self.solver.mesh.make(self.domain)

    @cached_property
    def transfer(self) -> Transfer:
        """The maps between voxels and nodes."""
        return self.mesh.transfer(self.solver.degree)

    @cached_property
    def exchange(self) -> Exchange:
        """The maps between voxel averages and the numbers at the nodes that a run evolves."""
        return Exchange(self.transfer, self.solver.degree)

    @property
    def nodes(self) -> int:
        """Number of nodes of the mesh."""
        return self.transfer.average.shape[1]

    @cached_property
    def _space(self) -> Request:
        arrays = {"points": self.mesh.points, "cells": self.mesh.cells, "edges": self.mesh.edges}
        if self.solver.degree == 1 and (self.tissue is None or self.solver.displacement_degree == 1):
            arrays["edges"] = np.zeros((0, 2), np.int64)
        mark = hashlib.sha1(str(self.solver.degree).encode())
        for a in arrays.values():
            mark.update(np.ascontiguousarray(a).tobytes())
        return {"do": "space", "key": mark.hexdigest(), "degree": self.solver.degree}, arrays

    @cached_property
    def _nodal_data(self) -> dict[str, np.ndarray]:
        places = dict(zip(self.mesh.axes, self.mesh.nodes(self.solver.degree).T, strict=True))
        found = {}
        for name in self.tapes.reaction.inputs:
            if name.startswith("c."):
                axis = PLACES.index(name[2:]) if self._is_place(name[2:]) else -1
                found[name] = places[axis] if axis in places else self.transfer.nodal @ self.fields[name[2:]]
        return found

    @cached_property
    def _cell_data(self) -> dict[str, np.ndarray]:
        names = self.tapes.diffusion.inputs if self.tapes.diffusion else ()
        return {n: self.transfer.cellwise @ self.fields[n[2:]] for n in names
                if n[2:] in self.fields and not self._is_place(n[2:])}  # fmt: skip

    @cached_property
    def _body_data(self) -> dict[str, np.ndarray]:
        """Fields that moduli and pressure read, by cells."""
        centres = dict(zip(self.mesh.axes, self.mesh.points[self.mesh.cells].mean(1).T, strict=True))
        found = {}
        for name in self.tissue.inputs if self.tissue else ():
            if name.startswith("c."):
                axis = PLACES.index(name[2:]) if self._is_place(name[2:]) else -1
                found[name] = centres[axis] if axis in centres else self.transfer.cellwise @ self.fields[name[2:]]
        return found

    def _is_place(self, name: str) -> bool:
        return name in PLACES and name not in self._extra and name not in self.domain.tissues

    # Arguments -------------------------------------------------------------------------------------------------------

    def _values(self, params: Mapping) -> dict[str, torch.Tensor]:
        """All parameters as float64 tensors: (batch,) or fields (batch, voxels of the mask)."""
        inside = torch.tensor(self.domain.mask)
        found = {}
        for name, value in self.model.complete(params).items():
            tensor = torch.as_tensor(value, dtype=torch.float64)
            if tensor.ndim >= 3:
                if tuple(tensor.shape[-3:]) != self.shape or tensor.ndim > 4:
                    raise SolverError(f"{name}: field of shape {tuple(tensor.shape)}; the grid is {self.shape}.")
                tensor = tensor[..., inside]
                tensor = tensor[None] if tensor.ndim == 1 else tensor
            elif tensor.ndim == 0:
                tensor = tensor[None]
            elif tensor.ndim != 1:
                raise SolverError(
                    f"{name}: shape {tuple(tensor.shape)}; expected a number, (batch,) or a field (z, y, x)."
                )
            if not bool(torch.isfinite(tensor.detach()).all()):
                raise SolverError(f"{name}: it has NaN or infinite values.")
            found[name] = tensor
        return found

    def _state(self, u0) -> torch.Tensor:
        """Initial states (batch, voxels of the mask)."""
        u0 = torch.as_tensor(u0)
        if tuple(u0.shape[-3:]) != self.shape or u0.ndim not in (3, 4):
            raise SolverError(
                f"initial state: shape {tuple(u0.shape)}; expected (batch, z, y, x) or (z, y, x) with (z, y, x) = "
                f"{self.shape}."
            )
        u0 = u0.to(torch.float64)[..., torch.tensor(self.domain.mask)]
        if not bool(torch.isfinite(u0.detach()).all()):
            raise SolverError("initial state: it has NaN or infinite values; mend the image or mask them.")
        return u0[None] if u0.ndim == 1 else u0

    def _batch(self, values: dict, u0: torch.Tensor) -> int:
        sizes = {u0.shape[0], *(v.shape[0] for v in values.values())} - {1}
        if len(sizes) > 1:
            raise SolverError(f"batch sizes of parameters and initial state differ: {sorted(sizes)}.")
        return sizes.pop() if sizes else 1

    @staticmethod
    def _row(values: dict, i: int) -> dict[str, torch.Tensor]:
        """Values of one member of a batch: () or (voxels,)."""
        return {n: v[i if v.shape[0] > 1 else 0] for n, v in values.items()}

    @staticmethod
    def _times(times) -> tuple[float, ...]:
        times = np.asarray(times, float)
        times = times[0] if times.ndim == 2 and len(times) == 1 else np.atleast_1d(times)
        if times.ndim != 1 or not np.isfinite(times).all() or times.size == 0:
            raise SolverError(f"times: expected finite days, increasing; found {times.tolist()}.")
        return tuple(times.tolist())

    def _job(self, values: dict, plan: StepPlan, progress=None) -> tuple[Job, list[torch.Tensor]]:
        """The run of one member of a batch: its job, and its leaves but the initial state."""
        diffusing = (*(self.tapes.diffusion.inputs if self.tapes.diffusion else ()),
                     *(self.tissue.inputs if self.tissue else ()))  # fmt: skip
        used = [n for n in dict.fromkeys((*self.tapes.reaction.inputs, *diffusing)) if n.startswith("p.")]
        scalars = tuple(n for n in used if values[n[2:]].ndim == 0)
        nodal = tuple(n for n in used if n not in scalars and n in self.tapes.reaction.inputs)
        cells = tuple(n for n in used if n not in scalars and n in diffusing)
        at_nodes = {n: by_matrix(self.transfer.nodal, v) if v.ndim else v for n, v in values.items()
                    if f"p.{n}" not in cells}  # fmt: skip
        leaves = [values[n[2:]] for n in scalars] + [at_nodes[n[2:]] for n in nodal]
        leaves += [by_matrix(self.transfer.cellwise, values[n[2:]]) for n in cells]
        inputs = {n: x.detach().numpy() for n, x in zip((*scalars, *nodal), leaves, strict=False)}
        plain = {n: float(v) if v.ndim == 0 else v for n, v in inputs.items()}
        diffuses = self.tapes.diffusion is not None
        program = lay_out(self.course, plan, diffuses, (self.tapes.reaction, self.tapes.by_state), values,
                          {**plain, **self._nodal_data})  # fmt: skip
        tables = self.course.table(values, program.days.reshape(-1))
        tables = tables.reshape(*program.days.shape, len(self.course.columns))
        leaves += [tables, self.course.survivals(at_nodes, program.jumps, self.nodes)]
        arrays = {"kinds": program.kinds, "lengths": program.lengths}
        arrays.update({f"node:{n}": v for n, v in self._nodal_data.items()})
        arrays.update({f"cell:{n}": v for n, v in self._cell_data.items()})
        arrays.update({f"body:{n}": v for n, v in self._body_data.items()})
        system = self._system(cells)
        header = {"system": system["key"], "columns": self.course.columns, "tolerance": self.solver.linear_rtol,
                  "memory": self.solver.memory}  # fmt: skip
        return Job(pool(self.solver.ranks), [self._space, (system, {})], header, arrays, scalars, nodal, cells,
                   frozenset(diffusing), progress), leaves  # fmt: skip

    def _system(self, cells: Sequence[str]) -> dict[str, Any]:
        """The request that makes the forms, where these parameters are fields."""
        fields, tissue = [*self._cell_data, *cells], None
        if self.tissue is not None:
            fields.append(self.tissue.gives)
            tissue = self.tissue.header(self.solver.displacement_degree, self.solver.stress_rtol)
        return self.tapes.system(self._space[0]["key"], self.mesh, fields, tissue)

    # Time ------------------------------------------------------------------------------------------------------------

    def fixed_plan(self, times, counts: Sequence[int]) -> StepPlan:
        """A plan with a given number of steps in each interval between the requested times."""
        return StepPlan(self._times(times), tuple(int(c) for c in counts))

    def plan(self, params: Mapping, u0, times) -> StepPlan:
        """Choose the steps at these parameters, so that the error in time stays below the solver's `rtol`.

        A pilot run, on a coarser grid where this one is large, with one and two times the steps, measures the error;
        it falls with the square of the step.
        """
        with torch.no_grad():
            values = {k: v.detach() for k, v in self._values(params).items()}
            times, u0 = self._times(times), self._state(u0).detach()
            spans = np.diff([self.start, *times])
            once = [int(s > 0) for s in spans]
            rates = [float(values[n].abs().max()) for n in values if n.startswith("growth.")] or [0.0]
            step = min(0.4 / max(*rates, 1e-3), 20.0)
            counts = [max(int(math.ceil(s / step)), o) for s, o in zip(spans, once, strict=True)]
            tolerance, error = SAFETY * self.solver.rtol, math.inf
            for _ in range(4):
                error = self._pilot_error(values, u0, times, counts)
                if not math.isfinite(error):
                    raise NotFiniteError("the pilot run is not finite; the parameters are too extreme for this model.")
                factor = math.sqrt(4 / 3 * error / tolerance)
                wanted = [max(int(math.ceil(c * factor - 1e-9)), o) for c, o in zip(counts, once, strict=True)]
                if sum(wanted) > MOST_STEPS:
                    raise SolverError(
                        f"{sum(wanted)} steps would be needed for a relative error of {self.solver.rtol:g}; the "
                        "parameters are too extreme for this mesh, or rtol is too small."
                    )
                fell = (sum(counts) / max(sum(wanted), 1)) ** 2
                if factor <= 3:
                    return StepPlan(times, tuple(wanted), 4 / 3 * error * fell)
                counts = wanted
            return StepPlan(times, tuple(counts), 4 / 3 * error)

    def _pilot_error(self, values: dict, u0: torch.Tensor, times, counts) -> float:
        chosen = {0, *(int(v.reshape(len(v), -1).amax(1).argmax()) for v in values.values() if len(v) > 1)}
        worst = 0.0
        for i in sorted(chosen):
            row, start = self._row(values, i), u0[i if len(u0) > 1 else 0]
            pilot, params, first = self._pilot(row, self._spread(start))
            runs = [pilot(params, first, times, plan=StepPlan(times, tuple(m * c for c in counts)))[0] for m in (1, 2)]
            # Of a tumour that has all but vanished only the size against the start counts.
            least = 1e-3 * float(first.norm())
            for coarse, fine in zip(*runs, strict=True):
                size = max(float(fine.norm()), least)
                worst = max(worst, float((coarse - fine).norm()) / size if size else 0.0)
        return worst

    def _pilot(self, row: dict, u0: torch.Tensor):
        """The simulation on which steps are tried out, with parameters and initial state to match."""
        params = {n: v if v.ndim == 0 else self._spread(v) for n, v in row.items()}
        here: FenicsSimulation = self
        while here.nodes > (PILOT if self.tissue is None else COUPLED_PILOT) and max(here.shape) > 8:
            try:
                coarser = here._coarser
            except SolverError:
                # Clamped on both sides, larger voxels could not move.
                break
            mask = torch.tensor(here.domain.mask)[None]
            params = {n: v if v.ndim == 0 else coarsen(v[None], mask)[0] for n, v in params.items()}
            u0 = coarsen(u0[None], mask)[0]
            here = coarser
        return here, params, u0

    @cached_property
    def _coarser(self) -> FenicsSimulation:
        """The same on voxels twice as large."""
        d, mask = self.domain, torch.tensor(self.domain.mask)[None]

        def half(values):
            return coarsen(torch.tensor(np.where(d.mask, values, 0.0))[None], mask)[0].numpy()

        dz, dy, dx = (s * (2 if n > 1 else 1) for s, n in zip(d.spacing, d.shape, strict=True))
        inside = half(d.mask.astype(float)) > 0
        domain = Domain.box(inside.shape, (dz, dy, dx), inside, {n: half(v) for n, v in d.tissues.items()})
        # Coordinates are not those of the finer grid: the place itself is a field like any other here.
        fields = {n: half(v) for n, v in {**coordinate_fields(d), **self._extra}.items()}
        fields = {n: v for n, v in fields.items() if n in self.model.fields and n not in domain.tissues}
        solver = replace(self.solver, mesh=BoxMesh())
        return FenicsSimulation(solver, self.model, domain, self.schedule, fields, self.start)

    # Runs ------------------------------------------------------------------------------------------------------------

    def __call__(self, params: Mapping, u0, times, plan: StepPlan | None = None,
                 progress: Callable[[float], None] | None = None) -> torch.Tensor:  # fmt: skip
        """Simulate.

        Parameters
        ----------
        params : mapping
            Values by global name; those left out take their known value or their prior's median.
        u0 : array or Tensor, shape (z, y, x) or (batch, z, y, x)
            Averages over voxels.
        times : sequence of float
            Requested days, increasing.
        plan : StepPlan, optional
            Steps from `plan` or `fixed_plan`, so that several runs share them.
        progress : callable, optional
            Receives the share of a member's run that is done.

        Returns
        -------
        Tensor, shape (batch, T, z, y, x)
            Averages over voxels, 0 outside the mask.

        Raises
        ------
        SolverError
            If the initial state or the result is not finite, or the worker fails.
        """
        return self._spread(by_matrix(self.exchange.average, self.at_nodes(params, u0, times, plan, progress)))

    def at_nodes(self, params: Mapping, u0, times, plan: StepPlan | None = None, progress=None) -> torch.Tensor:
        """The same with the states at the mesh's nodes: (batch, T, nodes)."""
        values, start = self._values(params), self._state(u0)
        plan = self.plan(params, u0, times) if plan is None else replace(plan, times=self._times(times))
        if len(plan.times) != len(plan.counts):
            raise SolverError(f"the plan is for {len(plan.counts)} times, but {len(plan.times)} are asked for.")
        nodal = Linear.apply(self.exchange.to_nodes, self.exchange.to_nodes_transposed, start)
        found = []
        for i in range(self._batch(values, start)):
            job, leaves = self._job(self._row(values, i), plan, progress)
            found.append(Simulate.apply(job, nodal[i if len(nodal) > 1 else 0], *leaves))
        return torch.stack(found)

    def stress(self, params: Mapping, u) -> tuple[torch.Tensor, torch.Tensor]:
        """Stress and displacement that given cell fractions make, as `TorchSolver` gives them; not differentiable.

        Parameters
        ----------
        params : mapping
            Values by global name, as in a simulation.
        u : array or Tensor, shape (z, y, x) or (batch, z, y, x)
            Averages over voxels.

        Returns
        -------
        von_mises : Tensor, shape (batch, z, y, x)
            Of the mean stress in each voxel, kPa; 0 outside the mask.
        displacement : Tensor, shape (batch, 3, z, y, x)
            Mean over each voxel, components (x, y, z) along the grid's axes, mm; 0 outside the mask. Of a body that
            nothing holds, without rigid motion.

        Raises
        ------
        SolverError
            If the model has no mechanics, or its equilibrium cannot be solved.
        """
        if self.tissue is None:
            raise SolverError(f"{self.model.label}: it has no mechanics; use StressDamped as its diffusion.")
        with torch.no_grad():
            values, start = self._values(params), self._state(u)
            found = [self._stress(self._row(values, i), start[i if len(start) > 1 else 0].numpy())
                     for i in range(self._batch(values, start))]  # fmt: skip
        stress, moved = (self._spread(torch.from_numpy(np.stack(part))) for part in zip(*found, strict=True))
        return stress, moved

    def _stress(self, row: dict, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        assert self.tissue is not None
        names = [n for n in self.tissue.inputs if n.startswith("p.")]
        cells = [n for n in names if row[n[2:]].ndim]
        arrays = {"u": self.exchange.to_nodes(u), **{f"body:{n}": v for n, v in self._body_data.items()}}
        arrays.update({f"body:{n}": self.transfer.cellwise @ row[n[2:]].numpy() for n in cells})
        system = self._system(cells)
        header = {"do": "stress", "system": system["key"],
                  "scalars": {n: float(row[n[2:]]) for n in names if n not in cells}}  # fmt: skip
        with pool(self.solver.ranks).worker() as worker:
            _, back = worker.ask((header, arrays), [self._space, (system, {})], None)
        clamped = isinstance(self.tissue.equation.edge, Clamped)
        stress = von_mises_on_voxels(self.mesh, self.transfer, back["stress"])
        degree = self.solver.displacement_degree
        return stress, displacement_on_voxels(self.mesh, self._vectors, degree, back["displacement"], clamped)

    @cached_property
    def _vectors(self) -> Transfer:
        """The maps between voxels and the nodes of the displacement."""
        degree = self.solver.displacement_degree
        return self.transfer if degree == self.solver.degree else self.mesh.transfer(degree)

    def _spread(self, inside: torch.Tensor) -> torch.Tensor:
        """From the mask's voxels (..., voxels) to the grid (..., z, y, x)."""
        full = torch.zeros(*inside.shape[:-1], *self.shape, dtype=inside.dtype)
        full[..., torch.tensor(self.domain.mask)] = inside
        return full

    def grid_error(self, params: Mapping, u0, times, plan: StepPlan) -> torch.Tensor:
        """Change of the voxel averages when the mesh is refined once, (T, z, y, x); one patient."""
        with torch.no_grad():
            here = self(params, u0, times, plan=plan)[0]
            return self._finer(params, u0, times, plan=plan)[0] - here

    @cached_property
    def _finer(self) -> FenicsSimulation:
        solver = replace(self.solver, mesh=self.solver.mesh.finer())
        return FenicsSimulation(solver, self.model, self.domain, self.schedule, self._extra, self.start)

    def sensitivities(self, params: Mapping, u0, times, wrt: Sequence[str | None], plan: StepPlan | None = None,
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
            Where results are wanted.

        Returns
        -------
        u : Tensor, shape (batch, T, z, y, x), or (batch, rows)
        du : Tensor, shape (len(wrt), batch, T, z, y, x), or (len(wrt), batch, rows)
        """
        values = {k: v.detach() for k, v in self._values(params).items()}
        start = self._state(u0).detach()
        plan = self.plan(params, u0, times) if plan is None else replace(plan, times=self._times(times))
        for name in wrt:
            if name is not None and (name not in values or values[name].ndim != 1):
                raise SolverError(f"sensitivities: {name!r} is not a scalar parameter of this model.")
        batch, m = self._batch(values, start), len(wrt)
        moved = torch.zeros(m, 1, start.shape[-1], dtype=torch.float64)
        if du0 is not None:
            moved = torch.as_tensor(du0, dtype=torch.float64)[..., torch.tensor(self.domain.mask)]
        states, tangents = [], []
        for i in range(batch):
            nodal = self.exchange.to_nodes(start[i if len(start) > 1 else 0].numpy())
            along = self.exchange.to_nodes(moved[:, i if moved.shape[1] > 1 else 0].numpy())
            u, du = self._tangents(self._row(values, i), plan, wrt, nodal, along)
            states.append(torch.from_numpy(self.exchange.average @ u.T).T)
            tangents.append(by_matrix(self.exchange.average, torch.from_numpy(du)).transpose(0, 1))
        u, du = self._spread(torch.stack(states)), self._spread(torch.stack(tangents, 1))
        if rows is None:
            return u, du
        inside = torch.tensor(rows)
        return u[:, inside], du[:, :, inside]

    def _tangents(self, row: dict, plan: StepPlan, wrt, u0: np.ndarray, du0: np.ndarray):
        moving = [n for n in dict.fromkeys(wrt) if n is not None]
        job, leaves = self._job(row, plan)

        def parts(*tensors):
            return self._job({**row, **dict(zip(moving, tensors, strict=True))}, plan)[1]

        directions = [[torch.ones_like(row[n]) if n == name else None for n in moving] for name in wrt]
        changes = directional(parts, [row[n] for n in moving], directions)
        arrays: dict[str, np.ndarray] = {"du0": du0}
        for k, name in enumerate(job.scalars):
            arrays[f"d1:{name}"] = np.array([float(change[k]) for change in changes])
        arrays["d_tables"] = np.stack([change[-2].numpy() for change in changes])
        jumps = np.stack([change[-1].numpy() for change in changes])
        if jumps.ndim > 2:
            raise SolverError("sensitivities: parameters of radiotherapy must be numbers here, not fields.")
        arrays["d_jumps"] = jumps
        _, found = job.ask(job.request("tangents", [u0, *(x.detach().numpy() for x in leaves)], None, arrays))
        return found["u"], found["du"]

    def linearise(self, params: Mapping, u0, times, plan: StepPlan | None = None) -> Linearisation:
        """The run's outputs with its derivative by the initial state, for many products."""
        values = {k: v.detach() for k, v in self._values(params).items()}
        start = self._state(u0).detach()
        plan = self.plan(params, u0, times) if plan is None else replace(plan, times=self._times(times))
        maps = []
        for i in range(self._batch(values, start)):
            job, leaves = self._job(self._row(values, i), plan)
            nodal = self.exchange.to_nodes(start[i if len(start) > 1 else 0].numpy())
            maps.append(LinearMap(job, [nodal, *(x.numpy() for x in leaves)]))
        return Linearisation(self, maps)
