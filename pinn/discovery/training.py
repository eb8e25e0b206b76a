"""Training of a law's and a state's network: misfits of images and equation, and how they are made small."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.stats import qmc

from biomodel.calibration.gaussnewton import prior_of
from biomodel.domain import Domain
from biomodel.errors import CalibrationError
from biomodel.models import ReactionDiffusion
from biomodel.parameters import Parameter
from biomodel.solvers.base import Context
from biomodel.solvers.reaction import TorchOps
from pinn.discovery.found import Discovered
from pinn.discovery.guide import Guide
from pinn.network import Network

__all__ = ["Discovery", "Learning"]

#: Prior sd of a weight of the state network: keeps directions that nothing informs where they are.
WEIGHT = 5.0
#: The first guess fits the logarithm of the images to this accuracy, in so many steps.
GUESS, GUESSING = 0.3, 12
#: Step of the difference that gives the acceleration, and the largest one, relative to the step, that is trusted.
NEAR, BEND = 0.1, 0.75
#: Largest damping that is tried before a stage ends.
MOST = 1e8
#: A stage ends when so many steps together gain less than this in the log posterior; the last stage goes on further.
WINDOW, GAIN, LAST_GAIN = 5, 2.0, 0.2
#: In the first stages, while the state still follows the noise of the images, the diffusivity is held near its prior's
#: median by a precision so many times the prior's: a rough state has a large Laplacian, which would pull D to nothing.
HELD = 1e4


@dataclass(frozen=True)
class Discovery:
    """How the networks are trained.

    Parameters
    ----------
    hidden, frequencies : tuple of int, int
        Units per layer of the state network, and cosines per axis that it sees.
    points : int
        Places and times at which the equation is asked for; drawn anew at each stage.
    stages : tuple of float
        Standard deviation given to the equation's residual at each stage, in cell fractions per whole time between
        first and last image.
    iterations : int
        Most steps in a stage.
    seed : int
    """

    hidden: tuple[int, ...] = (10, 10)
    frequencies: int = 3
    points: int = 1200
    stages: tuple[float, ...] = (0.3, 0.1, 0.03, 0.01)
    iterations: int = 80
    seed: int = 0

    def __post_init__(self):
        if not self.hidden or min(*self.hidden, self.frequencies, self.points, self.iterations) < 1:
            raise CalibrationError(
                f"Discovery: hidden {self.hidden}, frequencies {self.frequencies}, points {self.points}, iterations "
                f"{self.iterations}; expected positive numbers."
            )
        if not self.stages or min(self.stages) <= 0:
            raise CalibrationError(f"Discovery: stages {self.stages}; expected positive standard deviations.")


@dataclass(eq=False)
class Data:
    """Images as the network sees them: places (n, d) and times (n,) of voxels, their values and noise (n,)."""

    x: torch.Tensor
    tau: torch.Tensor
    value: torch.Tensor
    sd: torch.Tensor


@dataclass(eq=False)
class State:
    """All unknowns: weights of the state network, and transformed coordinates of the model's free parameters."""

    w: torch.Tensor
    z: np.ndarray
    damping: float = 1e-2


