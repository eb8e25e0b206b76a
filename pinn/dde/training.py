"""Training of a DeepXDE network: Adam and L-BFGS that say when they stop too early, or second order for all."""

from __future__ import annotations

import contextlib
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from biomodel.cli_show import Steps, steps
from biomodel.errors import CalibrationError, InputError
from biomodel.files import atomic_write
from pinn.dde.backend import dde, double
from pinn.dde.network import assign, flat
from pinn.dde.problem import Posed
from pinn.dde.sampling import Refine, Settled
from pinn.dde.secondorder import DAMPING, Algebra, Dense, Found, MatrixFree, marginal, minimise
from pinn.dde.selfscaled import Descent, descend
from pinn.memory import on_cpu_when_full

#: Iterations of L-BFGS between looks, and its memory.
PIECE, MEMORY = 100, 100
#: Largest gradient at which L-BFGS may stop: of minus the log posterior per measured value.
FLAT = 1e-7
#: A restart of L-BFGS that gains less than this share of the loss has not helped.
HELPED = 1e-5
#: Unknowns up to which J'J is formed.
LARGE = 3000

Progress = Callable[[str], None]


class StoppedEarlyWarning(UserWarning):
    """A training that ended before it had reached a minimum, or before the parameters had settled."""


@dataclass(frozen=True, eq=False)
class FirstOrderReport:
    """What a first-order training did.

    Attributes
    ----------
    loss : float
        Minus the log posterior per measured value, the equation's penalty included.
    adam, lbfgs, restarts : int
        Iterations of each, and how often L-BFGS was begun anew after it had stopped too early.
    settled : bool
        Whether the parameters had stopped moving.
    flat : bool
        Whether the gradient vanishes.
    """

    loss: float
    adam: int
    lbfgs: int
    restarts: int
    settled: bool
    flat: bool


class _Watch(dde.callbacks.Callback):
    """Progress and checkpoints."""

    def __init__(self, training: FirstOrder, posed: Posed, phase: str, done: int, say: Progress):
        super().__init__()
        self.training, self.posed, self.phase, self.done, self.say = training, posed, phase, done, say

    def on_epoch_end(self) -> None:
        """Say how far it is, and keep the state."""
        self.done += 1
        if self.done % self.training.every and self.phase == "adam":
            return
        values = ", ".join(f"{n} {v:.4g}" for n, v in self.posed.values.items())
        self.say(f"{self.phase} {self.done}: {values}")
        if self.training.checkpoint is not None:
            _save(self.training.checkpoint, self.posed, self.phase, self.done)


@dataclass(frozen=True)
class FirstOrder:
    """Adam, then L-BFGS, with the losses of the likelihood.

    PyTorch's L-BFGS returns without a word when its line search fails, in single precision soon; DeepXDE then takes the
    training for converged. Here the gradient is looked at: where it has not vanished, L-BFGS begins anew with an empty
    memory, and where that does not help a warning says so.

    Parameters
    ----------
    adam, lbfgs : int
        Most iterations.
    rate : float
        Of Adam.
    settle : bool
        Whether to stop when the parameters have settled, whatever the loss does (`Settled`).
    refine : int, optional
        Draw the equation's points anew every so many iterations of Adam (`Refine`).
    restarts : int
        Of L-BFGS.
    checkpoint : Path, optional
        Where the state is kept every `every` iterations; a training whose file is there goes on from it.
    """

    adam: int = 3000
    lbfgs: int = 3000
    rate: float = 2e-3
    settle: bool = True
    refine: int | None = None
    restarts: int = 3
    checkpoint: Path | None = None
    every: int = 200

    def train(self, posed: Posed) -> FirstOrderReport:
        """Train; progress is shown on a terminal and not in a pipe.

        Raises
        ------
        InputError
            If the checkpoint belongs to another problem.
        """
        with steps() as shown:
            return self._train(posed, shown)

    def _train(self, posed: Posed, shown: Steps) -> FirstOrderReport:
        model, settled = posed.model, Settled(posed)
        phase, done, kept = "adam", 0, None
        if self.checkpoint is not None and self.checkpoint.exists():
            phase, done, kept = _load(self.checkpoint, posed)
        shown.say("training")

        def callbacks(which: str, from_: int) -> list:
            found = [_Watch(self, posed, which, from_, shown.detail)]
            if which == "adam" and self.refine is not None:
                found.append(Refine(posed, self.refine))
            return [*found, settled] if self.settle else found

        adam = done if phase == "adam" else self.adam
        if phase == "adam" and done < self.adam:
            model.compile("adam", lr=self.rate)
            if kept is not None:
                model.opt.load_state_dict(kept)
            model.train_state.iteration = done
            watching = callbacks("adam", done)
            model.train(iterations=self.adam - done, display_every=10**9, callbacks=watching)
            adam, phase, done, kept = watching[0].done, "lbfgs", 0, None
        spent, restarts, is_flat = (done if phase == "lbfgs" else 0), 0, False
        loss = _loss(posed)[0]
        while spent < self.lbfgs and not settled.reached:
            before = loss
            spent += self._lbfgs(posed, self.lbfgs - spent, callbacks("lbfgs", spent), kept)
            kept = None
            loss, gradient = _loss(posed)
            is_flat = gradient <= FLAT
            if is_flat or spent >= self.lbfgs or settled.reached:
                break
            if restarts == self.restarts or (restarts and before - loss < HELPED * abs(before)):
                warnings.warn(
                    f"L-BFGS stopped after {spent} iterations of {self.lbfgs} with a gradient of {gradient:.1e} (it "
                    f"should be below {FLAT:.0e}), and {restarts} new starts did not help: the loss is too badly "
                    "scaled for first-order training. Use pinn.dde.SecondOrder().",
                    StoppedEarlyWarning,
                    stacklevel=4,
                )
                break
            restarts += 1
        return FirstOrderReport(loss, adam, spent, restarts, settled.reached, is_flat)

    def _lbfgs(self, posed: Posed, most: int, callbacks: list, kept: dict | None) -> int:
        """Iterations until L-BFGS stops by itself, or `most` are spent."""
        model, spent = posed.model, 0
        opt = torch.optim.LBFGS(posed.net.parameters(), max_iter=min(PIECE, most), history_size=MEMORY,
                                tolerance_grad=FLAT, tolerance_change=0.0, line_search_fn="strong_wolfe")  # fmt: skip
        if kept is not None:
            opt.load_state_dict(kept)
        model.compile(opt)
        begun = _count(opt)
        while spent < most:
            model.train(iterations=1, display_every=10**9, callbacks=callbacks)
            now = _count(opt) - begun
            if now - spent < min(PIECE, most - spent) or model.stop_training:
                return max(now, 1)
            spent = now
        return spent


