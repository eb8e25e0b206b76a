"""`PinnSolver`: a physics-informed network as a solver of the same models as the classical ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from biomodel.domain import Domain
from biomodel.errors import NotFiniteError, SolverError
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from biomodel.solvers.base import Built, Linearised, Solver
from biomodel.solvers.torch import TorchSolver
from pinn.carrier import BoxCarrier, OrganCarrier
from pinn.guides import Guides
from pinn.inputs import check_directions, days_of, rows_of
from pinn.network import Network
from pinn.physics import Physics
from pinn.residuals import LARGEST_EXPONENT, Direction, Points, Residual, dense_where, sharpened
from pinn.training import DAMPING, Misfit, Splitting, Trained, tangents, train
from pinn.voxels import Voxels

#: A training that ends this many times above `rtol` has failed and is begun anew from other weights.
FAILED = 10.0
#: Least residual aimed at in an organ or where tissue and drugs vary: the voxels of mask and fields say no more.
#: Points per weight there, and elsewhere: a rough medium takes more to pin a network down.
ROUGH = 1e-2
DENSE, SPARSE = 10, 3
#: Points are drawn anew, where the residual is large, at most so many times, while the residual at fresh points is
#: larger than at those trained on by this factor.
ROUNDS, OVERFIT = 3, 3.0
#: Share of the tumour in parts of an organ that are too thin for a network beyond which a warning says so.
THIN = 0.01
#: A residual above this share of the cell fraction is no solution, and an error.
NONSENSE = 0.5
#: The guess by operator splitting is fitted to this relative accuracy, in at most so many iterations.
GUESS, GUESSING = 2e-2, 40


class TrainingWarning(UserWarning):
    """A network whose training ended before its residual was as small as asked."""


@dataclass(frozen=True)
class PinnSolver:
    """A physics-informed network, trained by Levenberg-Marquardt in float64.

    The start, zero flux on the box's sides and jumps by radiotherapy hold exactly by the network's form
    (:mod:`pinn.residuals`); the equation's residual at scattered points of space and time is made small, and in an
    organ the flux through its surface (:mod:`pinn.geometry`). Derivatives by parameters follow from the implicit
    function theorem on the trained residual.

    It solves what `TorchSolver` solves in one to three dimensions, at ten to a hundred times the cost
    (`tests/benchmarks/bench_pinn.py` measures it), but for mechanics, parameters that are fields, and gradients through
    its states (`sensitivities` gives derivatives, of one run at a time). In an organ, or where tissue or drugs vary,
    `TorchSolver` carries the start on the voxels and fields become smooth over about a voxel; the two then agree to
    about one per cent where a front is wider than a voxel. Voxel averages of a noisy start in a box come back to about
    one per cent, too. Points and guides are placed for the first start and parameters that a simulation is called
    with: build it anew for a tumour elsewhere. Networks of this size train fastest on one thread (OMP_NUM_THREADS=1).

    Parameters
    ----------
    rtol : float
        Relative root mean square of the residual at which training stops: of the change per whole span of time, over
        the cell fraction. In an organ, or where tissue or drugs vary, it is 1e-2 at least.
    frequencies, hidden : int, tuple of int
        Cosines per axis and units per layer of the network.
    points : int, optional
        Collocation points inside; by default three per weight, ten in an organ or where tissue or drugs vary.
    iterations : int
        Most Levenberg-Marquardt iterations of one training.
    restarts : int
        Further trainings from other weights after one that failed.
    seed : int
    classical : TorchSolver or FenicsSolver
        For what a network does not give: products with the derivative by the whole initial state, the grid's error,
        derivatives where there are no cells.

    Examples
    --------
    >>> import biomodel as bm, pinn, torch
    >>> domain = bm.Domain.box((1, 1, 32))
    >>> u0 = 0.5 * torch.exp(-((torch.arange(32) - 15.5) / 4) ** 2).reshape(1, 1, 32).double()
    >>> network = pinn.PinnSolver(hidden=(8, 8), rtol=1e-3).build(bm.ReactionDiffusion(), domain, bm.Schedule())
    >>> network({"growth.k": 0.05}, u0, [30.0]).shape
    torch.Size([1, 1, 1, 1, 32])
    """

    rtol: float = 3e-4
    frequencies: int = 5
    hidden: tuple[int, ...] = (20, 20)
    points: int | None = None
    iterations: int = 150
    restarts: int = 2
    seed: int = 0
    classical: Solver = field(default_factory=TorchSolver)

    def __post_init__(self):
        if not 1e-10 <= self.rtol <= 0.5:
            raise SolverError(f"PinnSolver: rtol is {self.rtol}; expected a number between 1e-10 and 0.5.")
        counts = {"points": self.points, "iterations": self.iterations}
        wrong = [n for n, v in counts.items() if v is not None and v < 1]
        wrong += [n for n, v in {"restarts": self.restarts, "seed": self.seed}.items() if v < 0]
        if wrong:
            raise SolverError(
                f"PinnSolver: {', '.join(f'{n} is {getattr(self, n)}' for n in wrong)}; expected at least 1 point and "
                "iteration, restarts and seed not negative."
            )
        if self.frequencies < 1 or not self.hidden or min(self.hidden) < 1:
            raise SolverError(
                f"PinnSolver: frequencies {self.frequencies} and hidden {self.hidden}; expected at least one cosine "
                "per axis and one layer of at least one unit, for instance frequencies=5, hidden=(20, 20)."
            )

    @property
    def dtype(self) -> torch.dtype:
        """float64: second-order training needs it."""
        return torch.float64

    @property
    def device(self) -> str:
        """The CPU."""
        return "cpu"

    def versions(self) -> dict[str, str]:
        """Versions of libraries of the classical solver."""
        return self.classical.versions()

    def build(self, model: ReactionDiffusion, domain: Domain, schedule: Schedule,
              fields: Mapping[str, np.ndarray] | None = None, start: float = 0.0) -> PinnSimulation:  # fmt: skip
        """The network of a model on a domain under a schedule, from day `start`; it is trained when it is called.

        Raises
        ------
        SolverError
            If the mask has several components, a term needs a field that is not there, or the model has mechanics or
            a diffusion tensor.
        ModelError
            If the schedule has a therapy for which the model has no term.
        """
        return PinnSimulation(self, model, domain, schedule, dict(fields or {}), float(start))


@dataclass(eq=False)
class _Net:
    """A network over one span of time: residuals at its points, and how far it is trained."""

    physics: Physics
    carrier: BoxCarrier | OrganCarrier
    network: Network
    residual_at: Callable[[Points], Residual]
    dense: torch.Tensor | None
    residual: Residual
    fresh: Residual
    voxels: Voxels
    trained: Trained
    target: float
    rounds: int = 0
    values: dict[str, float] = field(default_factory=dict)
    u0: np.ndarray | None = None
    along: dict[str, torch.Tensor] = field(default_factory=dict)


class PinnSimulation:
    """A network for one model, domain and schedule; it keeps its weights from call to call and begins from them.

    Attributes
    ----------
    held_out : float
        Relative root mean square of the residual at points that training never saw, at the last call; of a batch the
        largest.
    iterations : int
        Levenberg-Marquardt iterations in all.
    """

    def __init__(self, solver: PinnSolver, model, domain: Domain, schedule, fields, start: float):
        self.solver, self.model, self.domain, self.schedule = solver, model, domain, schedule
        # It refuses what the network cannot do.
        self.rough = Physics(model, domain, schedule, start, 1.0, fields).rough
        self.start, self.fields = start, fields
        self.progress: Callable[[str], None] | None = None
        self.held_out = float("nan")
        self.iterations = 0
        self._net: _Net | None = None
        self._classical: Built | None = None

    # Calls ------------------------------------------------------------------------------------------------------------

    def __call__(self, params: Mapping, u0, times, plan: Any = None) -> torch.Tensor:
        """States (batch, T, z, y, x), voxel averages.

        They carry no gradient: `sensitivities` gives derivatives.
        """
        rows = rows_of(self.model, self.domain, params, u0)
        days = days_of(self.start, times)
        found = torch.zeros(len(rows), len(days), *self.domain.shape, dtype=torch.float64)
        largest = 0.0
        for row, (values, state) in zip(found, rows, strict=True):
            if state.any():  # nothing grows from nothing
                net = self._solve(values, state, days)
                states = [net.voxels.state(net.trained.w, net.physics.tau(t)) for t in days]
                row[:] = torch.stack(states).reshape(row.shape)
                largest = max(largest, self.held_out)
        self.held_out = largest
        return found

    def sensitivities(self, params: Mapping, u0, times, wrt: Sequence[str | None], plan: Any = None,
                      du0: torch.Tensor | None = None, rows: np.ndarray | None = None
                      ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """States and their derivatives along directions.

        Parameters
        ----------
        wrt : sequence of str or None
            The parameter of each direction, if any.
        du0 : tensor, shape (directions, 1, z, y, x), optional
            The change of the initial state of each direction.
        rows : ndarray of bool, shape (T, z, y, x), optional
            Which entries are wanted; the results then have one axis (of these) in place of four.

        Returns
        -------
        tuple of tensor
            States (1, T, z, y, x) and derivatives (directions, 1, T, z, y, x).
        """
        inputs = rows_of(self.model, self.domain, params, u0)
        check_directions(self.model, wrt, len(inputs))
        ((values, state),) = inputs
        days = days_of(self.start, times)
        if not state.any():
            return self.classical.sensitivities(params, u0, times, wrt, None, du0, rows)
        net = self._solve(values, state, days)
        changes = None if du0 is None else du0.detach().numpy().reshape(len(wrt), *net.physics.shape)
        start = state.reshape(net.physics.shape)
        carried = net.carrier.directions(start, values, days, wrt, changes)
        directions = [Direction(n, c) for n, c in zip(wrt, carried, strict=True)]
        dw = tangents(net.residual, net.trained.w, directions)
        net.along = {n: dw[i] for i, n in enumerate(wrt) if n is not None}
        both = [net.voxels.along(net.trained.w, net.physics.tau(t), directions, dw) for t in days]
        shape = (1, len(days), *self.domain.shape)
        u = torch.stack([b[0] for b in both]).reshape(shape)
        du = torch.stack([b[1] for b in both], 1).reshape(len(wrt), *shape)
        if rows is None:
            return u, du
        inside = torch.as_tensor(rows)
        return u[:, inside], du[:, :, inside]

    def plan(self, params: Mapping, u0, times) -> Any:
        """Steps of the classical solver, for `linearise`; the network itself has none."""
        return self.classical.plan(params, u0, times)

    def grid_error(self, params: Mapping, u0, times, plan: Any) -> torch.Tensor:
        """Change of the voxel averages (T, z, y, x) when the grid is refined once.

        It is zero in a box, where the network has no grid; in an organ voxels carry the start, and the error is theirs.
        """
        if self.rough:
            return self.classical.grid_error(params, u0, times, plan)
        return torch.zeros(len(days_of(self.start, times)), *self.domain.shape, dtype=torch.float64)

    def linearise(self, params: Mapping, u0, times, plan: Any = None) -> Linearised:
        """The derivative by the whole initial state, by the classical solver."""
        return self.classical.linearise(params, u0, times, plan)

    @property
    def classical(self) -> Built:
        """The same simulation by the classical solver."""
        if self._classical is None:
            # No more exact in time than the network is asked to be.
            classical: Any = self.solver.classical
            self._classical = replace(classical, rtol=max(classical.rtol, self.solver.rtol)).build(
                self.model, self.domain, self.schedule, self.fields, start=self.start
            )
        return self._classical

    # Training ---------------------------------------------------------------------------------------------------------

    def _solve(self, values: dict[str, float], u0: np.ndarray, days: np.ndarray) -> _Net:
        """The network trained for these values and this start, over a span that holds the days."""
        span = max(float(days[-1]) - self.start, 1e-6)
        net = self._net
        if net is None or net.physics.span < span * (1 - 1e-12):
            net = self._made(values, u0, span)
        if net.values != values or net.u0 is None or not np.array_equal(net.u0, u0):
            self._move(net, values, u0, days)
        elif not net.voxels.reaches(days):
            net.voxels.hold(values, net.carrier.start(u0.reshape(net.physics.shape), values, days))
        self._net = net
        return net

    def _made(self, values: dict[str, float], u0: np.ndarray, span: float) -> _Net:
        """An untrained network for a span of time, its guides at these values."""
        solver = self.solver
        physics = Physics(self.model, self.domain, self.schedule, self.start, span, self.fields)
        carrier = OrganCarrier(physics, self.domain, self.fields) if physics.rough else BoxCarrier(physics)
        guides = Guides(physics, values, carrier.guide(u0.reshape(physics.shape), values))
        network = Network(physics.metric, solver.frequencies, tuple(solver.hidden), guides.count)
        count = solver.points or (DENSE if physics.rough else SPARSE) * network.count
        voxels = Voxels(physics, network, guides, carrier)
        dense = None if physics.geometry.whole else dense_where(voxels.reached())
        _warn_where_thin(physics, voxels.reached())
        points = [Points.draw(physics, carrier, count, 2 * solver.seed + i, dense) for i in (0, 1)]

        def residual_at(points: Points) -> Residual:
            return Residual(physics, network, points, guides, carrier)

        residual, fresh = (residual_at(p) for p in points)
        return _Net(
            physics, carrier, network, residual_at, dense, residual, fresh, voxels,
            Trained(network.start(solver.seed)), max(solver.rtol, ROUGH if physics.rough else 0.0),
        )  # fmt: skip

    def _move(self, net: _Net, values: dict[str, float], u0: np.ndarray, days: np.ndarray) -> None:
        """Train for other values and another start, from where the network stands if it is trained."""
        solver = self.solver
        start = net.carrier.start(u0.reshape(net.physics.shape), values, days)
        candidates = self._candidates(net, values) if net.values else []
        # A training that is interrupted leaves weights of no known parameters.
        net.values, net.u0, net.along, self.held_out = {}, None, {}, float("nan")
        for part in (net.residual, net.fresh):
            part.hold(values, start)
        net.voxels.hold(values, start)
        best: Trained | None = None
        if candidates:
            sizes = [_size(net.residual, w) for w in candidates]
            if np.isfinite(min(sizes)):
                warm = Trained(candidates[int(np.argmin(sizes))], damping=min(net.trained.damping * 10, DAMPING))
                best = self._train(net.residual, warm, net.target, solver.iterations)
        for turn in range(solver.restarts + 1):
            if best is not None and best.rms <= FAILED * net.target:
                break
            cold = Trained(net.network.start(solver.seed + turn))
            cold = self._train(Splitting(net.residual), cold, GUESS, GUESSING)
            cold = self._train(net.residual, replace(cold, damping=1e-3), net.target, solver.iterations)
            best = cold if best is None or cold.rms < best.rms else best
        assert best is not None
        best = self._sharpened(net, best, start)
        if not best.rms < NONSENSE:
            told = ", ".join(f"{n} {v:.4g}" for n, v in values.items())
            raise NotFiniteError(
                f"PinnSolver: the network's residual is {best.rms:.2g} of the cell fraction at {told}: no solution. "
                f"Growth by more than exp({LARGEST_EXPONENT:g}) is beyond it. Use bm.TorchSolver() there."
            )
        net.trained, net.values, net.u0, net.along = best, values, u0.copy(), {}
        self.held_out = _size(net.fresh, best.w)
        if self.progress:
            self.progress(f"network: residual {best.rms:.1e}, held out {self.held_out:.1e}")
        if best.rms > FAILED * net.target:
            warnings.warn(
                f"PinnSolver: the residual stalled at {best.rms:.1e} of the cell fraction, "
                f"{best.rms / net.target:.0f} times what was asked for; raise iterations or hidden, or ask for less.",
                TrainingWarning,
                stacklevel=4,
            )

    def _train(self, misfit: Misfit, state: Trained, target: float, iterations: int) -> Trained:
        found = train(misfit, state, target, iterations)
        self.iterations += found.iterations - state.iterations
        return found

    def _sharpened(self, net: _Net, best: Trained, start: Any) -> Trained:
        """Training goes on at other points while fresh ones show that it knows only its own."""
        while net.physics.rough and net.rounds < ROUNDS:
            if _size(net.fresh, best.w) <= OVERFIT * max(best.rms, net.target):
                break
            net.rounds += 1
            seed = 2 * self.solver.seed + 1 + net.rounds
            points = sharpened(net.residual, net.fresh, best.w, seed)
            drawn = Points.draw(net.physics, net.carrier, len(points.tau), seed, net.dense)
            net.residual, net.fresh = (net.residual_at(p) for p in (points, drawn))
            for part in (net.residual, net.fresh):
                part.hold(net.voxels.values, start)
            best = self._train(net.residual, replace(best, damping=DAMPING), net.target, self.solver.iterations)
        return best

    @staticmethod
    def _candidates(net: _Net, values: dict[str, float]) -> list[torch.Tensor]:
        """The weights, and the weights moved along their tangents, straight in the values or in their logarithms."""
        w = net.trained.w
        if not net.along:
            return [w]
        straight, curved = w.clone(), w.clone()
        for name, dw in net.along.items():
            old, new = net.values[name], values[name]
            straight = straight + (new - old) * dw
            curved = curved + (old * np.log(new / old) if old * new > 0 else new - old) * dw
        return [w, straight, curved]


def _warn_where_thin(physics: Physics, reached: np.ndarray) -> None:
    """Say so where the tumour lies in parts of the organ that are no wider than a voxel or two."""
    thin = physics.geometry.thin
    share = float(reached[thin].sum() / max(reached.sum(), 1e-300))
    if share > THIN:
        warnings.warn(
            f"PinnSolver: {share:.1%} of the tumour lies in parts of the organ thinner than two voxels "
            f"({int(thin.sum())} voxels); a network's smooth organ has no walls there. Use bm.TorchSolver(), or "
            "smaller voxels.",
            TrainingWarning,
            stacklevel=5,
        )


def _size(residual: Residual, w: torch.Tensor) -> float:
    """Relative root mean square of the residual."""
    r = residual.value(w)
    if r is None:
        return float("inf")
    return float(r.square().mean().sqrt() / residual.state(w).square().mean().sqrt())
