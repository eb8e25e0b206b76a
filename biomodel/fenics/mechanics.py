"""Tissue mechanics on a mesh: the equation as tapes for the worker, and stress and displacement back on voxels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse
from scipy.ndimage import label

from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.fenics.mesh import Mesh, Transfer, mask_centres
from biomodel.mechanics import Clamped, Elastic
from biomodel.models import ReactionDiffusion
from biomodel.solvers.base import Context
from biomodel.tape import Tape, gradient, record

__all__ = ["Tissue", "displacement_on_voxels", "von_mises_on_voxels"]


@dataclass(frozen=True, eq=False)
class Tissue:
    """Elastic equilibrium, recorded.

    Attributes
    ----------
    equation : Elastic
    young, pressure : Tape
        Their inputs are ``u``, ``p.<term>.<name>`` and ``c.<field>``.
    """

    equation: Elastic
    young: Tape
    pressure: Tape

    @classmethod
    def of(cls, model: ReactionDiffusion, domain: Domain) -> Tissue | None:
        """The mechanics of a model, or None.

        Raises
        ------
        SolverError
            If a term other than diffusion reads an auxiliary field, the equation is unknown here, or the body cannot
            be in equilibrium.
        ModelError
            If a modulus cannot be recorded.
        """
        if not model.auxiliaries:
            return None
        for term in (model.growth, *model.treatments):
            if term.auxiliaries:
                raise SolverError(f"FenicsSolver: {term.name} reads an auxiliary field; only diffusion may.")
        if len(model.auxiliaries) > 1:
            raise SolverError("FenicsSolver: the model has several auxiliary fields; only one, of Elastic, is solved.")
        equation = model.auxiliaries[0].equation
        if not isinstance(equation, Elastic):
            raise SolverError(
                f"FenicsSolver cannot solve {type(equation).__name__}; of auxiliary fields it solves those of Elastic."
            )
        _check_body(domain, isinstance(equation.edge, Clamped))
        names = [f"{equation.name}.{p.name}" for p in equation.parameters]

        def tape(function, bounded=False):
            def recorded(u, p, c, ops):
                given = Context(**{f: getattr(c, f) for f in equation.fields})
                # The projection of a sharp edge undershoots; where there are no cells, none stiffen the tissue, and a
                # modulus that they may multiply tenfold stays positive.
                present = ops.where(u > 0, u, 0.0) if bounded else u
                return function(present, model.of(equation, p), given, ops)

            return record(recorded, names, equation.fields)

        return cls(equation, tape(equation.young, True), tape(equation.pressure))

    @property
    def gives(self) -> str:
        """Name under which the diffusion reads the stress."""
        return f"c.{self.equation.gives}"

    @property
    def inputs(self) -> tuple[str, ...]:
        """Inputs of both tapes but ``u``."""
        return tuple(n for n in dict.fromkeys((*self.young.inputs, *self.pressure.inputs)) if n != "u")

    @property
    def wrt(self) -> tuple[str, ...]:
        """Those of the inputs that are parameters."""
        return tuple(n for n in self.inputs if n.startswith("p."))

    def header(self, degree: int, tolerance: float) -> dict[str, Any]:
        """What the worker needs to make the forms."""
        return {
            "gives": self.gives,
            "young": self.young.json(),
            "pressure": self.pressure.json(),
            "young_slopes": gradient(self.young, ["u", *self.wrt]).json(),
            "pressure_slopes": gradient(self.pressure, ["u", *self.wrt]).json(),
            "wrt": list(self.wrt),
            "poisson": self.equation.poisson,
            "clamped": isinstance(self.equation.edge, Clamped),
            "degree": degree,
            "tolerance": tolerance,
        }


def _check_body(domain: Domain, clamped: bool) -> None:
    mask = domain.mask
    if clamped:
        around = mask
        for axis in (k for k in range(3) if mask.shape[k] > 1):
            low, high = (np.take(around, range(*ends), axis) for ends in ((0, around.shape[axis] - 1),
                                                                         (1, around.shape[axis])))  # fmt: skip
            around = low & high
        if not around.any():
            raise SolverError(
                "mechanics: the mask is nowhere two voxels thick, so that nothing can move between its edges; refine "
                "the grid or use TractionFree()."
            )
        return
    count = label(mask)[1]
    if count > 1:
        raise SolverError(
            f"mechanics: without support the mask must be one piece, but it has {count} that share no face; keep the "
            "largest, or use Clamped()."
        )


def von_mises_on_voxels(mesh: Mesh, transfer: Transfer, stress: np.ndarray) -> np.ndarray:
    """Von Mises stress (voxels,) of the stress (6, cells) averaged over each voxel of the mask.

    Entries are xx, yy, zz, xy, xz, yz along the mesh's axes, as the worker gives them.
    """
    overlap = sparse.csr_array(transfer.cellwise.T @ sparse.diags_array(mesh.volumes))
    total = overlap.sum(1)
    mean = (overlap @ stress.T) / np.where(total > 0, total, 1.0)[:, None]
    xx, yy, zz, xy, xz, yz = mean.T
    return np.sqrt(((xx - yy) ** 2 + (yy - zz) ** 2 + (zz - xx) ** 2) / 2 + 3 * (xy**2 + xz**2 + yz**2))


def displacement_on_voxels(mesh: Mesh, transfer: Transfer, degree: int, w: np.ndarray, clamped: bool) -> np.ndarray:
    """Displacement (3, voxels) along x, y, z averaged over the mask's voxels, from nodal values (d, nodes).

    A body that nothing holds is given without rigid motion: neither its mean displacement nor its mean moment is left.
    """
    if not clamped:
        w = w - _rigid_part(mesh.nodes(degree), transfer.mass, w)
    found = np.zeros((3, len(mask_centres(mesh.domain, mesh.axes))))
    found[list(mesh.axes)] = (transfer.average @ w.T).T
    return found


def _rigid_part(places: np.ndarray, mass: sparse.csr_array, w: np.ndarray) -> np.ndarray:
    d = len(w)
    motions = []
    places = places - (mass.sum(1) @ places) / mass.sum()
    for a in range(d):
        for b in range(a, d):
            motion = np.zeros_like(w)
            if a == b:
                motion[a] = 1.0
            else:
                motion[a], motion[b] = -places[:, b], places[:, a]
            motions.append(motion)
    basis = np.stack(motions)
    weighted = np.stack([(mass @ m.T).T for m in motions]).reshape(len(motions), -1)
    share = np.linalg.solve(weighted @ basis.reshape(len(motions), -1).T, weighted @ w.ravel())
    return np.tensordot(share, basis, 1)
