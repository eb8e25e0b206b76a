"""A calibration as a DeepXDE problem: equation, likelihood and prior as losses whose weights are not set by hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from biomodel.calibration.gaussnewton import prior_of
from biomodel.domain import Domain
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.schedule import Schedule
from pinn.dde.backend import dde, double
from pinn.dde.conditions import Observations, PriorOf, ZeroFlux, geometry_of
from pinn.dde.equation import Equation
from pinn.dde.network import Carried, Cosines, Exact, Features, Free, Growing, Start, State, check, flat, named, plain
from pinn.dde.sampling import Causal, draw
from pinn.dde.secondorder import Rows
from pinn.physics import Physics

#: How many times more than the noise allows an error of the equation counts: at 1 a residual as large as the noise over
#: the whole span costs as much as the data's noise does.
WEIGHT = 100.0
#: Points of the residual per unknown, and on the surface. A network with fewer fits the equation at the points alone.
DENSITY, SURFACE = 4, 300


class Collocation(dde.data.TimePDE):
    """DeepXDE's data set, with the equation evaluated where it is asked for and not at every voxel of the data, too."""

    def losses(self, targets: Any, outputs: torch.Tensor, loss_fn: Any, inputs: torch.Tensor, model: Any,
               aux: Any = None) -> list[torch.Tensor]:  # fmt: skip
        """Mean squares of the equation and of each condition."""
        loss_fn = loss_fn if isinstance(loss_fn, (list, tuple)) else [loss_fn] * (1 + len(self.bcs))
        ends = np.cumsum([0, *self.num_bcs]).tolist()
        x = inputs[ends[-1] :].detach().requires_grad_()
        error = self.pde(x, model.net(x))
        losses = [loss_fn[0](torch.zeros_like(error), error)]
        for i, bc in enumerate(self.bcs):
            error = bc.error(self.train_x, inputs, outputs, ends[i], ends[i + 1])
            losses.append(loss_fn[i + 1](torch.zeros_like(error), error))
        return losses


class Model(dde.Model):
    """A `dde.Model` that computes in double precision and knows the weights of its losses; quiet unless asked.

    All else is DeepXDE's: optimisers, callbacks, `predict`, `save`. `predict` gives w; u = S w is `Posed.states`.
    """

    def __init__(self, data: dde.data.Data, net: State, weights: list[float]):
        self.weights = weights
        super().__init__(data, net)

    def compile(self, optimizer: Any, lr: float | None = None, loss: Any = "MSE", metrics: Any = None,
                decay: Any = None, loss_weights: Any = None, external_trainable_variables: Any = None,
                verbose: int = 0) -> None:  # fmt: skip
        """As in DeepXDE; without `loss_weights` the losses add up to minus the log posterior per measured value."""
        with double():
            super().compile(optimizer, lr, loss, metrics, decay, loss_weights or self.weights,
                            external_trainable_variables, verbose=verbose)  # fmt: skip

    def train(self, iterations: int | None = None, batch_size: int | None = None, display_every: int = 1000,
              disregard_previous_best: bool = False, callbacks: Any = None, model_restore_path: str | None = None,
              model_save_path: str | None = None, epochs: int | None = None, verbose: int = 0) -> Any:  # fmt: skip
        """As in DeepXDE."""
        with double():
            return super().train(iterations, batch_size, display_every, disregard_previous_best, callbacks,
                                 model_restore_path, model_save_path, epochs, verbose=verbose)  # fmt: skip

    def predict(self, x: Any, operator: Any = None, callbacks: Any = None) -> np.ndarray:
        """As in DeepXDE."""
        with double():
            return super().predict(x, operator, callbacks)


