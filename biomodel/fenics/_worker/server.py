"""What a worker is asked to do: keep meshes and forms, and run simulations on them."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .coupled import Body, CoupledHeat
from .elasticity import Elasticity
from .forms import Diffusion, evaluate
from .mesh import Space
from .reaction import Reaction
from .stepping import Failed, Heat, Run, operations

#: Meshes, forms and linear maps kept at once.
SPACES, SYSTEMS, MAPS = 4, 6, 4
#: Seconds between messages of progress.
PACE = 0.25

Arrays = dict[str, np.ndarray]
#: Header and arrays; the latter count on rank 0 only.
Answer = tuple[dict[str, Any], dict[str, Any]]


class System(NamedTuple):
    """The forms of a model on a space, and its tapes."""

    space: Space
    diffusion: Diffusion | None
    rate: dict[str, Any]
    slopes: dict[str, Any]
    wrt: list[str]
    tissue: dict[str, Any] | None
    elasticity: Elasticity | None


class Kept(OrderedDict):
    """The most recently used values by key."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def keep(self, key: str, value: Any) -> None:
        """Remember a value; the one unused for longest goes."""
        self[key] = value
        self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)

    def find(self, key: str, what: str) -> Any:
        """The value of a key; `Failed` of kind "unknown" tells the sender to send it again."""
        if key not in self:
            raise Failed("unknown", f"{what} {key}")
        self.move_to_end(key)
        return self[key]


