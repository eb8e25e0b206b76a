"""Forward Allen-Cahn: a network on the exact flow of the reaction, and a reference solver of another kind.

u_t - 1e-4 u_xx + 5 u³ - 5 u = 0 on [-1, 1], periodic, u0 = x² cos(pi x), t in [0, 1]: the problem of Wang, Sankaran
and Perdikaris 2024 (doi:10.1016/j.cma.2024.116813) and of JAX-PI (Wang et al. 2023, arXiv:2308.08468). The solution is
even, so the network sees [0, 1] by cosines, and start and periodicity hold exactly.

The reaction alone has the flow F(v, t) = v e^(5t) / sqrt(1 + v² (e^(10t) - 1)). With B the start carried by diffusion
alone, u = F(B + t N, t): at N = 0 one step of operator splitting over the whole time (0.5 % off), and what the network
N has to learn is the interplay of reaction and diffusion in the fronts, whose width is 0.006. What is left of the
equation,

    F_v (N + t N_t - 1e-4 t N_xx) - 1e-4 F_vv v_x²,   v = B + t N,

is made small by Levenberg-Marquardt.
"""

import math
import warnings

import numpy as np
import torch
from scipy.fft import dct
from scipy.stats import qmc

from pinn.network import Network
from pinn.training import Trained, train

DIFFUSION, RATE = 1e-4, 5.0
#: Cosines of the start, whose periodic continuation has a kink at x = 1.
MODES = 2048
#: Candidates of which residual points are chosen, and evaluations at once.
CANDIDATES, BLOCK = 16_384, 4096
#: Grid on which errors are given, as in JAX-PI: 512 points of [-1, 1), 201 times.
POINTS, TIMES = 512, 201