@dataclass(frozen=True, eq=False)
class Inverse:
    """Parameters of a model from maps of the cell fraction, for a network.

    Parameters
    ----------
    model : ReactionDiffusion
        Its free parameters are inferred, in the coordinates in which their priors are Gaussian.
    domain, schedule : Domain, Schedule
    u0 : ndarray, shape (z, y, x)
        The state at day `start`.
    days : sequence of float
    data : ndarray, shape (T, z, y, x)
        NaN where nothing was measured.
    sd : float or ndarray, shape (T, z, y, x)
        Noise of one voxel.
    start : float
    until : float, optional
        Last day of the network; the last day of data by default.
    fields : mapping of str to ndarray (z, y, x), optional
    start_sd : float, optional
        Noise of `u0`; without it the start holds exactly.

    Raises
    ------
    SolverError
        If the model or the domain has what a network cannot do.
    CalibrationError
        If data, days and noise do not fit together.
    """

    model: ReactionDiffusion
    domain: Domain
    schedule: Schedule
    u0: np.ndarray
    days: Sequence[float]
    data: np.ndarray
    sd: float | np.ndarray
    start: float = 0.0
    until: float | None = None
    fields: Mapping[str, np.ndarray] | None = None
    start_sd: float | None = None

    def __post_init__(self):
        shape = (len(self.days), *self.domain.shape)
        u0 = np.asarray(self.u0, float).reshape(np.shape(self.u0)[-3:])
        if np.shape(self.data) != shape or u0.shape != self.domain.shape:
            raise CalibrationError(
                f"Inverse: data of shape {np.shape(self.data)} and u0 of {np.shape(self.u0)}; expected {shape} (days, "
                f"z, y, x) and {self.domain.shape}."
            )
        if not np.isfinite(self.data).any() or not np.all(np.asarray(self.sd) > 0):
            raise CalibrationError("Inverse: no value is measured, or a noise sd is not a positive number.")
        if not self.model.free:
            raise CalibrationError("Inverse: all parameters are known; give at least one of them a prior.")
        end = max(self.days) if self.until is None else self.until
        if min(self.days) < self.start or end < max(self.days) or end <= self.start:
            raise CalibrationError(
                f"Inverse: days {list(self.days)} and until {end:g}; expected days between the start, day "
                f"{self.start:g}, and `until`. Data before the first image cannot be used with a known start."
            )
        object.__setattr__(self, "u0", u0)
        object.__setattr__(self, "until", float(end))

    def posed(self, core: torch.nn.Module | None = None, features: Features | None = None,
              hidden: tuple[int, ...] = (16, 16), growing: bool = True, points: int | None = None, seed: int = 0,
              weight: float = WEIGHT, causal: Causal | None = None) -> Posed:  # fmt: skip
        """The problem with a network.

        Parameters
        ----------
        core : torch.nn.Module, optional
            The user's own network from (n, features.count) to (n, 1), in float64; by default DeepXDE's `FNN`.
        features : Features, optional
            Cosines by default.
        growing : bool
            Whether w = B exp(tau n) or w = (sqrt(B) + tau n)², with B the carried start.
        points : int, optional
            Number of places and times where the equation is asked for; four per unknown by default.
        weight : float
            Of the equation; see `WEIGHT`.
        causal : Causal, optional
            Weights of the residual in time.

        Raises
        ------
        SolverError
            If the network does not fit; the message says what does.
        """
        assert self.until is not None
        physics = Physics(self.model, self.domain, self.schedule, self.start, self.until - self.start, self.fields)
        with double():
            return Posed(self, physics, core, features, hidden, growing, points, seed, weight, causal)


