"""Unknown initial states as a few numbers with a Gaussian prior: one or several foci, or a smooth free field.

A start is described without a grid and then bound to a domain, where it gives voxel averages and their derivatives: the
same start on voxels half as large is the same function of space.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from scipy.ndimage import gaussian_filter, maximum_filter
from scipy.special import erf, expit, logit

from biomodel.calibration.gaussnewton import GaussianPrior
from biomodel.domain import Domain
from biomodel.errors import CalibrationError
from biomodel.parameters import LogitNormal, LogNormal, Prior

#: Modes of a free field whose prior sd is below this share of the largest are left out.
NEGLIGIBLE = 1e-2
#: Most modes of a free field: each is a direction of the derivative.
MOST = 700
#: Cell fractions of a guess are kept between these before their logit is taken.
LEAST, FULL = 1e-4, 0.98


class BoundStart(Protocol):
    """A start on a domain.

    Attributes
    ----------
    names : tuple of str
        Of the coordinates.
    prior : GaussianPrior
        Of the coordinates (s,).
    limits : (ndarray, ndarray)
        Bounds (s,) of the coordinates.
    alike : int
        How many points of the coordinates' space give the same state: orders of like foci.
    """

    names: tuple[str, ...]
    alike: int
    prior: GaussianPrior
    limits: tuple[np.ndarray, np.ndarray]

    def states(self, z: np.ndarray) -> np.ndarray:
        """Cell fractions (draws, z, y, x) of coordinates (draws, s)."""

    def linear(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cell fraction (z, y, x) at coordinates (s,), and its derivatives (s, z, y, x)."""

    def guesses(self, image: np.ndarray) -> list[np.ndarray]:
        """Coordinates (s,) to begin a search from, made from a map of cell fractions (z, y, x)."""


class Start(Protocol):
    """An initial state that is inferred."""

    def on(self, domain: Domain) -> BoundStart:
        """The start on a domain."""


# Foci -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foci:
    """One or several round foci, u = 1 - prod_i (1 - a_i exp(-|x - p_i|² / (2 s_i²))).

    Parameters
    ----------
    count : int
    peak : Prior
        Of the cell fraction a_i in the middle.
    width : Prior
        Of the standard deviation s_i, mm.
    spread : float
        Prior sd of a focus's position around the middle of the organ, as a share of the organ's extent along each axis.

    Examples
    --------
    >>> import biomodel as bm
    >>> Foci(2).on(bm.Domain.box((1, 16, 16), (2.0, 2.0, 2.0))).names
    ('focus1.y', 'focus1.x', 'focus1.peak', 'focus1.width', 'focus2.y', 'focus2.x', 'focus2.peak', 'focus2.width')
    """

    count: int = 1
    peak: Prior = field(default_factory=lambda: LogitNormal(0.4, 1.5))
    width: Prior = field(default_factory=lambda: LogNormal(5.0, 0.6))
    spread: float = 0.25

    def __post_init__(self):
        if self.count < 1 or not self.spread > 0:
            raise CalibrationError(f"Foci: count {self.count}, spread {self.spread}; expected at least one focus and a "
                                   "positive spread.")  # fmt: skip

    def on(self, domain: Domain) -> BoundFoci:
        """The foci on a domain with extent along at least one axis."""
        return BoundFoci(self, domain)