def reference(n: int = 4096, step: float = 1e-3) -> np.ndarray:
    """States (201, 512) by Fourier modes and exponential time differencing of fourth order.

    Cox and Matthews 2002, doi:10.1006/jcph.2002.6995; coefficients by contour integrals, Kassam and Trefethen 2005,
    doi:10.1137/S1064827502410633.
    """
    x = -1 + 2 * np.arange(n) / n
    u = x**2 * np.cos(np.pi * x)
    linear = RATE - DIFFUSION * (np.pi * np.fft.rfftfreq(n, 1 / n)) ** 2
    z = step * linear[:, None] + np.exp(2j * np.pi * (np.arange(1, 33) - 0.5) / 32)

    def mean(f):
        return step * f.mean(1).real

    whole, half = np.exp(step * linear), np.exp(step * linear / 2)
    q = mean((np.exp(z / 2) - 1) / z)
    f1 = mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3)
    f2 = mean((2 + z + np.exp(z) * (z - 2)) / z**3)
    f3 = mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3)

    def cubic(c):
        return -RATE * np.fft.rfft(np.fft.irfft(c, n) ** 3)

    c, found = np.fft.rfft(u), [u]
    count = round(1 / step)
    for i in range(count):
        k1 = cubic(c)
        a = half * c + q * k1
        k2 = cubic(a)
        b = half * c + q * k2
        k3 = cubic(b)
        d = half * a + q * (2 * k3 - k1)
        c = whole * c + k1 * f1 + 2 * (k2 + k3) * f2 + cubic(d) * f3
        if (i + 1) % (count // (TIMES - 1)) == 0:
            found.append(np.fft.irfft(c, n))
    return np.array(found)[:, :: n // POINTS]


class Cahn:
    """The residual at points x (n,) of [0, 1] and times t (n,), for :func:`pinn.training.train`."""

    def __init__(self, network: Network, x: torch.Tensor, t: torch.Tensor, weight: torch.Tensor | float = 1.0):
        self.network, self.t, self.weight = network, t, weight
        self.b, self.b_x, b_xx = carried(x, t)
        self.grown, self.growth = torch.exp(RATE * t), torch.expm1(2 * RATE * t)
        # The network is told where splitting puts the fronts: value, derivatives by t and x, second by x.
        f, f_v, f_vv, _ = self._flow(self.b)
        guide = (f, RATE * (f - f**3) + f_v * DIFFUSION * b_xx, f_v * self.b_x, f_v * b_xx + f_vv * self.b_x**2)
        self.inputs = network.inputs(x[:, None], t, [torch.stack(guide)])

    def _flow(self, v):
        """F and its first three derivatives by v."""
        d = 1 + v * v * self.growth
        e = self.growth * self.grown
        return (
            v * self.grown / d.sqrt(),
            self.grown / d**1.5,
            -3 * v * e / d**2.5,
            -3 * e / d**2.5 + 15 * v * v * e * self.growth / d**3.5,
        )

    def _parts(self, out):
        n, n_t, n_x, n_xx = out
        v, v_x = self.b + self.t * n, self.b_x + self.t * n_x
        return v, v_x, n + self.t * n_t - DIFFUSION * self.t * n_xx

    def value(self, w: torch.Tensor) -> torch.Tensor:
        """Residuals (n,), weighted."""
        v, v_x, change = self._parts(self.network.forward(w, self.inputs)[0])
        _, f_v, f_vv, _ = self._flow(v)
        return self.weight * (f_v * change - DIFFUSION * f_vv * v_x**2)

    def state(self, w: torch.Tensor) -> torch.Tensor:
        """u (n,)."""
        return self._flow(self.b + self.t * self.network.value(w, self.inputs[0])[0])[0]

    def linear(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residuals and their derivatives by the weights (n, count)."""
        out, kept = self.network.forward(w, self.inputs)
        v, v_x, change = self._parts(out)
        _, f_v, f_vv, f_vvv = self._flow(v)
        t = self.t
        cotangents = torch.stack((
            f_v + t * (f_vv * change - DIFFUSION * f_vvv * v_x**2),
            f_v * t, -2 * DIFFUSION * f_vv * v_x * t, -DIFFUSION * f_v * t,
        ))  # fmt: skip
        residual = self.weight * (f_v * change - DIFFUSION * f_vv * v_x**2)
        return residual, self.network.jacobian(w, kept, self.weight * cotangents)


def carried(x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The start carried by diffusion alone, and its first two derivatives by x; each (n,)."""
    n = 4 * MODES
    grid = (np.arange(n) + 0.5) / n
    c = dct(grid**2 * np.cos(np.pi * grid), type=2)[:MODES] / n
    c[0] /= 2
    coefficient, k = torch.tensor(c), math.pi * torch.arange(MODES, dtype=torch.float64)
    parts = []
    for here, then in zip(x.split(BLOCK), t.split(BLOCK), strict=True):
        decayed = coefficient * torch.exp(-DIFFUSION * then[:, None] * k**2)
        angle = here[:, None] * k
        cos, sin = torch.cos(angle), torch.sin(angle)
        parts.append(((decayed * cos).sum(1), -(decayed * k * sin).sum(1), -(decayed * k**2 * cos).sum(1)))
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def points(network: Network, w: torch.Tensor, count: int, seed: int) -> Cahn:
    """Residual points, denser where the residual is large (Wu et al. 2023, doi:10.1016/j.cma.2022.115671)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        candidates = torch.tensor(qmc.Sobol(2, seed=seed).random(CANDIDATES))
    size = Cahn(network, *candidates.T).value(w).abs()
    density = size / size.mean() + 1
    chosen = np.random.default_rng(seed).choice(CANDIDATES, count, False, (density / density.sum()).numpy())
    return Cahn(network, *candidates[chosen].T, density[chosen] ** -0.5)


def solve(hidden: int, count: int, rounds: int, iterations: int, seed: int) -> tuple[Network, torch.Tensor]:
    """Train a network of two layers on `count` points, chosen anew in each round."""
    network = Network(torch.ones(1, dtype=torch.float64), 6, (hidden, hidden), 1)
    trained = Trained(network.start(seed))
    for turn in range(rounds):
        at = points(network, trained.w, count, seed + turn)
        damping = trained.damping if turn == 0 else max(trained.damping, 1e-6)
        trained = train(at, Trained(trained.w, damping=damping), 0.0, iterations)
    return network, trained.w


def error(network: Network, w: torch.Tensor, truth: np.ndarray) -> float:
    """Relative L2 error on the whole grid of points and times."""
    x = torch.tensor(np.abs(-1 + 2 * np.arange(POINTS) / POINTS))
    times = torch.linspace(0, 1, TIMES, dtype=torch.float64)
    parts = [Cahn(network, x, torch.full_like(x, float(t))).state(w) for t in times]
    return float(np.linalg.norm(torch.stack(parts).numpy() - truth) / np.linalg.norm(truth))
