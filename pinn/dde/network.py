"""Networks for DeepXDE: input features, the start that holds exactly, and physical parameters beside the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from biomodel.errors import SolverError
from pinn.carried import Places, coefficients
from pinn.dde.backend import dde
from pinn.physics import Physics

#: Cosines of the start below this share of the largest are left out.
NEGLIGIBLE = 1e-8
#: Share of the start's largest value below which it is rounded off, so that it is positive and, for its root, smooth.
LEAST, ROUND = 1e-9, 1e-4


class Carried(torch.nn.Module):
    """The start carried on by diffusion with a fixed diffusivity, as a function of place and time."""

    c: torch.Tensor

    def __init__(self, physics: Physics, u0: np.ndarray, diffusion: float):
        super().__init__()
        c = coefficients(physics.geometry.continued(u0.reshape(physics.shape)).numpy())
        large = np.argwhere(np.abs(c) > NEGLIGIBLE * np.abs(c).max())
        c = c[tuple(slice(0, int(n) + 1) for n in large.max(0))]
        self.register_buffer("c", torch.tensor(np.ascontiguousarray(c)))
        self.metric, self.diffusion, self.d = physics.metric, diffusion, len(physics.shape)
        self.top = float(u0.max())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """B (n,) at x (n, d + 1)."""
        places = Places.of(x[:, : self.d], x[:, self.d], self.c.shape, self.metric)
        return places.carried(self.c, self.diffusion, slopes=False)[0]

    def positive(self, x: torch.Tensor, share: float) -> torch.Tensor:
        """B (n, 1), rounded off to stay above zero where it is below a share of its top."""
        b, least = self(x)[:, None], share * self.top
        return 0.5 * (b + torch.sqrt(b * b + 4 * least * least))


class Start(Protocol):
    """How a network's one output n becomes w."""

    def __call__(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        """w (n, 1) from places (n, d + 1) and outputs (n, 1)."""


class Exact(torch.nn.Module):
    """w = (sqrt(B) + tau n)²: the start holds exactly, w is never negative, and may arise where B has nothing.

    The start B is rounded off at 1e-4 of its largest value.
    """

    def __init__(self, carried: Carried):
        super().__init__()
        self.carried = carried

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return (torch.sqrt(self.carried.positive(x, ROUND)) + x[:, -1:] * n) ** 2


class Growing(torch.nn.Module):
    """w = B exp(tau n): exact start and sign as in `pinn.PinnSolver`; the more exact of the two where B is smooth."""

    def __init__(self, carried: Carried):
        super().__init__()
        self.carried = carried

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return self.carried.positive(x, LEAST) * torch.exp(x[:, -1:] * n)


class Free(torch.nn.Module):
    """w = log(1 + exp n): positive, with a start that is an observation like others."""

    def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softplus(n)


class Features(Protocol):
    """Inputs of the network.

    Attributes
    ----------
    count : int
    closed : bool
        Whether nothing flows through the box's sides, whatever the weights are.
    """

    count: int
    closed: bool

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(n, d + 1) to (n, count)."""


class Cosines(torch.nn.Module):
    """cos(m pi x_i) of each axis, the time, and the carried start: nothing flows through the box's sides."""

    closed = True
    m: torch.Tensor

    def __init__(self, physics: Physics, frequencies: int = 5, carried: Carried | None = None):
        super().__init__()
        self.d, self.carried = len(physics.shape), carried
        self.register_buffer("m", math.pi * torch.arange(1, frequencies + 1, dtype=torch.float64))
        self.count = self.d * frequencies + 1 + (carried is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found = [torch.cos(x[:, i : i + 1] * self.m) for i in range(self.d)] + [2 * x[:, self.d :] - 1]
        if self.carried is not None:
            found.append(self.carried(x)[:, None] / self.carried.top)
        return torch.cat(found, 1)


class Fourier(torch.nn.Module):
    """Sine and cosine of random frequencies (Tancik et al. 2020, arXiv:2006.10739), with place and time themselves.

    Parameters
    ----------
    count : int
        Number of frequencies.
    scale : float
        Their standard deviation, waves per side.
    """

    closed = False
    b: torch.Tensor

    def __init__(self, physics: Physics, count: int = 16, scale: float = 1.0, seed: int = 0):
        super().__init__()
        d = len(physics.shape)
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer(
            "b", 2 * math.pi * scale * torch.randn(d + 1, count, generator=generator, dtype=torch.float64)
        )
        self.count = 2 * count + d + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = x @ self.b
        return torch.cat((torch.sin(angle), torch.cos(angle), 2 * x - 1), 1)


class State(dde.nn.NN):
    """A network for w with the coordinates z of the free parameters as one more of its weights.

    DeepXDE's own `dde.Variable` is lost when a model is saved and refused by its NNCG; a parameter of the network is
    neither. What DeepXDE or a user may do with any network works with this one.

    Parameters
    ----------
    core : torch.nn.Module
        (n, features.count) to (n, 1), smooth.
    z : tensor, shape (p,)
        Where the parameters start.
    """

    def __init__(self, core: torch.nn.Module, features: Features, start: Start, z: torch.Tensor):
        super().__init__()
        self.core, self.features, self.start = core, features, start
        self.z = torch.nn.Parameter(z.clone())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """w (n, 1) at places and times (n, d + 1)."""
        x = inputs if self._input_transform is None else self._input_transform(inputs)
        w = self.start(x, self.core(self.features(x)))
        return w if self._output_transform is None else self._output_transform(inputs, w)


def plain(features: Features, hidden: tuple[int, ...], seed: int) -> torch.nn.Module:
    """DeepXDE's fully connected network with tanh; the last layer starts at a tenth of Glorot's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        core = dde.nn.FNN([features.count, *hidden, 1], "tanh", "Glorot normal")
    with torch.no_grad():
        core.linears[-1].weight.mul_(0.1)
    return core


def check(core: torch.nn.Module, features: Features, d: int) -> None:
    """Refuse a network that cannot stand in the equation.

    Raises
    ------
    SolverError
        If it is no module, or its output has another shape or type, is not finite, or has no second derivative.
    """
    name = type(core).__name__
    if not isinstance(core, torch.nn.Module):
        raise SolverError(f"network: {name} is no torch.nn.Module; expected one from (n, {features.count}) to (n, 1).")
    if not any(p.requires_grad for p in core.parameters()):
        raise SolverError(f"network: {name} has no weights to train.")
    wrong = {str(p.dtype) for p in core.parameters() if p.dtype != torch.float64}
    if wrong:
        raise SolverError(
            f"network: weights of {name} are {', '.join(sorted(wrong))}; expected torch.float64. Call .double() on it."
        )
    x = torch.rand(7, d + 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inputs = features(x).detach().requires_grad_()
    try:
        n, few = core(inputs), core(inputs[:3])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise SolverError(
            f"network: {name} fails on inputs of shape (7, {features.count}): {error}. Its first layer must take "
            f"{features.count} features, or give other features."
        ) from error
    if not isinstance(n, torch.Tensor) or n.shape != (7, 1):
        found = tuple(n.shape) if isinstance(n, torch.Tensor) else type(n).__name__
        raise SolverError(
            f"network: for 7 points {name} gives {found}; expected a tensor (7, 1). Give its last layer one unit."
        )
    if not bool(torch.isfinite(n).all()):
        raise SolverError(f"network: {name} gives values that are not finite at its first weights.")
    if not torch.allclose(few, n[:3]):
        raise SolverError(
            f"network: {name} gives a point another value when other points are beside it; leave out batch "
            "normalisation and the like, with which the equation has no meaning."
        )
    (slope,) = torch.autograd.grad(n.sum(), inputs, create_graph=True)
    curve = torch.autograd.grad(slope.square().sum(), inputs, allow_unused=True)[0] if slope.requires_grad else None
    if curve is None or not bool(curve.abs().max() > 0):
        raise SolverError(
            f"network: {name} has no second derivative by its inputs, and diffusion needs one; use a smooth activation "
            "such as torch.nn.Tanh instead of ReLU."
        )


def flat(net: torch.nn.Module) -> tuple[torch.Tensor, Mapping[str, tuple[int, torch.Size]]]:
    """All weights as one vector, z last, and where each is in it."""
    found, where, at = [], {}, 0
    named = dict(net.named_parameters())
    for name in [n for n in named if n != "z"] + ["z"]:
        where[name] = (at, named[name].shape)
        found.append(named[name].detach().reshape(-1))
        at += named[name].numel()
    return torch.cat(found), where


def named(v: torch.Tensor, where: Mapping[str, tuple[int, torch.Size]]) -> dict[str, torch.Tensor]:
    """The weights of a vector by name."""
    return {n: v[at : at + math.prod(shape)].reshape(shape) for n, (at, shape) in where.items()}


def assign(net: torch.nn.Module, v: torch.Tensor) -> None:
    """Put the weights of a vector into the network."""
    where = flat(net)[1]
    with torch.no_grad():
        for name, value in named(v, where).items():
            net.get_parameter(name).copy_(value)
