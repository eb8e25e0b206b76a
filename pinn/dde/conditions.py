"""The likelihood, the prior and zero flux as conditions of DeepXDE, and the organ as a geometry of DeepXDE."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from pinn.dde.backend import dde, double
from pinn.dde.equation import Equation
from pinn.dde.network import State
from pinn.geometry import Geometry
from pinn.physics import Physics
from pinn.splines import Splines

#: The two Gauss points of a voxel's side, from its lower end, in units of the side.
GAUSS = (0.5 - 0.5 / math.sqrt(3), 0.5 + 0.5 / math.sqrt(3))


class Organ(dde.geometry.Geometry):
    """The mask of a domain on the unit box, by its signed distance."""

    def __init__(self, geometry: Geometry):
        d = geometry.mask.ndim
        super().__init__(d, (np.zeros(d), np.ones(d)), math.sqrt(d))
        self.geometry, self.distance = geometry, geometry.distance
        self.sides = np.array(geometry.mask.shape) * geometry.spacing
        self._draws = 0

    def _at(self, x: np.ndarray) -> np.ndarray:
        """Distance (mm, positive inside) and its derivatives by place on the unit box, (d + 1, n)."""
        found = Splines.of(torch.tensor(np.asarray(x, float)), self.geometry.mask.shape).slopes(self.distance)
        return found.numpy()

    def inside(self, x: np.ndarray) -> np.ndarray:
        """bool (n,) for places (n, d): where the smooth distance says so, and in all voxels of the mask."""
        shape = np.array(self.geometry.mask.shape)
        voxel = np.clip((np.asarray(x, float) * shape).astype(int), 0, shape - 1)
        return (self._at(x)[0] >= 0) | self.geometry.mask[tuple(voxel.T)]

    def on_boundary(self, x: np.ndarray) -> np.ndarray:
        """bool (n,): within a twentieth of a voxel of the surface."""
        return np.abs(self._at(x)[0]) < 0.05 * self.geometry.spacing.min()

    def boundary_normal(self, x: np.ndarray) -> np.ndarray:
        """Unit vectors (n, d) along which a vanishing derivative means that nothing flows out."""
        conormal = -self._at(x)[1:].T / self.sides**2
        return conormal / np.linalg.norm(conormal, axis=1, keepdims=True).clip(1e-300)

    def random_points(self, n: int, random: str = "pseudo") -> np.ndarray:
        """Places (n, d) inside, of a Sobol sequence whatever `random` says; other ones at each call."""
        self._draws += 1
        return self.geometry.inside(n, self._draws)[:, : self.dim].numpy()

    def random_boundary_points(self, n: int, random: str = "pseudo") -> np.ndarray:
        """At most n places (m, d) on the surface."""
        self._draws += 1
        return self.geometry.surface(n, self._draws)[0][:, : self.dim].numpy()


def geometry_of(physics: Physics) -> dde.geometry.Geometry:
    """DeepXDE's geometry of a domain on the unit box: its own for whole boxes, `Organ` for masks."""
    if not physics.geometry.whole:
        return Organ(physics.geometry)
    d = len(physics.shape)
    low, high = [0.0] * d, [1.0] * d
    if d == 1:
        return dde.geometry.Interval(0, 1)
    return dde.geometry.Rectangle(low, high) if d == 2 else dde.geometry.Cuboid(low, high)


class Condition(dde.icbc.BC):
    """Base of conditions at points of their own."""

    points: np.ndarray

    def __init__(self):
        pass

    def collocation_points(self, X: np.ndarray) -> np.ndarray:
        """The condition's own points (n, d + 1)."""
        with double():
            return self.points.astype(dde.config.real(np))

    def error(self, X: np.ndarray, inputs: torch.Tensor, outputs: torch.Tensor, beg: int, end: int,
              aux_var: None = None) -> torch.Tensor:  # fmt: skip
        """What DeepXDE squares and averages, (m, 1)."""
        raise NotImplementedError