def _count(opt: torch.optim.LBFGS) -> int:
    state = opt.state_dict()["state"]
    return int(state[0]["n_iter"]) if state else 0


def _loss(posed: Posed) -> tuple[float, float]:
    """Loss, and the largest entry of its gradient."""
    value, gradient = objective(posed)(flat(posed.net)[0])
    return value, float(gradient.abs().max())


def objective(posed: Posed) -> Callable[[torch.Tensor], tuple[float, torch.Tensor]]:
    """DeepXDE's loss and its gradient as a function of all unknowns (n,), for any optimiser; it moves the network."""

    def function(v: torch.Tensor) -> tuple[float, torch.Tensor]:
        assign(posed.net, v)
        posed.net.zero_grad()
        with double():
            x = torch.tensor(posed.data.train_x).requires_grad_()
            losses = torch.stack(
                posed.data.losses(None, posed.net(x), lambda a, b: (a - b).square().mean(), x, posed.model)
            )
            loss = (losses * torch.tensor(posed.model.weights)).sum()
            loss.backward()
            dde.gradients.clear()
        named = dict(posed.net.named_parameters())
        parts = [named[n].grad.reshape(-1) for n in [m for m in named if m != "z"] + ["z"]]
        return float(loss.detach()), torch.cat(parts)

    return function


def broyden(posed: Posed, iterations: int = 2000) -> Descent:
    """Train by the self-scaled Broyden method (:mod:`pinn.dde.selfscaled`), for comparison."""
    found = descend(objective(posed), flat(posed.net)[0], iterations, FLAT)
    assign(posed.net, found.x)
    return found


# Checkpoints ----------------------------------------------------------------------------------------------------------


def _save(path: Path, posed: Posed, phase: str, done: int) -> None:
    with atomic_write(path) as beside:
        torch.save(
            {"phase": phase, "done": done, "names": list(posed.equation.names), "points": posed.points,
             "net": posed.net.state_dict(), "optimizer": posed.model.opt.state_dict()},
            beside,
        )  # fmt: skip


def _load(path: Path, posed: Posed) -> tuple[str, int, dict]:
    try:
        kept = torch.load(path, weights_only=True)
        posed.net.load_state_dict(kept["net"])
        names = kept["names"]
    except (RuntimeError, KeyError, ValueError, EOFError, OSError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{path}: not a checkpoint of this network ({str(error).splitlines()[0]}); remove the file to begin anew, "
            "or pose the problem with the same network."
        ) from error
    if names != list(posed.equation.names):
        raise InputError(f"{path}: its parameters are {names}; expected {list(posed.equation.names)}. Remove the file.")
    posed.points = kept["points"]
    with double():
        posed.data.replace_with_anchors(posed.points.numpy())
    return str(kept["phase"]), int(kept["done"]), kept["optimizer"]


