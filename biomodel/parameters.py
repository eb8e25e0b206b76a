"""Parameters: a name, a unit, bounds, a prior and where its default comes from.

Every prior is Gaussian in a transformed coordinate ``z`` (the logarithm for positive quantities, the logit for
fractions, the value itself otherwise), so that calibration works in one unconstrained space and a cohort can learn a
joint Gaussian over all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from biomodel.errors import ModelError

#: What a pointwise function computes with and returns: whatever numbers the back end supplies (a float, an array, a
#: tensor, a symbolic expression).
Operand: TypeAlias = Any


class NumpyOps:
    """The primitive functions of terms and priors, on numpy arrays and floats."""

    exp = staticmethod(np.exp)
    log = staticmethod(np.log)
    sqrt = staticmethod(np.sqrt)
    where = staticmethod(np.where)

    @staticmethod
    def xlogx(u) -> Operand:
        """u log u, continued by 0 for u <= 0."""
        u = np.asarray(u, float)
        return np.where(u > 0, u * np.log(np.where(u > 0, u, 1.0)), 0.0)


@dataclass(frozen=True)
class Prior:
    """A prior that is Gaussian in a transformed coordinate. Use one of its subclasses."""

    def to_z(self, value, ops=NumpyOps) -> Operand:
        """Transformed coordinate of a value: the value itself, unless a subclass says otherwise."""
        return value

    def to_value(self, z, ops=NumpyOps) -> Operand:
        """Value at a transformed coordinate."""
        return z

    @property
    def location(self) -> float:
        """Mean of the transformed coordinate."""
        raise NotImplementedError

    @property
    def scale(self) -> float:
        """Standard deviation of the transformed coordinate."""
        raise NotImplementedError

    def at(self, location: float, scale: float) -> Prior:
        """The same kind of prior with another Gaussian in the transformed coordinate."""
        raise NotImplementedError

    def quantile(self, q: float) -> float:
        """Quantile of the parameter itself (the transforms are monotone)."""
        from scipy.special import ndtri

        return float(self.to_value(self.location + self.scale * ndtri(q)))


def _positive(what: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ModelError(f"{what}: {name} is {value!r}; expected a positive finite number.")


@dataclass(frozen=True)
class LogNormal(Prior):
    """Log-normal prior of a positive parameter.

    Parameters
    ----------
    median : float
        Median, in the parameter's unit.
    sigma : float
        Standard deviation of the natural logarithm (dimensionless).
    """

    median: float
    sigma: float

    def __post_init__(self):
        _positive("LogNormal", median=self.median, sigma=self.sigma)

    def to_z(self, value, ops=NumpyOps) -> Operand:
        return ops.log(value)

    def to_value(self, z, ops=NumpyOps) -> Operand:
        return ops.exp(z)

    @property
    def location(self) -> float:
        return math.log(self.median)

    @property
    def scale(self) -> float:
        return self.sigma

    def at(self, location: float, scale: float) -> LogNormal:
        return LogNormal(math.exp(location), scale)


@dataclass(frozen=True)
class LogitNormal(Prior):
    """Logit-normal prior of a fraction in (0, 1): `median`, and the standard deviation `sigma` of its logit."""

    median: float
    sigma: float

    def __post_init__(self):
        _positive("LogitNormal", median=self.median, sigma=self.sigma)
        if self.median >= 1:
            raise ModelError(f"LogitNormal: median is {self.median!r}; a fraction lies between 0 and 1.")

    def to_z(self, value, ops=NumpyOps) -> Operand:
        return ops.log(value / (1 - value))

    def to_value(self, z, ops=NumpyOps) -> Operand:
        return 1 / (1 + ops.exp(-z))

    @property
    def location(self) -> float:
        return math.log(self.median / (1 - self.median))

    @property
    def scale(self) -> float:
        return self.sigma

    def at(self, location: float, scale: float) -> LogitNormal:
        return LogitNormal(1 / (1 + math.exp(-location)), scale)


@dataclass(frozen=True)
class SoftplusNormal(Prior):
    """Prior of a positive parameter that is Gaussian where it is large and log-normal where it is small.

    value = unit log(1 + exp(z)) with Gaussian z. A log-normal with the same spread at small values has a far longer
    upper tail; for the strength of a treatment, of which some tumours feel almost nothing, that tail is too long.

    Parameters
    ----------
    median : float
        Median, in the parameter's unit.
    sigma : float
        Standard deviation of z (dimensionless).
    unit : float
        Value around which the transform turns from exponential to linear, in the parameter's unit.
    """

    median: float
    sigma: float
    unit: float

    def __post_init__(self):
        _positive("SoftplusNormal", median=self.median, sigma=self.sigma, unit=self.unit)

    def to_z(self, value, ops=NumpyOps) -> Operand:
        x = value / self.unit
        return x + ops.log(1 - ops.exp(-x))

    def to_value(self, z, ops=NumpyOps) -> Operand:
        # Branches are guarded so that none overflows: automatic differentiation evaluates them all.
        small = ops.exp(ops.where(z > 0, -z, z))
        tail = ops.where(z < -18.0, small, ops.log(1 + small))
        return self.unit * (ops.where(z > 0, z, 0.0 * z) + tail)

    @property
    def location(self) -> float:
        return float(self.to_z(np.float64(self.median)))

    @property
    def scale(self) -> float:
        return self.sigma

    def at(self, location: float, scale: float) -> SoftplusNormal:
        return SoftplusNormal(float(self.to_value(np.float64(location))), scale, self.unit)


@dataclass(frozen=True)
class Normal(Prior):
    """Normal prior: `mean` and standard deviation `sd`, both in the parameter's unit."""

    mean: float
    sd: float

    def __post_init__(self):
        _positive("Normal", sd=self.sd)

    @property
    def location(self) -> float:
        return self.mean

    @property
    def scale(self) -> float:
        return self.sd

    def at(self, location: float, scale: float) -> Normal:
        return Normal(location, scale)