class BoundFoci:
    """`Foci` on a domain. Voxel averages are exact for one focus: products of error functions."""

    def __init__(self, foci: Foci, domain: Domain):
        self.foci, self.domain = foci, domain
        self.axes = _axes(domain, "Foci")
        inside = np.argwhere(domain.mask)
        place, spread, low, high = [], [], [], []
        self.edges = []
        for axis, name in self.axes:
            step, at = domain.spacing[axis], domain.coords[name]
            rising = 1.0 if at[-1] > at[0] else -1.0
            self.edges.append(np.concatenate((at - rising * step / 2, at[-1:] + rising * step / 2)))
            covered = at[[inside[:, axis].min(), inside[:, axis].max()]]
            a, b = covered.min() - step / 2, covered.max() + step / 2
            place.append((a + b) / 2)
            spread.append(foci.spread * (b - a))
            low.append(a)
            high.append(b)
        one = np.array([*place, foci.peak.location, foci.width.location])
        scale = np.array([*spread, foci.peak.scale, foci.width.scale])
        n = foci.count
        self.prior = GaussianPrior(np.tile(one, n), np.diag(np.tile(scale, n) ** 2))
        bounds = [[*low, *(one[-2:] - 5 * scale[-2:])], [*high, *(one[-2:] + 5 * scale[-2:])]]
        self.limits = (np.tile(bounds[0], n), np.tile(bounds[1], n))
        kinds = [*(name for _, name in self.axes), "peak", "width"]
        self.names = tuple(f"focus{i + 1}.{k}" for i in range(n) for k in kinds)
        self.alike = math.factorial(n)

    def values(self, z: np.ndarray) -> dict[str, float]:
        """Positions (mm), peaks and widths (mm) by name."""
        found = {}
        for name, v in zip(self.names, z, strict=True):
            kind = name.split(".")[1]
            prior = {"peak": self.foci.peak, "width": self.foci.width}.get(kind)
            found[name] = float(v if prior is None else prior.to_value(v))
        return found

    def states(self, z: np.ndarray) -> np.ndarray:
        """Cell fractions (draws, z, y, x)."""
        return 1 - self._parts(np.atleast_2d(z))[0].prod(1)

    def linear(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cell fraction (z, y, x) and its derivatives (s, z, y, x)."""
        empty, slopes = self._parts(z[None], slopes=True)
        empty = empty[0]
        found = []
        for i in range(self.foci.count):
            others = np.prod(np.delete(empty, i, 0), 0)
            found.append(others * slopes[i])
        return 1 - empty.prod(0), np.concatenate(found)

    def _parts(self, z: np.ndarray, slopes: bool = False) -> tuple[np.ndarray, list[np.ndarray]]:
        """1 - a_i g_i, (draws, count, z, y, x); and the derivatives of a_i g_i of the first draw."""
        n, d = self.foci.count, len(self.axes)
        z = z.reshape(len(z), n, d + 2)
        peak = np.asarray(self.foci.peak.to_value(z[..., -2]))
        width = np.asarray(self.foci.width.to_value(z[..., -1]))
        factors, moved, widened = [], [], []
        for j, edges in enumerate(self.edges):
            t = (edges - z[..., j, None]) / width[..., None]
            step = abs(edges[1] - edges[0])
            rising = np.sign(edges[1] - edges[0])
            root = np.sqrt(np.pi / 2) * erf(t / np.sqrt(2))
            bell = np.exp(-0.5 * t**2)
            factors.append(rising * width[..., None] / step * np.diff(root))
            moved.append(-rising / step * np.diff(bell))
            widened.append(factors[-1] - rising * width[..., None] / step * np.diff(t * bell))  # by log width
        shape = [self.domain.shape[axis] if any(a == axis for a, _ in self.axes) else 1 for axis in range(3)]

        def product(parts):
            found = np.ones((*z.shape[:2], 1, 1, 1))
            for (axis, _), f in zip(self.axes, parts, strict=True):
                found = found * f.reshape(*z.shape[:2], *(shape[axis] if a == axis else 1 for a in range(3)))
            return np.where(self.domain.mask, found, 0.0)

        bump = product(factors)
        full = peak[..., None, None, None] * bump
        if not slopes:
            return 1 - full, []
        found = []
        for i in range(n):
            a, w = peak[0, i], width[0, i]
            rows = [a * product([moved[k] if k == j else factors[k] for k in range(d)])[0, i] for j in range(d)]
            rows.append(_slope(self.foci.peak, z[0, i, -2]) * bump[0, i])
            by_width = sum(product([widened[k] if k == j else factors[k] for k in range(d)])[0, i] for j in range(d))
            rows.append(_slope(self.foci.width, z[0, i, -1]) * a / w * by_width)
            found.append(np.stack(rows))
        return 1 - full, found

    def guesses(self, image: np.ndarray) -> list[np.ndarray]:
        """Foci at the image's peaks, and spread along its longest direction; narrow ones, wide ones."""
        n, d = self.foci.count, len(self.axes)
        weight = np.where(self.domain.mask, np.clip(image, 0, 1), 0.0)
        if weight.sum() <= 0:
            return [self.prior.mean.copy()]
        grids = np.meshgrid(*(self.domain.coords[a] for a in "zyx"), indexing="ij")
        where = np.stack([grids[axis] for axis, _ in self.axes], -1)
        total = weight.sum()
        middle = (weight[..., None] * where).sum((0, 1, 2)) / total
        offset = (where - middle).reshape(-1, d)
        covariance = (offset * weight.reshape(-1, 1)).T @ offset / total
        size, turn = np.linalg.eigh(covariance)
        layouts = []
        if n == 1:
            layouts.append(middle[None])
        else:
            along = turn[:, -1] * np.sqrt(size[-1]) * 1.2
            layouts.append(middle + np.linspace(-1, 1, n)[:, None] * along)
            if d > 1:
                angle = 2 * np.pi * np.arange(n) / n
                across = turn[:, -2] * np.sqrt(size[-2]) * 1.2
                layouts.append(middle + np.cos(angle)[:, None] * along + np.sin(angle)[:, None] * across)
        layouts.append(self._peaks(weight, where, n))
        peak = float(np.clip(np.quantile(weight[weight > 0.2 * weight.max()], 0.9), 0.05, 0.9))
        wide = float(np.sqrt(size.mean())) / (1 if n == 1 else np.sqrt(n))
        found = []
        for places, factor in itertools.product(layouts, (0.8, 0.4)):
            ends = [float(self.foci.peak.to_z(peak)), float(self.foci.width.to_z(max(factor * wide, 0.5)))]
            z = np.concatenate([[*p, *ends] for p in places])
            found.append(np.clip(z, *self.limits))
        return found

    def _peaks(self, weight: np.ndarray, where: np.ndarray, n: int) -> np.ndarray:
        """The n highest local maxima (n, d) of a smoothed map; the highest again where there are fewer."""
        sigma = [1.0 if k > 1 else 0.0 for k in weight.shape]
        blurred = gaussian_filter(weight, sigma)
        top = (blurred == maximum_filter(blurred, [5 if k > 1 else 1 for k in weight.shape])) & (blurred > 0)
        order = np.argsort(-blurred[top], kind="stable")
        places = where[top][order][:n]
        return np.concatenate((places, np.repeat(places[:1], n - len(places), 0)))


# Free field -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FreeStart:
    """A free smooth field: the logit of the cell fraction is Gaussian, as a sum of cosines.

    Its covariance falls with the squared distance (squared exponential). The cosines live on a box wider than the
    domain by one length on each side, so that their reflections lie outside.

    Parameters
    ----------
    length : float
        Distance, mm, at which the correlation has fallen to exp(-1/2).
    level : float
        Cell fraction where nothing is known: low, as a little everywhere grows to a lot.
    sd : float
        Standard deviation of the logit.
    """

    length: float = 10.0
    level: float = 5e-4
    sd: float = 3.0

    def __post_init__(self):
        if not (self.length > 0 and self.sd > 0 and 0 < self.level < 1):
            raise CalibrationError(f"FreeStart: length {self.length:g} mm, sd {self.sd:g}, level {self.level:g}; "
                                   "expected positive numbers and a level below 1.")  # fmt: skip

    def on(self, domain: Domain) -> BoundField:
        """The field on a domain with extent along at least one axis.

        Raises
        ------
        CalibrationError
            If the domain needs too many cosines.
        """
        return BoundField(self, domain)


class BoundField:
    """`FreeStart` on a domain; coordinates are standard normal."""

    def __init__(self, free: FreeStart, domain: Domain):
        self.free, self.domain = free, domain
        cosines, decays, self.axes = [], [], _axes(domain, "FreeStart")
        for axis, _ in self.axes:
            step, n = domain.spacing[axis], domain.shape[axis]
            length = n * step + 2 * free.length
            at = free.length + (np.arange(n) + 0.5) * step
            k = np.arange(int(np.ceil(3.5 * length / (np.pi * free.length))) + 1) * np.pi / length
            # Averages over voxels; weights are the roots of the covariance's spectrum, but for a common factor.
            cosines.append(np.cos(np.outer(at, k)) * np.sinc(k * step / 2 / np.pi))
            decays.append(np.where(k > 0, np.sqrt(2.0), 1.0) * np.exp(-0.25 * (k * free.length) ** 2))
        grid = np.ones(())
        for e in decays:
            grid = np.multiply.outer(grid, e)
        self.kept = np.argwhere(grid >= NEGLIGIBLE)
        if len(self.kept) > MOST:
            raise CalibrationError(
                f"FreeStart: {len(self.kept)} cosines are needed for a length of {free.length:g} mm here, more "
                f"than {MOST}; give a longer length, crop the domain, or use Foci."
            )
        count = len(self.kept)
        modes = np.ones((count, 1, 1, 1))
        for n, (axis, _) in enumerate(self.axes):
            shape = [domain.shape[axis] if a == axis else 1 for a in range(3)]
            modes = modes * (cosines[n] * decays[n])[:, self.kept[:, n]].T.reshape(count, *shape)
        # In the middle, away from reflections, the variance is as asked for.
        a, b, c = (n // 2 for n in domain.shape)
        modes *= free.sd / np.sqrt((modes[:, a, b, c] ** 2).sum())
        self.modes = np.where(domain.mask, modes, 0.0)
        self.level, self.alike = float(logit(free.level)), 1
        self.prior = GaussianPrior(np.zeros(count), np.eye(count))
        self.limits = (np.full(count, -8.0), np.full(count, 8.0))
        self.names = tuple("cosine " + " ".join(str(int(k)) for k in row) for row in self.kept)

    def states(self, z: np.ndarray) -> np.ndarray:
        """Cell fractions (draws, z, y, x)."""
        logits = self.level + np.tensordot(np.atleast_2d(z), self.modes, 1)
        return np.where(self.domain.mask, expit(logits), 0.0)

    def linear(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cell fraction (z, y, x) and its derivatives (s, z, y, x)."""
        u = self.states(z)[0]
        return u, u * (1 - u) * self.modes

    def guesses(self, image: np.ndarray) -> list[np.ndarray]:
        """The coordinates whose logit is nearest to the image's, given the prior."""
        inside = self.domain.mask
        wanted = logit(np.clip(image, LEAST, FULL))[inside] - self.level
        # Errors of the logit: about one where there are cells, more where the image says only "few".
        weight = np.where(image[inside] > 0.05, 1.0, 0.1)
        modes = self.modes[:, inside]
        left = (modes * weight) @ modes.T + np.eye(len(modes))
        return [np.linalg.solve(left, (modes * weight) @ wanted)]


def _axes(domain: Domain, what: str) -> list[tuple[int, str]]:
    found = [(axis, name) for axis, name in enumerate("zyx") if domain.shape[axis] > 1]
    if not found:
        raise CalibrationError(f"{what}: the domain is one voxel, where there is no place; give one with extent.")
    return found


def _slope(prior: Prior, z: float) -> float:
    """Derivative of a prior's value by its coordinate."""
    step = 1e-5
    return (float(prior.to_value(z + step)) - float(prior.to_value(z - step))) / (2 * step)


__all__ = ["BoundStart", "FreeStart", "Foci", "Start"]
