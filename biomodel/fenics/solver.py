"""`FenicsSolver`: finite elements by FEniCS in processes of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from biomodel.domain import Domain
from biomodel.errors import SolverError
from biomodel.fenics.mesh import BoxMesh, MeshMaker
from biomodel.fenics.pool import pool, run_concurrently
from biomodel.fenics.simulation import FenicsSimulation
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from biomodel.solvers.base import check_fields, coordinate_fields

__all__ = ["FenicsSolver", "simulate_many"]


@dataclass(frozen=True)
class FenicsSolver:
    """Finite elements on simplices, second order in time, second (P1) or third order (P2) in space.

    Strang splitting: the reaction is advanced at the nodes by Runge-Kutta steps on the model's tape, the diffusion by
    an L-stable implicit step of second order, solved by conjugate gradients. The number of steps is chosen so that the
    error in time stays below `rtol`, which a pilot run measures at the current parameters. FEniCS runs in a process of
    its own (``tumorcast doctor`` tells whether there is one), which stays for the next simulation.

    Parameters
    ----------
    mesh : MeshMaker
        `BoxMesh()` conforms to the voxels.
    degree : int
        1 or 2. With 1 the mass matrix is lumped. Fields on voxels are piecewise constant, so that a model that reads
        some converges with second order whatever the degree.
    rtol : float
        Aim for the relative L2 error in time of the state at the requested times.
    linear_rtol : float
        Relative residual at which conjugate gradients stop.
    displacement_degree : int
        1 or 2, of the displacement in models with mechanics. Degree 1 is some ten times faster, but locks a little: on
        voxels of 2 mm displacements of soft tissue are then a few per cent too small
        (`tests/numerics/test_fenics_mechanics.py` prints by how much).
    stress_rtol : float
        The same for the elastic equilibrium of models with mechanics.
    ranks : int
        MPI processes of one simulation; more than one run under mpirun.
    memory : float
        Budget in bytes for states kept for a gradient; beyond it they are computed again.

    Examples
    --------
    >>> import biomodel as bm
    >>> solver = bm.FenicsSolver(degree=2)
    >>> solver.mesh
    BoxMesh(refine=1)
    """

    mesh: MeshMaker = field(default_factory=BoxMesh)
    degree: int = 1
    rtol: float = 1e-3
    linear_rtol: float = 1e-10
    displacement_degree: int = 2
    stress_rtol: float = 1e-6
    ranks: int = 1
    memory: float = 1.5e9

    def __post_init__(self):
        if self.degree not in (1, 2):
            raise SolverError(f"FenicsSolver: degree is {self.degree}; expected 1 or 2.")
        if self.displacement_degree not in (1, 2):
            raise SolverError(f"FenicsSolver: displacement_degree is {self.displacement_degree}; expected 1 or 2.")
        if not 1e-12 <= self.rtol <= 0.5:
            raise SolverError(f"FenicsSolver: rtol is {self.rtol}; expected a number between 1e-12 and 0.5.")
        if not 1e-15 <= self.linear_rtol <= 1e-3:
            raise SolverError(f"FenicsSolver: linear_rtol is {self.linear_rtol}; expected a number from 1e-15 to 1e-3.")
        if not 1e-14 <= self.stress_rtol <= 1e-2:
            raise SolverError(f"FenicsSolver: stress_rtol is {self.stress_rtol}; expected a number from 1e-14 to 0.01.")
        if self.ranks < 1 or self.ranks != int(self.ranks):
            raise SolverError(f"FenicsSolver: ranks is {self.ranks}; expected a whole number from 1.")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the numbers with which FEniCS computes."""
        return torch.float64

    @property
    def device(self) -> str:
        """Where FEniCS computes."""
        return "cpu"

    def versions(self) -> dict[str, str]:
        """The version of dolfinx that the worker has, which is started for it."""
        with pool(self.ranks).worker() as worker:
            return {"dolfinx": str(worker.start()["dolfinx"])}

    def build(
        self,
        model: ReactionDiffusion,
        domain: Domain,
        schedule: Schedule,
        fields: Mapping[str, np.ndarray] | None = None,
        start: float = 0.0,
    ) -> FenicsSimulation:
        """Build the simulation of a model on a domain under a schedule.

        Parameters
        ----------
        model : ReactionDiffusion
        domain : Domain
            With axes of length one, the mesh has fewer dimensions.
        schedule : Schedule
        fields : mapping of str to ndarray, shape (z, y, x), optional
            Spatial fields that terms declare beyond the domain's tissues. The place itself, ``x``, ``y`` and ``z`` in
            mm, need not be given.
        start : float
            Day of the initial state.

        Raises
        ------
        SolverError
            If a term needs a field that is missing or on another grid, or cannot be solved on finite elements.
        ModelError
            If the schedule has a therapy for which the model has no term, or a term cannot be recorded.
        """
        for what, value, kind in (("domain", domain, Domain), ("schedule", schedule, Schedule)):
            if not isinstance(value, kind):
                raise SolverError(
                    f"FenicsSolver: {what} is a {type(value).__name__}; expected one {kind.__name__}. Build one "
                    "simulation per patient; simulate_many runs them at the same time."
                )
        if np.ndim(start):
            raise SolverError("FenicsSolver: start is a sequence; expected one day. Build one simulation per patient.")
        model.check_schedule(schedule)
        fields = dict(fields or {})
        for name, values in fields.items():
            if np.shape(values) != domain.shape:
                raise SolverError(
                    f"field {name!r} has shape {np.shape(values)}, but the domain's grid is {domain.shape}; resample "
                    "it onto the grid of the mask."
                )
        check_fields(model, {**coordinate_fields(domain), **domain.tissues, **fields})
        return FenicsSimulation(self, model, domain, schedule, fields, float(start))


def simulate_many(
    runs: Sequence[tuple[FenicsSimulation, Mapping, np.ndarray, Sequence[float]]], workers: int = 2
) -> list[Future[torch.Tensor]]:
    """Run simulations on several FEniCS processes while the caller goes on.

    Parameters
    ----------
    runs : sequence of (simulation, params, u0, times)
        Arguments of each simulation.
    workers : int
        Processes (groups of `ranks` processes) at once.

    Returns
    -------
    list of Future of Tensor, shape (batch, T, z, y, x)
        In the order of `runs`; ``result()`` waits, and raises what went wrong with that run alone.

    Raises
    ------
    SolverError
        If `workers` is not positive.
    """
    if workers < 1:
        raise SolverError(f"simulate_many: workers is {workers}; expected at least 1.")
    ranks = max((run[0].solver.ranks for run in runs), default=1)
    return run_concurrently([partial(_run, *run) for run in runs], workers, ranks)


def _run(simulation: FenicsSimulation, params: Mapping, u0, times) -> torch.Tensor:
    return simulation(params, u0, times).detach()