@dataclass(frozen=True)
class Fixed(Prior):
    """A parameter that is known: all the prior's mass is at `value`, and nothing is calibrated."""

    value: float

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise ModelError(f"Fixed: value is {self.value!r}; expected a finite number.")

    @property
    def location(self) -> float:
        return self.value

    @property
    def scale(self) -> float:
        return 0.0

    def at(self, location: float, scale: float) -> Prior:
        raise ModelError(f"Fixed: the value {self.value} is known; give the parameter a prior before it is learned.")


@dataclass(frozen=True)
class Parameter:
    """One scalar parameter of a term.

    Attributes
    ----------
    name : str
        Name within its term (`k`); the model prefixes it (`growth.k`).
    units : str
        Unit of the value.
    prior : Prior
        Prior of the value; `Fixed` where it is known.
    bounds : (float, float)
        Values outside are refused by `simulate` and never tried by a calibration.
    source : str
        Where the default prior comes from (DOI where there is one).
    """

    name: str
    units: str
    prior: Prior
    bounds: tuple[float, float]
    source: str = ""
    description: str = ""

    def __post_init__(self):
        if not self.bounds[0] < self.bounds[1]:
            raise ModelError(f"parameter {self.name}: bounds {self.bounds} are not increasing.")

    @property
    def fixed(self) -> bool:
        return isinstance(self.prior, Fixed)

    @property
    def typical(self) -> float:
        """The known value, or the prior's median."""
        return float(self.prior.to_value(self.prior.location))


@dataclass(frozen=True, eq=False)
class JointPrior:
    """A joint Gaussian over the transformed coordinates of several parameters, as learned from a cohort.

    Attributes
    ----------
    names : tuple of str
        Global parameter names, in the order of `mean`.
    mean : ndarray, shape (p,)
    covariance : ndarray, shape (p, p)
    """

    names: tuple[str, ...]
    mean: np.ndarray
    covariance: np.ndarray
    source: str = field(default="")

    def __post_init__(self):
        mean, cov = np.asarray(self.mean, float), np.asarray(self.covariance, float)
        p = len(self.names)
        if mean.shape != (p,) or cov.shape != (p, p):
            raise ModelError(f"JointPrior: {p} names, but mean has shape {mean.shape} and covariance {cov.shape}.")
        if not np.allclose(cov, cov.T) or np.linalg.eigvalsh(cov).min() <= 0:
            raise ModelError("JointPrior: the covariance is not symmetric positive definite.")
        object.__setattr__(self, "mean", mean)
        object.__setattr__(self, "covariance", cov)
