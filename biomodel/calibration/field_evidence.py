"""How smooth and how variable a map is, from the data: the evidence of a field's length and standard deviation.

A prior chosen by hand decides what the data may say: too wide, and a map takes over what other parameters explain; too
narrow, and it stays flat. The evidence weighs both. It is cheap here, for two reasons. The data inform few directions:
in those that outweigh even a rough and wide reference prior, U, the data are y = U'd with the covariance
I + U' J C J' U under any prior C (in units of the noise). And all Matérn priors on one padded box have the same
eigenvectors, the cosines: C differs from the reference's by a factor for each of them. So one low-rank factorisation of
the reference's Hessian gives the evidence of every length and sd without another solution of the equations. The data in
directions where they do not outweigh the widest prior are left out, for all priors alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

from biomodel.calibration.field_prior import FieldPrior, Matern
from biomodel.calibration.field_problem import FieldLinear
from biomodel.calibration.lowrank import leading
from biomodel.errors import CalibrationError
from biomodel.parameters import LogNormal

__all__ = ["FieldEvidence", "LearnedMatern"]

#: Eigenpairs with a relative residual above this are not used.
USABLE = 0.1
#: Groups of cosines of like frequency, over the whole range.
GROUPS = 80
#: Length and sd change at most by this factor at once: the evidence is that of the problem linearised where it stands.
STRIDE = 2.0
#: Length and sd stay within this central share of their hyperpriors: where the evidence pulls further, a nearly
#: constant map stands in for a wider prior of the level, or takes up what the model does not know.
INSIDE = 0.99


@dataclass(frozen=True)
class LearnedMatern:
    """Hyperpriors of a field's length and standard deviation, which then are set from the data.

    Parameters
    ----------
    length : LogNormal
        Of the correlation length, mm.
    sd : LogNormal
        Of the standard deviation: for `Multiplied` of the logarithm of the rate, for `Added` in its unit.

    Notes
    -----
    Working values: tumours of 10 to 40 mm differ from part to part over several mm, and rates of growth between
    patients by a factor of 1.5 (the spread of `Growth` priors here), which parts of one tumour hardly exceed.
    """

    length: LogNormal = LogNormal(10.0, 0.5)
    sd: LogNormal = LogNormal(0.25, 0.7)

    @property
    def median(self) -> Matern:
        """Where the search begins."""
        return Matern(self.length.median, self.sd.median)

    def reference(self, voxel: float) -> Matern:
        """Rougher and wider than what is likely, but no rougher than two voxels (mm) allow."""
        return Matern(max(self.length.quantile(0.16), 2 * voxel), self.sd.quantile(0.84))

    @property
    def ends(self) -> tuple[Matern, Matern]:
        """Least and largest length and sd that are considered."""
        low, high = (1 - INSIDE) / 2, (1 + INSIDE) / 2
        return (Matern(self.length.quantile(low), self.sd.quantile(low)),
                Matern(self.length.quantile(high), self.sd.quantile(high)))  # fmt: skip

    def at_an_end(self, matern: Matern) -> bool:
        """Whether length or sd stand at the upper end of what is considered."""
        most = self.ends[1]
        return bool(matern.length > 0.99 * most.length or matern.sd > 0.99 * most.sd)

    def log_density(self, matern: Matern) -> float:
        """Log density of the logarithms of length and sd, up to a constant."""
        terms = ((self.length, matern.length), (self.sd, matern.sd))
        return -0.5 * sum(((np.log(value) - prior.location) / prior.scale) ** 2 for prior, value in terms)


class FieldEvidence:
    """Log evidence of a field's prior, from one linearisation about a reference prior.

    Parameters
    ----------
    linear : FieldLinear
        Of a problem whose field has the reference prior.
    most : int
        Most Hessian products.
    seed : int
    """

    def __init__(self, linear: FieldLinear, most: int = 300, seed: int = 0):
        problem = linear.problem
        self.reference, domain, self.padding = problem.field, problem.base.domain, problem.padding
        self.shape, self.spacing = domain.shape, domain.spacing
        self.lowrank = leading(linear.hessian, problem.size, most=most, seed=seed)
        found = self.lowrank
        good = found.errors < USABLE
        if not good.any():
            raise CalibrationError(
                "FieldLaplace: the data do not outweigh even a wide prior of the map in any direction; its length and "
                "sd cannot be learned. Give a Matern, or calibrate one rate for all with Laplace()."
            )
        self.root = np.sqrt(found.values[good])
        vectors = found.vectors[good]
        # The data of the linearised problem: residuals, and what the present estimate already explains.
        self.data = vectors @ (linear.pulled() + linear.hessian(linear.white)) / self.root
        p, n = problem.p, self.reference.size
        scale = np.log1p(self.reference.frequencies.ravel())
        self.group = np.minimum((scale / scale.max() * GROUPS).astype(int), GROUPS - 1)
        self.count = np.maximum(np.bincount(self.group, minlength=GROUPS), 1)
        field = vectors[:, p : p + n]
        self.others = np.eye(len(self.root)) - field @ field.T
        self.parts = np.zeros((GROUPS, len(self.root), len(self.root)))
        for g in range(GROUPS):
            here = field[:, self.group == g]
            self.parts[g] = here @ here.T

    def __call__(self, matern: Matern) -> float:
        """Log evidence of the informed directions' data under this prior; nats."""
        prior = FieldPrior(matern, self.shape, self.spacing, self.padding)
        ratio = (prior.root_spectrum / self.reference.root_spectrum).ravel() ** 2
        factors = np.bincount(self.group, ratio, GROUPS) / self.count
        inner = self.others + np.tensordot(factors, self.parts, 1)
        covariance = np.eye(len(self.root)) + self.root[:, None] * inner * self.root
        factor = np.linalg.cholesky(covariance)
        white = np.linalg.solve(factor, self.data)
        return -0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())

    def best(self, hyper: LearnedMatern, start: Matern) -> Matern:
        """Most probable length and sd given the data, at most `STRIDE` from `start`, within the hyperpriors' `ends`.

        The length is at least two voxels, and at most the longest side of the box: a longer one cannot be seen.
        """
        voxel = min(s for s, n in zip(self.spacing, self.shape, strict=True) if n > 1)
        side = max(s * n for s, n in zip(self.spacing, self.shape, strict=True))
        least, most = hyper.ends
        low = np.log([max(least.length, 2 * voxel), least.sd])
        high = np.maximum(np.log([min(most.length, side), most.sd]), low)
        begin = np.clip(np.log([start.length, start.sd]), low, high)

        def at(x: np.ndarray) -> Matern:
            return Matern(*np.exp(np.clip(x, low, high)).tolist())

        def cost(x: np.ndarray) -> float:
            matern, beyond = at(x), x - np.clip(x, low, high)
            return -(self(matern) + hyper.log_density(matern)) + 100 * float(beyond @ beyond)

        simplex = np.array([begin, begin + [0.4, 0.0], begin + [0.0, -0.5]])
        found = minimize(cost, begin, method="Nelder-Mead",
                         options={"initial_simplex": simplex, "xatol": 0.02, "fatol": 0.02, "maxfev": 120})  # fmt: skip
        return at(np.clip(found.x, begin - np.log(STRIDE), begin + np.log(STRIDE)))
