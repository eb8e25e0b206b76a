"""Prior of a spatial field: a Gaussian with Matérn covariance, by cosine transforms on a padded box."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.fft import dctn, idctn

from biomodel.errors import CalibrationError

__all__ = ["Added", "FieldPrior", "Link", "Matern", "Multiplied"]


class Link:
    """How a field makes a map of a parameter from its level, a number."""

    #: Whether the field is a change of the parameter's logarithm.
    logarithmic = False

    def of(self, level: np.ndarray, field: np.ndarray) -> np.ndarray:
        """The map, from a level that broadcasts to the field."""
        raise NotImplementedError

    def slopes(self, level: float, field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Derivatives of the map by the field and by the level, voxel by voxel."""
        raise NotImplementedError


@dataclass(frozen=True)
class Multiplied(Link):
    """level exp(field): the field is the logarithm of a factor, and the map is positive."""

    logarithmic = True

    def of(self, level: np.ndarray, field: np.ndarray) -> np.ndarray:
        return np.asarray(level * np.exp(field))

    def slopes(self, level: float, field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        factor = np.exp(field)
        return level * factor, factor


@dataclass(frozen=True)
class Added(Link):
    """level + field: the field has the parameter's unit; a growth rate below 0 is a loss of cells."""

    def of(self, level: np.ndarray, field: np.ndarray) -> np.ndarray:
        return np.asarray(level + field)

    def slopes(self, level: float, field: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.ones_like(field), np.ones_like(field)


@dataclass(frozen=True)
class Matern:
    """Gaussian field whose precision is the square of an elliptic operator (bi-Laplacian).

    Covariance (kappa² - Laplacian)^-2, scaled: a Matérn field of smoothness 2 - d / 2 in d dimensions (Lindgren, Rue
    and Lindström 2011, J R Stat Soc B 73:423, doi:10.1111/j.1467-9868.2011.00777.x).

    Parameters
    ----------
    length : float
        Distance, mm, at which the correlation has fallen to about 0.1: sqrt(8 smoothness) / kappa.
    sd : float
        Standard deviation of the field, in its unit. For the logarithm of a rate (`Multiplied`), 0.5 says that two
        thirds of the voxels lie within a factor of 1.6.
    """

    length: float = 10.0
    sd: float = 0.5

    def __post_init__(self) -> None:
        if not (self.length > 0 and self.sd > 0):
            raise CalibrationError(f"Matern: length {self.length:g} mm, sd {self.sd:g}; expected positive numbers.")


class FieldPrior:
    """The prior on a box of voxels.

    The box is padded by one length on every side with extent, so that the reflections of the cosine transform, which
    double the variance at a boundary, lie outside.

    Parameters
    ----------
    matern : Matern
    shape, spacing : (z, y, x)
        Voxels and mm.
    padding : float, optional
        Width of the padding, mm, where it is not the prior's length: priors on the same padded box have the same
        eigenvectors, so that one can be exchanged for another.

    Raises
    ------
    CalibrationError
        If no axis has extent, or the length is shorter than a voxel: neighbours would be independent, and the map
        noise.
    """

    def __init__(
        self,
        matern: Matern,
        shape: tuple[int, int, int],
        spacing: tuple[float, float, float],
        padding: float | None = None,
    ):
        self.matern, self.shape = matern, tuple(shape)
        steps = [s for n, s in zip(shape, spacing, strict=True) if n > 1]
        if not steps:
            raise CalibrationError("FieldPrior: a single voxel; a map needs at least one axis with extent.")
        if matern.length < min(steps):
            raise CalibrationError(
                f"FieldPrior: length {matern.length:g} mm is shorter than a voxel ({min(steps):g} mm); voxels would "
                "not inform each other. Give a length of at least two voxels."
            )
        margin = matern.length if padding is None else padding
        self.pad = tuple(int(np.ceil(margin / s)) if n > 1 else 0 for n, s in zip(shape, spacing, strict=True))
        self.padded = tuple(n + 2 * p for n, p in zip(shape, self.pad, strict=True))
        dimensions = sum(n > 1 for n in shape)
        kappa = np.sqrt(8 * (2 - dimensions / 2)) / matern.length
        laplacian: np.ndarray | float = 0.0
        for axis, (n, s) in enumerate(zip(self.padded, spacing, strict=True)):
            values = (2 - 2 * np.cos(np.pi * np.arange(n) / n)) / s**2
            laplacian = laplacian + values.reshape([-1 if a == axis else 1 for a in range(3)])
        #: Eigenvalues of minus the Laplacian, 1/mm², of each coordinate.
        self.frequencies = np.asarray(laplacian)
        self.root_spectrum = 1 / (kappa**2 + self.frequencies)
        # The variance is as asked in the middle, away from the reflections.
        middle = np.zeros((1, *shape))
        middle[(0, *(n // 2 for n in shape))] = 1.0
        self.root_spectrum = self.root_spectrum * (matern.sd / np.sqrt((self.transpose(middle) ** 2).sum()))

    @property
    def size(self) -> int:
        """Number of white-noise coordinates."""
        return int(np.prod(self.padded))

    @property
    def _inner(self) -> tuple:
        return (..., *(slice(p, p + n) for p, n in zip(self.pad, self.shape, strict=True)))

    def root(self, white: np.ndarray) -> np.ndarray:
        """Fields from white noise: (m, size) to (m, z, y, x); the covariance is root root'."""
        coefficients = white.reshape(-1, *self.padded) * self.root_spectrum
        return np.asarray(idctn(coefficients, axes=(1, 2, 3), norm="ortho"))[self._inner]

    def transpose(self, fields: np.ndarray) -> np.ndarray:
        """Transpose of `root`: (m, z, y, x) to (m, size)."""
        full = np.zeros((len(fields), *self.padded))
        full[self._inner] = fields
        return np.asarray(dctn(full, axes=(1, 2, 3), norm="ortho") * self.root_spectrum).reshape(len(fields), -1)

    def covariance(self, fields: np.ndarray) -> np.ndarray:
        """Product with the prior covariance, (m, z, y, x)."""
        return self.root(self.transpose(fields))
