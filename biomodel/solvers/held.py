"""The derivative of a coupled run by its initial state, with the stress held: a linear map and its transpose."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from biomodel.solvers.diffusion_step import diffuse, stages_of

if TYPE_CHECKING:
    from biomodel.solvers.coupled import CoupledPlan, CoupledSimulation


class HeldLinearisation:
    """The derivative J of the outputs by the initial state with stress held, as a linear map and its transpose."""

    def __init__(self, simulation: CoupledSimulation, values: dict, u: torch.Tensor, plan: CoupledPlan):
        self.simulation, self.batch = simulation, u.shape[0]
        leaves = simulation._reaction_leaves(values, self.batch, plan.reaction)
        react = simulation._reaction(values, plan.reaction)
        outputs: list[torch.Tensor] = []
        # ("scale", slope), ("diffuse", (days, stages, faces)) and ("output", index)
        self.operations: list[tuple[str, Any]] = []
        with torch.no_grad():
            memory = simulation._refresh(u, values, ())
            for kind, value in simulation._operations(plan):
                if kind == "react":
                    with torch.enable_grad():
                        before = u.detach().requires_grad_()
                        after = react(int(value), before, leaves)
                        self.operations.append(("scale", torch.autograd.grad(after.sum(), before)[0]))
                    u = after.detach()
                elif kind == "diffuse":
                    u, memory = simulation._step(u, value, memory, values)
                    self.operations.append((kind, (value, stages_of(value, memory.faces), memory.faces)))
                else:
                    outputs.append(u)
                    self.operations.append((kind, int(value)))
        self.count = len(outputs)
        self.outputs = simulation._unbox(torch.stack(outputs, 1))

    def _in(self, x: torch.Tensor) -> torch.Tensor:
        s = self.simulation
        return torch.where(s.mask, torch.as_tensor(x)[s._boxed].to(s.device), 0.0).to(s.solver.dtype)

    def _diffuse(self, x: torch.Tensor, step) -> torch.Tensor:
        flat = x.reshape(-1, *x.shape[2:])
        return diffuse(self.simulation.kernels, flat, *step).reshape(x.shape)

    def push(self, du0: torch.Tensor) -> torch.Tensor:
        """J du0: (directions, batch, z, y, x) to (directions, batch, T, z, y, x)."""
        x, found = self._in(du0), []
        with torch.no_grad():
            for kind, value in self.operations:
                if kind == "scale":
                    x = x * value
                elif kind == "diffuse":
                    x = self._diffuse(x, value)
                else:
                    found.append(x)
        return self.simulation._unbox(torch.stack(found, 2))

    def pull(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Transpose of J: (directions, batch, T, z, y, x) to (directions, batch, z, y, x)."""
        y = self._in(cotangents)
        x = torch.zeros_like(y[:, :, 0])
        with torch.no_grad():
            for kind, value in reversed(self.operations):
                if kind == "output":
                    x = x + y[:, :, value]
                elif kind == "scale":
                    x = x * value
                else:
                    x = self._diffuse(x, value)
        return self.simulation._unbox(torch.where(self.simulation.mask, x, 0.0))