class Observations(Condition):
    """Voxel averages of the cell fraction, as data minus prediction over the noise.

    Each voxel is seen at two Gauss points per axis; S is that of the parameters, so that kills are inferred from data.

    Attributes
    ----------
    points : ndarray, shape (m 2^d, d + 1)
    data, sd : tensor, shape (m,)
    """

    def __init__(self, equation: Equation, net: State, tau: Sequence[float], data: np.ndarray, sd: np.ndarray):
        """`data` and `sd` are (T, n_1, ..., n_d); NaN where nothing was measured."""
        super().__init__()
        self.equation, self.net = equation, net
        self.group = 2**equation.d
        shape = equation.physics.shape
        offsets = np.stack(np.meshgrid(*[GAUSS] * equation.d, indexing="ij"), -1).reshape(-1, equation.d)
        points, values, noise = [], [], []
        for t, image, s in zip(tau, data, sd, strict=True):
            seen = np.isfinite(image) & equation.physics.geometry.mask
            where = (np.argwhere(seen)[:, None, :] + offsets) / np.array(shape)
            where = where.reshape(-1, equation.d)
            points.append(np.column_stack((where, np.full(len(where), t))))
            values.append(image[seen])
            noise.append(s[seen])
        self.points = np.concatenate(points)
        self.data, self.sd = torch.tensor(np.concatenate(values)), torch.tensor(np.concatenate(noise))

    def error(self, X: np.ndarray, inputs: torch.Tensor, outputs: torch.Tensor, beg: int, end: int,
              aux_var: None = None) -> torch.Tensor:  # fmt: skip
        """Data minus prediction over the noise (m, 1)."""
        u = self.equation.state(outputs[beg:end, 0], self.net.z, inputs[beg:end])
        return ((u.reshape(-1, self.group).mean(1) - self.data) / self.sd)[:, None]




class PriorOf(Condition):
    """The free parameters' distance from their prior, whitened; its sum of squares is that of a Gaussian's exponent.

    Attributes
    ----------
    mean, root : tensor, shape (p,) and (p, p)
        Prior mean of z, and the root of its precision.
    """

    def __init__(self, net: State, mean: np.ndarray, precision: np.ndarray, d: int):
        super().__init__()
        self.net = net
        self.mean, self.root = torch.tensor(mean), torch.tensor(np.linalg.cholesky(precision).T.copy())
        self.points = np.full((1, d + 1), 0.5)  # DeepXDE wants a point; none matters here

    def whitened(self, z: torch.Tensor) -> torch.Tensor:
        """Distance (p,) of z (p,)."""
        return self.root @ (z - self.mean)

    def error(self, X: np.ndarray, inputs: torch.Tensor, outputs: torch.Tensor, beg: int, end: int,
              aux_var: None = None) -> torch.Tensor:  # fmt: skip
        """The distance (p, 1)."""
        return self.whitened(self.net.z)[:, None]


class ZeroFlux(Condition):
    """Nothing flows through the organ's surface, or the box's sides where the network does not see to that.

    Attributes
    ----------
    points : ndarray, shape (m, d + 1)
    conormals : ndarray, shape (m, d)
        Outward normals in mm, each entry times the box's longest side over its own.
    """

    def __init__(self, equation: Equation, net: State, count: int, sides: bool, seed: int):
        super().__init__()
        self.equation, self.net = equation, net
        physics = equation.physics
        points, normals = (v.numpy() for v in physics.geometry.surface(count, seed))
        parts = [(points, normals)] if len(points) else []
        if sides:
            rng = np.random.default_rng(seed)
            for axis in range(equation.d):
                for end in (0.0, 1.0):
                    here = rng.random((max(count // (2 * equation.d), 8), equation.d + 1))
                    here[:, axis] = end
                    normal = np.zeros((len(here), equation.d))
                    normal[:, axis] = 2 * end - 1
                    parts.append((here, normal))
        self.points = np.concatenate([p for p, _ in parts])
        self.conormals = np.concatenate([n for _, n in parts]) * physics.metric.sqrt().numpy()

    def error(self, X: np.ndarray, inputs: torch.Tensor, outputs: torch.Tensor, beg: int, end: int,
              aux_var: None = None) -> torch.Tensor:  # fmt: skip
        """Outward flux (m, 1) in the residual's units."""
        values, x = self.equation.values(self.net.z), inputs
        u = self.equation.spared(values, x)[:, None] * outputs
        slope = dde.grad.jacobian(u, x, i=0)[beg:end, : self.equation.d]
        spread = self.equation.diffusivity(values, x[beg:end], u[beg:end, 0])
        out = (slope * torch.tensor(self.conormals)).sum(1) * spread / self.equation.layer
        return out[:, None]