class Learning:
    """One problem laid out in units of the box's longest side and of the time between first and last image."""

    def __init__(self, model: ReactionDiffusion, domain: Domain, days: np.ndarray, images: np.ndarray, sds: np.ndarray,
                 settings: Discovery):  # fmt: skip
        self.model, self.settings, self.days = model, settings, days
        self.span = float(self.days[-1] - self.days[0])
        axes = [i for i, n in enumerate(domain.shape) if n > 1]
        shape = [domain.shape[i] for i in axes]
        lengths = np.array([domain.shape[i] * domain.spacing[i] for i in axes])
        self.length = float(lengths.max())
        # One set of weights; the two differ in which sum of second derivatives they give. A voxel's average is the
        # value at its middle and h² / 24 times the second derivative along each axis, to fourth order.
        self.network = Network(torch.tensor((self.length / lengths) ** 2), settings.frequencies, settings.hidden, 1)
        self.seen = replace(self.network, metric=torch.tensor([1 / n**2 / 24 for n in shape], dtype=torch.float64))
        name = model.diffusion.uniform
        spread = model.parameters[f"diffusion.{name}"].typical * self.span / self.length**2
        self.guide = Guide(images[0].reshape(shape), self.network.metric, spread)
        self.data = self._voxels(shape, images, sds)
        self.data_inputs = self.seen.inputs(
            self.data.x, self.data.tau, [self.guide.at(self.data.x, self.data.tau, self.seen.metric)]
        )
        self.parameters: dict[str, Parameter] = {n: model.parameters[n] for n in model.free}
        self.prior = prior_of(self.parameters, model.joint)
        self.precision = self.prior.precision

    def _voxels(self, shape: list[int], images: np.ndarray, sds: np.ndarray) -> Data:
        centres = [(torch.arange(n, dtype=torch.float64) + 0.5) / n for n in shape]
        grid = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).reshape(-1, len(shape))
        parts = []
        for day, image, sd in zip(self.days, images, sds, strict=True):
            value = torch.tensor(image.reshape(-1))
            there = torch.isfinite(value)
            tau = torch.full_like(value, (day - self.days[0]) / self.span)
            parts.append((grid[there], tau[there], value[there], torch.full_like(value, sd)[there]))
        return Data(*(torch.cat(p) for p in zip(*parts, strict=True)))

    # Misfits ----------------------------------------------------------------------------------------------------------

    def values(self, z: np.ndarray) -> dict[str, float]:
        """Values of all parameters at transformed coordinates of the free ones."""
        found = {n: p.typical for n, p in self.model.parameters.items()}
        for (name, p), v in zip(self.parameters.items(), z, strict=True):
            found[name] = float(np.clip(float(p.prior.to_value(v)), *p.bounds))
        return found

    def _chain(self, z: np.ndarray) -> np.ndarray:
        step = 1e-6
        return np.array([
            (float(p.prior.to_value(v + step)) - float(p.prior.to_value(v - step))) / (2 * step)
            for p, v in zip(self.parameters.values(), z, strict=True)
        ])  # fmt: skip

    def _images(self, w: torch.Tensor, slopes: bool):
        """Misfit of the images over the noise (n,), and its derivatives by the weights (n, count)."""
        out, kept = self.seen.forward(w, self.data_inputs)
        n, grad, lap = out[0], out[2:-1], out[-1]
        a = self.seen.metric[:, None]
        u = torch.exp(n)
        seen = u * (1 + lap + (a * grad * grad).sum(0))
        sd = self.data.sd
        misfit = (seen - self.data.value) / sd
        if not slopes:
            return misfit, None
        back = torch.zeros_like(out)
        back[0], back[2:-1], back[-1] = seen / sd, 2 * a * grad * u / sd, u / sd
        return misfit, self.seen.jacobian(w, kept, back)

    def _growth(self, values: dict[str, float], u: torch.Tensor):
        """Growth per span (n,), its slope in u, and its derivatives by the free parameters of growth by name."""
        term = self.model.growth
        own = {n: torch.full_like(u, v).requires_grad_() for n, v in self.model.of(term, values).items()}
        here = u.detach().requires_grad_()
        rate = self.span * term.rate(here, own, Context(), TorchOps)
        slope, *rest = torch.autograd.grad(rate.sum(), [here, *own.values()], allow_unused=True)
        by = {f"{term.name}.{n}": g for n, g in zip(own, rest, strict=True) if g is not None}
        return rate.detach(), slope, by

    def _equation(self, w: torch.Tensor, z: np.ndarray, inputs: torch.Tensor, slopes: bool):
        """Residual (n,), and its derivatives by weights (n, count) and by the parameters' coordinates (n, p)."""
        values = self.values(z)
        name = self.model.diffusion.uniform
        d = 0.0 if name is None else values[f"diffusion.{name}"] * self.span / self.length**2
        out, kept = self.network.forward(w, inputs)
        n, flow, grad, lap = out[0], out[1], out[2:-1], out[-1]
        a = self.network.metric[:, None]
        u = torch.exp(n)
        spread = lap + (a * grad * grad).sum(0)
        growth, rate, by = self._growth(values, u)
        left = u * (flow - d * spread)
        if not slopes:
            return left - growth, None, None
        back = torch.empty_like(out)
        back[0], back[1], back[2:-1], back[-1] = left - rate * u, u, -2 * d * a * grad * u, -d * u
        along = torch.zeros(len(n), len(z), dtype=torch.float64)
        for i, (one, chain) in enumerate(zip(self.parameters, self._chain(z), strict=True)):
            if one == f"diffusion.{name}":
                along[:, i] = -u * spread * chain * self.span / self.length**2
            elif one in by:
                along[:, i] = -by[one] * chain
        return left - growth, self.network.jacobian(w, kept, back), along

    # Training ---------------------------------------------------------------------------------------------------------

    def _inputs(self, seed: int) -> torch.Tensor:
        dimensions = len(self.network.metric)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a Sobol sequence cut short is as good here
            points = torch.tensor(qmc.Sobol(dimensions + 1, seed=seed).random(self.settings.points))
        # More of them near the first and the last day, where a fit is loosest.
        tau = (1 - torch.cos(torch.pi * points[:, -1])) / 2
        x = points[:, :-1]
        return self.network.inputs(x, tau, [self.guide.at(x, tau, self.network.metric)])

    def misfits(self, state: State, inputs: torch.Tensor, sd: float) -> torch.Tensor:
        """Misfits of images and equation over their standard deviations (n,)."""
        images, _ = self._images(state.w, slopes=False)
        equation, _, _ = self._equation(state.w, state.z, inputs, slopes=False)
        return torch.cat((images, equation / sd))

    def objective(self, misfits: torch.Tensor, state: State) -> float:
        """Half the sum of squares of all misfits, and the priors."""
        away = state.z - self.prior.mean
        total = misfits.square().sum() + state.w.square().sum() / WEIGHT**2
        return 0.5 * (float(total) + float(away @ self.precision @ away))

    def normal(self, state: State, inputs: torch.Tensor, sd: float) -> tuple[torch.Tensor, ...]:
        """Misfits (n,), their Jacobian (n, count + p), gradient and Gauss-Newton matrix of the objective."""
        r, j = self._images(state.w, slopes=True)
        e, k, along = self._equation(state.w, state.z, inputs, slopes=True)
        count = len(state.w)
        jacobian = torch.zeros(len(r) + len(e), count + len(state.z), dtype=torch.float64)
        jacobian[: len(r), :count], jacobian[len(r) :, :count], jacobian[len(r) :, count:] = j, k / sd, along / sd
        misfits = torch.cat((r, e / sd))
        a, g = jacobian.T @ jacobian, jacobian.T @ misfits
        g[:count] += state.w / WEIGHT**2
        a.diagonal()[:count] += 1 / WEIGHT**2
        a[count:, count:] += torch.tensor(self.precision)
        g[count:] += torch.tensor(self.precision @ (state.z - self.prior.mean))
        return misfits, jacobian, g, a

    def step(self, state: State, inputs: torch.Tensor, sd: float, now: float) -> tuple[State, float] | None:
        """One Levenberg-Marquardt step, or None where none is an improvement."""
        r, j, g, a = self.normal(state, inputs, sd)
        count, damping = len(state.w), state.damping

        def moved(move: torch.Tensor) -> State:
            return State(state.w + move[:count], state.z + move[count:].numpy(), max(damping / 5, 1e-9))

        while damping < MOST:
            damped = a.clone()
            damped.diagonal().add_(damping * a.diagonal())
            factor, info = torch.linalg.cholesky_ex(damped)
            if not int(info):
                move = -torch.cholesky_solve(g[:, None], factor)[:, 0]
                # Half the geodesic acceleration (Transtrum and Sethna 2012, arXiv:1201.5885): the valley is curved.
                near = self.misfits(moved(NEAR * move), inputs, sd)
                curved = 2 / NEAR * ((near - r) / NEAR - j @ move)
                bent = -0.5 * torch.cholesky_solve((j.T @ curved)[:, None], factor)[:, 0]
                size = torch.sqrt(a.diagonal())
                if float((size * bent).norm()) < BEND * float((size * move).norm()):
                    trial = moved(move + bent)
                    value = self.objective(self.misfits(trial, inputs, sd), trial)
                    if math.isfinite(value) and value < now:
                        return trial, value
            damping *= 4
        return None

    def first(self) -> State:
        """Weights fitted to the logarithm of the images, and the priors' means."""
        w = self.network.start(self.settings.seed)
        target = torch.log(self.data.value.clamp_min(0.0) + self.data.sd)
        w[-1] = float(target.mean())
        inputs, damping = self.data_inputs[0], 1e-2

        def cost(w, out):
            return 0.5 * float(((out - target) / GUESS).square().sum() + w.square().sum() / WEIGHT**2)

        out, kept = self.seen.forward(w, self.data_inputs)
        for _ in range(GUESSING):
            back = torch.zeros_like(out)
            back[0] = 1 / GUESS
            j = self.seen.jacobian(w, kept, back)
            a = j.T @ j + torch.eye(len(w), dtype=torch.float64) / WEIGHT**2
            g = j.T @ ((out[0] - target) / GUESS) + w / WEIGHT**2
            while damping < MOST:
                moved = w - torch.linalg.solve(a + damping * torch.diag(a.diagonal()), g)
                if cost(moved, self.seen.value(moved, inputs)[0]) < cost(w, out[0]):
                    w, damping = moved, damping / 5
                    break
                damping *= 4
            out, kept = self.seen.forward(w, self.data_inputs)
        return State(w, self.prior.mean.copy())

    def run(self, progress: Callable[[str], None] | None = None) -> Discovered:
        """Train stage by stage."""
        state = self.first()
        inputs = self._inputs(self.settings.seed)
        stages = self.settings.stages
        moves = np.array([not n.startswith("diffusion.") for n in self.parameters])
        spent = 0
        for number, sd in enumerate(stages):
            held = np.where(moves | (2 * number >= len(stages)), 1.0, np.sqrt(HELD))
            self.precision = self.prior.precision * held * held[:, None]
            least = LAST_GAIN if number == len(stages) - 1 else GAIN
            inputs = self._inputs(self.settings.seed + number)
            now = self.objective(self.misfits(state, inputs, sd), state)
            spent, history = 0, [now]
            while spent < self.settings.iterations and not (
                spent >= WINDOW and history[-1 - WINDOW] - history[-1] < least
            ):
                found = self.step(state, inputs, sd, now)
                spent += 1
                if found is None:
                    break
                state, now = found
                history.append(now)
            if progress:
                e = self._equation(state.w, state.z, inputs, slopes=False)[0]
                progress(f"equation {float(e.square().mean().sqrt()):.1e} (asked {sd:g}), {spent} steps, "
                         f"objective {now:.6g}")  # fmt: skip
            state.damping = max(state.damping, 1e-4)
        return self._result(state, inputs, spent < self.settings.iterations)

    def _result(self, state: State, inputs: torch.Tensor, converged: bool) -> Discovered:
        *_, a = self.normal(state, inputs, self.settings.stages[-1])
        count = len(state.w)
        # The weights are marginalised: their block is eliminated.
        ww, wz = a[:count, :count], a[:count, count:]
        schur = a[count:, count:] - wz.T @ torch.linalg.solve(ww, wz)
        covariance = np.linalg.inv(((schur + schur.T) / 2).numpy())
        e = self._equation(state.w, state.z, self._inputs(self.settings.seed + 1000), slopes=False)[0]
        images, _ = self._images(state.w, slopes=False)
        u = torch.exp(self.seen.value(state.w, self.data_inputs[0])[0])
        noise = float(self.data.sd.max())
        return Discovered(
            self.model, self.values(state.z), state.z, (covariance + covariance.T) / 2,
            (max(noise, float(u.min())), float(u.max())), float(e.square().mean().sqrt()),
            float(images.square().mean()), converged,
        )  # fmt: skip
