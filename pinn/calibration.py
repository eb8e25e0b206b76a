"""`LMPinn`: calibration by a network, forecast by a classical solver, and the gap between the two."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from biomodel.calibration.calibrate import calibrate
from biomodel.calibration.fit import Fit
from biomodel.calibration.images import field_maps
from biomodel.calibration.laplace import MAP, Laplace
from biomodel.errors import CalibrationError
from biomodel.forecast import first_day, initial_states
from biomodel.models import ReactionDiffusion
from biomodel.observation import observe
from biomodel.patient import Patient
from biomodel.solvers.base import Built, Solver
from pinn.solver import PinnSimulation, PinnSolver


class GapWarning(UserWarning):
    """A network whose states differ from those of the classical solver at the same parameters."""


@dataclass(frozen=True)
class Gap:
    """Network against classical solver at the calibrated parameters.

    Attributes
    ----------
    day : ndarray, shape (T,)
    relative : ndarray, shape (T,)
        L2 norm of the difference of the cell fractions over that of the classical one.
    held_out : float
        Relative residual of the network at points that training never saw.
    grid : float
        Largest relative change of the classical states when the grid is refined once.
    rough : bool
        Whether the network has voxels of a mask, of tissues or of drug maps to make smooth.
    """

    day: np.ndarray
    relative: np.ndarray
    held_out: float
    grid: float
    rough: bool = False

    @property
    def cause(self) -> str:
        """Where the larger error is, in words."""
        if self.rough and max(self.held_out, self.grid) < self.relative.max() / 3:
            return (
                "mask, tissues and drug maps are smooth over about a voxel for the network; fronts and parts of the "
                "organ thinner than that are the classical solver's"
            )
        if self.grid > self.held_out:
            if self.rough:
                return (
                    f"refining the grid changes the classical states by {self.grid:.1%}; in an organ the network shares"
                    " that grid only in part, so smaller voxels bring the two together"
                )
            return (
                f"the classical solver's own grid accounts for about {self.grid:.1%}; the network has none, and the "
                "parameters are those of the finer truth"
            )
        return (
            f"the network's residual is {self.held_out:.1e} of the cell fraction; lower its rtol, or give it more "
            "units or points"
        )


@dataclass(frozen=True, eq=False)
class PinnFit(Fit):
    """A `Fit` by a network.

    `forecast` takes its parameters and initial state and solves anew with the classical `solver`. The network's own
    states are beside it.

    Attributes
    ----------
    pinn : PinnSolver
        How the network was trained.
    """

    pinn: PinnSolver = field(default_factory=PinnSolver)

    def states(self, days: Sequence[float] | np.ndarray) -> np.ndarray:
        """The network's own states (T, z, y, x) on `box` at the MAP estimate; beyond the last visit it trains anew."""
        network, arguments = self._network
        return np.asarray(network(*arguments, days)[0])

    def solved(self, days: Sequence[float] | np.ndarray) -> np.ndarray:
        """The classical solver's (T, z, y, x) at the same parameters and start."""
        network, (params, u0) = self._network
        simulation = self._built(self.solver)
        return np.asarray(simulation(params, u0, days, plan=simulation.plan(params, u0, days))[0])

    @cached_property
    def gap(self) -> Gap:
        """Network against classical solver at the days that were calibrated."""
        days = np.array([s.day for s in (observe(self.patient, v) for v in self.patient.visits) if s is not None])[1:]
        return self.gap_at(days)

    def gap_at(self, days: Sequence[float] | np.ndarray) -> Gap:
        """Network against classical solver at any days."""
        network, (params, u0) = self._network
        own, solved = self.states(days), self.solved(days)
        norm = np.sqrt((solved**2).sum((1, 2, 3)))
        simulation = self._built(self.solver)
        change = simulation.grid_error(params, u0, days, simulation.plan(params, u0, days)).cpu().numpy()
        norm = np.where(norm > 0, norm, np.inf)
        relative = np.sqrt(((own - solved) ** 2).sum((1, 2, 3))) / norm
        grid = float((np.sqrt((change**2).sum((1, 2, 3))) / norm).max())
        return Gap(np.asarray(days, float), relative, network.held_out, grid, network.rough)

    @cached_property
    def _network(self) -> tuple[PinnSimulation, tuple[dict[str, float], torch.Tensor]]:
        assert self.box is not None
        domain = self.patient.domain.crop(self.box)
        values = self.values
        u0 = initial_states(self, self.box, domain, {n: np.array([v]) for n, v in values.items()}, None)
        built = self._built(self.pinn)
        assert isinstance(built, PinnSimulation)
        return built, ({n: values[n] for n in self.model.free}, torch.tensor(u0))

    def _built(self, solver: Solver) -> Built:
        assert self.box is not None
        fields = {k: np.asarray(v)[self.box] for k, v in field_maps(self.model, self.patient).items()}
        return solver.build(
            self.model, self.patient.domain.crop(self.box), self.patient.schedule, fields, start=first_day(self.patient)
        )


