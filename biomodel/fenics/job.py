"""One run as a request to a worker, and as an operation that torch can differentiate."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from biomodel.errors import SolverError
from biomodel.fenics.exchange import times
from biomodel.fenics.pool import Pool
from biomodel.fenics.process import Answer, Request

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class Job:
    """What does not depend on the differentiable inputs of a run.

    Attributes
    ----------
    pool : Pool
    setup : sequence of (header, arrays)
        The mesh and the forms that the run builds on.
    header : mapping
        Of every request of this run.
    arrays : mapping of str to ndarray
        The program, and fields that are data.
    scalars, nodal, cells : tuple of str
        Inputs that are parameters: numbers, nodal fields, cell fields; the leaves come in this order.
    diffusing : frozenset of str
        Those inputs that the diffusion reads.
    progress : callable or None
    """

    pool: Pool
    setup: Sequence[Request]
    header: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray]
    scalars: tuple[str, ...]
    nodal: tuple[str, ...]
    cells: tuple[str, ...]
    diffusing: frozenset[str]
    progress: Callable[[float], None] | None = None

    def request(self, do: str, leaves: Sequence[np.ndarray], extra: Mapping[str, Any] | None = None,
                arrays: Mapping[str, np.ndarray] | None = None) -> Request:  # fmt: skip
        """A request with values for the leaves: u0, the inputs in their order, tables, jumps."""
        u0, *inputs = leaves[:-2]
        n, k = len(self.scalars), len(self.nodal)
        held = {**self.arrays, "u0": u0, "tables": leaves[-2], "jumps": leaves[-1], **(arrays or {})}
        held.update({f"node:{name}": a for name, a in zip(self.nodal, inputs[n : n + k], strict=True)})
        held.update({f"cell:{name}": a for name, a in zip(self.cells, inputs[n + k :], strict=True)})
        scalars = {name: float(x) for name, x in zip(self.scalars, inputs[:n], strict=True)}
        return {**self.header, "do": do, "scalars": scalars, **(extra or {})}, held

    def ask(self, request: Request, setup: Sequence[Request] = ()) -> Answer:
        """Ask a worker of the pool."""
        with self.pool.worker() as worker:
            return worker.ask(request, [*self.setup, *setup], self.progress)


class Simulate(torch.autograd.Function):
    """Nodal states (outputs, nodes) from the leaves, differentiated by the worker's discrete adjoint."""

    @staticmethod
    def forward(ctx, job: Job, *leaves: torch.Tensor) -> torch.Tensor:
        """Run."""
        ctx.job = job
        ctx.save_for_backward(*leaves)
        _, arrays = job.ask(job.request("run", [x.detach().numpy() for x in leaves]))
        return torch.from_numpy(arrays["u"])

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple:
        """Run forward again and back: the worker keeps nothing between requests."""
        job: Job = ctx.job
        leaves = ctx.saved_tensors
        needed = ctx.needs_input_grad[2 : 2 + len(leaves) - 3]
        names = (*job.scalars, *job.nodal, *job.cells)
        wanted = {name for name, need in zip(names, needed, strict=True) if need}
        extra = {
            "scalar_wrt": [n for n in job.scalars if n in wanted and n in job.diffusing],
            "cell_wrt": [n for n in job.cells if n in wanted],
        }
        request = job.request("gradient", [x.detach().numpy() for x in leaves], extra,
                              {"cotangents": np.ascontiguousarray(gradients[0].numpy())})  # fmt: skip
        header, arrays = job.ask(request)
        found: list[torch.Tensor | None] = []
        for name, leaf in zip(names, leaves[1:-2], strict=True):
            total = torch.zeros_like(leaf)
            for kind in ("reaction", "diffusion"):
                key = f"{kind}:{name}"
                if key in arrays:
                    total = total + torch.from_numpy(arrays[key])
                elif key in header["numbers"]:
                    total = total + header["numbers"][key]
            found.append(total)
        return (None, torch.from_numpy(arrays["u0"]), *found, torch.from_numpy(arrays["tables"]),
                torch.from_numpy(arrays["jumps"]))  # fmt: skip


class Linear(torch.autograd.Function):
    """A linear map by a pair of numpy functions, itself and its transpose."""

    @staticmethod
    def forward(ctx, apply: Callable, transpose: Callable, x: torch.Tensor) -> torch.Tensor:
        """Apply the map."""
        ctx.transpose = transpose
        return torch.from_numpy(np.ascontiguousarray(apply(x.detach().numpy())))

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple:
        """Apply its transpose."""
        return None, None, torch.from_numpy(np.ascontiguousarray(ctx.transpose(gradients[0].numpy())))


def by_matrix(matrix, x: torch.Tensor) -> torch.Tensor:
    """A sparse matrix times a tensor (..., n) along its last axis."""
    return Linear.apply(lambda a: times(matrix, a), lambda a: times(matrix.T, a), x)


class LinearMap:
    """The derivative of one run's nodal states by its nodal initial state, kept by a worker."""

    def __init__(self, job: Job, leaves: Sequence[np.ndarray]):
        self.job = job
        header, arrays = job.request("linearise", leaves)
        mark = hashlib.sha1(repr(sorted(header.items(), key=str)).encode())
        for name in sorted(arrays):
            mark.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
        self.key = mark.hexdigest()
        # A worker that does not know the map (another one, or one started anew) makes it first.
        self.made: Request = ({**header, "key": self.key}, arrays)
        self.outputs = job.ask(self.made)[1]["u"]

    def push(self, x: np.ndarray) -> np.ndarray:
        """(m, nodes) to (outputs, m, nodes)."""
        return self._ask("push", {"x": x})["y"]

    def pull(self, y: np.ndarray) -> np.ndarray:
        """(outputs, m, nodes) to (m, nodes)."""
        return self._ask("pull", {"y": y})["x"]

    def _ask(self, do: str, arrays: Arrays) -> Arrays:
        found = self.job.ask(({"do": do, "key": self.key}, arrays), [self.made])[1]
        if not all(np.isfinite(a).all() for a in found.values()):
            raise SolverError("FEniCS: the derivative by the initial state is not finite.")
        return found
