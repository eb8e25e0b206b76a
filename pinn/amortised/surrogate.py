"""A physics-informed DeepONet for the cell fraction: parameters, start and treatment in, the map of any day out.

With B the start spread by diffusion alone (reflected at the walls) and R_t the model's own reaction, growth and
treatment, over a time t (exact where the growth law has a closed form),

    u(x, t) = R_t(B(x, t)) exp(s N),   N = sum_k b_k(parameters, treatment) t_k(x, t),   s = t / last day.

R_t(B) is the solution where either diffusion or growth is slow, and has jumps and decay of treatments exactly; the
start holds whatever N is, for a focus that no wall cuts off. The network N (branch b, trunk t: Lu et al. 2021, Nat Mach
Intell 3:218, doi:10.1038/s42256-021-00302-5) learns what both do together: from simulated maps, and from the residual
of the model's own equation (Wang, Wang and Perdikaris 2021, Sci Adv 7:eabi8605, doi:10.1126/sciadv.abi8605), whose
derivatives are those of the whole formula, by automatic differentiation.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from biomodel.errors import SolverError
from biomodel.solvers.base import Context
from biomodel.solvers.reaction import FLOWS, TorchOps
from pinn.amortised.focus import FocusMaps
from pinn.amortised.scans import Doses, Scans
from pinn.amortised.setting import Setting

#: Parts of the last day at which the branch is told how much treatment there has been, and quadrature nodes of R_t.
TOLD = (0.1, 0.2, 0.3, 0.4, 0.55, 0.7, 0.85, 1.0)
NODES, WEIGHTS = np.polynomial.legendre.leggauss(8)
#: Largest magnitude of s N.
LARGEST = 3.0


class Surrogate(torch.nn.Module):
    """Cell fractions of a setting's patients without a solver.

    Parameters
    ----------
    setting : Setting
        Its diffusion has to be uniform.
    width : int
        Units of the layers of branch and trunk.
    products : int
        Products of branch and trunk.
    seed : int

    Raises
    ------
    SolverError
        If diffusion or growth varies in space, or a drug has a map.
    """

    mean: torch.Tensor
    sd: torch.Tensor

    def __init__(self, setting: Setting, width: int = 64, products: int = 32, seed: int = 0):
        super().__init__()
        model = setting.model
        if model.diffusion.uniform is None or model.fields:
            raise SolverError(
                f"Surrogate: {model.label} reads fields ({', '.join(model.fields) or 'its diffusivity'}) that vary in "
                "space, which an operator of one focus does not see. Use bm.Isotropic() and drugs without maps."
            )
        self.setting, self.maps = setting, FocusMaps(setting.start, setting.domain)
        self.names, prior = model.free, setting.prior
        self.register_buffer("mean", torch.tensor(prior.mean))
        self.register_buffer("sd", torch.tensor(prior.sd))
        inputs = len(self.names) + 2 + len(TOLD)

        def layers(size: int) -> torch.nn.Sequential:
            sizes = (size, width, width, products)
            parts: list[torch.nn.Module] = []
            for before, after in zip(sizes[:-1], sizes[1:], strict=True):
                parts += [torch.nn.Linear(before, after, dtype=torch.float64), torch.nn.Tanh()]
            return torch.nn.Sequential(*parts[:-1])

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.branch, self.trunk = layers(inputs), layers(4)
            self.scale = torch.nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def values(self, z: torch.Tensor) -> dict[str, torch.Tensor]:
        """All parameters (n,) of coordinates (n, p), those that are known too."""
        found = {n: torch.full_like(z[:, 0], p.typical) for n, p in self.setting.model.parameters.items()}
        for i, name in enumerate(self.names):
            found[name] = self.setting.model.parameters[name].prior.to_value(z[:, i], TorchOps)
        return found

    def course(self, scans: Scans) -> Doses:
        """The patients' treatment."""
        return Doses(self.setting.model, scans.dose_days, scans.dose_amounts)

    def told(self, z: torch.Tensor, course: Doses) -> torch.Tensor:
        """Branch outputs (n, products): what they depend on is known before any place or day is."""
        m = len(self.names)
        sensors = self.setting.last * torch.tensor(TOLD, dtype=z.dtype, device=z.device)
        kill = course.exponent(self.values(z), sensors.expand(len(z), -1))
        standard = (z - self.mean) / self.sd
        return self.branch(torch.cat((standard[:, :m], standard[:, -2:], kill / (1 + kill)), 1))

    def forward(self, z: torch.Tensor, course: Doses, day: torch.Tensor, x: torch.Tensor,
                told: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """Cell fraction (n, m), averaged over a voxel around each point.

        Parameters
        ----------
        z : tensor, shape (n, p)
            Coordinates of parameters and start.
        day : tensor, shape (n,)
        x : tensor, shape (n, m, d)
            Points, mm.
        """
        told = self.told(z, course) if told is None else told
        values = self.values(z)
        start = z[:, len(self.names) :]
        place, _, width = self.maps.shape_of(start)
        spread = values[f"diffusion.{self.setting.model.diffusion.uniform}"] * day
        b = self.maps.spread(start, x, spread)
        base = self._reacted(values, course, day, b)
        s = day / self.setting.last
        radius = ((x - place[:, None]) ** 2).sum(-1) / (width**2 + 2 * spread)[:, None]
        near = torch.exp(-radius / 4)
        column = torch.ones_like(near)
        trunk = torch.stack((2 * near - 1, 2 * base - 1, (2 * s - 1)[:, None] * column, torch.sqrt(radius + 1) / 2), -1)
        n = self.scale * torch.einsum("nk,nmk->nm", told, self.trunk(trunk))
        return base * torch.exp(LARGEST * torch.tanh(s[:, None] * n / LARGEST))

    def _reacted(self, values: Mapping[str, torch.Tensor], course: Doses, day: torch.Tensor, b: torch.Tensor):
        """R_t(b): growth and treatment alone over the time to a day (n,), from cell fractions (n, m)."""
        growth, end = self.setting.model.growth, day[:, None]
        kill = course.exponent(dict(values), end)
        if growth.flow is None:
            return b * torch.exp(-kill)
        nodes, weights = (torch.tensor(v, dtype=b.dtype, device=b.device) for v in (NODES, WEIGHTS))
        doses = torch.cat([days for days, _ in course.doses.values()], 1) if course.doses else end[:, :0]
        # Between doses the integrand is smooth; what is never given lies at the end, in pieces of length 0.
        edges = torch.sort(torch.minimum(doses.clamp(min=0.0), end), 1).values
        edges = torch.cat((torch.zeros_like(end), edges, end), 1)
        length = edges.diff(dim=1)[..., None]
        at = (edges[:, :-1, None] + length * (nodes + 1) / 2).flatten(1)
        weight = (length * weights / 2).flatten(1)

        def integral(function):
            inside = course.exponent(dict(values), at)
            return (function(at, end - at, inside) * weight).sum(1, keepdim=True)

        p = {k: v[:, None] for k, v in self.setting.model.of(growth, values).items()}
        first, second = growth.flow_coefficients(p, Context(dt=end, kill=kill, integral=integral), TorchOps)
        return FLOWS[growth.flow](b, first, second)

    def map(self, z: torch.Tensor, scans: Scans, day: torch.Tensor) -> torch.Tensor:
        """Voxel averages (n, z, y, x) at days (n,)."""
        grids = [e.diff() / 2 + e[:-1] for e in (self.maps.edges(a) for a in self.maps.axes)]
        points = torch.stack(torch.meshgrid(*grids, indexing="ij"), -1).reshape(1, -1, len(grids))
        u = self(z, self.course(scans), day, points.expand(len(z), -1, -1))
        return u.reshape(-1, *self.maps.shape)

    def residual(self, z: torch.Tensor, course: Doses, day: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """u_t - D lap u - growth(u) + kill u at days (n,) and points (n, m, d), per day, (n, m)."""
        values = self.values(z)
        day, x = day.detach().requires_grad_(), x.detach().requires_grad_()
        u = self(z, course, day, x)
        # Points share their day: the product of the Jacobian with ones, by differentiating that of its transpose.
        direction = torch.ones_like(u).requires_grad_()
        back = _gradient(u, day, direction)
        rate = _gradient(back.sum(), direction)
        slopes = _gradient(u.sum(), x)
        laplacian = sum(_gradient(slopes[..., i].sum(), x)[..., i] for i in range(x.shape[-1]))
        hazard = _gradient(course.exponent(values, day[:, None]).sum(), day)[:, None]
        model = self.setting.model
        p = {k: v[:, None] for k, v in model.of(model.growth, values).items()}
        diffusion = values[f"diffusion.{model.diffusion.uniform}"][:, None]
        return rate - diffusion * laplacian - model.growth.rate(u, p, Context(), TorchOps) + hazard * u


def _gradient(y: torch.Tensor, x: torch.Tensor, along: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient of y by x that can be differentiated again; zero where y does not depend on x."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    (found,) = torch.autograd.grad(y, x, along, create_graph=True, allow_unused=True)
    return torch.zeros_like(x) if found is None else found