# Second order ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Estimate:
    """Parameters of a DeepXDE network with their uncertainty.

    Attributes
    ----------
    values : dict of str to float
    z : ndarray, shape (p,)
        Their coordinates.
    covariance : ndarray, shape (p, p)
        Of z, with the network's weights marginalised.
    moved : float
        How far (posterior sd) the parameters moved at the last raise of the equation's weight.
    weight : float
        The equation's last weight.
    iterations : int
    converged : bool
        Whether `moved` is below the tolerance and the last search ended by itself.
    """

    values: dict[str, float]
    z: np.ndarray
    covariance: np.ndarray
    moved: float
    weight: float
    iterations: int
    converged: bool

    @property
    def sd(self) -> np.ndarray:
        """Standard deviations (p,) of z."""
        return np.sqrt(np.diag(self.covariance))


@dataclass(frozen=True)
class SecondOrder:
    """Levenberg-Marquardt for weights and physical parameters together, with a rising weight of the equation.

    Minus the log posterior is a sum of squares (:meth:`Posed.rows`). A small weight of the equation lets the network go
    to the data first, a large one makes it a solution; the weight rises until the parameters no longer move. Their
    covariance is the corner of the inverse of J'J: the weights are marginalised. At 100 the equation binds (the sd is
    then that of the classical posterior); far above it, every step is short and the search crawls.

    Parameters
    ----------
    weights : tuple of float
        Of the equation, one search after the other.
    iterations : int
        Most of each search.
    tolerance : float
        Posterior standard deviations that the parameters may move by at the last raise.
    gain : float
        See :func:`pinn.dde.secondorder.minimise`.
    algebra : Dense or MatrixFree, optional
        By default `Dense` up to 3000 unknowns.
    """

    weights: tuple[float, ...] = (10.0, 100.0, 1000.0)
    iterations: int = 60
    tolerance: float = 0.2
    gain: float = 0.05
    algebra: Algebra | None = None
    damping: float = field(default=DAMPING)

    def __post_init__(self):
        if not self.weights or min(self.weights) <= 0 or list(self.weights) != sorted(self.weights):
            raise CalibrationError(f"SecondOrder: weights {self.weights}; expected positive numbers that rise.")

    def train(self, posed: Posed, device: torch.device | None = None) -> Estimate:
        """Train; progress is shown on a terminal and not in a pipe.

        Parameters
        ----------
        device : torch.device, optional
            Where to compute; where its memory runs out the points go through in smaller chunks, then on the CPU.
        """
        with steps() as shown:
            shown.say("training")
            return on_cpu_when_full(lambda where: self._train(posed, where, shown.detail),
                                    torch.device("cpu") if device is None else device)  # fmt: skip

    def _train(self, posed: Posed, device: torch.device, say: Progress) -> Estimate:
        # A default device makes every operation of PyTorch dearer, so the CPU is not set as one.
        place = contextlib.nullcontext() if device.type == "cpu" else torch.device(device)
        with place, double():
            posed.net.to(device)
            return self._continued(posed, say)

    def _continued(self, posed: Posed, say: Progress) -> Estimate:
        p = len(posed.equation.names)
        v = flat(posed.net)[0]
        algebra = self.algebra or (Dense() if len(v) <= LARGE else MatrixFree())
        damping, spent, moved, found = self.damping, 0, math.inf, None
        for weight in self.weights:
            posed.weigh(weight)

            def tell(text: str, weight=weight) -> None:
                say(f"weight {weight:g}, {text}")

            found = minimise(posed.rows(), v, algebra, self.iterations, self.gain, damping=damping, progress=tell)
            spent += found.iterations
            assign(posed.net, found.v)
            covariance = marginal(found.linear, p).numpy()
            step = (found.v - v)[-p:].numpy()
            moved = float(np.sqrt(step @ np.linalg.solve(covariance, step)))
            v, damping = found.v, max(10 * found.damping, 1e-8)
            if moved < self.tolerance and weight != self.weights[0]:
                break
        assert isinstance(found, Found)
        converged = moved < self.tolerance and found.settled
        if not converged:
            warnings.warn(
                f"SecondOrder: at the last raise of the equation's weight, to {weight:g}, the parameters still moved "
                f"by {moved:.2g} posterior sd; give more weights, iterations, units or points.",
                StoppedEarlyWarning,
                stacklevel=5,
            )
        return Estimate(posed.values, posed.z, covariance, moved, weight, spent, converged)