class Server:
    """Answers requests; on every rank alike, with arrays whole on all of them.

    Parameters
    ----------
    comm : MPI communicator
    report : callable
        Receives the share done of a long request, on rank 0.
    """

    def __init__(self, comm, report: Callable[[float], None]):
        self.comm, self._report = comm, report
        self.spaces, self.systems, self.maps = Kept(SPACES), Kept(SYSTEMS), Kept(MAPS)
        self.heats: dict[str, tuple[Any, Heat]] = {}
        self._told = 0.0

    def answer(self, request: dict[str, Any], arrays: Arrays) -> Answer:
        """Do what a request asks."""
        do = {"space": self.space, "system": self.system, "run": self.run, "gradient": self.gradient,
              "tangents": self.tangents, "linearise": self.linearise, "push": self.push, "pull": self.pull,
              "evaluate": self.evaluate, "stress": self.stress}.get(request["do"])  # fmt: skip
        if do is None:
            raise Failed("request", f"nothing is known of the request {request['do']!r}")
        return do(request, arrays)

    # Meshes and forms ------------------------------------------------------------------------------------------------

    def space(self, request, arrays) -> Answer:
        """Make a mesh and its function space: arrays ``points``, ``cells``, ``edges``."""
        space = Space(self.comm, arrays["points"], arrays["cells"], arrays["edges"], request["degree"])
        self.spaces.keep(request["key"], space)
        return {"nodes": space.count}, {}

    def system(self, request, arrays) -> Answer:
        """Make the forms of a diffusion coefficient on a space."""
        space = self.spaces.find(request["space"], "space")
        made = None
        if request["diffusion"] is not None:
            made = Diffusion(space, request["diffusion"], request["diffusion_slopes"], request["axes"],
                             request["positions"], request["cell_fields"])  # fmt: skip
        tissue, body = request["mechanics"], None
        if tissue is not None:
            body = Elasticity(space, tissue["degree"], tissue["poisson"], tissue["clamped"], tissue["tolerance"])
        self.systems.keep(request["key"], System(space, made, request["reaction"], request["reaction_slopes"],
                                                 request["reaction_wrt"], tissue, body))  # fmt: skip
        return {}, {}

    def evaluate(self, request, arrays) -> Answer:
        """Replay a tape as UFL: nodal values ``node:<name>`` in, ``values`` (outputs, nodes) out."""
        space = self.spaces.find(request["space"], "space")
        nodal = {n[5:]: space.take(a) for n, a in arrays.items() if n.startswith("node:")}
        found = space.collect(evaluate(space, request["tape"], request["scalars"], nodal))
        return {}, {} if found is None else {"values": found}

    # Runs ------------------------------------------------------------------------------------------------------------

    def _lay_out(self, request, arrays) -> tuple[Space, Run]:
        system: System = self.systems.find(request["system"], "system")
        space, diffusion = system.space, system.diffusion
        self._told = 0.0  # every run says at once that it has begun
        scalars = request["scalars"]
        heat: Any = None
        if diffusion is not None:
            cells = {n[5:]: a for n, a in arrays.items() if n.startswith("cell:")}
            if system.tissue is None:
                heat = self._heat(request, diffusion, scalars, cells)
            else:
                heat = CoupledHeat(diffusion, (scalars, cells), self._body(system, scalars, arrays),
                                   system.tissue["gives"], request["tolerance"], request["memory"] / MAPS)  # fmt: skip
        values: dict[str, Any] = dict(scalars)
        values.update({n[5:]: space.take(a) for n, a in arrays.items() if n.startswith("node:")})
        reaction = Reaction(system.rate, system.slopes, system.wrt, values, arrays["tables"], request["columns"])
        jumps = arrays["jumps"]
        jumps = space.take(jumps) if jumps.ndim > 1 else jumps
        program = operations(arrays["kinds"], arrays["lengths"])
        return space, Run(self.comm, heat, reaction, jumps, program, request["memory"], self._progress)

    def _body(self, system: System, scalars, arrays) -> Body:
        values = {**scalars, **{n[5:]: a for n, a in arrays.items() if n.startswith(("cell:", "body:"))}}
        assert system.tissue is not None and system.elasticity is not None
        return Body(system.space, system.elasticity, system.tissue, values)

    def stress(self, request, arrays) -> Answer:
        """Elastic equilibrium at a nodal state ``u``: ``stress`` (6, cells) and ``displacement`` (d, nodes)."""
        system: System = self.systems.find(request["system"], "system")
        space, body = system.space, self._body(system, request["scalars"], arrays)
        entries = body.stress(space.take(arrays["u"])).entries.T[:, : space.owned_cells]
        stress = space.join(np.ascontiguousarray(entries), space.cell_of[: space.owned_cells], space.cell_count)
        moved = body.elasticity.displacement()
        counts = {"solves": body.elasticity.solves, "iterations": body.elasticity.iterations}
        return counts, {} if stress is None else {"stress": stress, "displacement": moved}

    def _heat(self, request, diffusion: Diffusion, scalars, cells) -> Heat:
        """Matrices and preconditioners are kept while the coefficient stays as it is."""
        mark = (request["tolerance"], {n: scalars.get(n) for n in diffusion.names},
                {n: a.tobytes() for n, a in cells.items()})  # fmt: skip
        key = request["system"]
        if key not in self.heats or self.heats[key][0] != mark or self.heats[key][1].diffusion is not diffusion:
            diffusion.set(scalars, cells)
            self.heats = {key: (mark, Heat(diffusion, request["tolerance"]))}
        return self.heats[key][1]

    def _progress(self, share: float) -> None:
        now = time.monotonic()
        if now - self._told > PACE:
            self._told = now
            self._report(share)

    def _counts(self, run: Run, before: tuple[int, int]) -> dict[str, Any]:
        if run.heat is None:
            return {"solves": 0, "iterations": 0}
        return {"solves": run.heat.solves - before[0], "iterations": run.heat.iterations - before[1]}

    def run(self, request, arrays) -> Answer:
        """Simulate: nodal states ``u`` (outputs, nodes) from ``u0`` (nodes,)."""
        space, run = self._lay_out(request, arrays)
        before = (run.heat.solves, run.heat.iterations) if run.heat else (0, 0)
        found = space.collect(np.stack(run.forward(space.take(arrays["u0"]))))
        return self._counts(run, before), {} if found is None else {"u": found}

    def gradient(self, request, arrays) -> Answer:
        """Gradient of sum(``cotangents`` u): arrays ``u0``, ``tables``, ``jumps`` and ``by:<input>`` come back."""
        space, run = self._lay_out(request, arrays)
        found = run.gradient(space.take(arrays["u0"]), space.take(arrays["cotangents"]), request["scalar_wrt"],
                             request["cell_wrt"])  # fmt: skip
        numbers: dict[str, float] = {}
        back: dict[str, Any] = {"u0": space.collect(found["u0"])}
        back["tables"] = self._sum(found["tables"])
        back["jumps"] = space.collect(found["jumps"]) if found["jumps"].ndim > 1 else self._sum(found["jumps"])
        for kind in ("reaction", "diffusion"):
            collect = space.collect if kind == "reaction" else space.collect_cells
            for name, value in found[kind].items():
                if np.ndim(value):
                    back[f"{kind}:{name}"] = collect(value)
                else:
                    numbers[f"{kind}:{name}"] = float(self.comm.allreduce(value))
        return {"numbers": numbers}, back if self.comm.rank == 0 else {}

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return values if self.comm.size == 1 else self.comm.allreduce(values)

    def tangents(self, request, arrays) -> Answer:
        """States ``u`` (outputs, nodes) and tangents ``du`` (outputs, m, nodes) in m directions."""
        space, run = self._lay_out(request, arrays)
        numbers = {n[3:]: a for n, a in arrays.items() if n.startswith("d1:")}
        u, du = run.tangents(space.take(arrays["u0"]), space.take(arrays["du0"]), numbers, arrays["d_tables"],
                             arrays["d_jumps"])  # fmt: skip
        found = {"u": space.collect(np.stack(u)), "du": space.collect(np.stack(du))}
        return {}, found if self.comm.rank == 0 else {}

    def linearise(self, request, arrays) -> Answer:
        """Keep the derivative by the initial state under ``key``; states ``u`` come back."""
        space, run = self._lay_out(request, arrays)
        outputs, slopes = run.linearise(space.take(arrays["u0"]))
        # The matrices of another run must not change under the map.
        if run.heat is not None:
            self.heats.pop(request["system"], None)
            run.heat.solves = 0
        self.maps.keep(request["key"], (space, run, slopes))
        found = space.collect(np.stack(outputs))
        return {}, {} if found is None else {"u": found}

    def push(self, request, arrays) -> Answer:
        """``x`` (m, nodes) to ``y`` (outputs, m, nodes) by a kept derivative."""
        space, run, slopes = self.maps.find(request["key"], "map")
        found = space.collect(run.push(slopes, space.take(arrays["x"])))
        return {}, {} if found is None else {"y": found}

    def pull(self, request, arrays) -> Answer:
        """``y`` (outputs, m, nodes) to ``x`` (m, nodes) by the transpose of a kept derivative."""
        space, run, slopes = self.maps.find(request["key"], "map")
        found = space.collect(run.pull(slopes, space.take(arrays["y"])))
        return {}, {} if found is None else {"x": found}