@dataclass(frozen=True)
class LMPinn:
    """Calibration by a physics-informed network, for ``bm.calibrate(..., method=pinn.LMPinn())``.

    Levenberg-Marquardt trains the network for given parameters, Gauss-Newton moves the parameters with the weights
    following along their tangent; data, priors, noise and unknown start are those of `Laplace`, and so is what comes
    out: the MAP estimate and the covariance of the parameters with the network's weights marginalised. Forecasts solve
    anew with the classical solver.

    Parameters
    ----------
    network : PinnSolver
        Its `classical` is replaced by the solver that `calibrate` is given.
    map : MAP
        One starting point by default: a network is trained along the whole way.
    largest_gap : float
        Relative difference of network and classical solver at the same parameters beyond which a warning says so.

    Examples
    --------
    >>> import pinn
    >>> pinn.LMPinn().map.starts
    1
    """

    network: PinnSolver = field(default_factory=lambda: PinnSolver(rtol=1e-2, frequencies=4, hidden=(12, 12)))
    map: MAP = field(default_factory=lambda: MAP(starts=1))
    largest_gap: float = 0.05

    def calibrate(self, model: ReactionDiffusion, patient: Patient, solver: Solver,
                  progress: Callable[[str], None] | None = None) -> PinnFit:  # fmt: skip
        """Calibrate a model on the visits of one patient; see :func:`biomodel.calibrate`.

        Raises
        ------
        CalibrationError
            If the patient has no images, or the data do not allow a calibration.
        SolverError
            If model or computing box are not for a network; the message names what is.
        """
        if not isinstance(model, ReactionDiffusion):
            raise CalibrationError(f"LMPinn: model is a {type(model).__name__}; expected bm.ReactionDiffusion(...).")
        if patient.domain.well_mixed:
            raise CalibrationError(
                f"patient {patient.id} has no images, so there is no space for a network; use bm.Laplace()."
            )
        if isinstance(solver, PinnSolver):
            solver = solver.classical
        network = dataclasses.replace(self.network, classical=solver)
        found = calibrate(model, patient, network, Laplace(self.map), progress)
        given = {f.name: getattr(found, f.name) for f in dataclasses.fields(Fit)}
        fit = PinnFit(**(given | {"solver": solver, "method": type(self).__name__}), pinn=network)
        gap = fit.gap
        worst = float(gap.relative.max())
        if worst <= self.largest_gap:
            return fit
        text = (
            f"LMPinn: at the same parameters the network's cell fractions differ by {worst:.1%} from those of "
            f"{type(solver).__name__} (day {gap.day[int(gap.relative.argmax())]:g}): {gap.cause}."
        )
        warnings.warn(text, GapWarning, stacklevel=3)
        noted = dataclasses.replace(fit, notes=(*fit.notes, text))
        # What was worked out already goes along.
        noted.__dict__.update({n: fit.__dict__[n] for n in ("gap", "_network")})
        return noted