class Posed:
    """A calibration with its network.

    Attributes
    ----------
    net : State
        The network; ``net.z`` are the coordinates of the parameters ``equation.names``.
    model : Model
        The `dde.Model`, with which a user can go on alone.
    equation : Equation
    conditions : list
        Observations, prior and, where needed, zero flux.
    """

    def __init__(self, inverse: Inverse, physics: Physics, core: torch.nn.Module | None, features: Features | None,
                 hidden: tuple[int, ...], growing: bool, points: int | None, seed: int, weight: float,
                 causal: Causal | None):  # fmt: skip
        self.inverse, self.physics, self.causal = inverse, physics, causal
        self.equation = equation = Equation(physics)
        parameters = {n: inverse.model.parameters[n] for n in equation.names}
        prior = prior_of(parameters, inverse.model.joint)
        typical = {n: p.typical for n, p in inverse.model.parameters.items()}
        carried = Carried(physics, inverse.u0, physics.diffusion(typical))
        features = Cosines(physics, carried=carried) if features is None else features
        core = plain(features, hidden, seed) if core is None else core
        check(core, features, equation.d)
        exact = inverse.start_sd is None
        start: Start = (Growing(carried) if growing else Exact(carried)) if exact else Free()
        self.net = State(core, features, start, torch.tensor(prior.mean))
        self.seen = self._observations(exact)
        self.prior = PriorOf(self.net, prior.mean, prior.precision, equation.d)
        self.conditions: list = [self.seen, self.prior]
        sides = not features.closed
        self.flux = ZeroFlux(equation, self.net, SURFACE, sides, seed) if sides or not physics.geometry.whole else None
        if self.flux is not None:
            self.conditions.append(self.flux)
        unknowns = sum(p.numel() for p in self.net.parameters())
        self.points = draw(physics, points or DENSITY * unknowns, seed)
        self.data = self._data()
        self.model = Model(self.data, self.net, [])
        self.weigh(weight)

    def _observations(self, exact: bool) -> Observations:
        inverse, physics = self.inverse, self.physics
        data, tau = np.asarray(inverse.data, float), list(self._tau(inverse.days))
        sd = np.broadcast_to(np.asarray(inverse.sd, float), data.shape)
        if not exact:
            data, tau = np.concatenate((data, inverse.u0[None])), [*tau, 0.0]
            sd = np.concatenate((sd, np.full((1, *sd.shape[1:]), inverse.start_sd)))
        shape = (-1, *physics.shape)
        return Observations(self.equation, self.net, tau, data.reshape(shape), sd.reshape(shape))

    def _data(self) -> dde.data.Data:
        place = dde.geometry.GeometryXTime(geometry_of(self.physics), dde.geometry.TimeDomain(0, 1))
        return Collocation(place, self._equation, self.conditions, anchors=self.points.numpy())

    def _equation(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        residual = self.equation.strong(self.net.z, x, w)
        return residual if self.causal is None else self.causal.weighted(residual, x[:, -1:])

    def _tau(self, days: Sequence[float] | np.ndarray) -> np.ndarray:
        return (np.asarray(days, float) - self.physics.start) / self.physics.span

    def weigh(self, weight: float) -> None:
        """Set the weight of the equation, also in a compiled model (which has to be compiled again)."""
        self.weight = weight
        count, p = len(self.seen.data), len(self.equation.names)
        noise = float(self.seen.sd.square().mean())
        losses = [weight / (2 * noise), 0.5, p / (2 * count)]
        if self.flux is not None:
            losses.append(self.layer * weight / (2 * noise))
        self.model.weights = losses

    @property
    def layer(self) -> float:
        """Share of the organ that touches its surface, which zero flux is asked for in."""
        geometry = self.physics.geometry
        return 2 * sum(1 / n for n in self.physics.shape) if geometry.whole else geometry.layer

    # Results ----------------------------------------------------------------------------------------------------------

    @property
    def z(self) -> np.ndarray:
        """Coordinates (p,) of the free parameters."""
        return self.net.z.detach().numpy().copy()

    @property
    def values(self) -> dict[str, float]:
        """The free parameters by name."""
        found = self.equation.values(self.net.z.detach())
        return {n: float(found[n]) for n in self.equation.names}

    def states(self, days: Sequence[float] | np.ndarray) -> np.ndarray:
        """The network's cell fractions (T, z, y, x) at days of its span, voxel averages; 0 outside the mask."""
        everywhere = np.zeros((1, *self.physics.shape))
        found = []
        for t in self._tau(days):
            seen = Observations(self.equation, self.net, [t], everywhere, everywhere + 1)
            x = torch.tensor(seen.points)
            with torch.no_grad(), double():
                u = self.equation.state(self.net(x)[:, 0], self.net.z, x).reshape(-1, seen.group).mean(1)
            image = np.zeros(self.physics.shape)
            image[self.physics.geometry.mask] = u.numpy()
            found.append(image.reshape(self.inverse.domain.shape))
        return np.stack(found)

    def residual(self, x: torch.Tensor) -> torch.Tensor:
        """Residual (n,) of the equation at x (n, d + 1)."""
        with double():
            x = x.detach().requires_grad_()
            found = self.equation.strong(self.net.z, x, self.net(x))[:, 0].detach()
            dde.gradients.clear()
        return found

    # For second-order training ----------------------------------------------------------------------------------------

    def rows(self) -> list[Rows]:
        """Equation, data, prior and zero flux as rows whose squares add up to twice minus the log posterior."""
        where = flat(self.net)[1]
        noise = float(self.seen.sd.square().mean().sqrt())
        whole = self.weight * len(self.seen.data)

        def network(v: torch.Tensor) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
            weights = named(v, where)
            return lambda y: torch.func.functional_call(self.net, weights, (y,))[:, 0], weights["z"]

        def equation(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.equation.pointwise(*network(v), x)

        def plain(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            w, z = network(v)
            x = x.detach().requires_grad_()
            found = self.equation.strong(z, x, w(x)[:, None])[:, 0].detach()
            dde.gradients.clear()
            return found

        def seen(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            w, z = network(v)
            return self.equation.state(w(x), z, x)

        def prior(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return x @ (v[len(v) - x.shape[1] :] - self.prior.mean)

        def flux(v: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            return self.equation.flux(*network(v), x)

        factor = torch.tensor((whole / len(self.points)) ** 0.5 / noise, dtype=torch.float64)
        if self.causal is not None:
            factor = factor * self.causal.at(self.residual(self.points), self.points[:, -1]).sqrt()
        found = [
            Rows(equation, self.points, weight=factor, plain=plain),
            Rows(seen, torch.tensor(self.seen.points), 1 / self.seen.sd, self.seen.data, self.seen.group),
            Rows(prior, self.prior.root),
        ]
        if self.flux is not None:
            points = torch.tensor(np.concatenate((self.flux.points, self.flux.conormals), 1))
            found.append(Rows(flux, points, weight=(self.layer * whole / len(points)) ** 0.5 / noise))
        return found
