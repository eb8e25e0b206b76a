"""A model as tapes: what crosses to the worker instead of Python functions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from biomodel.errors import SolverError
from biomodel.fenics.mesh import Mesh
from biomodel.models import ReactionDiffusion
from biomodel.solvers.base import Context
from biomodel.tape import Tape, gradient, record
from biomodel.treatments import Kill

#: Inputs that are the place itself; the mesh knows it.
PLACES = ("x", "y", "z")


@dataclass(frozen=True, eq=False)
class Tapes:
    """A model's reaction and diffusion, recorded.

    Attributes
    ----------
    reaction : Tape
        Growth minus the kills that act; its inputs are ``u``, ``p.<term>.<name>``, ``c.<field>``,
        ``level.<term>.<agent>`` and ``exposure.<term>.<agent>``.
    by_state : Tape
        The same with its derivative by ``u`` behind it.
    slopes : Tape
        The same with its derivatives by ``u`` and each of `wrt` behind it.
    wrt : tuple of str
    diffusion : Tape or None
        The coefficient, one output or nine; None where nothing moves.
    """

    reaction: Tape
    by_state: Tape
    slopes: Tape
    wrt: tuple[str, ...]
    diffusion: Tape | None

    @classmethod
    def of(cls, model: ReactionDiffusion, kills: Sequence[Kill], columns: Sequence[str]) -> Tapes:
        """Record a model with the kills that act.

        Raises
        ------
        ModelError
            If a term cannot be recorded.
        SolverError
            If the diffusivity depends on the cell fraction.
        """
        agents = [f"{t.name}.{a}" for t in kills for a in t.agents]
        parameters = [f"{t.name}.{p.name}" for t in (model.growth, *kills) for p in t.parameters]
        fields = list(dict.fromkeys(f for t in (model.growth, *kills) for f in t.fields))

        def rate(u, p, c, ops):
            given = {name: getattr(c, name) for name in fields}
            # The projection of a sharp edge undershoots. Laws such as the logistic would let what is below zero run
            # away from it; where there are no cells, none grow.
            present = ops.where(u > 0, u, 0.0)
            total = model.growth.rate(present, model.of(model.growth, p), Context(**given), ops)
            for term in kills:
                level = {a: c.level[f"{term.name}.{a}"] for a in term.agents}
                exposure = {a: c.exposure[f"{term.name}.{a}"] for a in term.agents}
                own = Context(**given, level=level, exposure=exposure, map=given[term.map] if term.map else 1.0)
                total = total - term.rate(u, model.of(term, p), own, ops) * u
            return total

        reaction = record(rate, parameters, fields, agents)
        wrt = tuple(n for n in reaction.inputs if n.startswith("p.") or n in columns)
        term = model.diffusion

        read = (*term.fields, *(a.equation.gives for a in term.auxiliaries))

        def coefficient(u, p, c, ops):
            return term.coefficient(u, model.of(term, p), Context(**{f: getattr(c, f) for f in read}), ops)

        diffusion: Tape | None = record(coefficient, [f"{term.name}.{p.name}" for p in term.parameters], read)
        assert diffusion is not None
        if len(diffusion.outputs) not in (1, 9):
            raise SolverError(
                f"{type(term).__name__}: the coefficient has {len(diffusion.outputs)} entries; expected one, or a "
                "3 × 3 tensor over (x, y, z)."
            )
        if "u" in diffusion.inputs:
            raise SolverError(
                f"{type(term).__name__}: the diffusivity depends on the cell fraction, which FenicsSolver does not "
                "support; let it depend on parameters and fields."
            )
        if all(diffusion.rows[i] == ("const", 0.0) for i in diffusion.outputs):
            diffusion = None
        return cls(reaction, gradient(reaction, ["u"]), gradient(reaction, ["u", *wrt]), wrt, diffusion)

    def check_tensor(self, model: ReactionDiffusion, fields: Mapping[str, np.ndarray], axes: Sequence[int]) -> None:
        """Refuse a diffusion tensor that is not symmetric, or under which cells would gather.

        Parameters
        ----------
        fields : mapping of str to ndarray, shape (voxels,)
        axes : sequence of int
            Those of x, y, z along which the mesh extends.
        """
        values: dict[str, Any] = {f"p.{n}": p.typical for n, p in model.parameters.items()}
        values.update({f"c.{n}": v for n, v in fields.items()})
        assert self.diffusion is not None
        found = np.stack(np.broadcast_arrays(*(np.asarray(x, float) for x in self.diffusion(values))), -1)
        tensor = found.reshape(-1, 3, 3)
        if not np.allclose(tensor, tensor.transpose(0, 2, 1), rtol=1e-9, atol=1e-12):
            raise SolverError(
                f"{model.label}: the diffusion tensor is not symmetric; give xy = yx, xz = zx and yz = zy."
            )
        least = np.linalg.eigvalsh(tensor[:, axes][:, :, axes])[:, 0].min()
        if least < 0:
            raise SolverError(
                f"{model.label}: the diffusion tensor has a negative eigenvalue ({least:.3g} mm²/day) in the "
                "mask; cells would gather instead of spreading. Mend the field (DTI needs its noise removed)."
            )

    def system(self, space: str, mesh: Mesh, cell_fields: Sequence[str],
               mechanics: dict[str, Any] | None) -> dict[str, Any]:  # fmt: skip
        """The request that makes the forms, with the key under which the worker keeps them."""
        header: dict[str, Any] = {
            "do": "system", "space": space, "axes": list(mesh.axes), "positions": list(mesh.positions),
            "cell_fields": sorted(cell_fields), "reaction": self.reaction.json(), "reaction_slopes": self.slopes.json(),
            "reaction_wrt": list(self.wrt), "diffusion": None,
            "mechanics": mechanics,
        }  # fmt: skip
        if self.diffusion is not None:
            stress = mechanics["gives"] if mechanics else None
            names = [n for n in self.diffusion.inputs if n.startswith("p.") or n == stress]
            header["diffusion"] = self.diffusion.json()
            header["diffusion_slopes"] = {name: self._slopes_of_diffusion(name) for name in names}
        return {**header, "key": hashlib.sha1(json.dumps(header).encode()).hexdigest()}

    def _slopes_of_diffusion(self, name: str) -> list[dict[str, Any]]:
        assert self.diffusion is not None
        found = []
        for k in range(len(self.diffusion.outputs)):
            slope = gradient(self.diffusion, [name], k)
            found.append(Tape(slope.rows, slope.outputs[1:]).json())
        return found
